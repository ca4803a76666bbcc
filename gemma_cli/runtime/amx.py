"""AMX, the matrix units of Intel's server CPUs, as Numba intrinsics.

Eight tile registers hold 16 rows of 64 bytes each: 16 x 16 float32, or 16 x 32 bfloat16. They are
a thread's own, from `configure` to `release`. A tile's number is a constant of the instruction.
(Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.)

Some virtual machines let tiles become zeros when their thread has not been running for a while: a
hypervisor or a CPU's erratum (SPR4 of Sapphire Rapids) loses them. So a tile that nobody computes
with is filled at first (`mark`), and whoever finds it empty at last (`lost`) begins again.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.vector import load_byte
from gemma_cli.runtime.workspace import STEP, TILE

MARKED = 7
"""The tile that nobody computes with."""

_I8, _I64 = ir.IntType(8), ir.IntType(64)

# Palette 1, which has eight tiles; the bytes of a row of each tile; the rows of each.
_CONFIGURATION = bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])


def _emit(b: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    """Calls an instruction by its LLVM name."""
    function_type = ir.FunctionType(ir.VoidType(), [a.type for a in args])
    b.call(cgutils.get_or_insert_function(b.module, function_type, f"llvm.x86.{name}"), args)


def _configuration(b: ir.IRBuilder) -> ir.Value:
    array = cgutils.create_constant_array(_I8, bytearray(_CONFIGURATION))
    return b.bitcast(cgutils.global_constant(b, "amx_configuration", array), _I8.as_pointer())


def _pointer(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return b.inttoptr(address, _I8.as_pointer())


@intrinsic
def configure(typingctx: Any):
    """Makes every tile 16 rows of 64 bytes, of zeros."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        _emit(b, "ldtilecfg", _configuration(b))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def release(typingctx: Any):
    """Gives up the tiles, so that nobody has to save them any more."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        _emit(b, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def mark(typingctx: Any):
    """Fills MARKED."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        _emit(b, "tileloadd64", _I8(MARKED), _configuration(b), _I64(0))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic(prefer_literal=True)
def zero(typingctx: Any, tile: Any):
    """Fills a tile with zeros."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        _emit(b, "tilezero", _I8(sig.args[0].literal_value))
        return context.get_dummy_value()

    return types.void(tile), codegen


def _mover(name: str, doc: str) -> Any:
    @intrinsic(prefer_literal=True)
    def function(typingctx: Any, tile: Any, address: Any, stride: Any):
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            stride = context.cast(b, args[2], sig.args[2], types.int64)
            _emit(b, name, _I8(sig.args[0].literal_value), _pointer(b, args[1]), stride)
            return context.get_dummy_value()

        return types.void(tile, address, stride), codegen

    function.__doc__ = doc
    return function


load = _mover("tileloadd64", "Loads a tile from an address, its rows `stride` bytes apart.")
store = _mover("tilestored64", "Stores a tile to an address, its rows `stride` bytes apart.")


@intrinsic(prefer_literal=True)
def add_product(typingctx: Any, c: Any, a: Any, b: Any):
    """c[m, n] += sum over k below 32 of a[m, k] b[k, n].

    c: tile of float32; a: of bfloat16; b: of bfloat16, of which row k holds b[2 k, n] and
    b[2 k + 1, n] side by side for each n. What is too small for a normal float32 counts as zero.
    """

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        _emit(builder, "tdpbf16ps", *(_I8(tile.literal_value) for tile in sig.args))
        return context.get_dummy_value()

    return types.void(c, a, b), codegen


@kernel
def multiply_blocks(x, w, n_steps, sums, stride, first):
    """sums[t, r] += sum over i of x[t, i] w[r, i]; if it is the `first`, =.

    x: address of 32 rows, w: of 32 columns, both bfloat16, for each 32 inputs STEP bytes: (32 rows,
    32 inputs), and twice a tile as `add_product` wants it; sums: address of float32 (32, 32), its
    rows `stride` bytes apart. A product takes 16 cycles, a load from the L1 cache 8.
    """
    below = sums + 16 * stride
    if first:
        zero(0)
        zero(1)
        zero(2)
        zero(3)
    else:
        load(0, sums, stride)
        load(1, sums + 64, stride)
        load(2, below, stride)
        load(3, below + 64, stride)
    for _ in range(n_steps):
        load(4, w, 64)
        load(5, w + TILE, 64)
        load(6, x, 64)
        add_product(0, 6, 4)
        add_product(1, 6, 5)
        load(6, x + TILE, 64)
        add_product(2, 6, 4)
        add_product(3, 6, 5)
        x, w = x + STEP, w + STEP
    store(0, sums, stride)
    store(1, sums + 64, stride)
    store(2, below, stride)
    store(3, below + 64, stride)


@kernel
def lost(line):
    """Whether the tiles have been lost since `mark`; line: address of 64 bytes to write to."""
    store(MARKED, line, 0)
    return load_byte(line) == 0
