"""A pytest plugin: NumPy's arrays lie against a page that must not be touched.

Every array that NumPy allocates while this is loaded gets pages of its own, between two that can be
neither read nor written (mmap, mprotect): it ends at the second, or begins after the first. Code
that reads or writes a byte beyond it ends the process by a signal; Numba's own checks see indices,
this sees the addresses that vector code makes of them. GUARDED=end (the default) or start.

The allocator is set as NEP 49 describes it (https://numpy.org/neps/nep-0049.html), through the
table of NumPy's C interface.
"""

import ctypes
import mmap
import os
import sys
from dataclasses import replace
from typing import Any

import numpy as np

from quantize.modelfile import ModelFile

AT_START = os.environ.get("GUARDED", "end") == "start"
PAGE = mmap.PAGESIZE
_SET_HANDLER = 304  # its place in the table, numpy/_core/code_generators/numpy_api.py
_PROT_NONE, _PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS = 0, 3, 0x22
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

installed = False
_sizes: dict[int, int] = {}  # by the address


def _pages(size: int) -> int:
    return -(-max(size, 1) // PAGE) * PAGE


def allocate(size: int) -> int | None:
    """Memory of so many bytes, zeroed, with an unreadable page at either end."""
    pages = _pages(size)
    whole = _libc.mmap(None, pages + 2 * PAGE, _PROT_NONE, _MAP_PRIVATE_ANONYMOUS, -1, 0)
    if whole == _FAILED or _libc.mprotect(whole + PAGE, pages, _PROT_READ_WRITE):
        return None
    address: int = whole + PAGE + (0 if AT_START else pages - size)
    _sizes[address] = size
    return address


def free(address: int | None) -> None:
    if address is not None:
        size = _sizes.pop(address)
        _libc.munmap(address // PAGE * PAGE - PAGE, _pages(size) + 2 * PAGE)


def reallocate(address: int | None, size: int) -> int | None:
    new = allocate(size)
    if address is not None and new is not None:
        ctypes.memmove(new, address, min(size, _sizes[address]))
        free(address)
    return new


_SIZE, _POINTER = ctypes.c_size_t, ctypes.c_void_p
_Malloc = ctypes.CFUNCTYPE(_POINTER, _POINTER, _SIZE)
_Calloc = ctypes.CFUNCTYPE(_POINTER, _POINTER, _SIZE, _SIZE)
_Realloc = ctypes.CFUNCTYPE(_POINTER, _POINTER, _POINTER, _SIZE)
_Free = ctypes.CFUNCTYPE(None, _POINTER, _POINTER, _SIZE)


class _Handler(ctypes.Structure):
    """PyDataMem_Handler of numpy/ndarraytypes.h."""

    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("context", _POINTER),
        ("malloc", _Malloc),
        ("calloc", _Calloc),
        ("realloc", _Realloc),
        ("free", _Free),
    )


_handler = _Handler(
    b"guarded",
    1,
    None,
    _Malloc(lambda _, size: allocate(size)),
    _Calloc(lambda _, n, size: allocate(n * size)),
    _Realloc(lambda _, address, size: reallocate(address, size)),
    _Free(lambda _, address, size: free(address)),
)


def install() -> None:
    """Has NumPy allocate the arrays of this thread so from now on."""
    global installed  # noqa: PLW0603
    installed = True
    python = ctypes.pythonapi
    python.PyCapsule_GetPointer.restype = _POINTER
    python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    python.PyCapsule_New.restype = ctypes.py_object
    python.PyCapsule_New.argtypes = [_POINTER, ctypes.c_char_p, _POINTER]
    multiarray: Any = np._core._multiarray_umath  # type: ignore[attr-defined]
    table = python.PyCapsule_GetPointer(multiarray._ARRAY_API, None)
    set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(
        ctypes.cast(table, ctypes.POINTER(_POINTER))[_SET_HANDLER]
    )
    set_handler(python.PyCapsule_New(ctypes.addressof(_handler), b"mem_handler", None))


def weights(file: ModelFile) -> ModelFile:
    """A model file whose weights are such arrays, if there are any, and no parts of a mapping."""
    if not installed:
        return file
    tiles = {name: array.copy() for name, array in file.tiles.items()}
    return replace(file, tiles=tiles, vectors={n: a.copy() for n, a in file.vectors.items()})


# For pytest


_status = 0


def pytest_configure() -> None:
    install()


def pytest_sessionfinish(exitstatus: int) -> None:
    global _status  # noqa: PLW0603
    _status = int(exitstatus)


def pytest_unconfigure() -> None:
    """Leaves before Python takes itself apart, and what frees its last arrays with it."""
    sys.stdout.flush()
    os._exit(_status)
