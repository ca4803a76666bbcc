"""Matrix products: y[t, r] = sum over i of W[r, i] x[t, i], for one token or many.

W lies in tiles of 16 rows (quantize.packing), and a kernel computes a whole tile for several tokens
at a time, each row in its own vector lane. Threads share the tiles of a matrix; every y is summed
by one thread in one order, so results do not depend on the number of threads, nor on which tokens
go together.

For int4 and int8 weights the inputs are rounded, too (`inputs.quantize_row`): int8 with one scale
for 32 inputs, so that a group's dot product is an exact integer:

    y[t, r] = sum over groups g of w_scale[r, g] * sum over 32-input runs s of g of
              x_scale[t, s] * sum over i in s of w_code[r, i] x_code[t, i]

For up to FEW tokens codes are used as they are read, at the memory's speed. For more they are
expanded first, once for all tokens: to bytes, for the same sums in the same order
(`matmul_panels`), or, where the CPU has matrix units, to bfloat16 (`matmul_amx`). Only there it
makes a difference for a token whether it goes with FEW or with more: bfloat16 takes up to 2^-8 of
itself from an input, and from a weight where it is multiplied by its scale; int8 takes as much of
the largest of 32 inputs.
"""

from gemma_cli.runtime import isa, matmul_amx, matmul_panels
from gemma_cli.runtime.codes import dots_codebook, dots_int4, dots_int8, dots_planes
from gemma_cli.runtime.inputs import together_address
from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.matrix import (
    advance,
    load_scales,
    load_units,
    look_ahead,
    look_ahead_others,
    run_bytes,
    tile_address,
)
from gemma_cli.runtime.tables import (
    BF16,
    CODEBOOK,
    F32,
    FORMAT,
    GROUP_SIZE,
    INT4,
    INT4_CODEBOOK,
    N_IN,
    N_TILES,
    PLANES,
    SCALES,
)
from gemma_cli.runtime.team import stage
from gemma_cli.runtime.vector import (
    add_outer,
    add_scaled,
    address_of,
    load_bf16,
    load_f32,
    store_rows,
    zeros,
)
from gemma_cli.runtime.workspace import CODES, FEW, TOGETHER, TOKENS

_many = matmul_amx if isa.AMX else matmul_panels

SOME = 4
"""Tokens, more than one, for which there is no need to do as much as for TOKENS."""


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
    width, step, scale_step = (1, 32, 4) if n == 1 else (TOKENS, TOGETHER, TOGETHER)

    @kernel
    def multiply(matrix, w, others, x, scales, offsets, y, y_stride, count):
        """Fills y[t, 0:16] for the first `count` of n tokens.

        w, others: addresses of the tile and, for PLANES, of its other planes. x, scales, offsets:
        of the token's inputs as quantize_row leaves them or, if n > 1, of those of TOKENS that lie
        together; y as in _float_kernel.
        """
        fmt, levels, acc = matrix[FORMAT], matrix[CODEBOOK], zeros(n)
        part, units = run_bytes(fmt), load_units(matrix, w)
        for _ in range(matrix[N_IN] // matrix[GROUP_SIZE]):
            w_scale = load_scales(matrix, w, units)
            w += matrix[SCALES]
            for _ in range(matrix[GROUP_SIZE] // 32):
                look_ahead(w, part, n)
                if fmt == INT4:
                    dots = dots_int4(w, 0, x, offsets, n, width)
                elif fmt == INT4_CODEBOOK:
                    dots = dots_codebook(w, levels, x, offsets, n, width)
                elif fmt == PLANES:
                    look_ahead_others(others, n)
                    dots = dots_planes(w, others, x, offsets, n, width)
                    others = advance(others, 32)
                else:
                    dots = dots_int8(w, 0, x, offsets, n, width)
                w += part
                acc = add_scaled(acc, dots, w_scale, scales)
                x, scales, offsets = x + step, scales + scale_step, offsets + scale_step
        store_rows(y, y_stride, acc, count)

    return multiply


_float_one, _float_some = _float_kernel(1), _float_kernel(TOKENS)
_one, _some = _few_kernel(1), _few_kernel(SOME)
_all = _some if TOKENS == SOME else _few_kernel(TOKENS)


@kernel
def multiply_few(matrix, first, last, h, y, y_stride):
    """int4 or int8 tiles for up to FEW tokens.

    matrix: a row of the table; first, last: its tiles; h: Inputs; y: address of the first tile's
    outputs, float32, those of tokens y_stride bytes apart.
    """
    n_tokens = len(h.codes)
    for tile in range(first, last):
        w, others = tile_address(matrix, tile)
        out = y + 64 * (tile - first)
        if n_tokens == 1:
            x = address_of(h.codes)
            scales, offsets = address_of(h.scales), address_of(h.offsets)
            _one(matrix, w, others, x, scales, offsets, out, y_stride, 1)
            continue
        for t in range(0, n_tokens, TOKENS):
            x = together_address(h, t, 0)
            args = (matrix, w, others, x, x + CODES, x + CODES + 4 * TOKENS)
            if n_tokens - t <= SOME:
                _some(*args, out + t * y_stride, y_stride, n_tokens - t)
            else:
                _all(*args, out + t * y_stride, y_stride, n_tokens - t)


@kernel
def _multiply_floats(matrix, first, last, h, y, y_stride):
    """bf16 or f32 tiles for any number of tokens; as multiply_few."""
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
"""Items of a matrix product for each thread."""


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

    Does one of ITEMS * n_threads items. matrices: int64 (n_matrices, N_COLUMNS); h: Inputs of width
    n_in, which `round_inputs` has rounded, with rows to spare up to a multiple of TOKENS; y:
    float32, n_tokens rows of at least 16 times all tiles, each contiguous. panels: uint8
    (n_threads, scratch_bytes(n_tokens)).
    """
    y_stride = y.strides[0]
    many = len(h.values) > FEW
    total = 0
    for m in range(matrices.shape[0]):
        total += matrices[m, N_TILES]
    if isa.AMX and many:
        start = matmul_amx.first_tile(item, total, n_threads, ITEMS)
        stop = matmul_amx.first_tile(item + 1, total, n_threads, ITEMS)
    else:
        start = first_tile(item, total, n_threads)
        stop = first_tile(item + 1, total, n_threads)
    before = 0  # tiles of the matrices passed
    for m in range(matrices.shape[0]):
        matrix = matrices[m]
        n_tiles, fmt = matrix[N_TILES], matrix[FORMAT]
        first, last = max(start - before, 0), min(stop - before, n_tiles)
        out = address_of(y) + 64 * (before + first)
        if many and fmt in _many.FORMATS:
            _many.multiply(matrix, first, last, h, out, y_stride, panels[thread])
        elif fmt in (BF16, F32):
            _multiply_floats(matrix, first, last, h, out, y_stride)
        else:
            multiply_few(matrix, first, last, h, out, y_stride)
        before += n_tiles


@kernel
def gates_at_once(gate_up, down):
    """Whether `matmul_gated` does these matrices; each int64 (n_matrices, N_COLUMNS)."""
    fit = down[0, FORMAT] in matmul_panels.FORMATS
    for matrix in gate_up:
        fit &= matrix[FORMAT] in matmul_panels.FORMATS
    return fit


@stage
def matmul_gated(item, thread, matrices, h, gated, panels, n_threads):
    """GeGLU of the products with two matrices, for more tokens than FEW, rounded for the next.

    Does one of ITEMS * n_threads items. matrices, h, panels: as in matmul; gated: Inputs of width
    16 times the tiles of a matrix, of which the blocks are filled, other memory than those of h.
    """
    pairs = matrices[0, N_TILES] // 2  # of tiles: 32 inputs of the next product
    start, stop = first_tile(item, pairs, n_threads), first_tile(item + 1, pairs, n_threads)
    matmul_panels.multiply_gated(matrices, 2 * start, 2 * stop, h, gated, panels[thread])
