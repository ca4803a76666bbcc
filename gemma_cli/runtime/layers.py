"""The small equations of a Gemma layer, row by row: norms, positions, the gated activation."""

import math

from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.vector import (
    address_of,
    exp,
    fma,
    horizontal_sum,
    load_f32,
    splat,
    store_f32,
)


@kernel
def rms_norm(x, weight, eps, y):
    """y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467).

    x, y: float32 (n,), n a multiple of 16, y may be x; weight: address of float32 (n,), with
    Gemma's `1 +` already added. -> sum(x^2)
    """
    source, target = address_of(x), address_of(y)
    squares = splat(0.0)
    for i in range(0, 4 * x.size, 64):
        value = load_f32(source + i)
        squares = fma(value, value, squares)
    total = horizontal_sum(squares)
    # Where the sum overflows, nothing but NaN comes out, rather than zeros.
    factor = splat(1.0 / math.sqrt(total / x.size + eps) + 0.0 * total)
    for i in range(0, 4 * x.size, 64):
        store_f32(target + i, load_f32(source + i) * factor * load_f32(weight + i))
    return total


@kernel
def add(x, y):
    """x += y, float32 (n,), n a multiple of 16."""
    source, target = address_of(y), address_of(x)
    for i in range(0, 4 * x.size, 64):
        store_f32(target + i, load_f32(target + i) + load_f32(source + i))


@kernel
def rotary_angles(position, frequencies, cos, sin):
    """cos and sin of position * frequencies, float64 (head_dim / 2,), as float32."""
    for i in range(cos.size):
        angle = position * frequencies[i]
        cos[i] = math.cos(angle)
        sin[i] = math.sin(angle)


@kernel
def rotate(x, cos, sin, factor):
    """Turns the pairs (x[i], x[i + head_dim / 2]) by their angles and multiplies by factor.

    x: float32 (head_dim,), in place.
    """
    half = cos.size
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i] = (a * cos[i] - b * sin[i]) * factor
        x[i + half] = (b * cos[i] + a * sin[i]) * factor


@kernel
def gated(g, up):
    """gelu(g) * up (Shazeer 2020, arXiv:2002.05202) of f32x16, gelu with its tanh approximation.

    gelu(g) = g / 2 (1 + tanh(u)) = g / (1 + exp(-2 u)), u = sqrt(2 / pi) (g + 0.044715 g^3).
    """
    factor, one = splat(-2.0 * math.sqrt(2.0 / math.pi)), splat(1.0)
    u = factor * g * fma(splat(0.044715), g * g, one)
    return g / (one + exp(u)) * up


@kernel
def geglu(gate, up, y):
    """y = gelu(gate) * up; float32 (n,), n a multiple of 16."""
    gates, ups, target = address_of(gate), address_of(up), address_of(y)
    for i in range(0, 4 * y.size, 64):
        store_f32(target + i, gated(load_f32(gates + i), load_f32(ups + i)))


@kernel
def soft_cap(x, cap):
    """x = cap tanh(x / cap), tanh(u) = 1 - 2 / (exp(2 u) + 1) (Gemma 2, arXiv:2408.00118).

    x: float32 (n,), n a multiple of 16, in place.
    """
    target = address_of(x)
    one, two = splat(1.0), splat(2.0)
    for i in range(0, 4 * x.size, 64):
        u = load_f32(target + i) * splat(2.0 / cap)
        store_f32(target + i, splat(cap) * (one - two / (exp(u) + one)))
