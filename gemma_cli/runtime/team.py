"""Threads that run one program together, stage by stage.

Every thread calls the same stages in the same order. A stage is a number of items; threads claim
them one by one, and leave the stage when all items are done, by whomever. So nobody waits for a
thread that the operating system is not running: the others do its items, and when it comes it
finds them done. A stage costs an atomic addition an item, which takes as long as a few KB from the
memory, and one more a thread; no thread goes to sleep in between.
"""

import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gemma_cli.runtime import isa
from gemma_cli.runtime.kernel import kernel

_I32, _I64 = ir.IntType(32), ir.IntType(64)

# Columns of a stage's counters, on cache lines of their own.
_CLAIMED, _DONE = 0, 8
_SPINS = 4000  # About 100 microseconds of waiting before the CPU is offered to others.


def _element(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    array = context.make_array(sig.args[0])(context, b, args[0])
    offset = b.add(b.mul(args[1], _I64(16)), args[2])
    return b.gep(array.data, [offset])


@intrinsic
def _add(typingctx: Any, counters: Any, stage: Any, column: Any, n: Any):
    """Adds to a counter, visibly to all threads in one order; gives the value before."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return b.atomic_rmw("add", _element(context, b, sig, args), args[3], "seq_cst")

    return types.int64(counters, types.int64, types.int64, types.int64), codegen


@intrinsic
def _read(typingctx: Any, counters: Any, stage: Any, column: Any):
    """A counter's value; what other threads wrote before they increased it is visible then."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return b.load_atomic(_element(context, b, sig, args), "acquire", 8)

    return types.int64(counters, types.int64, types.int64), codegen


@intrinsic
def _relax(typingctx: Any):
    """Tells the CPU that this is a waiting loop, where it has an instruction for that."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        void = ir.FunctionType(ir.VoidType(), [])
        if isa.MACHINE == "x86":
            b.call(cgutils.get_or_insert_function(b.module, void, "llvm.x86.sse2.pause"), [])
        elif isa.MACHINE == "arm":
            hint = ir.FunctionType(ir.VoidType(), [_I32])
            function = cgutils.get_or_insert_function(b.module, hint, "llvm.aarch64.hint")
            b.call(function, [_I32(1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _yield(typingctx: Any):
    """Offers the CPU to other threads and processes."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
        function = cgutils.get_or_insert_function(b.module, ir.FunctionType(_I32, []), name)
        b.call(function, [])
        return context.get_dummy_value()

    return types.void(), codegen


def stage(work: Any) -> Any:
    """Makes a stage of `work(item, thread, *args)`: all items, on whichever threads come.

    The stage is called by every thread as stage(counters, row, n_items, thread, *args) and returns
    when all n_items are done. counters: int64; their row is zero when the first thread arrives;
    thread: the caller's number, handed on.
    """
    work = kernel(work)

    @kernel
    def run(counters, row, n_items, thread, *args):
        done, item = 0, _add(counters, row, _CLAIMED, 1)
        while item < n_items:
            work(item, thread, *args)
            done += 1
            item = _add(counters, row, _CLAIMED, 1)
        if done:
            _add(counters, row, _DONE, done)
        spins = 0
        while _read(counters, row, _DONE) < n_items:
            spins += 1
            if spins < _SPINS:
                _relax()
            else:
                _yield()

    return run
