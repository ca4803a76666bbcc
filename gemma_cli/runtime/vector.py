"""Vectors for Numba kernels: lanes of one matrix tile, in the CPU's own registers.

A tile of a weight matrix has 16 rows, so every vector here has 16 lanes of 32 bits, one for each
row, or the 64 bytes that hold four inputs of each row. LLVM cuts them into registers of whatever
width the CPU has. Kernels written with these vectors are therefore the same for every CPU; only
the integer dot products (`dots_int4`, `dots_int8`) are lowered differently for each instruction
set, because LLVM does not find those instructions by itself.

Memory is named by address (an int64), since weights are used from a mapped file. Nothing here
checks bounds: callers pass addresses of buffers whose sizes they have checked.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from gemma_cli.runtime import isa

LANES = 16

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_HALF = ir.HalfType()


class Vector(types.Type):
    """Numba type of a vector of `n` lanes of the LLVM type `lane`."""

    def __init__(self, name: str, lane: ir.Type, n: int) -> None:
        self.ir_type = ir.VectorType(lane, n)
        self.is_float = isinstance(lane, ir.FloatType)
        super().__init__(name=name)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.ir_type)


F32X16 = Vector("f32x16", _F32, LANES)
I32X16 = Vector("i32x16", _I32, LANES)

_VF32, _VI32, _VI8 = F32X16.ir_type, I32X16.ir_type, ir.VectorType(_I8, 4 * LANES)


# LLVM building blocks: each takes the IR builder first and emits instructions.


def _call(b: ir.IRBuilder, name: str, ret: ir.Type, args: Sequence[ir.Value]) -> ir.Value:
    function_type = ir.FunctionType(ret, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, function_type, name), args)


def _splat(b: ir.IRBuilder, scalar: ir.Value, n: int = LANES) -> ir.Value:
    vector = ir.Constant(ir.VectorType(scalar.type, n), ir.Undefined)
    vector = b.insert_element(vector, scalar, _I32(0))
    return b.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, n), [0] * n))


def _const(vector_type: ir.VectorType, value: float | Sequence[int]) -> ir.Constant:
    lanes = list(value) if isinstance(value, Sequence) else [value] * vector_type.count
    return ir.Constant(vector_type, lanes)


def _load(b: ir.IRBuilder, address: ir.Value, ir_type: ir.Type, align: int = 1) -> ir.Value:
    return b.load(b.inttoptr(address, ir_type.as_pointer()), align=align)


def _store(b: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


def _offset(b: ir.IRBuilder, address: ir.Value, n_bytes: int) -> ir.Value:
    return b.add(address, _I64(n_bytes)) if n_bytes else address


def _part(b: ir.IRBuilder, vector: ir.Value, k: int, n: int) -> ir.Value:
    """Lanes k n to (k + 1) n of a vector."""
    mask = _const(ir.VectorType(_I32, n), list(range(k * n, (k + 1) * n)))
    return b.shuffle_vector(vector, vector, mask)


def _concat(b: ir.IRBuilder, parts: Sequence[ir.Value]) -> ir.Value:
    parts = list(parts)
    while len(parts) > 1:
        n = parts[0].type.count
        mask = _const(ir.VectorType(_I32, 2 * n), list(range(2 * n)))
        parts = [b.shuffle_vector(parts[i], parts[i + 1], mask) for i in range(0, len(parts), 2)]
    return parts[0]


def _by_part(
    b: ir.IRBuilder, n: int, emit: Callable[..., ir.Value], *vectors: ir.Value
) -> ir.Value:
    """Applies an instruction for n parts of a vector to a vector n times as wide."""
    split = [[_part(b, v, k, v.type.count // n) for v in vectors] for k in range(n)]
    return _concat(b, [emit(*parts) for parts in split])


def _half_to_float(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    if isa.NAME != "plain":
        return b.fpext(_load(b, address, ir.VectorType(_HALF, LANES)), _VF32)
    # Without a conversion instruction: move exponent and fraction into place, then correct the
    # exponent's bias by a multiplication, which also makes the subnormal halves right.
    bits = b.zext(_load(b, address, ir.VectorType(_I16, LANES)), _VI32)
    magnitude = b.shl(b.and_(bits, _const(_VI32, 0x7FFF)), _const(_VI32, 13))
    sign = b.shl(b.and_(bits, _const(_VI32, 0x8000)), _const(_VI32, 16))
    value = b.bitcast(b.fmul(b.bitcast(magnitude, _VF32), _const(_VF32, 2.0**112)), _VI32)
    # Infinities and what is no number have the largest exponent, here as there.
    endless = b.icmp_unsigned(">=", magnitude, _const(_VI32, 0x7C00 << 13))
    value = b.select(endless, b.or_(magnitude, _const(_VI32, 0x7F800000)), value)
    return b.bitcast(b.or_(value, sign), _VF32)


def _fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return _call(b, "llvm.fmuladd.v16f32", _VF32, [x, y, z])


def _broadcast4(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Four bytes, repeated for each of the 16 rows."""
    return b.bitcast(_splat(b, _load(b, address, _I32)), _VI8)


def _dot4_plain(b: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    """acc[r] + sum over j of w[4 r + j] x[4 r + j], both signed."""
    w, x = b.bitcast(w, _VI32), b.bitcast(x, _VI32)
    for j in range(4):
        shift, down = _const(_VI32, 24 - 8 * j), _const(_VI32, 24)
        product = b.mul(b.ashr(b.shl(w, shift), down), b.ashr(b.shl(x, shift), down))
        acc = b.add(acc, product)
    return acc


def _dot4_neon(b: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    def sdot(acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
        return _call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, [acc, w, x])

    return _by_part(b, 4, sdot, acc, w, x)


def _maddubs(b: ir.IRBuilder, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    name = "llvm.x86.avx2.pmadd.ub.sw"
    return _call(b, name, ir.VectorType(_I16, 16), [unsigned, signed])


def _maddwd(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return _call(b, "llvm.x86.avx2.pmadd.wd", ir.VectorType(_I32, 8), [x, y])


def _sum_pairs(b: ir.IRBuilder, words: ir.Value) -> ir.Value:
    return _maddwd(b, words, _const(words.type, 1))


def _dot4_avx2(b: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    # vpmaddubsw wants one unsigned operand and saturates at 16 bits: |w| <= 128 times
    # sign(w) x with |x| <= 127 leaves a sum of two within 32,512.
    def signed(acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
        magnitude = _call(b, "llvm.abs.v32i8", w.type, [w, ir.Constant(ir.IntType(1), 0)])
        moved = _call(b, "llvm.x86.avx2.psign.b", x.type, [x, w])
        return b.add(acc, _sum_pairs(b, _maddubs(b, magnitude, moved)))

    return _by_part(b, 2, signed, acc, w, x)


def _dot4_unsigned(b: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    """acc[r] + sum over j of w[4 r + j] x[4 r + j], w unsigned, x signed."""

    def busd(bits: int) -> Callable[..., ir.Value]:
        def emit(acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
            name = f"llvm.x86.avx512.vpdpbusd.{bits}"
            return _call(b, name, acc.type, [acc, b.bitcast(w, acc.type), b.bitcast(x, acc.type)])

        return emit

    def usdot(acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
        return _call(b, "llvm.aarch64.neon.usdot.v4i32.v16i8", acc.type, [acc, w, x])

    if isa.NAME == "i8mm":
        # Not smmla, i8mm's matrix product: it takes 8 inputs of 2 rows from a register, and a
        # tile has 4 inputs of 4 rows there, so all codes would have to be shuffled first.
        return _by_part(b, 4, usdot, acc, w, x)
    if isa.AVX512:
        return busd(512)(acc, w, x)
    return _by_part(b, 2, busd(256), acc, w, x)


def _dot2(b: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    """acc[r] + sum over j of w[2 r + j] x[2 r + j], of int16; w and x: i32x16 of pairs."""
    if isa.AVX512:
        return _call(b, "llvm.x86.avx512.vpdpwssd.512", _VI32, [acc, w, x])
    if isa.NAME == "avxvnni":
        name = "llvm.x86.avx512.vpdpwssd.256"
        return _by_part(b, 2, lambda *parts: _call(b, name, parts[0].type, parts), acc, w, x)
    if isa.NAME == "avx2":
        words = [b.bitcast(pairs, ir.VectorType(_I16, 2 * LANES)) for pairs in (w, x)]
        return b.add(acc, _by_part(b, 2, lambda *parts: _maddwd(b, *parts), *words))
    if isa.NAME == "plain":  # in the form that LLVM knows as SSE2's pmaddwd
        wide = ir.VectorType(_I32, 2 * LANES)
        words = [b.sext(b.bitcast(pairs, ir.VectorType(_I16, 2 * LANES)), wide) for pairs in (w, x)]
        products = b.mul(*words)
        evens, odds = (_choose_lanes(b, products, range(j, 2 * LANES, 2)) for j in (0, 1))
        return b.add(acc, b.add(evens, odds))
    for shift in (0, 16):
        words = [
            b.ashr(b.shl(pairs, _const(_VI32, 16 - shift)), _const(_VI32, 16)) for pairs in (w, x)
        ]
        acc = b.add(acc, b.mul(*words))
    return acc


_UNSIGNED = isa.AVX512 or isa.NAME in ("avxvnni", "i8mm")
"""Whether the CPU sums products of unsigned by signed bytes in 32 bits."""

_dot4_signed = {"avx2": _dot4_avx2, "neon": _dot4_neon}.get(isa.NAME, _dot4_plain)


def _shuffle16(b: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
    """table[code] for 64 codes; table is 16 bytes, four times over."""
    if isa.AVX512:
        return _call(b, "llvm.x86.avx512.pshuf.b.512", _VI8, [table, codes])
    if isa.NAME in ("avxvnni", "avx2"):
        return _by_part(
            b, 2, lambda t, c: _call(b, "llvm.x86.avx2.pshuf.b", t.type, [t, c]), table, codes
        )
    if isa.NAME in ("i8mm", "neon"):
        name = "llvm.aarch64.neon.tbl1.v16i8"
        return _by_part(b, 4, lambda t, c: _call(b, name, t.type, [t, c]), table, codes)
    # Halve the candidates by one bit of the code after the other.
    candidates = [_splat(b, b.extract_element(table, _I32(i)), 4 * LANES) for i in range(16)]
    for bit in range(4):
        chosen = b.trunc(b.lshr(codes, _const(_VI8, bit)), ir.VectorType(ir.IntType(1), 4 * LANES))
        pairs = zip(candidates[::2], candidates[1::2], strict=True)
        candidates = [b.select(chosen, odd, even) for even, odd in pairs]
    return candidates[0]


def _nibbles(b: ir.IRBuilder, packed: ir.Value) -> tuple[ir.Value, ir.Value]:
    low = b.and_(packed, _const(_VI8, 0x0F))
    return low, b.lshr(packed, _const(_VI8, 4))


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
    of it; elsewhere the bytes are made signed first.
    """
    acc = [_const(_VI32, 0) for _ in range(n)]
    if _UNSIGNED or zero == 8:
        for t in range(n):
            offset = _splat(b, _load(b, _offset(b, offsets, 4 * t), _I32))
            acc[t] = offset if zero == 128 else b.ashr(offset, _const(_VI32, 4))
    elif zero == 128:
        weights = [b.xor(w, _const(_VI8, 0x80)) for w in weights]
    # Two sums of 16-bit words a token, for codes so small that eight products fit.
    in_words = small and isa.NAME == "avx2"
    words = [[_const(ir.VectorType(_I16, 16), 0)] * 2 for _ in range(n)]
    dot4 = _dot4_unsigned if _UNSIGNED else _dot4_signed
    for run, w in enumerate(weights):
        for t in range(n):
            four = _broadcast4(b, _offset(b, x, 4 * (width * run + t)))
            if not in_words:
                acc[t] = dot4(b, acc[t], w, four)
                continue
            for half in range(2):
                pairs = _maddubs(b, _part(b, w, half, 32), _part(b, four, half, 32))
                words[t][half] = b.add(words[t][half], pairs)
    array = ir.Constant(ir.ArrayType(_VI32, n), ir.Undefined)
    for t in range(n):
        if in_words:
            acc[t] = b.add(acc[t], _concat(b, [_sum_pairs(b, half) for half in words[t]]))
        array = b.insert_value(array, acc[t], t)
    return array


# What kernels call. `n` is a constant: the number of tokens whose values are held at once.


def _int4_bytes(b: ir.IRBuilder, w: ir.Value) -> list[ir.Value]:
    """The codes 0 to 15 of 32 inputs, in the order of the inputs."""
    pairs = [_nibbles(b, _load(b, _offset(b, w, 64 * run), _VI8)) for run in range(4)]
    return [low for low, _ in pairs] + [high for _, high in pairs]


def _int8_bytes(b: ir.IRBuilder, w: ir.Value) -> list[ir.Value]:
    """The bytes of 32 inputs, where each has one."""
    return [_load(b, _offset(b, w, 64 * run), _VI8) for run in range(8)]


def _codebook_bytes(b: ir.IRBuilder, w: ir.Value, levels: ir.Value) -> list[ir.Value]:
    """The levels + 128 of 32 inputs' codes."""
    table = _concat(b, [_load(b, levels, ir.VectorType(_I8, 16))] * 4)
    return [_shuffle16(b, table, codes) for codes in _int4_bytes(b, w)]


def _planes_bytes(b: ir.IRBuilder, high: ir.Value, low: ir.Value) -> list[ir.Value]:
    """The bytes (code + 128) of 32 inputs from their high nibbles and their low ones."""
    four, upper = _const(_VI8, 4), _const(_VI8, 0xF0)
    first, second = [], []
    for run in range(4):
        h, rest = (_load(b, _offset(b, plane, 64 * run), _VI8) for plane in (high, low))
        first.append(b.or_(b.and_(b.shl(h, four), upper), b.and_(rest, _const(_VI8, 0x0F))))
        second.append(b.or_(b.and_(h, upper), b.lshr(rest, four)))
    return first + second


def _dots(
    emit: Callable[[ir.IRBuilder, ir.Value, ir.Value], list[ir.Value]],
    zero: int,
    small: bool,
    doc: str,
) -> Any:
    @intrinsic(prefer_literal=True)
    def function(typingctx: Any, w: Any, other: Any, x: Any, offsets: Any, n: Any, width: Any):
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            w, other, x, offsets, _, _ = args
            n, width = (literal.literal_value for literal in sig.args[4:])
            return _dot_products(b, emit(b, w, other), x, offsets, n, width, zero, small)

        result = types.UniTuple(I32X16, n.literal_value)
        return result(w, other, x, offsets, n, width), codegen

    function.__doc__ = doc
    return function


dots_int4 = _dots(
    lambda b, w, other: _int4_bytes(b, w),
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
    _planes_bytes,
    128,
    False,
    "As dots_int8, of high nibbles and, at `other`, of low ones, both as in dots_int4.",
)
dots_expanded = _dots(
    lambda b, w, other: _int8_bytes(b, w),
    8,
    True,
    "As dots_int4, of codes that expand_int4 has laid out.",
)


def _expand(emit: Callable[..., list[ir.Value]], doc: str) -> Any:
    @intrinsic
    def function(typingctx: Any, w: Any, other: Any, target: Any):
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            for run, codes in enumerate(emit(b, args[0], args[1])):
                _store(b, _offset(b, args[2], 64 * run), codes)
            return context.get_dummy_value()

        return types.void(w, other, target), codegen

    function.__doc__ = doc
    return function


expand_int4 = _expand(
    lambda b, w, other: _int4_bytes(b, w),
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
    _planes_bytes,
    "32 inputs of high nibbles and, at `other`, of low ones to the bytes of dots_int8.",
)


# The same codes as bfloat16, as the matrix units read them.


def _to_bfloats(b: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    """Two vectors to 32 bfloat16, rounded to nearest, ties to even."""
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    return _call(b, name, ir.VectorType(_I16, 2 * LANES), [second, first])


_SIDE_BY_SIDE = [LANES * (i % 2) + i // 2 for i in range(2 * LANES)]
"""Lanes of two vectors, so that those with the same number become neighbours."""


def _choose_lanes(b: ir.IRBuilder, vector: ir.Value, lanes: Sequence[int]) -> ir.Value:
    return b.shuffle_vector(vector, vector, _const(ir.VectorType(_I32, len(lanes)), lanes))


def _expand_scaled(emit: Callable[..., list[ir.Value]], doc: str) -> Any:
    @intrinsic
    def function(typingctx: Any, w: Any, other: Any, scales: Any, target: Any):
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            w, other, scales, target = args
            scale = _half_to_float(b, scales)
            # Of 16 rows, 8 and then 8, with two inputs of each row side by side.
            doubled = [[8 * half + i // 2 for i in range(LANES)] for half in range(2)]
            factors = [_choose_lanes(b, scale, lanes) for lanes in doubled]
            offsets = [b.fmul(factor, _const(_VF32, -128.0)) for factor in factors]
            for run, codes in enumerate(emit(b, w, other)):
                fours = [_choose_lanes(b, b.bitcast(codes, _VI32), lanes) for lanes in doubled]
                for pair in range(2):
                    shift = _const(_VI32, [16 * pair + 8 * (i % 2) for i in range(LANES)])
                    values = []
                    for four, factor, offset in zip(fours, factors, offsets, strict=True):
                        byte = b.and_(b.lshr(four, shift), _const(_VI32, 255))
                        # Exact: a byte and a float16 have 19 bits together.
                        values.append(_fma(b, b.uitofp(byte, _VF32), factor, offset))
                    _store(b, _offset(b, target, 64 * (2 * run + pair)), _to_bfloats(b, *values))
            return context.get_dummy_value()

        return types.void(w, other, scales, target), codegen

    function.__doc__ = doc
    return function


expand_scaled_codebook = _expand_scaled(
    _codebook_bytes,
    """16 x 64 bytes at `target`: 32 inputs of int4 codes times their scales, as bfloat16.

    w, levels: as in dots_codebook; scales: address of 16 float16. Row k holds the inputs 2 k and
    2 k + 1 of each of the 16 rows of w, side by side.
    """,
)
expand_scaled_int8 = _expand_scaled(
    lambda b, w, other: _int8_bytes(b, w),
    "As expand_scaled_codebook, of the bytes of dots_int8.",
)
expand_scaled_planes = _expand_scaled(
    _planes_bytes, "As expand_scaled_codebook, of the planes of dots_planes."
)


@intrinsic
def expand_bf16(typingctx: Any, w: Any, target: Any):
    """As expand_scaled_codebook, of bfloat16 weights, those of 16 rows input by input."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        for k in range(16):
            pair = _load(b, _offset(b, args[0], 64 * k), ir.VectorType(_I16, 2 * LANES))
            _store(b, _offset(b, args[1], 64 * k), _choose_lanes(b, pair, _SIDE_BY_SIDE))
        return context.get_dummy_value()

    return types.void(w, target), codegen


@intrinsic(prefer_literal=True)
def zeros(typingctx: Any, n: Any):
    """n x f32x16 of zeros."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return ir.Constant(ir.ArrayType(_VF32, sig.return_type.count), None)

    return types.UniTuple(F32X16, n.literal_value)(n), codegen


@intrinsic
def add_scaled(typingctx: Any, acc: Any, dots: Any, scale: Any, x_scales: Any):
    """acc[t] + scale x_scale[t] dots[t]; x_scales: address of float32, one of each token."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        acc, dots, scale, x_scales = args
        for t in range(sig.args[0].count):
            x_scale = _load(b, _offset(b, x_scales, 4 * t), _F32)
            factor = b.fmul(scale, _splat(b, x_scale))
            value = b.sitofp(b.extract_value(dots, t), _VF32)
            acc = b.insert_value(acc, _fma(b, factor, value, b.extract_value(acc, t)), t)
        return acc

    return acc(acc, dots, scale, x_scales), codegen


@intrinsic
def add_outer(typingctx: Any, acc: Any, w: Any, x: Any, stride: Any):
    """acc[t] + w x[t]; x: address of float32, tokens `stride` bytes apart."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        acc, w, x, stride = args
        for t in range(sig.args[0].count):
            value = _splat(b, _load(b, b.add(x, b.mul(stride, _I64(t))), _F32))
            acc = b.insert_value(acc, _fma(b, w, value, b.extract_value(acc, t)), t)
        return acc

    return acc(acc, w, x, stride), codegen


@intrinsic(prefer_literal=True)
def integer_zeros(typingctx: Any, n: Any):
    """n x i32x16 of zeros."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return ir.Constant(ir.ArrayType(_VI32, sig.return_type.count), None)

    return types.UniTuple(I32X16, n.literal_value)(n), codegen


@intrinsic
def add_pairs(typingctx: Any, acc: Any, pairs: Any, x: Any, stride: Any):
    """acc[t][r] + pairs[r, 0] x[t, 0] + pairs[r, 1] x[t, 1], exact while that fits int32.

    acc: n x i32x16; pairs: as load_i16_pairs gives them; x: address of two int16, those of the
    next t `stride` bytes on.
    """

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        acc, pairs, x, stride = args
        for t in range(sig.args[0].count):
            pair = _splat(b, _load(b, b.add(x, b.mul(stride, _I64(t))), _I32))
            acc = b.insert_value(acc, _dot2(b, b.extract_value(acc, t), pairs, pair), t)
        return acc

    return acc(acc, pairs, x, stride), codegen


@intrinsic
def store_rows(typingctx: Any, address: Any, stride: Any, rows: Any, count: Any):
    """Stores the first `count` f32x16 of `rows`, `stride` bytes apart."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        address, stride, rows, count = args
        for t in range(sig.args[2].count):
            with b.if_then(b.icmp_signed("<", _I64(t), count)):
                _store(b, b.add(address, b.mul(stride, _I64(t))), b.extract_value(rows, t))
        return context.get_dummy_value()

    return types.void(address, stride, rows, types.int64), codegen


@intrinsic(prefer_literal=True)
def load_rows(typingctx: Any, address: Any, stride: Any, count: Any, n: Any):
    """The n x f32x16 that store_rows has stored; beyond the first `count` any of them."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        address, stride, count, _ = args
        rows = ir.Constant(ir.ArrayType(_VF32, sig.return_type.count), None)
        last = b.sub(count, _I64(1))
        for t in range(sig.return_type.count):
            at = b.select(b.icmp_signed("<", _I64(t), count), _I64(t), last)
            rows = b.insert_value(rows, _load(b, b.add(address, b.mul(stride, at)), _VF32), t)
        return rows

    result = types.UniTuple(F32X16, n.literal_value)
    return result(address, stride, types.int64, n), codegen


def _unary(emit: Callable[..., ir.Value], result: types.Type, doc: str) -> Any:
    @intrinsic
    def function(typingctx: Any, value: Any):
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            return emit(b, args[0])

        return result(value), codegen

    function.__doc__ = doc
    return function


def _to_float(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    if isinstance(x.type, ir.IntType):
        return b.sitofp(x, _F32)
    return x if x.type == _F32 else b.fptrunc(x, _F32)


def _bfloat_to_float(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    bits = b.zext(_load(b, address, ir.VectorType(_I16, LANES)), _VI32)
    return b.bitcast(b.shl(bits, _const(_VI32, 16)), _VF32)


def _byte_to_float(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return b.sitofp(_load(b, address, ir.VectorType(_I8, LANES)), _VF32)


def _widened_pairs(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    bytes_ = _load(b, address, ir.VectorType(_I8, 2 * LANES))
    return b.bitcast(b.sext(bytes_, ir.VectorType(_I16, 2 * LANES)), _VI32)


def _pair_to_float(b: ir.IRBuilder, pairs: ir.Value, left: int) -> ir.Value:
    """The low halves of the lanes, if they are shifted left by 16, or the high ones."""
    word = b.ashr(b.shl(pairs, _const(_VI32, left)), _const(_VI32, 16))
    return b.sitofp(word, _VF32)


def _horizontal_sum(b: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    while vector.type.count > 1:
        n = vector.type.count // 2
        vector = b.fadd(_part(b, vector, 0, n), _part(b, vector, 1, n))
    return b.extract_element(vector, _I32(0))


def _horizontal_max(b: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    while vector.type.count > 1:
        n = vector.type.count // 2
        left, right = _part(b, vector, 0, n), _part(b, vector, 1, n)
        vector = b.select(b.fcmp_ordered(">", left, right), left, right)
    return b.extract_element(vector, _I32(0))


def _exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2, exp(r) by its Taylor series.

    Relative error below 2e-7 (the seventh power's term is 1e-7 at the interval's end). Below -87
    the result is 0, so that what is masked has no weight at all.
    """
    small = b.fcmp_ordered("<", x, _const(_VF32, -87.0))

    def clamp(x: ir.Value, limit: float, comparison: str) -> ir.Value:
        bound = _const(_VF32, limit)
        return b.select(b.fcmp_ordered(comparison, x, bound), bound, x)

    x = clamp(clamp(x, -87.0, "<"), 88.0, ">")
    # Adding and taking away 1.5 x 2^23 rounds to the nearest integer, in any vector unit.
    magic = _const(_VF32, 12582912.0)
    shifted = _fma(b, x, _const(_VF32, 1.4426950408889634), magic)
    n = b.fsub(shifted, magic)
    # ln 2 in two parts, the first with few enough bits that n times it is exact.
    r = _fma(b, n, _const(_VF32, -0.693359375), x)
    r = _fma(b, n, _const(_VF32, 2.12194440054690583e-4), r)
    value = _const(_VF32, 1 / 5040)
    for factorial in (720, 120, 24, 6, 2, 1, 1):
        value = _fma(b, value, r, _const(_VF32, 1 / factorial))
    exponent = b.shl(b.fptosi(n, _VI32), _const(_VI32, 23))
    value = b.bitcast(b.add(b.bitcast(value, _VI32), exponent), _VF32)
    return b.select(small, _const(_VF32, 0.0), value)


load_f32 = _unary(lambda b, a: _load(b, a, _VF32), F32X16, "16 float32 at an address -> f32x16.")
load_f16 = _unary(_half_to_float, F32X16, "16 float16 at an address -> f32x16.")
load_bf16 = _unary(_bfloat_to_float, F32X16, "16 bfloat16 at an address -> f32x16.")
load_i8 = _unary(_byte_to_float, F32X16, "16 int8 at an address -> f32x16.")
load_i16_pairs = _unary(
    lambda b, a: _load(b, a, _VI32), I32X16, "32 int16 at an address -> i32x16, two in a lane."
)
load_i8_pairs = _unary(
    _widened_pairs, I32X16, "32 int8 at an address -> i32x16, two of them in a lane, as int16."
)
first_of_pairs = _unary(
    lambda b, pairs: _pair_to_float(b, pairs, 16), F32X16, "The first int16 of each lane -> f32x16."
)
second_of_pairs = _unary(
    lambda b, pairs: _pair_to_float(b, pairs, 0), F32X16, "The second int16 of each lane -> f32x16."
)
splat = _unary(
    lambda b, x: _splat(b, _to_float(b, x)),
    F32X16,
    "A number in all 16 lanes.",
)
horizontal_sum = _unary(_horizontal_sum, types.float32, "The sum of 16 lanes, in a fixed order.")
horizontal_max = _unary(_horizontal_max, types.float32, "The largest of 16 lanes.")
sqrt = _unary(
    lambda b, x: _call(b, "llvm.sqrt.v16f32", _VF32, [x]), F32X16, "The root of each lane."
)
absolute = _unary(
    lambda b, x: _call(b, "llvm.fabs.v16f32", _VF32, [x]), F32X16, "|x| in each lane."
)
exp = _unary(
    _exp, F32X16, "e^x in each lane, 0 below -87, e^88 above 88; relative error below 2e-7."
)
load_byte = _unary(
    lambda b, a: b.zext(_load(b, a, _I8), _I64), types.int64, "The unsigned byte at an address."
)
load_scalar = _unary(lambda b, a: _load(b, a, _F32), types.float32, "The float32 at an address.")


@intrinsic
def store_f32(typingctx: Any, address: Any, vector: Any):
    """Stores an f32x16 at an address."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        _store(b, args[0], args[1])
        return context.get_dummy_value()

    return types.void(address, vector), codegen


@intrinsic
def store_scalar(typingctx: Any, address: Any, value: Any):
    """Stores a float32 at an address."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        _store(b, args[0], _to_float(b, args[1]))
        return context.get_dummy_value()

    return types.void(address, value), codegen


@intrinsic
def store_bf16(typingctx: Any, address: Any, first: Any, second: Any):
    """Stores two f32x16 as 32 bfloat16, rounded to nearest, ties to even; needs AVX-512-BF16."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        _store(b, args[0], _to_bfloats(b, args[1], args[2]))
        return context.get_dummy_value()

    return types.void(address, first, second), codegen


@intrinsic
def store_bf16_pairs(typingctx: Any, address: Any, first: Any, second: Any):
    """As store_bf16, with the lanes of both side by side: first[0], second[0], first[1], ..."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        _store(b, args[0], _choose_lanes(b, _to_bfloats(b, args[1], args[2]), _SIDE_BY_SIDE))
        return context.get_dummy_value()

    return types.void(address, first, second), codegen


def _to_integers(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Rounded to nearest, ties to even; |x| below 2^22."""
    magic = _const(_VF32, 12582912.0)
    return b.fptosi(b.fsub(b.fadd(x, magic), magic), _VI32)


@intrinsic
def round_run(typingctx: Any, address: Any, first: Any, second: Any):
    """Stores two f32x16 (|x| <= 127) as 32 int8, rounded, ties to even; their sum, int32."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        address, *vectors = args
        first, second = (_to_integers(b, vector) for vector in vectors)
        codes = b.trunc(_concat(b, [first, second]), ir.VectorType(_I8, 2 * LANES))
        _store(b, address, codes)
        total = b.add(first, second)
        while total.type.count > 1:
            n = total.type.count // 2
            total = b.add(_part(b, total, 0, n), _part(b, total, 1, n))
        return b.extract_element(total, _I32(0))

    return types.int32(address, first, second), codegen


def _store_rounded(lane: ir.Type, doc: str) -> Any:
    @intrinsic
    def function(typingctx: Any, address: Any, step: Any, stride: Any, vector: Any):
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            address, step, stride, vector = args
            lanes = b.trunc(_to_integers(b, vector), ir.VectorType(lane, LANES))
            for i in range(LANES):
                offset = b.add(b.mul(stride, _I64(i // 2)), b.mul(step, _I64(i % 2)))
                _store(b, b.add(address, offset), b.extract_element(lanes, _I32(i)))
            return context.get_dummy_value()

        return types.void(address, step, stride, vector), codegen

    function.__doc__ = doc
    return function


store_i8 = _store_rounded(
    _I8,
    """Stores an f32x16 (|x| <= 127) as int8, rounded, ties to even.

    Of the lanes 0, 2, 4, ... each is stored `stride` bytes after the one before, and the lanes 1,
    3, 5, ... `step` bytes after these. Strides that are known to leave no gap make it one store.
    """,
)
store_i16 = _store_rounded(_I16, "As store_i8, to int16 (|x| <= 32,767).")


@intrinsic
def fma(typingctx: Any, x: Any, y: Any, z: Any):
    """x y + z, for f32x16; one rounding where the CPU has the instruction."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return _fma(b, *args)

    return F32X16(x, y, z), codegen


@intrinsic
def larger(typingctx: Any, x: Any, y: Any):
    """The larger of x and y in each lane, for f32x16."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return b.select(b.fcmp_ordered(">", *args), *args)

    return F32X16(x, y), codegen


def _prefetch(locality: int, doc: str) -> Any:
    @intrinsic
    def function(typingctx: Any, address: Any):
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            pointer = b.inttoptr(args[0], _I8.as_pointer())
            function_type = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
            function = cgutils.get_or_insert_function(b.module, function_type, "llvm.prefetch.p0")
            b.call(function, [pointer, _I32(0), _I32(locality), _I32(1)])
            return context.get_dummy_value()

        return types.void(address), codegen

    function.__doc__ = doc
    return function


prefetch = _prefetch(2, "Asks for the cache line at an address, into the second-nearest cache.")
prefetch_near = _prefetch(3, "Asks for the cache line at an address, into the nearest cache.")


@intrinsic
def address_of(typingctx: Any, array: Any):
    """The address of an array's first element."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        struct = context.make_array(sig.args[0])(context, b, args[0])
        return b.ptrtoint(struct.data, _I64)

    return types.int64(array), codegen


def _operator(symbol: Callable[..., Any], emit: str) -> None:
    """Gives f32x16 one of Python's operators."""

    @infer_global(symbol)
    class Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            return signature(F32X16, *args) if args == (F32X16, F32X16) else None

    @lower_builtin(symbol, F32X16, F32X16)
    def lower(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return getattr(b, emit)(*args)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
_operator(operator.truediv, "fdiv")
