"""GGUF files, as llama.cpp writes them.

The format is specified in ggml's docs/gguf.md: magic, version, counts; metadata; tensor infos; then
the tensors, each padded to the alignment. It is parsed here because the gguf package takes half a
minute over a vocabulary of 262,144 pieces and fails on a malformed file in ways of its own; that
package dequantizes.
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from quantize.checkpoint.architecture import config_from_gguf
from quantize.checkpoint.names import complete, from_gguf, text_tensors
from quantize.checkpoint.sentencepiece_model import sentencepiece_from_gguf
from quantize.checkpoint.source import (
    IMAGES_NOTE,
    Checkpoint,
    Grid,
    SourceTensor,
    check_vocabulary,
    file_states,
    map_file,
    sampling_defaults,
)
from quantize.config import Fields
from quantize.errors import GemmaError, shown

MAGIC = b"GGUF"
_SUPPORTED = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K"),
    *("Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
_PART_NAME = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
_ALIGNMENT = 32
_MAX_DIMS = 4
# Parsed, what takes a byte can take 60 in memory. Gemma 3 has 800,000 values, 40 keys, up to 1247
# tensors and 7 MB of metadata.
_MAX_VALUES = 2_000_000
_MAX_KEYS = _MAX_TENSORS = 1 << 16
_LARGEST_STRING = 16 << 20
_LARGEST_METADATA = 50_000_000
# The format's value types.
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "u1"} | {
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True, eq=False, slots=True)
class GGUFTensor:
    """A SourceTensor of any of ggml's types that are supported."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    data: NDArray[np.uint8]
    """(n_rows, bytes of a row)"""

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows as float32, (stop - start, n_in)."""
        raw = self.data[start:stop]
        n_rows, row_bytes = raw.shape
        # dequantize works on 16 rows at a time; blocks know no rows, so make short ones longer.
        raw = np.ascontiguousarray(raw).reshape(-1, row_bytes * math.gcd(n_rows, 8))
        wide: NDArray[np.float32] = dequantize(raw, GGMLQuantizationType[self.dtype])
        if not wide.flags.writeable:
            # F32 is a view of the file.
            wide = wide.copy()
        return wide.reshape(n_rows, self.shape[-1])

    def values(self) -> NDArray[np.float32]:
        """A vector as float32; GGUF's norms have their 1 added."""
        return self.rows(0, 1).reshape(-1)

    def grid(self, start: int, stop: int) -> Grid | None:
        """The codes and scales of rows, None unless the type is Q4_0, Q5_0, Q8_0 or IQ4_NL.

        A block of 32 starts with its float16 scale. Of 4-bit codes, the low nibbles of 16 bytes are
        the first half; of 5-bit ones, the fifth bits come before, as a uint32.
        """
        if self.dtype not in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL"):
            return None
        raw = self.data[start:stop]
        n_rows, n_blocks = len(raw), self.shape[-1] // 32
        blocks = raw.reshape(n_rows, n_blocks, -1)
        scales = np.ascontiguousarray(blocks[:, :, :2]).view("<f2").reshape(n_rows, n_blocks)
        if self.dtype == "Q8_0":
            codes = np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8)
            return Grid(codes.reshape(n_rows, -1), scales.astype(np.float16, copy=False))
        codes = np.empty((n_rows, n_blocks, 32), dtype=np.int8)
        nibbles = blocks[:, :, -16:]
        np.bitwise_and(nibbles, 15, out=codes[:, :, :16].view(np.uint8))
        np.right_shift(nibbles, 4, out=codes[:, :, 16:].view(np.uint8))
        if self.dtype == "Q4_0":
            codes -= 8
        if self.dtype == "Q5_0":
            fifth = np.unpackbits(blocks[:, :, 2:6], axis=-1, bitorder="little")
            codes |= (fifth << 4).view(np.int8)
            codes -= 16
        return Grid(codes.reshape(n_rows, -1), scales.astype(np.float16, copy=False))


class _Cursor:
    """Reads a mapped file from its start, never past its end."""

    def __init__(self, path: Path, file: NDArray[np.uint8]) -> None:
        self.path = path
        self.file = file.data
        self.position = 0
        self._values_left = _MAX_VALUES

    def damaged(self, what: str) -> GemmaError:
        return GemmaError(
            f"{self.path} is not a whole GGUF file: {what}. It is damaged or was not fully"
            " downloaded; get it again."
        )

    def take(self, size: int) -> memoryview:
        end = self.position + size
        if end > len(self.file):
            raise self.damaged(f"{size} bytes are due at {self.position} of {len(self.file)}")
        if end > _LARGEST_METADATA:
            raise self.damaged(f"its metadata take more than {_LARGEST_METADATA} bytes")
        taken = self.file[self.position : end]
        self.position = end
        return taken

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """As many strings, each a length of 8 bytes and its UTF-8."""
        file, position = self.file, self.position
        end = min(len(file), _LARGEST_METADATA)
        length = struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                start = position + 8
                n_bytes = length(file, position)[0]
                position = start + n_bytes
                if position > end or n_bytes > _LARGEST_STRING:
                    raise self.damaged(f"a string of {n_bytes} bytes begins at {start} of {end}")
                strings.append(str(file[start:position], "utf-8"))
        except (struct.error, UnicodeDecodeError) as error:
            raise self.damaged(f"there is no string at {position}") from error
        self.position = position
        return strings

    def values(self, kind: int, count: int) -> list[object]:
        self._values_left -= count
        if self._values_left < 0:
            raise self.damaged(f"its metadata hold more than {_MAX_VALUES} values")
        if kind == _STRING:
            return list(self.strings(count))
        if kind not in _SCALARS:
            raise self.damaged(f"there is no value type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        numbers = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind == _BOOL:
            numbers = numbers != 0
        return list(numbers.tolist())


def read_gguf(path: Path) -> tuple[dict[str, object], dict[str, GGUFTensor]]:
    """A file's metadata (arrays as lists) and its tensors by name, their bytes mapped.

    Raises GemmaError unless the file is whole, without duplicates, and its tensors follow each
    other in order, as llama.cpp demands too.
    """
    file = map_file(path)
    cursor = _Cursor(path, file)
    if file[:4].tobytes() != MAGIC:
        raise cursor.damaged("it does not start with 'GGUF'")
    cursor.take(4)
    version = cursor.u32()
    if version not in (2, 3):
        raise GemmaError(
            f"{path} is a GGUF file of version {version} (or big-endian); versions 2 and 3 are"
            " supported, convert it with a current llama.cpp."
        )
    n_tensors, n_keys = cursor.u64(), cursor.u64()
    if n_tensors > _MAX_TENSORS or n_keys > _MAX_KEYS:
        raise cursor.damaged(f"it claims {n_tensors} tensors and {n_keys} keys")

    metadata: dict[str, object] = {}
    for _ in range(n_keys):
        key = cursor.string()
        if key in metadata:
            raise cursor.damaged(f"it states {shown(key)} twice")
        kind = cursor.u32()
        if kind == _ARRAY:
            kind, count = cursor.u32(), cursor.u64()
            metadata[key] = cursor.values(kind, count)
        else:
            metadata[key] = cursor.values(kind, 1)[0]
    alignment = Fields(metadata, str(path)).integer("general.alignment", _ALIGNMENT)
    if alignment == 0 or alignment & (alignment - 1):
        raise cursor.damaged(f"its alignment is {alignment}")

    infos = []
    for _ in range(n_tensors):
        name, n_dims = cursor.string(), cursor.u32()
        if n_dims > _MAX_DIMS:
            raise cursor.damaged(f"{shown(name)} has {n_dims} dimensions")
        # The innermost dimension comes first in the file.
        shape = tuple(cursor.u64() for _ in range(n_dims))[::-1]
        infos.append((name, shape, cursor.u32(), cursor.u64()))

    data = file[-(-cursor.position // alignment) * alignment :]
    tensors: dict[str, GGUFTensor] = {}
    end = 0
    for name, shape, kind, start in infos:
        if name in tensors:
            raise cursor.damaged(f"it holds {shown(name)} twice")
        if kind not in GGMLQuantizationType.__members__.values():
            raise cursor.damaged(f"{shown(name)} is of the unknown type {kind}")
        dtype = GGMLQuantizationType(kind)
        block_size, block_bytes = GGML_QUANT_SIZES[dtype]
        n_in = shape[-1] if shape else 1
        if n_in % block_size or 0 in shape:
            raise cursor.damaged(f"{shown(name)} of type {dtype.name} has the shape {shape}")
        row_bytes = n_in // block_size * block_bytes
        nbytes = math.prod(shape[:-1]) * row_bytes
        if start != end or start + nbytes > data.size:
            raise cursor.damaged(
                f"{shown(name)} lies at {start} to {start + nbytes} of {data.size} bytes, the"
                f" tensors before it take {end}"
            )
        rows = data[start : start + nbytes].reshape(-1, row_bytes)
        tensors[name] = GGUFTensor(name, shape, dtype.name, nbytes, rows)
        end = start + -(-nbytes // alignment) * alignment
    if data.size > end:
        raise cursor.damaged(f"its tensors end at {end} of {data.size} bytes")
    return metadata, tensors


def _read_parts(path: Path) -> tuple[dict[str, object], dict[str, GGUFTensor], list[Path]]:
    """The first part's metadata, the tensors of all parts, and these, if `path` is part of a split
    file.

    llama.cpp (llama-gguf-split) names the parts NAME-00001-of-00003.gguf and numbers them from 0
    in the key split.no. Raises GemmaError if one is missing or does not belong to the others.
    """
    metadata, tensors = read_gguf(path)
    count = Fields(metadata, str(path)).integer("split.count", 1)
    if count <= 1:
        return metadata, tensors, [path]
    name = _PART_NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise GemmaError(
            f"{path} is one of {count} parts of a GGUF file, but is not named"
            f" NAME-00001-of-{count:05d}.gguf, so that the others cannot be found; give the parts"
            " their names back."
        )
    names = [f"{name['stem']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    paths = [path.with_name(part) for part in names]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise GemmaError(
            f"{path} is one of {count} parts of a GGUF file, and {len(missing)} are missing"
            f" ({missing[0]}{', …' if len(missing) > 1 else ''}); put them beside it."
        )
    parts = [(metadata, tensors) if part == path else read_gguf(part) for part in paths]
    total = Fields(metadata, str(path)).integer("split.tensors.count", 0)
    joined: dict[str, GGUFTensor] = {}
    for i, (part, (keys, some)) in enumerate(zip(paths, parts, strict=True)):
        stated = Fields(keys, str(part))
        said = [stated.integer(f"split.{key}", 0) for key in ("no", "count", "tensors.count")]
        if said != [i, count, total] or some.keys() & joined:
            raise GemmaError(
                f"{part} does not belong to the other parts of {path}; get all of them again from"
                " one place."
            )
        joined |= some
    if total and len(joined) != total:
        raise GemmaError(
            f"{path} and its other parts hold {len(joined)} tensors where they claim {total}; get"
            " all of them again from one place."
        )
    return parts[0][0], joined, paths


def open_gguf(path: Path) -> Checkpoint:
    """A GGUF file, or all parts of a split one of which one is given.

    Raises GemmaError if it is damaged, incomplete, not Gemma or of an unsupported type.
    """
    metadata, found, files = _read_parts(path)
    embedding = found.get("token_embd.weight")
    vocab_size = embedding.shape[0] if embedding and embedding.shape else 1
    config = config_from_gguf(metadata, str(path), vocab_size=vocab_size)
    ours, has_images = text_tensors(found, from_gguf, str(path))
    tensors: dict[str, SourceTensor] = {}
    for our_name, name in ours.items():
        tensor = found[name]
        if tensor.dtype not in _SUPPORTED:
            raise GemmaError(
                f"{path} holds {name!r} as {tensor.dtype}, which is not supported; use a file with"
                " another quantization, for instance Q4_K_M or Q8_0."
            )
        tensors[our_name] = tensor
    tensors = complete(tensors, config, str(path))
    tokenizer_model = sentencepiece_from_gguf(metadata, str(path))
    check_vocabulary(tokenizer_model, config.vocab_size, str(path))
    keys = {
        "temperature": "general.sampling.temp",
        "top_k": "general.sampling.top_k",
        "top_p": "general.sampling.top_p",
    }
    return Checkpoint(
        path=path,
        config=config,
        tensors=tensors,
        tokenizer_model=tokenizer_model,
        chat="gemma" if metadata.get("tokenizer.chat_template") else "base",
        sampling=sampling_defaults(Fields(metadata, str(path)), keys),
        notes=(IMAGES_NOTE,) if has_images else (),
        files=file_states(files),
    )
