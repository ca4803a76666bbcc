"""Matrix products: y[t, r] = sum over i of W[r, i] x[t, i], for one token or many.

W lies in tiles of 16 rows (quantize.packing), and a kernel computes a whole tile for a few tokens
at a time, each row in its own vector lane. Threads share the tiles of a matrix; every y is summed
by one thread in one order, so results do not depend on the number of threads, nor on how many
tokens go at once.

For int4 and int8 weights the inputs are rounded, too (`quantize_row`): int8 with one scale for 32
inputs, so that a group's dot product is an exact integer:

    y[t, r] = sum over groups g of w_scale[r, g] * sum over 32-input runs s of g of
              x_scale[t, s] * sum over i in s of w_code[r, i] x_code[t, i]
"""

from gemma_cli.runtime import isa
from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.team import stage
from gemma_cli.runtime.vector import (
    absolute,
    add_outer,
    add_scaled,
    address_of,
    dots_codebook,
    dots_int4,
    dots_int8,
    horizontal_max,
    load_bf16,
    load_f16,
    load_f32,
    prefetch,
    splat,
    store_i8,
    store_rows,
    zeros,
)

# The formats of a matrix, as the kernels know them; int4 with equal steps needs no codebook.
INT4, INT4_CODEBOOK, INT8, BF16, F32 = range(5)

# Columns of the table that describes matrices to the kernels, int64.
ADDRESS, FORMAT, N_TILES, N_IN, GROUP_SIZE, CODEBOOK = range(6)
N_COLUMNS = 6

TOKENS = 8 if isa.NAME == "avx512vnni" else 4
"""Tokens whose sums are held at once: what fits the vector registers."""

_AHEAD = 1024  # Bytes from a block to the one to ask the memory for.
_SCALES = 32  # Bytes of the 16 float16 scales that open a block.


@kernel
def quantize_row(x, codes, scales, sums):
    """Rounds one row of inputs to int8, with one scale for 32 of them.

    x: float32 (n,), n a multiple of 32 -> codes int8 (n,); scales float32 (n / 32,), the largest
    magnitude / 127; sums int32 (n / 32,), of the codes. x is about scale * code.
    """
    source, target = address_of(x), address_of(codes)
    for g in range(scales.size):
        first, second = load_f32(source + 128 * g), load_f32(source + 128 * g + 64)
        largest = max(horizontal_max(absolute(first)), horizontal_max(absolute(second)))
        scales[g] = largest / 127
        inverse = splat(127 / largest if largest > 1e-30 else 0.0)
        total = store_i8(target + 32 * g, first * inverse)
        sums[g] = total + store_i8(target + 32 * g + 16, second * inverse)


def _tile_kernel(n):
    """The kernel of one tile for n tokens: the same code for a single one and for several."""

    @kernel
    def tile(matrix, w, x, x_stride, codes, codes_stride, scales, sums, sums_stride, y, y_stride):
        """Fills y[t, 0:16] for n tokens.

        matrix: a row of the table; w: the tile's address; x, codes, scales, sums: addresses of the
        first token's inputs, as float32 and as quantize_row leaves them; y: address of the first
        token's 16 outputs. Tokens are `..._stride` bytes apart, scales as far as sums.
        """
        n_in, group_size, fmt = matrix[N_IN], matrix[GROUP_SIZE], matrix[FORMAT]
        acc = zeros(n)
        if fmt == F32:
            for _ in range(n_in):
                acc = add_outer(acc, load_f32(w), x, x_stride)
                w, x = w + 64, x + 4
        elif fmt == BF16:
            for _ in range(n_in):
                acc = add_outer(acc, load_bf16(w), x, x_stride)
                w, x = w + 32, x + 4
        else:
            for _ in range(n_in // group_size):
                scale = load_f16(w)
                w += _SCALES
                for _ in range(group_size // 32):
                    for line in range(0, 512 if fmt == INT8 else 256, 64):
                        prefetch(w + _AHEAD + line)
                    if fmt == INT4:
                        dots = dots_int4(w, codes, codes_stride, sums, sums_stride, n)
                        w += 256
                    elif fmt == INT4_CODEBOOK:
                        dots = dots_codebook(
                            w, matrix[CODEBOOK], codes, codes_stride, sums, sums_stride, n
                        )
                        w += 256
                    else:
                        dots = dots_int8(w, codes, codes_stride, sums, sums_stride, n)
                        w += 512
                    acc = add_scaled(acc, dots, scale, scales, sums_stride)
                    codes, scales, sums = codes + 32, scales + 4, sums + 4
        store_rows(y, y_stride, acc)

    return tile


_one_token = _tile_kernel(1)
_some_tokens = _tile_kernel(TOKENS)


@kernel
def tile_bytes(matrix):
    """Bytes of one tile of a matrix of the table; as quantize.packing.tile_bytes."""
    n_in, fmt = matrix[N_IN], matrix[FORMAT]
    if fmt == F32:
        return 64 * n_in
    if fmt == BF16:
        return 32 * n_in
    run = 512 if fmt == INT8 else 256
    return n_in // matrix[GROUP_SIZE] * (_SCALES + matrix[GROUP_SIZE] // 32 * run)


@kernel
def n_items(matrices, n_threads):
    """Into how many items the tiles of several matrices are divided: enough to balance threads."""
    return min(matrices[:, N_TILES].sum(), 16 * n_threads)


@stage
def matmul(item, thread, matrices, x, codes, scales, sums, y, n_threads):
    """Multiplies the same inputs by several matrices, whose outputs lie side by side.

    Does one of n_items(matrices, n_threads) items. matrices: int64 (n_matrices, N_COLUMNS); x:
    float32 (n_tokens, n_in), read by float formats; codes, scales, sums: the same from
    quantize_row, (n_tokens, n_in), (n_tokens, n_in / 32) twice, read by the others; y: float32,
    n_tokens rows of at least 16 times all tiles. Each row is contiguous.
    """
    n_tokens = x.shape[0]
    x_stride, codes_stride = x.strides[0], codes.strides[0]
    sums_stride, y_stride = sums.strides[0], y.strides[0]
    total, items = matrices[:, N_TILES].sum(), n_items(matrices, n_threads)
    start, stop = total * item // items, total * (item + 1) // items
    before = 0  # tiles of the matrices passed
    for m in range(matrices.shape[0]):
        matrix = matrices[m]
        n_tiles, size = matrix[N_TILES], tile_bytes(matrix)
        for tile in range(max(start, before), min(stop, before + n_tiles)):
            w = matrix[ADDRESS] + (tile - before) * size
            out = address_of(y) + 64 * tile
            t = 0
            while t < n_tokens:
                px, pc = address_of(x) + t * x_stride, address_of(codes) + t * codes_stride
                ps, pn = address_of(scales) + t * sums_stride, address_of(sums) + t * sums_stride
                py = out + t * y_stride
                if t + TOKENS <= n_tokens:
                    _some_tokens(
                        matrix, w, px, x_stride, pc, codes_stride, ps, pn, sums_stride, py, y_stride
                    )
                    t += TOKENS
                else:
                    _one_token(
                        matrix, w, px, x_stride, pc, codes_stride, ps, pn, sums_stride, py, y_stride
                    )
                    t += 1
        before += n_tiles
