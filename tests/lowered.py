"""What the integer products become on CPUs that need not be this one.

    python lowered.py neon

prints the assembly of every product, and of every expansion of codes, for a CPU with that
instruction set, after running the same LLVM code here, with that set's instructions (`_MEANINGS`)
spelled out, and comparing the results with the twins'. A process of its own, because the runtime
chooses its instruction set when it is first imported.
"""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import llvmlite.binding as llvm
import numpy as np
import twins
from llvmlite import ir
from numpy.typing import NDArray

from quantize import packing
from quantize.packing import LINEAR_LEVELS

# For each instruction set: target triple, CPU, features beyond that CPU's, and what LLVM calls the
# features of such a CPU.
_VNNI512 = ("avx2", "fma", "f16c", "avx512vnni", "avx512bw", "avx512vl")
TARGETS = {
    "amx": ("x86_64-unknown-linux-gnu", "sapphirerapids", "", _VNNI512),  # without permission
    "zen4": ("x86_64-unknown-linux-gnu", "znver4", "", _VNNI512),
    "avx512vnni": ("x86_64-unknown-linux-gnu", "sapphirerapids", "", _VNNI512),
    "avxvnni": ("x86_64-unknown-linux-gnu", "alderlake", "", ("avx2", "fma", "f16c", "avxvnni")),
    "avx2": ("x86_64-unknown-linux-gnu", "haswell", "", ("avx2", "fma", "f16c")),
    "i8mm": ("aarch64-unknown-linux-gnu", "generic", "+dotprod,+i8mm", ("dotprod", "i8mm")),
    "neon": ("aarch64-unknown-linux-gnu", "generic", "+dotprod", ("dotprod",)),
    "plain": ("x86_64-unknown-linux-gnu", "x86-64", "", ()),
}

TOKENS = 4
CASES = 20
CODEBOOK = (-128, -100, -77, -60, -43, -31, -20, -9, 0, 12, 24, 37, 53, 69, 90, 127)

_PAIRS = 8

CASE = np.dtype(
    [
        ("w", np.uint8, 512),  # 16 rows' codes of 32 inputs, in planes one after the other
        ("levels", np.uint8, 16),
        ("x", np.int8, (8, TOKENS, 4)),
        ("offsets", np.int32, TOKENS),
        ("pairs", np.int16, (_PAIRS, 16, 2)),  # of 16 rows
        ("factors", np.int16, (TOKENS, _PAIRS, 2)),
    ]
)
"""What a product reads."""

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))

# What the intrinsics want of Numba: a value for those that give none.
_CONTEXT = SimpleNamespace(get_dummy_value=lambda: None)

Emit = Callable[[ir.IRBuilder, ir.Value, ir.Value], None]
"""Emits the body of a function of two addresses: of a case, and of its result."""


def pretend_cpu(name: str) -> None:
    """Makes the runtime, which is not imported yet, see a CPU with that instruction set."""
    features = llvm.FeatureMap(dict.fromkeys(TARGETS[name][3], True))
    llvm.get_host_cpu_features = lambda: features
    llvm.get_host_cpu_name = lambda: TARGETS[name][1]
    # What Numba itself compiles here need not know more of this CPU.
    os.environ["NUMBA_CPU_NAME"] = "generic"
    with patch("platform.machine", lambda: "pretended"):
        isa = import_isa()
    if name == "amx":
        use_amx(isa)
    assert name == isa.NAME
    isa.MACHINE = "arm" if TARGETS[name][0].startswith("aarch64") else "x86"


def import_isa() -> Any:
    """The module that chooses, before the rest of the runtime asks it while it is imported."""
    name = "gemma_cli.runtime.isa"
    path = Path(__file__).parent.parent / "gemma_cli" / "runtime" / "isa.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    assert name not in sys.modules
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def use_amx(isa: Any) -> None:
    """Has the runtime use AMX, whether it may or not."""
    isa.NAME, isa.AMX, isa.ZEN4, isa.AVX512 = "amx", True, False, True


def call(b: ir.IRBuilder, intrinsic: Any, *args: ir.Value | int) -> ir.Value:
    """What an intrinsic of vector.py emits; an int is a constant that it has to know."""
    from numba import types  # noqa: PLC0415

    from gemma_cli.runtime import vector  # noqa: PLC0415

    def numba_type(value: ir.Value | int) -> Any:
        if isinstance(value, int):
            return types.literal(value)
        if isinstance(value.type, ir.ArrayType):
            return types.UniTuple(element_type(value.type.element), value.type.count)
        return element_type(value.type)

    def element_type(ir_type: ir.Type) -> Any:
        if not isinstance(ir_type, ir.VectorType):
            return types.int64
        return vector.F32X16 if ir_type == vector.F32X16.ir_type else vector.I32X16

    signature, codegen = intrinsic._defn(None, *map(numba_type, args))
    values = [_I64(value) if isinstance(value, int) else value for value in args]
    return codegen(_CONTEXT, b, signature, values)


def store(b: ir.IRBuilder, address: ir.Value, offset: int, value: ir.Value) -> None:
    pointer = b.inttoptr(b.add(address, _I64(offset)), value.type.as_pointer())
    b.store(value, pointer, align=1)


def integer_functions() -> dict[str, Emit]:
    """The integer products, and what prepares codes for them."""
    from gemma_cli.runtime import codes, vector  # noqa: PLC0415

    offset = {name: field[1] for name, field in CASE.fields.items()}

    def read(b: ir.IRBuilder, case: ir.Value, names: tuple[str, ...]) -> list[ir.Value]:
        return [others(b, case) if n == "others" else at(b, case, offset[n]) for n in names]

    def at(b: ir.IRBuilder, case: ir.Value, n_bytes: int) -> ir.Value:
        return b.add(case, _I64(n_bytes))

    def others(b: ir.IRBuilder, case: ir.Value) -> ir.Value:
        addresses = ir.Constant(ir.ArrayType(_I64, 3), ir.Undefined)
        for i, bits in enumerate(accumulate(packing.PLANE_BITS[:3])):
            addresses = b.insert_value(addresses, at(b, case, offset["w"] + 64 * bits), i)
        return addresses

    def dots(intrinsic: Any, *weights: str) -> Emit:
        def emit(b: ir.IRBuilder, case: ir.Value, out: ir.Value) -> None:
            names = (*weights, "x", "offsets")
            result = call(b, intrinsic, *read(b, case, names), TOKENS, TOKENS)
            for t in range(TOKENS):
                store(b, out, 64 * t, b.extract_value(result, t))

        return emit

    def expand(intrinsic: Any, *weights: str) -> Emit:
        return lambda b, case, out: call(b, intrinsic, *read(b, case, weights), out)

    def dots_pairs(b: ir.IRBuilder, case: ir.Value, out: ir.Value) -> None:
        """As attention does it: keys of 16 positions by the queries of TOKENS tokens."""
        acc = call(b, vector.integer_zeros, TOKENS)
        pairs, factors = read(b, case, ("pairs", "factors"))
        for i in range(_PAIRS):
            w = call(b, vector.load_i16_pairs, b.add(pairs, _I64(64 * i)))
            acc = call(b, vector.add_pairs, acc, w, b.add(factors, _I64(4 * i)), _I64(4 * _PAIRS))
        for t in range(TOKENS):
            store(b, out, 64 * t, b.extract_value(acc, t))

    return {
        "dots_int4": dots(codes.dots_int4, "w", "w"),
        "dots_codebook": dots(codes.dots_codebook, "w", "levels"),
        "dots_int8": dots(codes.dots_int8, "w", "w"),
        "dots_planes": dots(codes.dots_planes, "w", "others"),
        "dots_one_plane": dots(codes.dots_one_plane, "w", "others"),
        "dots_two_planes": dots(codes.dots_two_planes, "w", "others"),
        "dots_three_planes": dots(codes.dots_three_planes, "w", "others"),
        "dots_expanded": dots(codes.dots_expanded, "w", "w"),
        "dots_pairs": dots_pairs,
        "expand_int4": expand(codes.expand_int4, "w", "levels"),
        "expand_codebook": expand(codes.expand_codebook, "w", "levels"),
        "expand_int8": expand(codes.expand_int8, "w", "levels"),
        "expand_planes": expand(codes.expand_planes, "w", "others"),
    }


def build_module(
    functions: dict[str, Emit], define: Callable[[ir.Module], None] | None = None
) -> ir.Module:
    """A module with these functions, each named `run_` and its key."""
    module = ir.Module()
    if define:
        define(module)
    for name, emit in functions.items():
        function_type = ir.FunctionType(ir.VoidType(), [_I64, _I64])
        function = ir.Function(module, function_type, f"run_{name}")
        b = ir.IRBuilder(function.append_basic_block())
        emit(b, *function.args)
        b.ret_void()
    return module


def lower(
    name: str, module: ir.Module, others: Sequence[llvm.ModuleRef] = ()
) -> tuple[llvm.TargetMachine, llvm.ModuleRef]:
    """The modules as one, optimized for a CPU of TARGETS, and what makes that CPU's code of it."""
    triple, cpu, features, _ = TARGETS[name]
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=3
    )
    first, *rest = (llvm.parse_assembly(str(part)) for part in (module, *others))
    for part in (first, *rest):
        part.triple, part.data_layout = triple, str(machine.target_data)
    for part in rest:
        first.link_in(part)
    first.verify()
    optimize(first, machine)
    return machine, first


def optimize(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(3))
    passes = builder.getModulePassManager()
    passes.add_refprune_pass()
    passes.run(module, builder)


# What the instructions mean, by the manuals of Intel and Arm: an LLVM function each.

Meaning = tuple[ir.FunctionType, Callable[..., ir.Value]]


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


def _dot2(b: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    """acc[i] + w[2 i] x[2 i] + w[2 i + 1] x[2 i + 1] of signed words."""
    words = ir.VectorType(_I16, 2 * acc.type.count)
    return b.add(acc, _vpmaddwd(b, b.bitcast(w, words), b.bitcast(x, words)))


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
    "llvm.x86.avx512.vpdpwssd.512": (_function(*[_vector(_I32, 512)] * 4), _dot2),
    "llvm.x86.avx512.vpdpwssd.256": (_function(*[_vector(_I32, 256)] * 4), _dot2),
    "llvm.aarch64.neon.sdot.v4i32.v16i8": _dot_meaning(128, _I8, signed=True),
    "llvm.aarch64.neon.usdot.v4i32.v16i8": _dot_meaning(128, _I8, signed=False),
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


def load(module: ir.Module) -> llvm.ExecutionEngine:
    """Machine code of this CPU."""
    text = str(module)
    for family in ("x86", "aarch64"):  # the names of instructions are LLVM's alone to define
        text = text.replace(f"llvm.{family}.", f"meaning.{family}.")
    parsed = llvm.parse_assembly(text)
    parsed.verify()
    machine = llvm.Target.from_default_triple().create_target_machine()
    optimize(parsed, machine)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine


def random_codes(rng: np.random.Generator, small: bool) -> NDArray[np.uint8] | NDArray[np.int8]:
    """16 rows of 32 codes; some of the rows are the extremes."""
    low, high, dtype = (0, 15, np.uint8) if small else (-128, 127, np.int8)
    codes = rng.integers(low, high + 1, (16, 32)).astype(dtype)
    codes[0], codes[1] = low, high
    codes[2, ::2], codes[2, 1::2] = low, high
    return codes


def tile(fmt: str, codes: NDArray[np.uint8] | NDArray[np.int8]) -> NDArray[np.uint8]:
    """A tile of 16 rows of 32 codes, without its scales."""
    scales = np.ones((16, 1), np.float16)
    return packing.pack_codes(fmt, codes, scales)[0, 2 * packing.TILE_ROWS :]


def byte_tile(values: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Numbers from 0 to 255, laid out as int8's tiles are."""
    return tile("int8", (values.astype(np.int64) - 128).astype(np.int8))


def examples(function: str) -> tuple[NDArray[np.void], NDArray[np.int32] | NDArray[np.uint8]]:
    """Cases for one of integer_functions, and what the twins make of them."""
    from gemma_cli.runtime.codes import EXPANDED_ZERO  # noqa: PLC0415

    rng = np.random.default_rng(1)
    if function == "dots_pairs":
        return pair_examples(rng)
    task, form = function.split("_", 1)
    small = form in ("int4", "codebook", "expanded")
    unread = {"one_plane": 6, "two_planes": 5, "three_planes": 4}.get(form, 0)
    codebook = np.array(CODEBOOK if form == "codebook" else LINEAR_LEVELS)
    cases, results = np.zeros(CASES, CASE), []
    for case in cases:
        codes = random_codes(rng, small)
        levels = codebook[codes] if small else codes.astype(np.int64)
        expanded = byte_tile(levels + (EXPANDED_ZERO if form in ("int4", "expanded") else 128))
        fmt = "int8_planes" if "plane" in form else "int4" if form == "codebook" else form
        w = tile(fmt, codes) if form != "expanded" else expanded
        case["w"][: w.size] = w
        case["levels"] = codebook + 128
        x = rng.integers(-127, 128, (TOKENS, 32), np.int8)
        x[0], x[1] = 127, -127
        x[2, ::2], x[2, 1::2] = 127, -127
        case["x"] = x.reshape(TOKENS, 8, 4).swapaxes(0, 1)
        case["offsets"] = -128 * x.sum(1, dtype=np.int32)
        if unread:
            dots = twins.dots(levels + 128 >> unread, x)[..., 0]
            results.append((dots + case["offsets"][:, None]).astype(np.int32))
        elif task == "dots":
            results.append(twins.dots(levels, x)[..., 0].astype(np.int32))
        else:
            results.append(expanded)
    return cases, np.array(results)


def pair_examples(rng: np.random.Generator) -> tuple[NDArray[np.void], NDArray[np.int32]]:
    """Words of up to 15 bits, so that no sum overflows; the first ones as large as they may be."""
    cases = np.zeros(CASES, CASE)
    for name in ("pairs", "factors"):
        cases[name] = rng.integers(-(1 << 13), 1 << 13, cases[name].shape)
    cases["pairs"][0, 1:] = cases["factors"][0, :, 1:] = 0
    cases["pairs"][0, 0, :, 0], cases["factors"][0, :, 0, 0] = 32767, -32767
    pairs, factors = (cases[name].astype(np.int64) for name in ("pairs", "factors"))
    return cases, np.einsum("cirj,ctij->ctr", pairs, factors).astype(np.int32)


def compare(name: str, emit: Emit) -> None:
    """Raises AssertionError where one of integer_functions does not give what its twin does."""
    engine = load(build_module({name: emit}, define_meanings))
    address = engine.get_function_address(f"run_{name}")
    run = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(address)
    cases, expected = examples(name)
    out = np.empty_like(expected)
    for i in range(CASES):
        run(cases[i:].ctypes.data, out[i:].ctypes.data)
    np.testing.assert_array_equal(out, expected)


def main(name: str) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    pretend_cpu(name)
    for function, emit in integer_functions().items():
        compare(function, emit)
        machine, module = lower(name, build_module({function: emit}))
        print(f"# {function}")
        print(machine.emit_assembly(module))


if __name__ == "__main__":
    main(sys.argv[1])
