"""PyTorch checkpoints: Gemma's own, which Kaggle offers under "PyTorch", and Hugging Face's old.

Gemma's are those of github.com/google/gemma_pytorch (gemma/model.py): a .ckpt file, or shards that
pytorch_model.bin.index.json lists; Q, K and V are one matrix; the "-quant" ones hold int8 weights
and a scale for each row.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from quantize.checkpoint.architecture import config_from_hf
from quantize.checkpoint.gemma_pytorch import config_from_shapes, generation_of, read_config
from quantize.checkpoint.names import (
    FUSED,
    complete,
    from_gemma_pytorch,
    from_hugging_face,
    text_tensors,
)
from quantize.checkpoint.safetensors import (
    has_chat_template,
    read_index,
    read_sampling,
    read_vocabulary,
)
from quantize.checkpoint.source import (
    FLOATS,
    IMAGES_NOTE,
    Checkpoint,
    FloatTensor,
    Grid,
    SourceTensor,
    check_vocabulary,
    file_states,
    widen,
)
from quantize.checkpoint.torch_file import TorchTensor, read_torch
from quantize.errors import GemmaError, shown

SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")
_SINGLE, _INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SCALES = "_scaler"  # follows the name of an int8 matrix
_INSTRUCTION_TUNED = re.compile(r"(?<![a-z0-9])\d+(\.\d+)?[bm][-_]it(?![a-z])", re.IGNORECASE)
_BASE_NOTE = (
    "Nothing says that the checkpoint was taught to chat (no -it in its name): it is converted as"
    " a base model."
)


@dataclass(frozen=True, eq=False, slots=True)
class RowScaledTensor:
    """A SourceTensor of a "-quant" checkpoint: int8 codes, and one scale for each row."""

    name: str
    codes: NDArray[np.int8]
    """(n_out, n_in)"""
    scales: NDArray[np.float32]
    """(n_out,)"""
    exact_scales: NDArray[np.float16] | None
    """The same, if float16 holds every one of them exactly."""

    @property
    def dtype(self) -> str:
        return "I8"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows as float32, (stop - start, n_in)."""
        return self.codes[start:stop] * self.scales[start:stop, None]

    def values(self) -> NDArray[np.float32]:
        """Not for this kind of tensor."""
        raise TypeError(f"{self.name} is a matrix")

    def grid(self, start: int, stop: int) -> Grid | None:
        """Rows with their scale repeated for each block, if it goes into float16 exactly."""
        if self.exact_scales is None:
            return None
        scales = self.exact_scales[start:stop, None]
        return Grid(self.codes[start:stop], np.repeat(scales, self.codes.shape[1] // 32, axis=1))


def is_in(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint."""
    names = ("*.ckpt", _SINGLE, _INDEX)
    return any(file.is_file() for name in names for file in folder.glob(name))


def open_torch(folder: Path, file: Path | None = None) -> Checkpoint:
    """The PyTorch checkpoint in a folder, or one of its files with the folder's other files.

    Raises GemmaError if anything needed is absent, damaged or not Gemma.
    """
    file = file or _only_file(folder)
    where = str(file or folder)
    weights, files = _read_weights(folder, file)
    config_path = folder / "config.json"
    stated = read_config(config_path)
    if any(name.endswith(".qkv_proj.weight") for name in weights):
        rename, generation = from_gemma_pytorch, generation_of(weights)
    else:
        rename = from_hugging_face
        generation = config_from_hf(stated, str(config_path)).generation
    scales = {name + _SCALES for name in weights}
    names = (name for name in weights if name not in scales)
    ours, has_images = text_tensors(names, lambda name: rename(name, generation), where)
    if "model_type" in stated:
        config = config_from_hf(stated, str(config_path))
    else:
        shapes = {our_name: weights[name].data.shape for our_name, name in ours.items()}
        config = config_from_shapes(generation, shapes, stated, where)

    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    tensors: dict[str, SourceTensor] = {}
    for our_name, name in ours.items():
        parts = {our_name: slice(None)}
        if our_name.endswith(FUSED):
            layer = our_name.removesuffix(FUSED)
            parts = {
                f"{layer}attn_q": slice(queries),
                f"{layer}attn_k": slice(queries, queries + keys),
                f"{layer}attn_v": slice(queries + keys, None),
            }
        for part, rows in parts.items():
            tensors[part] = _tensor(name, weights[name], weights.get(name + _SCALES), rows, where)

    tokenizer_model = read_vocabulary(folder)
    check_vocabulary(tokenizer_model, config.vocab_size, str(folder))
    chat = has_chat_template(folder) or _is_named_chat(file or folder)
    notes = [IMAGES_NOTE] if has_images else []
    return Checkpoint(
        path=file or folder,
        config=config,
        tensors=complete(tensors, config, where),
        tokenizer_model=tokenizer_model,
        chat="gemma" if chat else "base",
        sampling=read_sampling(folder),
        notes=tuple(notes if chat else [*notes, _BASE_NOTE]),
        files=file_states(files),
    )


def _only_file(folder: Path) -> Path | None:
    """The folder's one .ckpt file or pytorch_model.bin; None if it has shards with an index."""
    if (folder / _INDEX).is_file():
        return None
    files = sorted(folder.glob("*.ckpt")) or sorted(folder.glob(_SINGLE))
    if len(files) != 1:
        raise GemmaError(
            f"{folder} holds {len(files)} .ckpt files ({', '.join(f.name for f in files)}); give"
            " one of them."
        )
    return files[0]


def _read_weights(folder: Path, file: Path | None) -> tuple[dict[str, TorchTensor], list[Path]]:
    """All tensors, of one file or of the shards that an index lists, and these files."""
    shard_of = read_index(folder / _INDEX, ".bin") if (folder / _INDEX).is_file() else {}
    if file and file.name not in shard_of.values():
        return _state_dict(file), [file]
    weights: dict[str, TorchTensor] = {}
    shards = sorted(set(shard_of.values()))
    for shard in shards:
        found = _state_dict(folder / shard)
        for name in (name for name, place in shard_of.items() if place == shard):
            if name not in found:
                raise GemmaError(
                    f"{folder / shard} lacks the tensor {shown(name)} that {_INDEX} places in it;"
                    " get both files again."
                )
            weights[name] = found[name]
    return weights, [folder / shard for shard in shards]


def _state_dict(path: Path) -> dict[str, TorchTensor]:
    saved = read_torch(path)
    if isinstance(saved, dict):
        saved = saved.get("model_state_dict", saved)
    if isinstance(saved, dict) and saved:
        names, tensors = list(saved), list(saved.values())
        if all(isinstance(n, str) for n in names) and all(
            isinstance(t, TorchTensor) for t in tensors
        ):
            return cast(dict[str, TorchTensor], saved)
    raise GemmaError(
        f"{path} holds no model_state_dict of tensors; use an unmodified checkpoint of Gemma."
    )


def _tensor(
    name: str, tensor: TorchTensor, scales: TorchTensor | None, rows: slice, where: str
) -> SourceTensor:
    """Some rows of a tensor; `scales` are those of all its rows, if it is int8."""
    data = np.atleast_1d(tensor.data)
    if scales is None and tensor.dtype in FLOATS:
        return FloatTensor(name, tensor.dtype, data[rows])
    if scales is None or tensor.dtype != "I8" or scales.dtype not in FLOATS:
        raise GemmaError(
            f"{where} holds {shown(name)} as {tensor.dtype}, which is not supported; use"
            " a checkpoint in BF16, F16 or F32, or Gemma's own in int8 with scales."
        )
    if data.ndim != 2 or scales.data.shape != data.shape[:1]:
        raise GemmaError(
            f"{where} holds {shown(name)} with the shape {data.shape} and scales of"
            f" {scales.data.shape}, not one for each row; get the checkpoint again."
        )
    wide = widen(scales.data[rows], scales.dtype)
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    exact = np.array_equal(half.astype(np.float32), wide)
    return RowScaledTensor(name, data[rows].view(np.int8), wide, half if exact else None)


def _is_named_chat(path: Path) -> bool:
    """Whether the path ends as Gemma's instruction-tuned checkpoints do: gemma-2b-it.ckpt, or
    model.ckpt in gemma-2-2b-it/1 (Kaggle's folders end with a version)."""
    return any(_INSTRUCTION_TUNED.search(part) for part in path.absolute().parts[-3:])
