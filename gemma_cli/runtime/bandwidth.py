"""The memory's read bandwidth: what decoding, which reads every weight, cannot outrun."""

import statistics
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from gemma_cli.runtime.kernel import entry

BUFFER_BYTES = 512 << 20  # several times any desktop CPU's cache


def read_bandwidth(n_threads: int, repeat: int = 3) -> float:
    """Memory read bandwidth in GB/s: the median over some sums of a buffer larger than any cache.

    The buffer is written first: pages that were never written are all one page of zeros.
    """
    buffer = np.ones(BUFFER_BYTES // 8, dtype=np.int64)
    parts = np.array_split(buffer, n_threads)
    total(parts[0][:8])  # compiled here
    seconds = []
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(repeat):
            started = perf_counter()
            read = sum(pool.map(total, parts))
            seconds.append(perf_counter() - started)
            assert read == buffer.size
    return buffer.nbytes / statistics.median(seconds) / 1e9


@entry
def total(values: NDArray[np.int64]) -> int:
    """Their sum; four sums in a row, since one chain of additions would wait for itself."""
    a = b = c = d = 0
    quarter = len(values) // 4
    for i in range(quarter):
        a += values[i]
        b += values[i + quarter]
        c += values[i + 2 * quarter]
        d += values[i + 3 * quarter]
    for i in range(4 * quarter, len(values)):
        a += values[i]
    return a + b + c + d
