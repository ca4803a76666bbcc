"""The model file: its description, its writer and its reader.

A model file is one safetensors file (https://github.com/huggingface/safetensors): eight bytes with
the header's length, a JSON header, then the tensors without holes. Two rules are added, so that a
mapped tensor can be used where it lies: the header is padded with spaces to end at a multiple of
64 bytes, and every tensor's size is a multiple of 64.

Tensors
    tokenizer        U8 (n,)  a serialized SentencePiece model, then zeros
    a norm           F32 (n,) as it is applied (the 1 + already added), then zeros
    a matrix         tiles as packing.py lays them out:
                     int4, int8: U8 (n_tiles, n_groups, block bytes)
                     bf16: BF16 (n_tiles, n_in, 16)     f32: F32 (n_tiles, n_in, 16)

`__metadata__` holds strings, as the specification demands; those marked JSON are JSON texts:
    format           "gemma-cli"
    version          "1"
    config           JSON, a GemmaConfig
    chat             "gemma", the turns of Gemma 1 to 3, or "base"
    sampling         JSON, the checkpoint's sampling defaults
    recipe           what was asked for, for people to read
    source           the name of the checkpoint, for people to read
    tokenizer_bytes  the length of the SentencePiece model
    matrices         JSON, {name: {"format", "n_out", "n_in", "group_size", "codebook"}}; the
                     codebook is the 16 int8 levels of an int4 matrix, else null; group_size is 0
                     for bf16 and f32
    sha256           JSON, {tensor name: hexadecimal SHA-256 of its bytes}

Names of tensors are those of quantize.checkpoint. Weight matrices are read in the order in which
a token meets them, and so they lie, with the embedding, which is also the output head, last.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from quantize import packing
from quantize.config import GemmaConfig
from quantize.errors import GemmaError
from quantize.recipe import GROUP_SIZES

ALIGNMENT = 64
VERSION = "1"
_LARGEST_HEADER = 100_000_000
_ITEM_BYTES = {"U8": 1, "BF16": 2, "F32": 4}


@dataclass(frozen=True)
class MatrixSpec:
    """The layout of a weight matrix (n_out, n_in)."""

    format: str
    n_out: int
    n_in: int
    group_size: int
    codebook: tuple[int, ...] | None

    @property
    def dtype(self) -> str:
        return {"bf16": "BF16", "f32": "F32"}.get(self.format, "U8")

    @property
    def shape(self) -> tuple[int, int, int]:
        tiles = packing.n_tiles(self.n_out)
        if self.dtype == "U8":
            block = packing.block_bytes(self.format, self.group_size)
            return tiles, self.n_in // self.group_size, block
        return tiles, self.n_in, packing.TILE_ROWS

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _ITEM_BYTES[self.dtype]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.n_out * self.n_in)


@dataclass(frozen=True)
class Description:
    """All of a model file but its weights."""

    config: GemmaConfig
    chat: str
    sampling: Mapping[str, float]
    recipe: str
    source: str
    tokenizer_model: bytes
    matrices: Mapping[str, MatrixSpec]

    @property
    def bits_per_weight(self) -> float:
        """Bits for each weight of all matrices, scales included."""
        weights = sum(m.n_out * m.n_in for m in self.matrices.values())
        return 8 * sum(m.nbytes for m in self.matrices.values()) / weights


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def norm_names(config: GemmaConfig) -> dict[str, int]:
    """Every norm of an architecture and its length, in the order of their use."""
    per_layer = {"attn_norm": config.hidden_size}
    if config.has_qk_norm:
        per_layer |= {"q_norm": config.head_dim, "k_norm": config.head_dim}
    if config.has_post_norms:
        per_layer["post_attn_norm"] = config.hidden_size
    per_layer["ffn_norm"] = config.hidden_size
    if config.has_post_norms:
        per_layer["post_ffn_norm"] = config.hidden_size
    names = {
        f"layers.{i}.{n}": size for i in range(config.n_layers) for n, size in per_layer.items()
    }
    return names | {"final_norm": config.hidden_size}


def matrix_shapes(config: GemmaConfig) -> dict[str, tuple[int, int]]:
    """Every weight matrix of an architecture and its (n_out, n_in), in the order of their use."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    per_layer = {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_o": (hidden, queries),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    names = {
        f"layers.{i}.{n}": shape for i in range(config.n_layers) for n, shape in per_layer.items()
    }
    return names | {"embed": (config.vocab_size, hidden)}


class Writer:
    """Writes a model file, tensor by tensor, in the order of `names`."""

    def __init__(self, file: BinaryIO, description: Description) -> None:
        self._file = file
        self._digests: dict[str, str] = {}
        self._metadata = {
            "format": "gemma-cli",
            "version": VERSION,
            "config": description.config.to_json(),
            "chat": description.chat,
            "sampling": json.dumps(dict(description.sampling)),
            "recipe": description.recipe,
            "source": description.source,
            "tokenizer_bytes": str(len(description.tokenizer_model)),
            "matrices": json.dumps({n: asdict(m) for n, m in description.matrices.items()}),
        }
        self._layout: dict[str, tuple[str, tuple[int, ...], int]] = {}
        size = _aligned(len(description.tokenizer_model))
        self._layout["tokenizer"] = ("U8", (size,), size)
        for name, length in norm_names(description.config).items():
            size = _aligned(4 * length)
            self._layout[name] = ("F32", (size // 4,), size)
        for name, m in description.matrices.items():
            self._layout[name] = (m.dtype, m.shape, m.nbytes)
        self._pending = list(self._layout)
        file.write(self._header())
        self.write("tokenizer", [np.frombuffer(description.tokenizer_model, np.uint8)])

    def _header(self) -> bytes:
        # A checksum has the same length before it is known, so the header keeps its size.
        digests = {name: self._digests.get(name, "0" * 64) for name in self._layout}
        header: dict[str, object] = {
            "__metadata__": self._metadata | {"sha256": json.dumps(digests)}
        }
        start = 0
        for name, (dtype, shape, size) in self._layout.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
            start += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (_aligned(8 + len(text)) - 8 - len(text))
        return len(text).to_bytes(8, "little") + text

    def write(self, name: str, parts: Iterable[NDArray[np.generic]]) -> None:
        """Writes the next tensor, given in parts that follow each other, and fills it up."""
        if not self._pending or self._pending.pop(0) != name:
            raise ValueError(f"{name} is out of turn")
        digest, left = hashlib.sha256(), self._layout[name][2]
        for part in parts:
            data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
            self._file.write(data)
            digest.update(data)
            left -= len(data)
        if not 0 <= left < ALIGNMENT:
            raise ValueError(f"{name} misses {left} bytes")
        self._file.write(bytes(left))
        digest.update(bytes(left))
        self._digests[name] = digest.hexdigest()

    def finish(self) -> None:
        """Fills in the checksums. The file is complete then, if every tensor was written."""
        if self._pending:
            raise ValueError(f"{self._pending[0]} was not written")
        self._file.seek(0)
        self._file.write(self._header())


@contextmanager
def create(path: Path, description: Description) -> Iterator[Writer]:
    """A Writer whose file appears at `path` when the block ends well, and not at all otherwise.

    The bytes go to `path` with `.partial` appended, are forced to the disk, and the file is then
    renamed.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            writer = Writer(file, description)
            yield writer
            writer.finish()
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Makes a rename in a folder last, where folders can be opened (not on Windows)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class ModelFile(Description):
    """An open model file: every tensor a read-only view of the mapping.

    matrices: MatrixSpec by name; tiles: uint8 (n_tiles, tile bytes) by name; vectors: the norms,
    float32, by name.
    """

    path: Path
    size: int
    tiles: Mapping[str, NDArray[np.uint8]]
    vectors: Mapping[str, NDArray[np.float32]]
    sha256: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> "ModelFile":
        """Maps a model file, after checking that its header, its layout and its size agree.

        Checksums are not compared: that reads everything. Raises GemmaError.
        """
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                header, data_start = _read_header(file, path, size)
            mapped = np.memmap(path, np.uint8, mode="r")
        except OSError as error:
            raise GemmaError(
                f"{path} cannot be read ({error.strerror}); check the path, or convert a "
                "checkpoint with `gemma-cli quantize`."
            ) from error
        try:
            return cls._checked(path, header, mapped[data_start:], size)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise GemmaError(
                f"{path} is a damaged model file ({error}); convert the checkpoint again."
            ) from error

    @classmethod
    def _checked(
        cls, path: Path, header: dict[str, dict[str, object]], data: NDArray[np.uint8], size: int
    ) -> "ModelFile":
        metadata = header.pop("__metadata__")
        texts = {key: str(value) for key, value in metadata.items()}
        config = GemmaConfig.from_json(texts["config"], str(path))
        matrices = {
            name: MatrixSpec(**m | {"codebook": tuple(m["codebook"]) if m["codebook"] else None})
            for name, m in json.loads(texts["matrices"]).items()
        }
        for name, shape in matrix_shapes(config).items():
            _check_matrix(name, matrices[name], shape)
        views: dict[str, NDArray[np.uint8]] = {}
        end = 0
        for name, entry in header.items():
            start, stop = _offsets(name, entry)
            if start != end or stop > len(data):
                raise ValueError(f"tensor {name} does not lie where it should")
            views[name] = data[start:stop]
            end = stop
        if end != len(data):
            raise ValueError(f"{len(data) - end} bytes belong to no tensor")
        for name, m in matrices.items():
            if len(views[name]) != m.nbytes:
                raise ValueError(f"matrix {name} has {len(views[name])} bytes, not {m.nbytes}")
        vectors = {}
        for name, length in norm_names(config).items():
            if len(views[name]) < 4 * length:
                raise ValueError(f"norm {name} is too short")
            vectors[name] = views[name][: 4 * length].view(np.float32)
        tokenizer_bytes = int(texts["tokenizer_bytes"])
        if not 0 < tokenizer_bytes <= len(views["tokenizer"]):
            raise ValueError("the tokenizer is too short")
        return cls(
            config=config,
            chat=texts["chat"],
            sampling=json.loads(texts["sampling"]),
            recipe=texts["recipe"],
            source=texts["source"],
            tokenizer_model=views["tokenizer"][:tokenizer_bytes].tobytes(),
            matrices=matrices,
            path=path,
            size=size,
            tiles={n: views[n].reshape(packing.n_tiles(m.n_out), -1) for n, m in matrices.items()},
            vectors=vectors,
            sha256=json.loads(texts["sha256"]),
        )


def _check_matrix(name: str, m: MatrixSpec, shape: tuple[int, int]) -> None:
    if (m.n_out, m.n_in) != shape:
        raise ValueError(f"matrix {name} is {m.n_out} x {m.n_in}, not {shape[0]} x {shape[1]}")
    if m.format not in packing.FORMATS:
        raise ValueError(f"matrix {name} has the unknown format {m.format!r}")
    if m.dtype == "U8" and (m.group_size not in GROUP_SIZES or m.n_in % m.group_size):
        raise ValueError(f"matrix {name} has groups of {m.group_size}")
    if m.format == "int4" and (m.codebook is None or len(m.codebook) != 16):
        raise ValueError(f"matrix {name} has no codebook of 16 levels")
    if m.codebook and not all(-128 <= level <= 127 for level in m.codebook):
        raise ValueError(f"matrix {name} has a codebook beyond 8 bits")


def _offsets(name: str, entry: dict[str, object]) -> tuple[int, int]:
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"tensor {name} has no offsets")
    start, stop = offsets
    if not (isinstance(start, int) and isinstance(stop, int) and 0 <= start <= stop):
        raise ValueError(f"tensor {name} has impossible offsets")
    if start % ALIGNMENT or stop % ALIGNMENT:
        raise ValueError(f"tensor {name} is not aligned")
    return start, stop


def _read_header(file: BinaryIO, path: Path, size: int) -> tuple[dict[str, dict[str, object]], int]:
    length = int.from_bytes(file.read(8), "little")
    not_ours = GemmaError(
        f"{path} is not a gemma-cli model file; `gemma-cli quantize {path}` makes one from a "
        "checkpoint."
    )
    if size < 8 or not 2 <= length <= min(_LARGEST_HEADER, size - 8):
        raise not_ours
    try:
        header = json.loads(file.read(length))
        metadata = header["__metadata__"]
        ours = metadata["format"] == "gemma-cli"
    except (ValueError, KeyError, TypeError, RecursionError):
        raise not_ours from None
    if not ours:
        raise not_ours
    if metadata.get("version") != VERSION:
        raise GemmaError(
            f"{path} has version {metadata.get('version')} of the model file's format, this "
            f"gemma-cli reads version {VERSION}; convert the checkpoint again."
        )
    return header, 8 + length
