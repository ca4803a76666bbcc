"""Rounding against GGML's own rule, as the gguf package has it, and against exhaustive search."""

from functools import partial

import gguf
import numpy as np
import pytest
import twins
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantize.grouping import round_int4, round_int8
from quantize.packing import LINEAR_LEVELS, DoubleScales, from_bfloat16, to_bfloat16

Rows = NDArray[np.float32]
LINEAR = np.array(LINEAR_LEVELS)
LEVELS = {"int4": LINEAR, "int4_dq": LINEAR, "int8": np.arange(-127, 128)}
ROUND = {"int4": round_int4, "int4_dq": partial(round_int4, double=True), "int8": round_int8}


def rounded(fmt: str, rows: Rows, group_size: int) -> tuple[NDArray[np.float64], Rows]:
    """Every weight's level and its group's stored scale, each (n_rows, n_groups, group_size)."""
    codes, scales = ROUND[fmt](rows, group_size)
    assert codes.dtype == (np.int8 if fmt == "int8" else np.uint8)
    if isinstance(scales, DoubleScales):
        assert scales.codes.dtype == np.int8
        np.testing.assert_array_equal(from_bfloat16(to_bfloat16(scales.units)), scales.units)
    else:
        assert scales.dtype == np.float16
    values = twins.scale_values(scales)
    assert np.isfinite(values.astype(np.float16)).all()
    levels = codes.astype(np.float64) - (0 if fmt == "int8" else 8)
    grouped = (len(rows), -1, group_size)
    return levels.reshape(grouped), np.repeat(values, group_size, 1).reshape(grouped)


def assert_nearest(fmt: str, rows: Rows, group_size: int) -> None:
    """No other level times the stored scale is nearer to a weight, nor is there a level more."""
    levels, scales = rounded(fmt, rows, group_size)
    assert np.isin(levels, LEVELS[fmt]).all()
    weights, steps = rows.reshape(levels.shape).astype(np.float64), scales.astype(np.float64)
    best = np.abs(weights[..., None] - LEVELS[fmt] * steps[..., None]).min(-1)
    # Levels are found in float32, at most 128, by two roundings: of 1 / scale and of the product.
    slack = 128 * 2 * 2.0**-24 * np.abs(steps)
    assert (np.abs(weights - levels * steps) <= best + slack).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("fmt", LEVELS)
@pytest.mark.parametrize(
    "size",
    [
        0.02,
        1e-5,  # scales are subnormal float16
        3e-7,  # scales are a few of float16's smallest steps, or 0
        1e-30,
        1e4,
        1e30,  # scales would be infinite
    ],
)
def test_codes_are_the_nearest_for_the_scale_that_is_stored(
    fmt: str, group_size: int, size: float
) -> None:
    rows = np.random.default_rng(0).standard_normal((8, 384)).astype(np.float32)
    assert_nearest(fmt, rows * np.float32(size), group_size)


@given(
    st.sampled_from(list(LEVELS)),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32),
)
def test_any_finite_weights_round(fmt: str, weights: list[float]) -> None:
    assert_nearest(fmt, np.array([weights], np.float32), 32)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_largest_weight_is_minus_8_exactly(group_size: int, sign: int) -> None:
    rng = np.random.default_rng(1)
    rows = rng.uniform(-1, 1, (4, 256)).astype(np.float32)
    rows[:, ::group_size] = sign * 8 * rng.integers(1024, 2048, (4, 1)) / np.float32(1024)
    levels, scales = rounded("int4", rows, group_size)
    assert (levels[..., 0] == -8).all()
    # Those weights are 8 float16 numbers: nothing is lost.
    np.testing.assert_array_equal((levels * scales)[..., 0], rows[:, ::group_size])


def test_of_equal_magnitudes_the_first_becomes_minus_8() -> None:
    rows = np.zeros((1, 64), np.float32)
    rows[0, [3, 9]] = 4, -4
    rows[0, [40, 50]] = -4, 4
    _, scales = rounded("int4", rows, 32)
    assert scales[0, :, 0].tolist() == [-0.5, 0.5]


def test_scales_are_those_of_q4_0_and_codes_where_it_stores_the_scale_it_rounds_by() -> None:
    rows = np.random.default_rng(2).standard_normal((64, 512)).astype(np.float32)
    # GGML rounds by the scale before it is rounded to float16 itself, so let that lose nothing in
    # half of the groups, and rounds ties up, of which random weights have none.
    groups = rows.reshape(-1, 32)
    largest = np.abs(groups).argmax(1)
    exact = np.arange(0, len(groups), 2)
    groups[exact, largest[exact]] = groups[exact, largest[exact]].astype(np.float16)
    theirs = gguf.quants.quantize(rows, GGMLQuantizationType.Q4_0).reshape(-1, 18)
    codes, scales = round_int4(rows, 32)
    np.testing.assert_array_equal(scales.reshape(-1, 1), theirs[:, :2].copy().view("<f2"))
    their_codes = np.concatenate([theirs[:, 2:] & 15, theirs[:, 2:] >> 4], axis=1)
    codes = codes.reshape(-1, 32)
    np.testing.assert_array_equal(codes[exact], their_codes[exact])
    assert np.abs(codes.astype(int) - their_codes).max() <= 1


def test_int8_scales_are_those_of_q8_0() -> None:
    rows = np.random.default_rng(3).standard_normal((64, 512)).astype(np.float32)
    theirs = gguf.quants.quantize(rows, GGMLQuantizationType.Q8_0).reshape(-1, 34)
    codes, scales = round_int8(rows, 32)
    np.testing.assert_array_equal(scales.reshape(-1, 1), theirs[:, :2].copy().view("<f2"))
    assert np.abs(codes.reshape(-1, 32).astype(int) - theirs[:, 2:].view(np.int8)).max() <= 1


def test_double_scales_are_those_of_int4_to_a_254th_of_the_largest() -> None:
    rows = np.random.default_rng(5).standard_t(3, (50, 640)).astype(np.float32)
    codes, scales = round_int4(rows, 32)
    codes_dq, scales_dq = round_int4(rows, 32, double=True)
    largest = np.abs(scales.astype(np.float64)).max(1, keepdims=True)
    # Half a unit, which is rounded up to a bfloat16; and float16 has rounded, too.
    assert isinstance(scales_dq, DoubleScales)
    unit = largest / 127 * (1 + 2.0**-6)
    off = np.abs(twins.scale_values(scales_dq) - scales.astype(np.float64))
    assert (off <= unit / 2 + largest * 2.0**-11).all()
    assert (np.abs(scales_dq.codes).max(1) >= 124).all()  # units are not too large
    assert (codes == codes_dq).mean() > 0.95


@pytest.mark.parametrize("fmt", LEVELS)
def test_groups_of_zeros_stay_zero_and_leave_others_alone(fmt: str) -> None:
    rows = np.random.default_rng(4).standard_normal((2, 128)).astype(np.float32)
    rows[:, 0] = 5  # a row's largest, which its scales have in common
    alone, _ = rounded(fmt, rows, 32)
    rows[:, 32:64] = 0
    levels, scales = rounded(fmt, rows, 32)
    assert not levels[:, 1].any()
    assert not scales[:, 1].any()
    np.testing.assert_array_equal(levels[:, [0, 2, 3]], alone[:, [0, 2, 3]])


def test_ties_go_up_as_in_q4_0() -> None:
    """A 5-bit grid on a 4-bit scale: every other weight lies halfway between two codes."""
    rows = np.arange(-16, 16, dtype=np.float32)[None] / 2  # the largest is -8: the scale is 1
    codes, scales = round_int4(rows, 32)
    blocks = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q4_0)
    assert scales == 1
    np.testing.assert_array_equal(
        codes[0].astype(np.float32) - 8,
        gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)[0],
    )
