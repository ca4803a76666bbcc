"""Finding the 4-bit grid that a quantization-aware training has left in 16- or 32-bit weights.

Such checkpoints hold, in groups of 32, weights scale * k, k of -8 to 7, each rounded to the
checkpoint's type. The scale is not there to read, and rounding has blurred its multiples. It is
found by trying what multiple a group's largest weight may be, and proven by going back.
"""

import numpy as np
from numpy.typing import NDArray

from quantize.checkpoint.source import Grid
from quantize.packing import RUN_INPUTS, from_bfloat16, to_bfloat16

_DIGITS = {"BF16": 8, "F16": 11}  # of a mantissa; float32 has 24
_LARGEST = (-8, 7, 6, 5, 4, 3, 2, 1)  # multiples that a group's largest weight may be


def rounded_to(dtype: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values as a checkpoint of this type holds them."""
    if dtype == "BF16":
        return from_bfloat16(to_bfloat16(values))
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return values


def _bounds(
    dtype: str, values: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The least and the most that rounding to the type makes these positive values of."""
    mantissas, exponents = np.frexp(values)
    half_spacing = np.ldexp(np.float32(0.5), exponents - _DIGITS.get(dtype, 24))
    below = np.where(mantissas == 0.5, half_spacing / 2, half_spacing)
    return values - below, values + half_spacing


def _neighbours(values: NDArray[np.float16]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """The next float16 towards zero and away from it."""
    beyond = np.copysign(np.float16(np.inf), values)
    return np.nextafter(values, np.float16(0)), np.nextafter(values, beyond)


def find_grid(rows: NDArray[np.float32], dtype: str) -> Grid | None:
    """The codes (-8 to 7) and float16 scales that give exactly these weights, once rounded to dtype
    ("BF16", "F16" or "F32"); None if there are none.

    rows: (n_rows, n_in), n_in a multiple of 32.
    """
    groups = rows.reshape(-1, RUN_INPUTS)
    codes = np.zeros(groups.shape, np.int8)
    scales = np.zeros(len(groups), np.float16)
    left = np.flatnonzero(groups.any(1))
    for multiple in _LARGEST:
        some = groups[left]
        largest = np.take_along_axis(some, np.abs(some).argmax(1)[:, None], 1)
        guess = largest / np.float32(multiple)
        found = np.clip(np.rint(some / guess), -8, 7)
        # Every weight bounds the scale. A float16 within all bounds is the nearest to their middle,
        # or, where bounds themselves are float16, the next on either side.
        with np.errstate(divide="ignore", over="ignore"):
            least, most = _bounds(dtype, np.abs(some))
            most = (most / np.abs(found)).min(1)
            least = np.where(found != 0, least / np.abs(found), 0).max(1)
            middle = np.copysign((least + most) / 2, guess[:, 0]).astype(np.float16)
        exact = np.zeros(len(some), bool)
        for scale in (middle, *_neighbours(middle)):
            values = found * scale.astype(np.float32)[:, None]
            fits = ~exact & (rounded_to(dtype, values) == some).all(1)
            codes[left[fits]], scales[left[fits]] = found[fits].astype(np.int8), scale[fits]
            exact |= fits
        left = left[~exact]
        if not len(left):
            return Grid(codes.reshape(rows.shape), scales.reshape(len(rows), -1))
    return None
