"""Attention over the cached keys and values, in spans of positions.

    out[t] = sum over p of softmax_p(q[t] . k[p]) v[p],  p in the window of t

A span's scores are taken relative to their largest, and what they weigh is summed: a partial
result. Partial results are merged in the order of their spans, each scaled down to the larger of
the two maxima (Milakov and Gimelshein 2018, arXiv:1805.02867; spans side by side are
FlashDecoding's, Dao et al. 2023). So no more than a span of scores is ever held. Spans begin at
multiples of SPAN positions, so a token's sums are made in the same order however many tokens are
processed at once and whichever threads do it.

Queries that read the same keys are neighbours here: those of one key head, token by token. ROWS of
them share a key or a value once it is loaded.
"""

import math

import numpy as np

from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.kv_cache import (
    BLOCK,
    CAPACITY,
    KEY_SCALES,
    KEYS,
    VALUE_SCALES,
    VALUES,
)
from gemma_cli.runtime.layers import soft_cap
from gemma_cli.runtime.team import stage
from gemma_cli.runtime.vector import (
    absolute,
    add_outer,
    address_of,
    exp,
    fma,
    horizontal_max,
    horizontal_sum,
    load_f16,
    load_f32,
    load_i8,
    prefetch,
    splat,
    store_f16,
    store_f32,
    store_i8,
    store_rows,
    store_scalar,
    zeros,
)
from gemma_cli.runtime.workspace import ITEM_ROWS, ROWS, SPAN

MASKED = np.float32(-1e30)
"""The score of a position that a token does not see."""


@kernel
def store_head(key, value, cache, head, slot, is_int8):
    """Stores one head's key and value, float32 (head_dim,) each, in a layer's slot.

    cache: the layer's row of the cache's table.
    """
    head_dim, lane = key.size, slot % BLOCK
    index = head * cache[CAPACITY] + slot
    k, v = address_of(key), address_of(value)
    to_key = cache[KEYS] + (1 if is_int8 else 2) * ((index - lane) * head_dim + lane)
    to_value = cache[VALUES] + (1 if is_int8 else 2) * index * head_dim
    if is_int8:
        store_scalar(cache[KEY_SCALES] + 4 * index, _scale(k, head_dim) / 127)
        store_scalar(cache[VALUE_SCALES] + 4 * index, _scale(v, head_dim) / 127)
        inverse, inverse_v = _inverse(_scale(k, head_dim)), _inverse(_scale(v, head_dim))
        for i in range(0, head_dim, 16):
            store_i8(to_key + BLOCK * i, BLOCK, load_f32(k + 4 * i) * inverse)
            store_i8(to_value + i, 1, load_f32(v + 4 * i) * inverse_v)
    else:
        for i in range(0, head_dim, 16):
            store_f16(to_key + 2 * BLOCK * i, 2 * BLOCK, load_f32(k + 4 * i))
            store_f16(to_value + 2 * i, 2, load_f32(v + 4 * i))


@kernel
def _scale(x, n):
    """The largest magnitude of n float32 at an address."""
    largest = np.float32(0)
    for i in range(0, 4 * n, 64):
        largest = max(largest, horizontal_max(absolute(load_f32(x + i))))
    return largest


@kernel
def _inverse(largest):
    return splat(127 / largest if largest > 1e-30 else 0.0)


@kernel
def _score(q, head_dim, cache, head, first, last, is_int8, scores):
    """scores[r, p - span] = q[r] . k[p] for ROWS queries and the blocks of positions first to last.

    q: address of the first query, float32 (ROWS, head_dim); first, last: multiples of BLOCK, of
    one span; scores: address of (ROWS, SPAN). Asks the memory for the values of these positions,
    too, which are needed next.
    """
    capacity = cache[CAPACITY]
    size = 1 if is_int8 else 2
    for p in range(first, last, BLOCK):
        slot = head * capacity + p % capacity
        k, v = cache[KEYS] + size * slot * head_dim, cache[VALUES] + size * slot * head_dim
        acc = zeros(ROWS)
        if is_int8:
            for i in range(head_dim):
                prefetch(v + BLOCK * i)
                acc = add_outer(acc, load_i8(k + BLOCK * i), q + 4 * i, 4 * head_dim)
        else:
            for i in range(head_dim):
                prefetch(v + 2 * BLOCK * i)
                acc = add_outer(acc, load_f16(k + 2 * BLOCK * i), q + 4 * i, 4 * head_dim)
        target = scores + 4 * (p % SPAN)
        store_rows(target, 4 * SPAN, acc, ROWS)
        if is_int8:
            scale = load_f32(cache[KEY_SCALES] + 4 * slot)
            for r in range(0, 4 * SPAN * ROWS, 4 * SPAN):
                store_f32(target + r, load_f32(target + r) * scale)


@kernel
def _weigh(weights, head_dim, cache, head, low, high, is_int8, sums):
    """sums[r] = sum over positions p from low to high of weights[r, p - span] v[p].

    weights: address of (ROWS, SPAN), for int8 with the values' scales in them; sums: address of
    (ROWS, head_dim).
    """
    capacity = cache[CAPACITY]
    row = (1 if is_int8 else 2) * head_dim
    for i in range(0, head_dim, 16):
        acc = zeros(ROWS)
        p = low
        while p < high:
            slot = head * capacity + p % capacity
            stop = min(high, p // BLOCK * BLOCK + BLOCK)
            w = weights + 4 * (p % SPAN)
            if is_int8:
                v = cache[VALUES] + slot * row + i
                for j in range(stop - p):
                    acc = add_outer(acc, load_i8(v + j * row), w + 4 * j, 4 * SPAN)
            else:
                v = cache[VALUES] + slot * row + 2 * i
                for j in range(stop - p):
                    acc = add_outer(acc, load_f16(v + j * row), w + 4 * j, 4 * SPAN)
            p = stop
        store_rows(sums + 4 * i, 4 * head_dim, acc, ROWS)


@kernel
def _softmax(scores, first, last, weights):
    """weights = exp(scores - their maximum) of positions first to last; the maximum, their sum.

    scores, weights: addresses of a row of a span.
    """
    start, stop = 4 * (first % SPAN), 4 * (first % SPAN + last - first)
    largest = load_f32(scores + start)
    maximum = horizontal_max(largest)
    for i in range(start + 64, stop, 64):
        maximum = max(maximum, horizontal_max(load_f32(scores + i)))
    total = splat(0.0)
    for i in range(start, stop, 64):
        weight = exp(load_f32(scores + i) - splat(maximum))
        store_f32(weights + i, weight)
        total = total + weight
    return maximum, horizontal_sum(total)


@kernel
def seen(position, window):
    """The first position that a token sees."""
    return max(0, position - window + 1) if window else 0


@kernel
def weigh_positions(scores, here, window, cap, cache, head, is_int8, span, first, last, weights):
    """A query's weights of positions first to last of a span, not yet divided by their sum.

    here: the query's position; scores, weights: float32 (SPAN,) at least; scores are changed.
    Weights of int8 values get their scales. -> the largest score, the weights' sum without scales.
    """
    if cap > 0:
        soft_cap(scores[first - span : last - span], cap)
    for p in range(first, max(first, min(last, seen(here, window)))):
        scores[p - span] = MASKED
    for p in range(max(first, here + 1), last):
        scores[p - span] = MASKED
    w = address_of(weights)
    largest, total = _softmax(address_of(scores), first, last, w)
    if is_int8:
        scale = cache[VALUE_SCALES] + 4 * (head * cache[CAPACITY])
        for p in range(first, last, BLOCK):
            at = w + 4 * (p - span)
            factor = load_f32(scale + 4 * (p % cache[CAPACITY]))
            store_f32(at, load_f32(at) * factor)
    return largest, total


@kernel
def _attend_span(
    q, rows, first_row, group, position, span, window, cap, cache, head, is_int8, own, result
):
    """The partial result of up to ROWS queries for the positions of a span; False if it has none.

    q: address of the queries (ROWS, head_dim), the rows first_row to first_row + rows of a
    sequence whose first token has that position. own: the thread's scores and weights; result: the
    arrays sums (ROWS, head_dim), maxima, divisors (ROWS,).
    """
    sums, maxima, divisors = result
    scores, weights = own
    head_dim = sums.shape[1]
    newest = position + (first_row + rows - 1) // group
    low = max(span, seen(position + first_row // group, window))
    high = min(span + SPAN, newest + 1)
    if low >= high:
        return False
    first, last = low // BLOCK * BLOCK, (high + BLOCK - 1) // BLOCK * BLOCK
    _score(q, head_dim, cache, head, first, last, is_int8, address_of(scores))
    for r in range(rows):
        here = position + (first_row + r) // group
        maxima[r], divisors[r] = weigh_positions(
            scores[r], here, window, cap, cache, head, is_int8, span, first, last, weights[r]
        )
    _weigh(address_of(weights), head_dim, cache, head, low, high, is_int8, address_of(sums))
    return True


@kernel
def merge(total, maximum, divisor, part, part_maximum, part_divisor):
    """Adds a partial result to a total, float32 (head_dim,); the new maximum and divisor."""
    new = max(maximum, part_maximum)
    kept = np.float32(math.exp(maximum - new))
    added = np.float32(math.exp(part_maximum - new))
    target, source = address_of(total), address_of(part)
    for i in range(0, 4 * total.size, 64):
        value = load_f32(target + i) * splat(kept)
        store_f32(target + i, fma(load_f32(source + i), splat(added), value))
    return new, divisor * kept + part_divisor * added


@kernel
def fill(x, value):
    for i in range(0, 4 * x.size, 64):
        store_f32(address_of(x) + i, splat(value))


@kernel
def divide(x, divisor, y):
    """y = x / divisor; x: (head_dim,), y: address."""
    for i in range(0, 4 * x.size, 64):
        store_f32(y + i, load_f32(address_of(x) + i) / splat(divisor))


# Where the work is divided: by spans when there are few tokens, else by queries.


@kernel
def sequence_of(t, starts):
    """The sequence that token t of a run is one of; starts: as `attend_spans` takes them."""
    sequence = 0
    while starts[sequence + 1] <= t:
        sequence += 1
    return sequence


@kernel
def _blocks_and_spans(sequence, starts, positions, s, window):
    """How many times ROWS queries of a key head a sequence has, and how many spans they see."""
    n_tokens, position = starts[sequence + 1] - starts[sequence], positions[sequence]
    blocks = (n_tokens * (s.n_heads // s.n_kv_heads) + ROWS - 1) // ROWS
    spans = (position + n_tokens - 1) // SPAN - seen(position, window) // SPAN + 1
    return blocks, spans


@kernel
def _first_span_item(sequence, starts, positions, s, window):
    """Items of `attend_spans` of the sequences before this one."""
    items = 0
    for before in range(sequence):
        blocks, spans = _blocks_and_spans(before, starts, positions, s, window)
        items += s.n_kv_heads * blocks * spans
    return items


@kernel
def n_span_items(starts, positions, s, window):
    """Items of `attend_spans`."""
    return _first_span_item(positions.size, starts, positions, s, window)


@stage
def attend_spans(item, thread, q, starts, positions, caches, layer, s, window, is_int8, scratch):
    """Partial results for few tokens, of one sequence or several; `merge_spans` puts them together.

    An item is ROWS queries and a span. q: float32 (n_kv_heads, n_rows, head_dim), n_rows those of
    all sequences, one after the other, with ROWS more to spare; rotated and scaled. starts: int64
    (n_sequences + 1,), the first token of each sequence, and how many there are in all; positions:
    int64 (n_sequences,), of these first tokens. caches: int64 (n_sequences, n_layers, N_COLUMNS);
    the tokens' own keys and values are in them. s: Shape of the model; window: positions that a
    token sees, itself included; 0 for all.
    """
    group = s.n_heads // s.n_kv_heads
    sequence, own = 0, item
    blocks, n_spans = _blocks_and_spans(0, starts, positions, s, window)
    while own >= s.n_kv_heads * blocks * n_spans:
        own -= s.n_kv_heads * blocks * n_spans
        sequence += 1
        blocks, n_spans = _blocks_and_spans(sequence, starts, positions, s, window)
    span, block, head = own % n_spans, own // n_spans % blocks, own // n_spans // blocks
    n_tokens, position = starts[sequence + 1] - starts[sequence], positions[sequence]
    first_row = block * ROWS
    start = (seen(position + first_row // group, window) // SPAN + span) * SPAN
    if start > position + n_tokens - 1:
        return
    _attend_span(
        address_of(q[head, starts[sequence] * group + first_row]),
        min(ROWS, n_tokens * group - first_row),
        first_row,
        group,
        position,
        start,
        window,
        s.attention_soft_cap,
        caches[sequence, layer],
        head,
        is_int8,
        (scratch.scores[thread], scratch.weights[thread]),
        (
            scratch.partial_sums[item],
            scratch.partial_maxima[item],
            scratch.partial_divisors[item],
        ),
    )


@kernel
def merge_spans(t, starts, positions, s, window, scratch, thread, out):
    """One token's attention from the partial results. out: float32 (n_heads * head_dim,)."""
    group = s.n_heads // s.n_kv_heads
    sequence = sequence_of(t, starts)
    blocks, n_spans = _blocks_and_spans(sequence, starts, positions, s, window)
    first_item = _first_span_item(sequence, starts, positions, s, window)
    token, position = t - starts[sequence], positions[sequence]
    rows = (starts[sequence + 1] - starts[sequence]) * group
    total = scratch.sums[thread, ROWS]
    for query in range(s.n_heads):
        head, row = query // group, token * group + query % group
        block, r = row // ROWS, row % ROWS
        item = first_item + (head * blocks + block) * n_spans
        start = seen(position + block * ROWS // group, window) // SPAN
        newest = position + (min(block * ROWS + ROWS, rows) - 1) // group
        maximum, divisor = MASKED, np.float32(0)
        fill(total, 0)
        for span in range(newest // SPAN - start + 1):
            maximum, divisor = merge(
                total,
                maximum,
                divisor,
                scratch.partial_sums[item + span, r],
                scratch.partial_maxima[item + span, r],
                scratch.partial_divisors[item + span, r],
            )
        divide(total, divisor, address_of(out) + 4 * query * total.size)


@kernel
def attend_row_item(item, thread, q, position, cache, s, window, is_int8, exact, scratches, out):
    """An item of attend_rows, ITEM_ROWS queries of a key head; nothing is rounded."""
    scratch = scratches[0]
    group = s.n_heads // s.n_kv_heads
    head, start_row = item % s.n_kv_heads, item // s.n_kv_heads * ITEM_ROWS
    stop_row = min(start_row + ITEM_ROWS, q.shape[1])
    sums, maxima = scratch.sums[thread], scratch.maxima[thread]
    divisors = scratch.divisors[thread]
    for r in range(ROWS, ROWS + stop_row - start_row):
        maxima[r], divisors[r] = MASKED, 0
        fill(sums[r], 0)
    first = seen(position + start_row // group, window) // SPAN * SPAN
    newest = position + (stop_row - 1) // group
    for span in range(first, newest + 1, SPAN):
        for row in range(start_row, stop_row, ROWS):
            rows = min(ROWS, stop_row - row)
            if not _attend_span(
                address_of(q[head, row]),
                rows,
                row,
                group,
                position,
                span,
                window,
                s.attention_soft_cap,
                cache,
                head,
                is_int8,
                (scratch.scores[thread], scratch.weights[thread]),
                (sums[:ROWS], maxima[:ROWS], divisors[:ROWS]),
            ):
                continue
            for r in range(rows):
                at = ROWS + row - start_row + r
                maxima[at], divisors[at] = merge(
                    sums[at], maxima[at], divisors[at], sums[r], maxima[r], divisors[r]
                )
    for row in range(start_row, stop_row):
        at, query = ROWS + row - start_row, head * group + row % group
        divide(sums[at], divisors[at], address_of(out[row // group]) + 4 * query * sums.shape[1])


def rows_stage(item_rows, attend_item):
    """n_row_items and attend_rows, which are attention of many tokens, of one sequence or several.

    An item is item_rows(s, exact) queries of a key head of a sequence, or fewer: what `attend_item`
    does, given which of the sequence's items it is, and the sequence's queries, position, cache and
    outputs.
    """

    @kernel
    def n_items_of(sequence, starts, s, exact):
        n_rows = (starts[sequence + 1] - starts[sequence]) * (s.n_heads // s.n_kv_heads)
        rows = item_rows(s, exact)
        return s.n_kv_heads * ((n_rows + rows - 1) // rows)

    @kernel
    def n_row_items(starts, s, exact):
        """Items of attend_rows."""
        items = 0
        for sequence in range(starts.size - 1):
            items += n_items_of(sequence, starts, s, exact)
        return items

    @stage
    def attend_rows(
        item,
        thread,
        q,
        starts,
        positions,
        caches,
        layer,
        s,
        window,
        is_int8,
        exact,
        scratches,
        out,
    ):
        """As attend_spans. exact: whether nothing may be rounded; scratches: Scratch of `attention`
        and of `attention_amx`; out: float32 (n_tokens, n_heads head_dim)."""
        sequence, own = 0, item
        while own >= n_items_of(sequence, starts, s, exact):
            own -= n_items_of(sequence, starts, s, exact)
            sequence += 1
        first, last, group = starts[sequence], starts[sequence + 1], s.n_heads // s.n_kv_heads
        attend_item(
            own,
            thread,
            q[:, first * group : last * group],
            positions[sequence],
            caches[sequence, layer],
            s,
            window,
            is_int8,
            exact,
            scratches,
            out[first:last],
        )

    return n_row_items, attend_rows


@kernel
def _item_rows(s, exact):
    return ITEM_ROWS


n_row_items, attend_rows = rows_stage(_item_rows, attend_row_item)
