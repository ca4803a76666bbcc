"""Files as torch.save writes them, made without torch, so that any part of one can be wrong."""

import io
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from checkpoints import VOCABULARY, Weights, encode, hf_config, hf_name
from numpy.typing import NDArray

from quantize.checkpoint.sentencepiece_model import sentencepiece_from_gguf
from quantize.config import GemmaConfig

# Opcodes as pickletools names them.
PROTO, STOP, MARK, REDUCE, BUILD, BINPERSID = b"\x80\x02", b".", b"(", b"R", b"b", b"Q"
EMPTY_DICT, EMPTY_TUPLE, TUPLE, SETITEM, NONE, FALSE = b"}", b")", b"t", b"s", b"N", b"\x89"
STORAGES = {"BF16": "BFloat16Storage", "F16": "HalfStorage", "F32": "FloatStorage"} | {
    "I8": "CharStorage",
    "F64": "DoubleStorage",
    "C64": "ComplexFloatStorage",
}


@dataclass
class Tensor:
    """A tensor to be saved: its storage's bytes, and where it lies in it, in items."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    strides: tuple[int, ...] | None = None
    offset: int = 0
    n_items: int | None = None


def global_(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def literal(value: object) -> bytes:
    """Opcodes that push a number, a string or a tuple of them."""
    if isinstance(value, bool):
        return b"\x88" if value else FALSE
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, tuple):
        return MARK + b"".join(map(literal, value)) + TUPLE
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    raise TypeError(value)


def storage(dtype: str, key: str, n_items: int) -> bytes:
    kind = global_(f"torch.{STORAGES[dtype]}")
    id_ = literal("storage") + kind + literal(key) + literal("cpu") + literal(n_items)
    return MARK + id_ + TUPLE + BINPERSID


def tensor(source: bytes, offset: int, shape: object, strides: object) -> bytes:
    """The call that makes a tensor of a storage."""
    arguments = source + literal(offset) + literal(shape) + literal(strides) + FALSE
    hooks = global_("collections.OrderedDict") + EMPTY_TUPLE + REDUCE
    return global_("torch._utils._rebuild_tensor_v2") + MARK + arguments + hooks + TUPLE + REDUCE


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


def dictionary(items: Mapping[str, bytes]) -> bytes:
    pairs = b"".join(literal(key) + value + SETITEM for key, value in items.items())
    return EMPTY_DICT + pairs


def state_dict(tensors: Mapping[str, Tensor]) -> bytes:
    """Opcodes that push an OrderedDict of tensors, whose storages are numbered."""
    items = b"".join(
        literal(name)
        + tensor(
            storage(
                t.dtype,
                str(key),
                t.n_items if t.n_items is not None else int(np.prod(t.shape)),
            ),
            t.offset,
            t.shape,
            t.strides or contiguous(t.shape),
        )
        + SETITEM
        for key, (name, t) in enumerate(tensors.items())
    )
    return global_("collections.OrderedDict") + EMPTY_TUPLE + REDUCE + items


def archive(program: bytes, storages: Mapping[str, bytes], **changes: object) -> bytes:
    """The zip file: `program` between PROTO and STOP, and the storages by key.

    Of `changes`: root, the folder's name; entries, more of them; compressed, names of those that
    are; order, the byte order's name.
    """
    root = changes.get("root", "archive")
    entries = {f"{root}/data.pkl": PROTO + program + STOP}
    entries |= {f"{root}/byteorder": str(changes.get("order", "little")).encode()}
    entries |= {f"{root}/data/{key}": data for key, data in storages.items()}
    entries |= changes.get("entries", {})  # type: ignore[operator]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        for name, data in entries.items():
            packed = name in changes.get("compressed", ())  # type: ignore[operator]
            out.writestr(name, data, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
    return file.getvalue()


def saved(tensors: Mapping[str, Tensor], **changes: object) -> bytes:
    """torch.save({"model_state_dict": tensors})."""
    program = dictionary({"model_state_dict": state_dict(tensors)})
    storages = {str(key): t.data for key, t in enumerate(tensors.values())}
    return archive(program, storages, **changes)


def gemma_pytorch_tensors(
    config: GemmaConfig, weights: Weights, dtype: str = "BF16"
) -> dict[str, Tensor]:
    """A model with the names of gemma_pytorch; norms without their 1."""
    tensors: dict[str, Tensor] = {}

    def add(name: str, values: NDArray[np.float32]) -> None:
        values = values - np.float32(values.ndim == 1)
        tensors[name] = Tensor(dtype, values.shape, encode(values, dtype))

    add("embedder.weight", weights["embed"])
    for name, values in weights.items():
        if name.endswith("attn_q"):
            fused = [weights[name[:-1] + part] for part in "qkv"]
            layer = name.split(".")[1]
            add(f"model.layers.{layer}.self_attn.qkv_proj.weight", np.concatenate(fused))
        elif name != "embed" and not name.endswith(("attn_k", "attn_v")):
            theirs = hf_name(name, config.generation)
            theirs = theirs.replace("q_norm", "query_norm").replace("k_norm", "key_norm")
            add(theirs, values)
    return tensors


def kaggle_config(config: GemmaConfig) -> dict[str, object]:
    """What config.json says at most."""
    values = {k: v for k, v in hf_config(config).items() if k not in ("model_type", "rope_theta")}
    window = values.pop("sliding_window", None)
    return values | {"sliding_window_size": window, "dtype": "bfloat16", "quant": False}


def write_ckpt(
    folder: Path,
    config: GemmaConfig,
    tensors: Mapping[str, Tensor],
    name: str = "gemma-2b-it.ckpt",
) -> Path:
    """A Kaggle folder; config.json is the literal of a Python dict. Gives the .ckpt file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(repr(kaggle_config(config)))
    (folder / "tokenizer.model").write_bytes(sentencepiece_from_gguf(VOCABULARY))
    (folder / name).write_bytes(saved(tensors))
    return folder / name
