"""What rounding has cost each matrix: the weights that were written beside those of the source."""

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from quantize import packing
from quantize.checkpoint import Checkpoint, SourceTensor
from quantize.modelfile import MatrixSpec, ModelFile, TensorError

_PIECE_WEIGHTS = 1 << 20
"""Weights that a thread compares at a time, or a slab of planes if that is more."""

_N_THREADS = os.cpu_count() or 1


def tensor_errors(
    source: Checkpoint,
    file: ModelFile,
    mean_squares: Mapping[str, NDArray[np.float32]],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, TensorError]:
    """The error of each matrix of a model file, by its name.

    mean_squares: (n_in,) by name, of the inputs that a matrix is multiplied by. `progress` is
    called with the number of matrices done. A few rows for each thread are in memory at a time.
    """
    errors = {}
    with ThreadPoolExecutor(_N_THREADS) as pool:
        for done, (name, m) in enumerate(file.matrices.items()):
            n_tiles = packing.n_tiles(m.n_out)
            step = max(1, _PIECE_WEIGHTS // m.n_in // packing.TILE_ROWS)
            if m.format == "int8_planes":
                step = -(-step // packing.SLAB_TILES) * packing.SLAB_TILES
            pieces = [slice(i, min(i + step, n_tiles)) for i in range(0, n_tiles, step)]
            squares = partial(_squares, source.tensors[name], m, file.tiles[name])
            # Added up in the order of the rows: the sums do not depend on the number of threads.
            total, lost = sum(pool.map(squares, pieces), np.zeros((2, m.n_in)))
            weights = mean_squares[name].astype(np.float64)
            errors[name] = TensorError(
                plain=_relative(lost.sum(), total.sum()),
                weighted=_relative(lost @ weights, total @ weights),
            )
            progress(done + 1)
    return errors


def _squares(
    tensor: SourceTensor, m: MatrixSpec, tiles: NDArray[np.uint8], piece: slice
) -> NDArray[np.float64]:
    """Sums over the rows of some tiles, for each input, of w^2 and of (w - q)^2: (2, n_in)."""
    stop = min(piece.stop * packing.TILE_ROWS, m.n_out)
    rows = tensor.rows(piece.start * packing.TILE_ROWS, stop)
    lost = rows - dequantize(m, tiles[piece])[: len(rows)]
    return np.stack([np.einsum("ri,ri->i", x, x, dtype=np.float64) for x in (rows, lost)])


def dequantize(m: MatrixSpec, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Tiles of a matrix, whole slabs of them in int8_planes, as rows (16 n_tiles, n_in)."""
    if m.format not in packing.CODE_FORMATS:
        return packing.unpack_floats(m.format, tiles, m.n_in)
    codes, scales = packing.unpack_codes(m.format, tiles, m.n_in, m.group_size)
    levels = np.array(m.codebook, np.float32)[codes] if m.codebook else codes.astype(np.float32)
    groups = levels.reshape(len(levels), -1, m.group_size)
    groups *= packing.scale_values(scales)[..., None]
    return levels


def _relative(lost: float, total: float) -> float:
    return math.sqrt(lost / total) if total else 0.0
