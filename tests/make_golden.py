"""Make `tests/golden/`: small random Gemmas and what transformers computes with them.

Not a test. It needs torch and transformers; the tests that read what it leaves do not:

    python tests/make_golden.py

Each folder is a checkpoint as it is published (bfloat16 safetensors, `config.json` with the keys
of the published ones, a SentencePiece model) and `golden.npz`, computed in float32 from the
bfloat16 weights:

    prompt_ids   (n,) int32
    logits       (n, vocab_size) float32, at every position of the prompt
    greedy_ids   (64,) int32, the greedy continuation
    greedy_gaps  (64,) float32, by how much each of them beats the second best
"""

from __future__ import annotations

import io
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GemmaConfig

GOLDEN = Path(__file__).parent / "golden"
N_PROMPT = 48  # six times the sliding window
N_GREEDY = 64
WORDS = "a an at can eat ham hen in inn it lane let man mat men met net on one plan so ten the tin"

COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "initializer_range": 0.02,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
GEMMA = COMMON | {
    "architectures": ["GemmaForCausalLM"],
    "hidden_act": "gelu",  # as published; the tanh approximation is meant
    "hidden_activation": None,
    "model_type": "gemma",
    "rope_scaling": None,
    "rope_theta": 10000.0,
}
GEMMA2 = COMMON | {
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 2.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 5.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma2",
    "rope_theta": 10000.0,
    "sliding_window": 8,
}
GEMMA3 = COMMON | {
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma3_text",
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "sliding_window": 8,
}


@dataclass(frozen=True)
class Recipe:
    """A checkpoint to make: its `config.json` and how it is written."""

    name: str
    config: dict[str, object]
    n_pieces: int
    shard_size: str = "1GB"


def shape(
    *, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int
) -> dict[str, object]:
    return {
        "head_dim": head_dim,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


RECIPES = (
    # One key-value head, heads wider than hidden_size / heads, a vocabulary that fills no tile.
    Recipe(
        "gemma-mqa",
        GEMMA | shape(vocab=297, hidden=64, inner=64, layers=2, heads=4, kv_heads=1, head_dim=32),
        n_pieces=297,
    ),
    # Every head its own keys and values.
    Recipe(
        "gemma-mha",
        GEMMA | shape(vocab=288, hidden=64, inner=64, layers=2, heads=2, kv_heads=2, head_dim=32),
        n_pieces=288,
    ),
    # Both soft caps, window and global layers, an odd number of heads, a scale of its own.
    Recipe(
        "gemma2-odd",
        GEMMA2
        | {"query_pre_attn_scalar": 20}
        | shape(vocab=290, hidden=96, inner=64, layers=2, heads=3, kv_heads=1, head_dim=32),
        n_pieces=290,
    ),
    # Groups of two heads, three of them; heads of 16.
    Recipe(
        "gemma2-gqa",
        GEMMA2
        | {"query_pre_attn_scalar": 16}
        | shape(vocab=288, hidden=96, inner=32, layers=2, heads=6, kv_heads=3, head_dim=16),
        n_pieces=288,
    ),
    # Two rope bases, the global one's positions divided by 8; norms of queries and keys. Like the
    # published 4B, the embedding has more rows than the tokenizer has pieces.
    Recipe(
        "gemma3-linear",
        GEMMA3
        | {"query_pre_attn_scalar": 12, "sliding_window_pattern": 2}
        | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
        | shape(vocab=320, hidden=64, inner=96, layers=2, heads=4, kv_heads=1, head_dim=32),
        n_pieces=300,
    ),
    # Layers named one by one, like the published 270M, no scaling; an epsilon that can be seen;
    # written in shards.
    Recipe(
        "gemma3-shards",
        GEMMA3
        | {"query_pre_attn_scalar": 16, "rms_norm_eps": 0.05, "rope_scaling": None}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | shape(vocab=288, hidden=32, inner=64, layers=3, heads=4, kv_heads=2, head_dim=16),
        n_pieces=288,
        shard_size="40KB",
    ),
)
CONFIGS = {"gemma": GemmaConfig, "gemma2": Gemma2Config, "gemma3_text": Gemma3TextConfig}


def train_tokenizer(n_pieces: int) -> bytes:
    """A SentencePiece model with Gemma's settings: byte fallback, no prefix, spaces kept."""
    words = WORDS.split()
    choose = random.Random(1)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(choose.choices(words, k=12)) for _ in range(400)),
        model_writer=model,
        model_type="bpe",
        vocab_size=n_pieces,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights that leave no part without effect: norms far from 1, logits and attention uneven.

    The final norm's weights have both signs. Otherwise the embedding, which is also the output
    head, would have every token predict itself.
    """
    noise = np.random.default_rng(seed)
    for name, weight in sorted(model.named_parameters()):
        if name == "model.norm.weight":
            mean, spread = -1.0, 1.0
        elif weight.ndim == 1:
            mean, spread = 0.3, 0.4
        elif "embed_tokens" in name:
            mean, spread = 0.0, 2.0 * weight.shape[1] ** -0.5
        else:
            mean, spread = 0.0, 1.5 * weight.shape[1] ** -0.5
        values = mean + spread * noise.standard_normal(tuple(weight.shape), dtype=np.float32)
        weight.data = torch.from_numpy(values).to(torch.bfloat16)


def golden(folder: Path, vocab_size: int, seed: int) -> dict[str, np.ndarray]:
    """What transformers computes with the checkpoint in `folder`, read as float32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompt = np.random.default_rng(seed).integers(4, vocab_size, N_PROMPT)
    prompt[0] = 2  # <bos>
    ids = prompt.tolist()
    gaps = []
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        last = logits[-1]
        for _ in range(N_GREEDY):
            best, second = torch.topk(last, 2).values.tolist()
            gaps.append(best - second)
            ids.append(int(last.argmax()))
            last = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return {
        "prompt_ids": np.array(ids[:N_PROMPT], np.int32),
        "logits": logits.numpy(),
        "greedy_ids": np.array(ids[N_PROMPT:], np.int32),
        "greedy_gaps": np.array(gaps, np.float32),
    }


def make(recipe: Recipe, seed: int) -> None:
    folder = GOLDEN / recipe.name
    shutil.rmtree(folder, ignore_errors=True)
    config = CONFIGS[str(recipe.config["model_type"])].from_dict(recipe.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    randomize(model, seed)
    model.save_pretrained(folder, max_shard_size=recipe.shard_size)
    (folder / "config.json").write_text(json.dumps(recipe.config, indent=2, sort_keys=True) + "\n")
    sampling = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "top_k": 64, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(sampling, indent=2) + "\n")
    (folder / "tokenizer.model").write_bytes(train_tokenizer(recipe.n_pieces))
    result = golden(folder, int(str(recipe.config["vocab_size"])), seed)
    np.savez(folder / "golden.npz", **result)
    print(
        f"{recipe.name}: {sum(f.stat().st_size for f in folder.iterdir()) // 1000} kB, "
        f"logits' spread {result['logits'].std():.2f}, "
        f"{len(set(result['greedy_ids'].tolist()))} different greedy ids, "
        f"median gap {np.median(result['greedy_gaps']):.3f}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for i, recipe in enumerate(RECIPES):
        make(recipe, seed=i + 11)
