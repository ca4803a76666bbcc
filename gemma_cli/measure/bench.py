"""Speed: prefilling, decoding, and the memory bandwidth that decoding cannot outrun."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from gemma_cli.runtime.bandwidth import read_bandwidth

if TYPE_CHECKING:
    from gemma_cli.runtime import Model


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over the repeats."""

    prefill_tokens: int
    prefill_tok_s: float
    decode_tokens: int
    decode_depth: int  # tokens in the cache when decoding begins
    decode_tok_s: float
    read_gb_s: float  # 10^9 bytes a second
    bytes_per_token: int  # weights that decoding one token reads
    rss_mb: float  # memory of the process with the model in use, 10^6 bytes

    @property
    def roofline(self) -> float:
        """The share of the read bandwidth that decoding makes use of: 1 is all of it."""
        return self.decode_tok_s * self.bytes_per_token / (self.read_gb_s * 1e9)


def measure_speed(
    model: Model,
    *,
    prompt_tokens: int,
    tokens: int,
    depth: int,
    repeat: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Speed:
    """Times the model alone (no tokenizer, no sampling) on ids that are random but always the same.

    Decoding goes on greedily, since the output head's work depends on how sure the model is.

    `progress` is called with the number of rounds done, `repeat` of them. A first, untimed round
    is a short one: it touches the weights' pages and loads the kernels.
    """
    random = np.random.default_rng(0)
    ids = random.integers(4, model.config.vocab_size, 2**16, dtype=np.int32)
    cache = model.new_cache(max(prompt_tokens, depth + tokens, 2))
    model.forward(ids[:1], cache)
    model.forward(ids[1:2], cache, n_best=1)

    prefill: list[float] = []
    decode: list[float] = []
    rss_mb = 0.0
    for done in range(repeat):
        cache.clear()
        started = perf_counter()
        model.forward(np.resize(ids, prompt_tokens), cache)
        prefill.append(prompt_tokens / (perf_counter() - started))

        cache.clear()
        if depth:
            model.forward(np.resize(ids, depth), cache)
        token = int(ids[1])
        started = perf_counter()
        for _ in range(tokens):
            token = int(model.forward([token], cache, n_best=1).argmax())
        decode.append(tokens / (perf_counter() - started))
        rss_mb = max(rss_mb, resident_mb())
        progress(done + 1)
    return Speed(
        prompt_tokens,
        statistics.median(prefill),
        tokens,
        depth,
        statistics.median(decode),
        read_bandwidth(model.n_threads, repeat),
        model.bytes_per_token,
        rss_mb,
    )


def resident_mb() -> float:
    """Memory of this process in 10^6 bytes; where /proc is missing, its peak."""
    try:
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024 / 1e6
    except (OSError, StopIteration):
        import resource  # noqa: PLC0415 (not on Windows)

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
