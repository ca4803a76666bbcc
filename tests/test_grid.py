"""4-bit grids hidden in weights of other types."""

import numpy as np
import pytest
from numpy.typing import NDArray

from quantize.checkpoint.source import Grid
from quantize.grid import find_grid, rounded_to


def values_of(grid: Grid) -> NDArray[np.float32]:
    scales = np.repeat(grid.scales.astype(np.float32), 32, axis=1)
    return grid.codes * scales


def hidden_grid(lowest: int, highest: int, scale: float) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    codes = rng.integers(lowest, highest + 1, (64, 256)).astype(np.int8)
    scales = (rng.standard_normal((64, 8)) * scale).astype(np.float16)
    return values_of(Grid(codes, scales))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(("lowest", "highest"), [(-8, 7), (-7, 7), (-3, 3), (0, 1)])
@pytest.mark.parametrize("scale", [0.003, 1e-6, 100.0])
def test_a_hidden_grid_is_found_exactly(
    dtype: str, lowest: int, highest: int, scale: float
) -> None:
    weights = hidden_grid(lowest, highest, scale)
    held = rounded_to(dtype, weights)
    grid = find_grid(held, dtype)
    assert grid is not None
    assert np.array_equal(rounded_to(dtype, values_of(grid)), held)
    if dtype == "F32":
        assert np.array_equal(values_of(grid), weights)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_one_weight_beside_the_grid_is_enough_to_refuse_it(dtype: str) -> None:
    held = rounded_to(dtype, hidden_grid(-8, 7, 0.003))
    i, j = np.argwhere(held != 0)[100]
    held[i, j] *= np.float32(1 + 2.0**-5)
    assert find_grid(held, dtype) is None


def test_ordinary_weights_are_no_grid() -> None:
    weights = np.random.default_rng(1).standard_normal((16, 256)).astype(np.float32)
    assert find_grid(rounded_to("BF16", weights), "BF16") is None


def test_zeros_are_a_grid() -> None:
    grid = find_grid(np.zeros((2, 64), np.float32), "BF16")
    assert grid is not None
    assert not values_of(grid).any()
