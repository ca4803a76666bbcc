"""Rounding: float rows to codes and scales, one scale for each group of inputs of a row.

A weight is `level[code] * scale`. Scales are float16, rounded before the codes are chosen, so that
the codes are the nearest ones for the scale that is stored.
"""

import numpy as np
from numpy.typing import NDArray

LINEAR_LEVELS = tuple(range(-8, 8))
"""The equal steps of a Q4_0 block, as a codebook."""

IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The codebook of a block of GGML's type IQ4_NL (llama.cpp, ggml-common.h, kvalues_iq4nl)."""

LARGEST_SCALE = float(np.finfo(np.float16).max)


def _grouped(
    rows: NDArray[np.float32], group_size: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rows cut into groups, and each group's weight of the largest magnitude, the first of ties."""
    groups = rows.reshape(len(rows), -1, group_size)
    # argmax is a good deal faster than max over an axis this short.
    at = np.abs(groups).argmax(-1, keepdims=True)
    return groups, np.take_along_axis(groups, at, -1)[..., 0]


def _nearest(
    groups: NDArray[np.float32], inverse: NDArray[np.float32], lowest: int, highest: int
) -> NDArray[np.float32]:
    """Weights in steps of their group's scale, rounded and clipped.

    Ties go up, as in GGML. They matter where the source is a grid itself: in steps of a 4-bit
    scale, every other weight of a Q5_0 block is a tie.
    """
    steps = groups * inverse[..., None]
    steps += np.float32(0.5)
    np.floor(steps, out=steps)
    return np.clip(steps, lowest, highest, out=steps)


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
    codes = _nearest(groups, inverse, -8, 7)
    codes += 8
    return codes.astype(np.uint8).reshape(rows.shape), scales


def round_int8(
    rows: NDArray[np.float32], group_size: int
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Rounds to -127 to 127 steps of a group's largest magnitude / 127.

    rows: (n_rows, n_in) -> codes (n_rows, n_in), scales (n_rows, n_in / group_size).
    """
    groups, largest = _grouped(rows, group_size)
    scales, inverse = rounded_scales(np.abs(largest / np.float32(127)))
    codes = _nearest(groups, inverse, -127, 127)
    return codes.astype(np.int8).reshape(rows.shape), scales
