"""Attention of many tokens by AMX; the equation and its spans are `attention`'s.

Queries, keys, the weights of positions and values become bfloat16; scores and sums are float32. So
a query's result differs from `attention_rows`'s by roundings, up to 2^-8 of each of them, and is
used only where weights are rounded, too. It depends on nothing but the query, as it does there.

A span's keys and values are expanded once for AMX_ROWS queries, which takes as long as multiplying
60 of them, and all that is used meanwhile (0.8 MB for heads of 256) stays in the L2 cache.
"""

from gemma_cli.runtime.amx import configure, lost, mark, multiply_blocks, release
from gemma_cli.runtime.attention import (
    MASKED,
    attend_row_item,
    divide,
    fill,
    load_pairs,
    merge,
    rows_stage,
    seen,
    weigh_positions,
)
from gemma_cli.runtime.inputs import block_offset
from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.kv_cache import BLOCK as KEY_TILE
from gemma_cli.runtime.kv_cache import CAPACITY, KEY_SCALES, KEYS, VALUES
from gemma_cli.runtime.vector import (
    address_of,
    first_of_pairs,
    load_f32,
    load_i16_pairs,
    second_of_pairs,
    splat,
    store_bf16,
    store_bf16_pairs,
    store_f32,
)
from gemma_cli.runtime.workspace import AMX_ROWS, BLOCK, ITEM_ROWS, SPAN, STEP, TILE


@kernel
def _store_pairs(target, pairs):
    """32 int16 as bfloat16, in their order."""
    store_bf16_pairs(target, first_of_pairs(pairs), second_of_pairs(pairs))


@kernel
def _round_queries(q, rows, head_dim, target):
    """q: address of int16 codes (rows, head_dim)."""
    for r in range(rows):
        for i in range(0, head_dim, 32):
            codes = load_i16_pairs(q + 2 * (r * head_dim + i))
            _store_pairs(target + block_offset(r, i, head_dim), codes)


@kernel
def _expand_keys(cache, head, span, first, last, head_dim, is_int8, target):
    """Keys of positions first to last of a span to tiles, those of BLOCK positions side by side."""
    size = 1 if is_int8 else 2
    for p in range(first, last, KEY_TILE):
        slot = head * cache[CAPACITY] + p % cache[CAPACITY]
        key = cache[KEYS] + size * slot * head_dim
        place = target + (p - span) // BLOCK * (head_dim // 32 * STEP) + p % BLOCK // 16 * TILE
        for i in range(0, head_dim, 32):
            for k in range(16):
                pairs = load_pairs(key + size * KEY_TILE * (i + 2 * k), is_int8)
                _store_pairs(place + 64 * k, pairs)
            place += STEP


@kernel
def _expand_values(cache, head, span, first, last, head_dim, is_int8, target):
    """Values of the same to tiles, those of 32 inputs side by side."""
    size = 1 if is_int8 else 2
    for p in range(first, last, 2):
        slot = head * cache[CAPACITY] + p % cache[CAPACITY]
        value = cache[VALUES] + size * slot * head_dim
        for i in range(0, head_dim, 16):
            place = (i // 32 * (SPAN // 32) + (p - span) // 32) * STEP + i % 32 // 16 * TILE
            _store_pairs(
                target + place + p % 32 // 2 * 64, load_pairs(value + 2 * size * i, is_int8)
            )


@kernel
def _multiply(a, b, rows, columns, inputs, width, c, line):
    """c[r, n] = sum over i of a[r, i] b[n, i], for columns n and inputs i in the ranges given.

    a, b: addresses of blocks and of tiles, of rows and columns of `width` inputs; c: float32, a
    multiple of BLOCK rows and columns; line: as `amx.lost` wants it.
    """
    while True:
        mark()
        for r in range(0, rows, BLOCK):
            for n in range(columns[0], columns[1], BLOCK):
                multiply_blocks(
                    a + block_offset(r, inputs[0], width),
                    b + block_offset(n, inputs[0], width),
                    (inputs[1] - inputs[0]) // 32,
                    address_of(c[r, n:]),
                    c.strides[0],
                    True,
                )
        if not lost(line):
            return


@kernel
def _scale_scores(scores, q_scale, cache, head, first, last):
    """Multiplies a query's scores, from that of position first on, by its scale and the keys'."""
    scales = cache[KEY_SCALES] + 4 * head * cache[CAPACITY]
    for p in range(first, last, 16):
        at = address_of(scores) + 4 * (p - first)
        scale = splat(q_scale) * load_f32(scales + 4 * (p % cache[CAPACITY]))
        store_f32(at, load_f32(at) * scale)


@kernel
def _round_weights(weights, r, start, stop, target):
    """A query's weights to blocks."""
    for p in range(start, stop, 32):
        w = address_of(weights) + 4 * p
        store_bf16(target + block_offset(r, p, SPAN), load_f32(w), load_f32(w + 64))


@kernel
def _rounds(s, exact):
    """Whether this is done by AMX, which wants heads of a multiple of 32 inputs."""
    return not exact and s.head_dim % 32 == 0


@kernel
def _item_rows(s, exact):
    return AMX_ROWS if _rounds(s, exact) else ITEM_ROWS


@kernel
def _attend_item(item, thread, q, position, cache, s, window, is_int8, scratch, out):
    """AMX_ROWS queries of a key head."""
    group, head_dim = s.n_heads // s.n_kv_heads, s.head_dim
    head, block = item % s.n_kv_heads, item // s.n_kv_heads
    # The last queries see most, and come first: so threads end together.
    n_rows = q.scales.shape[1]
    first_row = (n_rows - 1) // AMX_ROWS * AMX_ROWS - block * AMX_ROWS
    rows = min(AMX_ROWS, n_rows - first_row)
    queries, keys = address_of(scratch.queries[thread]), address_of(scratch.keys[thread])
    values, rounded = address_of(scratch.values[thread]), address_of(scratch.rounded[thread])
    scores = scratch.scores[thread]
    part, total = scratch.sums[thread, 0], scratch.sums[thread, 1]
    maxima, divisors = scratch.maxima[thread], scratch.divisors[thread]
    line = address_of(scratch.lines[thread])
    for r in range(rows):
        maxima[1, r], divisors[1, r] = MASKED, 0
        fill(total[r], 0)
    _round_queries(address_of(q.codes[head, first_row]), rows, head_dim, queries)
    oldest = seen(position + first_row // group, window)
    newest = position + (first_row + rows - 1) // group
    configure()
    for span in range(oldest // SPAN * SPAN, newest + 1, SPAN):
        low, high = max(span, oldest), min(span + SPAN, newest + 1)
        first, last = low // 32 * 32, (high + 31) // 32 * 32
        start, stop = first - span, last - span
        _expand_keys(cache, head, span, first, last, head_dim, is_int8, keys)
        _expand_values(cache, head, span, first, last, head_dim, is_int8, values)
        _multiply(queries, keys, rows, (start, stop), (0, head_dim), head_dim, scores, line)
        for r in range(rows):
            q_scale = q.scales[head, first_row + r]
            _scale_scores(scores[r, start:], q_scale, cache, head, first, last)
            here = position + (first_row + r) // group
            maxima[0, r], divisors[0, r] = weigh_positions(
                scores[r], here, window, s.attention_soft_cap, cache, head, span, first, last
            )
            _round_weights(scores[r], r, start, stop, rounded)
        _multiply(rounded, values, rows, (0, head_dim), (start, stop), SPAN, part, line)
        for r in range(rows):
            maxima[1, r], divisors[1, r] = merge(
                total[r], maxima[1, r], divisors[1, r], part[r], maxima[0, r], divisors[0, r]
            )
    release()
    for r in range(rows):
        query = head * group + (first_row + r) % group
        target = address_of(out[(first_row + r) // group]) + 4 * query * head_dim
        divide(total[r], divisors[1, r], target)


@kernel
def _attend(item, thread, q, position, cache, s, window, is_int8, exact, scratches, out):
    """An item of attend_rows."""
    if _rounds(s, exact):
        _attend_item(item, thread, q, position, cache, s, window, is_int8, scratches[1], out)
    else:
        attend_row_item(item, thread, q, position, cache, s, window, is_int8, exact, scratches, out)


n_row_items, attend_rows = rows_stage(_item_rows, _attend)
