"""The inputs of a matrix product, rounded as its kernels read them.

For int4 and int8 weights they become int8, with one scale for 32 of them. Those of several tokens
are put into blocks, in the order in which they are read. Where there are matrix units, blocks of
many tokens are bfloat16 instead. For bf16 weights, which are exact, each becomes three, the next of
which holds what those before lack: together they have the 24 bits of a float32.
"""

from gemma_cli.runtime import isa
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
from gemma_cli.runtime.workspace import BLOCK, CODES, FEW, STEP, TOGETHER, TOKENS, Inputs


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


@kernel
def quantize_row(x, codes, scales, offsets):
    """Rounds one row of inputs to int8, with one scale for 32 of them.

    x: float32 (n,), n a multiple of 32 -> codes int8 (n,); scales float32 (n / 32,), the largest
    magnitude / 127; offsets int32 (n / 32,), -128 times the codes' sum. x is about scale * code.
    """
    source, target = address_of(x), address_of(codes)
    for g in range(scales.size):
        first, second = load_f32(source + 128 * g), load_f32(source + 128 * g + 64)
        largest = horizontal_max(larger(absolute(first), absolute(second)))
        scales[g] = largest / 127
        inverse = splat(127 / largest if largest > 1e-30 else 0.0)
        offsets[g] = -128 * round_run(target + 32 * g, first * inverse, second * inverse)


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
def _round_to_codes(h, t, start, stop):
    runs = slice(start // 32, stop // 32)
    quantize_row(
        h.values[t, start:stop], h.codes[t, start:stop], h.scales[t, runs], h.offsets[t, runs]
    )
    if len(h.values) == 1:
        return
    codes = address_of(h.codes[t])
    scales, offsets = address_of(h.scales[t]), address_of(h.offsets[t])
    for i in range(start, stop, 32):
        target = together_address(h, t, i) + t % TOKENS * 4
        for run in range(8):
            store_scalar(target + 4 * TOKENS * run, load_scalar(codes + i + 4 * run))
        store_scalar(target + CODES, load_scalar(scales + i // 8))
        store_scalar(target + CODES + 4 * TOKENS, load_scalar(offsets + i // 8))


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
