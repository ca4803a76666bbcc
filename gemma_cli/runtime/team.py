"""Threads that run one program together, stage by stage.

Every thread calls the same stages in the same order. A stage is a number of items; threads claim
them one by one, and leave the stage when all items are done, by whomever. So nobody waits for a
thread that the operating system is not running: the others do its items, and when it comes it
finds them done. A stage costs an atomic addition an item, which takes as long as a few KB from the
memory, and one more a thread; no thread goes to sleep in between.

Nor does it between programs that follow each other closely, as tokens do: one that has no more to
do waits a millisecond for more (`serve`). To come back from the interpreter takes 30 to 50
microseconds, and its lock as long from the thread that goes on there.
"""

import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gemma_cli.runtime import isa, machine_code
from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.workspace import ASLEEP, AWAKE, CALLED, PROGRAM, STATE, THREAD_COLUMNS

_I32, _I64 = ir.IntType(32), ir.IntType(64)

# Columns of a stage's counters, on cache lines of their own.
_CLAIMED, _DONE = 0, 8
_SPINS = 4000  # About 100 microseconds of waiting before the CPU is offered to others.
_OFFERS = 2000  # About a millisecond.

_run = types.ExternalFunction(machine_code.RUN, types.void(types.int64, types.int64))


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
def _load(typingctx: Any, address: Any):
    """As _read, of an address."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return b.load_atomic(b.inttoptr(args[0], _I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _exchange(typingctx: Any, address: Any, value: Any):
    """Stores a value, visibly to all threads in one order; gives the one before."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        place = b.inttoptr(args[0], _I64.as_pointer())
        return b.atomic_rmw("xchg", place, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _exchange_if(typingctx: Any, address: Any, expected: Any, value: Any):
    """The same if there is the expected value; gives whether there was."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        place = b.inttoptr(args[0], _I64.as_pointer())
        return b.extract_value(b.cmpxchg(place, args[1], args[2], "seq_cst", "seq_cst"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


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


@kernel
def call(rows, n, program):
    """Gives a program to the n threads whose rows lie at an address; -> how many are asleep.

    program: address of the arguments' parts (machine_code).
    """
    asleep = 0
    size = 8 * THREAD_COLUMNS
    for row in range(rows, rows + size * n, size):
        _exchange(row + 8 * PROGRAM, program)
        if _exchange(row + 8 * STATE, CALLED) == ASLEEP:
            asleep += 1
    return asleep


@kernel
def serve(row, thread):
    """Runs the programs that a thread is given, until none has come for a while.

    row: address of the thread's row. The thread is asleep then.
    """
    state, spins = row + 8 * STATE, 0
    _exchange_if(state, ASLEEP, AWAKE)  # It may have been called already.
    while True:
        if _load(state) == CALLED:
            _run(_load(row + 8 * PROGRAM), thread)
            _exchange(state, AWAKE)
            spins = 0
        spins += 1
        if spins < _SPINS:
            _relax()
        elif spins < _SPINS + _OFFERS:
            _yield()
        elif _exchange_if(state, AWAKE, ASLEEP):
            return
