"""Attention and its cache against their twins in plain NumPy (`twins.py`).

`test_isa.py` runs this file again for the other instruction sets that the machine has.
"""

from typing import Any

import numpy as np
import pytest
import reference
import twins
from numba import njit
from numpy.typing import NDArray
from test_kernels import on_threads

from gemma_cli.runtime import attention, attention_amx, isa, kv_cache, team, workspace
from gemma_cli.runtime.tables import Shape
from gemma_cli.runtime.workspace import FEW, Queries

Float32 = NDArray[np.float32]


@njit
def store_tokens(k, v, position, table, is_int8):
    for t in range(len(k)):
        slot = (position + t) % table[kv_cache.CAPACITY]
        for h in range(k.shape[1]):
            attention.store_head(k[t, h], v[t, h], table, h, slot, is_int8)


@team.stage
def merge(t, thread, starts, positions, s, window, scratch, out):
    heads = s.n_heads
    for first, last in ((0, heads // 2), (heads // 2, heads)):
        attention.merge_spans(t, first, last, starts, positions, s, window, scratch, thread, out[t])


@njit(nogil=True)
def run_spans(counters, thread, q, starts, positions, caches, s, window, is_int8, scratch, out):
    items = attention.n_span_items(starts, positions, s, window)
    attention.attend_spans(
        counters, 0, items, thread, q, starts, positions, caches, 0, s, window, is_int8, scratch
    )
    merge(counters, 1, len(out), thread, starts, positions, s, window, scratch, out)


@njit(nogil=True)
def run_rows(counters, thread, q, starts, positions, caches, s, window, is_int8, scratch, out):
    items = attention.n_row_items(starts, s, True)
    run = starts, positions, caches, 0, s, window, is_int8, True
    attention.attend_rows(counters, 0, items, thread, q, *run, (scratch,), out)


@njit(nogil=True)
def run_rows_amx(counters, thread, q, starts, positions, caches, s, window, is_int8, scratch, out):
    items = attention_amx.n_row_items(starts, s, False)
    run = starts, positions, caches, 0, s, window, is_int8, False
    attention_amx.attend_rows(counters, 0, items, thread, q, *run, scratch, out)


@njit
def round_queries(q, codes, scales, is_int8):
    for head in range(q.shape[0]):
        for row in range(q.shape[1]):
            scales[head, row] = attention.round_query(q[head, row], codes[head, row], is_int8)


class Cache:
    """One layer's keys and values; slots that nothing was written to have no scale."""

    def __init__(self, kind: str, capacity: int, n_kv_heads: int, head_dim: int) -> None:
        self.is_int8 = kind == "int8"
        capacity = -(-capacity // kv_cache.BLOCK) * kv_cache.BLOCK
        tiles = n_kv_heads, capacity // kv_cache.BLOCK, head_dim // 2, kv_cache.BLOCK, 2
        dtype = kv_cache.KINDS[kind]
        self.keys = np.full(tiles, 99, dtype)
        self.values = np.full((n_kv_heads, capacity // 2, head_dim, 2), 99, dtype)
        self.scales = np.full((2, n_kv_heads, capacity), np.nan, np.float32)
        self.table = np.array(
            [
                self.keys.ctypes.data,
                self.values.ctypes.data,
                self.scales[0].ctypes.data,
                self.scales[1].ctypes.data,
                capacity,
            ],
            np.int64,
        )

    def store(self, k: Float32, v: Float32, position: int) -> None:
        store_tokens(k.copy(), v, position, self.table, self.is_int8)

    def codes(self) -> NDArray[Any]:
        """Keys and values (2, capacity, n_kv_heads, head_dim) as they lie in the cache."""
        n_kv_heads, head_dim = len(self.values), self.values.shape[2]
        keys = self.keys.transpose(1, 3, 0, 2, 4).reshape(-1, n_kv_heads, head_dim)
        values = self.values.transpose(1, 3, 0, 2).reshape(-1, n_kv_heads, head_dim)
        return np.stack([keys, values])

    def stored(self) -> NDArray[np.float64]:
        """The same as numbers."""
        scales = self.scales.transpose(0, 2, 1)[..., None].astype(np.float64)
        return self.codes() * scales


def shape(n_heads: int, n_kv_heads: int, cap: float, head_dim: int = 0) -> Shape:
    return Shape(0, 0, 0, 0, n_heads, n_kv_heads, head_dim, 0, 0.0, 0.0, cap, 0.0)


def grouped(q: Float32, cache: Cache) -> Queries:
    """Queries (n, n_heads, head_dim) as attention takes them, with rows to spare."""
    n, n_heads, head_dim = q.shape
    n_kv_heads = len(cache.keys)
    rows = q.reshape(n, n_kv_heads, -1, head_dim).transpose(1, 0, 2, 3)
    rows = np.array(rows.reshape(n_kv_heads, -1, head_dim))
    spare = workspace.ROWS
    codes = np.full(q.size + spare * head_dim, 99, np.int16)[: q.size].reshape(rows.shape)
    scales = np.full(n * n_heads + spare, np.nan, np.float32)[: n * n_heads]
    queries = Queries(codes, scales.reshape(rows.shape[:2]))
    round_queries(rows, *queries, cache.is_int8)
    return queries


def rounded(q: Float32, cache: Cache) -> NDArray[np.float64]:
    """The same as numbers (n, n_heads, head_dim), as they are multiplied."""
    codes, scales = grouped(q, cache)
    rows = codes * scales[..., None].astype(np.float64)
    n, n_heads, head_dim = q.shape
    rows = rows.reshape(len(codes), n, -1, head_dim).transpose(1, 0, 2, 3)
    return rows.reshape(n, n_heads, head_dim)


WEIGHT_ERROR = workspace.SPAN / 2 / 32767
"""How much the rounding of weights can err, of the largest value: half a code for each position of
a span, and 32,767 of them are the span's largest weight, or 261,000 the sum of its weights."""


def attend_all(
    cache: Cache,
    q: Float32,
    k: Float32,
    v: Float32,
    window: int,
    cap: float,
    chunk: int,
    n_threads: int,
    amx: bool = False,
) -> Float32:
    """Attention of all tokens, a chunk at a time: (n, n_heads, head_dim)."""
    n_heads, n_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    s = shape(n_heads, n_kv_heads, cap, head_dim)
    out = np.full((len(q), q[0].size), np.nan, np.float32)
    partials = workspace.count_partials(n_heads, n_kv_heads, min(chunk, FEW), len(q))
    scratch: Any = workspace.allocate_attention(n_threads, head_dim, partials)
    own = workspace.allocate_amx_attention(n_threads, head_dim)
    for array in (*scratch, *own):
        array.view(np.uint8)[:] = 255  # NaN, or -1
    if amx:
        scratch = scratch, own
    for start in range(0, len(q), chunk):
        part = slice(start, start + chunk)
        cache.store(k[part], v[part], start)
        counters, rows = workspace.counters(2), grouped(q[part], cache)

        def work(
            thread: int,
            counters: Any = counters,
            rows: Queries = rows,
            part: slice = part,
            start: int = start,
        ) -> None:
            starts, positions = np.array([0, len(q[part])]), np.array([start])
            which = starts, positions, cache.table[None, None]
            run = run_spans if chunk <= FEW else run_rows_amx if amx else run_rows
            run(counters, thread, rows, *which, s, window, cache.is_int8, scratch, out[part])

        on_threads(n_threads, work)
    return out.reshape(q.shape)


def random_heads(
    rng: np.random.Generator, n: int, n_heads: int, n_kv_heads: int, head_dim: int
) -> tuple[Float32, Float32, Float32]:
    """Queries, keys and values whose scores are sharp: a deviation of 3."""
    q = 3 / np.sqrt(head_dim) * rng.standard_normal((n, n_heads, head_dim))
    k, v = rng.standard_normal((2, n, n_kv_heads, head_dim)).astype(np.float32)
    return q.astype(np.float32), k, v


HEADS = [(4, 1, 32), (6, 2, 64), (5, 5, 16), (9, 3, 32), (1, 1, 256)]
WINDOWS = [(0, 0.0), (1, 0.0), (7, 0.0), (40, 2.0), (200, 0.0), (0, 2.0)]


@pytest.mark.parametrize("kind", ["f16", "int8"])
@pytest.mark.parametrize(("window", "cap"), WINDOWS)
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), HEADS)
def test_attention_is_the_twins(
    n_heads: int, n_kv_heads: int, head_dim: int, window: int, cap: float, kind: str
) -> None:
    """One token at a time and in chunks, on several threads, in rings that wrap around."""
    n = 75
    rng = np.random.default_rng(12)
    q, k, v = random_heads(rng, n, n_heads, n_kv_heads, head_dim)
    whole = Cache(kind, n, n_kv_heads, head_dim)
    one_by_one = attend_all(whole, q, k, v, window, cap, chunk=1, n_threads=1)
    keys, values = whole.stored()[:, :n]
    expected, magnitudes = twins.attention(rounded(q, whole), keys, values, window, cap)
    # Sums of codes are exact. A score errs by four roundings, of the sum and of two scales, by 4 of
    # the cap where there is one; that and exp's 2e-7 are relative errors of a weight, once above
    # and once below the fraction. The sum of n weights errs by n roundings more.
    score_error = 4 * (magnitudes + cap) * twins.EPSILON
    relative = 2 * (score_error + 2e-7 + (n + 4) * twins.EPSILON) + WEIGHT_ERROR
    error = np.abs(one_by_one - expected).max(-1)
    assert (error <= relative * np.abs(values).max()).all()
    for chunk, n_threads in ((1, 4), (5, 1), (33, 2), (n, 3)):
        capacity = min(n, window + chunk) if window else n
        cache = Cache(kind, capacity, n_kv_heads, head_dim)
        out = attend_all(cache, q, k, v, window, cap, chunk, n_threads)
        np.testing.assert_array_equal(out, one_by_one)


@pytest.mark.parametrize("kind", ["f16", "int8"])
@pytest.mark.parametrize("window", [0, 300])
def test_attention_over_several_spans(window: int, kind: str) -> None:
    n, n_heads, n_kv_heads, head_dim = 2 * workspace.SPAN + 60, 4, 2, 16
    rng = np.random.default_rng(21)
    q, k, v = random_heads(rng, n, n_heads, n_kv_heads, head_dim)
    whole = Cache(kind, n, n_kv_heads, head_dim)
    one_by_one = attend_all(whole, q, k, v, window, 0.0, chunk=1, n_threads=2)
    keys, values = whole.stored()[:, :n]
    expected, magnitudes = twins.attention(rounded(q, whole), keys, values, window, 0.0)
    # As above; merging partial results takes some more roundings for each span.
    relative = 2 * ((4 * magnitudes + n + 20) * twins.EPSILON + 2e-7) + WEIGHT_ERROR
    error = np.abs(one_by_one - expected).max(-1)
    assert (error <= relative * np.abs(values).max()).all()
    for chunk in (7, FEW, 70, n):
        capacity = min(n, window + chunk) if window else n
        cache = Cache(kind, capacity, n_kv_heads, head_dim)
        out = attend_all(cache, q, k, v, window, 0.0, chunk, n_threads=2)
        np.testing.assert_array_equal(out, one_by_one)


@pytest.mark.skipif(not isa.AMX, reason="of AMX")
@pytest.mark.parametrize("kind", ["f16", "int8"])
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (1, 0.0), (40, 2.0), (300, 0.0)])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), [(6, 2, 64), (4, 1, 32)])
def test_attention_by_amx_is_the_twins(
    n_heads: int, n_kv_heads: int, head_dim: int, window: int, cap: float, kind: str
) -> None:
    """The same however many tokens go at once, over several spans, in rings that wrap around."""
    n = workspace.SPAN + 75
    rng = np.random.default_rng(28)
    q, k, v = random_heads(rng, n, n_heads, n_kv_heads, head_dim)
    whole = Cache(kind, n, n_kv_heads, head_dim)
    at_once = attend_all(whole, q, k, v, window, cap, n, n_threads=2, amx=True)
    heads = twins.bfloat16(whole.codes()[:, :n].astype(np.float32))  # as int8 codes are already
    keys, values = heads * whole.scales[..., :n, None].transpose(0, 2, 1, 3)
    codes, scales = grouped(q, whole)
    queries = twins.bfloat16(codes.astype(np.float32)) * scales[..., None]
    queries = queries.reshape(n_kv_heads, n, -1, head_dim).transpose(1, 0, 2, 3).reshape(q.shape)
    expected, magnitudes = twins.attention(queries, keys, values, window, cap)
    # As in test_attention_is_the_twins, but scores are sums of floats, which err by head_dim
    # roundings of their magnitudes, and a weight is rounded to bfloat16 before it is used.
    score_error = ((head_dim + 2) * magnitudes + 4 * cap) * twins.EPSILON
    relative = 2 * (score_error + 2e-7 + (n + 20) * twins.EPSILON) + 2.0**-8
    error = np.abs(at_once - expected).max(-1)
    assert (error <= relative * np.abs(values).max()).all()
    for chunk, n_threads in ((17, 1), (150, 4)):
        capacity = min(n, window + chunk) if window else n
        cache = Cache(kind, capacity, n_kv_heads, head_dim)
        out = attend_all(cache, q, k, v, window, cap, chunk, n_threads, amx=True)
        n_many = n // chunk * chunk  # A rest may be FEW tokens.
        np.testing.assert_array_equal(out[:n_many], at_once[:n_many])


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (6, 1, 9), (3, 40, 1, 17)])
def test_attention_of_several_sequences(lengths: tuple[int, ...], window: int) -> None:
    """Tokens at different depths, few and many, as those of each alone."""
    rng = np.random.default_rng(22)
    n_heads, n_kv_heads, head_dim, context = 6, 2, 32, 720
    starts, positions = np.cumsum([0, *lengths]), np.array([5, 680, 300, 0])[: len(lengths)]
    n = starts[-1]
    queries, k, v = random_heads(rng, context, n_heads, n_kv_heads, head_dim)
    queries = queries[:n]
    caches = [Cache("f16", context, n_kv_heads, head_dim) for _ in lengths]
    for cache, position, length in zip(caches, positions, lengths, strict=True):
        cache.store(np.roll(k, position, 0)[: position + length], v[: position + length], 0)
    tables = np.stack([cache.table[None] for cache in caches])
    s = shape(n_heads, n_kv_heads, 0.0, head_dim)
    partials = workspace.count_partials(n_heads, n_kv_heads, min(n, FEW), context)
    scratch: Any = workspace.allocate_attention(1, head_dim, partials)
    amx = workspace.allocate_amx_attention(1, head_dim)

    def attend(some: slice) -> Float32:
        """The sequences' outputs, by the kernel that takes so many tokens as all have."""
        own = starts[some.start : some.stop + 1]
        tokens, first = slice(own[0], own[-1]), own - own[0]
        out = np.full((first[-1], n_heads * head_dim), np.nan, np.float32)
        run, memory = run_spans, scratch
        if n > FEW:
            run, memory = (run_rows_amx, (scratch, amx)) if isa.AMX else (run_rows, scratch)
        which = grouped(queries[tokens], caches[0]), first, positions[some], tables[some]
        run(workspace.counters(2), 0, *which, s, window, False, memory, out)
        return out

    together = attend(slice(0, len(lengths)))
    alone = [attend(slice(i, i + 1)) for i in range(len(lengths))]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    assert np.isfinite(together).all()


def test_attention_with_scores_far_apart() -> None:
    """The running maximum climbs, and falls back, by more than exp can express."""
    q, k, v = random_heads(np.random.default_rng(13), 100, 2, 1, 32)
    q *= 100
    cache = Cache("f16", 100, 1, 32)
    out = attend_all(cache, q, k, v, 0, 0.0, chunk=100, n_threads=2)
    keys, values = cache.stored()[:, :100]
    expected, magnitudes = twins.attention(rounded(q, cache), keys, values, 0, 0.0)
    error = np.abs(out - expected).max(-1)
    relative = 2 * (4 * magnitudes * twins.EPSILON + 2e-7 + 104 * twins.EPSILON) + WEIGHT_ERROR
    assert (error <= relative * np.abs(values).max()).all()


def test_sixteen_bits_are_closer_than_float16() -> None:
    """What all roundings of the default cache err, beside float16 keys and values alone."""
    n = 400
    q, k, v = random_heads(np.random.default_rng(29), n, 4, 1, 256)
    out = attend_all(Cache("f16", n, 1, 256), q, k, v, 0, 0.0, n, n_threads=2)
    exact, _ = twins.attention(*(x.astype(np.float64) for x in (q, k, v)), 0, 0.0)
    halves = (x.astype(np.float16).astype(np.float64) for x in (k, v))
    half, _ = twins.attention(q.astype(np.float64), *halves, 0, 0.0)
    assert np.square(out - exact).mean() < np.square(half - exact).mean()


def test_keys_and_queries_that_are_rotated_have_the_same_products() -> None:
    """Also where heads are no power of 2 wide."""
    rng = np.random.default_rng(31)
    for head_dim in (16, 32, 48, 192, 256):
        x, y = rng.standard_normal((2, 5, head_dim)).astype(np.float32)
        x[:, 3] *= 50
        turned = reference.spread(x)
        np.testing.assert_allclose(turned @ reference.spread(y).T, x @ y.T, rtol=1e-4, atol=1e-3)
        if head_dim == 256:
            assert (np.abs(turned).max(-1) < np.abs(x).max(-1) / 2).all()
        cache = Cache("int8", 5, 1, head_dim)
        cache.store(x[:, None], y[:, None], 0)
        steps = cache.scales[0, 0, :5, None]
        np.testing.assert_allclose(cache.stored()[0, :5, 0], turned, atol=0.51 * steps.max())


@pytest.mark.parametrize("head_dim", [16, 128, 256, 1024])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("components", ["one", "all"])
def test_products_as_large_as_codes_allow_do_not_overflow(
    head_dim: int, size: float, components: str
) -> None:
    """Keys are the query or its opposite; values are all alike, but for the opposites' sign.

    An overflow would change a score's sign, and what has weight, or the sign of what is summed.
    """
    n = workspace.SPAN
    head = np.zeros((n, 1, head_dim), np.float32)
    head[..., : 1 if components == "one" else head_dim] = 1
    signs = np.where(np.arange(n) % 3, 1, -1).astype(np.float32)[:, None, None]
    k, v = head * signs * np.float32(size), np.full_like(head, size) * signs
    cache = Cache("f16", n, 1, head_dim)
    out = attend_all(cache, head / np.float32(size), k, v, 0, 0.0, 1, 1)
    expected, _ = twins.attention(*(x.astype(np.float64) for x in (head, head * signs, v)), 0, 0.0)
    # Keys of one direction are rounded alike, so what is left is the rounding of weights.
    np.testing.assert_allclose(out, expected, rtol=0, atol=WEIGHT_ERROR * size)


@pytest.mark.parametrize("kind", ["f16", "int8"])
def test_what_lies_in_slots_not_seen_has_no_effect(kind: str) -> None:
    """Also where an earlier token there was no number; its scale is none."""
    q, k, v = random_heads(np.random.default_rng(30), 20, 2, 1, 32)
    clean, used = Cache(kind, 32, 1, 32), Cache(kind, 32, 1, 32)
    used.store(np.full_like(k, np.inf), np.full_like(v, np.nan), 0)
    expected = attend_all(clean, q, k, v, 0, 0.0, 1, n_threads=1)
    for chunk in (1, 20):
        np.testing.assert_array_equal(attend_all(used, q, k, v, 0, 0.0, chunk, 1), expected)


@pytest.mark.parametrize("kind", ["f16", "int8"])
def test_cached_heads_are_rounded_as_the_twin_rounds_them(kind: str) -> None:
    """To the nearest of steps that are as small as codes may be large."""
    rng = np.random.default_rng(14)
    k, v = (rng.standard_normal((2, 10, 3, 64)) * rng.lognormal(0, 2, (2, 10, 3, 1))).astype("f4")
    k[0, 0] = 0
    k[0, 1] = 1e-40
    k[0, 2, 1:] *= 1e-3  # one component is most of it
    cache = Cache(kind, 10, 3, 64)
    cache.store(k, v, 0)
    k = reference.spread(k) if kind == "int8" else k
    limits = {"f16": (32767, reference.NORM, 8191), "int8": (127, np.inf, 127)}[kind]
    largest_key, norm, largest_value = limits
    key_steps = np.maximum(np.abs(k).max(-1) / largest_key, np.linalg.norm(k, axis=-1) / norm)
    steps = cache.scales[..., :10].transpose(0, 2, 1)
    expected = np.stack([key_steps, np.abs(v).max(-1) / largest_value])
    np.testing.assert_allclose(steps, expected, rtol=1e-6, atol=1e-40)
    # Codes err by half a step, and by roundings of what is up to 32,767 steps, or, where heads are
    # rotated, of 127 steps a few times; what is less than 1e-30 may be zero.
    error = np.abs(cache.stored()[:, :10] - np.stack([k, v]))
    assert (error <= (0.5 + 32767 * 4 * twins.EPSILON) * steps[..., None] + 1e-30).all()


def test_keys_go_to_their_slot_of_the_ring() -> None:
    k, v = np.random.default_rng(15).standard_normal((2, 40, 2, 16)).astype(np.float32)
    cache = Cache("f16", 32, 2, 16)
    cache.store(k, v, 9)
    stored = cache.stored()
    for t in range(8, 40):
        # Half of a code, of which the largest component has 8,191.
        for heads, numbers in zip((k, v), stored, strict=True):
            largest = np.abs(heads[t]).max()
            np.testing.assert_allclose(numbers[(9 + t) % 32], heads[t], atol=largest / 16_000)
