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

What is multiplied are integers, with a scale for each token's head: queries, keys and values as the
cache has them, and the weights of a span's positions. Their products are summed exactly, as int32:

    |q . k| <= |q| |k| <= NORM^2 < 2^31,    |sum of w v| <= WEIGHTS * LARGEST_VALUE < 2^31

so 16 bits hold a query or a key more closely than float16 would. Where a key has 8, it is rotated
before, and so are queries, so that no component is many times the others (`_spread`).
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
    add_pairs,
    add_scaled,
    address_of,
    exp,
    fma,
    horizontal_max,
    horizontal_sum,
    integer_zeros,
    larger,
    load_f32,
    load_i8_pairs,
    load_i16_pairs,
    prefetch,
    splat,
    store_f32,
    store_i8,
    store_i16,
    store_rows,
    store_scalar,
    zeros,
)
from gemma_cli.runtime.workspace import ITEM_ROWS, ROWS, SPAN, Queries

MASKED = np.float32(-1e30)
"""The score of a position that a token does not see."""

NORM = 46_300
"""The norm of a query's or key's codes, before they are rounded, at most: rounding adds up to half
the root of head_dim, so heads of 1,024 are within the root of 2^31, which is 46,341."""

LARGEST_VALUE = 8191
"""The largest code of a value: 13 bits leave as many for weights, and so both err about as much."""

WEIGHTS = 261_000
"""The sum of a span's weights as codes, at most, before they are rounded: 256 positions add up to
128, and 2^31 / LARGEST_VALUE is 262,176."""


@kernel
def _largest(x, n):
    """The largest magnitude of n float32 at an address."""
    largest = splat(0.0)
    for i in range(0, 4 * n, 64):
        largest = larger(absolute(load_f32(x + i)), largest)
    return horizontal_max(largest)


@kernel
def _inverse(scale):
    return np.float32(1) / scale if scale > 1e-30 else np.float32(0)


@kernel
def _scale(x, n, largest_code):
    """What a code of a query or key stands for: as little as largest_code and NORM allow."""
    largest = _largest(x, n)
    inverse = splat(_inverse(largest))
    total = splat(0.0)
    for i in range(0, 4 * n, 64):
        value = load_f32(x + i) * inverse
        total = fma(value, value, total)
    norm = np.float32(math.sqrt(horizontal_sum(total)))
    return largest * max(np.float32(1 / largest_code), norm / np.float32(NORM))


@kernel
def _spread(x):
    """Rotates a head, float32 (head_dim,), in its place, so that its components are of like size.

    Multiplies by a Hadamard matrix, as QuaRot does (Ashkboos et al. 2024, arXiv:2404.00456), but
    only vectors of 16 components by each other, as many as there are by a power of 2. What is so
    rotated on both sides has the same products. With Gemma 3 270M, whose keys have a few components
    that are far larger than others, this takes an int8 cache's divergence to a fifth.
    """
    n, step, half = x.size // 16, 1, splat(math.sqrt(0.5))
    while n % (2 * step) == 0:
        for start in range(0, n, 2 * step):
            for i in range(start, start + step):
                one = address_of(x) + 64 * i
                other = one + 64 * step
                first, second = load_f32(one) * half, load_f32(other) * half
                store_f32(one, first + second)
                store_f32(other, first - second)
        step *= 2


@kernel
def round_query(query, codes, is_int8):
    """Rounds a query, float32 (head_dim,), to int16 codes; gives what a code stands for.

    is_int8: of the cache. The query is changed.
    """
    if is_int8:
        _spread(query)
    q = address_of(query)
    scale = _scale(q, query.size, 32767)
    inverse = splat(_inverse(scale))
    for i in range(0, query.size, 16):
        store_i16(address_of(codes) + 2 * i, 2, 4, load_f32(q + 4 * i) * inverse)
    return scale


@kernel
def store_head(key, value, cache, head, slot, is_int8):
    """Stores one head's key and value, float32 (head_dim,) each, in a layer's slot.

    cache: the layer's row of the cache's table. The key is changed.
    """
    if is_int8:
        _spread(key)
    head_dim, lane = key.size, slot % BLOCK
    index = head * cache[CAPACITY] + slot
    k, v = address_of(key), address_of(value)
    size = 1 if is_int8 else 2
    to_key = cache[KEYS] + size * ((index - lane) * head_dim + 2 * lane)
    to_value = cache[VALUES] + size * ((index - lane % 2) * head_dim + lane % 2)
    k_scale = _scale(k, head_dim, 127 if is_int8 else 32767)
    v_scale = _largest(v, head_dim) / np.float32(127 if is_int8 else LARGEST_VALUE)
    store_scalar(cache[KEY_SCALES] + 4 * index, k_scale)
    store_scalar(cache[VALUE_SCALES] + 4 * index, v_scale)
    inverse, inverse_v = splat(_inverse(k_scale)), splat(_inverse(v_scale))
    for i in range(0, head_dim, 16):
        key_part, value_part = load_f32(k + 4 * i) * inverse, load_f32(v + 4 * i) * inverse_v
        if is_int8:
            store_i8(to_key + BLOCK * i, 1, 2 * BLOCK, key_part)
            store_i8(to_value + 2 * i, 2, 4, value_part)
        else:
            store_i16(to_key + 2 * BLOCK * i, 2, 4 * BLOCK, key_part)
            store_i16(to_value + 4 * i, 4, 8, value_part)


@kernel
def load_pairs(address, is_int8):
    """32 numbers of the cache, as int16."""
    return load_i8_pairs(address) if is_int8 else load_i16_pairs(address)


def _products(n):
    """The products of n queries, at most ROWS, with keys, and of their weights with values."""

    @kernel
    def score(q, q_scales, head_dim, cache, head, first, last, is_int8, scores):
        """scores[r, p - span] = q[r] . k[p] for the blocks of positions first to last.

        q, q_scales: addresses of the queries' codes, int16 (n, head_dim), and scales, float32 (n,);
        first, last: multiples of BLOCK, of one span; scores: address of (n, SPAN). Asks the memory
        for the values of these positions, too, which are needed next.
        """
        capacity = cache[CAPACITY]
        size = 1 if is_int8 else 2
        step = 2 * BLOCK * size
        for p in range(first, last, BLOCK):
            slot = head * capacity + p % capacity
            k, v = cache[KEYS] + size * slot * head_dim, cache[VALUES] + size * slot * head_dim
            acc = integer_zeros(n)
            for i in range(head_dim // 2):
                prefetch(v + step * i)
                acc = add_pairs(acc, load_pairs(k + step * i, is_int8), q + 4 * i, 2 * head_dim)
            scale = load_f32(cache[KEY_SCALES] + 4 * slot)
            rows = add_scaled(zeros(n), acc, scale, q_scales)
            store_rows(scores + 4 * (p % SPAN), 4 * SPAN, rows, n)

    @kernel
    def weigh(weights, weight_scales, head_dim, cache, head, first, last, is_int8, sums, after):
        """sums[r] = sum over the blocks of positions p from first to last of w[r, p - span] v[p].

        weights, weight_scales: addresses of w's codes, int16 (n, SPAN), and of what a code stands
        for, float32 (n,), the values' scales in them; sums: address of (n, head_dim). Asks the
        memory for the keys from position `after` on.
        """
        capacity = cache[CAPACITY]
        size = 1 if is_int8 else 2
        keys = cache[KEYS] + size * (head * capacity + after % capacity) * head_dim
        for i in range(0, head_dim, 16):
            acc = integer_zeros(n)
            for p in range(first, last, BLOCK):
                slot = head * capacity + p % capacity
                v = cache[VALUES] + size * (slot * head_dim + 2 * i)
                w = weights + 2 * (p % SPAN)
                for j in range(0, BLOCK, 2):
                    pairs = load_pairs(v + size * j * head_dim, is_int8)
                    prefetch(keys)
                    keys += 32 * size
                    acc = add_pairs(acc, pairs, w + 2 * j, 2 * SPAN)
            rows = add_scaled(zeros(n), acc, splat(1.0), weight_scales)
            store_rows(sums + 4 * i, 4 * head_dim, rows, n)

    return score, weigh


# A token's queries of a key head are few in most models.
_score_half, _weigh_half = _products(ROWS // 2)
_score_all, _weigh_all = _products(ROWS)


@kernel
def _softmax(scores, first, last):
    """Turns the scores of positions first to last into exp(score - their maximum).

    scores: address of a row of a span. -> the maximum, and the sum.
    """
    start, stop = 4 * (first % SPAN), 4 * (first % SPAN + last - first)
    largest = load_f32(scores + start)
    for i in range(start + 64, stop, 64):
        largest = larger(load_f32(scores + i), largest)
    maximum = horizontal_max(largest)
    total = splat(0.0)
    for i in range(start, stop, 64):
        weight = exp(load_f32(scores + i) - splat(maximum))
        store_f32(scores + i, weight)
        total = total + weight
    return maximum, horizontal_sum(total)


@kernel
def seen(position, window):
    """The first position that a token sees."""
    return max(0, position - window + 1) if window else 0


@kernel
def _fill_unseen(row, here, window, span, first, last, value):
    """Fills what a query does not see of the positions first to last of a span."""
    for p in range(first, max(first, min(last, seen(here, window)))):
        row[p - span] = value
    for p in range(max(first, here + 1), last):
        row[p - span] = value


@kernel
def weigh_positions(scores, here, window, cap, cache, head, span, first, last):
    """Turns a query's scores of positions first to last of a span into their weights.

    here: the query's position; scores: float32 (SPAN,) at least. Weights have the values' scales in
    them and are not yet divided by their sum. -> the largest score, the sum without the scales.
    """
    if cap > 0:
        soft_cap(scores[first - span : last - span], cap)
    _fill_unseen(scores, here, window, span, first, last, MASKED)
    w = address_of(scores)
    largest, total = _softmax(w, first, last)
    scale = cache[VALUE_SCALES] + 4 * (head * cache[CAPACITY])
    for p in range(first, last, BLOCK):
        at = w + 4 * (p - span)
        store_f32(at, load_f32(at) * load_f32(scale + 4 * (p % cache[CAPACITY])))
    # The scale of a slot that nothing was stored in, or no number, may be anything.
    _fill_unseen(scores, here, window, span, first, last, np.float32(0))
    return largest, total


@kernel
def _round_weights(weights, codes, start, stop):
    """Rounds a query's weights from start to stop to int16; gives what a code stands for."""
    w, total = address_of(weights), splat(0.0)
    for p in range(start, stop, 16):
        total = total + load_f32(w + 4 * p)
    largest = _largest(w + 4 * start, stop - start)
    scale = max(largest / np.float32(32767), horizontal_sum(total) / np.float32(WEIGHTS))
    inverse = splat(_inverse(scale))
    for p in range(start, stop, 16):
        store_i16(address_of(codes) + 2 * p, 2, 4, load_f32(w + 4 * p) * inverse)
    return scale


@kernel
def _attend_span(
    q, rows, first_row, group, position, span, after, window, cap, cache, head, is_int8, own, result
):
    """The partial result of up to ROWS queries for the positions of a span; False if it has none.

    q: addresses of the queries' codes, int16 (ROWS, head_dim), and scales, the rows first_row to
    first_row + rows of a sequence whose first token has that position. after: the span that the
    thread attends to next, or this one. own: the thread's scores, weights and what a weight's code
    stands for; result: the arrays sums (ROWS, head_dim), maxima, divisors (ROWS,).
    """
    sums, maxima, divisors = result
    scores, weights, weight_scales = own
    head_dim = sums.shape[1]
    newest = position + (first_row + rows - 1) // group
    low = max(span, seen(position + first_row // group, window))
    high = min(span + SPAN, newest + 1)
    if low >= high:
        return False
    first, last = low // BLOCK * BLOCK, (high + BLOCK - 1) // BLOCK * BLOCK
    keys = (*q, head_dim, cache, head, first, last, is_int8, address_of(scores))
    if rows <= ROWS // 2:
        _score_half(*keys)
    else:
        _score_all(*keys)
    for r in range(rows):
        here = position + (first_row + r) // group
        maxima[r], divisors[r] = weigh_positions(
            scores[r], here, window, cap, cache, head, span, first, last
        )
        weight_scales[r] = _round_weights(scores[r], weights[r], first - span, last - span)
    w = address_of(weights), address_of(weight_scales)
    values = (*w, head_dim, cache, head, first, last, is_int8, address_of(sums), after)
    if rows <= ROWS // 2:
        _weigh_half(*values)
    else:
        _weigh_all(*values)
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
def some_queries(q, first, last):
    """The rows first to last of every key head."""
    return Queries(q.codes[:, first:last], q.scales[:, first:last])


@kernel
def _addresses(q, head, row):
    """Where the codes and scales of a row and the next ones are."""
    return address_of(q.codes[head, row]), address_of(q.scales[head, row:])


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

    An item is ROWS queries and a span. q: Queries, rotated and scaled, of all sequences, one after
    the other, with ROWS rows more to spare. starts: int64
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
    # Threads take turns, more or less.
    after = start + len(scratch.scores) * SPAN
    _attend_span(
        _addresses(q, head, starts[sequence] * group + first_row),
        min(ROWS, n_tokens * group - first_row),
        first_row,
        group,
        position,
        start,
        after if after < position + n_tokens else start,
        window,
        s.attention_soft_cap,
        caches[sequence, layer],
        head,
        is_int8,
        (scratch.scores[thread], scratch.weights[thread], scratch.weight_scales[thread]),
        (
            scratch.partial_sums[item],
            scratch.partial_maxima[item],
            scratch.partial_divisors[item],
        ),
    )


@kernel
def merge_spans(t, first, last, starts, positions, s, window, scratch, thread, out):
    """The attention of a token's heads first to last from the partial results.

    out: float32 (n_heads * head_dim,), of all heads.
    """
    group = s.n_heads // s.n_kv_heads
    sequence = sequence_of(t, starts)
    blocks, n_spans = _blocks_and_spans(sequence, starts, positions, s, window)
    first_item = _first_span_item(sequence, starts, positions, s, window)
    token, position = t - starts[sequence], positions[sequence]
    rows = (starts[sequence + 1] - starts[sequence]) * group
    total = scratch.sums[thread, ROWS]
    for query in range(first, last):
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
    stop_row = min(start_row + ITEM_ROWS, q.scales.shape[1])
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
                _addresses(q, head, row),
                rows,
                row,
                group,
                position,
                span,
                span,
                window,
                s.attention_soft_cap,
                cache,
                head,
                is_int8,
                (scratch.scores[thread], scratch.weights[thread], scratch.weight_scales[thread]),
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
            some_queries(q, first * group, last * group),
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
