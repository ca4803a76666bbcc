"""Matrix products of many tokens by vectors, for `matmul`.

PANEL inputs of a tile at a time are expanded to bytes, once for all tokens, in memory that stays in
the L1 cache.
"""

from gemma_cli.runtime.inputs import TOKENS
from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.matrix import (
    CODEBOOK,
    FORMAT,
    GROUP_SIZE,
    INT4,
    INT4_CODEBOOK,
    INT8,
    N_IN,
    PLANES,
    PREFETCH,
    SCALES,
    run_bytes,
    tile_address,
)
from gemma_cli.runtime.vector import (
    add_scaled,
    address_of,
    dots_expanded,
    dots_int8,
    expand_codebook,
    expand_int4,
    expand_planes,
    load_f16,
    load_rows,
    prefetch,
    store_rows,
    zeros,
)

FORMATS = (INT4, INT4_CODEBOOK, INT8, PLANES)

# Codes that _expand has laid out one after the other: of INT4, and of the others.
_EXPANDED, _BYTES = 6, 7

PANEL = 1024
"""Inputs of a tile that are expanded at once, a multiple of every group size: 16 KB."""

SIDE = 8
"""Tiles whose PANEL inputs are used one after the other."""


def scratch_bytes(n_tokens: int) -> int:
    """Bytes that a thread needs to multiply so many tokens."""
    return 16 * PANEL


@kernel
def _multiply_panel(
    fmt,
    n_groups,
    group_size,
    w,
    w_scales,
    step,
    codes,
    codes_stride,
    scales,
    offsets,
    stride,
    y,
    y_stride,
    count,
    first,
):
    """Adds some groups to y[t, 0:16], or fills it with the `first`, for `count` of TOKENS tokens.

    fmt: _EXPANDED, _BYTES or INT8; w: address of the first group's bytes; w_scales: of its scales,
    `step` bytes from those of the next, and so are bytes of INT8. The rest as in _few_kernel.
    """
    acc = zeros(TOKENS) if first else load_rows(y, y_stride, count, TOKENS)
    for _ in range(n_groups):
        w_scale = load_f16(w_scales)
        w_scales += step
        for _ in range(group_size // 32):
            if fmt == _EXPANDED:
                dots = dots_expanded(w, codes, codes_stride, offsets, stride, TOKENS)
            else:
                dots = dots_int8(w, codes, codes_stride, offsets, stride, TOKENS)
            acc = add_scaled(acc, dots, w_scale, scales, stride)
            w, codes, scales, offsets = w + 512, codes + 32, scales + 4, offsets + 4
        if fmt == INT8:
            w += SCALES
    store_rows(y, y_stride, acc, count)


@kernel
def _expand(matrix, w, low, n_groups, panel):
    """Expands the codes of some groups to bytes at the address `panel`; gives their new format.

    w: address of the first group's codes; low: of its low nibbles, for PLANES.
    """
    fmt = matrix[FORMAT]
    for _ in range(n_groups):
        for _ in range(matrix[GROUP_SIZE] // 32):
            for line in range(0, 256, 64):
                prefetch(w + PREFETCH + line)
                if fmt == PLANES:
                    prefetch(low + PREFETCH + line)
            if fmt == INT4:
                expand_int4(w, 0, panel)
            elif fmt == INT4_CODEBOOK:
                expand_codebook(w, matrix[CODEBOOK], panel)
            else:
                expand_planes(w, low, panel)
                low += 256
            w, panel = w + 256, panel + 512
        w += SCALES
    return _EXPANDED if fmt == INT4 else _BYTES


@kernel
def _multiply_part(matrix, tile, start, stop, h, y, y_stride, panel):
    """Adds the inputs start to stop of one tile; as multiply."""
    n_tokens, group_size, fmt = len(h.codes), matrix[GROUP_SIZE], matrix[FORMAT]
    n_groups = (stop - start) // group_size
    address, low = tile_address(matrix, tile)
    step = SCALES + group_size // 32 * run_bytes(fmt)
    w_scales = address + start // group_size * step
    w = w_scales + SCALES
    if fmt != INT8:
        fmt = _expand(matrix, w, low + 8 * start, n_groups, address_of(panel))
        w = address_of(panel)
    # While these tokens are multiplied, the next tile's codes come from the memory.
    next_tile = w_scales + matrix[N_IN] // group_size * step
    n_bytes = n_groups * step
    for t in range(0, n_tokens, TOKENS):
        for line in range(n_bytes * t // n_tokens, n_bytes * (t + TOKENS) // n_tokens, 64):
            prefetch(next_tile + line)
        _multiply_panel(
            fmt,
            n_groups,
            group_size,
            w,
            w_scales,
            step,
            address_of(h.codes[t, start:]),
            h.codes.strides[0],
            address_of(h.scales[t, start // 32 :]),
            address_of(h.offsets[t, start // 32 :]),
            h.scales.strides[0],
            y + t * y_stride,
            y_stride,
            n_tokens - t,
            start == 0,
        )


@kernel
def multiply(matrix, first, last, h, y, y_stride, scratch):
    """Multiplies tiles of a matrix in one of FORMATS.

    matrix: a row of the table; first, last: its tiles; h: Inputs; y: address of the first tile's
    outputs, float32, those of tokens y_stride bytes apart; scratch: uint8 (scratch_bytes,).
    """
    n_in = matrix[N_IN]
    # SIDE tiles go through the inputs side by side, so that these come from the L2 cache.
    for some in range(first, last, SIDE):
        for start in range(0, n_in, PANEL):
            stop = min(start + PANEL, n_in)
            for tile in range(some, min(some + SIDE, last)):
                out = y + 64 * (tile - first)
                _multiply_part(matrix, tile, start, stop, h, out, y_stride, scratch)
