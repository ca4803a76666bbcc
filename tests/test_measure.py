"""Perplexity, divergence and bandwidth against direct computation, with models that are tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_cli.measure import bench
from gemma_cli.measure.quality import CHUNK, FIRST, chunks, measure_quality, rows_of
from gemma_cli.runtime import bandwidth

VOCAB = 50
BOS = 2


@dataclass
class Config:
    vocab_size: int = VOCAB


class Cache:
    def __init__(self) -> None:
        self.ids: list[int] = []

    def clear(self) -> None:
        self.ids = []


class Table:
    """A model whose logits are a row of a random table: that of the last id and the position."""

    config = Config()
    n_threads = 1
    bytes_per_token = 1000

    def __init__(self, seed: int, block: int = 7) -> None:
        self.table = np.random.default_rng(seed).normal(0, 2, (VOCAB, CHUNK, VOCAB))
        self.block = np.zeros((block, VOCAB), dtype=np.float32)
        self.calls: list[tuple[int, int]] = []  # tokens in the cache, new ones

    def new_cache(self, context: int) -> Cache:
        return Cache()

    def logits(self, ids: Sequence[int], position: int) -> NDArray[np.float32]:
        return self.table[ids[position], position].astype(np.float32)

    def forward(self, ids: Sequence[int], cache: Cache, n_best: int = 0) -> NDArray[np.float32]:
        self.calls.append((len(cache.ids), len(ids)))
        cache.ids += list(ids)
        return self.logits(cache.ids, len(cache.ids) - 1)

    def forward_all(
        self, ids: Sequence[int], cache: Cache, first: int = 0
    ) -> Iterator[NDArray[np.float32]]:
        assert cache.ids == []
        cache.ids += list(ids)
        for start in range(first, len(ids), len(self.block)):
            n = min(len(self.block), len(ids) - start)
            for i in range(n):
                self.block[i] = self.logits(ids, start + i)  # the same memory each time
            yield self.block[:n]


def softmax(logits: NDArray[np.float32]) -> NDArray[np.longdouble]:
    e = np.exp(logits.astype(np.longdouble) - logits.max())
    return e / e.sum()


def text(n: int) -> list[int]:
    return np.random.default_rng(1).integers(3, VOCAB, n).tolist()


def test_chunks() -> None:
    ids = text(1600)
    cut = chunks(ids, BOS)
    assert [len(chunk) for chunk in cut] == [CHUNK] * 3  # BOS and 1,600 ids; 65 are left out
    assert [int(chunk[0]) for chunk in cut] == [BOS] * 3
    # As llama-perplexity: BOS in front of the text, and again in place of each chunk's first.
    assert cut[0][1:].tolist() == ids[: CHUNK - 1]
    assert cut[1][1:].tolist() == ids[CHUNK : 2 * CHUNK - 1]
    assert len(chunks(ids, BOS, limit=2)) == 2
    assert chunks(ids[: CHUNK - 2], BOS) == []


@pytest.mark.parametrize("base_block", [7, 256])
def test_quality(base_block: int) -> None:
    model, base = Table(seed=1), Table(seed=2, block=base_block)
    cut = chunks(text(2 * CHUNK), BOS)
    done: list[int] = []
    quality = measure_quality(cast(Any, model), cut, rows_of(cast(Any, base), cut), done.append)
    assert done == [1, 2]

    surprise, kl, same, change = [], [], [], []
    for chunk in cut:
        for position in range(FIRST, CHUNK - 1):
            q = softmax(model.logits(chunk, position))
            p = softmax(base.logits(chunk, position))
            surprise.append(-np.log(q[chunk[position + 1]]))
            kl.append((p * (np.log(p) - np.log(q))).sum())
            same.append(p.argmax() == q.argmax())
            change.append(p.max() - q[p.argmax()])
    assert quality.tokens == len(surprise) == 2 * 255
    n = len(surprise)
    # Both sides sum about fifty numbers in float64 or better.
    close = {"rel": 1e-9}
    perplexity = float(np.exp(np.mean(surprise)))
    assert quality.perplexity == pytest.approx(perplexity, **close)
    stderr = float(np.std(surprise, ddof=1) / np.sqrt(n))
    assert quality.perplexity_stderr == pytest.approx(perplexity * stderr, **close)
    assert quality.same_top == pytest.approx(np.mean(same), **close)
    share = float(np.mean(same))
    # The standard deviation of a share, with n - 1.
    assert quality.same_top_stderr == pytest.approx(np.sqrt(share * (1 - share) / (n - 1)), **close)
    rms = float(np.sqrt(np.mean(np.square(change))))
    assert quality.top_change == pytest.approx(rms, **close)
    # How much the RMS moves when the mean square does by its standard error.
    moved = np.sqrt(rms**2 + 1e-6 * np.std(np.square(change), ddof=1) / np.sqrt(n)) - rms
    assert quality.top_change_stderr == pytest.approx(1e6 * float(moved), rel=1e-4)
    assert quality.kl is not None
    assert quality.kl.mean == pytest.approx(float(np.mean(kl)), **close)
    assert quality.kl.stderr == pytest.approx(float(np.std(kl, ddof=1) / np.sqrt(n)), **close)
    ordered = sorted(map(float, kl))
    assert quality.kl.max == pytest.approx(ordered[-1], **close)
    assert quality.kl.median == pytest.approx((ordered[254] + ordered[255]) / 2, **close)
    assert ordered[457] <= quality.kl.p90 <= ordered[459]
    assert ordered[483] <= quality.kl.p95 <= ordered[485]
    assert ordered[502] <= quality.kl.p99 <= ordered[505]
    assert ordered[508] <= quality.kl.p999 <= ordered[509]


def test_a_model_does_not_diverge_from_itself() -> None:
    cut = chunks(text(CHUNK), BOS)
    same = rows_of(cast(Any, Table(seed=1)), cut)
    quality = measure_quality(cast(Any, Table(seed=1)), cut, same)
    assert quality.kl is not None
    assert quality.kl.max == 0.0
    assert quality.same_top == 1.0
    assert quality.top_change == quality.top_change_stderr == 0.0
    alone = measure_quality(cast(Any, Table(seed=1)), cut)
    assert alone.perplexity == quality.perplexity
    assert alone.kl is None
    assert alone.same_top is None


def test_uniform_logits() -> None:
    model = Table(seed=1)
    model.table[:] = -3.0
    quality = measure_quality(cast(Any, model), chunks(text(CHUNK), BOS))
    assert quality.perplexity == pytest.approx(VOCAB)
    assert quality.perplexity_stderr == pytest.approx(0, abs=1e-12)


def test_large_logits_do_not_overflow() -> None:
    model, base = Table(seed=1), Table(seed=1)
    model.table *= 50
    base.table = model.table + 1e4  # the same distribution, and exp(10,000) is no float64
    cut = chunks(text(CHUNK), BOS)
    quality = measure_quality(cast(Any, model), cut, rows_of(cast(Any, base), cut))
    assert np.isfinite(quality.perplexity)
    assert quality.kl is not None
    # float32 holds 10,000 to 1/1000, so a logarithm of p is off by no more than twice that.
    assert quality.kl.max < 2e-3


@pytest.mark.parametrize("depth", [0, 5])
def test_speed_runs_what_it_says(monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    monkeypatch.setattr(bench, "read_bandwidth", lambda n_threads, repeat: 20.0)
    model = Table(seed=1)
    done: list[int] = []
    speed = bench.measure_speed(
        cast(Any, model),
        prompt_tokens=9,
        tokens=3,
        depth=depth,
        repeat=2,
        progress=done.append,
    )
    assert done == [1, 2]
    prefill_depth = [(0, depth)] if depth else []
    decode = [(depth + i, 1) for i in range(3)]
    assert model.calls[2:] == 2 * [(0, 9), *prefill_depth, *decode]
    assert (speed.prefill_tokens, speed.decode_tokens, speed.decode_depth) == (9, 3, depth)
    assert speed.roofline == pytest.approx(speed.decode_tok_s * 1000 / 20e9)


def test_bandwidth_reads_every_value_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for n in (0, 3, 4, 4099):
        values = np.arange(n, dtype=np.int64) ** 2
        assert bandwidth.total(values) == values.sum()

    # The time of a sum is known: half a second for each, by a clock that ticks so.
    ticks = iter(np.arange(100) / 2)
    monkeypatch.setattr(bandwidth, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 800_000)
    for n_threads in (1, 3):
        assert bandwidth.read_bandwidth(n_threads) == pytest.approx(800_000 / 0.5 / 1e9)


def test_resident_memory_follows_what_is_written() -> None:
    before = bench.resident_mb()
    written = np.ones(100_000_000, dtype=np.int8)
    assert bench.resident_mb() - before == pytest.approx(100, abs=20)
    assert written.all()
