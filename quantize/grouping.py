"""Rounding: float rows to codes and scales, one scale for each group of inputs of a row.

A weight is `level[code] * scale`. Scales are float16, rounded before the codes are chosen, so that
the codes are the nearest ones for the scale that is stored.
"""

import numpy as np
from numpy.typing import NDArray

from quantize.compilation import FOLDER, cached

LARGEST_SCALE = float(np.finfo(np.float16).max)


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


def rounded_scales(scales: NDArray[np.float32]) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """Scales as float16 and the factors 1 / scale, 0 for a group whose scale rounds to 0."""
    half = np.clip(scales, -LARGEST_SCALE, LARGEST_SCALE).astype(np.float16)
    stored = half.astype(np.float32)
    inverse = np.divide(1, stored, out=np.zeros_like(stored), where=stored != 0)
    return half, inverse


def round_int4(
    rows: NDArray[np.float32], group_size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Rounds to the 16 equal steps -8 to 7 by the rule of GGML's Q4_0.

    The weight of the largest magnitude in a group becomes -8 exactly, so the scale carries its
    sign. rows: (n_rows, n_in) -> codes 0 to 15 (n_rows, n_in), scales (n_rows, n_in / group_size).
    """
    groups, largest = _grouped(rows, group_size)
    scales, inverse = rounded_scales(largest / np.float32(-8))
    codes = np.empty(rows.shape, np.uint8)
    _round(groups, inverse, np.float32(-8), np.float32(7), 8, codes.reshape(groups.shape))
    return codes, scales.reshape(len(rows), -1)


def round_int8(
    rows: NDArray[np.float32], group_size: int
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Rounds to -127 to 127 steps of a group's largest magnitude / 127.

    rows: (n_rows, n_in) -> codes (n_rows, n_in), scales (n_rows, n_in / group_size).
    """
    groups, largest = _grouped(rows, group_size)
    scales, inverse = rounded_scales(np.abs(largest / np.float32(127)))
    codes = np.empty(rows.shape, np.int8)
    _round(groups, inverse, np.float32(-127), np.float32(127), 0, codes.reshape(groups.shape))
    return codes, scales.reshape(len(rows), -1)
