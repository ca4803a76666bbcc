"""Weights as they lie in a tile, for Numba kernels: unpacked, and multiplied by rounded inputs.

Kernels made of this are the same for every CPU. The integer dot products (`dots_int4`,
`dots_int8`) are lowered differently for each instruction set, because LLVM does not find those
instructions by itself. Vectors are `vector`'s.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gemma_cli.runtime import emit, isa
from gemma_cli.runtime.emit import F32, I8, I16, I32, I64, LANES, SIDE_BY_SIDE, VF32, VI8, VI32
from gemma_cli.runtime.vector import I32X16
from gemma_cli.runtime.workspace import CODES, TABLE
from quantize.packing import PLANE_BITS


def _broadcast4(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Four bytes, repeated for each of the 16 rows."""
    return b.bitcast(emit.splat(b, emit.load(b, address, I32)), VI8)


def _dot4_plain(b: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    """acc[r] + sum over j of w[4 r + j] x[4 r + j], both signed."""
    w, x = b.bitcast(w, VI32), b.bitcast(x, VI32)
    for j in range(4):
        shift, down = emit.const(VI32, 24 - 8 * j), emit.const(VI32, 24)
        product = b.mul(b.ashr(b.shl(w, shift), down), b.ashr(b.shl(x, shift), down))
        acc = b.add(acc, product)
    return acc


def _dot4_neon(b: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    def sdot(acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
        return emit.call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, [acc, w, x])

    return emit.by_part(b, 4, sdot, acc, w, x)


def _maddubs(b: ir.IRBuilder, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    name = "llvm.x86.avx2.pmadd.ub.sw"
    return emit.call(b, name, ir.VectorType(I16, 16), [unsigned, signed])


def _sum_pairs(b: ir.IRBuilder, words: ir.Value) -> ir.Value:
    return emit.maddwd(b, words, emit.const(words.type, 1))


def _dot4_avx2(b: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    # vpmaddubsw wants one unsigned operand and saturates at 16 bits: |w| <= 128 times
    # sign(w) x with |x| <= 127 leaves a sum of two within 32,512.
    def signed(acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
        magnitude = emit.call(b, "llvm.abs.v32i8", w.type, [w, ir.Constant(ir.IntType(1), 0)])
        moved = emit.call(b, "llvm.x86.avx2.psign.b", x.type, [x, w])
        return b.add(acc, _sum_pairs(b, _maddubs(b, magnitude, moved)))

    return emit.by_part(b, 2, signed, acc, w, x)


def _dot4_unsigned(b: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    """acc[r] + sum over j of w[4 r + j] x[4 r + j], w unsigned, x signed."""

    def busd(bits: int) -> Callable[..., ir.Value]:
        def instruction(acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
            name = f"llvm.x86.avx512.vpdpbusd.{bits}"
            return emit.call(
                b, name, acc.type, [acc, b.bitcast(w, acc.type), b.bitcast(x, acc.type)]
            )

        return instruction

    def usdot(acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
        return emit.call(b, "llvm.aarch64.neon.usdot.v4i32.v16i8", acc.type, [acc, w, x])

    if isa.NAME == "i8mm":
        # Not smmla, i8mm's matrix product: it takes 8 inputs of 2 rows from a register, and a
        # tile has 4 inputs of 4 rows there, so all codes would have to be shuffled first.
        return emit.by_part(b, 4, usdot, acc, w, x)
    if isa.AVX512:
        return busd(512)(acc, w, x)
    return emit.by_part(b, 2, busd(256), acc, w, x)


_UNSIGNED = isa.AVX512 or isa.NAME in ("avxvnni", "i8mm")
"""Whether the CPU sums products of unsigned by signed bytes in 32 bits."""


_dot4_signed = {"avx2": _dot4_avx2, "neon": _dot4_neon}.get(isa.NAME, _dot4_plain)


def _shuffle16(b: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
    """table[code] for 64 codes; table is 16 bytes, four times over."""
    if isa.AVX512:
        return emit.call(b, "llvm.x86.avx512.pshuf.b.512", VI8, [table, codes])
    if isa.NAME in ("avxvnni", "avx2"):
        return emit.by_part(
            b, 2, lambda t, c: emit.call(b, "llvm.x86.avx2.pshuf.b", t.type, [t, c]), table, codes
        )
    if isa.NAME in ("i8mm", "neon"):
        name = "llvm.aarch64.neon.tbl1.v16i8"
        return emit.by_part(b, 4, lambda t, c: emit.call(b, name, t.type, [t, c]), table, codes)
    # Halve the candidates by one bit of the code after the other.
    candidates = [emit.splat(b, b.extract_element(table, I32(i)), 4 * LANES) for i in range(16)]
    for bit in range(4):
        chosen = b.trunc(
            b.lshr(codes, emit.const(VI8, bit)), ir.VectorType(ir.IntType(1), 4 * LANES)
        )
        pairs = zip(candidates[::2], candidates[1::2], strict=True)
        candidates = [b.select(chosen, odd, even) for even, odd in pairs]
    return candidates[0]


def _dot_products(
    b: ir.IRBuilder,
    weights: Sequence[ir.Value],
    x: ir.Value,
    offsets: ir.Value,
    n: int,
    width: int,
    zero: int,
    small: bool,
) -> ir.Value:
    """The exact integer dot products of 16 rows with n tokens over 32 inputs, an LLVM array.

    weights: 8 vectors, of 4 inputs each, of unsigned bytes w; what is summed is (w - zero) x, zero
    being 128 or 8; small: w is at most 15. x, offsets: addresses of the tokens' inputs, `width`
    tokens side by side, and of their offsets, -128 sum(x). Where the CPU multiplies unsigned by
    signed bytes, and for bytes that are both, that is the sum of w x and the offset, or a sixteenth
    of it; elsewhere the bytes are made signed first. With a zero of 0 offsets are what they are.
    """
    if _UNSIGNED and zero == 8 and n > 1:
        # An offset that is taken as it is comes with its load alone; a sixteenth is two more
        # instructions for each token.
        weights, zero = [b.add(w, emit.const(VI8, 120)) for w in weights], 128
    acc = [emit.const(VI32, 0) for _ in range(n)]
    if _UNSIGNED or zero < 128:
        for t in range(n):
            offset = emit.splat(b, emit.load(b, emit.offset(b, offsets, 4 * t), I32))
            acc[t] = b.ashr(offset, emit.const(VI32, 4)) if zero == 8 else offset
    else:
        weights = [b.xor(w, emit.const(VI8, 0x80)) for w in weights]
    # Two sums of 16-bit words a token, for codes so small that eight products fit.
    in_words = small and isa.NAME == "avx2"
    words = [[emit.const(ir.VectorType(I16, 16), 0)] * 2 for _ in range(n)]
    dot4 = _dot4_unsigned if _UNSIGNED else _dot4_signed
    for run, w in enumerate(weights):
        for t in range(n):
            four = _broadcast4(b, emit.offset(b, x, 4 * (width * run + t)))
            if not in_words:
                acc[t] = dot4(b, acc[t], w, four)
                continue
            for half in range(2):
                pairs = _maddubs(b, emit.part(b, w, half, 32), emit.part(b, four, half, 32))
                words[t][half] = b.add(words[t][half], pairs)
    array = ir.Constant(ir.ArrayType(VI32, n), ir.Undefined)
    for t in range(n):
        if in_words:
            acc[t] = b.add(acc[t], emit.concat(b, [_sum_pairs(b, half) for half in words[t]]))
        array = b.insert_value(array, acc[t], t)
    return array


def _codes(b: ir.IRBuilder, w: ir.Value, bits: int, above: int = 0) -> list[ir.Value]:
    """32 inputs' codes of 1, 2 or 4 bits, in their order, `above` so many lower bits."""
    # Two bytes at a time: one LLVM would shift by GFNI, which has to wait for what multiplies, and
    # for what it makes of four, AVX2 takes a sixth longer to read a prompt.
    twos = ir.VectorType(I16, 2 * LANES)
    packed = [emit.load(b, emit.offset(b, w, 64 * run), twos) for run in range(bits)]
    codes = []
    for shift in range(-above, 8 - above, bits):
        move, by = (b.shl, -shift) if shift < 0 else (b.lshr, shift)
        moved = [b.bitcast(move(two, emit.const(twos, by)), VI8) for two in packed]
        codes += [b.and_(code, emit.const(VI8, (1 << bits) - 1 << above)) for code in moved]
    return codes


def _int8_bytes(b: ir.IRBuilder, w: ir.Value) -> list[ir.Value]:
    """The bytes of 32 inputs, where each has one."""
    return [emit.load(b, emit.offset(b, w, 64 * run), VI8) for run in range(8)]


def _codebook_bytes(b: ir.IRBuilder, w: ir.Value, levels: ir.Value) -> list[ir.Value]:
    """The levels + 128 of 32 inputs' codes."""
    table = emit.concat(b, [emit.load(b, levels, ir.VectorType(I8, 16))] * 4)
    return [_shuffle16(b, table, codes) for codes in _codes(b, w, 4)]


def _planes_bytes(b: ir.IRBuilder, *addresses: ir.Value) -> list[ir.Value]:
    """The upper bits of 32 inputs' bytes (code + 128), from as many planes as there are given."""
    bytes_ = [emit.const(VI8, 0)] * 8
    bits = PLANE_BITS[: len(addresses)]
    for i, address in enumerate(addresses):
        plane = _codes(b, address, bits[i], above=sum(bits[i + 1 :]))
        bytes_ = [b.or_(*both) for both in zip(bytes_, plane, strict=True)]
    return bytes_


def _all_planes(b: ir.IRBuilder, w: ir.Value, others: ir.Value) -> list[ir.Value]:
    """The bytes of 32 inputs, w and others as in dots_planes."""
    return _planes_bytes(b, w, *_addresses(b, others))


def _addresses(b: ir.IRBuilder, others: ir.Value) -> list[ir.Value]:
    return [b.extract_value(others, i) for i in range(len(PLANE_BITS) - 1)]


def _dots(
    unpack: Callable[[ir.IRBuilder, ir.Value, ir.Value], list[ir.Value]],
    zero: int,
    small: bool,
    doc: str,
) -> Any:
    @intrinsic(prefer_literal=True)
    def function(typingctx: Any, w: Any, other: Any, x: Any, offsets: Any, n: Any, width: Any):
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            w, other, x, offsets, _, _ = args
            n, width = (literal.literal_value for literal in sig.args[4:])
            return _dot_products(b, unpack(b, w, other), x, offsets, n, width, zero, small)

        result = types.UniTuple(I32X16, n.literal_value)
        return result(w, other, x, offsets, n, width), codegen

    function.__doc__ = doc
    return function


dots_int4 = _dots(
    lambda b, w, other: _codes(b, w, 4),
    8,
    True,
    """dot[t][r] = sum over 32 inputs i of (code[r, i] - 8) x[t, i], exact, for n tokens t.

    w: address of 4 x 64 bytes: byte (4 r + j) of run b holds row r, input 4 b + j in its low
    nibble, input 16 + 4 b + j in its high one; other: of nothing. x: of int8 inputs, four of each
    of `width` tokens, then the next four; offsets: of -128 sum(x) as int32, one of each token.
    -> n x i32x16.
    """,
)
dots_codebook = _dots(
    _codebook_bytes,
    128,
    False,
    """As dots_int4, with codebook[code] in place of code - 8.

    other: address of 16 bytes, the codebook's int8 levels + 128.
    """,
)
dots_int8 = _dots(
    lambda b, w, other: _int8_bytes(b, w),
    128,
    False,
    """As dots_int4, of (byte[r, i] - 128) x[t, i].

    w: address of 8 x 64 bytes: byte (4 r + j) of run b holds row r, input 4 b + j.
    """,
)
dots_planes = _dots(
    _all_planes,
    128,
    False,
    """As dots_int8, of codes in planes (quantize.packing).

    w: address of the first plane; other: the addresses of the others, a tuple.
    """,
)


def _dots_upper(n_planes: int) -> Any:
    return _dots(
        lambda b, w, other: _planes_bytes(b, w, *_addresses(b, other)[: n_planes - 1]),
        0,
        True,
        """dot[t][r] = offset[t] + sum over 32 inputs i of u[r, i] x[t, i], for n tokens t.

        u: what the first planes of `dots_planes` hold of a code + 128, at most 15.
        """,
    )


dots_one_plane, dots_two_planes, dots_three_planes = map(_dots_upper, (1, 2, 3))
EXPANDED_ZERO = 128 if _UNSIGNED else 8
"""What expand_int4 has for 0."""

dots_expanded = _dots(
    lambda b, w, other: _int8_bytes(b, w),
    EXPANDED_ZERO,
    not _UNSIGNED,
    "As dots_int4, of codes that expand_int4 has laid out.",
)


def _expand(unpack: Callable[..., list[ir.Value]], doc: str) -> Any:
    @intrinsic
    def function(typingctx: Any, w: Any, other: Any, target: Any):
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            for run, codes in enumerate(unpack(b, args[0], args[1])):
                emit.store(b, emit.offset(b, args[2], 64 * run), codes)
            return context.get_dummy_value()

        return types.void(w, other, target), codegen

    function.__doc__ = doc
    return function


expand_int4 = _expand(
    lambda b, w, other: [
        b.add(codes, emit.const(VI8, EXPANDED_ZERO - 8)) for codes in _codes(b, w, 4)
    ],
    "32 inputs of int4 codes, `w` as in dots_int4, to 8 x 64 bytes at `target`.",
)
expand_codebook = _expand(
    _codebook_bytes, "As expand_int4, to the levels + 128 of a codebook, as in dots_codebook."
)
expand_int8 = _expand(
    lambda b, w, other: _int8_bytes(b, w),
    "The bytes of dots_int8, as they are: at addresses that are multiples of 64 they are near.",
)
expand_planes = _expand(
    _all_planes, "32 inputs' codes in planes, as in dots_planes, to the bytes of dots_int8."
)


@intrinsic
def expand_scales(typingctx: Any, scales: Any, target: Any):
    """16 scales to TABLE bytes at `target`: float32, times 1, 1 + 1/8, 1 + 2/8, ...."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        scale, target = args
        for i in range(TABLE // 64):
            row = b.fmul(scale, emit.const(VF32, 1 + i / 8))
            emit.store(b, emit.offset(b, target, 64 * i), row)
        return context.get_dummy_value()

    return types.void(scales, target), codegen


@intrinsic
def add_by_table(typingctx: Any, acc: Any, dots: Any, w: Any, x: Any):
    """As vector.add_scaled, by scales that need no multiplication; for ZEN4.

    w: address of a run's codes and scales, expanded; x: of the inputs that lie together, whose
    scales are each 2^j (1 + i / 8) + 2^k with i < 8, or without the last. The product of two
    scales is row i of the weights' times 2^j and row 0 times 2^k, both exact, and the sum is
    rounded as the product would be.
    """

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        acc, dots, w, x = args
        n = sig.args[0].count
        table, scales, exponents = (
            emit.offset(b, *at) for at in ((w, 512), (x, CODES), (x, 40 * n))
        )

        def scaled(row: ir.Value, exponent: int) -> ir.Value:
            power = emit.splat(b, emit.load(b, emit.offset(b, exponents, 4 * exponent), F32))
            arguments = [emit.load(b, row, VF32), power, emit.const(VF32, 0), I16(-1), I32(4)]
            return emit.call(b, "llvm.x86.avx512.mask.scalef.ps.512", VF32, arguments)

        for t in range(n):
            high = b.zext(emit.load(b, emit.offset(b, scales, 4 * t + 2), I16), I64)
            row = b.shl(b.and_(high, I64(0x70)), I64(2))  # of a float32's bits 20 to 22
            factor = b.fadd(scaled(b.add(table, row), t), scaled(table, n + t))
            value = b.sitofp(b.extract_value(dots, t), VF32)
            acc = b.insert_value(acc, emit.fma(b, factor, value, b.extract_value(acc, t)), t)
        return acc

    return acc(acc, dots, w, x), codegen


def _expand_scaled(unpack: Callable[..., list[ir.Value]], doc: str) -> Any:
    @intrinsic
    def function(typingctx: Any, w: Any, other: Any, scales: Any, target: Any):
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            w, other, scale, target = args
            # Of 16 rows, 8 and then 8, with two inputs of each row side by side.
            doubled = [[8 * half + i // 2 for i in range(LANES)] for half in range(2)]
            factors = [emit.choose_lanes(b, scale, lanes) for lanes in doubled]
            offsets = [b.fmul(factor, emit.const(VF32, -128.0)) for factor in factors]
            for run, codes in enumerate(unpack(b, w, other)):
                fours = [emit.choose_lanes(b, b.bitcast(codes, VI32), lanes) for lanes in doubled]
                for pair in range(2):
                    shift = emit.const(VI32, [16 * pair + 8 * (i % 2) for i in range(LANES)])
                    values = []
                    for four, factor, offset in zip(fours, factors, offsets, strict=True):
                        byte = b.and_(b.lshr(four, shift), emit.const(VI32, 255))
                        # Exact: a byte and a scale have 23 bits together at most.
                        values.append(emit.fma(b, b.uitofp(byte, VF32), factor, offset))
                    emit.store(
                        b,
                        emit.offset(b, target, 64 * (2 * run + pair)),
                        emit.to_bfloats(b, *values),
                    )
            return context.get_dummy_value()

        return types.void(w, other, scales, target), codegen

    function.__doc__ = doc
    return function


expand_scaled_codebook = _expand_scaled(
    _codebook_bytes,
    """16 x 64 bytes at `target`: 32 inputs of int4 codes times their scales, as bfloat16.

    w, levels: as in dots_codebook; scales: f32x16. Row k holds the inputs 2 k and 2 k + 1 of each
    of the 16 rows of w, side by side.
    """,
)
expand_scaled_int8 = _expand_scaled(
    lambda b, w, other: _int8_bytes(b, w),
    "As expand_scaled_codebook, of the bytes of dots_int8.",
)
expand_scaled_planes = _expand_scaled(
    _all_planes, "As expand_scaled_codebook, of the planes of dots_planes."
)


@intrinsic
def expand_bf16(typingctx: Any, w: Any, target: Any):
    """As expand_scaled_codebook, of bfloat16 weights, those of 16 rows input by input."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        for k in range(16):
            pair = emit.load(b, emit.offset(b, args[0], 64 * k), ir.VectorType(I16, 2 * LANES))
            emit.store(b, emit.offset(b, args[1], 64 * k), emit.choose_lanes(b, pair, SIDE_BY_SIDE))
        return context.get_dummy_value()

    return types.void(w, target), codegen
