"""What intrinsics emit: LLVM's instructions for vectors of 16 lanes.

Each function takes the IR builder first and gives a value. LLVM cuts vectors into registers of
whatever width the CPU has.
"""

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba.core import cgutils

from gemma_cli.runtime import isa

LANES = 16

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32, HALF = ir.FloatType(), ir.HalfType()
VF32, VI32 = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
VI8 = ir.VectorType(I8, 4 * LANES)


def call(b: ir.IRBuilder, name: str, ret: ir.Type, args: Sequence[ir.Value]) -> ir.Value:
    function_type = ir.FunctionType(ret, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, function_type, name), args)


def splat(b: ir.IRBuilder, scalar: ir.Value, n: int = LANES) -> ir.Value:
    vector = ir.Constant(ir.VectorType(scalar.type, n), ir.Undefined)
    vector = b.insert_element(vector, scalar, I32(0))
    return b.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, n), [0] * n))


def const(vector_type: ir.VectorType, value: float | Sequence[int]) -> ir.Constant:
    lanes = list(value) if isinstance(value, Sequence) else [value] * vector_type.count
    return ir.Constant(vector_type, lanes)


def load(b: ir.IRBuilder, address: ir.Value, ir_type: ir.Type, align: int = 1) -> ir.Value:
    return b.load(b.inttoptr(address, ir_type.as_pointer()), align=align)


def store(b: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


def offset(b: ir.IRBuilder, address: ir.Value, n_bytes: int) -> ir.Value:
    return b.add(address, I64(n_bytes)) if n_bytes else address


def part(b: ir.IRBuilder, vector: ir.Value, k: int, n: int) -> ir.Value:
    """Lanes k n to (k + 1) n of a vector."""
    mask = const(ir.VectorType(I32, n), list(range(k * n, (k + 1) * n)))
    return b.shuffle_vector(vector, vector, mask)


def concat(b: ir.IRBuilder, parts: Sequence[ir.Value]) -> ir.Value:
    parts = list(parts)
    while len(parts) > 1:
        n = parts[0].type.count
        mask = const(ir.VectorType(I32, 2 * n), list(range(2 * n)))
        parts = [b.shuffle_vector(parts[i], parts[i + 1], mask) for i in range(0, len(parts), 2)]
    return parts[0]


def by_part(b: ir.IRBuilder, n: int, emit: Callable[..., ir.Value], *vectors: ir.Value) -> ir.Value:
    """Applies an instruction for n parts of a vector to a vector n times as wide."""
    split = [[part(b, v, k, v.type.count // n) for v in vectors] for k in range(n)]
    return concat(b, [emit(*parts) for parts in split])


def choose_lanes(b: ir.IRBuilder, vector: ir.Value, lanes: Sequence[int]) -> ir.Value:
    return b.shuffle_vector(vector, vector, const(ir.VectorType(I32, len(lanes)), lanes))


def half_to_float(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    if isa.NAME != "plain":
        return b.fpext(load(b, address, ir.VectorType(HALF, LANES)), VF32)
    # Without a conversion instruction: move exponent and fraction into place, then correct the
    # exponent's bias by a multiplication, which also makes the subnormal halves right.
    bits = b.zext(load(b, address, ir.VectorType(I16, LANES)), VI32)
    magnitude = b.shl(b.and_(bits, const(VI32, 0x7FFF)), const(VI32, 13))
    sign = b.shl(b.and_(bits, const(VI32, 0x8000)), const(VI32, 16))
    value = b.bitcast(b.fmul(b.bitcast(magnitude, VF32), const(VF32, 2.0**112)), VI32)
    # Infinities and what is no number have the largest exponent, here as there.
    endless = b.icmp_unsigned(">=", magnitude, const(VI32, 0x7C00 << 13))
    value = b.select(endless, b.or_(magnitude, const(VI32, 0x7F800000)), value)
    return b.bitcast(b.or_(value, sign), VF32)


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return call(b, "llvm.fmuladd.v16f32", VF32, [x, y, z])


def maddwd(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return call(b, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), [x, y])


def to_bfloats(b: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    """Two vectors to 32 bfloat16, rounded to nearest, ties to even."""
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    return call(b, name, ir.VectorType(I16, 2 * LANES), [second, first])


SIDE_BY_SIDE = [LANES * (i % 2) + i // 2 for i in range(2 * LANES)]
"""Lanes of two vectors, so that those with the same number become neighbours."""
