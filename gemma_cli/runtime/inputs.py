"""The inputs of a matrix product, rounded as its kernels read them.

For int4 and int8 weights they become int8, with one scale for 32 of them. Those of several tokens
are put into blocks, in the order in which they are read. Where there are matrix units, blocks of
many tokens are bfloat16 instead. For bf16 weights, which are exact, each becomes three, the next of
which holds what those before lack: together they have the 24 bits of a float32.
"""

import numpy as np

from gemma_cli.runtime import isa
from gemma_cli.runtime.isa import ZEN4
from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.vector import (
    absolute,
    address_of,
    horizontal_max,
    larger,
    load_bf16,
    load_f32,
    load_scalar,
    round_run,
    splat,
    store_bf16,
    store_scalar,
)
from gemma_cli.runtime.workspace import (
    BLOCK,
    CODES,
    FEW,
    STEP,
    TOGETHER,
    TOKENS,
    Inputs,
)


@kernel
def some_inputs(h, n_tokens, n_in):
    """The first n_in inputs of the first tokens."""
    runs = n_in // 32
    return Inputs(
        h.values[:n_tokens, :n_in],
        h.codes[:n_tokens, :n_in],
        h.scales[:n_tokens, :runs],
        h.offsets[:n_tokens, :runs],
        h.blocks,
    )


SMALLEST_SCALE = 2.0**-100
"""Of inputs: its inverse is finite, and beside it times a weight's scale that times 2^-127 is
nothing."""


@kernel
def _bits(x):
    return np.int64(np.float32(x).view(np.uint32))


@kernel
def _float(bits):
    return np.uint32(bits).view(np.float32)


@kernel
def _eighths(scale):
    """The largest 2^j (1 + i / 8) that is no larger than a scale."""
    return _float(_bits(scale) & 0xFFF00000)


@kernel
def _exponent(x):
    """The largest j for which 2^j is no larger than x, -127 for 0, NaN for what is not finite."""
    return np.float32((_bits(x) >> 23) - 127) + 0 * x


@kernel
def _round_scale(scale):
    """The next larger 2^j (1 + i / 8) + 2^k, for `codes.add_by_table`: a fiftieth on average."""
    part = _eighths(scale)
    return part + _float(_bits(scale - part) + 2**23 - 1 >> 23 << 23)


@kernel
def _quantize_run(first, second, codes):
    """Rounds 32 inputs, two f32x16, to int8 at the address `codes`; their scale and offset."""
    scale = horizontal_max(larger(absolute(first), absolute(second))) / np.float32(127)
    if scale < SMALLEST_SCALE:
        scale = np.float32(SMALLEST_SCALE)
    if ZEN4:
        scale = _round_scale(scale)
    inverse = splat(1 / scale)
    return scale, -128 * round_run(codes, first * inverse, second * inverse)


@kernel
def quantize_row(x, codes, scales, offsets):
    """Rounds one row of inputs to int8, with one scale for 32 of them.

    x: float32 (n,), n a multiple of 32 -> codes int8 (n,); scales float32 (n / 32,), the largest
    magnitude / 127 or, for ZEN4, a little more; offsets int32 (n / 32,), -128 times the codes' sum.
    x is about scale * code.
    """
    source, target = address_of(x), address_of(codes)
    for g in range(scales.size):
        first, second = load_f32(source + 128 * g), load_f32(source + 128 * g + 64)
        scales[g], offsets[g] = _quantize_run(first, second, target + 32 * g)


@kernel
def block_offset(t, i, n_in):
    """Where row t's inputs i to i + 31 lie in blocks of rows of n_in inputs, in bytes."""
    return STEP * (t // BLOCK * (n_in // 32) + i // 32) + 64 * (t % BLOCK)


@kernel
def block_address(h, part, t, i):
    """Where a token's inputs i to i + 31 lie in one part of the blocks."""
    return address_of(h.blocks[part]) + block_offset(t, i, h.values.shape[1])


@kernel
def together_address(h, t, i):
    """Where the inputs i to i + 31 of TOKENS tokens lie together, t the first of them."""
    return address_of(h.blocks[0]) + (t // TOKENS * (h.values.shape[1] // 32) + i // 32) * TOGETHER


@kernel
def _put_together(h, t, i, codes, scale, offset):
    """Stores what 32 inputs of a token are rounded to where it lies with that of other tokens."""
    target = together_address(h, t, i) + t % TOKENS * 4
    for run in range(8):
        store_scalar(target + 4 * TOKENS * run, load_scalar(codes + 4 * run))
    store_scalar(target + CODES, scale)
    store_scalar(target + CODES + 4 * TOKENS, np.int32(offset).view(np.float32))
    if ZEN4:
        part = _eighths(scale)
        store_scalar(target + CODES + 8 * TOKENS, _exponent(part))
        store_scalar(target + CODES + 12 * TOKENS, _exponent(scale - part))


@kernel
def round_together(h, t, i, first, second, memory):
    """Rounds a token's inputs i to i + 31, two f32x16, to the blocks alone.

    memory: address of 32 bytes to work in.
    """
    scale, offset = _quantize_run(first, second, memory)
    _put_together(h, t, i, memory, scale, offset)


@kernel
def _round_to_codes(h, t, start, stop):
    runs = slice(start // 32, stop // 32)
    quantize_row(
        h.values[t, start:stop], h.codes[t, start:stop], h.scales[t, runs], h.offsets[t, runs]
    )
    if len(h.values) == 1:
        return
    for i in range(start, stop, 32):
        codes = address_of(h.codes[t]) + i
        _put_together(h, t, i, codes, h.scales[t, i // 32], h.offsets[t, i // 32])


@kernel
def _round_to_bfloats(h, t, start, stop):
    if len(h.values) <= FEW:
        _round_to_codes(h, t, start, stop)
        return
    source = address_of(h.values[t])
    for i in range(start, stop, 32):
        first, second = load_f32(source + 4 * i), load_f32(source + 4 * i + 64)
        for part in range(len(h.blocks)):
            target = block_address(h, part, t, i)
            store_bf16(target, first, second)
            first, second = first - load_bf16(target), second - load_bf16(target + 32)


round_inputs = _round_to_bfloats if isa.AMX else _round_to_codes
"""round_inputs(h, t, start, stop) rounds a token's inputs from start to stop, multiples of 32."""
