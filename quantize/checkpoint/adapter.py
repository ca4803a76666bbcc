"""LoRA adapters in the layout of PEFT, merged into a checkpoint while it is read.

LoRA (arXiv:2106.09685) leaves a matrix W (n_out, n_in) as it was and adds a product of two thin
ones, lora_B (n_out, r) and lora_A (r, n_in), times a scale. PEFT (github.com/huggingface/peft,
src/peft/tuners/lora) keeps these in adapter_model.safetensors and what else there is to know in
adapter_config.json.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantize.checkpoint.names import from_hugging_face, is_of_images
from quantize.checkpoint.safetensors import Entry, float_tensor, read_safetensors
from quantize.checkpoint.source import (
    Checkpoint,
    FloatTensor,
    Grid,
    SourceTensor,
    file_states,
    read_file,
)
from quantize.config import Fields, parse_json_object
from quantize.errors import GemmaError, shown
from quantize.tensors import matrix_shapes

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
# Expressions that cannot take long: no repeated or alternative groups, and few repetitions.
_QUICK = re.compile(r"(?=.{0,300}$)[\w.^$|\\\[\]-]*(?:[*+?][\w.^$|\\\[\]-]*){0,3}", re.ASCII)
# What makes an adapter something else than a sum with B A: other weights beside the two, another
# meaning of them, or another base.
_NOT_LORA = (
    *("use_dora", "modules_to_save", "lora_bias", "fan_in_fan_out", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_qalora"),
    *("use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
# Ways to begin that leave the base as it is; PiSSA, OLoRA, LoftQ and others change it.
_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, eq=False, slots=True)
class MergedTensor:
    """A SourceTensor: a matrix with an adapter's product added."""

    base: SourceTensor
    adapter: Path
    down: FloatTensor
    """lora_A (r, n_in)"""
    up: FloatTensor
    """lora_B (n_out, r)"""
    scale: float

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> str:
        """The sum is in no type of the base's file."""
        return "F32"

    @property
    def nbytes(self) -> int:
        return self.base.nbytes

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """W + scale * B A, as float32, (stop - start, n_in)."""
        up, down = self.up.rows(start, stop), self.down.rows(0, self.down.shape[0])
        # einsum adds in one order everywhere; a BLAS may do so by the number of its threads.
        change: NDArray[np.float32] = np.einsum("or,ri->oi", up, down)
        change *= np.float32(self.scale)
        if not np.isfinite(change).all():
            raise GemmaError(
                f"{self.adapter} changes {self.name!r} by a value that is not a number or infinite;"
                " the adapter is damaged, get it again."
            )
        change += self.base.rows(start, stop)
        return change

    def values(self) -> NDArray[np.float32]:
        """Not for this kind of tensor."""
        raise TypeError(f"{self.name} is a matrix")

    def grid(self, start: int, stop: int) -> Grid | None:
        """None: what was added is not on the base's grid."""
        return None


def merge_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with the adapter in `folder` added to it.

    Raises GemmaError if the adapter is absent, damaged, for another model, or no LoRA whose
    product can be added to attention and feed-forward projections.
    """
    config = _read_config(folder)
    path = folder / _WEIGHTS
    halves: dict[str, dict[str, Entry]] = {}
    modules: dict[str, str] = {}
    has_images = False
    for name, entry in read_safetensors(path).items():
        match = _NAME.fullmatch(name)
        if match and is_of_images(match["module"]):
            has_images = True
            continue
        generation = checkpoint.config.generation
        our_name = from_hugging_face(f"{match['module']}.weight", generation) if match else None
        if match is None or our_name in {None, "embed", "head"}:
            raise _cannot_be_merged(
                path, f"holds {shown(name)}, which is not of a projection's LoRA"
            )
        halves.setdefault(str(our_name), {})[match["half"]] = entry
        modules[str(our_name)] = match["module"]
    if not halves:
        raise GemmaError(f"{path} holds no LoRA matrices for text; get the adapter again.")

    shapes = matrix_shapes(checkpoint.config)
    merged: dict[str, SourceTensor] = {}
    for our_name, pair in halves.items():
        rank, scale = _rank_and_scale(config, modules[our_name])
        n_out, n_in = shapes.get(our_name, (0, 0))
        expected = {"A": (rank, n_in), "B": (n_out, rank)}
        found = {half: entry.shape for half, entry in pair.items()}
        if found != expected:
            raise GemmaError(
                f"{path} has the shapes {found} for {modules[our_name]!r} where the checkpoint and"
                f" {_CONFIG} ask for {expected}; use the adapter of this very model."
            )
        down, up = (float_tensor(f"lora_{half}", pair[half]) for half in "AB")
        merged[our_name] = MergedTensor(checkpoint.tensors[our_name], path, down, up, scale)
    note = f"{folder} has an adapter for images too; it is left out with the image model."
    return replace(
        checkpoint,
        tensors={name: merged.get(name, t) for name, t in checkpoint.tensors.items()},
        origin=f"{checkpoint.name} + {folder.absolute().name}",
        files={**checkpoint.files, **file_states([path])},
        notes=(*checkpoint.notes, note) if has_images else checkpoint.notes,
    )


def _cannot_be_merged(path: Path, why: str) -> GemmaError:
    return GemmaError(
        f"{path} {why}, so that it cannot be merged here; merge it with PEFT's merge_and_unload()"
        " and convert what that saves."
    )


def _read_config(folder: Path) -> Fields:
    path = folder / _CONFIG
    for file in (path, folder / _WEIGHTS):
        if not file.is_file():
            raise GemmaError(
                f"{folder} holds no {file.name}; give the folder of a LoRA adapter that PEFT saved"
                " as safetensors."
            )
    config = Fields(parse_json_object(read_file(path), str(path)), str(path))
    if config.text("peft_type") != "LORA":
        kind = shown(config.text("peft_type"))
        raise _cannot_be_merged(path, f"is of an adapter of the type {kind}")
    for key in _NOT_LORA:
        if config.values.get(key):
            raise _cannot_be_merged(path, f"sets {key!r}")
    if config.text("bias", "none") != "none":
        raise _cannot_be_merged(path, "trains biases")
    if config.values.get("init_lora_weights") not in _KEEP_THE_BASE:
        start = shown(config.values["init_lora_weights"])
        raise _cannot_be_merged(path, f"starts from a changed base ({start})")
    return config


def _rank_and_scale(config: Fields, module: str) -> tuple[int, float]:
    """r and the scale of a module's product: alpha / r, or alpha / sqrt(r) (arXiv:2312.03732)."""

    def of_module(patterns: str, default: str) -> Fields:
        for pattern, value in config.mapping(patterns, {}).values.items():
            if not _QUICK.fullmatch(pattern):
                raise _cannot_be_merged(
                    Path(config.where), f"has an involved expression, {shown(pattern)},"
                )
            try:
                # PEFT's get_pattern_key: a name, the end of one after a dot, or an expression.
                matches = re.fullmatch(rf"(.*\.)?({pattern})", module)
            except (re.error, OverflowError, RecursionError) as error:
                raise config.wrong(patterns, "an object with regular expressions") from error
            if matches:
                return Fields({default: value}, config.where)
        return config

    rank = of_module("rank_pattern", "r").integer("r")
    alpha = of_module("alpha_pattern", "lora_alpha").number("lora_alpha")
    if rank == 0:
        raise config.wrong("r", "a positive integer")
    return rank, alpha / (rank**0.5 if config.values.get("use_rslora") else rank)
