"""A model for tests of generation: fast, random, and given to repeating itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemma_cli.runtime.model import MOST_ROWS

VOCAB_SIZE = 12


@dataclass
class Config:
    context_length: int = 1000


@dataclass
class Cache:
    capacity: int = 200
    ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.ids)

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        del self.ids[length:]

    def copy(self) -> "Cache":
        return Cache(self.capacity, list(self.ids))

    def state(self) -> list[int]:
        return self.ids

    def restore(self, state: list[int]) -> None:
        self.ids[:] = state


class Markov:
    """Logits that depend on the last two ids in the cache; only the n_best largest are there.

    Of equal ones that with the lowest id counts as larger. `calls` has the ids of each call.
    """

    config = Config()

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.calls: list[list[int]] = []
        self.interrupt_at = -1  # the call in which someone presses Ctrl-C, when it is all but done

    def _append(self, token: int, cache: Cache, n_best: int) -> NDArray[np.float32]:
        assert 0 <= token < VOCAB_SIZE
        cache.ids.append(token)
        assert cache.length <= cache.capacity
        random = np.random.default_rng([self.seed, *cache.ids[-2:]])
        logits = random.normal(0, 3, VOCAB_SIZE).astype(np.float32)
        if n_best:
            logits[np.argsort(-logits, kind="stable")[n_best:]] = -np.inf
        return logits

    def _interrupt(self) -> None:
        if len(self.calls) - 1 == self.interrupt_at:
            raise KeyboardInterrupt

    def forward(
        self,
        ids: Sequence[int],
        cache: Cache,
        *,
        n_best: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> NDArray[np.float32]:
        self.calls.append(list(ids))
        logits = [self._append(token, cache, n_best) for token in ids][-1]
        self._interrupt()
        return logits

    def forward_each(
        self, ids: Sequence[int], cache: Cache, *, n_best: int = 0
    ) -> NDArray[np.float32]:
        assert len(ids) <= MOST_ROWS
        self.calls.append(list(ids))
        logits = np.stack([self._append(token, cache, n_best) for token in ids])
        self._interrupt()
        return logits

    batch_tokens = 20

    def forward_batch(
        self, runs: Sequence[Sequence[int]], caches: Sequence[Cache], *, n_best: int = 0
    ) -> NDArray[np.float32]:
        assert len(runs) <= MOST_ROWS
        assert sum(map(len, runs)) <= self.batch_tokens
        self.calls.append([token for ids in runs for token in ids])
        return np.stack(
            [
                [self._append(token, cache, n_best) for token in ids][-1]
                for ids, cache in zip(runs, caches, strict=True)
            ]
        )
