"""Searched scales and codebooks against a dense scan, and compensation against GPTQ's formula."""

import numpy as np
import pytest
import twins
from numpy.typing import NDArray

from quantize import compensation
from quantize.compensation import factorize, round_compensated
from quantize.grouping import round_int4
from quantize.packing import IQ4_NL_LEVELS, LINEAR_LEVELS, Scales
from quantize.search import Levels, fit_codebook, round_searched, search_scales

Floats = NDArray[np.float64]


def weighted_error(
    rows: NDArray[np.float32],
    rounded: tuple[NDArray[np.uint8], Scales],
    levels: Levels,
    importance: NDArray[np.float32],
) -> Floats:
    """Each group's error, (n_rows, n_groups)."""
    codes, scales = rounded[0], twins.scale_values(rounded[1])
    steps = np.repeat(scales.astype(np.float64), rows.shape[1] // scales.shape[1], 1)
    errors = (rows - np.array(levels)[codes] * steps) ** 2 * importance
    return errors.reshape(*scales.shape, -1).sum(-1)


def scanned_error(
    rows: NDArray[np.float32], group_size: int, levels: Levels, importance: NDArray[np.float32]
) -> Floats:
    """Each group's least error over 4,000 scales of both signs, each with its nearest codes."""
    groups = rows.astype(np.float64).reshape(len(rows), -1, group_size)
    weights = importance.reshape(-1, group_size)
    least = np.full(groups.shape[:2], np.inf)
    largest = np.abs(groups).max(-1, keepdims=True)
    for factor in np.linspace(0.4, 2.0, 2000) / np.abs(levels).max():
        for scale in (largest * factor, -largest * factor):
            nearest = np.abs(groups[..., None] - np.array(levels) * scale[..., None]).min(-1)
            least = np.minimum(least, (nearest**2 * weights).sum(-1))
    return least


either = pytest.mark.parametrize("double", [False, True])


@either
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("levels", [IQ4_NL_LEVELS, LINEAR_LEVELS])
def test_scales_are_nearly_the_best_there_are(
    levels: Levels, group_size: int, double: bool
) -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((16, 256)).astype(np.float32)
    importance = rng.exponential(size=256).astype(np.float32)
    found = round_searched(rows, group_size, levels, importance, double=double)
    ours = weighted_error(rows, found, levels, importance)
    best = scanned_error(rows, group_size, levels, importance)
    # 22 scales are tried, not thousands: in sum that costs at most a few percent.
    assert ours.sum() <= 1.05 * best.sum()
    assert (ours <= 1.5 * best).all()


@either
@pytest.mark.parametrize("size", [1e-30, 1e-5, 1.0, 1e4, 1e30])
def test_codes_are_the_nearest_for_the_scale_that_is_stored(size: float, double: bool) -> None:
    rows = np.random.default_rng(2).standard_normal((8, 64)).astype(np.float32)
    rows *= np.float32(size)
    even = np.ones(64, np.float32)
    codes, stored = round_searched(rows, 32, IQ4_NL_LEVELS, even, double=double)
    scales = twins.scale_values(stored)
    assert np.isfinite(scales).all()
    grid = np.repeat(scales.astype(np.float64), 32, 1)[..., None] * np.array(IQ4_NL_LEVELS)
    chosen = np.take_along_axis(grid, codes[..., None].astype(int), -1)[..., 0]
    nearest = np.abs(rows[..., None] - grid).min(-1)
    # A weight in the middle between two levels may go either way, by float32's rounding.
    slack = 2.0**-20 * np.abs(grid).max(-1)
    assert (np.abs(rows - chosen) <= nearest + slack).all()


def test_zero_weights_stay_zero() -> None:
    rows = np.zeros((2, 64), np.float32)
    rows[1, 40] = 1.0
    codes, scales = round_searched(rows, 32, LINEAR_LEVELS, np.zeros(64, np.float32))
    rounded = np.array(LINEAR_LEVELS)[codes] * np.repeat(scales.astype(np.float32), 32, 1)
    # The scale of the one weight is rounded to float16.
    np.testing.assert_allclose(rounded, rows, rtol=2.0**-11)


def test_importance_decides_what_is_kept() -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((64, 128)).astype(np.float32)
    importance = rng.exponential(size=128).astype(np.float32) ** 2
    flat = np.ones(128, np.float32)
    errors = [
        weighted_error(rows, round_searched(rows, 32, IQ4_NL_LEVELS, by), IQ4_NL_LEVELS, importance)
        for by in (importance, flat)
    ]
    assert errors[0].sum() < errors[1].sum()


def test_a_fitted_codebook_loses_less_than_fixed_ones() -> None:
    rows = np.random.default_rng(4).standard_t(5, (64, 1024)).astype(np.float32)
    importance = np.ones(1024, np.float32)
    fitted = fit_codebook(rows, 32, importance)
    assert len(fitted) == 16
    assert list(fitted) == sorted(fitted)
    assert max(map(abs, fitted)) == 127
    errors = {
        levels: weighted_error(
            rows, round_searched(rows, 32, levels, importance), levels, importance
        ).sum()
        for levels in (fitted, IQ4_NL_LEVELS, LINEAR_LEVELS)
    }
    assert min(errors, key=lambda levels: errors[levels]) == fitted


def test_weights_on_equal_steps_get_equal_steps() -> None:
    rng = np.random.default_rng(5)
    rows = rng.integers(-8, 8, (64, 256)).astype(np.float32) * np.float32(0.01)
    codes, scales = round_int4(rows, 32)
    rows = (codes.astype(np.float32) - 8) * np.repeat(scales.astype(np.float32), 32, 1)
    assert fit_codebook(rows, 32, np.ones(256, np.float32)) == LINEAR_LEVELS
    assert fit_codebook(np.zeros((2, 64), np.float32), 32, np.ones(64, np.float32)) == LINEAR_LEVELS


def correlated_inputs(n_in: int) -> Floats:
    rng = np.random.default_rng(6)
    mixing = np.eye(n_in) + rng.standard_normal((n_in, n_in)) / np.sqrt(n_in)
    return rng.standard_normal((2000, n_in)) @ mixing


def corrected(gram: NDArray[np.floating]) -> Floats:
    """A Gram matrix as it is factorized: a hundredth of the diagonal's mean added to it."""
    return np.asarray(gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram)), np.float64)


def gptq_codes(
    rows: Floats, gram: Floats, scales: NDArray[np.floating], group_size: int, levels: Levels
) -> NDArray[np.int64]:
    """GPTQ as its paper has it (algorithm 1), with the inverse, but from the last input on."""
    turned = np.linalg.cholesky(np.linalg.inv(corrected(gram)[::-1, ::-1])).T
    left = rows[:, ::-1].copy()
    codes = np.empty(rows.shape, np.int64)
    for k in range(len(gram)):
        column = len(gram) - 1 - k
        values = np.array(levels) * scales[:, column // group_size].astype(np.float64)[:, None]
        codes[:, column] = np.abs(left[:, k, None] - values).argmin(1)
        chosen = np.take_along_axis(values, codes[:, column, None], 1)[:, 0]
        left[:, k:] -= np.outer((left[:, k] - chosen) / turned[k, k], turned[k, k:])
    return codes


@either
@pytest.mark.parametrize("group_size", [32, 64])
def test_compensation_is_gptq(group_size: int, double: bool) -> None:
    n_in = 192
    x = correlated_inputs(n_in) * np.random.default_rng(9).uniform(0.5, 2, n_in)
    gram = x.T @ x / len(x)
    rows = np.random.default_rng(7).standard_normal((48, n_in)).astype(np.float32)
    importance = np.diag(gram).astype(np.float32)
    factor = factorize(gram.astype(np.float32), group_size)
    codes, stored = round_compensated(
        rows, group_size, IQ4_NL_LEVELS, [factor], double=double, again=False
    )
    scales = twins.scale_values(stored)
    order = factor.order
    expected = np.empty_like(codes)
    expected[:, order] = gptq_codes(
        rows[:, order].astype(np.float64),
        gram[np.ix_(order, order)],
        scales[:, order[::group_size] // group_size],
        group_size,
        IQ4_NL_LEVELS,
    )
    # In float32 a weight near the middle between two levels may fall to the other side, and takes
    # what follows in its row along.
    assert (codes == expected).all(1).mean() > 0.9

    def output_error(rounded: tuple[NDArray[np.uint8], Scales]) -> float:
        steps = np.repeat(twins.scale_values(rounded[1]).astype(np.float64), group_size, 1)
        error = rows - np.array(IQ4_NL_LEVELS)[rounded[0]] * steps
        return float(np.einsum("ri,ij,rj->", error, gram, error))

    searched = round_searched(rows, group_size, IQ4_NL_LEVELS, importance)
    once = output_error((codes, stored))
    assert once < 0.8 * output_error(searched)
    again = output_error(
        round_compensated(rows, group_size, IQ4_NL_LEVELS, [factor], double=double)
    )
    assert again < 0.98 * once


def test_rounding_again_never_loses() -> None:
    x = correlated_inputs(256)
    gram = (x.T @ x / len(x)).astype(np.float32)
    rows = np.random.default_rng(12).standard_normal((64, 256)).astype(np.float32)
    factor = factorize(gram, 32)

    def errors(again: bool) -> Floats:
        """What each row loses."""
        codes, scales = round_compensated(rows, 32, IQ4_NL_LEVELS, [factor], again=again)
        error = rows - np.array(IQ4_NL_LEVELS)[codes] * np.repeat(scales.astype(np.float64), 32, 1)
        return np.einsum("ri,ij,rj->r", error, corrected(gram), error)

    once, twice = errors(again=False), errors(again=True)
    # Sums in float32 are off by some of their last bits.
    assert (twice <= once * (1 + 1e-4)).all()
    assert (twice < once).mean() > 0.9


def test_blocks_are_rounded_as_if_alone() -> None:
    x = correlated_inputs(192)
    gram = (x.T @ x / len(x)).astype(np.float32)
    rows = np.random.default_rng(13).standard_normal((8, 192)).astype(np.float32)
    cuts = [slice(0, 96), slice(96, 192)]
    factors = [factorize(gram[cut, cut], 32) for cut in cuts]
    codes, scales = round_compensated(rows, 32, IQ4_NL_LEVELS, factors)
    alone = [
        round_compensated(rows[:, cut], 32, IQ4_NL_LEVELS, [factor])
        for cut, factor in zip(cuts, factors, strict=True)
    ]
    assert np.array_equal(codes, np.hstack([block[0] for block in alone]))
    assert np.array_equal(scales, np.hstack([block[1] for block in alone]))


def test_what_matters_most_is_rounded_first_and_groups_stay_whole() -> None:
    squares = np.random.default_rng(10).exponential(size=192).astype(np.float32)
    order, lower = factorize(np.diag(squares), 32)
    groups = order.reshape(-1, 32)
    assert np.array_equal(np.sort(order), np.arange(192))
    assert (groups // 32 == groups[:, :1] // 32).all()
    assert (np.diff(squares[groups].sum(1)) >= 0).all()
    assert (np.diff(squares[groups]) >= 0).all()
    damped = squares[order] + 0.01 * squares.mean()
    np.testing.assert_allclose(lower, np.diag(np.sqrt(damped)), rtol=1e-5)


def test_the_factor_is_found_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated_inputs(192)
    gram = (x.T @ x / len(x)).astype(np.float32)
    monkeypatch.setattr(compensation, "_COLUMNS", 80)
    order, lower = factorize(gram, 64)
    expected = np.linalg.cholesky(corrected(gram)[np.ix_(order, order)])
    # Rounding in float32 grows with the matrix's condition, here some hundreds.
    np.testing.assert_allclose(lower, expected, rtol=1e-3, atol=1e-4)


def test_scales_are_found_for_the_codes_that_compensation_gives() -> None:
    x = correlated_inputs(64)
    gram = (x.T @ x / len(x)).astype(np.float32)
    rows = np.random.default_rng(11).standard_normal((64, 64)).astype(np.float32)
    factor = factorize(gram, 64)
    lower = factor.lower.astype(np.float64)

    def errors(scales: NDArray[np.floating]) -> Floats:
        """What a row loses with a scale, rounded as in GPTQ's paper."""
        codes = gptq_codes(
            rows[:, factor.order].astype(np.float64),
            gram[np.ix_(factor.order, factor.order)].astype(np.float64),
            scales,
            64,
            IQ4_NL_LEVELS,
        )
        steps = scales.astype(np.float64)
        lost = rows[:, factor.order] - np.array(IQ4_NL_LEVELS)[codes] * steps
        return np.asarray(((lost @ lower) ** 2).sum(1))

    ours = errors(round_compensated(rows, 64, IQ4_NL_LEVELS, [factor], again=False)[1])
    alone = errors(search_scales(rows, 64, IQ4_NL_LEVELS, np.diag(gram).astype(np.float32)))
    assert ours.sum() < 0.97 * alone.sum()


def test_inputs_that_never_occurred_are_rounded_all_the_same() -> None:
    rows = np.random.default_rng(8).standard_normal((4, 64)).astype(np.float32)
    nothing = np.zeros((64, 64), np.float32)
    codes, scales = round_compensated(rows, 32, IQ4_NL_LEVELS, [factorize(nothing, 32)])
    alone = round_searched(
        rows, 32, IQ4_NL_LEVELS, np.zeros(64, np.float32), compensation._STRETCHES
    )
    assert np.array_equal(codes, alone[0])
    assert np.array_equal(scales, alone[1])
