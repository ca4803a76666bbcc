"""What every reader of a checkpoint hands on, whatever the kind of file."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor

from quantize.config import MAX_INTEGER, Fields, GemmaConfig
from quantize.errors import GemmaError

_LARGEST_SMALL_FILE = 10_000_000  # Gemma 3's tokenizer_config.json takes 1.2 MB

IMAGES_NOTE = "The checkpoint can see images too; only its text model is read, images are not read."


@dataclass(frozen=True)
class Grid:
    """Rows of a matrix exactly as the source's blocks of 32 hold them.

    A weight is scale * code, or scale * grouping.IQ4_NL_LEVELS[code] in an IQ4_NL tensor.
    """

    codes: NDArray[np.int8]
    """(n_rows, n_in)"""
    scales: NDArray[np.float16]
    """(n_rows, n_in // 32)"""


class SourceTensor(Protocol):
    """A tensor in a mapped file; nothing is read before it is asked for."""

    @property
    def name(self) -> str:
        """The source's own name, for messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n_out, n_in) of a matrix, (n,) of a vector."""

    @property
    def dtype(self) -> str:
        """The source type's name: "BF16", "F32", "Q4_0", …"""

    @property
    def nbytes(self) -> int:
        """Bytes in the source."""

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of a matrix as float32, (stop - start, n_in)."""

    def values(self) -> NDArray[np.float32]:
        """A vector as float32; a norm's as it is applied."""

    def grid(self, start: int, stop: int) -> Grid | None:
        """Rows of a Q4_0 (codes -8 to 7), Q5_0 (-16 to 15), Q8_0 or I8 (-128 to 127) or IQ4_NL
        matrix (codes 0 to 15); None for other types, and where a Grid cannot hold the scales."""


FLOATS = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
"""The types that a FloatTensor can have, and numpy's; it has no bfloat16."""


@dataclass(frozen=True, eq=False, slots=True)
class FloatTensor:
    """A SourceTensor of plain numbers in a file of Hugging Face or PyTorch."""

    name: str
    dtype: str
    """A key of `FLOATS`."""
    data: NDArray[np.generic]
    """Of 2 dimensions (or 1), of the type in `FLOATS`."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows as float32, (stop - start, n_in)."""
        return widen(self.data[start:stop], self.dtype)

    def values(self) -> NDArray[np.float32]:
        """A norm as it is applied: Gemma multiplies by 1 + w, and these files keep w."""
        return np.float32(1) + widen(self.data, self.dtype)

    def grid(self, start: int, stop: int) -> Grid | None:
        """None: these are no blocks."""
        return None


def widen(data: NDArray[np.generic], dtype: str) -> NDArray[np.float32]:
    """Numbers of a type in `FLOATS` as float32."""
    if dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        wide = np.left_shift(data, 16, dtype=np.uint32)
        return cast(NDArray[np.float32], wide.view(np.float32))
    return data.astype(np.float32)


class FileState(NamedTuple):
    """What tells a file from another in its place, and from itself after a change."""

    device: int
    inode: int
    size: int
    modified_ns: int


def file_state(path: Path) -> FileState:
    """The state of a file. Raises OSError."""
    s = path.stat()
    return FileState(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns)


def file_states(paths: Iterable[Path]) -> dict[Path, FileState]:
    """The states of files, by their paths."""
    return {path: file_state(path) for path in paths}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, opened: complete, and every tensor of the shape that its config asks for."""

    path: Path
    config: GemmaConfig
    tensors: Mapping[str, SourceTensor]
    """By our names, see `names`, in the order of the layers."""
    tokenizer_model: bytes
    """A serialized SentencePiece ModelProto."""
    chat: str
    """"gemma" (the turns of Gemma 1 to 3) or "base"."""
    sampling: Mapping[str, float]
    """The checkpoint's own defaults, of temperature, top_k and top_p those that it has."""
    notes: tuple[str, ...]
    """Sentences for the user."""
    files: Mapping[Path, FileState]
    """Those that tensors are mapped from, as they were when they were opened."""
    origin: str = ""
    """Where it came from, if its path's name does not tell."""

    @property
    def name(self) -> str:
        """What the model file says that it was made of."""
        return self.origin or os.fsencode(self.path.absolute().name).decode(errors="replace")

    def check_unchanged(self) -> None:
        """Raises GemmaError if a file is not what it was when it was opened."""
        for path, state in self.files.items():
            if not path.exists() or file_state(path) != state:
                raise GemmaError(
                    f"{path} was changed while it was being read; convert it again when nothing"
                    " else writes to it."
                )


mapped_sizes: dict[Path, int] = {}
"""What was mapped, with its bytes at that time. Reading what a file has lost since is a SIGBUS."""


def map_file(path: Path) -> NDArray[np.uint8]:
    """The file's bytes, mapped read-only. Raises GemmaError if it cannot be read or is empty."""
    # A pipe or a device would block or have no end.
    if not path.is_file():
        reason = "is not a file" if path.exists() else "does not exist"
        raise GemmaError(f"{path} {reason}; check the path.")
    try:
        mapped = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise GemmaError(f"{path} cannot be read ({reason}); check the file.") from error
    mapped_sizes[path] = mapped.size
    return mapped


def file_digest(path: Path, digest: "hashlib._Hash | None" = None) -> str:
    """The hexadecimal digest of a file's bytes after those that `digest` has; SHA-256 by default.

    Raises OSError.
    """
    digest = digest or hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_file(path: Path, limit: int = _LARGEST_SMALL_FILE) -> bytes:
    """The whole of a small file. Raises GemmaError if it cannot be read, or has more bytes than
    `limit`."""
    data = map_file(path)
    if data.size > limit:
        raise GemmaError(
            f"{path} has {data.size} bytes, which is more than such a file of any Gemma; get it"
            " again."
        )
    return data.tobytes()


def check_vocabulary(model: bytes, vocab_size: int, where: str) -> None:
    """Raises GemmaError if a SentencePiece model has more pieces than the embedding has rows."""
    n_pieces = SentencePieceProcessor(model_proto=model).vocab_size()
    if n_pieces > vocab_size:
        raise GemmaError(
            f"The vocabulary of {where} has {n_pieces} pieces, its embedding {vocab_size} rows;"
            " use the one that belongs to the checkpoint."
        )


def sampling_defaults(fields: Fields, keys: Mapping[str, str]) -> dict[str, float]:
    """Those that are stated of temperature, top_k and top_p; `keys`: how the source spells them."""
    limits = {"temperature": 1e3, "top_k": float(MAX_INTEGER), "top_p": 1.0}
    sampling: dict[str, float] = {}
    for name, key in keys.items():
        if fields.values.get(key) is not None:
            sampling[name] = fields.number(key)
            if not 0 <= sampling[name] <= limits[name]:
                raise fields.wrong(key, f"a number of 0 to {limits[name]:g}")
    return sampling
