"""Tiny random checkpoints, written as their publishers do, for the tests of whatever reads them."""

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from quantize.checkpoint.sentencepiece_model import sentencepiece_from_gguf
from quantize.config import GemmaConfig
from quantize.tensors import tensor_shapes

Json = dict[str, object]
Weights = dict[str, NDArray[np.float32]]

HF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "post_attn_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffn_norm": "post_feedforward_layernorm",
}
GGUF_LAYER = {
    "attn_o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "post_attn_norm": "post_attention_norm",
    "post_ffn_norm": "post_ffw_norm",
}
TOKENS = [
    *("<pad>", "<eos>", "<bos>", "<unk>"),
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *("▁", "a", "b", "ab"),
]
VOCABULARY: Json = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.scores": [0.0] * len(TOKENS),
    "tokenizer.ggml.token_type": [3, 3, 3, 2] + [6] * 256 + [1] * 4,
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.unknown_token_id": 3,
    "tokenizer.ggml.padding_token_id": 0,
}


def tiny(generation: str) -> GemmaConfig:
    """Two layers; the vocabulary has more rows than pieces, as Gemma 3 4B's."""
    first, second, third = (generation == g for g in ("gemma", "gemma2", "gemma3"))
    return GemmaConfig(
        generation=generation,
        vocab_size=272,
        hidden_size=64,
        intermediate_size=96,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        context_length=128,
        rms_norm_eps=2.0**-20,
        query_scale=32**-0.5,
        rope_base=1e6 if third else 1e4,
        rope_scale=1.0,
        rope_local_base=1e4,
        sliding_window=0 if first else 16,
        sliding_layers={"gemma": (False, False), "gemma2": (True, False)}.get(
            generation, (True, True)
        ),
        attention_soft_cap=50.0 if second else 0.0,
        final_soft_cap=30.0 if second else 0.0,
    )


def random_weights(config: GemmaConfig) -> Weights:
    """By our names, norms as applied. Exact in bfloat16, also after the norms' 1 is taken off."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.integers(-64, 64, shape) / 128 + (len(shape) == 1)).astype(np.float32)
        for name, shape in tensor_shapes(config).items()
    }


def hf_name(name: str, generation: str, prefix: str = "model.") -> str:
    """Hugging Face's name for ours."""
    if not name.startswith("layers."):
        return prefix + {"embed": "embed_tokens", "final_norm": "norm"}[name] + ".weight"
    _, layer, part = name.split(".")
    theirs = HF_LAYER[part]
    if generation == "gemma" and part == "ffn_norm":
        theirs = "post_attention_layernorm"
    return f"{prefix}layers.{layer}.{theirs}.weight"


def gguf_name(name: str) -> str:
    """GGUF's name for ours, or for a tensor of another kind."""
    if not name.startswith("layers."):
        return {"embed": "token_embd", "final_norm": "output_norm"}.get(name, name) + ".weight"
    _, layer, part = name.split(".")
    return f"blk.{layer}.{GGUF_LAYER.get(part, part)}.weight"


def hf_config(config: GemmaConfig) -> Json:
    """config.json as transformers 4 writes it."""
    values: Json = {
        "model_type": {"gemma3": "gemma3_text"}.get(config.generation, config.generation),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_base,
    }
    if config.generation != "gemma":
        values |= {
            "query_pre_attn_scalar": config.head_dim,
            "sliding_window": config.sliding_window,
        }
    return values


def gguf_metadata(config: GemmaConfig) -> Json:
    """What llama.cpp's converter writes; it leaves out what llama.cpp assumes."""
    values: Json = {
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "block_count": config.n_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }
    if config.generation == "gemma2":
        values["attn_logit_softcapping"] = config.attention_soft_cap
        values["final_logit_softcapping"] = config.final_soft_cap
    if config.sliding_window:
        values["attention.sliding_window"] = config.sliding_window
    if config.generation == "gemma3":
        values["rope.freq_base"] = config.rope_base
    if config.rope_scale != 1.0:
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = config.rope_scale
    stated = {f"{config.generation}.{key}": value for key, value in values.items()}
    return {"general.architecture": config.generation} | stated


def encode(values: NDArray[np.float32], dtype: str) -> bytes:
    """Values as safetensors keeps them; exact for those of `random_weights`."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def safetensors_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """A file of tensors, each a dtype, a shape and its bytes."""
    header: Json = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(t[2] for t in tensors.values())


def hf_tensors(
    config: GemmaConfig, weights: Weights, dtype: str = "BF16", prefix: str = "model."
) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """A model's tensors for `safetensors_bytes`, norms without their 1."""
    return {
        hf_name(name, config.generation, prefix): (
            dtype,
            values.shape,
            encode(values - np.float32(values.ndim == 1), dtype),
        )
        for name, values in weights.items()
    }


def write_hf(folder: Path, config: GemmaConfig, weights: Weights, dtype: str = "BF16") -> Path:
    """A Hugging Face folder with one safetensors file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    (folder / "tokenizer.model").write_bytes(sentencepiece_from_gguf(VOCABULARY))
    data = safetensors_bytes(hf_tensors(config, weights, dtype))
    (folder / "model.safetensors").write_bytes(data)
    return folder


def write_gguf(
    path: Path,
    config: GemmaConfig,
    weights: Weights,
    dtype: str = "F32",
    metadata: Mapping[str, object] | None = None,
    *,
    tensors_in_a_part: int = 0,
    metadata_alone: bool = False,
) -> Path:
    """A GGUF file, its matrices of the given type (bytes are its blocks already); `metadata` is
    added to the usual. With `tensors_in_a_part`, a split one."""
    writer = gguf.GGUFWriter(
        path,
        config.generation,
        split_max_tensors=tensors_in_a_part,
        small_first_shard=metadata_alone,
    )
    stated = gguf_metadata(config) | VOCABULARY | dict(metadata or {})
    for key, value in stated.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str) and key != "general.architecture":
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
    for name, values in weights.items():
        kind = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else dtype]
        blocks = values if values.dtype == np.uint8 else gguf.quants.quantize(values, kind)
        writer.add_tensor(gguf_name(name), blocks, raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
