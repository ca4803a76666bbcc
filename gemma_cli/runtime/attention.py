"""Attention over the cached keys and values, in blocks of positions.

    out[t] = sum over p of softmax_p(q[t] . k[p]) v[p],  p in the window of t

The softmax runs along with the sum (Milakov and Gimelshein 2018, arXiv:1805.02867): a block's
scores raise the running maximum, and what was summed so far is scaled down to it, so that no more
than a block of scores is ever held. Blocks begin at multiples of BLOCK positions, so a token's sums
are made in the same order however many tokens are processed at once.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.kv_cache import CAPACITY, KEY_SCALES, KEYS, VALUE_SCALES, VALUES
from gemma_cli.runtime.layers import soft_cap
from gemma_cli.runtime.team import stage
from gemma_cli.runtime.vector import (
    absolute,
    address_of,
    exp,
    fma,
    horizontal_max,
    horizontal_sum,
    load_f16,
    load_f32,
    load_i8,
    load_scalar,
    splat,
    store_f16,
    store_f32,
    store_i8,
    store_scalar,
)

BLOCK = 32
"""Positions whose keys or values are widened to float32 at once."""

ROWS = 8
"""Queries, of one key head, that share a widened block."""

_MASKED = np.float32(-1e30)


class Scratch(NamedTuple):
    """What a thread of `attend` writes to; the first dimension is the thread."""

    sums: NDArray[np.float32]  # (n_threads, ROWS, head_dim)
    block: NDArray[np.float32]  # (n_threads, BLOCK, head_dim), keys or values
    scores: NDArray[np.float32]  # (n_threads, ROWS, BLOCK)
    maxima: NDArray[np.float32]  # (n_threads, ROWS)
    divisors: NDArray[np.float32]  # (n_threads, ROWS)


def allocate(n_threads: int, head_dim: int) -> Scratch:
    def array(*shape: int) -> NDArray[np.float32]:
        return np.zeros((n_threads, *shape), np.float32)

    return Scratch(
        array(ROWS, head_dim), array(BLOCK, head_dim), array(ROWS, BLOCK), array(ROWS), array(ROWS)
    )


@kernel
def store_head(values, n_heads, head, slot, is_int8, data, scales):
    """Stores one head's key or value, float32 (head_dim,), in a layer's slot.

    data, scales: addresses, columns of the cache's table.
    """
    head_dim = values.size
    index = slot * n_heads + head
    source = address_of(values)
    if is_int8:
        largest = np.float32(0)
        for i in range(0, 4 * head_dim, 64):
            largest = max(largest, horizontal_max(absolute(load_f32(source + i))))
        inverse = splat(127 / largest if largest > 1e-30 else 0.0)
        for i in range(0, head_dim, 16):
            store_i8(data + index * head_dim + i, load_f32(source + 4 * i) * inverse)
        store_scalar(scales + 4 * index, largest / 127)
    else:
        for i in range(0, head_dim, 16):
            store_f16(data + 2 * (index * head_dim + i), load_f32(source + 4 * i))


@kernel
def _widen(table, data_column, scale_column, head, n_heads, first, last, is_int8, block):
    """Keys or values of positions first to last, float32, into the rows of `block`."""
    head_dim = block.shape[1]
    data, scales, capacity = table[data_column], table[scale_column], table[CAPACITY]
    for p in range(first, last):
        index = (p % capacity) * n_heads + head
        target = address_of(block) + 4 * (p - first) * head_dim
        if is_int8:
            scale = splat(load_scalar(scales + 4 * index))
            for i in range(0, head_dim, 16):
                store_f32(target + 4 * i, load_i8(data + index * head_dim + i) * scale)
        else:
            for i in range(0, head_dim, 16):
                store_f32(target + 4 * i, load_f16(data + 2 * (index * head_dim + i)))


@kernel
def _score(query, keys, scores):
    """scores[j] = query . keys[j]; four at a time, to keep the multipliers busy."""
    head_dim = query.size
    q, row = address_of(query), 4 * head_dim
    for j in range(0, BLOCK, 4):
        k = address_of(keys) + j * row
        a, b, c, d = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
        for i in range(0, row, 64):
            value = load_f32(q + i)
            a = fma(value, load_f32(k + i), a)
            b = fma(value, load_f32(k + row + i), b)
            c = fma(value, load_f32(k + 2 * row + i), c)
            d = fma(value, load_f32(k + 3 * row + i), d)
        scores[j] = horizontal_sum(a)
        scores[j + 1] = horizontal_sum(b)
        scores[j + 2] = horizontal_sum(c)
        scores[j + 3] = horizontal_sum(d)


@kernel
def _weigh(scores, values, decay, total):
    """total = total * decay + sum over j of scores[j] values[j]."""
    head_dim = total.size
    row = 4 * head_dim
    for i in range(0, row, 64):
        v, target = address_of(values) + i, address_of(total) + i
        a, b, c, d = load_f32(target) * splat(decay), splat(0.0), splat(0.0), splat(0.0)
        for j in range(0, BLOCK, 4):
            a = fma(splat(scores[j]), load_f32(v + j * row), a)
            b = fma(splat(scores[j + 1]), load_f32(v + (j + 1) * row), b)
            c = fma(splat(scores[j + 2]), load_f32(v + (j + 2) * row), c)
            d = fma(splat(scores[j + 3]), load_f32(v + (j + 3) * row), d)
        store_f32(target, (a + b) + (c + d))


@kernel
def _softmax_block(scores, maximum):
    """Turns scores into exp(score - the new maximum); gives that maximum and their sum."""
    pointer = address_of(scores)
    for i in range(0, 4 * BLOCK, 64):
        maximum = max(maximum, horizontal_max(load_f32(pointer + i)))
    total = splat(0.0)
    for i in range(0, 4 * BLOCK, 64):
        weight = exp(load_f32(pointer + i) - splat(maximum))
        store_f32(pointer + i, weight)
        total = total + weight
    return maximum, horizontal_sum(total)


@kernel
def _fill(x, value):
    for i in range(0, 4 * x.size, 64):
        store_f32(address_of(x) + i, splat(value))


@kernel
def _block_rows(n_tokens, group, n_threads):
    """Queries in an item: one token's heads are divided among the threads, else whole blocks."""
    return min(ROWS, (n_tokens * group + n_threads - 1) // n_threads)


@kernel
def n_items(q, n_kv_heads, n_threads):
    """Into how many items the queries (n_tokens, n_heads, head_dim) of a layer are divided."""
    n_rows = q.shape[0] * (q.shape[1] // n_kv_heads)
    rows = _block_rows(q.shape[0], q.shape[1] // n_kv_heads, n_threads)
    return n_kv_heads * ((n_rows + rows - 1) // rows)


@stage
def attend(
    item, thread, q, position, table, n_kv_heads, window, cap, is_int8, scratch, out, n_threads
):
    """Attention of one layer for n_tokens that follow each other, causal; one of n_items items.

    q: float32 (n_tokens, n_heads, head_dim), rotated and scaled; query heads of one key head are
    neighbours. position: of the first token. table: the layer's row of the cache's table; the
    tokens' own keys and values are in the cache. window: positions that a token sees, itself
    included; 0 for all. cap: soft cap of the scores, 0 for none. out: float32 (n_tokens, n_heads
    head_dim).
    """
    n_tokens, n_heads, head_dim = q.shape
    group = n_heads // n_kv_heads
    block_rows = _block_rows(n_tokens, group, n_threads)
    sums, block, scores = scratch.sums[thread], scratch.block[thread], scratch.scores[thread]
    maxima, divisors = scratch.maxima[thread], scratch.divisors[thread]

    head = item % n_kv_heads
    first_row = item // n_kv_heads * block_rows
    rows = min(block_rows, n_tokens * group - first_row)
    newest = position + (first_row + rows - 1) // group
    start = max(0, position + first_row // group - window + 1) if window else 0
    for r in range(rows):
        maxima[r], divisors[r] = _MASKED, 0
        _fill(sums[r], 0)
    for j in range(BLOCK):
        _fill(block[j], 0)  # What no position fills meets a weight of zero; it must be finite.
    for first in range(start // BLOCK * BLOCK, newest + 1, BLOCK):
        low, high = max(first, start), min(first + BLOCK, newest + 1)
        _widen(table, KEYS, KEY_SCALES, head, n_kv_heads, low, high, is_int8, block[low - first :])
        for r in range(rows):
            token = (first_row + r) // group
            row = scores[r]
            _score(q[token, head * group + (first_row + r) % group], block, row)
            if cap > 0:
                soft_cap(row, cap)
            here = position + token
            for j in range(BLOCK):
                p = first + j
                if p > here or (window and p <= here - window):
                    row[j] = _MASKED
        _widen(
            table, VALUES, VALUE_SCALES, head, n_kv_heads, low, high, is_int8, block[low - first :]
        )
        for r in range(rows):
            maximum, total = _softmax_block(scores[r], maxima[r])
            decay = np.float32(math.exp(maxima[r] - maximum))
            _weigh(scores[r], block, decay, sums[r])
            maxima[r] = maximum
            divisors[r] = divisors[r] * decay + total
    for r in range(rows):
        token, query = (first_row + r) // group, head * group + (first_row + r) % group
        target = address_of(out[token]) + 4 * query * head_dim
        for i in range(0, 4 * head_dim, 64):
            store_f32(target + i, load_f32(address_of(sums[r]) + i) / splat(divisors[r]))
