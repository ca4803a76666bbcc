"""`forward` as machine code on the disk, called without Numba.

To load Numba, and with it a function of its own cache, takes as long as everything else before the
first token. So what it has compiled is kept as LLVM gives it, an object file, and linked into later
processes by LLVM alone.

A compiled function takes its arguments' parts one by one (an array's are its owner, of which there
is none here, its size, address, shape and strides), some four hundred. They lie in one array of 8
bytes each, which `run`, compiled with the function, takes apart. What has threads wait for that
(`team.call` and `team.serve`) is compiled with it, too.
"""

import ctypes
import hashlib
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from gemma_cli.runtime.compilation import FILE


class Code(NamedTuple):
    """What a model calls. Other threads of Python go on meanwhile, but for `call`."""

    run: Callable[[int, int], None]
    """Takes the address of the arguments' parts, without the thread's number, and that number."""
    serve: Callable[[int, int], None]
    call: Callable[[int, int, int], int]


RUN, _SERVE, _CALL = "gemma_cli_run", "gemma_cli_serve", "gemma_cli_call"
_I8, _I64 = ir.IntType(8), ir.IntType(64)
_TYPES = {"i8": _I8, "i64": _I64, "double": ir.DoubleType()}  # others are pointers

_lock = Lock()
_linked: list[tuple[llvm.ExecutionEngine, Code]] = []


def load(example: tuple[Any, ...]) -> Code:
    """The compiled `forward`, and what calls it; compiled for arguments like `example` if it is not
    on the disk, and kept there if that can be written."""
    with _lock:
        if not _linked:
            code = _read() or _compile(example)
            _linked.append(_link(code))
        return _linked[0][1]


ADDRESS = 4
"""Which of an array's parts that is."""


def address(array: NDArray[Any]) -> int:
    """Where an array lies. Its `ctypes` runs far more code, which no cache holds after a token."""
    where: int = array.__array_interface__["data"][0]
    return where


def parts(value: Any) -> list[int]:
    """An argument's parts: ints, bools, floats, arrays, and named tuples of them."""
    if isinstance(value, np.ndarray):
        return [0, 0, value.size, value.itemsize, address(value), *value.shape, *value.strides]
    if isinstance(value, tuple):
        return [part for field in value for part in parts(field)]
    if isinstance(value, float):
        return list(struct.unpack("q", struct.pack("d", value)))
    return [int(value)]


def _read() -> bytes | None:
    """The object file, if there is one and it is whole."""
    try:
        kept = FILE.read_bytes()
    except OSError:
        return None
    digest, code = kept[:32], kept[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _keep(code: bytes) -> None:
    if not os.access(FILE.parent, os.W_OK):
        return
    handle, name = tempfile.mkstemp(dir=FILE.parent)
    with open(handle, "wb") as file:
        file.write(hashlib.sha256(code).digest() + code)
    Path(name).replace(FILE)


def _compile(example: tuple[Any, ...]) -> bytes:
    import numba  # noqa: PLC0415 (this is what takes time)

    from gemma_cli.runtime import team  # noqa: PLC0415
    from gemma_cli.runtime.forward import forward  # noqa: PLC0415

    module, name = _llvm(forward, tuple(numba.typeof(argument) for argument in example))
    module.link_in(llvm.parse_assembly(str(_caller(module.get_function(name)))))
    for entry, kernel, n in ((_SERVE, team.serve, 2), (_CALL, team.call, 3)):
        part, name = _llvm(kernel, (numba.int64,) * n)
        part.link_in(llvm.parse_assembly(str(_caller_of_ints(entry, part.get_function(name)))))
        module.link_in(part)
    machine = _machine()
    _optimize(module, machine)
    code: bytes = machine.emit_object(module)
    _keep(code)
    return code


def _llvm(kernel: Any, signature: tuple[Any, ...]) -> tuple[llvm.ModuleRef, str]:
    """LLVM's code of a kernel with all that it calls, and its name there."""
    kernel.compile(signature)
    name: str = kernel.overloads[signature].fndesc.llvm_func_name
    return llvm.parse_assembly(kernel.inspect_llvm(signature)), name


def _optimize(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    """Has LLVM improve the code, as Numba would, but once, and knowing each function's callers."""
    for function in module.functions:
        if not function.is_declaration and function.name not in (RUN, _SERVE, _CALL):
            function.linkage = "internal"
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes = builder.getModulePassManager()
    passes.add_refprune_pass()
    passes.run(module, builder)


def _caller(function: llvm.ValueRef) -> ir.Module:
    """A module with `run` for a function whose first argument is the thread's number.

    The two arguments before it are where it leaves what it returns, and exceptions, of which there
    are none.
    """
    module = ir.Module()
    pointer = _I8.as_pointer()
    types = [_TYPES.get(str(argument.type), pointer) for argument in function.arguments]
    callee = ir.Function(module, ir.FunctionType(ir.IntType(32), types), function.name)
    caller = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64, _I64]), RUN)
    b = ir.IRBuilder(caller.append_basic_block())
    address, thread = caller.args
    left = [b.bitcast(b.alloca(pointer), pointer) for _ in range(2)]
    arguments = []
    for i, part in enumerate(types[3:]):
        place = b.inttoptr(b.add(address, _I64(8 * i)), part.as_pointer())
        arguments.append(b.load(place))
    b.call(callee, [*left, thread, *arguments])
    b.ret_void()
    return module


def _caller_of_ints(name: str, function: llvm.ValueRef) -> ir.Module:
    """A module with a function of that name that calls one of integers, and gives what it does."""
    module = ir.Module()
    n = len(list(function.arguments)) - 2
    pointers = [_I64.as_pointer(), _I8.as_pointer()]
    callee_type = ir.FunctionType(ir.IntType(32), [*pointers, *[_I64] * n])
    callee = ir.Function(module, callee_type, function.name)
    caller = ir.Function(module, ir.FunctionType(_I64, [_I64] * n), name)
    b = ir.IRBuilder(caller.append_basic_block())
    result, nothing = b.alloca(_I64), b.bitcast(b.alloca(_I8.as_pointer()), _I8.as_pointer())
    b.call(callee, [result, nothing, *caller.args])
    b.ret(b.load(result))
    return module


def _machine() -> llvm.TargetMachine:
    """The target that isa.py has given Numba, or this CPU."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple = llvm.get_process_triple()
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=os.environ.get("NUMBA_CPU_NAME", llvm.get_host_cpu_name()),
        features=os.environ.get("NUMBA_CPU_FEATURES", llvm.get_host_cpu_features().flatten()),
        opt=3,
        reloc="static" if triple.startswith("x86") else "default",
        codemodel="jitdefault",
        jit=True,
    )


def _link(code: bytes) -> tuple[llvm.ExecutionEngine, Code]:
    """The functions, and what must stay as long as they are used."""
    # What frees arrays is never called: these have no owner in compiled code.
    unused = ctypes.cast(ctypes.pythonapi.Py_FatalError, ctypes.c_void_p).value
    assert unused
    llvm.add_symbol("NRT_MemInfo_call_dtor", unused)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    # Other threads of Python run while a CFUNCTYPE does; a PYFUNCTYPE keeps the lock.
    long = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)
    short = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    run, serve, call = (engine.get_function_address(name) for name in (RUN, _SERVE, _CALL))
    return engine, Code(long(run), long(serve), short(call))
