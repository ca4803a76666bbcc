"""Quality: perplexity, and the divergence of a quantized model from its reference.

Perplexity is llama-perplexity's: the text with BOS in front is cut into chunks of 512 tokens that
do not overlap, the first token of each gives way to BOS, and the second half is scored: positions
256 to 510 predict tokens 257 to 511, 255 predictions a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gemma_cli.runtime import KVCache, Model

CHUNK = 512
FIRST = CHUNK // 2
PREDICTIONS = CHUNK - 1 - FIRST

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Kullback-Leibler divergence from the reference over the whole vocabulary, in nats."""

    mean: float
    stderr: float
    median: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Quality:
    tokens: int  # predictions scored
    perplexity: float
    perplexity_stderr: float
    kl: Divergence | None = None  # with a reference
    same_top: float | None = None  # share of positions where both rank the same token first


def chunks(ids: Sequence[int], bos_id: int, limit: int | None = None) -> list[NDArray[np.int32]]:
    """Cuts a text's ids (without BOS) into whole chunks; a shorter rest is left out."""
    text = np.array([bos_id, *ids], dtype=np.int32)
    whole = text[: len(text) // CHUNK * CHUNK].reshape(-1, CHUNK)[:limit].copy()
    whole[:, 0] = bos_id
    return list(whole)


def measure_quality(
    model: Model,
    text: Sequence[NDArray[np.int32]],
    base: Model | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Quality:
    """Scores the chunks of `chunks`, both models going over the same chunk side by side.

    `progress` is called with the number of chunks done. Logits are held for a block of positions
    at a time, never for a whole chunk.
    """
    surprise: list[float] = []
    divergence: list[float] = []
    same: list[bool] = []
    cache = model.new_cache(CHUNK)
    base_cache = base.new_cache(CHUNK) if base else None
    log_q, log_p, scratch = np.empty((3, model.config.vocab_size))
    for done, chunk in enumerate(text):
        targets = chunk[FIRST + 1 :]
        references = scored_rows(base, chunk, base_cache) if base and base_cache else None
        # The last position has logits too, and no token of the chunk to predict.
        for target, row in zip(targets, scored_rows(model, chunk, cache), strict=False):
            log_softmax(row, log_q, scratch)
            surprise.append(-float(log_q[target]))
            if references:
                log_softmax(next(references), log_p, scratch)
                divergence.append(kl_divergence(log_p, log_q, scratch))
                same.append(bool(log_p.argmax() == log_q.argmax()))
        progress(done + 1)

    mean, stderr = mean_and_stderr(np.array(surprise))
    perplexity = math.exp(mean)
    quality = Quality(len(surprise), perplexity, perplexity * stderr)
    if not base:
        return quality
    kl = np.array(divergence)
    median, p90, p99 = np.quantile(kl, [0.5, 0.9, 0.99])
    return Quality(
        quality.tokens,
        quality.perplexity,
        quality.perplexity_stderr,
        Divergence(*mean_and_stderr(kl), float(median), float(p90), float(p99), float(kl.max())),
        float(np.mean(same)),
    )


def scored_rows(
    model: Model, chunk: NDArray[np.int32], cache: KVCache
) -> Iterator[NDArray[np.float32]]:
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
    """sum p (ln p - ln q), which can only be negative by rounding."""
    p = np.exp(log_p, out=scratch)
    return max(0.0, float(p @ log_p - p @ log_q))


def mean_and_stderr(values: Floats) -> tuple[float, float]:
    """The mean and its standard error, taking the values as independent, as llama.cpp does."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
