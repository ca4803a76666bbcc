"""Matrix products of many tokens by vectors, for `matmul`.

PANEL inputs of a tile at a time are expanded, codes to bytes and scales to float32, once for all
tokens, in memory that stays in the L1 cache. The inputs of TOKENS tokens lie together, in the order
in which they are used.
"""

from gemma_cli.runtime.codes import (
    EXPANDED_ZERO,
    add_by_table,
    dots_expanded,
    dots_int8,
    expand_codebook,
    expand_int4,
    expand_int8,
    expand_planes,
    expand_scales,
)
from gemma_cli.runtime.inputs import round_together, together_address
from gemma_cli.runtime.isa import ZEN4
from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.layers import gated
from gemma_cli.runtime.matrix import (
    advance,
    load_scales,
    load_units,
    look_ahead,
    look_ahead_others,
    run_bytes,
    tile_address,
    tile_bytes,
)
from gemma_cli.runtime.tables import (
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
    add_scaled,
    address_of,
    load_f32,
    load_rows,
    prefetch,
    store_f32,
    store_rows,
    zeros,
)
from gemma_cli.runtime.workspace import CODES, EXPANDED, PANEL, ROW, SIDE, TOGETHER, TOKENS

FORMATS = (INT4, INT4_CODEBOOK, INT8, PLANES)

_HAS_SMALL = EXPANDED_ZERO != 128
"""Whether expanded int4 codes are others than those of the other formats."""


@kernel
def _multiply_panel(fmt, n_runs, w, x, sums, first):
    """Adds runs of 32 inputs of TOKENS tokens to a tile's sums, or makes these of the `first`.

    w: address of the first run's codes and scales, expanded; x: of the tokens' inputs, as
    together_address gives it; sums: of float32 (TOKENS, 16).
    """
    acc = zeros(TOKENS) if first else load_rows(sums, ROW, TOKENS, TOKENS)
    for _ in range(n_runs):
        scales, offsets = x + CODES, x + CODES + 4 * TOKENS
        if _HAS_SMALL and fmt == INT4:
            dots = dots_expanded(w, 0, x, offsets, TOKENS, TOKENS)
        else:
            dots = dots_int8(w, 0, x, offsets, TOKENS, TOKENS)
        if ZEN4:
            acc = add_by_table(acc, dots, w, x)
        else:
            acc = add_scaled(acc, dots, load_f32(w + 512), scales)
        w, x = w + EXPANDED, x + TOGETHER
    store_rows(sums, ROW, acc, TOKENS)


@kernel
def _expand(matrix, w, others, units, n_groups, panel):
    """Expands some groups, run by run, at the address `panel`: codes to bytes, and their scales.

    w: address of the first group; others: those of its other planes, for PLANES; units: the tile's.
    """
    fmt = matrix[FORMAT]
    part = run_bytes(fmt)
    for _ in range(n_groups):
        scales = load_scales(matrix, w, units)
        w += matrix[SCALES]
        for _ in range(matrix[GROUP_SIZE] // 32):
            look_ahead(w, part, 1)
            if fmt == INT4:
                expand_int4(w, 0, panel)
            elif fmt == INT4_CODEBOOK:
                expand_codebook(w, matrix[CODEBOOK], panel)
            elif fmt == PLANES:
                look_ahead_others(others, 1)
                expand_planes(w, others, panel)
                others = advance(others, 32)
            else:
                expand_int8(w, 0, panel)
            expand_scales(scales, panel + 512)
            w, panel = w + part, panel + EXPANDED


@kernel
def _add_part(matrix, tile, start, stop, h, panel, sums):
    """Adds the inputs start to stop of a tile to its sums.

    panel: address of memory for its runs, expanded; sums: of float32 (n_tokens rounded up, 16).
    """
    n_tokens, group_size, fmt = len(h.values), matrix[GROUP_SIZE], matrix[FORMAT]
    n_groups, n_runs = (stop - start) // group_size, (stop - start) // 32
    address, others = tile_address(matrix, tile)
    step = matrix[SCALES] + group_size // 32 * run_bytes(fmt)
    w = address + start // group_size * step
    _expand(matrix, w, advance(others, start), load_units(matrix, address), n_groups, panel)
    # While these tokens are multiplied, the next tile's codes come from the memory.
    next_tile = w + tile_bytes(matrix)
    n_bytes = n_groups * step
    for t in range(0, n_tokens, TOKENS):
        for line in range(n_bytes * t // n_tokens, n_bytes * (t + TOKENS) // n_tokens, 64):
            prefetch(next_tile + line)
        x = together_address(h, t, start)
        _multiply_panel(fmt, n_runs, panel, x, sums + t * ROW, start == 0)


@kernel
def _memory(scratch, n_tokens):
    """Addresses for a tile's runs, expanded, and for sums; the bytes of a tile's sums."""
    panel = address_of(scratch)
    size = (n_tokens + TOKENS - 1) // TOKENS * TOKENS * ROW
    return panel, panel + PANEL // 32 * EXPANDED, size


@kernel
def multiply(matrix, first, last, h, y, y_stride, scratch):
    """Multiplies tiles of a matrix in one of FORMATS.

    matrix: a row of the table; first, last: its tiles; h: Inputs; y: address of the first tile's
    outputs, float32, those of tokens y_stride bytes apart; scratch: uint8 (scratch_bytes,).
    """
    n_tokens, n_in = len(h.values), matrix[N_IN]
    panel, sums, size = _memory(scratch, n_tokens)
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


@kernel
def multiply_gated(matrices, first, last, h, result, scratch):
    """Rounds gelu(W_gate h) * (W_up h) to the blocks of a product's inputs, without a detour.

    matrices: int64 (2, N_COLUMNS), gate and up, in some of FORMATS; first, last: tiles of both,
    even; result: Inputs, whose blocks are other memory than those of h; the rest as in multiply.
    """
    n_tokens, n_in = len(h.values), matrices[0, N_IN]
    panel, sums, size = _memory(scratch, n_tokens)
    for some in range(first, last, SIDE // 2):
        n_tiles = min(SIDE // 2, last - some)
        for start in range(0, n_in, PANEL):
            stop = min(start + PANEL, n_in)
            for i in range(n_tiles):
                for m in range(2):
                    target = sums + (2 * i + m) * size
                    _add_part(matrices[m], some + i, start, stop, h, panel, target)
        for t in range(n_tokens):
            for i in range(0, n_tiles, 2):
                at = sums + 2 * i * size + t * ROW
                left = gated(load_f32(at), load_f32(at + size))
                right = gated(load_f32(at + 2 * size), load_f32(at + 3 * size))
                round_together(result, t, 16 * (some + i), left, right, panel)
