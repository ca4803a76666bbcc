"""Single weights out of a matrix's tiles: the embedding, which is read a row at a time.

The layout is quantize.packing's; matrices are rows of matmul's table.
"""

import numpy as np

from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.matrix import advance, run_bytes, tile_address
from gemma_cli.runtime.tables import (
    BF16,
    CODEBOOK,
    DOUBLE_SCALES,
    F32,
    FORMAT,
    GROUP_SIZE,
    INT8,
    PLANES,
    SCALES,
)
from gemma_cli.runtime.vector import load_byte, load_scalar
from quantize.packing import PLANE_BITS, UNIT_BYTES


@kernel
def _weight(matrix, row, column):
    """Element (row, column) of a matrix of the table."""
    (tile, others), r = tile_address(matrix, row // 16), row % 16
    fmt = matrix[FORMAT]
    if fmt == F32:
        return load_scalar(tile + 64 * column + 4 * r)
    if fmt == BF16:
        return _bfloat(_two_bytes(tile + 32 * column + 2 * r))
    group, within = column // matrix[GROUP_SIZE], column % matrix[GROUP_SIZE]
    run, i = within // 32, within % 32
    block = tile + group * (matrix[SCALES] + matrix[GROUP_SIZE] // 32 * run_bytes(fmt))
    if matrix[SCALES] == DOUBLE_SCALES:
        code = np.float32(np.int8(load_byte(block + r)))
        scale = code * _bfloat(_two_bytes(tile - UNIT_BYTES + 2 * r))
    else:
        scale = _half(_two_bytes(block + 2 * r))
    body = block + matrix[SCALES] + run * run_bytes(fmt)
    if fmt == INT8:
        byte = _code(body, 8, r, i)
    elif fmt == PLANES:
        planes, byte = (body, *advance(others, column - i)), 0
        for plane in range(len(PLANE_BITS)):
            bits = PLANE_BITS[plane]
            byte = byte << bits | _code(planes[plane], bits, r, i)
    else:
        byte = load_byte(matrix[CODEBOOK] + _code(body, 4, r, i))
    return np.float32(byte - 128) * scale


@kernel
def _code(run, bits, row, i):
    """What a run of 32 inputs' codes of so many bits holds for a row and input i."""
    four = i // 4
    byte = load_byte(run + 64 * (four % bits) + 4 * row + i % 4)
    return byte >> bits * (four // bits) & (1 << bits) - 1


@kernel
def _two_bytes(address):
    return load_byte(address) | load_byte(address + 1) << 8


@kernel
def _bfloat(bits):
    """The value of a bfloat16 given as its bits."""
    return np.uint32(bits << 16).view(np.float32)


@kernel
def _half(bits):
    """The value of a float16 given as its bits."""
    fraction, exponent = np.float32(bits & 0x3FF), np.int64(bits >> 10 & 0x1F)
    sign = np.float32(-1.0 if bits & 0x8000 else 1.0)
    if exponent == 0:
        return sign * fraction * np.float32(2.0**-24)
    return sign * (fraction + np.float32(1024)) * np.float32(2.0 ** (exponent - 25))


@kernel
def embed(matrix, token, factor, x):
    """x = the token's row of the embedding, times factor; x: float32 (hidden_size,)."""
    for i in range(x.size):
        x[i] = _weight(matrix, token, i) * factor
