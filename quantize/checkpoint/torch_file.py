"""Files that torch.save wrote: a zip archive with a pickle and the tensors' bytes.

The layout is PyTorch's (docs/source/notes/serialization.md, torch/serialization.py):
`NAME/data.pkl` is a pickle of what was saved, in which a tensor is a call of
torch._utils._rebuild_tensor_v2 on a storage, and `NAME/data/KEY`, uncompressed, is a storage's
bytes.

A pickle is a program, and `pickle` runs it. Here the standard library only splits it into opcodes;
they are followed by an interpreter that knows those which torch.save writes for numbers, strings,
containers and tensors. Whatever else a file asks for ends in a GemmaError: nothing is imported,
called or looked up by a name from the file.
"""

import io
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from quantize.checkpoint.source import map_file
from quantize.errors import GemmaError, shown

ZIP_MAGIC = b"PK\x03\x04"
# A 27B has 60,000 opcodes in 400 kB, and 1300 entries.
_LARGEST_PICKLE = 2_000_000
_MOST_OPCODES = 400_000
_LARGEST_DIRECTORY = 2_000_000
_MAX_DIMS = 8
_ENTRY = re.compile(r"[^/\\\0]+(/[^/\\\0]+)+")
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # APPNOTE.TXT 4.3.7: signature … name and extra lengths

_STORAGES = {
    "BFloat16Storage": ("BF16", "<u2"),
    "HalfStorage": ("F16", "<f2"),
    "FloatStorage": ("F32", "<f4"),
    "DoubleStorage": ("F64", "<f8"),
    "CharStorage": ("I8", "<i1"),
    "ByteStorage": ("U8", "<u1"),
    "ShortStorage": ("I16", "<i2"),
    "IntStorage": ("I32", "<i4"),
    "LongStorage": ("I64", "<i8"),
    "BoolStorage": ("BOOL", "?"),
    "ComplexFloatStorage": ("C64", "<c8"),
}


@dataclass(frozen=True, eq=False, slots=True)
class TorchTensor:
    """A tensor of a torch file."""

    dtype: str
    """As safetensors names it: "BF16", "F32", …"""
    data: NDArray[np.generic]
    """Of the tensor's shape, a view of the mapped file; BF16 as uint16."""


def read_torch(path: Path) -> object:
    """What was saved: dicts, lists, tuples, numbers and strings as such, tensors as TorchTensor.

    Raises GemmaError if the file is damaged, or asks for anything beyond that.
    """
    file = map_file(path)
    start = file[:4].tobytes()
    if start != ZIP_MAGIC:
        raise GemmaError(
            f"{path} is in the format that torch.save had before PyTorch 1.6, which is not"
            " supported; load it with torch.load(…, weights_only=True) and save it again."
            if start[:1] == b"\x80"
            else f"{path} is not a file of torch.save; it is damaged or something else, get it"
            " again."
        )
    archive = _Archive(path, file)
    return _Interpreter(archive).run(archive.pickle)


class _ZipSource(io.FileIO):
    """The file for `zipfile`, which reads a directory of any size at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LARGEST_DIRECTORY:
            raise zipfile.BadZipFile(f"it takes {size} bytes")
        return super().read(size) or b""


class _Archive:
    """The entries of the zip file, checked: uncompressed, apart from each other, inside of it."""

    def __init__(self, path: Path, file: NDArray[np.uint8]) -> None:
        self.path = path
        self._entries = self._locate(file)
        roots = [name[: -len("/data.pkl")] for name in self._entries if name.endswith("/data.pkl")]
        if len(roots) != 1 or any(not name.startswith(roots[0] + "/") for name in self._entries):
            raise self.damaged("it does not hold one folder with one data.pkl")
        self._root = roots[0]
        order = self._entries.get(f"{self._root}/byteorder")
        if order is not None and order.tobytes() != b"little":
            raise self.damaged("its numbers are not in little-endian order")
        self.pickle = self._entries[f"{self._root}/data.pkl"]
        if self.pickle.size > _LARGEST_PICKLE:
            raise self.damaged(f"its pickle has {self.pickle.size} bytes")

    def damaged(self, what: str) -> GemmaError:
        return GemmaError(
            f"{self.path} is not a whole file of torch.save: {what}. It is damaged or was not fully"
            " downloaded; get it again."
        )

    def storage(self, key: str) -> NDArray[np.uint8]:
        entry = self._entries.get(f"{self._root}/data/{key}")
        if entry is None:
            raise self.damaged(f"the bytes of storage {shown(key)} are missing")
        return entry

    def _locate(self, file: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
        try:
            with _ZipSource(self.path) as source, zipfile.ZipFile(source) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, ValueError, RuntimeError, ArithmeticError, struct.error) as e:
            raise self.damaged(f"its directory cannot be read ({e!s:.100})") from e
        entries: dict[str, NDArray[np.uint8]] = {}
        end = 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            name = info.orig_filename
            if not _ENTRY.fullmatch(name) or ".." in name.split("/"):
                raise self.damaged(f"{shown(name)} is no name of an entry")
            if name in entries:
                raise self.damaged(f"it holds {shown(name)} twice")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise self.damaged(
                    f"{shown(name)} is compressed or encrypted, so it cannot be mapped"
                )
            at = info.header_offset
            header = file[at : at + _LOCAL_HEADER.size].tobytes() if at >= end else b""
            if len(header) < _LOCAL_HEADER.size or not header.startswith(ZIP_MAGIC):
                raise self.damaged(f"{shown(name)} does not lie at {at}, after the entry before it")
            _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
            start = at + _LOCAL_HEADER.size + name_bytes + extra_bytes
            end = start + info.file_size
            if info.file_size != info.compress_size or end > file.size:
                raise self.damaged(f"{shown(name)} lies at {start} to {end} of {file.size} bytes")
            entries[name] = file[start:end]
        return entries


@dataclass(frozen=True, slots=True)
class _Function:
    """What the pickle names as a global; it stands for itself and is never called."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    items: NDArray[np.generic]


_ORDERED_DICT = _Function("collections OrderedDict")
_REBUILD_TENSOR = _Function("torch._utils _rebuild_tensor_v2")
_REBUILD_PARAMETER = _Function("torch._utils _rebuild_parameter")
_FUNCTIONS = {f.name: f for f in (_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER)} | {
    f"torch {storage}": _Function(storage) for storage in _STORAGES
}
_CONSTANTS: Mapping[str, Callable[[], object]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_LITERALS = frozenset(
    ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

_Container = TypeVar("_Container", dict[object, object], list[object])


class _RefusedError(ValueError):
    """An opcode, or its use, that torch.save does not write for tensors."""


class _Interpreter:
    """Follows the opcodes (documented in the standard library's pickletools)."""

    def __init__(self, archive: _Archive) -> None:
        self._archive = archive
        self._stack: list[object] = []
        self._below: list[list[object]] = []  # stacks below a mark
        self._memo: dict[int, object] = {}

    def run(self, program: NDArray[np.uint8]) -> object:
        try:
            opcodes = pickletools.genops(program.tobytes())
            for n_done, (opcode, argument, _) in enumerate(opcodes):
                if n_done > _MOST_OPCODES:
                    raise ValueError(f"it has more than {_MOST_OPCODES} opcodes")
                if opcode.name == "STOP":
                    break
                self._follow(opcode.name, argument)
            (result,) = self._stack
        except _RefusedError as error:
            raise GemmaError(
                f"{self._archive.path} asks for {error}, which no file of weights needs: it may be"
                " hostile. Nothing of it was run; get the checkpoint from its original source."
            ) from error
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise self._archive.damaged(f"its pickle is malformed ({shown(str(error))})") from error
        if self._below:
            raise self._archive.damaged("its pickle ends in the middle")
        return result

    def _follow(self, name: str, argument: object) -> None:
        stack = self._stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[cast(int, argument)] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[cast(int, argument)])
        elif name == "MARK":
            self._below.append(stack)
            self._stack = []
        elif name == "TUPLE":
            items = self._since_mark()
            self._stack.append(tuple(items))
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if name == "SETITEM" else self._since_mark()
            self._set_items(items)
        elif name in ("APPEND", "APPENDS"):
            items = self._pop(1) if name == "APPEND" else self._since_mark()
            self._top(list).extend(items)
        elif name == "GLOBAL":
            stack.append(_function(str(argument)))
        elif name == "STACK_GLOBAL":
            # Nothing else has a text that is sure to be short: lists can hold each other.
            if not all(isinstance(part, str) for part in stack[-2:]):
                raise _RefusedError("a name that is not a string")
            stack.append(_function(" ".join(map(str, self._pop(2)))))
        elif name == "BINPERSID":
            stack.append(self._storage(*self._pop(1)))
        elif name == "REDUCE":
            stack.append(self._reduce(*self._pop(2)))
        elif name == "BUILD":
            # A state_dict carries `_metadata`, the versions of modules: not needed.
            self._pop(1)
            self._top(dict)
        elif name not in ("PROTO", "FRAME"):
            raise _RefusedError(f"the pickle opcode {name}")

    def _pop(self, n: int) -> list[object]:
        if len(self._stack) < n:
            raise ValueError("it takes more than there is")
        items = self._stack[-n:]
        del self._stack[-n:]
        return items

    def _since_mark(self) -> list[object]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _top(self, kind: type[_Container]) -> _Container:
        top = self._stack[-1]
        if not isinstance(top, kind):
            raise _RefusedError(
                f"a change of a {type(top).__name__} as if it were a {kind.__name__}"
            )
        return top

    def _set_items(self, items: list[object]) -> None:
        target = self._top(dict)
        keys = items[::2]
        # Deep tuples as keys would overflow the stack of the hash function.
        if not all(isinstance(key, (str, int)) for key in keys):
            raise _RefusedError("a key that is neither a string nor a number")
        target.update(zip(keys, items[1::2], strict=True))

    def _storage(self, id_: object) -> _Storage:
        match id_:
            case ("storage", _Function(name), str(key), str(), int(n_items)) if name in _STORAGES:
                dtype, numpy_type = _STORAGES[name]
            case _:
                raise _RefusedError("something else than a storage by a persistent id")
        data = self._archive.storage(key)
        if data.size != n_items * np.dtype(numpy_type).itemsize:
            raise ValueError(f"storage {shown(key)} has {data.size} bytes for {n_items} of {dtype}")
        return _Storage(dtype, data.view(numpy_type))

    def _reduce(self, function: object, arguments: object) -> object:
        match function, arguments:
            case _Function(_ORDERED_DICT.name), ():
                return {}
            case _Function(_REBUILD_PARAMETER.name), (TorchTensor() as tensor, bool(), _):
                return tensor
            case (
                _Function(_REBUILD_TENSOR.name),
                (_Storage() as storage, int(start), tuple(shape), tuple(strides), bool(), _, *_),
            ):
                return TorchTensor(storage.dtype, _view(storage.items, start, shape, strides))
        name = function.name if isinstance(function, _Function) else type(function).__name__
        raise _RefusedError(f"a call of {shown(name)} with unexpected arguments")


def _function(name: str) -> _Function:
    if name not in _FUNCTIONS:
        raise _RefusedError(shown(name))
    return _FUNCTIONS[name]


def _view(
    items: NDArray[np.generic], start: int, shape: tuple[object, ...], strides: tuple[object, ...]
) -> NDArray[np.generic]:
    """The tensor of a storage; its elements must lie in it, each at a place of its own."""
    if len(shape) != len(strides) or len(shape) > _MAX_DIMS:
        raise ValueError("a tensor has impossible dimensions")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (start, *shape, *strides)):
        raise ValueError("a tensor has an impossible size, stride or offset")
    sizes = cast(tuple[int, ...], shape)
    if 0 in sizes:
        return np.empty(sizes, items.dtype)
    # The stride of a dimension of 1 is never taken.
    steps = [cast(int, s) if n > 1 else 0 for s, n in zip(strides, sizes, strict=True)]
    span = 1
    for step, n in sorted(zip(steps, sizes, strict=True)):
        if n > 1 and step < span:
            raise ValueError(f"the elements of a tensor overlap: {sizes} in steps of {strides}")
        span += step * (n - 1)
    if start + span > items.size:
        raise ValueError(f"a tensor lies at {start} to {start + span} of {items.size} items")
    byte_steps = [step * items.itemsize for step in steps]
    return np.lib.stride_tricks.as_strided(items[start:], sizes, byte_steps, writeable=False)
