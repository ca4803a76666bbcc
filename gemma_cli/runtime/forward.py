"""One compiled call for a run of tokens: embedding, every layer, the output head.

For each layer, with x the residual stream in float32:

    x += post_attn_norm(W_o attention(rotate(norm(W_q h)), rotate(norm(W_k h)), W_v h))
    x += post_ffn_norm(W_down (gelu(W_gate h') * W_up h'))

where h = attn_norm(x), h' = ffn_norm(x); Gemma 1 has no post norms, only Gemma 3 normalizes
queries and keys (Gemma 1: arXiv:2403.08295; 2: arXiv:2408.00118; 3: arXiv:2503.19786).
"""

from typing import NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from gemma_cli.runtime import attention, kv_cache, matmul
from gemma_cli.runtime.layers import add, geglu, rms_norm, rotary_angles, rotate, soft_cap
from gemma_cli.runtime.matmul import (
    ADDRESS,
    BF16,
    CODEBOOK,
    F32,
    FORMAT,
    GROUP_SIZE,
    INT8,
    quantize_row,
    tile_bytes,
)
from gemma_cli.runtime.vector import load_byte, load_scalar

# Rows of the table of matrices: these seven for every layer, then the embedding.
Q, K, V, O, GATE, UP, DOWN = range(7)  # noqa: E741
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_o", "ffn_gate", "ffn_up", "ffn_down")

# Columns of the table of norms, a row a layer and one for the final norm in its first column;
# the address of float32 weights, 0 for a norm that the architecture does not have.
ATTN_NORM, Q_NORM, K_NORM, POST_ATTN_NORM, FFN_NORM, POST_FFN_NORM = range(6)
NORMS = ("attn_norm", "q_norm", "k_norm", "post_attn_norm", "ffn_norm", "post_ffn_norm")


class Shape(NamedTuple):
    """What the kernels need to know of a GemmaConfig."""

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    sliding_window: int
    rms_norm_eps: float
    query_scale: float
    rope_base: float
    rope_scale: float
    rope_local_base: float
    attention_soft_cap: float
    final_soft_cap: float


class Weights(NamedTuple):
    """Addresses of everything that is read from the mapping."""

    matrices: NDArray[np.int64]  # (7 n_layers + 1, matmul.N_COLUMNS)
    norms: NDArray[np.int64]  # (n_layers + 1, 6)
    slides: NDArray[np.bool_]  # (n_layers,)


class Scratch(NamedTuple):
    """Intermediate values of a chunk; flat buffers are cut to (n_tokens, width) where used."""

    x: NDArray[np.float32]  # (chunk, hidden_size), the residual stream
    inputs: NDArray[np.float32]  # chunk * the widest matrix input
    codes: NDArray[np.int8]  # the same, rounded by quantize_row
    scales: NDArray[np.float32]  # 1/32 of it
    sums: NDArray[np.int32]  # 1/32 of it
    outputs: NDArray[np.float32]  # chunk * the widest set of matrix outputs
    queries: NDArray[np.float32]  # (chunk, n_heads, head_dim)
    angles: NDArray[np.float32]  # (2 global or sliding, 2 cos or sin, chunk, head_dim / 2)
    attention: NDArray[np.float32]  # (n_threads, attention.scratch_size)


@njit
def _weight(table, row, column, stride):
    """Element (row, column) of a matrix of the table; `stride` is its tile_bytes."""
    tile, r = table[ADDRESS] + row // 16 * stride, row % 16
    fmt = table[FORMAT]
    if fmt == F32:
        return load_scalar(tile + 64 * column + 4 * r)
    if fmt == BF16:
        bits = (
            load_byte(tile + 32 * column + 2 * r) | load_byte(tile + 32 * column + 2 * r + 1) << 8
        )
        return np.uint32(bits << 16).view(np.float32)
    group, within = column // table[GROUP_SIZE], column % table[GROUP_SIZE]
    run, i = within // 32, within % 32
    wide = 512 if fmt == INT8 else 256
    block = tile + group * (32 + table[GROUP_SIZE] // 32 * wide)
    scale = np.uint16(load_byte(block + 2 * r) | load_byte(block + 2 * r + 1) << 8)
    body = block + 32 + run * wide
    if fmt == INT8:
        code = load_byte(body + 64 * (i // 4) + 4 * r + i % 4) - 128
    else:
        byte = load_byte(body + 64 * (i % 16 // 4) + 4 * r + i % 4)
        code = load_byte(table[CODEBOOK] + (byte & 15 if i < 16 else byte >> 4)) - 128
    return np.float32(code) * _half(scale)


@njit
def _half(bits):
    """The value of a float16 given as its bits."""
    fraction, exponent = np.float32(bits & 0x3FF), np.int64(bits >> 10 & 0x1F)
    sign = np.float32(-1.0 if bits & 0x8000 else 1.0)
    if exponent == 0:
        return sign * fraction * np.float32(2.0**-24)
    return sign * (fraction + np.float32(1024)) * np.float32(2.0 ** (exponent - 25))


@njit
def embed(table, token, factor, x):
    """x = the token's row of the embedding, times factor; x: float32 (hidden_size,)."""
    stride = tile_bytes(table)
    for i in range(x.size):
        x[i] = _weight(table, token, i, stride) * factor


@njit
def _quantize(inputs, codes, scales, sums, t):
    quantize_row(inputs[t], codes[t], scales[t], sums[t])


@njit(parallel=True)
def _normalize_rows(x, weight, eps, inputs, codes, scales, sums):
    """A norm of every token, and its rounding for the matrices that follow."""
    for t in prange(x.shape[0]):
        rms_norm(x[t], weight, eps, inputs[t])
        _quantize(inputs, codes, scales, sums, t)


@njit(parallel=True)
def _quantize_rows(inputs, codes, scales, sums):
    for t in prange(inputs.shape[0]):
        _quantize(inputs, codes, scales, sums, t)


@njit(parallel=True)
def _geglu_rows(gate_up, inputs, codes, scales, sums):
    for t in prange(inputs.shape[0]):
        geglu(gate_up[t], inputs[t])
        _quantize(inputs, codes, scales, sums, t)


@njit(parallel=True)
def _add_rows(x, y, weight, eps):
    """x += y, after y's own norm if there is one."""
    for t in prange(x.shape[0]):
        if weight:
            rms_norm(y[t], weight, eps, y[t])
        add(x[t], y[t])


@njit(parallel=True)
def _place_rows(s, qkv, norms, cos, sin, cache, is_int8, position, queries):
    """Queries normalized, rotated, scaled; keys normalized, rotated and stored; values stored."""
    d = s.head_dim
    for t in prange(qkv.shape[0]):
        slot = (position + t) % cache[kv_cache.CAPACITY]
        for h in range(s.n_heads):
            query = queries[t, h]
            query[:] = qkv[t, h * d : (h + 1) * d]
            if norms[Q_NORM]:
                rms_norm(query, norms[Q_NORM], s.rms_norm_eps, query)
            rotate(query, cos[t], sin[t], np.float32(s.query_scale))
        for h in range(s.n_kv_heads):
            start = (s.n_heads + h) * d
            key = qkv[t, start : start + d]
            if norms[K_NORM]:
                rms_norm(key, norms[K_NORM], s.rms_norm_eps, key)
            rotate(key, cos[t], sin[t], np.float32(1))
            attention.store_head(
                key,
                s.n_kv_heads,
                h,
                slot,
                is_int8,
                cache[kv_cache.KEYS],
                cache[kv_cache.KEY_SCALES],
            )
            start += s.n_kv_heads * d
            attention.store_head(
                qkv[t, start : start + d],
                s.n_kv_heads,
                h,
                slot,
                is_int8,
                cache[kv_cache.VALUES],
                cache[kv_cache.VALUE_SCALES],
            )


@njit
def _rows(flat, n_tokens, width):
    return flat[: n_tokens * width].reshape(n_tokens, width)


@njit(cache=True)
def forward(s, weights, cache, is_int8, scratch, tokens, position, logits, n_threads):
    """Runs tokens that follow each other and appends them to the cache.

    s: Shape; cache: the KVCache's table, int8 or float16; tokens: int32 (n_tokens,), at most a
    chunk; position: of the first. logits: float32 (n_last, 16 tiles of the vocabulary), filled for
    the last n_last tokens.
    """
    n, hidden, n_last = tokens.size, s.hidden_size, logits.shape[0]
    matrices, last = weights.matrices, 7 * s.n_layers
    x = scratch.x[:n]
    for t in range(n):
        embed(matrices[last], tokens[t], np.float32(np.sqrt(hidden)), x[t])
        for kind in range(2):
            rotary_angles(
                position + t,
                s.rope_local_base if kind else s.rope_base,
                1.0 if kind else s.rope_scale,
                scratch.angles[kind, 0, t],
                scratch.angles[kind, 1, t],
            )
    inputs = _rows(scratch.inputs, n, hidden)
    codes = _rows(scratch.codes, n, hidden)
    scales, sums = _rows(scratch.scales, n, hidden // 32), _rows(scratch.sums, n, hidden // 32)

    heads = s.n_heads * s.head_dim
    mixed = _rows(scratch.inputs, n, heads)
    mixed_codes = _rows(scratch.codes, n, heads)
    mixed_scales = _rows(scratch.scales, n, heads // 32)
    mixed_sums = _rows(scratch.sums, n, heads // 32)

    ffn = s.intermediate_size
    gated = _rows(scratch.inputs, n, ffn)
    gated_codes = _rows(scratch.codes, n, ffn)
    gated_scales, gated_sums = (
        _rows(scratch.scales, n, ffn // 32),
        _rows(scratch.sums, n, ffn // 32),
    )

    qkv = _rows(scratch.outputs, n, (s.n_heads + 2 * s.n_kv_heads) * s.head_dim)
    gate_up = _rows(scratch.outputs, n, 2 * ffn)
    y = _rows(scratch.outputs, n, hidden)
    queries = scratch.queries[:n]

    for layer in range(s.n_layers):
        w, norms = matrices[7 * layer : 7 * layer + 7], weights.norms[layer]
        slides = weights.slides[layer]
        angles = scratch.angles[1 if slides else 0]
        _normalize_rows(x, norms[ATTN_NORM], s.rms_norm_eps, inputs, codes, scales, sums)
        matmul.matmul(w[Q : V + 1], inputs, codes, scales, sums, qkv, n_threads)
        _place_rows(s, qkv, norms, angles[0], angles[1], cache[layer], is_int8, position, queries)
        attention.attend(
            queries,
            position,
            cache[layer],
            s.n_kv_heads,
            s.sliding_window if slides else 0,
            s.attention_soft_cap,
            is_int8,
            scratch.attention,
            mixed.reshape(n, s.n_heads, s.head_dim),
            n_threads,
        )
        _quantize_rows(mixed, mixed_codes, mixed_scales, mixed_sums)
        matmul.matmul(w[O : O + 1], mixed, mixed_codes, mixed_scales, mixed_sums, y, n_threads)
        _add_rows(x, y, norms[POST_ATTN_NORM], s.rms_norm_eps)
        _normalize_rows(x, norms[FFN_NORM], s.rms_norm_eps, inputs, codes, scales, sums)
        matmul.matmul(w[GATE : UP + 1], inputs, codes, scales, sums, gate_up, n_threads)
        _geglu_rows(gate_up, gated, gated_codes, gated_scales, gated_sums)
        matmul.matmul(
            w[DOWN : DOWN + 1], gated, gated_codes, gated_scales, gated_sums, y, n_threads
        )
        _add_rows(x, y, norms[POST_FFN_NORM], s.rms_norm_eps)

    if n_last:
        first = n - n_last
        final = weights.norms[s.n_layers, 0]
        _normalize_rows(
            x[first:],
            final,
            s.rms_norm_eps,
            inputs[first:],
            codes[first:],
            scales[first:],
            sums[first:],
        )
        head = matrices[last : last + 1]
        matmul.matmul(
            head, inputs[first:], codes[first:], scales[first:], sums[first:], logits, n_threads
        )
        if s.final_soft_cap > 0:
            for t in range(n_last):
                soft_cap(logits[t], s.final_soft_cap)
