"""Matrix products of many tokens by AMX, for `matmul`.

    y[t, r] = sum over i of bf16(W[r, i]) bf16(x[t, i])

Inputs come as blocks of bfloat16 (`inputs.Inputs`), those of bf16 weights in three parts, which
are multiplied one after the other. Other weights are expanded to bfloat16, scales and all. Sums are
float32. The units take 16 cycles for 16 tokens, 16 outputs and 32 inputs, in which two KB of
operands could come from the L1 cache, but less than one from the L2. So

- 32 tokens by 32 outputs are summed at once, in four tiles: each operand that is loaded is used
  twice, which is one KB in 16 cycles;
- PANEL inputs of 32 outputs are expanded at once, for all tokens. They and the block of inputs that
  goes by (16 KB each) stay in the L1 cache, so only the inputs, half a KB in 16 cycles, come from
  the L2. The sums go there and back between panels: another quarter of a KB;
- SIDE tiles go through the inputs side by side. Their sums (512 KB for 512 tokens), the inputs
  of a panel (256 KB) and those of the next one stay in the L2 cache. The sums lie close together
  until they are complete, for a token's outputs are pages apart from the next one's.

Expanding a tile takes as long as multiplying it by about 100 tokens.
"""

from gemma_cli.runtime.amx import (
    BLOCK,
    STEP,
    TILE,
    configure,
    lost,
    mark,
    multiply_blocks,
    release,
)
from gemma_cli.runtime.inputs import block_address
from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.matrix import (
    BF16,
    CODEBOOK,
    FORMAT,
    GROUP_SIZE,
    INT4,
    INT4_CODEBOOK,
    INT8,
    N_IN,
    PLANES,
    SCALES,
    run_bytes,
    tile_address,
    tile_bytes,
)
from gemma_cli.runtime.vector import (
    address_of,
    expand_bf16,
    expand_scaled_codebook,
    expand_scaled_int8,
    expand_scaled_planes,
    load_f32,
    prefetch,
    store_f32,
)

FORMATS = (INT4, INT4_CODEBOOK, INT8, PLANES, BF16)

PANEL = 256
"""Inputs that are expanded at once, a multiple of 32."""

PAIR = 2
"""Tiles that are expanded at once."""

SIDE = 16
"""Tiles that go through the inputs side by side."""

_ROW = 4 * 16 * PAIR  # Bytes of a token's sums for a pair of tiles.
_LINE = 64


def scratch_bytes(n_tokens: int) -> int:
    """Bytes that a thread needs to multiply so many tokens."""
    n_blocks = -(-n_tokens // BLOCK)
    return _LINE + PANEL // 32 * STEP + SIDE // PAIR * n_blocks * BLOCK * _ROW


@kernel
def first_tile(item, n_tiles, n_threads, most):
    """Where an item's tiles begin, or, of one too many, where the tiles end.

    Items are equal, up to `most` a thread. Each goes through all inputs, which come from the L3
    cache: so they have SIDE tiles at least if that leaves one for every thread.
    """
    n_items = n_threads * max(1, min(most, n_tiles // (SIDE * n_threads)))
    n_pairs = (n_tiles + PAIR - 1) // PAIR
    return min(PAIR * (n_pairs * item // n_items), n_tiles)


@kernel
def _part_bytes(matrix, n):
    """Bytes of n inputs of a tile, n a multiple of the group size; of PLANES the high nibbles'."""
    if matrix[FORMAT] == BF16:
        return 32 * n
    group_size = matrix[GROUP_SIZE]
    return n // group_size * (SCALES + group_size // 32 * run_bytes(matrix[FORMAT]))


@kernel
def _expand(matrix, tile, start, stop, target):
    """Expands the inputs start to stop of a tile to tiles of bfloat16, STEP bytes apart."""
    fmt, group_size = matrix[FORMAT], matrix[GROUP_SIZE]
    w, low = tile_address(matrix, tile)
    for i in range(start, stop, 32):
        if fmt == BF16:
            expand_bf16(w + _part_bytes(matrix, i), target)
        else:
            within = i % group_size
            scales = w + _part_bytes(matrix, i - within)
            codes = scales + SCALES + within // 32 * run_bytes(fmt)
            if fmt == INT8:
                expand_scaled_int8(codes, 0, scales, target)
            elif fmt == PLANES:
                expand_scaled_planes(codes, low + 8 * i, scales, target)
            else:
                expand_scaled_codebook(codes, matrix[CODEBOOK], scales, target)
        target += STEP


@kernel
def _fetch(address, n_bytes, part, parts):
    """Asks the memory for one of several parts of so many bytes."""
    start, stop = n_bytes * part // parts, n_bytes * (part + 1) // parts
    for line in range(start // _LINE * _LINE, stop, _LINE):
        prefetch(address + line)


@kernel
def _sum(matrix, first, last, h, panel, sums):
    """Sums up to SIDE tiles; sums: address of float32 (pairs, n_tokens rounded up to 32, 32)."""
    n_tokens, n_in = len(h.values), matrix[N_IN]
    n_parts = len(h.blocks) if matrix[FORMAT] == BF16 else 1
    n_blocks = (n_tokens + BLOCK - 1) // BLOCK
    n_pairs = (last - first + PAIR - 1) // PAIR
    for start in range(0, n_in, PANEL):
        stop = min(start + PANEL, n_in)
        n_steps = (stop - start) // 32
        n_bytes = _part_bytes(matrix, stop) - _part_bytes(matrix, start)
        for pair in range(n_pairs):
            tile = first + PAIR * pair
            for i in range(min(PAIR, last - tile)):
                _expand(matrix, tile + i, start, stop, panel + i * TILE)
            next_pair = tile_address(matrix, tile + PAIR)[0] + _part_bytes(matrix, start)
            for block in range(n_blocks):
                # What comes next comes near: the next tiles' codes, the next panel's inputs.
                for i in range(PAIR):
                    _fetch(next_pair + i * tile_bytes(matrix), n_bytes, block, n_blocks)
                out = sums + (pair * n_blocks + block) * BLOCK * _ROW
                for part in range(n_parts):
                    x = block_address(h, part, block * BLOCK, start)
                    _fetch(x + n_steps * STEP, n_steps * STEP, pair, n_pairs)
                    multiply_blocks(x, panel, n_steps, out, _ROW, start == 0 and part == 0)


@kernel
def _write(sums, n_tiles, n_tokens, y, y_stride):
    """Writes what _sum has summed to its place."""
    n_blocks = (n_tokens + BLOCK - 1) // BLOCK
    for t in range(n_tokens):
        for tile in range(n_tiles):
            row = tile // PAIR * n_blocks * BLOCK + t
            value = load_f32(sums + row * _ROW + tile % PAIR * 64)
            store_f32(y + t * y_stride + 64 * tile, value)


@kernel
def multiply(matrix, first, last, h, y, y_stride, scratch):
    """As matmul_panels.multiply, of inputs in blocks."""
    line = address_of(scratch)
    panel = line + _LINE
    sums = panel + PANEL // 32 * STEP
    configure()
    tile, side = first, SIDE
    while tile < last:
        stop = min(tile + side, last)
        mark()
        _sum(matrix, tile, stop, h, panel, sums)
        if lost(line):
            side = max(PAIR, side // 2)  # It may take less time than there was.
            continue
        _write(sums, stop - tile, len(h.values), y + 64 * (tile - first), y_stride)
        tile, side = stop, SIDE
    release()
