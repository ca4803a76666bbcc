"""A pytest plugin: the kernels for AMX, on a CPU that need not have it.

    python -m pytest -p pretended_amx tests/test_kernels.py

AMX's instructions are spelled out in plain ones, with tile registers in each thread's own memory.
Every LOSS-th product all tiles of its thread become zeros, as they do on some virtual machines.
To be loaded before the runtime is imported, which then takes the CPU for one with AMX.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import lowered
from llvmlite import ir

LOSS = 9973
"""More than a pair of tiles takes in the tests, so that it can be done between two losses."""

N_TILES, TILE, ROW = 8, 1024, 64

_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_POINTER, _VOID = _I8.as_pointer(), ir.VoidType()
_INTEGERS, _FLOATS = ir.VectorType(_I32, 16), ir.VectorType(ir.FloatType(), 16)

_key = ctypes.c_uint()
_products = ctypes.c_int64()


def pretend() -> None:
    """Makes the runtime, which is not imported yet, see a CPU with AMX."""
    lowered.use_amx(lowered.import_isa())  # and Numba sees the CPU that there is

    from gemma_cli.runtime import amx  # noqa: PLC0415

    assert ctypes.CDLL(None).pthread_key_create(ctypes.byref(_key), None) == 0
    amx._emit = _emit


def _emit(b: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    function = _function(b.module, name, _VOID, [a.type for a in args], _MEANINGS[name])
    b.call(function, args)


def _function(
    module: ir.Module,
    name: str,
    result: ir.Type,
    arguments: list[ir.Type],
    emit: Callable[..., None],
) -> ir.Function:
    """A function of the module, which `emit` fills when it is needed first."""
    name = f"pretended.{name}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(result, arguments), name)
    function.linkage = "linkonce_odr"
    b = ir.IRBuilder(function.append_basic_block())
    emit(b, *function.args)
    return function


def _extern(b: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """Calls a function of C or LLVM."""
    function = b.module.globals.get(name)
    if not function:
        function = ir.Function(b.module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args)


def _loop(b: ir.IRBuilder, n: int, emit: Callable[..., list[ir.Value]], *first: ir.Value) -> Any:
    """Values after n rounds, each made by emit(round, *values)."""
    before, body = b.block, b.append_basic_block()
    b.branch(body)
    b.position_at_end(body)
    phis = [b.phi(value.type) for value in (_I64(0), *first)]
    for phi, value in zip(phis, (_I64(0), *first), strict=True):
        phi.add_incoming(value, before)
    values = [b.add(phis[0], _I64(1)), *emit(*phis)]
    last, after = b.block, b.append_basic_block()
    b.cbranch(b.icmp_signed("<", values[0], _I64(n)), body, after)
    for phi, value in zip(phis, values, strict=True):
        phi.add_incoming(value, last)
    b.position_at_end(after)
    return values[1:]


def _registers(b: ir.IRBuilder) -> ir.Value:
    """The address of the thread's tiles."""
    key, size = _I32(_key.value), _I64(N_TILES * TILE)
    found = _extern(b, "pthread_getspecific", _POINTER, key)
    with b.if_then(b.icmp_unsigned("==", found, _POINTER(None))):
        made = _extern(b, "aligned_alloc", _POINTER, _I64(ROW), size)
        _extern(b, "pthread_setspecific", _I32, key, made)
    b.ret(_extern(b, "pthread_getspecific", _POINTER, key))


def _tile(b: ir.IRBuilder, number: ir.Value) -> ir.Value:
    """A tile's address as an integer."""
    registers = b.call(_function(b.module, "registers", _POINTER, [], _registers), [])
    return b.add(b.ptrtoint(registers, _I64), b.mul(b.zext(number, _I64), _I64(TILE)))


def _at(b: ir.IRBuilder, address: ir.Value, type_: ir.Type) -> ir.Value:
    return b.inttoptr(address, type_.as_pointer())


def _clear(b: ir.IRBuilder, address: ir.Value, n_rows: int) -> None:
    def row(i: ir.Value) -> list[ir.Value]:
        b.store(_INTEGERS(None), _at(b, b.add(address, b.mul(i, _I64(ROW))), _INTEGERS))
        return []

    _loop(b, n_rows, row)


def _ldtilecfg(b: ir.IRBuilder, configuration: ir.Value) -> None:
    _clear(b, _tile(b, _I8(0)), N_TILES * TILE // ROW)
    b.ret_void()


def _tilerelease(b: ir.IRBuilder) -> None:
    _clear(b, _tile(b, _I8(0)), N_TILES * TILE // ROW)
    b.ret_void()


def _tilezero(b: ir.IRBuilder, tile: ir.Value) -> None:
    _clear(b, _tile(b, tile), TILE // ROW)
    b.ret_void()


def _move(loads: bool) -> Callable[..., None]:
    def emit(b: ir.IRBuilder, tile: ir.Value, pointer: ir.Value, stride: ir.Value) -> None:
        register, memory = _tile(b, tile), b.ptrtoint(pointer, _I64)

        def row(i: ir.Value) -> list[ir.Value]:
            places = b.add(register, b.mul(i, _I64(ROW))), b.add(memory, b.mul(i, stride))
            target, source = (_at(b, place, _INTEGERS) for place in places[:: 1 if loads else -1])
            b.store(b.load(source, align=1), target, align=1)
            return []

        _loop(b, TILE // ROW, row)
        b.ret_void()

    return emit


def _halves(b: ir.IRBuilder, pairs: ir.Value) -> list[ir.Value]:
    """Of pairs of bfloat16, the first and the second ones as float32."""
    low = b.shl(pairs, ir.Constant(_INTEGERS, [16] * 16))
    high = b.and_(pairs, ir.Constant(_INTEGERS, [-(2**16)] * 16))
    return [b.bitcast(bits, _FLOATS) for bits in (low, high)]


def _tdpbf16ps(b: ir.IRBuilder, sums: ir.Value, left: ir.Value, right: ir.Value) -> None:
    """As the manual has it: fused, the even and the odd products apart, added at the end."""
    _lose_sometimes(b)
    c, x, w = (_tile(b, tile) for tile in (sums, left, right))

    def row(m: ir.Value) -> list[ir.Value]:
        offset = b.mul(m, _I64(ROW))

        def products(k: ir.Value, *before: ir.Value) -> list[ir.Value]:
            pair = b.load(_at(b, b.add(b.add(x, offset), b.mul(k, _I64(4))), _I32))
            lanes = b.insert_element(_INTEGERS(ir.Undefined), pair, _I32(0))
            lanes = b.shuffle_vector(lanes, lanes, _INTEGERS(None))
            row_k = b.load(_at(b, b.add(w, b.mul(k, _I64(ROW))), _INTEGERS))
            factors = zip(_halves(b, lanes), _halves(b, row_k), before, strict=True)
            return [_extern(b, "llvm.fma.v16f32", _FLOATS, *three) for three in factors]

        even, odd = _loop(b, 16, products, _FLOATS(None), _FLOATS(None))
        place = _at(b, b.add(c, offset), _FLOATS)
        b.store(b.fadd(b.load(place), b.fadd(even, odd)), place)
        return []

    _loop(b, 16, row)
    b.ret_void()


def _lose_sometimes(b: ir.IRBuilder) -> None:
    counter = b.inttoptr(_I64(ctypes.addressof(_products)), _I64.as_pointer())
    n = b.atomic_rmw("add", counter, _I64(1), "monotonic")
    with b.if_then(b.icmp_unsigned("==", b.urem(n, _I64(LOSS)), _I64(LOSS - 1))):
        _clear(b, _tile(b, _I8(0)), N_TILES * TILE // ROW)


_MEANINGS: dict[str, Callable[..., None]] = {
    "ldtilecfg": _ldtilecfg,
    "tilerelease": _tilerelease,
    "tilezero": _tilezero,
    "tileloadd64": _move(loads=True),
    "tilestored64": _move(loads=False),
    "tdpbf16ps": _tdpbf16ps,
}

pretend()
