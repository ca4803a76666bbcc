"""What a calibration text says of a matrix's inputs, as it is handed to the quantizer."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class InputStatistics:
    """The vectors x (n_in,) that a matrix is multiplied by over a text."""

    gram: NDArray[np.float32]
    """(n_blocks, size, size), n_blocks * size = n_in: the mean of x x^T over the tokens, each as
    much as it counts, as it is expected of any text. Inputs of different blocks are taken not to
    depend on each other."""

    @property
    def mean_squares(self) -> NDArray[np.float32]:
        """(n_in,), of each input"""
        return self.gram.diagonal(axis1=1, axis2=2).ravel()


Calibration = Callable[[str], InputStatistics]
"""The statistics of a matrix by its name, asked for in the order of `tensors.matrix_shapes`."""
