"""Sampling against a slow reference that sorts everything, and draws against probabilities."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gemma_cli.sampling import (
    REPEAT_WINDOW,
    Sampler,
    Sampling,
    candidates,
    draw_from_all,
    largest,
)
from quantize.errors import GemmaError


def reference(logits: NDArray[np.float32], s: Sampling) -> dict[int, float]:
    """The probability of each id that can be drawn, one literal step after the other."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if s.top_k:
        order = order[: s.top_k]
    weights = {
        i: float(np.exp((float(logits[i]) - float(logits.max())) / s.temperature)) for i in order
    }
    total = sum(weights.values())
    kept: dict[int, float] = {}
    mass = 0.0
    for i in order:
        if s.top_p < 1 and mass >= s.top_p * total:
            break
        kept[i] = weights[i]
        mass += weights[i]
    kept = {i: w for i, w in kept.items() if w >= s.min_p * max(kept.values())}
    return {i: w / sum(kept.values()) for i, w in kept.items()}


# Few different values, so that many logits are equal and the order among them matters.
tied_logits = st.lists(st.integers(-40, 40), min_size=1, max_size=700).map(
    lambda values: np.array(values, dtype=np.float32) / 8
)


@given(
    tied_logits,
    st.sampled_from([0, 1, 2, 64, 5000]),
    st.sampled_from([0.3, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([0.25, 1.0, 3.0]),
)
def test_candidates(
    logits: NDArray[np.float32], top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    s = Sampling(temperature, top_k, top_p, min_p)
    expected = reference(logits, s)
    ids, weights = candidates(logits, s)
    assert set(ids.tolist()) == set(expected)
    for i, weight in zip(ids, weights / weights.sum(), strict=True):
        assert weight == pytest.approx(expected[int(i)], rel=1e-12)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000, 262144])
@pytest.mark.parametrize("k", [1, 64, 255, 4000])
def test_largest_is_a_stable_sort(size: int, k: int) -> None:
    k = min(k, size)
    logits = np.random.default_rng(size + k).integers(-500, 500, size).astype(np.float32)
    for finite in (size, k + 3, max(0, k - 3)):
        some = np.full_like(logits, -np.inf)
        some[np.random.default_rng(k).permutation(size)[:finite]] = logits[:finite]
        np.testing.assert_array_equal(largest(some, k), np.argsort(-some, kind="stable")[:k])


@pytest.mark.parametrize(
    "s",
    [
        Sampling(seed=1),
        Sampling(temperature=0.7, top_k=5, top_p=0.9, seed=2),
        Sampling(temperature=2.0, top_k=0, top_p=1.0, seed=3),
        Sampling(top_k=0, top_p=1.0, min_p=0.2, seed=4),
    ],
)
def test_draws_have_the_exact_frequencies(s: Sampling) -> None:
    logits = np.random.default_rng(0).normal(0, 1.5, 40).astype(np.float32)
    expected = reference(logits, s)
    n = 20_000
    sample = Sampler(s)
    drawn = np.bincount([sample(logits, []) for _ in range(n)], minlength=40)
    for i in range(40):
        p = expected.get(i, 0.0)
        # A binomial count; 5 standard deviations are passed once in two million counts, and the
        # seed is fixed. What cannot be drawn never is.
        assert abs(drawn[i] - n * p) <= 5 * np.sqrt(n * p * (1 - p))


def test_a_seed_fixes_the_draws() -> None:
    logits = np.zeros(1000, dtype=np.float32)

    def draws(seed: int | None) -> list[int]:
        sample = Sampler(Sampling(top_k=0, top_p=1.0, seed=seed))
        return [sample(logits, []) for _ in range(20)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


@given(
    tied_logits,
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from([0, 1, 3, 64]),
    st.sampled_from([0.7, 1.0]),
    st.sampled_from([0.5, 1.0, 1.3, 4.0]),
    st.integers(0, 2**32),
)
def test_n_best_logits_decide_the_draw(
    logits: NDArray[np.float32],
    temperature: float,
    top_k: int,
    top_p: float,
    penalty: float,
    seed: int,
) -> None:
    s = Sampling(temperature, top_k, top_p, repeat_penalty=penalty, seed=seed)
    best = np.argsort(-logits, kind="stable")
    masked = logits.copy()
    masked[best[s.n_best or len(best) :]] = -np.inf
    whole, part = Sampler(s), Sampler(s)
    # The penalty falls where it can do most harm: on the largest logits.
    for history in ([], best[:1], best[:REPEAT_WINDOW], best[: REPEAT_WINDOW // 2], best[-70:]):
        assert whole(logits, list(history)) == part(masked, list(history))


def test_n_best_is_no_more_than_needed() -> None:
    assert Sampling().n_best == 64
    assert Sampling(temperature=0, top_k=0).n_best == 1
    assert Sampling(repeat_penalty=1.1).n_best == 64 + REPEAT_WINDOW
    assert Sampling(top_k=0).n_best == Sampling(repeat_penalty=0.9).n_best == 0


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = np.array([1, 3, 2, 3], dtype=np.float32)
    assert Sampler(Sampling(temperature=0))(logits, []) == 1


def test_a_tiny_temperature_is_greedy() -> None:
    logits = np.array([1, 3, 2], dtype=np.float32)
    assert Sampler(Sampling(temperature=5e-324, seed=0))(logits, []) == 1


def test_repeat_penalty() -> None:
    logits = np.array([2.0, 1.5, -1.0, -1.2, 0.0], dtype=np.float32)
    greedy = Sampler(Sampling(temperature=0, repeat_penalty=1.5))
    assert greedy(logits, []) == 0
    assert greedy(logits, [0, 0]) == 1  # 2 / 1.5 once, however often it came
    assert greedy(logits, [0, 1, 4]) == 0
    # A negative logit is multiplied, so that it falls too: -1 becomes -1.5.
    assert greedy(np.array([-1.0, -1.2], dtype=np.float32), [0]) == 1
    assert greedy(logits, [0, *[3] * (REPEAT_WINDOW - 1)]) == 1
    assert greedy(logits, [0, *[3] * REPEAT_WINDOW]) == 0  # out of the window
    np.testing.assert_array_equal(logits, np.array([2.0, 1.5, -1.0, -1.2, 0.0], dtype=np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(bad: float, temperature: float) -> None:
    logits = np.zeros(300, dtype=np.float32)
    logits[200] = bad
    with pytest.raises(GemmaError, match="not a number"):
        Sampler(Sampling(temperature=temperature))(logits, [])


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repeat_penalty": 0.0},
        {"repeat_penalty": float("nan")},
        {"seed": -1},
    ],
)
def test_values_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Sampling(**values)  # type: ignore[arg-type]


@given(
    tied_logits,
    st.sampled_from([1e-60, 0.25, 1.0, 3.0]),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 700),
)
def test_a_draw_from_all_lies_where_the_running_sum_says(
    logits: NDArray[np.float32], temperature: float, at: float, n_hidden: int
) -> None:
    logits[:n_hidden][:-1] = -np.inf  # one is left
    token = draw_from_all(logits, temperature, at)
    with np.errstate(over="ignore"):
        shifted = (logits.astype(np.float64) - logits.max()) / temperature
    shares = np.cumsum(np.exp(shifted)) / np.exp(shifted).sum()
    # Weights are float32: each is off by a few of its last bits.
    assert (shares[token - 1] if token else 0) - 1e-5 <= at <= shares[token] + 1e-5
    assert np.exp(shifted[token]) > 0
