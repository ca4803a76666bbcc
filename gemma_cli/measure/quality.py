"""Quality: perplexity, and the divergence of a quantized model from its reference.

Perplexity is llama-perplexity's: the text with BOS in front is cut into chunks of 512 tokens that
do not overlap, the first token of each gives way to BOS, and the second half is scored: positions
256 to 510 predict tokens 257 to 511, 255 predictions a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gemma_cli.runtime import KVCache, Model

CHUNK = 512
FIRST = CHUNK // 2
PREDICTIONS = CHUNK - 1 - FIRST

Floats = NDArray[np.float64]
Rows = Iterator[NDArray[np.float32]]
"""Logits (vocab_size,), position after position; one may be overwritten by the next."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Kullback-Leibler divergence from the reference over the whole vocabulary, in nats."""

    mean: float
    stderr: float
    median: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float


@dataclass(frozen=True, slots=True)
class Quality:
    """Of predictions; all but the first three fields are there with a reference."""

    tokens: int  # predictions scored
    perplexity: float
    perplexity_stderr: float
    kl: Divergence | None = None
    same_top: float | None = None  # share of positions where both rank the same token first
    same_top_stderr: float | None = None
    top_change: float | None = None  # of the probability of the reference's first token, RMS
    top_change_stderr: float | None = None


def chunks(ids: Sequence[int], bos_id: int, limit: int | None = None) -> list[NDArray[np.int32]]:
    """Cuts a text's ids (without BOS) into whole chunks; a shorter rest is left out."""
    text = np.array([bos_id, *ids], dtype=np.int32)
    whole = text[: len(text) // CHUNK * CHUNK].reshape(-1, CHUNK)[:limit].copy()
    whole[:, 0] = bos_id
    return list(whole)


def measure_quality(
    model: Model,
    text: Sequence[NDArray[np.int32]],
    reference: Iterable[Rows] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Quality:
    """Scores the chunks of `chunks`, and compares with a reference's logits for each (`rows_of`).

    `progress` is called with the number of chunks done. Logits are held for a block of positions
    at a time, never for a whole chunk.
    """
    surprise: list[float] = []
    divergence: list[float] = []
    same: list[bool] = []
    squared_change: list[float] = []
    log_q, log_p, scratch = np.empty((3, model.config.vocab_size))
    references = iter(reference) if reference is not None else None
    for done, (chunk, rows) in enumerate(zip(text, rows_of(model, text), strict=True)):
        targets = chunk[FIRST + 1 :]
        rows_p = next(references) if references else None
        # The last position has logits too, and no token of the chunk to predict.
        for target, row in zip(targets, rows, strict=False):
            log_softmax(row, log_q, scratch)
            surprise.append(-float(log_q[target]))
            if rows_p:
                log_softmax(next(rows_p), log_p, scratch)
                divergence.append(kl_divergence(log_p, log_q, scratch))
                top = log_p.argmax()
                same.append(bool(top == log_q.argmax()))
                squared_change.append(float(np.exp(log_p[top]) - np.exp(log_q[top])) ** 2)
        progress(done + 1)

    mean, stderr = mean_and_stderr(np.array(surprise))
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(mean))
    quality = Quality(len(surprise), perplexity, perplexity * stderr)
    if references is None:
        return quality
    kl = np.array(divergence)
    quantiles = map(float, np.quantile(kl, [0.5, 0.9, 0.95, 0.99, 0.999, 1]))
    same_top, same_top_stderr = mean_and_stderr(np.array(same, np.float64))
    square, square_stderr = mean_and_stderr(np.array(squared_change))
    change = math.sqrt(square)
    return replace(
        quality,
        kl=Divergence(*mean_and_stderr(kl), *quantiles),
        same_top=same_top,
        same_top_stderr=same_top_stderr,
        top_change=change,
        # To first order: d sqrt(x) = dx / (2 sqrt(x)).
        top_change_stderr=square_stderr / (2 * change) if change else 0.0,
    )


def rows_of(model: Model, text: Sequence[NDArray[np.int32]]) -> Iterator[Rows]:
    """For each chunk a model's logits in its second half."""
    cache = model.new_cache(CHUNK)
    return (scored_rows(model, chunk, cache) for chunk in text)


def scored_rows(model: Model, chunk: NDArray[np.int32], cache: KVCache) -> Rows:
    """Logits (vocab_size,) for each position of the second half, in order."""
    cache.clear()
    for block in model.forward_all(chunk, cache, first=FIRST):
        yield from block


def log_softmax(logits: NDArray[np.float32], out: Floats, scratch: Floats) -> None:
    """Writes ln softmax(logits) to `out`. Fresh arrays of this size would cost more than the sums:
    the system hands out their pages anew each time."""
    np.subtract(logits, logits.max(), out=out, dtype=np.float64)
    out -= np.log(np.exp(out, out=scratch).sum())


def kl_divergence(log_p: Floats, log_q: Floats, scratch: Floats) -> float:
    """sum p (ln p - ln q), which can only be negative by rounding; NaN where there is one."""
    p = np.exp(log_p, out=scratch)
    return float(np.maximum(0.0, p @ log_p - p @ log_q))


def mean_and_stderr(values: Floats) -> tuple[float, float]:
    """The mean and its standard error, taking the values as independent, as llama.cpp does."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
