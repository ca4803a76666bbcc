"""Gemma 1, 2 and 3 in plain NumPy, one function for each equation: the twin of every kernel.

Slow and literal on purpose, and itself tested against transformers (`test_reference.py`). Arrays
are float32 and hold one sequence: `n` tokens, no batch. Weights have the names and the meaning
that `quantize.checkpoint` gives them; norm weights are as applied.

Sources: "Gemma" (arXiv:2403.08295), "Gemma 2" (2408.00118), "Gemma 3 Technical Report"
(2503.19786).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantize.checkpoint import Checkpoint
from quantize.config import GemmaConfig

Array = NDArray[np.float32]
Weights = Mapping[str, Array]
Rounding = Callable[[Array], Array]
"""What is done to heads (n, n_heads, head_dim) before they are multiplied."""


def exact(x: Array) -> Array:
    return x


def rounded(largest: int, norm: float = np.inf) -> Rounding:
    """Codes with one scale for each token and head: up to `largest`, their norm up to `norm`."""

    def rounding(x: Array) -> Array:
        code = np.abs(x).max(axis=-1, keepdims=True) / np.float32(largest)
        code = np.maximum(code, np.linalg.norm(x, axis=-1, keepdims=True) / np.float32(norm))
        return np.rint(x / code) * code

    return rounding


def spread(x: Array) -> Array:
    """Runs of 16 components multiplied by a Hadamard matrix, as many runs as are a power of 2."""
    runs = x.shape[-1] // 16
    size = runs & -runs
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.float32(np.sqrt(2))
    grouped = x.reshape(*x.shape[:-1], runs // size, size, 16)
    return np.einsum("ij,...jk->...ik", matrix, grouped).reshape(x.shape)


class Roundings(NamedTuple):
    queries: Rounding
    keys: Rounding
    values: Rounding


EXACT = Roundings(exact, exact, exact)


NORM = 46_300
"""The square of it is less than 2^31, by enough for what rounding adds."""

ROUNDINGS = {
    "f16": Roundings(rounded(32767, NORM), rounded(32767, NORM), rounded(8191)),
    "int8": Roundings(
        lambda q: rounded(32767, NORM)(spread(q)),
        lambda k: rounded(127)(spread(k)),
        rounded(127),
    ),
}
"""What attention rounds with either kind of cache, besides its weights."""


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight over the last axis (arXiv:1910.07467)."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + np.float32(eps)) * weight


def soft_cap(x: Array, cap: float) -> Array:
    """cap * tanh(x / cap), which stays within ±cap; a cap of 0 is none (Gemma 2, section 2)."""
    return x if cap == 0.0 else np.float32(cap) * np.tanh(x / np.float32(cap))


def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gelu(x: Array) -> Array:
    """The tanh approximation of x * Phi(x) (arXiv:1606.08415, section 2)."""
    inner = np.float32(np.sqrt(2.0 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (np.float32(1.0) + np.tanh(inner))


def rope(x: Array, positions: NDArray[np.int64], base: float, scale: float = 1.0) -> Array:
    """Turn each pair (i, i + head_dim / 2) of `x` by position / scale * base^(-2 i / head_dim).

    `x` is (n, heads, head_dim). Rotary embeddings (arXiv:2104.09864), in the order of halves; the
    scale is position interpolation (2306.15595).
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-np.arange(half) / half)
    angles = (positions / scale)[:, None, None] * frequencies
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def visible(n: int, window: int) -> NDArray[np.bool_]:
    """(n, n): whether query q sees key k, that is q - window < k <= q; a window of 0 is none."""
    q, k = np.arange(n)[:, None], np.arange(n)[None, :]
    return (k <= q) & ((window == 0) | (k > q - window))


def attention(q: Array, k: Array, v: Array, window: int, cap: float) -> Array:
    """Causal attention of scaled queries (n, n_heads, head_dim): (n, n_heads, head_dim).

    Keys and values are (n, n_kv_heads, head_dim); query head h reads key-value head
    h // (n_heads / n_kv_heads) (grouped queries, arXiv:2305.13245).
    """
    n, n_heads, _ = q.shape
    mask = visible(n, window)
    out = np.empty_like(q)
    for h in range(n_heads):
        kv = h * k.shape[1] // n_heads
        scores = soft_cap(q[:, h] @ k[:, kv].T, cap)
        out[:, h] = softmax(np.where(mask, scores, -np.inf).astype(np.float32)) @ v[:, kv]
    return out


def self_attention(
    x: Array, config: GemmaConfig, weights: Weights, layer: int, roundings: Roundings = EXACT
) -> Array:
    """The attention block of a layer, without its norms of the residual: (n, hidden_size)."""
    name = f"layers.{layer}."
    n = len(x)
    q = (x @ weights[name + "attn_q"].T).reshape(n, config.n_heads, config.head_dim)
    k = (x @ weights[name + "attn_k"].T).reshape(n, config.n_kv_heads, config.head_dim)
    v = (x @ weights[name + "attn_v"].T).reshape(n, config.n_kv_heads, config.head_dim)
    if config.has_qk_norm:
        q = rms_norm(q, weights[name + "q_norm"], config.rms_norm_eps)
        k = rms_norm(k, weights[name + "k_norm"], config.rms_norm_eps)
    positions = np.arange(n)
    if config.sliding_layers[layer]:
        base, scale, window = config.rope_local_base, 1.0, config.sliding_window
    else:
        base, scale, window = config.rope_base, config.rope_scale, 0
    q = rope(q, positions, base, scale) * np.float32(config.query_scale)
    k = rope(k, positions, base, scale)
    heads = [rounding(x) for rounding, x in zip(roundings, (q, k, v), strict=True)]
    out = attention(*heads, window, config.attention_soft_cap)
    return out.reshape(n, -1) @ weights[name + "attn_o"].T


def feed_forward(x: Array, weights: Weights, layer: int) -> Array:
    """down(gelu(gate x) * up x) (GeGLU, arXiv:2002.05202): (n, hidden_size)."""
    name = f"layers.{layer}."
    gate, up = x @ weights[name + "ffn_gate"].T, x @ weights[name + "ffn_up"].T
    return (gelu(gate) * up) @ weights[name + "ffn_down"].T


def decoder_layer(
    x: Array, config: GemmaConfig, weights: Weights, layer: int, roundings: Roundings = EXACT
) -> Array:
    """The residual stream (n, hidden_size) after a layer; since Gemma 2 outputs are normed too."""

    def norm(y: Array, which: str) -> Array:
        return rms_norm(y, weights[f"layers.{layer}.{which}"], config.rms_norm_eps)

    y = self_attention(norm(x, "attn_norm"), config, weights, layer, roundings)
    x = x + (norm(y, "post_attn_norm") if config.has_post_norms else y)
    y = feed_forward(norm(x, "ffn_norm"), weights, layer)
    return x + (norm(y, "post_ffn_norm") if config.has_post_norms else y)


def forward(
    config: GemmaConfig,
    weights: Weights,
    ids: Sequence[int] | NDArray[np.int32],
    roundings: Roundings = EXACT,
) -> Array:
    """Logits (n, vocab_size) at every position of `ids`. The embedding is also the output head."""
    x = weights["embed"][np.asarray(ids)] * np.float32(np.sqrt(config.hidden_size))
    for layer in range(config.n_layers):
        x = decoder_layer(x, config, weights, layer, roundings)
    x = rms_norm(x, weights["final_norm"], config.rms_norm_eps)
    return soft_cap(x @ weights["embed"].T, config.final_soft_cap)


def read_weights(checkpoint: Checkpoint) -> Weights:
    """All of a small checkpoint's tensors as float32."""
    return {
        name: tensor.values() if len(tensor.shape) == 1 else tensor.rows(0, tensor.shape[0])
        for name, tensor in checkpoint.tensors.items()
    }
