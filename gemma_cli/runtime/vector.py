"""Vectors for Numba kernels: lanes of one matrix tile, in the CPU's own registers.

A tile of a weight matrix has 16 rows, so every vector here has 16 lanes of 32 bits, one for each
row, or the 64 bytes that hold four inputs of each row. Kernels written with these vectors are the
same for every CPU.

Memory is named by address (an int64), since weights are used from a mapped file. Nothing here
checks bounds: callers pass addresses of buffers whose sizes they have checked.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from gemma_cli.runtime import emit, isa
from gemma_cli.runtime.emit import F32, I8, I16, I32, I64, LANES, SIDE_BY_SIDE, VF32, VI32


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


F32X16, I32X16 = Vector("f32x16", F32, LANES), Vector("i32x16", I32, LANES)


def _dot2(b: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    """acc[r] + sum over j of w[2 r + j] x[2 r + j], of int16; w and x: i32x16 of pairs."""
    if isa.AVX512:
        return emit.call(b, "llvm.x86.avx512.vpdpwssd.512", VI32, [acc, w, x])
    if isa.NAME == "avxvnni":
        name = "llvm.x86.avx512.vpdpwssd.256"
        return emit.by_part(
            b, 2, lambda *parts: emit.call(b, name, parts[0].type, parts), acc, w, x
        )
    if isa.NAME == "avx2":
        words = [b.bitcast(pairs, ir.VectorType(I16, 2 * LANES)) for pairs in (w, x)]
        return b.add(acc, emit.by_part(b, 2, lambda *parts: emit.maddwd(b, *parts), *words))
    if isa.NAME == "plain":  # in the form that LLVM knows as SSE2's pmaddwd
        wide = ir.VectorType(I32, 2 * LANES)
        words = [b.sext(b.bitcast(pairs, ir.VectorType(I16, 2 * LANES)), wide) for pairs in (w, x)]
        products = b.mul(*words)
        evens, odds = (emit.choose_lanes(b, products, range(j, 2 * LANES, 2)) for j in (0, 1))
        return b.add(acc, b.add(evens, odds))
    for shift in (0, 16):
        words = [
            b.ashr(b.shl(pairs, emit.const(VI32, 16 - shift)), emit.const(VI32, 16))
            for pairs in (w, x)
        ]
        acc = b.add(acc, b.mul(*words))
    return acc


# What kernels call. `n` is a constant: the number of tokens whose values are held at once.


@intrinsic(prefer_literal=True)
def zeros(typingctx: Any, n: Any):
    """n x f32x16 of zeros."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return ir.Constant(ir.ArrayType(VF32, sig.return_type.count), None)

    return types.UniTuple(F32X16, n.literal_value)(n), codegen


@intrinsic
def add_scaled(typingctx: Any, acc: Any, dots: Any, scale: Any, x_scales: Any):
    """acc[t] + scale x_scale[t] dots[t]; x_scales: address of float32, one of each token."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        acc, dots, scale, x_scales = args
        for t in range(sig.args[0].count):
            x_scale = emit.load(b, emit.offset(b, x_scales, 4 * t), F32)
            factor = b.fmul(scale, emit.splat(b, x_scale))
            value = b.sitofp(b.extract_value(dots, t), VF32)
            acc = b.insert_value(acc, emit.fma(b, factor, value, b.extract_value(acc, t)), t)
        return acc

    return acc(acc, dots, scale, x_scales), codegen


@intrinsic
def add_outer(typingctx: Any, acc: Any, w: Any, x: Any, stride: Any):
    """acc[t] + w x[t]; x: address of float32, tokens `stride` bytes apart."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        acc, w, x, stride = args
        for t in range(sig.args[0].count):
            value = emit.splat(b, emit.load(b, b.add(x, b.mul(stride, I64(t))), F32))
            acc = b.insert_value(acc, emit.fma(b, w, value, b.extract_value(acc, t)), t)
        return acc

    return acc(acc, w, x, stride), codegen


@intrinsic(prefer_literal=True)
def integer_zeros(typingctx: Any, n: Any):
    """n x i32x16 of zeros."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return ir.Constant(ir.ArrayType(VI32, sig.return_type.count), None)

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
            pair = emit.splat(b, emit.load(b, b.add(x, b.mul(stride, I64(t))), I32))
            acc = b.insert_value(acc, _dot2(b, b.extract_value(acc, t), pairs, pair), t)
        return acc

    return acc(acc, pairs, x, stride), codegen


@intrinsic
def store_rows(typingctx: Any, address: Any, stride: Any, rows: Any, count: Any):
    """Stores the first `count` f32x16 of `rows`, `stride` bytes apart."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        address, stride, rows, count = args
        for t in range(sig.args[2].count):
            with b.if_then(b.icmp_signed("<", I64(t), count)):
                emit.store(b, b.add(address, b.mul(stride, I64(t))), b.extract_value(rows, t))
        return context.get_dummy_value()

    return types.void(address, stride, rows, types.int64), codegen


@intrinsic(prefer_literal=True)
def load_rows(typingctx: Any, address: Any, stride: Any, count: Any, n: Any):
    """The n x f32x16 that store_rows has stored; beyond the first `count` any of them."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        address, stride, count, _ = args
        rows = ir.Constant(ir.ArrayType(VF32, sig.return_type.count), None)
        last = b.sub(count, I64(1))
        for t in range(sig.return_type.count):
            at = b.select(b.icmp_signed("<", I64(t), count), I64(t), last)
            rows = b.insert_value(rows, emit.load(b, b.add(address, b.mul(stride, at)), VF32), t)
        return rows

    result = types.UniTuple(F32X16, n.literal_value)
    return result(address, stride, types.int64, n), codegen


def _unary(lower: Callable[..., ir.Value], result: types.Type, doc: str) -> Any:
    @intrinsic
    def function(typingctx: Any, value: Any):
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            return lower(b, args[0])

        return result(value), codegen

    function.__doc__ = doc
    return function


def _to_float(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    if isinstance(x.type, ir.IntType):
        return b.sitofp(x, F32)
    return x if x.type == F32 else b.fptrunc(x, F32)


def _bfloat_to_float(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    bits = b.zext(emit.load(b, address, ir.VectorType(I16, LANES)), VI32)
    return b.bitcast(b.shl(bits, emit.const(VI32, 16)), VF32)


def _byte_to_float(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return b.sitofp(emit.load(b, address, ir.VectorType(I8, LANES)), VF32)


def _widened_pairs(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    bytes_ = emit.load(b, address, ir.VectorType(I8, 2 * LANES))
    return b.bitcast(b.sext(bytes_, ir.VectorType(I16, 2 * LANES)), VI32)


def _pair_to_float(b: ir.IRBuilder, pairs: ir.Value, left: int) -> ir.Value:
    """The low halves of the lanes, if they are shifted left by 16, or the high ones."""
    word = b.ashr(b.shl(pairs, emit.const(VI32, left)), emit.const(VI32, 16))
    return b.sitofp(word, VF32)


def _horizontal_sum(b: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    while vector.type.count > 1:
        n = vector.type.count // 2
        vector = b.fadd(emit.part(b, vector, 0, n), emit.part(b, vector, 1, n))
    return b.extract_element(vector, I32(0))


def _horizontal_max(b: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    while vector.type.count > 1:
        n = vector.type.count // 2
        left, right = emit.part(b, vector, 0, n), emit.part(b, vector, 1, n)
        vector = b.select(b.fcmp_ordered(">", left, right), left, right)
    return b.extract_element(vector, I32(0))


def _exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2, exp(r) by its Taylor series.

    Relative error below 2e-7 (the seventh power's term is 1e-7 at the interval's end). Below -87
    the result is 0, so that what is masked has no weight at all.
    """
    small = b.fcmp_ordered("<", x, emit.const(VF32, -87.0))

    def clamp(x: ir.Value, limit: float, comparison: str) -> ir.Value:
        bound = emit.const(VF32, limit)
        return b.select(b.fcmp_ordered(comparison, x, bound), bound, x)

    x = clamp(clamp(x, -87.0, "<"), 88.0, ">")
    # Adding and taking away 1.5 x 2^23 rounds to the nearest integer, in any vector unit.
    magic = emit.const(VF32, 12582912.0)
    shifted = emit.fma(b, x, emit.const(VF32, 1.4426950408889634), magic)
    n = b.fsub(shifted, magic)
    # ln 2 in two parts, the first with few enough bits that n times it is exact.
    r = emit.fma(b, n, emit.const(VF32, -0.693359375), x)
    r = emit.fma(b, n, emit.const(VF32, 2.12194440054690583e-4), r)
    value = emit.const(VF32, 1 / 5040)
    for factorial in (720, 120, 24, 6, 2, 1, 1):
        value = emit.fma(b, value, r, emit.const(VF32, 1 / factorial))
    exponent = b.shl(b.fptosi(n, VI32), emit.const(VI32, 23))
    value = b.bitcast(b.add(b.bitcast(value, VI32), exponent), VF32)
    return b.select(small, emit.const(VF32, 0.0), value)


load_f32 = _unary(lambda b, a: emit.load(b, a, VF32), F32X16, "16 float32 at an address -> f32x16.")
load_f16 = _unary(emit.half_to_float, F32X16, "16 float16 at an address -> f32x16.")
load_bf16 = _unary(_bfloat_to_float, F32X16, "16 bfloat16 at an address -> f32x16.")
load_i8 = _unary(_byte_to_float, F32X16, "16 int8 at an address -> f32x16.")
load_i16_pairs = _unary(
    lambda b, a: emit.load(b, a, VI32), I32X16, "32 int16 at an address -> i32x16, two in a lane."
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
    lambda b, x: emit.splat(b, _to_float(b, x)),
    F32X16,
    "A number in all 16 lanes.",
)
horizontal_sum = _unary(_horizontal_sum, types.float32, "The sum of 16 lanes, in a fixed order.")
horizontal_max = _unary(_horizontal_max, types.float32, "The largest of 16 lanes.")
sqrt = _unary(
    lambda b, x: emit.call(b, "llvm.sqrt.v16f32", VF32, [x]), F32X16, "The root of each lane."
)
absolute = _unary(
    lambda b, x: emit.call(b, "llvm.fabs.v16f32", VF32, [x]), F32X16, "|x| in each lane."
)
exp = _unary(
    _exp, F32X16, "e^x in each lane, 0 below -87, e^88 above 88; relative error below 2e-7."
)
load_byte = _unary(
    lambda b, a: b.zext(emit.load(b, a, I8), I64), types.int64, "The unsigned byte at an address."
)
load_scalar = _unary(lambda b, a: emit.load(b, a, F32), types.float32, "The float32 at an address.")


@intrinsic
def store_f32(typingctx: Any, address: Any, vector: Any):
    """Stores an f32x16 at an address."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        emit.store(b, args[0], args[1])
        return context.get_dummy_value()

    return types.void(address, vector), codegen


@intrinsic
def store_scalar(typingctx: Any, address: Any, value: Any):
    """Stores a float32 at an address."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        emit.store(b, args[0], _to_float(b, args[1]))
        return context.get_dummy_value()

    return types.void(address, value), codegen


@intrinsic
def store_bf16(typingctx: Any, address: Any, first: Any, second: Any):
    """Stores two f32x16 as 32 bfloat16, rounded to nearest, ties to even; needs AVX-512-BF16."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        emit.store(b, args[0], emit.to_bfloats(b, args[1], args[2]))
        return context.get_dummy_value()

    return types.void(address, first, second), codegen


@intrinsic
def store_bf16_pairs(typingctx: Any, address: Any, first: Any, second: Any):
    """As store_bf16, with the lanes of both side by side: first[0], second[0], first[1], ..."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        emit.store(
            b, args[0], emit.choose_lanes(b, emit.to_bfloats(b, args[1], args[2]), SIDE_BY_SIDE)
        )
        return context.get_dummy_value()

    return types.void(address, first, second), codegen


def _to_integers(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Rounded to nearest, ties to even; |x| below 2^22."""
    magic = emit.const(VF32, 12582912.0)
    return b.fptosi(b.fsub(b.fadd(x, magic), magic), VI32)


@intrinsic
def round_run(typingctx: Any, address: Any, first: Any, second: Any):
    """Stores two f32x16 (|x| <= 127) as 32 int8, rounded, ties to even; their sum, int32."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        address, *vectors = args
        first, second = (_to_integers(b, vector) for vector in vectors)
        codes = b.trunc(emit.concat(b, [first, second]), ir.VectorType(I8, 2 * LANES))
        emit.store(b, address, codes)
        total = b.add(first, second)
        while total.type.count > 1:
            n = total.type.count // 2
            total = b.add(emit.part(b, total, 0, n), emit.part(b, total, 1, n))
        return b.extract_element(total, I32(0))

    return types.int32(address, first, second), codegen


def _store_rounded(lane: ir.Type, doc: str) -> Any:
    @intrinsic
    def function(typingctx: Any, address: Any, step: Any, stride: Any, vector: Any):
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            address, step, stride, vector = args
            lanes = b.trunc(_to_integers(b, vector), ir.VectorType(lane, LANES))
            for i in range(LANES):
                offset = b.add(b.mul(stride, I64(i // 2)), b.mul(step, I64(i % 2)))
                emit.store(b, b.add(address, offset), b.extract_element(lanes, I32(i)))
            return context.get_dummy_value()

        return types.void(address, step, stride, vector), codegen

    function.__doc__ = doc
    return function


store_i8 = _store_rounded(
    I8,
    """Stores an f32x16 (|x| <= 127) as int8, rounded, ties to even.

    Of the lanes 0, 2, 4, ... each is stored `stride` bytes after the one before, and the lanes 1,
    3, 5, ... `step` bytes after these. Strides that are known to leave no gap make it one store.
    """,
)
store_i16 = _store_rounded(I16, "As store_i8, to int16 (|x| <= 32,767).")


@intrinsic
def fma(typingctx: Any, x: Any, y: Any, z: Any):
    """x y + z, for f32x16; one rounding where the CPU has the instruction."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return emit.fma(b, *args)

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
            pointer = b.inttoptr(args[0], I8.as_pointer())
            function_type = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
            function = cgutils.get_or_insert_function(b.module, function_type, "llvm.prefetch.p0")
            b.call(function, [pointer, I32(0), I32(locality), I32(1)])
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
        return b.ptrtoint(struct.data, I64)

    return types.int64(array), codegen


def _operator(symbol: Callable[..., Any], instruction: str) -> None:
    """Gives f32x16 one of Python's operators."""

    @infer_global(symbol)
    class Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            return signature(F32X16, *args) if args == (F32X16, F32X16) else None

    @lower_builtin(symbol, F32X16, F32X16)
    def lower(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return getattr(b, instruction)(*args)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
_operator(operator.truediv, "fdiv")
