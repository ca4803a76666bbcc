"""What the integer products become on CPUs that need not be this one.

    python lowered.py neon

prints the assembly of every product for a CPU with that instruction set, after running the same
LLVM code here, with that set's instructions (`_MEANINGS`) spelled out, and comparing the results
with the twins'. A process of its own, because the runtime chooses its instruction set when it is
first imported.
"""

import ctypes
import sys
from collections.abc import Callable

import llvmlite.binding as llvm
import numpy as np
import twins
from llvmlite import ir
from numpy.typing import NDArray

# For each instruction set: target triple, CPU, features beyond that CPU's, and what LLVM calls the
# features of such a CPU.
TARGETS = {
    "avx512vnni": (
        "x86_64-unknown-linux-gnu",
        "sapphirerapids",
        "",
        ("avx2", "fma", "f16c", "avx512vnni", "avx512bw", "avx512vl"),
    ),
    "avxvnni": ("x86_64-unknown-linux-gnu", "alderlake", "", ("avx2", "fma", "f16c", "avxvnni")),
    "avx2": ("x86_64-unknown-linux-gnu", "haswell", "", ("avx2", "fma", "f16c")),
    "neon": ("aarch64-unknown-linux-gnu", "generic", "+dotprod", ("dotprod",)),
    "plain": ("x86_64-unknown-linux-gnu", "x86-64", "", ()),
}

TOKENS = 4
RUNS = {"int4": 256, "codebook": 256, "int8": 512}  # bytes of 16 rows' codes of 32 inputs
CODEBOOK = (-128, -100, -77, -60, -43, -31, -20, -9, 0, 12, 24, 37, 53, 69, 90, 127)


def pretend_cpu(name: str) -> None:
    """Makes the runtime, which is not imported yet, see a CPU with that instruction set."""
    features = llvm.FeatureMap(dict.fromkeys(TARGETS[name][3], True))
    llvm.get_host_cpu_features = lambda: features
    from gemma_cli.runtime import isa  # noqa: PLC0415

    assert name == isa.NAME


def build_module(kind: str, define: Callable[[ir.Module], None] | None = None) -> ir.Module:
    """A module with `products(w, levels, x, offsets, out)`, all addresses, for TOKENS tokens."""
    from numba import types  # noqa: PLC0415

    from gemma_cli.runtime import vector  # noqa: PLC0415

    module, i64 = ir.Module(), ir.IntType(64)
    if define:
        define(module)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64] * 5), "products")
    b = ir.IRBuilder(function.append_basic_block())
    w, levels, x, offsets, out = function.args
    args = [w, x, i64(32), offsets, i64(4), i64(TOKENS)]
    intrinsic = {"int4": vector.dots_int4, "int8": vector.dots_int8}.get(kind)
    if intrinsic is None:
        intrinsic = vector.dots_codebook
        args.insert(1, levels)
    argument_types = [types.int64] * (len(args) - 1) + [types.literal(TOKENS)]
    signature, codegen = intrinsic._defn(None, *argument_types)
    result = codegen(None, b, signature, args)
    for t in range(TOKENS):
        rows = b.extract_value(result, t)
        b.store(rows, b.inttoptr(b.add(out, i64(64 * t)), rows.type.as_pointer()), align=1)
    b.ret_void()
    return module


def compile_for(name: str, module: ir.Module) -> str:
    """Assembly for a CPU of TARGETS."""
    triple, cpu, features, _ = TARGETS[name]
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=3
    )
    parsed = llvm.parse_assembly(str(module))
    parsed.triple, parsed.data_layout = triple, str(machine.target_data)
    parsed.verify()
    optimize(parsed, machine)
    return str(machine.emit_assembly(parsed))


def optimize(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(3))
    builder.getModulePassManager().run(module, builder)


# What the instructions mean, by the manuals of Intel and Arm: an LLVM function each.

Meaning = tuple[ir.FunctionType, Callable[..., ir.Value]]

_I8, _I16, _I32 = (ir.IntType(bits) for bits in (8, 16, 32))


def _constant(vector_type: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(vector_type, [value] * vector_type.count)


def _every(b: ir.IRBuilder, vector: ir.Value, first: int, step: int) -> ir.Value:
    indices = list(range(first, vector.type.count, step))
    mask = ir.Constant(ir.VectorType(_I32, len(indices)), indices)
    return b.shuffle_vector(vector, vector, mask)


def _dot4(b: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value, signed: bool) -> ir.Value:
    """acc[i] + sum over j of w[4 i + j] x[4 i + j] of bytes; w signed or unsigned, x signed."""
    n = acc.type.count
    w, x = (b.bitcast(v, ir.VectorType(_I8, 4 * n)) for v in (w, x))
    wide = ir.VectorType(_I32, 4 * n)
    products = b.mul((b.sext if signed else b.zext)(w, wide), b.sext(x, wide))
    for j in range(4):
        acc = b.add(acc, _every(b, products, j, 4))
    return acc


def _pairs(b: ir.IRBuilder, products: ir.Value) -> ir.Value:
    return b.add(_every(b, products, 0, 2), _every(b, products, 1, 2))


def _vpmaddubsw(b: ir.IRBuilder, w: ir.Value, x: ir.Value) -> ir.Value:
    wide = ir.VectorType(_I32, w.type.count)
    sums = _pairs(b, b.mul(b.zext(w, wide), b.sext(x, wide)))
    for comparison, limit in (("<", -32768), (">", 32767)):  # it saturates
        bound = _constant(sums.type, limit)
        sums = b.select(b.icmp_signed(comparison, sums, bound), bound, sums)
    return b.trunc(sums, ir.VectorType(_I16, sums.type.count))


def _vpmaddwd(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    wide = ir.VectorType(_I32, x.type.count)
    return _pairs(b, b.mul(b.sext(x, wide), b.sext(y, wide)))


def _vpsignb(b: ir.IRBuilder, x: ir.Value, sign: ir.Value) -> ir.Value:
    zero = _constant(x.type, 0)
    moved = b.select(b.icmp_signed("<", sign, zero), b.sub(zero, x), x)
    return b.select(b.icmp_signed("==", sign, zero), zero, moved)


def _lookup(b: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
    """table[code & 15] in each 16 bytes, or 0 where the code's highest bit is set."""
    found = codes
    for lane in range(codes.type.count):
        code = b.extract_element(codes, _I32(lane))
        index = b.add(b.zext(b.and_(code, _I8(15)), _I32), _I32(lane // 16 * 16))
        level = b.extract_element(table, index)
        level = b.select(b.icmp_signed("<", code, _I8(0)), _I8(0), level)
        found = b.insert_element(found, level, _I32(lane))
    return found


def _vector(lane: ir.IntType, bits: int) -> ir.VectorType:
    return ir.VectorType(lane, bits // lane.width)


def _dot_meaning(bits: int, lane: ir.IntType, signed: bool) -> Meaning:
    ints, operand = _vector(_I32, bits), _vector(lane, bits)
    return (
        ir.FunctionType(ints, [ints, operand, operand]),
        lambda b, acc, w, x: _dot4(b, acc, w, x, signed),
    )


def _function(result: ir.Type, *arguments: ir.Type) -> ir.FunctionType:
    return ir.FunctionType(result, arguments)


_BYTES = {bits: _vector(_I8, bits) for bits in (128, 256, 512)}
_WORDS = _vector(_I16, 256)

_MEANINGS = {
    "llvm.x86.avx512.vpdpbusd.512": _dot_meaning(512, _I32, signed=False),
    "llvm.x86.avx512.vpdpbusd.256": _dot_meaning(256, _I32, signed=False),
    "llvm.aarch64.neon.sdot.v4i32.v16i8": _dot_meaning(128, _I8, signed=True),
    "llvm.x86.avx2.pmadd.ub.sw": (_function(_WORDS, _BYTES[256], _BYTES[256]), _vpmaddubsw),
    "llvm.x86.avx2.pmadd.wd": (_function(_vector(_I32, 256), _WORDS, _WORDS), _vpmaddwd),
    "llvm.x86.avx2.psign.b": (_function(*[_BYTES[256]] * 3), _vpsignb),
    "llvm.x86.avx512.pshuf.b.512": (_function(*[_BYTES[512]] * 3), _lookup),
    "llvm.x86.avx2.pshuf.b": (_function(*[_BYTES[256]] * 3), _lookup),
    "llvm.aarch64.neon.tbl1.v16i8": (_function(*[_BYTES[128]] * 3), _lookup),
}


def define_meanings(module: ir.Module) -> None:
    for name, (function_type, emit) in _MEANINGS.items():
        function = ir.Function(module, function_type, name)
        function.linkage = "internal"
        b = ir.IRBuilder(function.append_basic_block())
        b.ret(emit(b, *function.args))


def load(module: ir.Module) -> tuple[object, Callable[..., None]]:
    """Machine code of this CPU, with its owner, which must outlive it."""
    text = str(module)
    for family in ("x86", "aarch64"):  # the names of instructions are LLVM's alone to define
        text = text.replace(f"llvm.{family}.", f"meaning.{family}.")
    parsed = llvm.parse_assembly(text)
    parsed.verify()
    machine = llvm.Target.from_default_triple().create_target_machine()
    optimize(parsed, machine)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    address = engine.get_function_address("products")
    return engine, ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(address)


def random_codes(rng: np.random.Generator, fmt: str) -> NDArray[np.uint8] | NDArray[np.int8]:
    """16 rows of 32 codes; some of the rows are the extremes."""
    low, high, dtype = (0, 15, np.uint8) if fmt == "int4" else (-128, 127, np.int8)
    codes = rng.integers(low, high + 1, (16, 32)).astype(dtype)
    codes[0], codes[1] = low, high
    codes[2, ::2], codes[2, 1::2] = low, high
    return codes


def compare(kind: str) -> None:
    """Raises AssertionError where a product is not the twin's."""
    engine, products = load(build_module(kind, define_meanings))
    rng = np.random.default_rng(1)
    fmt = "int8" if kind == "int8" else "int4"
    codebook = CODEBOOK if kind == "codebook" else tuple(range(-8, 8))
    levels = (np.array(codebook) + 128).astype(np.uint8)
    for _ in range(20):
        m = twins.coded(fmt, random_codes(rng, fmt), np.ones((16, 1), np.float16), codebook)
        w = np.ascontiguousarray(m.tiles[0, -RUNS[kind] :])
        x = rng.integers(-127, 128, (TOKENS, 32)).astype(np.int8)
        x[0], x[1] = 127, -127
        x[2, ::2], x[2, 1::2] = 127, -127
        offsets, out = -128 * x.sum(1, dtype=np.int32), np.empty((TOKENS, 16), np.int32)
        products(*(array.ctypes.data for array in (w, levels, x, offsets, out)))
        np.testing.assert_array_equal(out, twins.dots(m.levels, x)[..., 0])
    del engine


def main(name: str) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    pretend_cpu(name)
    for kind in RUNS:
        compare(kind)
        print(f"# {kind}")
        print(compile_for(name, build_module(kind)))


if __name__ == "__main__":
    main(sys.argv[1])
