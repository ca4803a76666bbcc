"""The model file: its description, its writer and its reader.

A model file is one safetensors file (https://github.com/huggingface/safetensors): eight bytes with
the header's length, a JSON header, then the tensors without holes. Two rules are added, so that a
mapped tensor can be used where it lies: the header is padded with spaces to end at a multiple of
64 bytes, and every tensor's size is a multiple of 64.

Tensors
    tokenizer        U8 (n,)  a serialized SentencePiece model, then zeros
    a norm           F32 (n,) as it is applied (the 1 + already added), then zeros
    a matrix         tiles as packing.py lays them out:
                     int4, int8, int8_planes: U8 (n_tiles, n_groups, block bytes)
                     int4_dq: U8 (n_tiles, tile bytes)
                     bf16: BF16 (n_tiles, n_in, 16)     f32: F32 (n_tiles, n_in, 16)

`__metadata__` holds strings, as the specification demands; those marked JSON are JSON texts:
    format           "gemma-cli"
    version          "3"
    config           JSON, a GemmaConfig
    chat             "gemma", the turns of Gemma 1 to 3, or "base"
    sampling         JSON, the checkpoint's sampling defaults
    recipe           what was asked for, for people to read
    source           the name of the checkpoint, for people to read
    tokenizer_bytes  the length of the SentencePiece model
    matrices         JSON, {name: {"format", "n_out", "n_in", "group_size", "codebook"}}; the
                     codebook is the 16 int8 levels of 4 bits, else null; group_size is 0
                     for bf16 and f32
    sha256           JSON, {tensor name: hexadecimal SHA-256 of its bytes}
    header_sha256    the SHA-256 of the header, spaces included, with 64 zeros in this place; a
                     header without one is taken as it is
    verification     JSON, a Verification, or "" if the file was not compared with its source

Names of tensors are those of quantize.tensors. Weight matrices are read in the order in which
a token meets them, and so they lie, with the embedding, which is also the output head, last.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from quantize import packing
from quantize.checkpoint.source import FileState, file_state, map_file, sampling_defaults
from quantize.config import MAX_INTEGER, Fields, GemmaConfig, parse_json_object
from quantize.errors import GemmaError, shown
from quantize.recipe import GROUP_SIZES
from quantize.tensors import matrix_shapes, norm_sizes

try:
    import fcntl
except ImportError:  # Windows, which lets nobody replace a file that is open.
    fcntl = None  # type: ignore[assignment]

ALIGNMENT = 64
VERSION = "3"
CHATS = ("gemma", "base")
_LARGEST_HEADER = 25_000_000  # that of a 27B takes 0.3
_METADATA = {
    *("format", "version", "config", "chat", "sampling", "recipe", "source", "tokenizer_bytes"),
    *("matrices", "sha256", "header_sha256", "verification"),
}
_NO_SHA256 = "0" * 64
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
    def shape(self) -> tuple[int, ...]:
        tiles = packing.n_tiles(self.n_out)
        if self.format == "int4_dq":
            return tiles, packing.tile_bytes(self.format, self.n_in, self.group_size)
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


def bits_per_weight(matrices: Collection[MatrixSpec]) -> float:
    """Bits for each weight of all matrices, scales included."""
    return 8 * sum(m.nbytes for m in matrices) / sum(m.n_out * m.n_in for m in matrices)


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
        return bits_per_weight(self.matrices.values())


class TensorError(NamedTuple):
    """How far a matrix's weights q are from the source's w."""

    plain: float
    """sqrt(sum (w - q)^2 / sum w^2)"""
    weighted: float
    """The same, each square times the mean square of the input that the weight is multiplied by."""


@dataclass(frozen=True)
class Verification:
    """What a model file lost against its source in float32, on a text."""

    tokens: int
    """Predictions compared."""
    kl: float
    """Mean Kullback-Leibler divergence from the source over the whole vocabulary, in nats."""
    kl_stderr: float
    same_top: float
    """Share of predictions where both rank the same token first."""
    errors: Mapping[str, TensorError]
    """By the name of the matrix, each one's."""

    def worst(self, n: int) -> dict[str, TensorError]:
        """The n matrices of the largest weighted errors, the largest first; none that is exact."""
        inexact = [(name, error) for name, error in self.errors.items() if error.plain > 0]
        return dict(sorted(inexact, key=lambda item: item[1].weighted, reverse=True)[:n])

    def to_json(self) -> str:
        """All fields in their order, as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, names: Iterable[str], where: str) -> "Verification":
        """What `to_json` wrote, for matrices of these names. Raises GemmaError otherwise."""
        fields = Fields(parse_json_object(text, where), where)
        errors = fields.mapping("errors")
        if errors.values.keys() != set(names):
            raise fields.wrong("errors", "a list of all matrices")
        return cls(
            tokens=fields.integer("tokens"),
            kl=fields.number("kl"),
            kl_stderr=fields.number("kl_stderr"),
            same_top=fields.number("same_top"),
            errors={name: _read_error(errors, name) for name in names},
        )


def _read_error(errors: Fields, name: str) -> TensorError:
    values = errors.array(name)
    if len(values) != 2:
        raise errors.wrong(name, "a pair of numbers")
    pair = Fields(dict(zip(TensorError._fields, values, strict=True)), f"{errors.where}, {name}")
    return TensorError(pair.number("plain"), pair.number("weighted"))


def _widest_verification(names: Iterable[str]) -> Verification:
    """One whose JSON is as long as any can be."""
    longest = sys.float_info.min  # 2.2250738585072014e-308: no positive number takes more digits
    error = TensorError(longest, longest)
    return Verification(MAX_INTEGER, longest, longest, longest, dict.fromkeys(names, error))


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _header_sha256(digest: str) -> bytes:
    """How a header states its checksum. No string in it can hold this: quotes are escaped there."""
    return f'"header_sha256":"{digest}"'.encode()


class _Entry(TypedDict):
    """Where a tensor lies, as the safetensors header says it."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def _layout(
    config: GemmaConfig, tokenizer_bytes: int, matrices: Mapping[str, MatrixSpec]
) -> dict[str, _Entry]:
    """The header's entry of every tensor, in their order."""
    size = _aligned(tokenizer_bytes)
    tensors: dict[str, tuple[str, list[int], int]] = {"tokenizer": ("U8", [size], size)}
    for name, length in norm_sizes(config).items():
        size = _aligned(4 * length)
        tensors[name] = ("F32", [size // 4], size)
    for name, m in matrices.items():
        tensors[name] = (m.dtype, list(m.shape), m.nbytes)
    entries: dict[str, _Entry] = {}
    start = 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    return entries


def data_bytes(
    config: GemmaConfig, tokenizer_bytes: int, matrices: Mapping[str, MatrixSpec]
) -> int:
    """The bytes of all tensors of a model file, which are all but its header."""
    layout = _layout(config, tokenizer_bytes, matrices)
    return max(entry["data_offsets"][1] for entry in layout.values())


class Writer:
    """Writes a model file, tensor by tensor, in the order of the layout.

    A codebook may be given by `set_codebook` up to the end, and so may what was lost by
    `set_verification`, if the file is `to_be_verified`: the header keeps room.
    """

    def __init__(
        self, file: BinaryIO, description: Description, *, to_be_verified: bool = False
    ) -> None:
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
        }
        self._matrices = dict(description.matrices)
        self._verification = ""
        self._layout = _layout(
            description.config, len(description.tokenizer_model), description.matrices
        )
        self._pending = list(self._layout)
        widest = {
            name: replace(m, codebook=m.codebook and (-128,) * 16)
            for name, m in self._matrices.items()
        }
        verification = _widest_verification(widest).to_json() if to_be_verified else ""
        header = self._header(widest, verification)
        header += b" " * (_aligned(8 + len(header)) - 8 - len(header))
        self._header_bytes = len(header)
        self._write_header(header)
        self.write("tokenizer", [np.frombuffer(description.tokenizer_model, np.uint8)])

    def _header(self, matrices: Mapping[str, MatrixSpec], verification: str) -> bytes:
        # A checksum has the same length before it is known.
        digests = {name: self._digests.get(name, _NO_SHA256) for name in self._layout}
        metadata = self._metadata | {
            "matrices": json.dumps({name: asdict(m) for name, m in matrices.items()}),
            "sha256": json.dumps(digests),
            "header_sha256": _NO_SHA256,
            "verification": verification,
        }
        header = {"__metadata__": metadata} | self._layout
        return json.dumps(header, separators=(",", ":")).encode()

    def _write_header(self, header: bytes) -> None:
        header = header.ljust(self._header_bytes)
        digest = hashlib.sha256(header).hexdigest()
        self._file.write(self._header_bytes.to_bytes(8, "little"))
        self._file.write(header.replace(_header_sha256(_NO_SHA256), _header_sha256(digest)))

    def set_codebook(self, name: str, levels: tuple[int, ...]) -> None:
        """The 16 levels that a matrix of 4 bits turned out to have."""
        self._matrices[name] = replace(self._matrices[name], codebook=levels)

    def set_verification(self, verification: Verification) -> None:
        """What was lost, as it turned out."""
        self._verification = verification.to_json()

    def write(self, name: str, parts: Iterable[NDArray[np.generic]]) -> None:
        """Writes the next tensor, given in parts that follow each other, and fills it up."""
        if not self._pending or self._pending.pop(0) != name:
            raise ValueError(f"{name} is out of turn")
        start, stop = self._layout[name]["data_offsets"]
        digest, left = hashlib.sha256(), stop - start
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
        """Fills in codebooks, checksums and verification: the file can be opened then.

        Raises ValueError if a tensor was not written.
        """
        if self._pending:
            raise ValueError(f"{self._pending[0]} was not written")
        header = self._header(self._matrices, self._verification)
        if len(header) > self._header_bytes:
            raise ValueError("the header was not given enough room")
        self._file.seek(0)
        self._write_header(header)
        self._file.flush()


def partial_path(path: Path) -> Path:
    """Where a model file is while it is being written."""
    return path.with_name(path.name + ".partial")


@contextmanager
def create(
    path: Path, description: Description, *, to_be_verified: bool = False
) -> Iterator[Writer]:
    """A Writer whose file appears at `path` when the block ends well, and not at all otherwise.

    The bytes go to `partial_path(path)`, are forced to the disk, and the file is then renamed.
    What a killed run left there is replaced. Raises GemmaError if another run writes there.
    """
    partial = partial_path(path)
    with _claim(partial) as file:
        try:
            writer = Writer(file, description, to_be_verified=to_be_verified)
            yield writer
            writer.finish()
            _publish(partial)
            os.fsync(file.fileno())
            if not _is_at(file.fileno(), partial):
                raise _in_use(partial)
            if sys.platform == "win32":
                file.close()  # No open file is renamed there.
            os.replace(partial, path)
        except BaseException:
            if file.closed or _is_at(file.fileno(), partial):
                partial.unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


def discard(path: Path) -> None:
    """Removes a model file, and what a killed run left where it was to be written.

    Raises GemmaError if another run writes there.
    """
    partial = partial_path(path)
    if partial.exists():
        with _claim(partial):
            partial.unlink()
    if path.exists():
        path.unlink()


def _claim(partial: Path) -> BinaryIO:
    """A new file, in the place of what a killed run may have left, that no other run replaces.

    Whoever has locked the file at this place owns it, and only an owner removes it. The system lets
    go of a lock when its holder ends, however that is.
    """
    with ExitStack() as stack:
        if fcntl:
            try:
                # Neither is a link followed nor a pipe waited for.
                left = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError:
                pass
            except OSError:
                partial.unlink()
            else:
                stack.callback(os.close, left)
                if not (_lock(left) and _is_at(left, partial)):
                    raise _in_use(partial)
                partial.unlink()
        else:
            partial.unlink(missing_ok=True)
        try:
            # Nobody else reads it before it is whole.
            file = open(partial, "xb", opener=_open_private)  # noqa: SIM115 (the caller closes it)
        except FileExistsError as error:
            raise _in_use(partial) from error
        if fcntl and not (_lock(file.fileno()) and _is_at(file.fileno(), partial)):
            file.close()
            raise _in_use(partial)
    return file


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _publish(path: Path) -> None:
    """Gives a file the permissions of any new one."""
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _in_use(partial: Path) -> GemmaError:
    return GemmaError(
        f"{partial} is being written by another gemma-cli; wait for it, or choose another output "
        "with -o."
    )


def _lock(descriptor: int) -> bool:
    """Locks a file unless another process has done so."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # Some network file systems have no locks.
        pass
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path leads to an open file still."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


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
    float32, by name; verification: None if the file was not compared with its source.
    """

    path: Path
    size: int
    tiles: Mapping[str, NDArray[np.uint8]]
    vectors: Mapping[str, NDArray[np.float32]]
    tensors: Mapping[str, NDArray[np.uint8]]
    """The bytes of every tensor with what fills it up, by name."""
    sha256: Mapping[str, str]
    verification: Verification | None
    state: FileState
    """That of the file when it was opened."""

    def check_unchanged(self) -> None:
        """Raises GemmaError if the file that is mapped was written to; another one may have taken
        its place."""
        try:
            state = file_state(self.path)
        except OSError:  # it is gone, and still mapped
            return
        if state[:2] == self.state[:2] and state != self.state:
            raise GemmaError(
                f"{self.path} was changed while it was in use; convert the checkpoint again, and "
                "start again."
            )

    def damaged_tensors(self, progress: Callable[[int], None] | None = None) -> list[str]:
        """The names of tensors whose bytes do not have their checksum; reads the whole file.

        progress: called with the number of bytes that have been compared.
        """
        done, damaged = 0, []
        with ThreadPoolExecutor() as pool:
            digests = pool.map(lambda data: hashlib.sha256(data).hexdigest(), self.tensors.values())
            for (name, data), digest in zip(self.tensors.items(), digests, strict=True):
                if digest != self.sha256[name]:
                    damaged.append(name)
                done += data.size
                if progress:
                    progress(done)
        return damaged

    @classmethod
    def open(cls, path: Path) -> "ModelFile":
        """Maps a model file, after checking that its header, its layout and its size agree.

        The header's checksum is compared, the tensors' are not: that reads everything. Raises
        GemmaError.
        """
        mapped = map_file(path)
        state = file_state(path)
        header, data_start = _read_header(mapped, path)
        try:
            return cls._checked(path, state, header, mapped, data_start)
        except (KeyError, ValueError, TypeError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else str(error)[:200]
            raise GemmaError(
                f"{path} is a damaged model file ({what}); convert the checkpoint again."
            ) from error

    @classmethod
    def _checked(
        cls,
        path: Path,
        state: FileState,
        header: dict[str, object],
        mapped: NDArray[np.uint8],
        data_start: int,
    ) -> "ModelFile":
        texts = cast(dict[str, str], header.pop("__metadata__"))
        if unknown := sorted(texts.keys() - _METADATA):
            raise ValueError(f"its metadata hold the unknown field {shown(unknown[0])}")
        if not all(isinstance(text, str) for text in texts.values()):
            raise ValueError("its metadata are not all strings")
        if texts["chat"] not in CHATS:
            raise ValueError(f"its chat format is {shown(texts['chat'])}")

        def stated(key: str) -> dict[str, object]:
            return parse_json_object(texts[key], f"The {key} of {path}")

        config = GemmaConfig.from_json(texts["config"], f"The config of {path}")
        specs, shapes = stated("matrices"), matrix_shapes(config)
        if specs.keys() != shapes.keys():
            raise ValueError("its matrices are not those of its architecture")
        matrices = {name: _read_spec(name, specs[name], shape) for name, shape in shapes.items()}
        tokenizer_bytes = int(texts["tokenizer_bytes"])
        if tokenizer_bytes <= 0:
            raise ValueError("it has no tokenizer")

        layout = _layout(config, tokenizer_bytes, matrices)
        if differing := sorted(layout.keys() ^ header.keys()):
            raise ValueError(f"tensor {shown(differing[0])} is missing or superfluous")
        for name, entry in layout.items():
            if header[name] != entry:
                raise ValueError(f"tensor {name!r} does not lie where it should")
        sha256 = stated("sha256")
        if sha256.keys() != layout.keys() or not all(map(_is_sha256, sha256.values())):
            raise ValueError("its checksums are not one for each tensor")
        end = max(entry["data_offsets"][1] for entry in layout.values())
        if data_start % ALIGNMENT or data_start + end != mapped.size:
            raise ValueError(
                f"it has {mapped.size} bytes, its tensors lie at {data_start} to {data_start + end}"
            )

        lost = texts.get("verification", "")

        def view(name: str) -> NDArray[np.uint8]:
            start, stop = layout[name]["data_offsets"]
            return mapped[data_start + start : data_start + stop]

        sampling_keys = {name: name for name in ("temperature", "top_k", "top_p")}
        return cls(
            config=config,
            chat=texts["chat"],
            sampling=sampling_defaults(Fields(stated("sampling"), str(path)), sampling_keys),
            recipe=texts["recipe"],
            source=texts["source"],
            tokenizer_model=view("tokenizer")[:tokenizer_bytes].tobytes(),
            matrices=matrices,
            path=path,
            size=mapped.size,
            tiles={n: view(n).reshape(packing.n_tiles(m.n_out), -1) for n, m in matrices.items()},
            vectors={n: view(n).view(np.float32)[:size] for n, size in norm_sizes(config).items()},
            tensors={name: view(name) for name in layout},
            sha256=cast(dict[str, str], sha256),
            verification=(
                Verification.from_json(lost, matrices, f"The verification of {path}")
                if lost
                else None
            ),
            state=state,
        )


def _read_spec(name: str, stated: object, shape: tuple[int, int]) -> MatrixSpec:
    """The layout that the metadata state for a matrix. Raises ValueError if it is impossible."""
    match stated:
        case {
            "format": str(fmt),
            "n_out": int(n_out),
            "n_in": int(n_in),
            "group_size": int(group_size),
            "codebook": None | list() as codebook,
        }:
            pass
        case _:
            raise ValueError(f"matrix {name} is not described")
    if (n_out, n_in) != shape:
        raise ValueError(f"matrix {name} is {n_out} x {n_in}, not {shape[0]} x {shape[1]}")
    if fmt not in packing.FORMATS:
        raise ValueError(f"matrix {name} has the unknown format {shown(fmt)}")
    grouped = fmt in packing.CODE_FORMATS
    allowed = [size for size in GROUP_SIZES if n_in % size == 0] if grouped else [0]
    if group_size not in allowed:
        raise ValueError(f"matrix {name} has groups of {group_size}")
    if fmt not in packing.INT4_FORMATS and codebook is not None:
        raise ValueError(f"matrix {name} has a codebook in the format {fmt}")
    if fmt in packing.INT4_FORMATS and not _is_codebook(codebook):
        raise ValueError(f"matrix {name} has no codebook of 16 levels of 8 bits")
    return MatrixSpec(fmt, n_out, n_in, group_size, tuple(codebook) if codebook else None)


def _is_codebook(levels: object) -> bool:
    return (
        isinstance(levels, list)
        and len(levels) == 16
        and all(type(level) is int and -128 <= level <= 127 for level in levels)
    )


def _is_sha256(digest: object) -> bool:
    return isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None


def _read_header(mapped: NDArray[np.uint8], path: Path) -> tuple[dict[str, object], int]:
    """The header of a safetensors file, if it is one of ours, and where its tensors start."""
    length = int.from_bytes(mapped[:8].tobytes(), "little")
    not_ours = GemmaError(
        f"{path} is not a gemma-cli model file; `gemma-cli quantize {path}` makes one from a "
        "checkpoint."
    )
    if mapped.size < 8 or not 2 <= length <= min(_LARGEST_HEADER, mapped.size - 8):
        raise not_ours
    text = mapped[8 : 8 + length].tobytes()
    if not text.startswith(b"{"):
        raise not_ours
    header = parse_json_object(text, f"The header of {path}")
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != "gemma-cli":
        raise not_ours
    if metadata.get("version") != VERSION:
        version = shown(metadata.get("version")).strip("'")
        raise GemmaError(
            f"{path} has version {version} of the model file's format, this "
            f"gemma-cli reads version {VERSION}; convert the checkpoint again."
        )
    if digest := metadata.get("header_sha256"):
        unsealed = text.replace(_header_sha256(str(digest)), _header_sha256(_NO_SHA256))
        if hashlib.sha256(unsealed).hexdigest() != digest:
            raise GemmaError(
                f"{path} is a damaged model file (its header does not have its checksum); convert "
                "the checkpoint again."
            )
    return header, 8 + length
