"""One compiled call for a run of tokens: embedding, every layer, the output head.

For each layer, with x the residual stream in float32:

    x += post_attn_norm(W_o attention(rotate(norm(W_q h)), rotate(norm(W_k h)), W_v h))
    x += post_ffn_norm(W_down (gelu(W_gate h') * W_up h'))

where h = attn_norm(x), h' = ffn_norm(x); Gemma 1 has no post norms, only Gemma 3 normalizes
queries and keys (Gemma 1: arXiv:2403.08295; 2: arXiv:2408.00118; 3: arXiv:2503.19786).

Of the last layer, tokens whose logits are not wanted need keys and values alone: while a prompt is
read, that is nearly all of them, and the rest of this layer is left out for them.
"""

import math

import numpy as np

from gemma_cli.runtime import attention, attention_amx, head, isa, kv_cache, matmul
from gemma_cli.runtime.embedding import embed
from gemma_cli.runtime.inputs import round_inputs, some_inputs
from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.layers import add, geglu, rms_norm, rotary_angles, rotate, soft_cap
from gemma_cli.runtime.tables import (
    ATTN_NORM,
    DOWN,
    FFN_NORM,
    FORMAT,
    GATE,
    K_NORM,
    PLANES,
    POST_ATTN_NORM,
    POST_FFN_NORM,
    Q_NORM,
    UP,
    O,
    Q,
    V,
)
from gemma_cli.runtime.team import stage
from gemma_cli.runtime.workspace import FEW, STAGES

_many = attention_amx if isa.AMX else attention

_GATES_AT_ONCE = not isa.AMX  # a constant to Numba, which compiles no more than is run

NEIGHBOURS = 16
"""Tokens, where they are more than FEW, that one thread takes: what they are rounded to shares
cache lines, and so do their keys. Two threads at a line wait for each other."""

GATE_PART = 2048  # outputs of GeGLU that one thread computes at once


# The stages. Each does one item of its work: some tokens, a part of them, some tiles of a matrix.


@kernel
def _n_token_items(n):
    """Items of a stage that works on tokens: as many as there are, or NEIGHBOURS in each."""
    return n if n <= FEW else (n + NEIGHBOURS - 1) // NEIGHBOURS


@kernel
def _tokens(item, n):
    """The tokens of an item."""
    size = 1 if n <= FEW else NEIGHBOURS
    return range(item * size, min(item * size + size, n))


@kernel
def _position(t, starts, positions):
    """A token's position."""
    sequence = attention.sequence_of(t, starts)
    return positions[sequence] + t - starts[sequence]


@stage
def _start(item, thread, s, weights, scratch, tokens, starts, positions, h):
    """The tokens' embeddings, their rotary angles, and the first norm."""
    for t in _tokens(item, tokens.size):
        x = scratch.x[t]
        position = _position(t, starts, positions)
        embed(weights.matrices[7 * s.n_layers], tokens[t], np.float32(np.sqrt(x.size)), x)
        for kind in range(2):
            rotary_angles(
                position,
                weights.frequencies[kind],
                scratch.angles[kind, 0, t],
                scratch.angles[kind, 1, t],
            )
        rms_norm(x, weights.norms[0, ATTN_NORM], s.rms_norm_eps, h.values[t])
        round_inputs(h, t, 0, h.values.shape[1])


@stage
def _place_heads(item, thread, n, s, *args):
    """A head of n tokens, as _place_head takes them."""
    items = _n_token_items(n)
    for t in _tokens(item % items, n):
        _place_head(t, item // items, s, *args)


@kernel
def _place_head(t, head, s, qkv, norms, angles, starts, positions, caches, layer, is_int8, queries):
    """A query head normalized, rotated, scaled; or a key head, stored with its value.

    queries: Queries.
    """
    d = s.head_dim
    vector, cos, sin = qkv[t, head * d : (head + 1) * d], angles[0, t], angles[1, t]
    if head < s.n_heads:
        if norms[Q_NORM]:
            rms_norm(vector, norms[Q_NORM], s.rms_norm_eps, vector)
        rotate(vector, cos, sin, np.float32(s.query_scale))
        group = s.n_heads // s.n_kv_heads
        key_head, row = head // group, t * group + head % group
        codes = queries.codes[key_head, row]
        queries.scales[key_head, row] = attention.round_query(vector, codes, is_int8)
    else:
        if norms[K_NORM]:
            rms_norm(vector, norms[K_NORM], s.rms_norm_eps, vector)
        rotate(vector, cos, sin, np.float32(1))
        start = (head + s.n_kv_heads) * d
        cache = caches[attention.sequence_of(t, starts), layer]
        slot = _position(t, starts, positions) % cache[kv_cache.CAPACITY]
        value = qkv[t, start : start + d]
        attention.store_head(vector, value, cache, head - s.n_heads, slot, is_int8)


@kernel
def _mix_parts(n, s):
    """Parts of a token that `_mix` does one by one: heads, if they are whole runs of inputs."""
    return s.n_heads if n <= FEW and s.head_dim % 32 == 0 else 1


@stage
def _mix(item, thread, s, starts, positions, window, scratch, mixed):
    """The tokens' attention, where it is in parts still, put together and rounded."""
    n = len(mixed.values)
    parts = _mix_parts(n, s)
    size = s.n_heads // parts
    first = item % parts * size
    for t in _tokens(item // parts, n):
        if n <= FEW:
            attention.merge_spans(
                t,
                first,
                first + size,
                starts,
                positions,
                s,
                window,
                scratch.attention,
                thread,
                mixed.values[t],
            )
        round_inputs(mixed, t, first * s.head_dim, (first + size) * s.head_dim)


@stage
def _add(item, thread, x, y, post_norm, next_norm, eps, h, overflow):
    """x += y, after y's own norm if there is one; then the norm of what comes next."""
    for t in _tokens(item, len(h.values)):
        if post_norm:
            rms_norm(y[t, : x.shape[1]], post_norm, eps, y[t, : x.shape[1]])
        add(x[t], y[t])
        if not rms_norm(x[t], next_norm, eps, h.values[t]) < math.inf:
            overflow[0] = 1
        round_inputs(h, t, 0, h.values.shape[1])


@stage
def _gate_part(item, thread, gate_up, h):
    """GeGLU for GATE_PART outputs of a token."""
    width = h.values.shape[1]
    parts = (width + GATE_PART - 1) // GATE_PART
    t, start = item // parts, item % parts * GATE_PART
    stop = min(start + GATE_PART, width)
    geglu(gate_up[t, start:stop], gate_up[t, width + start : width + stop], h.values[t, start:stop])
    round_inputs(h, t, start, stop)


@stage
def _move_wanted(item, thread, s, starts, wanted_starts, x, queries):
    """Has the tokens whose logits are wanted trade places with those at the beginning.

    One item, since the order matters: none lands on one that is still to be moved. Nothing of x is
    lost, in which what overflowed has to be found.
    """
    group = s.n_heads // s.n_kv_heads
    for t in range(wanted_starts[-1]):
        sequence = attention.sequence_of(t, wanted_starts)
        source = starts[sequence + 1] - wanted_starts[sequence + 1] + t
        for i in range(x.shape[1]):
            x[t, i], x[source, i] = x[source, i], x[t, i]
        for key_head in range(s.n_kv_heads):
            for r in range(group):
                to, at = t * group + r, source * group + r
                queries.scales[key_head, to] = queries.scales[key_head, at]
                for i in range(s.head_dim):
                    queries.codes[key_head, to, i] = queries.codes[key_head, at, i]


@stage
def _cap_token(t, thread, logits, cap):
    if cap > 0:
        soft_cap(logits[t], cap)


@kernel
def forward(
    thread,
    n_threads,
    counters,
    s,
    weights,
    scratch,
    caches,
    is_int8,
    tokens,
    starts,
    positions,
    n_best,
    wanted_starts,
    wanted_positions,
    logits,
):
    """Runs tokens and appends them to their caches, those of one sequence or several.

    Called by n_threads threads with the same arguments but `thread`, 0 to n_threads - 1.
    counters: of the team, for n_stages(n_layers), zeroed; s: Shape; caches: the KVCaches' tables,
    int64 (n_sequences, n_layers, kv_cache.N_COLUMNS), all of one kind; tokens: int32 (n_tokens,),
    at most a chunk, those of each sequence one after the other; starts: int64 (n_sequences + 1,),
    the first of each sequence's, and n_tokens; positions: int64 (n_sequences,), of these first
    ones. wanted_starts, wanted_positions: the same of the tokens whose logits are wanted, the last
    of each sequence or none. logits: float32, a row or more for each of them, of 16 x the
    embedding's tiles; with n_best, which is at most these tiles, those that cannot be among the
    n_best largest may be -inf.
    """
    n, n_wanted, ffn = tokens.size, wanted_starts[-1], s.intermediate_size
    eps, matrices = s.rms_norm_eps, weights.matrices
    y, x, panels = scratch.outputs, scratch.x, scratch.panels
    items = matmul.ITEMS * n_threads
    h = some_inputs(scratch.h, n, s.hidden_size)
    mixed = some_inputs(scratch.h, n, s.n_heads * s.head_dim)
    gated = some_inputs(scratch.gated, n, ffn)
    queries = attention.some_queries(scratch.queries, 0, n * (s.n_heads // s.n_kv_heads))

    token_items = _n_token_items(n)
    _start(counters, 0, token_items, thread, s, weights, scratch, tokens, starts, positions, h)
    for layer in range(s.n_layers):
        w, norms = matrices[7 * layer : 7 * layer + 7], weights.norms[layer]
        slides, row = weights.slides[layer], 1 + STAGES * layer
        window = s.sliding_window if slides else 0
        matmul.matmul(counters, row, items, thread, w[Q : V + 1], h, y, panels, n_threads)
        _place_heads(
            counters,
            row + 1,
            token_items * (s.n_heads + s.n_kv_heads),
            thread,
            n,
            s,
            y,
            norms,
            scratch.angles[int(slides)],
            starts,
            positions,
            caches,
            layer,
            is_int8,
            queries,
        )
        if layer == s.n_layers - 1 and n_wanted < n:
            if not n_wanted:
                return
            _move_wanted(counters, row + 10, 1, thread, s, starts, wanted_starts, x, queries)
            n, starts, positions = n_wanted, wanted_starts, wanted_positions
            token_items = _n_token_items(n)
            h = some_inputs(scratch.h, n, s.hidden_size)
            mixed = some_inputs(scratch.h, n, s.n_heads * s.head_dim)
            gated = some_inputs(scratch.gated, n, ffn)
            queries = attention.some_queries(scratch.queries, 0, n * (s.n_heads // s.n_kv_heads))
        if n <= FEW:
            attention.attend_spans(
                counters,
                row + 2,
                attention.n_span_items(starts, positions, s, window),
                thread,
                queries,
                starts,
                positions,
                caches,
                layer,
                s,
                window,
                is_int8,
                scratch.attention,
            )
        else:
            _many.attend_rows(
                counters,
                row + 2,
                _many.n_row_items(starts, s, weights.exact),
                thread,
                queries,
                starts,
                positions,
                caches,
                layer,
                s,
                window,
                is_int8,
                weights.exact,
                (scratch.attention, scratch.attention_amx),
                mixed.values,
            )
        items_of_mix = token_items * _mix_parts(n, s)
        _mix(counters, row + 3, items_of_mix, thread, s, starts, positions, window, scratch, mixed)
        matmul.matmul(counters, row + 4, items, thread, w[O : O + 1], mixed, y, panels, n_threads)
        _add(
            counters,
            row + 5,
            token_items,
            thread,
            x,
            y,
            norms[POST_ATTN_NORM],
            norms[FFN_NORM],
            eps,
            h,
            scratch.overflow,
        )
        gate_up = w[GATE : UP + 1]
        if _GATES_AT_ONCE and n > FEW and matmul.gates_at_once(gate_up, w[DOWN : DOWN + 1]):
            matmul.matmul_gated(
                counters, row + 6, items, thread, gate_up, h, gated, panels, n_threads
            )
        else:
            matmul.matmul(counters, row + 6, items, thread, gate_up, h, y, panels, n_threads)
            parts = (ffn + GATE_PART - 1) // GATE_PART
            _gate_part(counters, row + 7, n * parts, thread, y, gated)
        matmul.matmul(
            counters, row + 8, items, thread, w[DOWN : DOWN + 1], gated, y, panels, n_threads
        )
        # The row after the last layer's holds the final norm in this column.
        next_norm = weights.norms[layer + 1, ATTN_NORM]
        _add(
            counters,
            row + 9,
            token_items,
            thread,
            x,
            y,
            norms[POST_FFN_NORM],
            next_norm,
            eps,
            h,
            scratch.overflow,
        )

    if n_wanted:
        row = 1 + STAGES * s.n_layers
        embedding = matrices[7 * s.n_layers :]
        if n_best and n_wanted == 1 and embedding[0, FORMAT] == PLANES:
            head.largest_logits(
                counters,
                row,
                thread,
                n_threads,
                embedding[0],
                weights.remainders,
                s.vocab_size,
                h,
                n_best,
                s.final_soft_cap,
                scratch.head,
                logits[0],
            )
        else:
            matmul.matmul(counters, row, items, thread, embedding, h, logits, panels, n_threads)
            _cap_token(counters, row + 1, n_wanted, thread, logits, s.final_soft_cap)
