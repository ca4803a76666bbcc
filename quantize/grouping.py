"""Rounding: float rows to codes and scales, one scale for each group of inputs of a row.

A weight is `level[code] * scale`. Scales are float16, or `double` quantized: whole multiples of a
unit of their row. They are rounded before the codes are chosen, so that the codes are the nearest
ones for the scale that is stored.
"""

import numpy as np
from numpy.typing import NDArray

from quantize.compilation import FOLDER, cached
from quantize.packing import DoubleScales, Scales, from_bfloat16, scale_values, to_bfloat16

LARGEST_SCALE = float(np.finfo(np.float16).max)

_MOST_UNITS = 127  # of a scale

_SMALLEST_UNIT = 2.0**-31  # 127 of them are float16's smallest number.


@cached(FOLDER, fastmath={"nnan", "nsz"})
def _find_largest(groups, largest):  # type: ignore[no-untyped-def]
    """Each group's weight of the largest magnitude, the first of ties; groups: (n, group_size)."""
    for g in range(len(groups)):
        most, least = groups[g, 0], groups[g, 0]
        for w in groups[g]:
            most, least = max(most, w), min(least, w)
        magnitude = max(most, -least)
        largest[g] = most if most > -least else least
        if most == -least:
            for w in groups[g]:
                if abs(w) == magnitude:
                    largest[g] = w
                    break


@cached(FOLDER)
def _round(groups, inverse, lowest, highest, first, codes):  # type: ignore[no-untyped-def]
    """codes = first + the steps of 1 / inverse that a weight is, rounded and clipped.

    Ties go up, as in GGML. They matter where the source is a grid itself: in steps of a 4-bit
    scale, every other weight of a Q5_0 block is a tie.
    """
    for g in range(len(groups)):
        for j in range(groups.shape[1]):
            steps = np.floor(groups[g, j] * inverse[g] + np.float32(0.5))
            codes[g, j] = first + np.int32(min(max(steps, lowest), highest))


def _grouped(
    rows: NDArray[np.float32], group_size: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Groups (n, group_size) of rows, and each group's weight of the largest magnitude."""
    groups = np.ascontiguousarray(rows).reshape(-1, group_size)
    largest = np.empty(len(groups), np.float32)
    _find_largest(groups, largest)
    return groups, largest


def units_of(largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """Units, float32 (n_rows,), for rows whose scales are of up to these magnitudes.

    They are bfloat16, rounded up, and keep scales within float16's range.
    """
    most = LARGEST_SCALE / (_MOST_UNITS + 1)
    units = np.clip(largest * np.float32((1 + 2**-8) / _MOST_UNITS), _SMALLEST_UNIT, most)
    return from_bfloat16(to_bfloat16(units.astype(np.float32)))


def stored_scales(scales: NDArray[np.float32], units: NDArray[np.float32] | None) -> Scales:
    """Scales (n_rows, n_groups) rounded to float16, or to multiples of the rows' units."""
    if units is None:
        return np.clip(scales, -LARGEST_SCALE, LARGEST_SCALE).astype(np.float16)
    steps = np.clip(np.rint(scales / units[:, None]), -_MOST_UNITS, _MOST_UNITS)
    return DoubleScales(steps.astype(np.int8), units)


def _inverse(scales: Scales) -> NDArray[np.float32]:
    """1 / scale, 0 for a group whose scale was rounded to 0; (n_rows * n_groups,)."""
    stored = scale_values(scales).ravel()
    return np.divide(1, stored, out=np.zeros_like(stored), where=stored != 0)


def round_int4(
    rows: NDArray[np.float32], group_size: int, *, double: bool = False
) -> tuple[NDArray[np.uint8], Scales]:
    """Rounds to the 16 equal steps -8 to 7 by the rule of GGML's Q4_0.

    The weight of the largest magnitude in a group becomes -8, so the scale carries its sign.
    rows: (n_rows, n_in) -> codes 0 to 15 (n_rows, n_in), scales (n_rows, n_in / group_size).
    """
    groups, largest = _grouped(rows, group_size)
    wanted = (largest / np.float32(-8)).reshape(len(rows), -1)
    scales = stored_scales(wanted, units_of(np.abs(wanted).max(1)) if double else None)
    codes = np.empty(rows.shape, np.uint8)
    _round(groups, _inverse(scales), np.float32(-8), np.float32(7), 8, codes.reshape(groups.shape))
    return codes, scales


def round_int8(rows: NDArray[np.float32], group_size: int) -> tuple[NDArray[np.int8], Scales]:
    """Rounds to -127 to 127 steps of a group's largest magnitude / 127.

    rows: (n_rows, n_in) -> codes (n_rows, n_in), scales (n_rows, n_in / group_size).
    """
    groups, largest = _grouped(rows, group_size)
    wanted = np.abs(largest / np.float32(127)).reshape(len(rows), -1)
    scales, codes = stored_scales(wanted, None), np.empty(rows.shape, np.int8)
    ends = np.float32(-127), np.float32(127)
    _round(groups, _inverse(scales), *ends, 0, codes.reshape(groups.shape))
    return codes, scales
