"""A matrix of weights as the kernels know it: a row of a table, and where its tiles lie.

The layout is quantize.packing's.
"""

from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.tables import (
    ADDRESS,
    BF16,
    DOUBLE_SCALES,
    F32,
    FORMAT,
    GROUP_SIZE,
    INT8,
    N_IN,
    N_TILES,
    PLANES,
    SCALES,
)
from gemma_cli.runtime.vector import load_bf16, load_f16, load_i8, prefetch, prefetch_near, splat
from quantize.packing import PLANE_BITS, SLAB_TILES, UNIT_BYTES

OTHERS = tuple(2 * bits for bits in PLANE_BITS[1:])
"""Bytes of 16 rows' codes of an input in the planes after the first, which have no scales."""

PREFETCH = 1024
"""How many bytes ahead the memory is asked for a tile that streams by."""

PREFETCH_NEAR = 4096
"""The same for several tokens, where codes must have come when they are needed: the multiplications
of one run of inputs leave no room for those of the next to begin, as those of one token do."""


@kernel
def run_bytes(fmt):
    """Bytes of 32 inputs' codes in a tile, for PLANES in the first plane."""
    if fmt == PLANES:
        return 64 * PLANE_BITS[0]
    return 512 if fmt == INT8 else 256


@kernel
def tile_bytes(matrix):
    """Bytes of one tile of a matrix of the table; as quantize.packing.tile_bytes."""
    n_in, fmt = matrix[N_IN], matrix[FORMAT]
    if fmt == F32:
        return 64 * n_in
    if fmt == BF16:
        return 32 * n_in
    run = 512 if fmt in (INT8, PLANES) else 256
    units = UNIT_BYTES if matrix[SCALES] == DOUBLE_SCALES else 0
    return units + n_in // matrix[GROUP_SIZE] * (matrix[SCALES] + matrix[GROUP_SIZE] // 32 * run)


@kernel
def tile_address(matrix, tile):
    """Where a tile's blocks lie, for PLANES those of its first plane, and where then its others."""
    size, n_in = tile_bytes(matrix), matrix[N_IN]
    if matrix[FORMAT] != PLANES:
        units = UNIT_BYTES if matrix[SCALES] == DOUBLE_SCALES else 0
        return matrix[ADDRESS] + tile * size + units, (0, 0, 0)
    before, within = tile // SLAB_TILES * SLAB_TILES, tile % SLAB_TILES
    n_tiles = min(SLAB_TILES, matrix[N_TILES] - before)
    first = size - sum(OTHERS) * n_in
    slab = matrix[ADDRESS] + before * size
    second = slab + n_tiles * first
    third = second + n_tiles * OTHERS[0] * n_in
    fourth = third + n_tiles * OTHERS[1] * n_in
    return slab + within * first, advance((second, third, fourth), within * n_in)


@kernel
def load_units(matrix, blocks):
    """The units of a tile's scales, where they have any; blocks: address of its first block."""
    return load_bf16(blocks - UNIT_BYTES) if matrix[SCALES] == DOUBLE_SCALES else splat(1.0)


@kernel
def load_scales(matrix, block, units):
    """A block's 16 scales, f32x16, exact; units: as load_units gives them."""
    return load_i8(block) * units if matrix[SCALES] == DOUBLE_SCALES else load_f16(block)


@kernel
def look_ahead(w, n_bytes, n):
    """Asks the memory for what will be read when n tokens are done with what is read now."""
    for line in range(0, n_bytes, 64):
        if n == 1:
            prefetch(w + PREFETCH + line)
        else:
            prefetch_near(w + PREFETCH_NEAR + line)


@kernel
def look_ahead_others(others, n):
    """The same for 32 inputs of the planes after the first."""
    for plane in range(len(OTHERS)):
        look_ahead(others[plane], 32 * OTHERS[plane], n)


@kernel
def advance(others, n):
    """The addresses of the planes after the first, n inputs further."""
    second, third, fourth = others
    return second + OTHERS[0] * n, third + OTHERS[1] * n, fourth + OTHERS[2] * n
