"""Logits to one token id: repeat penalty, top-k, temperature, top-p, min-p, and a draw.

The order is Hugging Face's: the temperature acts before top-p and min-p, so a higher one keeps
more tokens. (llama.cpp applies it last. Top-k is the same before or after it.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quantize.errors import GemmaError

if TYPE_CHECKING:
    from gemma_cli.constraint import Constraint

REPEAT_WINDOW = 64  # tokens that the repeat penalty looks back on, as in llama.cpp
BLOCK = 256  # logits for each maximum in the search for the largest ones

LIKELIEST = 64
"""Ids that a constraint leaves some of, if top-k is not more: with Gemma's own top-k, those that
would be drawn from without it. Where it leaves none it chooses from all."""

LIKELIEST_GREEDY = 8
"""The same at a temperature of 0, where their number changes no answer: fewer are found sooner."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; the defaults are those recommended for Gemma.

    Raises `ValueError` for a value out of its range.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 64  # 0 keeps all
    top_p: float = 0.95  # 1 keeps all
    min_p: float = 0.0  # 0 keeps all
    repeat_penalty: float = 1.0  # 1 is none
    seed: int | None = None  # None is a different draw each time

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError("the temperature must be 0 or more")
        if self.top_k < 0:
            raise ValueError("top-k must be 0 (keep all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError("top-p must be more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError("min-p must be between 0 and 1")
        if not (math.isfinite(self.repeat_penalty) and self.repeat_penalty > 0):
            raise ValueError("the repeat penalty must be more than 0")
        if self.seed is not None and self.seed < 0:
            raise ValueError("the seed must be 0 or more")

    @property
    def n_best(self) -> int:
        """How many of the largest logits decide the draw; 0 for all.

        Any others may be -inf and nothing changes. A repeat penalty lowers at most REPEAT_WINDOW
        of the largest ones, so that as many may come up from behind them; one below 1 raises
        logits, wherever they are. Top-p alone takes its share of the sum over all.
        """
        kept = 1 if self.temperature == 0 else self.top_k
        if not kept or self.repeat_penalty < 1:
            return 0
        return kept if self.repeat_penalty == 1 else kept + REPEAT_WINDOW

    def at(self, index: int) -> Sampling:
        """The same with a seed of its own, `seed + index`, for one of several prompts."""
        return self if self.seed is None else replace(self, seed=self.seed + index)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """An id's natural log of the probability that the model itself gives it, before anything of
    `Sampling` and before a constraint; and those of the likeliest ids, in falling order."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Sampler:
    """Draws one id after the other; the same seed and the same logits give the same ids.

    With a constraint, it draws from what that allows of the LIKELIEST ids, or of the top-k ones if
    those are more, or of all if it allows none of those. With `n_top`, it keeps the `logprobs` of
    each id drawn, and of the n_top likeliest there.
    """

    def __init__(
        self,
        sampling: Sampling,
        constraint: Constraint | None = None,
        n_top: int | None = None,
    ) -> None:
        self.sampling = sampling
        self.constraint = constraint
        self.n_top = n_top
        self.logprobs: list[Logprobs] = []
        self._random = np.random.default_rng(sampling.seed)
        n_best = sampling.n_best
        least = LIKELIEST if sampling.temperature else LIKELIEST_GREEDY
        self._likeliest = max(n_best, least) if constraint and n_best else n_best

    def at(self, index: int) -> Sampler:
        """One for one of several prompts, with a seed of its own."""
        constraint = self.constraint.copy() if self.constraint else None
        return Sampler(self.sampling.at(index), constraint, self.n_top)

    @property
    def n_best(self) -> int:
        """How many of the largest logits it takes to draw; 0 for all."""
        return self._likeliest if self.n_top is None else 0

    @property
    def forced(self) -> Sequence[int]:
        """The ids that will be drawn next, whatever the logits are."""
        return self.constraint.forced if self.constraint else ()

    @property
    def ended(self) -> bool:
        """Whether the constraint lets nothing more come."""
        return self.constraint is not None and self.constraint.ended

    def __call__(
        self, logits: NDArray[np.float32], history: Sequence[int], *, all_there: bool = False
    ) -> int | None:
        """The next id after the history's ids; the logits are (vocab_size,).

        None if the constraint allows none of the n_best ids: to be called again with the logits of
        all. Takes one random number, or none if it is greedy. Raises `GemmaError` if the largest
        logit is not a finite number.
        """
        if self.constraint is None:
            token = self._draw(self._penalized(logits, history))
        elif self.forced:
            token = self.forced[0]
        else:
            open_ids = self._open(logits, self.constraint, all_there)
            if open_ids is None:
                return None
            token = int(open_ids[self._draw(self._penalized(logits, history)[open_ids])])
        if self.constraint:
            self.constraint.accept(token)
        if self.n_top is not None:
            self.logprobs.append(logprobs(logits, token, self.n_top))
        return token

    def _open(
        self, logits: NDArray[np.float32], constraint: Constraint, all_there: bool
    ) -> NDArray[np.int64] | None:
        """The ids to draw from, rising."""
        if self.sampling.n_best == 1:  # greedy: mostly the likeliest of all may come
            likeliest = np.array([np.argmax(logits)])
            if constraint.allows(likeliest)[0]:
                return likeliest
        if self._likeliest:
            best = largest(logits, self._likeliest)
            best = best[constraint.allows(best)]
            if best.size:
                return np.sort(best)
            if not (all_there or self.n_best == 0):
                return None
        return np.flatnonzero(constraint.allowed())

    def _penalized(
        self, logits: NDArray[np.float32], history: Sequence[int]
    ) -> NDArray[np.float32]:
        penalty = self.sampling.repeat_penalty
        return logits if penalty == 1 else penalize(logits, history[-REPEAT_WINDOW:], penalty)

    def _draw(self, logits: NDArray[np.float32]) -> int:
        """The place of one of the logits."""
        sampling = self.sampling
        best = int(np.argmax(logits))  # the first NaN, if there is one
        if not np.isfinite(logits[best]):
            raise GemmaError("The model's output is not a number: its file may be damaged.")
        if sampling.temperature == 0:
            return best
        if (sampling.top_k, sampling.top_p, sampling.min_p) == (0, 1, 0):
            return draw_from_all(logits, sampling.temperature, self._random.random())
        ids, weights = candidates(logits, sampling)
        cumulative = np.cumsum(weights)
        return int(ids[_place(cumulative, self._random.random() * cumulative[-1])])


def draw_from_all(logits: NDArray[np.float32], temperature: float, at: float) -> int:
    """The id at so much of all the mass, 0 <= at < 1.

    A vocabulary's running sum takes longer than its exponentials: those of the blocks and of one
    block do.
    """
    temperature = max(temperature, 1e-30)  # as float32 it must not be 0
    with np.errstate(over="ignore"):  # -inf, a weight of 0
        weights = np.exp((logits - logits.max()) / np.float32(temperature))
    rest = len(weights) % BLOCK
    sums = weights[: len(weights) - rest].reshape(-1, BLOCK).sum(1, dtype=np.float64)
    blocks = np.cumsum([*sums, weights[-rest:].sum(dtype=np.float64)] if rest else sums)
    point = at * blocks[-1]
    block = _place(blocks, point)
    before = blocks[block - 1] if block else 0
    within = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    return block * BLOCK + _place(within, point - before)


def _place(cumulative: NDArray[np.float64], point: float) -> int:
    """Where the sums first exceed the point; what adds nothing to them is never it."""
    return int(np.searchsorted(cumulative, min(point, np.nextafter(cumulative[-1], 0)), "right"))


def logprobs(logits: NDArray[np.float32], token: int, n_top: int) -> Logprobs:
    """Those of an id and of the n_top likeliest; the logits are (vocab_size,), all of them."""
    peak = float(logits.max())
    total = peak + math.log(np.exp(logits - peak, dtype=np.float64).sum())
    ids = largest(logits, n_top).tolist() if n_top else []
    return Logprobs(
        token, float(logits[token]) - total, [(i, float(logits[i]) - total) for i in ids]
    )


def penalize(
    logits: NDArray[np.float32], recent: Sequence[int], penalty: float
) -> NDArray[np.float32]:
    """A copy of the logits in which each recent id's is divided by the penalty, or multiplied
    by it where it is negative (CTRL, arXiv:1909.05858, as Hugging Face and llama.cpp apply it)."""
    logits = logits.copy()
    ids = np.unique(np.asarray(recent, dtype=np.int64))
    chosen = logits[ids]
    logits[ids] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
    return logits


def candidates(
    logits: NDArray[np.float32], sampling: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The ids that can be drawn and their weights (which need not sum to 1).

    The ids are in falling order of their logits unless nothing is cut off.
    """
    vocab_size = len(logits)
    top_k = min(sampling.top_k, vocab_size) or vocab_size
    peak = float(logits.max())

    def weigh(chosen: NDArray[np.float32]) -> NDArray[np.float64]:
        with np.errstate(over="ignore"):  # a tiny temperature: -inf, a weight of 0
            scaled = (chosen.astype(np.float64) - peak) / sampling.temperature
        weights: NDArray[np.float64] = np.exp(scaled)
        return weights

    if top_k < vocab_size:
        ids = largest(logits, top_k)
        weights = weigh(logits[ids])
        total = weights.sum()
    else:
        weights = weigh(logits)
        total = weights.sum()
        if sampling.top_p == 1:
            ids = np.flatnonzero(weights >= sampling.min_p)
            return ids, weights[ids]
        # Top-p alone: few tokens hold most of the mass, so sort no more of them than needed.
        wanted, everything = 256, weights
        while True:
            ids = largest(logits, min(wanted, vocab_size))
            weights = everything[ids]
            if len(ids) == vocab_size or weights.sum() >= sampling.top_p * total:
                break
            wanted *= 8
    if sampling.top_p < 1:
        # A token stays if the mass of those before it is still short of top-p.
        before = np.cumsum(weights) - weights
        kept = max(1, int(np.count_nonzero(before < sampling.top_p * total)))
        ids, weights = ids[:kept], weights[:kept]
    # The largest weight is exp(0) = 1, so min-p compares with the weights as they are.
    kept = int(np.count_nonzero(weights >= sampling.min_p))
    return ids[:kept], weights[:kept]


def largest(logits: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The ids of the k largest logits, in falling order; of equal ones the lower id comes first.

    What is below the k-th largest of the blocks' maxima is none of them. A block is every
    n_blocks-th logit: maxima of columns are found fastest.
    """
    n_blocks = len(logits) // BLOCK
    least = np.finfo(np.float32).min  # Nearly all may be -inf, and sorting is slow among equals.
    if k <= n_blocks:
        maxima = logits[: n_blocks * BLOCK].reshape(BLOCK, n_blocks).max(axis=0)
        least = max(least, np.partition(maxima, n_blocks - k)[n_blocks - k])
    ids = np.flatnonzero(logits >= least)
    if len(ids) < k:
        ids = np.arange(len(logits))
    elif len(ids) > k:
        values = logits[ids]
        ids = ids[values >= np.partition(values, len(ids) - k)[len(ids) - k]]
    return ids[np.argsort(-logits[ids], kind="stable")[:k]]
