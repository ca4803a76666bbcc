"""A matrix of weights as the kernels know it: a row of a table, and where its tiles lie.

The layout is quantize.packing's.
"""

from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.tables import (
    ADDRESS,
    BF16,
    F32,
    FORMAT,
    GROUP_SIZE,
    INT8,
    N_IN,
    N_TILES,
    PLANES,
)
from quantize.packing import SLAB_TILES

SCALES = 32
"""Bytes of the 16 float16 scales that open a block."""

PREFETCH = 1024
"""How many bytes ahead the memory is asked for a tile that streams by."""

PREFETCH_NEAR = 4096
"""The same for several tokens, where codes must have come when they are needed: the multiplications
of one run of inputs leave no room for those of the next to begin, as those of one token do."""


@kernel
def run_bytes(fmt):
    """Bytes of 32 inputs' codes in a tile, for PLANES in each plane."""
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
    return n_in // matrix[GROUP_SIZE] * (SCALES + matrix[GROUP_SIZE] // 32 * run)


@kernel
def tile_address(matrix, tile):
    """Where a tile lies, and, for PLANES, its low nibbles."""
    size = tile_bytes(matrix)
    if matrix[FORMAT] != PLANES:
        return matrix[ADDRESS] + tile * size, 0
    low = 8 * matrix[N_IN]
    before, within = tile // SLAB_TILES * SLAB_TILES, tile % SLAB_TILES
    slab = matrix[ADDRESS] + before * size
    n_tiles = min(SLAB_TILES, matrix[N_TILES] - before)
    return slab + within * (size - low), slab + n_tiles * (size - low) + within * low
