"""What a calibration text says of a matrix's inputs, as it is handed to the quantizer."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class InputStatistics:
    """Means over the tokens of a text, each as much as it counts, of the vectors x (n_in,) that a
    matrix is multiplied by."""

    mean_squares: NDArray[np.float32]
    """(n_in,), of each input"""
    gram: NDArray[np.float32] | None
    """(n_in, n_in), of x x^T as it is expected of any text; None if not gathered"""


Calibration = Callable[[str], InputStatistics]
"""The statistics of a matrix by its name, asked for in the order of `tensors.matrix_shapes`."""
