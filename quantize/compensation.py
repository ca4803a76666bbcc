"""Rounding to 4 bits so that later inputs make up for the errors of earlier ones.

The error that counts is that of the matrix's outputs over a calibration text: for a row w rounded
to q, (w - q) H (w - q)^T, H the mean of x x^T over the inputs x. That is what GPTQ minimises
greedily, input by input (Frantar et al. 2022, arXiv:2210.17323). Here in the form of Babai's
nearest plane, which gives the same and needs no inverse (Chen et al. 2025, arXiv:2507.18553): with
H = L L^T, L lower triangular, the error is |(w - q) L|^2, and column k of L sees input k and those
after it. So inputs are rounded from the last to the first, each to what is nearest to

    w_k + sum over j > k of (w - q)_j L_jk / L_kk

A group's scale is found when the group is reached: of a number of candidates, each with the codes
that this rounding gives, the one that leaves least of the error's part in the group's columns.

When a group is rounded so, those before it are taken to make up for whatever it leaves. They cannot
quite. So each group is rounded once more, in the same way, with all others as they are then
(coordinate descent, as Behdin et al. 2023 do it input by input, arXiv:2309.01885).

Where H is known in blocks along its diagonal only, each block is a matrix of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import literal_unroll
from numpy.typing import NDArray

from quantize.compilation import FOLDER, cached
from quantize.grouping import stored_scales, units_of
from quantize.packing import Scales, scale_values
from quantize.search import Levels, grid_of

_DAMPING = 0.01
"""Of H's mean diagonal, added to it: inputs that the text hardly used must not be free to take any
error (GPTQ's value)."""

_COLUMNS = 256  # of the Cholesky factor, found together

_STRETCHES = np.linspace(0.8, 1.2, 12, dtype=np.float32)
"""As in `search`; with both ends of the codebook they fill vectors."""


class Factor(NamedTuple):
    """A Gram matrix as `round_compensated` needs it."""

    order: NDArray[np.intp]
    """(n_in,), the inputs with those that matter most last, whole groups of them together: what is
    rounded first, all others can make up for."""
    lower: NDArray[np.float32]
    """(n_in, n_in), the Cholesky factor L of the matrix in this order, damped"""


def factorize(gram: NDArray[np.float32], group_size: int) -> Factor:
    """gram: (n_in, n_in), symmetric, of all inputs of a matrix or of a block of them."""
    groups = gram.diagonal().reshape(-1, group_size)
    inner = groups.argsort(1, kind="stable") + np.arange(0, len(gram), group_size)[:, None]
    order = inner[groups.sum(1).argsort(kind="stable")].ravel()
    lower = gram[np.ix_(order, order)]
    mean = gram.diagonal().mean(dtype=np.float64)
    lower[np.diag_indices_from(lower)] += np.float32(_DAMPING * mean if mean > 0 else 1)
    # In place, as a feed-forward block's matrix may take a gigabyte; NumPy's needs two more.
    for start in range(0, len(lower), _COLUMNS):
        below, block = slice(start, None), slice(start, start + _COLUMNS)
        lower[below, block] -= lower[below, :start] @ lower[block, :start].T
        corner = np.linalg.cholesky(lower[block, block])
        lower[below, block] = np.linalg.solve(corner, lower[below, block].T).T
        lower[block, block] = corner
        lower[block, start + _COLUMNS :] = 0
    return Factor(order, lower)


def round_compensated(
    rows: NDArray[np.float32],
    group_size: int,
    levels: Levels,
    factors: Sequence[Factor],
    *,
    double: bool = False,
    again: bool = True,
) -> tuple[NDArray[np.uint8], Scales]:
    """Rounds to the levels of a codebook; without `again`, each group once.

    rows: (n_rows, n_in); factors: of as many blocks of the Gram matrix, each of whole groups ->
    codes 0 to 15 (n_rows, n_in), scales (n_rows, n_in / group_size).
    """
    blocks = np.split(rows, len(factors), axis=1)
    # Scales are found one after the other. None should be larger than what lays a row's largest
    # weight on the codebook's larger end, by the least stretch.
    end = np.float32(_STRETCHES[0] * max(abs(levels[0]), abs(levels[-1])))
    units = units_of(np.abs(rows).max(1) / end) if double else None
    rounded = [
        _round_block(block, group_size, levels, units, factor, again)
        for block, factor in zip(blocks, factors, strict=True)
    ]
    codes, scales = (np.hstack(parts) for parts in zip(*rounded, strict=True))
    return codes, stored_scales(scales, units)


def _round_block(
    rows: NDArray[np.float32],
    group_size: int,
    levels: Levels,
    units: NDArray[np.float32] | None,
    factor: Factor,
    again: bool,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes and scales, which `stored_scales` leaves as they are."""
    n_rows, n_in = rows.shape
    order, lower = factor
    ordered = rows[:, order]
    codes = np.empty((n_rows, n_in), np.uint8)
    scales = np.empty((n_rows, n_in // group_size), np.float32)
    errors = np.zeros((n_rows, n_in), np.float32)
    blocks = [slice(i, i + group_size) for i in reversed(range(0, n_in, group_size))]
    for block in blocks:
        # Errors of the groups after this one, as these columns of L see them.
        carried = errors[:, block.stop :] @ lower[block.stop :, block]
        own = np.ascontiguousarray(lower[block, block])
        chosen, stored, lost = _round_group(ordered[:, block], carried, own, levels, units)
        codes[:, order[block]], scales[:, order[block.start] // group_size] = chosen, stored
        errors[:, block] = lost
    if not again:
        return codes, scales
    left = errors @ lower
    for block in blocks:
        seen_by = lower[block, : block.stop]
        gram = seen_by @ seen_by.T
        # How far the group's best values, with all others as they are, lie from those that it has.
        off = np.linalg.solve(gram, seen_by @ left[:, : block.stop].T).T
        values = ordered[:, block] - errors[:, block]
        own = np.linalg.cholesky(gram)
        nothing = np.zeros_like(off)
        chosen, stored, lost = _round_group(values + off, nothing, own, levels, units)
        better = ((lost @ own) ** 2).sum(1) < ((off @ own) ** 2).sum(1)
        change = np.where(better[:, None], off - lost, np.float32(0))
        errors[:, block] -= change
        left[:, : block.stop] -= change @ seen_by
        codes[np.ix_(better, order[block])] = chosen[better]
        scales[better, order[block.start] // group_size] = stored[better]
    return codes, scales


def _round_group(
    weights: NDArray[np.float32],
    carried: NDArray[np.float32],
    own: NDArray[np.float32],
    levels: Levels,
    units: NDArray[np.float32] | None,
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Codes, scales (n,) and errors of a group's weights (n, group_size), with what is carried to
    its columns of L, (n, group_size), and its own part of L, (group_size, group_size)."""
    grid, middles = grid_of(levels)
    steps = tuple(zip(middles, np.diff(grid), strict=True))
    # What lays a weight of 1 on either end of the codebook, or near it.
    spans = np.outer([grid[0], grid[-1]], _STRETCHES).ravel().astype(np.float32)
    weights = np.ascontiguousarray(weights)
    best = np.empty(len(weights), np.float32)
    _search(weights, carried, own, grid[0], steps, spans, best)
    scales = scale_values(stored_scales(best[:, None], units))[:, 0]
    codes, errors = np.empty(weights.shape, np.uint8), np.empty_like(weights)
    _round(weights, carried, own, scales, grid, middles, codes, errors)
    return codes, scales, errors


@cached(FOLDER, fastmath={"contract", "reassoc", "nsz"})
def _search(weights, carried, own, lowest, steps, spans, scales):  # type: ignore[no-untyped-def]
    """Finds a group's scale for each row. With a candidate's codes and their levels l, the error is
    |c - scale (l L)|^2, c = carried + w L; the best scale for these codes is c (l L) / |l L|^2,
    which lowers the error by the square of that product / |l L|^2.

    weights, carried: float32 (n, group_size); own: float32 (group_size, group_size), lower
    triangular; lowest: the first level; steps: as in `search`; spans: float32 (n_candidates,), what
    the largest weight is laid on; scales: float32 (n,), the result.
    """
    n, size = weights.shape
    n_candidates = len(spans)
    # One candidate beside the other: all the inner loops are over them.
    left = np.empty((size, n_candidates), np.float32)
    scale, inverse, lost, product, square = np.empty((5, n_candidates), np.float32)
    aims = np.empty(size, np.float32)
    for i in range(n):
        largest = np.float32(0)
        for k in range(size):
            aims[k] = weights[i, k] + carried[i, k] / own[k, k]
            if abs(aims[k]) > abs(largest):
                largest = aims[k]
        scales[i] = 0
        if largest == 0:
            continue
        for c in range(n_candidates):
            scale[c] = largest / spans[c]
            inverse[c] = spans[c] / largest
            product[c], square[c] = np.float32(0), np.float32(0)
        for k in range(size):
            for c in range(n_candidates):
                left[k, c] = carried[i, k]
        for k in range(size - 1, -1, -1):
            w, pivot = weights[i, k], own[k, k]
            whole = carried[i, k]
            for j in range(k, size):
                whole += weights[i, j] * own[j, k]
            for c in range(n_candidates):
                x, level = (w + left[k, c] / pivot) * inverse[c], lowest
                for step in literal_unroll(steps):
                    level += step[1] if x > step[0] else np.float32(0)
                lost[c] = w - level * scale[c]
                seen = (whole - left[k, c] - lost[c] * pivot) * inverse[c]  # (l L)_k
                product[c] += whole * seen
                square[c] += seen * seen
            for j in range(k):
                for c in range(n_candidates):
                    left[j, c] += lost[c] * own[k, j]
        best_gain = np.float32(0)
        for c in range(n_candidates):
            if product[c] * product[c] > best_gain * square[c]:
                best_gain = product[c] * product[c] / square[c]
                scales[i] = product[c] / square[c]


@cached(FOLDER, fastmath={"contract", "reassoc", "nsz"})
def _round(weights, carried, own, scales, grid, middles, codes, errors):  # type: ignore[no-untyped-def]
    """Rounds a group with its scales: codes and errors (n, group_size)."""
    n, size = weights.shape
    left = np.empty(size, np.float32)
    for i in range(n):
        inverse = np.float32(1) / scales[i] if scales[i] != 0 else np.float32(0)
        for k in range(size):
            left[k] = carried[i, k]
        for k in range(size - 1, -1, -1):
            x, code = (weights[i, k] + left[k] / own[k, k]) * inverse, np.uint8(0)
            for middle in literal_unroll(middles):
                code += np.uint8(x > middle)
            error = weights[i, k] - grid[code] * scales[i]
            codes[i, k], errors[i, k] = code, error
            for j in range(k):
                left[j] += error * own[k, j]
