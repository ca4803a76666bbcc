"""Matrix products of many tokens by AMX, for `matmul`.

    y[t, r] = sum over i of bf16(W[r, i]) bf16(x[t, i])

Inputs come as blocks of bfloat16 (`inputs.Inputs`), those of bf16 weights in three parts, which
are multiplied one after the other. Other weights are expanded to bfloat16, scales and all. Sums are
float32. The units take 16 cycles for 16 tokens, 16 outputs and 32 inputs, in which two KB of
operands could come from the L1 cache, but less than one from the L2. So

- 32 tokens by 32 outputs are summed at once, in four tiles: each operand that is loaded is used
  twice, which is one KB in 16 cycles;
- AMX_PANEL inputs of 32 outputs are expanded at once, for all tokens. They and the block of inputs
  that goes by (16 KB each) stay in the L1 cache, so only the inputs, half a KB in 16 cycles, come
  from the L2. The sums go there and back between panels: another quarter of a KB;
- AMX_SIDE tiles go through the inputs side by side. Their sums (512 KB for 512 tokens), the inputs
  of a panel (256 KB) and those of the next one stay in the L2 cache. The sums lie close together
  until they are complete, for a token's outputs are pages apart from the next one's.

Expanding a tile takes as long as multiplying it by about 100 tokens.
"""

from gemma_cli.runtime.amx import configure, lost, mark, multiply_blocks, release
from gemma_cli.runtime.codes import (
    expand_bf16,
    expand_scaled_codebook,
    expand_scaled_int8,
    expand_scaled_planes,
)
from gemma_cli.runtime.inputs import block_address
from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.matrix import (
    advance,
    load_scales,
    load_units,
    run_bytes,
    tile_address,
    tile_bytes,
)
from gemma_cli.runtime.tables import (
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
)
from gemma_cli.runtime.vector import (
    address_of,
    load_f32,
    prefetch,
    store_f32,
)
from gemma_cli.runtime.workspace import (
    AMX_PAIR,
    AMX_PANEL,
    AMX_ROW,
    AMX_SIDE,
    BLOCK,
    LINE,
    STEP,
    TILE,
)

FORMATS = (INT4, INT4_CODEBOOK, INT8, PLANES, BF16)


@kernel
def first_tile(item, n_tiles, n_threads, most):
    """Where an item's tiles begin, or, of one too many, where the tiles end.

    Items are equal, up to `most` a thread. Each goes through all inputs, which come from the L3
    cache: so they have AMX_SIDE tiles at least if that leaves one for every thread.
    """
    n_items = n_threads * max(1, min(most, n_tiles // (AMX_SIDE * n_threads)))
    n_pairs = (n_tiles + AMX_PAIR - 1) // AMX_PAIR
    return min(AMX_PAIR * (n_pairs * item // n_items), n_tiles)


@kernel
def _part_bytes(matrix, n):
    """Bytes of n inputs of a tile, n a multiple of the group size; of PLANES the first plane's."""
    if matrix[FORMAT] == BF16:
        return 32 * n
    group_size = matrix[GROUP_SIZE]
    return n // group_size * (matrix[SCALES] + group_size // 32 * run_bytes(matrix[FORMAT]))


@kernel
def _expand(matrix, tile, start, stop, target):
    """Expands the inputs start to stop of a tile to tiles of bfloat16, STEP bytes apart."""
    fmt, group_size = matrix[FORMAT], matrix[GROUP_SIZE]
    w, others = tile_address(matrix, tile)
    units = load_units(matrix, w)
    for i in range(start, stop, 32):
        if fmt == BF16:
            expand_bf16(w + _part_bytes(matrix, i), target)
        else:
            within = i % group_size
            block = w + _part_bytes(matrix, i - within)
            scales = load_scales(matrix, block, units)
            codes = block + matrix[SCALES] + within // 32 * run_bytes(fmt)
            if fmt == INT8:
                expand_scaled_int8(codes, 0, scales, target)
            elif fmt == PLANES:
                expand_scaled_planes(codes, advance(others, i), scales, target)
            else:
                expand_scaled_codebook(codes, matrix[CODEBOOK], scales, target)
        target += STEP


@kernel
def _fetch(address, n_bytes, part, parts):
    """Asks the memory for one of several parts of so many bytes."""
    start, stop = n_bytes * part // parts, n_bytes * (part + 1) // parts
    for line in range(start // LINE * LINE, stop, LINE):
        prefetch(address + line)


@kernel
def _sum(matrix, first, last, h, panel, sums):
    """Sums up to AMX_SIDE tiles; sums: address of float32 (pairs, n_tokens rounded up, 32)."""
    n_tokens, n_in = len(h.values), matrix[N_IN]
    n_parts = len(h.blocks) if matrix[FORMAT] == BF16 else 1
    n_blocks = (n_tokens + BLOCK - 1) // BLOCK
    n_pairs = (last - first + AMX_PAIR - 1) // AMX_PAIR
    for start in range(0, n_in, AMX_PANEL):
        stop = min(start + AMX_PANEL, n_in)
        n_steps = (stop - start) // 32
        n_bytes = _part_bytes(matrix, stop) - _part_bytes(matrix, start)
        for pair in range(n_pairs):
            tile = first + AMX_PAIR * pair
            for i in range(min(AMX_PAIR, last - tile)):
                _expand(matrix, tile + i, start, stop, panel + i * TILE)
            next_pair = tile_address(matrix, tile + AMX_PAIR)[0] + _part_bytes(matrix, start)
            for block in range(n_blocks):
                # What comes next comes near: the next tiles' codes, the next panel's inputs.
                for i in range(AMX_PAIR):
                    _fetch(next_pair + i * tile_bytes(matrix), n_bytes, block, n_blocks)
                out = sums + (pair * n_blocks + block) * BLOCK * AMX_ROW
                for part in range(n_parts):
                    x = block_address(h, part, block * BLOCK, start)
                    _fetch(x + n_steps * STEP, n_steps * STEP, pair, n_pairs)
                    multiply_blocks(x, panel, n_steps, out, AMX_ROW, start == 0 and part == 0)


@kernel
def _write(sums, n_tiles, n_tokens, y, y_stride):
    """Writes what _sum has summed to its place."""
    n_blocks = (n_tokens + BLOCK - 1) // BLOCK
    for t in range(n_tokens):
        for tile in range(n_tiles):
            row = tile // AMX_PAIR * n_blocks * BLOCK + t
            value = load_f32(sums + row * AMX_ROW + tile % AMX_PAIR * 64)
            store_f32(y + t * y_stride + 64 * tile, value)


@kernel
def multiply(matrix, first, last, h, y, y_stride, scratch):
    """As matmul_panels.multiply, of inputs in blocks."""
    line = address_of(scratch)
    panel = line + LINE
    sums = panel + AMX_PANEL // 32 * STEP
    configure()
    tile, side = first, AMX_SIDE
    while tile < last:
        stop = min(tile + side, last)
        mark()
        _sum(matrix, tile, stop, h, panel, sums)
        if lost(line):
            side = max(AMX_PAIR, side // 2)  # It may take less time than there was.
            continue
        _write(sums, stop - tile, len(h.values), y + 64 * (tile - first), y_stride)
        tile, side = stop, AMX_SIDE
    release()
