"""Matrix products: y[t, r] = sum over i of W[r, i] x[t, i], for one token or many.

W lies in tiles of 16 rows (quantize.packing), and a kernel computes a whole tile for TOKENS tokens
at a time, each row in its own vector lane. Threads share the tiles of a matrix; every y is summed
by one thread in one order, so results do not depend on the number of threads, nor on how many
tokens go at once.

For int4 and int8 weights the inputs are rounded, too (`quantize_row`): int8 with one scale for 32
inputs, so that a group's dot product is an exact integer:

    y[t, r] = sum over groups g of w_scale[r, g] * sum over 32-input runs s of g of
              x_scale[t, s] * sum over i in s of w_code[r, i] x_code[t, i]

For up to FEW tokens codes are used as they are read, at the memory's speed. For more, PANEL inputs
of a tile at a time are first expanded to bytes, once for all tokens, in memory that stays in the
L1 cache.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemma_cli.runtime import isa
from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.team import stage
from gemma_cli.runtime.vector import (
    absolute,
    add_outer,
    add_scaled,
    address_of,
    dots_codebook,
    dots_expanded,
    dots_int4,
    dots_int8,
    dots_planes,
    expand_codebook,
    expand_int4,
    expand_planes,
    horizontal_max,
    load_bf16,
    load_f16,
    load_f32,
    load_rows,
    prefetch,
    splat,
    store_i8,
    store_rows,
    zeros,
)
from quantize.packing import SLAB_TILES

# The formats of a matrix, as the kernels know them; int4 with equal steps needs no codebook.
INT4, INT4_CODEBOOK, INT8, PLANES, BF16, F32 = range(6)
# Codes that _expand has laid out one after the other: of INT4, and of the others.
EXPANDED, BYTES = 6, 7

# Columns of the table that describes matrices to the kernels, int64.
ADDRESS, FORMAT, N_TILES, N_IN, GROUP_SIZE, CODEBOOK = range(6)
N_COLUMNS = 6


class Inputs(NamedTuple):
    """The inputs of a matrix, as float32 and as `quantize_row` rounds them."""

    values: NDArray[np.float32]  # (n_tokens, n_in)
    codes: NDArray[np.int8]  # (n_tokens, n_in)
    scales: NDArray[np.float32]  # (n_tokens, n_in / 32)
    offsets: NDArray[np.int32]  # (n_tokens, n_in / 32)


TOKENS = 8 if isa.NAME == "avx512vnni" else 4
"""Tokens whose sums are held at once: what fits the vector registers."""

FEW = 16
"""Tokens up to which codes are used as they are read."""

SOME = 4
"""Of few tokens, those that go at once: as many as the memory gives time for."""

PANEL = 1024
"""Inputs of a tile that are expanded at once, a multiple of every group size: 16 KB."""

SIDE = 8
"""Tiles whose PANEL inputs are used one after the other."""

PREFETCH = 1024
SCALES = 32  # Bytes of the 16 float16 scales that open a block.


@kernel
def some_inputs(h, first, last, n_in):
    """The first n_in inputs of some tokens."""
    runs = n_in // 32
    return Inputs(
        h.values[first:last, :n_in],
        h.codes[first:last, :n_in],
        h.scales[first:last, :runs],
        h.offsets[first:last, :runs],
    )


@kernel
def quantize_row(x, codes, scales, offsets):
    """Rounds one row of inputs to int8, with one scale for 32 of them.

    x: float32 (n,), n a multiple of 32 -> codes int8 (n,); scales float32 (n / 32,), the largest
    magnitude / 127; offsets int32 (n / 32,), -128 times the codes' sum. x is about scale * code.
    """
    source, target = address_of(x), address_of(codes)
    for g in range(scales.size):
        first, second = load_f32(source + 128 * g), load_f32(source + 128 * g + 64)
        largest = max(horizontal_max(absolute(first)), horizontal_max(absolute(second)))
        scales[g] = largest / 127
        inverse = splat(127 / largest if largest > 1e-30 else 0.0)
        total = store_i8(target + 32 * g, 1, first * inverse)
        total += store_i8(target + 32 * g + 16, 1, second * inverse)
        offsets[g] = -128 * total


def _float_kernel(n):
    """The kernel of a bf16 or f32 tile for n tokens: the same code for one and for several."""

    @kernel
    def multiply(matrix, w, x, stride, y, y_stride, count):
        """Fills y[t, 0:16] for the first `count` of n tokens.

        matrix: a row of the table; w: the tile's address; x: address of the first token's inputs,
        float32; y: address of its 16 outputs; tokens are `stride` and `y_stride` bytes apart.
        """
        acc = zeros(n)
        for _ in range(matrix[N_IN]):
            if matrix[FORMAT] == F32:
                acc = add_outer(acc, load_f32(w), x, stride)
                w += 64
            else:
                acc = add_outer(acc, load_bf16(w), x, stride)
                w += 32
            x += 4
        store_rows(y, y_stride, acc, count)

    return multiply


def _few_kernel(n):
    """The kernel of an int4 or int8 tile for n tokens, which uses codes as they are read."""

    @kernel
    def multiply(
        matrix,
        w,
        low,
        ahead,
        low_ahead,
        share,
        codes,
        codes_stride,
        scales,
        offsets,
        stride,
        y,
        y_stride,
        count,
    ):
        """Fills y[t, 0:16] for the first `count` of n tokens.

        w, low: addresses of the tile and, for PLANES, of its low nibbles; ahead, low_ahead: of
        what the memory is asked for meanwhile, of each 32 inputs one part in `share`. codes,
        scales, offsets: of the first token's inputs as quantize_row leaves them, tokens
        `codes_stride` and `stride` bytes apart; y as in _float_kernel.
        """
        fmt, acc = matrix[FORMAT], zeros(n)
        part = (512 if fmt == INT8 else 256) // share
        gap = SCALES // share
        for _ in range(matrix[N_IN] // matrix[GROUP_SIZE]):
            w_scale = load_f16(w)
            w, ahead = w + SCALES, ahead + gap
            for _ in range(matrix[GROUP_SIZE] // 32):
                for line in range(0, part, 64):
                    prefetch(ahead + line)
                ahead += part
                if fmt == INT4:
                    dots = dots_int4(w, codes, codes_stride, offsets, stride, n)
                    w += 256
                elif fmt == INT4_CODEBOOK:
                    levels = matrix[CODEBOOK]
                    dots = dots_codebook(w, levels, codes, codes_stride, offsets, stride, n)
                    w += 256
                elif fmt == PLANES:
                    for line in range(0, part, 64):
                        prefetch(low_ahead + line)
                    low_ahead += part
                    dots = dots_planes(w, low, codes, codes_stride, offsets, stride, n)
                    w, low = w + 256, low + 256
                else:
                    dots = dots_int8(w, codes, codes_stride, offsets, stride, n)
                    w += 512
                acc = add_scaled(acc, dots, w_scale, scales, stride)
                codes, scales, offsets = codes + 32, scales + 4, offsets + 4
        store_rows(y, y_stride, acc, count)

    return multiply


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

    fmt: EXPANDED, BYTES or INT8; w: address of the first group's bytes; w_scales: of its scales,
    `step` bytes from those of the next, and so are bytes of INT8. The rest as in _few_kernel.
    """
    acc = zeros(TOKENS) if first else load_rows(y, y_stride, count, TOKENS)
    for _ in range(n_groups):
        w_scale = load_f16(w_scales)
        w_scales += step
        for _ in range(group_size // 32):
            if fmt == EXPANDED:
                dots = dots_expanded(w, codes, codes_stride, offsets, stride, TOKENS)
            else:
                dots = dots_int8(w, codes, codes_stride, offsets, stride, TOKENS)
            acc = add_scaled(acc, dots, w_scale, scales, stride)
            w, codes, scales, offsets = w + 512, codes + 32, scales + 4, offsets + 4
        if fmt == INT8:
            w += SCALES
    store_rows(y, y_stride, acc, count)


_float_one, _float_some = _float_kernel(1), _float_kernel(TOKENS)
_one, _some = _few_kernel(1), _few_kernel(SOME)


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
    return EXPANDED if fmt == INT4 else BYTES


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


@kernel
def look_ahead(matrix, tile, pass_, passes):
    """Where to ask the memory ahead of a tile's codes, and of its low nibbles for PLANES.

    A tile that is used once streams by. While one is used several times the next one comes, a part
    in every pass.
    """
    w, low = tile_address(matrix, tile)
    if passes == 1:
        return w + PREFETCH, low + PREFETCH
    next_w, next_low = tile_address(matrix, tile + 1)
    n_bytes = (512 if matrix[FORMAT] == INT8 else 256) * (matrix[N_IN] // 32) // passes
    return next_w + pass_ * n_bytes, next_low + pass_ * n_bytes


@kernel
def _multiply_part(matrix, tile, start, stop, h, y, y_stride, panel):
    """Adds the inputs start to stop of one tile for many tokens; as multiply_coded."""
    n_tokens, group_size, fmt = len(h.codes), matrix[GROUP_SIZE], matrix[FORMAT]
    n_groups = (stop - start) // group_size
    address, low = tile_address(matrix, tile)
    step = SCALES + group_size // 32 * (512 if fmt == INT8 else 256)
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
def _multiply_many(matrix, first, last, h, y, y_stride, panel):
    """multiply_coded for many tokens: SIDE tiles go through the inputs side by side, so that these
    come from the L2 cache."""
    n_in = matrix[N_IN]
    for some in range(first, last, SIDE):
        for start in range(0, n_in, PANEL):
            stop = min(start + PANEL, n_in)
            for tile in range(some, min(some + SIDE, last)):
                out = y + 64 * (tile - first)
                _multiply_part(matrix, tile, start, stop, h, out, y_stride, panel)


@kernel
def multiply_coded(matrix, first, last, h, y, y_stride, panel):
    """int4 or int8 tiles; h: the inputs as in matmul, y: address of the first one's outputs."""
    n_tokens = len(h.codes)
    if n_tokens > FEW:
        _multiply_many(matrix, first, last, h, y, y_stride, panel)
        return
    passes = (n_tokens + SOME - 1) // SOME
    for tile in range(first, last):
        w, low = tile_address(matrix, tile)
        for t in range(0, n_tokens, SOME):
            ahead, low_ahead = look_ahead(matrix, tile, t // SOME, passes)
            args = (
                matrix,
                w,
                low,
                ahead,
                low_ahead,
                passes,
                address_of(h.codes[t]),
                h.codes.strides[0],
                address_of(h.scales[t]),
                address_of(h.offsets[t]),
                h.scales.strides[0],
                y + 64 * (tile - first) + t * y_stride,
                y_stride,
                n_tokens - t,
            )
            if n_tokens - t == 1:
                _one(*args)
            else:
                _some(*args)


@kernel
def _multiply_floats(matrix, first, last, h, y, y_stride):
    """bf16 or f32 tiles; as multiply_coded."""
    x, stride = h.values, h.values.strides[0]
    for tile in range(first, last):
        w, _ = tile_address(matrix, tile)
        for t in range(0, len(x), TOKENS):
            out = y + 64 * (tile - first) + t * y_stride
            args = (matrix, w, address_of(x[t]), stride, out, y_stride, len(x) - t)
            if len(x) == 1:
                _float_one(*args)
            else:
                _float_some(*args)


ITEMS = 5
"""Items of a matrix product for each thread: a large one, and small ones to end together."""


@kernel
def first_tile(item, n_tiles, n_threads):
    """Where an item's tiles begin; those of item ITEMS * n_threads, where they end.

    The first items, one a thread, are three quarters of the whole: in the midst of a stream, memory
    is faster than at its beginning. The others are small, for the thread that has the time.
    """
    large = n_tiles * 3 // 4
    if item <= n_threads:
        return large * item // n_threads
    return large + (n_tiles - large) * (item - n_threads) // ((ITEMS - 1) * n_threads)


@stage
def matmul(item, thread, matrices, h, y, panels, n_threads):
    """Multiplies the same inputs by several matrices, whose outputs lie side by side.

    Does one of ITEMS * n_threads items. matrices: int64 (n_matrices, N_COLUMNS); h: the
    inputs, values float32 (n_tokens, n_in), read by float formats, and the same from quantize_row,
    codes (n_tokens, n_in), scales, offsets (n_tokens, n_in / 32), read by the others; y: float32,
    n_tokens rows of at least 16 times all tiles. Each row is contiguous; of the inputs, there are
    rows to spare up to a multiple of TOKENS. panels: uint8 (n_threads, 16 PANEL).
    """
    y_stride = y.strides[0]
    total = matrices[:, N_TILES].sum()
    start = first_tile(item, total, n_threads)
    stop = first_tile(item + 1, total, n_threads)
    before = 0  # tiles of the matrices passed
    for m in range(matrices.shape[0]):
        matrix = matrices[m]
        n_tiles = matrix[N_TILES]
        first, last = max(start, before), min(stop, before + n_tiles)
        out = address_of(y) + 64 * first
        if matrix[FORMAT] in (BF16, F32):
            _multiply_floats(matrix, first - before, last - before, h, out, y_stride)
        else:
            multiply_coded(matrix, first - before, last - before, h, out, y_stride, panels[thread])
        before += n_tiles
