"""What ARM CPUs make of the kernels, on a machine that need not be one.

    python emulated.py neon /tmp/folder

compiles LLVM code for an aarch64 CPU with that instruction set, runs it under qemu on examples and
compares the results with the twins' and NumPy's: that of the integer products and of some other
building blocks by themselves, and that of whole kernels (`emulated_kernels.py`). A process of its
own for the reason that `lowered.py`, which spells the instructions out instead, gives.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import lowered
import numpy as np
from llvmlite import ir
from lowered import Emit, call, store
from numpy.typing import NDArray

COMPILER = "aarch64-linux-gnu-gcc"
EMULATOR = "qemu-aarch64"

Array = NDArray[Any]

_I64 = ir.IntType(64)
_ROUNDED = np.dtype([("codes", np.int8, 32), ("sum", np.int32)])


@dataclass(frozen=True)
class Block:
    """A function, cases for it, and what is wrong with results: an AssertionError."""

    emit: Emit
    cases: Array
    results: np.dtype[Any]  # of one case
    check: Callable[[Array, Array], None]  # takes the cases and their results


def integer_block(name: str, emit: Emit) -> Block:
    cases, expected = lowered.examples(name)
    results = np.dtype((expected.dtype, expected.shape[1:]))
    return Block(emit, cases, results, lambda _, out: np.testing.assert_array_equal(out, expected))


def float_blocks() -> dict[str, Block]:
    """What conversions, sums, roots and exponentials are made of."""
    from gemma_cli.runtime import vector  # noqa: PLC0415

    def load_f16(b: ir.IRBuilder, case: ir.Value, out: ir.Value) -> None:
        store(b, out, 0, call(b, vector.load_f16, case))

    def round_run(b: ir.IRBuilder, case: ir.Value, out: ir.Value) -> None:
        vectors = (call(b, vector.load_f32, b.add(case, _I64(64 * half))) for half in range(2))
        total = call(b, vector.round_run, out, *vectors)
        store(b, out, _ROUNDED.fields["sum"][1], total)

    def store_rounded(store_lanes: Any, size: int) -> Emit:
        return lambda b, case, out: call(
            b, store_lanes, out, _I64(size), _I64(2 * size), call(b, vector.load_f32, case)
        )

    def unary(intrinsic: Any) -> Emit:
        return lambda b, case, out: store(
            b, out, 0, call(b, intrinsic, call(b, vector.load_f32, case))
        )

    def load_pairs(load: Any) -> Emit:
        """Both halves of the pairs, as floats."""

        def emit(b: ir.IRBuilder, case: ir.Value, out: ir.Value) -> None:
            pairs = call(b, load, case)
            for half, of in enumerate((vector.first_of_pairs, vector.second_of_pairs)):
                store(b, out, 64 * half, call(b, of, pairs))

        return emit

    float32, int8, int16 = (np.dtype((lane, 16)) for lane in (np.float32, np.int8, np.int16))
    bytes_, words = between_integers(127), between_integers(32767)
    halves = np.dtype((np.float32, (2, 16)))
    rng = np.random.default_rng(2)
    positive = np.abs(rng.standard_normal(1600)) * 10.0 ** rng.integers(-38, 38, 1600)
    return {
        "load_f16": Block(load_f16, rows(every_half()), float32, check_load_f16),
        "load_i16_pairs": Block(
            load_pairs(vector.load_i16_pairs), rows(every_word(), 32), halves, check_pairs
        ),
        "load_i8_pairs": Block(
            load_pairs(vector.load_i8_pairs), rows(every_byte(), 32), halves, check_pairs
        ),
        "round_run": Block(round_run, rows(bytes_, 32), _ROUNDED, check_round_run),
        "store_i8": Block(store_rounded(vector.store_i8, 1), rows(bytes_), int8, check_rounded),
        "store_i16": Block(store_rounded(vector.store_i16, 2), rows(words), int16, check_rounded),
        "sqrt": Block(unary(vector.sqrt), rows(positive.astype(np.float32)), float32, check_sqrt),
        "exp": Block(unary(vector.exp), rows(exponents()), float32, check_exp),
    }


def rows(values: Array, width: int = 16) -> Array:
    """Values in rows of that width, the last of them as often as it takes."""
    return np.pad(values, (0, -len(values) % width), mode="edge").reshape(-1, width)


def every_half() -> Array:
    return np.arange(2**16).astype(np.uint16).view(np.float16)


def every_word() -> Array:
    return np.arange(2**16).astype(np.uint16).view(np.int16)


def every_byte() -> Array:
    return np.arange(2**8).astype(np.uint8).view(np.int8)


def between_integers(largest: int) -> Array:
    """Every midpoint of two integers, what is just beside it, and the integers."""
    middle = np.arange(-largest, largest).astype(np.float32) + np.float32(0.5)
    beside = [np.nextafter(middle, np.float32(limit)) for limit in (-np.inf, np.inf)]
    integers = np.arange(-largest, largest + 1).astype(np.float32)
    values = np.concatenate([middle, *beside, integers, integers * np.float32(1e-3)])
    return np.random.default_rng(3).permutation(values)


def exponents() -> Array:
    near = np.linspace(-1, 1, 1001)
    edges = [-np.inf, -1e30, -87.0001, -87.0, 88.0, 89.0, 1e30, 0.0, -0.0]
    return np.concatenate([near, np.linspace(-90, 90, 5001), edges]).astype(np.float32)


def check_load_f16(cases: Array, out: Array) -> None:
    with np.errstate(invalid="ignore"):  # Some of the NaNs signal.
        np.testing.assert_array_equal(out, cases.astype(np.float32))


def check_pairs(cases: Array, out: Array) -> None:
    np.testing.assert_array_equal(out, cases.reshape(-1, 16, 2).transpose(0, 2, 1))


def check_rounded(cases: Array, out: Array) -> None:
    np.testing.assert_array_equal(out, np.rint(cases))


def check_round_run(cases: Array, out: Array) -> None:
    np.testing.assert_array_equal(out["codes"], np.rint(cases))
    np.testing.assert_array_equal(out["sum"], np.rint(cases).sum(-1))


def check_sqrt(cases: Array, out: Array) -> None:
    np.testing.assert_array_equal(out, np.sqrt(cases))


def check_exp(cases: Array, out: Array) -> None:
    """By the bounds that vector.exp promises."""
    assert not out[cases < -87].any()
    shown = cases >= -87
    exact = np.exp(np.minimum(cases[shown].astype(np.float64), 88))
    np.testing.assert_allclose(out[shown], exact, rtol=2e-7)


def kernel_blocks() -> tuple[dict[str, Block], list[llvm.ModuleRef]]:
    """Whole kernels, and their code, which the blocks call."""
    import emulated_kernels as kernels  # noqa: PLC0415

    blocks, modules = {}, []
    for kernel, results, (cases, check) in (
        (kernels.product, kernels.PRODUCT_RESULT, kernels.products()),
        (kernels.attend, kernels.ATTENTION_RESULT, kernels.attentions()),
    ):
        name, module = kernels.compile_only(kernel)
        blocks[kernel.__name__] = Block(call_numba(name), cases, results, check)
        modules.append(module)
    return blocks, modules


def call_numba(name: str) -> Emit:
    """Calls a function that Numba has compiled for two int64."""

    def emit(b: ir.IRBuilder, case: ir.Value, out: ir.Value) -> None:
        # Addresses, for a result and an exception, that there are not.
        pointer = _I64.as_pointer()
        function_type = ir.FunctionType(ir.IntType(32), [pointer, pointer, _I64, _I64])
        function = ir.Function(b.module, function_type, name)
        b.call(function, [b.alloca(_I64), b.alloca(_I64), case, out])

    return emit


def link(name: str, blocks: dict[str, Block], modules: list[llvm.ModuleRef], folder: Path) -> Path:
    """A program for such a CPU: emulated.c, and the blocks' functions in a table."""
    module = lowered.build_module({key: block.emit for key, block in blocks.items()})
    addresses = [module.get_global(f"run_{key}") for key in blocks]
    table = ir.ArrayType(addresses[0].type, len(addresses))
    functions = ir.GlobalVariable(module, table, "functions")
    functions.initializer = ir.Constant(table, addresses)
    machine, optimized = lowered.lower(name, module, modules)
    code, program = folder / "blocks.o", folder / "emulated"
    code.write_bytes(machine.emit_object(optimized))
    harness = Path(__file__).with_suffix(".c")
    subprocess.run([COMPILER, "-O1", "-static", "-o", program, harness, code, "-lm"], check=True)
    return program


def run(program: Path, index: int, block: Block) -> Array:
    sizes = (block.cases[0].nbytes, block.results.itemsize)
    done = subprocess.run(
        [EMULATOR, "-cpu", "max", program, *map(str, (index, *sizes))],
        input=block.cases.tobytes(),
        stdout=subprocess.PIPE,
        check=True,
    )
    return np.frombuffer(done.stdout, block.results)


def main(name: str, folder: Path) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    lowered.pretend_cpu(name)
    integers = lowered.integer_functions()
    blocks = {key: integer_block(key, emit) for key, emit in integers.items()} | float_blocks()
    kernels, modules = kernel_blocks()
    blocks |= kernels
    program = link(name, blocks, modules, folder)
    for index, (key, block) in enumerate(blocks.items()):
        out = run(program, index, block)
        assert len(out) == len(block.cases), key
        block.check(block.cases, out)
        print(key)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
