"""The kernels' equations in plain NumPy, in int64 and float64 where the kernels have less.

What `reference.py` says of a whole model in float32, these say of single kernels, exactly enough
to bound a kernel's rounding errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import reference
from numpy.typing import NDArray

from quantize import packing
from quantize.modelfile import ModelFile
from quantize.packing import INT4_FORMATS, LINEAR_LEVELS

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

EPSILON = 2.0**-24
"""The largest relative error of one float32 rounding."""

SMALLEST_NORMAL = 2.0**-126
"""What is smaller, AMX takes and gives as zero."""


@dataclass(frozen=True)
class Matrix:
    """A matrix as the kernels get it (`tiles`), and as plain numbers."""

    format: str
    group_size: int
    codebook: tuple[int, ...]
    levels: NDArray[np.int64]  # (n_out, n_in), what the codes stand for; empty for float formats
    scales: Float32  # (n_out, n_in / group_size); the same
    weights: Float32  # (n_out, n_in)
    tiles: NDArray[np.uint8]

    @property
    def n_in(self) -> int:
        return self.weights.shape[1]

    @property
    def n_out(self) -> int:
        return len(self.weights)

    @property
    def n_columns(self) -> int:
        """Outputs of whole tiles."""
        return 16 * len(self.tiles)


def coded(
    fmt: str,
    codes: NDArray[Any],
    scales: packing.Scales,
    codebook: tuple[int, ...] = LINEAR_LEVELS,
) -> Matrix:
    """A matrix of 4 or 8 bits; codes and scales as packing.pack_codes takes them."""
    levels = np.array(codebook)[codes] if fmt in INT4_FORMATS else codes.astype(np.int64)
    values = scale_values(scales)
    group_size = codes.shape[1] // values.shape[1]
    weights = levels.astype(np.float32) * np.repeat(values, group_size, axis=1)
    tiles = packing.pack_codes(fmt, codes, scales)
    return Matrix(fmt, group_size, codebook, levels, values, weights, tiles)


def scale_values(scales: packing.Scales) -> Float32:
    """What scales are worth, (n_rows, n_groups)."""
    if isinstance(scales, packing.DoubleScales):
        exact = scales.codes.astype(np.float64) * scales.units.astype(np.float64)[:, None]
        return exact.astype(np.float32)
    return scales.astype(np.float32)


def floating(fmt: str, weights: Float32) -> Matrix:
    """A bf16 or f32 matrix; weights of bf16 are rounded."""
    if fmt == "bf16":
        weights = packing.from_bfloat16(packing.to_bfloat16(weights))
    tiles = packing.pack_floats(fmt, weights)
    none = np.empty((0, 0), np.float32)
    return Matrix(fmt, 0, LINEAR_LEVELS, none.astype(np.int64), none, weights, tiles)


def quantize_row(x: Float32) -> tuple[NDArray[np.int8], Float32, NDArray[np.int32]]:
    """Codes, scales and offsets, those of 32 inputs each, of rows (n_tokens, n_in)."""
    from gemma_cli.runtime import isa  # noqa: PLC0415 - lowered.py pretends another before

    runs = x.reshape(len(x), -1, 32)
    scales = np.maximum(np.abs(runs).max(-1) / np.float32(127), np.float32(2.0**-100))
    if isa.ZEN4:
        scales = round_scales(scales)
    codes = np.rint(runs * (np.float32(1) / scales)[..., None])
    offsets = (-128 * codes.sum(-1)).astype(np.int32)
    return codes.astype(np.int8).reshape(x.shape), scales, offsets


def round_scales(scales: Float32) -> Float32:
    """The next larger of 8, 9, ... 15 times a power of 2, and one more power of 2."""
    fraction, exponent = np.frexp(scales.astype(np.float64))
    eighths = np.floor(16 * fraction) / 16
    rest, more = np.frexp(fraction - eighths)
    power = np.where(rest > 0, np.ldexp(1.0, more - (rest == 0.5)), 0)
    return np.ldexp(eighths + power, exponent).astype(np.float32)


def dots(levels: NDArray[np.int64], codes: NDArray[np.int8]) -> NDArray[np.int64]:
    """(n_tokens, n_out, n_in / 32): the integer products of each run of 32 inputs."""
    w = levels.reshape(len(levels), -1, 32)
    x = codes.astype(np.int64).reshape(len(codes), -1, 32)
    return np.einsum("rsi,tsi->trs", w, x)


def matmul(m: Matrix, x: Float32) -> tuple[Float64, Float64]:
    """y (n_tokens, n_out) in float64, and the sums of the magnitudes that are added up in it."""
    if not m.group_size:
        w, inputs = m.weights.astype(np.float64), x.astype(np.float64)
        return inputs @ w.T, np.abs(inputs) @ np.abs(w).T
    codes, x_scales, _ = quantize_row(x)
    w_scales = np.repeat(m.scales.astype(np.float64), m.group_size // 32, axis=1)
    terms = dots(m.levels, codes) * w_scales * x_scales.astype(np.float64)[:, None]
    return terms.sum(-1), np.abs(terms).sum(-1)


def bfloat16(values: Float32) -> Float64:
    """Rounded to bfloat16, without its subnormal numbers."""
    rounded = packing.from_bfloat16(packing.to_bfloat16(values)).astype(np.float64)
    return np.where(np.abs(values) < SMALLEST_NORMAL, 0, rounded)


def matmul_bfloat16(m: Matrix, x: Float32) -> tuple[Float64, Float64]:
    """As matmul, of weights in bfloat16, and of inputs where the weights were not before."""
    w = bfloat16(m.weights)
    inputs = x.astype(np.float64) if m.format == "bf16" else bfloat16(x)
    return inputs @ w.T, np.abs(inputs) @ np.abs(w).T


def attention(
    q: Float64, k: Float64, v: Float64, window: int, cap: float
) -> tuple[Float64, Float64]:
    """out (n, n_heads, head_dim), and the largest sum of |q k| of a query's scores (n, n_heads).

    Keys and values (n, n_kv_heads, head_dim); query head h reads head h // (n_heads / n_kv_heads).
    """
    n, n_heads, _ = q.shape
    out, magnitudes = np.empty_like(q), np.empty((n, n_heads))
    seen = reference.visible(n, window)
    for h in range(n_heads):
        kv = h // (n_heads // k.shape[1])
        scores = q[:, h] @ k[:, kv].T
        magnitudes[:, h] = (np.abs(q[:, h]) @ np.abs(k[:, kv]).T).max(-1, where=seen, initial=0)
        if cap:
            scores = cap * np.tanh(scores / cap)
        scores[~seen] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, h] = weights @ v[:, kv] / weights.sum(-1, keepdims=True)
    return out, magnitudes


def dequantized(file: ModelFile, name: str) -> NDArray[np.float32]:
    """A matrix as the kernels see it, the rows that fill up its last tile taken off."""
    m, tiles = file.matrices[name], file.tiles[name]
    if m.group_size == 0:
        return packing.unpack_floats(m.format, tiles, m.n_in)[: m.n_out]
    codes, scales = packing.unpack_codes(m.format, tiles, m.n_in, m.group_size)
    levels = codes if m.codebook is None else np.array(m.codebook, np.int8)[codes]
    steps = np.repeat(scale_values(scales), m.group_size, axis=1)
    return (steps * levels.astype(np.float32))[: m.n_out]
