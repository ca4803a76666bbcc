"""Rounding to 4 bits so that later inputs make up for the errors of earlier ones.

The error that counts is that of the matrix's outputs over a calibration text: for a row w rounded
to q, (w - q) H (w - q)^T, H the mean of x x^T over the inputs x. That is what GPTQ minimises
greedily, input by input (Frantar et al. 2022, arXiv:2210.17323). Here in the form of Babai's
nearest plane, which gives the same and needs no inverse (Chen et al. 2025, arXiv:2507.18553): with
H = L L^T, L lower triangular, the error is |(w - q) L|^2, and column k of L sees input k and those
after it. So inputs are rounded from the last to the first, each to what is nearest to

    w_k + sum over j > k of (w - q)_j L_jk / L_kk
"""

import numpy as np
from numpy.typing import NDArray

from quantize.search import Levels, nearest_codes, search_scales

_DAMPING = 0.01
"""Of H's mean diagonal, added to it: inputs that the text hardly used must not be free to take any
error (GPTQ's value)."""


def factorize(gram: NDArray[np.float32]) -> NDArray[np.float32]:
    """The Cholesky factor of a Gram matrix (n_in, n_in), damped, which is overwritten."""
    diagonal = gram.reshape(-1)[:: len(gram) + 1]
    mean = diagonal.mean(dtype=np.float64)
    diagonal += np.float32(_DAMPING * mean if mean > 0 else 1)
    factor: NDArray[np.float32] = np.linalg.cholesky(gram)
    return factor


def round_compensated(
    rows: NDArray[np.float32],
    group_size: int,
    levels: Levels,
    importance: NDArray[np.float32],
    factor: NDArray[np.float32],
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Rounds to the levels of a codebook; a group's scales are searched when it is reached.

    rows: (n_rows, n_in); importance: (n_in,), H's diagonal; factor: (n_in, n_in), of `factorize`
    -> codes 0 to 15 (n_rows, n_in), scales (n_rows, n_in / group_size).
    """
    n_rows, n_in = rows.shape
    codes = np.empty((n_rows, n_in), np.uint8)
    scales = np.empty((n_rows, n_in // group_size), np.float16)
    grid = np.array(levels, np.float32)
    errors = np.zeros((n_rows, n_in), np.float32)
    for start in range(n_in - group_size, -1, -group_size):
        stop = start + group_size
        block, own = slice(start, stop), factor[start:stop, start:stop]
        # Errors of the groups after this one, in units of each column's L_kk.
        carried = errors[:, stop:] @ factor[stop:, block]
        aims = rows[:, block] + carried / own.diagonal()
        found = search_scales(aims, group_size, levels, importance[block])
        scales[:, start // group_size] = found[:, 0]
        scale = found[:, 0].astype(np.float32)
        for k in range(group_size - 1, -1, -1):
            aim = rows[:, start + k] + carried[:, k] / own[k, k]
            chosen = nearest_codes(aim[:, None], found[:, 0], levels)[:, 0]
            codes[:, start + k] = chosen
            error = rows[:, start + k] - grid[chosen] * scale
            errors[:, start + k] = error
            carried[:, :k] += error[:, None] * own[k, :k]
    return codes, scales
