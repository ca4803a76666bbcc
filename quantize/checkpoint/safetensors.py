"""Hugging Face folders: config.json, safetensors files, a tokenizer.

The format is at https://huggingface.co/docs/safetensors: 8 bytes with the header's length, a JSON
header, then the tensors' bytes without holes. It is parsed here because numpy has no bfloat16, so
that the safetensors package cannot hand out what most checkpoints hold.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantize.checkpoint.architecture import config_from_hf
from quantize.checkpoint.names import complete, from_hugging_face, text_tensors
from quantize.checkpoint.sentencepiece_model import (
    LARGEST_MODEL,
    control_pieces_as_control,
    sentencepiece_from_tokenizer_json,
)
from quantize.checkpoint.source import (
    FLOATS,
    IMAGES_NOTE,
    Checkpoint,
    FloatTensor,
    check_vocabulary,
    file_states,
    map_file,
    read_file,
    sampling_defaults,
)
from quantize.config import Fields, parse_json_object
from quantize.errors import GemmaError, shown

_MAX_HEADER = 25_000_000  # the specification allows 100 MB, that of a 27B takes 0.2
_MAX_DIMS = 8
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """A tensor of a safetensors file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    """Its bytes, a view of the mapped file."""


def read_safetensors(path: Path) -> dict[str, Entry]:
    """The tensors of one file by name, their bytes mapped.

    Raises GemmaError unless the header is what the specification asks for and the tensors tile the
    rest of the file.
    """
    file = map_file(path)

    def damaged(what: str) -> GemmaError:
        return GemmaError(
            f"{path} is not a whole safetensors file: {what}. It is damaged or was not fully"
            " downloaded; get it again."
        )

    if file.size < 8:
        raise damaged(f"it ends after {file.size} bytes")
    header_size = int.from_bytes(file[:8].tobytes(), "little")
    if not 2 <= header_size <= min(_MAX_HEADER, file.size - 8):
        raise damaged(f"its header claims {header_size} bytes of a file of {file.size}")
    header_bytes = file[8 : 8 + header_size].tobytes()
    if not header_bytes.startswith(b"{"):
        raise damaged("its header does not start with '{'")
    header = parse_json_object(header_bytes, f"The header of {path}")
    metadata = header.pop("__metadata__", None)
    if isinstance(metadata, dict) and metadata.get("format") == "gemma-cli":
        raise GemmaError(
            f"{path} is a model file already, of which some of the checkpoint is lost; convert the"
            f" checkpoint itself ({shown(metadata.get('source'))[1:-1]})."
        )
    buffer = file[8 + header_size :]

    spans: list[tuple[int, int, str]] = []
    entries: dict[str, Entry] = {}
    for name, value in header.items():
        match value:
            case {"dtype": str(dtype), "shape": list(dims), "data_offsets": [int(), int()] as span}:
                start, stop = span
            case _:
                raise damaged(f"the header's entry of {shown(name)} is malformed")
        if len(dims) > _MAX_DIMS or not all(
            type(n) is int and 0 <= n < 2**63 for n in (*dims, start, stop)
        ):
            raise damaged(f"{shown(name)} has an impossible shape or offset")
        if not start <= stop <= buffer.size:
            raise damaged(f"{shown(name)} lies at {start} to {stop} of {buffer.size} bytes")
        if dtype in _ITEM_BYTES and math.prod(dims) * _ITEM_BYTES[dtype] != stop - start:
            raise damaged(f"{shown(name)} has {stop - start} bytes for {dims} of {dtype}")
        spans.append((start, stop, name))
        entries[name] = Entry(path, dtype, tuple(dims), buffer[start:stop])

    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise damaged(
                f"{shown(name)} starts at {start} where the tensor before it ends at {end}"
            )
        end = stop
    if end != buffer.size:
        raise damaged(f"its tensors end at {end} of {buffer.size} bytes")
    return entries


def is_in(folder: Path) -> bool:
    """Whether a folder holds the weights of such a checkpoint."""
    return any((folder / name).is_file() for name in (_SINGLE, _INDEX))


def open_hugging_face(folder: Path, file: Path | None = None) -> Checkpoint:
    """A Hugging Face folder, or one of its safetensors files with the folder's other files.

    Raises GemmaError if anything needed is absent, damaged or not Gemma.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        if file:
            read_safetensors(file)  # It may be a model file, which needs none.
        raise GemmaError(
            f"{folder} holds no config.json; give the folder of a Gemma checkpoint from Hugging"
            " Face, or a .gguf file."
        )
    where = str(config_path)
    raw = parse_json_object(read_file(config_path), where)
    config = config_from_hf(raw, where)

    entries = _read_weights(folder, file)
    source = str(file or folder)
    ours, has_images = text_tensors(
        entries, lambda name: from_hugging_face(name, config.generation), source
    )
    tensors = complete(
        {our_name: float_tensor(name, entries[name]) for our_name, name in ours.items()},
        config,
        source,
    )
    tokenizer_model = read_vocabulary(folder)
    check_vocabulary(tokenizer_model, config.vocab_size, str(folder))
    return Checkpoint(
        path=file or folder,
        config=config,
        tensors=complete(tensors, config, source),
        tokenizer_model=tokenizer_model,
        chat="gemma" if has_chat_template(folder) else "base",
        sampling=read_sampling(folder),
        notes=(IMAGES_NOTE,) if has_images or "vision_config" in raw else (),
        files=file_states({entry.path for entry in entries.values()}),
    )


def float_tensor(name: str, entry: Entry) -> FloatTensor:
    """An entry as a SourceTensor. Raises GemmaError if its type is none of `FLOATS`."""
    if entry.dtype not in FLOATS:
        raise GemmaError(
            f"{entry.path} holds {shown(name)} as {shown(entry.dtype)}, which is not supported;"
            " use a checkpoint in BF16, F16 or F32."
        )
    if 0 in entry.shape:  # The other dimensions could be too much for numpy.
        raise GemmaError(
            f"{entry.path} holds {shown(name)}, which has no elements; get the checkpoint again."
        )
    data = entry.data.view(FLOATS[entry.dtype]).reshape(entry.shape)
    return FloatTensor(name, entry.dtype, data)


def _read_weights(folder: Path, file: Path | None) -> Mapping[str, Entry]:
    """All tensors, of one file or of the shards that an index lists."""
    single = file or folder / _SINGLE
    index = folder / _INDEX
    shard_of = read_index(index) if index.is_file() else {}
    if file and file.name not in shard_of.values():
        return read_safetensors(file)
    if not file and single.is_file():
        return read_safetensors(single)
    if not shard_of:
        raise GemmaError(
            f"{folder} holds no {_SINGLE} and no {_INDEX}; give the folder of a complete Gemma"
            " checkpoint in the safetensors format."
        )
    shards = {shard: read_safetensors(folder / shard) for shard in sorted(set(shard_of.values()))}
    entries: dict[str, Entry] = {}
    for name, shard in shard_of.items():
        if name not in shards[shard]:
            raise GemmaError(
                f"{folder / shard} lacks the tensor {shown(name)} that {index.name} places in it;"
                " get both files again."
            )
        entries[name] = shards[shard][name]
    return entries


def read_index(path: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """Tensor names to the files, in the index's own folder, that hold them."""
    weight_map = Fields(parse_json_object(read_file(path), str(path)), str(path)).mapping(
        "weight_map"
    )
    for name, shard in weight_map.values.items():
        # A path could lead out of the folder.
        plain = isinstance(shard, str) and _PLAIN_NAME.fullmatch(shard)
        if not plain or not str(shard).endswith(suffix):
            raise GemmaError(
                f"{path} places {shown(name)} in {shown(shard)}, which is not the plain name of a"
                f" {suffix} file; get the checkpoint from its original source."
            )
    return {name: str(shard) for name, shard in weight_map.values.items()}


def read_vocabulary(folder: Path) -> bytes:
    """The folder's tokenizer as a SentencePiece model. Raises GemmaError if there is none."""
    model, converted = folder / "tokenizer.model", folder / "tokenizer.json"
    if model.is_file():
        return control_pieces_as_control(read_file(model, LARGEST_MODEL), str(model))
    if converted.is_file():
        return sentencepiece_from_tokenizer_json(converted)
    raise GemmaError(
        f"{folder} holds no tokenizer.model and no tokenizer.json; add the one that belongs to the"
        " checkpoint."
    )


def has_chat_template(folder: Path) -> bool:
    """Whether there is one. It is never rendered: a template is a program."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(
        parse_json_object(read_file(path), str(path)).get("chat_template")
    )


def read_sampling(folder: Path) -> dict[str, float]:
    """What the folder's generation_config.json, if there is one, says of sampling."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    names = {name: name for name in ("temperature", "top_k", "top_p")}
    return sampling_defaults(
        Fields(parse_json_object(read_file(path), str(path)), str(path)), names
    )
