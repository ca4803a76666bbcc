"""The architecture of a gemma_pytorch checkpoint: by its config.json, and by the tensors' shapes.

The file holds some fields of GemmaConfig (github.com/google/gemma_pytorch, gemma/config.py), at
times as a Python dict instead of JSON, or is absent. What it leaves open is known by the shapes,
which are different ones in each Gemma.
"""

import ast
import warnings
from collections.abc import Mapping
from pathlib import Path

from quantize.checkpoint.architecture import config_from_hf
from quantize.checkpoint.names import FUSED
from quantize.checkpoint.source import read_file
from quantize.config import Fields, GemmaConfig, parse_json_object
from quantize.errors import GemmaError

Json = dict[str, object]

_LARGEST_CONFIG = 100_000  # that is parsed as Python
_SHORT: Json = {"sliding_window": 512, "max_position_embeddings": 32768}
_LONG: Json = {
    "sliding_window": 1024,
    "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
# By generation, layers and hidden size: what shapes do not tell, in the words of Hugging Face's
# config.json. It is not written there what equals the generation's defaults.
_RELEASED: dict[tuple[str, int, int], Json] = {
    ("gemma", 18, 2048): {"head_dim": 256},  # 2B
    ("gemma", 28, 3072): {"head_dim": 256},  # 7B
    ("gemma2", 26, 2304): {"head_dim": 256},  # 2B
    ("gemma2", 42, 3584): {"head_dim": 256},  # 9B
    ("gemma2", 46, 4608): {"head_dim": 128, "query_pre_attn_scalar": 144},  # 27B
    ("gemma3", 18, 640): {"head_dim": 256} | _SHORT,  # 270M
    ("gemma3", 26, 1152): {"head_dim": 256} | _SHORT,  # 1B
    ("gemma3", 34, 2560): {"head_dim": 256} | _LONG,  # 4B
    ("gemma3", 48, 3840): {"head_dim": 256} | _LONG,  # 12B
    ("gemma3", 62, 5376): {"head_dim": 128, "query_pre_attn_scalar": 168} | _LONG,  # 27B
}
_SAME_KEYS = (
    *("vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_size", "intermediate_size", "head_dim", "rms_norm_eps"),
    *("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar"),
)


def read_config(path: Path) -> Json:
    """A config.json: JSON, or the literal of a Python dict; empty if there is no such file."""
    if not path.is_file():
        return {}
    text = read_file(path)
    try:
        return parse_json_object(text, str(path))
    except GemmaError as no_json:
        if len(text) > _LARGEST_CONFIG:
            raise
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd escapes in strings
                value = ast.literal_eval(text.decode().strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise no_json from None
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return value
        raise


def generation_of(names: Mapping[str, object]) -> str:
    """The generation whose layers have tensors of these names."""
    if any(name.endswith(".query_norm.weight") for name in names):
        return "gemma3"
    if any(name.endswith(".pre_feedforward_layernorm.weight") for name in names):
        return "gemma2"
    return "gemma"


def config_from_shapes(
    generation: str, shapes: Mapping[str, tuple[int, ...]], stated: Json, where: str
) -> GemmaConfig:
    """The architecture that tensors of these shapes have, by our names, and what `stated` adds.

    Raises GemmaError, naming `where`, if they are those of no released Gemma and config.json does
    not say what they leave open.
    """

    def matrix(name: str) -> tuple[int, int]:
        shape = shapes.get(name, ())
        if len(shape) != 2:
            raise GemmaError(f"{where} lacks the matrix {name!r} of a Gemma; get it again.")
        return shape[0], shape[1]

    vocab_size, hidden_size = matrix("embed")
    layers = {int(name.split(".")[1]) for name in shapes if name.startswith("layers.")}
    n_fused, _ = matrix(f"layers.0.{FUSED}")
    _, n_queries = matrix("layers.0.attn_o")
    known = _RELEASED.get((generation, len(layers), hidden_size), {})
    values: Json = {
        "model_type": "gemma3_text" if generation == "gemma3" else generation,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "intermediate_size": matrix("layers.0.ffn_gate")[0],
    }
    values |= known | {key: stated[key] for key in _SAME_KEYS if stated.get(key) is not None}
    if stated.get("sliding_window_size") is not None:
        values["sliding_window"] = stated["sliding_window_size"]
    if stated.get("rope_scaling_factor") is not None:
        values["rope_scaling"] = {"rope_type": "linear", "factor": stated["rope_scaling_factor"]}
    if "head_dim" not in values:
        raise GemmaError(
            f"{where} has the shapes of no released Gemma ({generation}, {len(layers)} layers of"
            f" {hidden_size}); put the config.json that belongs to it beside it."
        )
    head_dim = max(1, Fields(values, where).integer("head_dim"))
    values.setdefault("num_attention_heads", n_queries // head_dim)
    values.setdefault("num_key_value_heads", (n_fused - n_queries) // 2 // head_dim)
    return config_from_hf(values, where)
