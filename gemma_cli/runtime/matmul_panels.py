"""Matrix products of many tokens by vectors, for `matmul`.

PANEL inputs of a tile at a time are expanded to bytes, once for all tokens, in memory that stays in
the L1 cache. The inputs of TOKENS tokens lie together, in the order in which they are used.
"""

from gemma_cli.runtime.codes import (
    dots_expanded,
    dots_int8,
    expand_codebook,
    expand_int4,
    expand_int8,
    expand_planes,
)
from gemma_cli.runtime.inputs import together_address
from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.matrix import PREFETCH, SCALES, run_bytes, tile_address
from gemma_cli.runtime.tables import (
    CODEBOOK,
    FORMAT,
    GROUP_SIZE,
    INT4,
    INT4_CODEBOOK,
    INT8,
    N_IN,
    PLANES,
)
from gemma_cli.runtime.vector import (
    add_scaled,
    address_of,
    load_f16,
    load_f32,
    load_rows,
    prefetch,
    store_f32,
    store_rows,
    zeros,
)
from gemma_cli.runtime.workspace import CODES, PANEL, ROW, SIDE, TOGETHER, TOKENS

FORMATS = (INT4, INT4_CODEBOOK, INT8, PLANES)


@kernel
def _multiply_panel(fmt, n_groups, group_size, w, w_scales, step, x, sums, first):
    """Adds some groups of TOKENS tokens to the sums of a tile, or fills these with the `first`.

    w: address of the first group's codes, expanded; w_scales: of its scales, `step` bytes from
    those of the next; x: of the tokens' inputs, as together_address gives it; sums: of float32
    (TOKENS, 16).
    """
    acc = zeros(TOKENS) if first else load_rows(sums, ROW, TOKENS, TOKENS)
    for _ in range(n_groups):
        w_scale = load_f16(w_scales)
        w_scales += step
        for _ in range(group_size // 32):
            scales, offsets = x + CODES, x + CODES + 4 * TOKENS
            if fmt == INT4:
                dots = dots_expanded(w, 0, x, offsets, TOKENS, TOKENS)
            else:
                dots = dots_int8(w, 0, x, offsets, TOKENS, TOKENS)
            acc = add_scaled(acc, dots, w_scale, scales)
            w, x = w + 512, x + TOGETHER
    store_rows(sums, ROW, acc, TOKENS)


@kernel
def _expand(matrix, w, low, n_groups, panel):
    """Expands the codes of some groups to bytes at the address `panel`.

    w: address of the first group's codes; low: of its low nibbles, for PLANES.
    """
    fmt = matrix[FORMAT]
    part = run_bytes(fmt)
    for _ in range(n_groups):
        for _ in range(matrix[GROUP_SIZE] // 32):
            for line in range(0, part, 64):
                prefetch(w + PREFETCH + line)
                if fmt == PLANES:
                    prefetch(low + PREFETCH + line)
            if fmt == INT4:
                expand_int4(w, 0, panel)
            elif fmt == INT4_CODEBOOK:
                expand_codebook(w, matrix[CODEBOOK], panel)
            elif fmt == PLANES:
                expand_planes(w, low, panel)
                low += part
            else:
                expand_int8(w, 0, panel)
            w, panel = w + part, panel + 512
        w += SCALES


@kernel
def _add_part(matrix, tile, start, stop, h, panel, sums):
    """Adds the inputs start to stop of a tile to its sums.

    panel: address of memory for their codes; sums: of float32 (n_tokens rounded up, 16).
    """
    n_tokens, group_size, fmt = len(h.values), matrix[GROUP_SIZE], matrix[FORMAT]
    n_groups = (stop - start) // group_size
    address, low = tile_address(matrix, tile)
    step = SCALES + group_size // 32 * run_bytes(fmt)
    w_scales = address + start // group_size * step
    _expand(matrix, w_scales + SCALES, low + 8 * start, n_groups, panel)
    # While these tokens are multiplied, the next tile's codes come from the memory.
    next_tile = w_scales + matrix[N_IN] // group_size * step
    n_bytes = n_groups * step
    for t in range(0, n_tokens, TOKENS):
        for line in range(n_bytes * t // n_tokens, n_bytes * (t + TOKENS) // n_tokens, 64):
            prefetch(next_tile + line)
        x = together_address(h, t, start)
        out = sums + t * ROW
        _multiply_panel(fmt, n_groups, group_size, panel, w_scales, step, x, out, start == 0)


@kernel
def multiply(matrix, first, last, h, y, y_stride, scratch):
    """Multiplies tiles of a matrix in one of FORMATS.

    matrix: a row of the table; first, last: its tiles; h: Inputs; y: address of the first tile's
    outputs, float32, those of tokens y_stride bytes apart; scratch: uint8 (scratch_bytes,).
    """
    n_tokens, n_in = len(h.values), matrix[N_IN]
    panel = address_of(scratch)
    sums = panel + 16 * PANEL
    size = (n_tokens + TOKENS - 1) // TOKENS * TOKENS * ROW  # of a tile's sums
    for some in range(first, last, SIDE):
        n_tiles = min(SIDE, last - some)
        for start in range(0, n_in, PANEL):
            stop = min(start + PANEL, n_in)
            for i in range(n_tiles):
                _add_part(matrix, some + i, start, stop, h, panel, sums + i * size)
        # The outputs of a token are pages from those of the next, so each is written just once.
        out = y + ROW * (some - first)
        for t in range(n_tokens):
            for i in range(n_tiles):
                store_f32(out + t * y_stride + i * ROW, load_f32(sums + i * size + t * ROW))
