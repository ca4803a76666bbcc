"""The largest logits, from half of the output head's bytes.

The head is the embedding, an int8 matrix whose codes lie as two planes of nibbles (PLANES). With
code = 16 h + l, and l in its mean, 7.5, a logit is estimated from the high plane alone:

    estimate = sum over i of scale (16 h[i] + 7.5) x[i]

What l adds to a code is as good as random, uniform on -7.5 to 7.5 with a variance of 21.25, so the
estimate errs with the variance of 21.25 sum over i of (scale x[i])^2. A token whose estimate lies
within MARGIN deviations of the largest ones may be one of them: for the tiles with such tokens the
low plane is read, too, and their logits are those of the whole matrix, bit for bit.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemma_cli.runtime.inputs import FEW, some_inputs
from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.layers import soft_cap
from gemma_cli.runtime.matmul import SOME, first_tile, look_ahead, multiply_few
from gemma_cli.runtime.matrix import GROUP_SIZE, N_IN, N_TILES, SCALES, tile_address
from gemma_cli.runtime.team import stage
from gemma_cli.runtime.vector import (
    add_outer,
    add_scaled,
    address_of,
    dots_int4,
    horizontal_max,
    horizontal_sum,
    load_f16,
    load_f32,
    load_i8,
    prefetch,
    splat,
    sqrt,
    store_f32,
    store_rows,
    zeros,
)

MARGIN = 5.0
"""Deviations of an estimate's error to allow for, up and down: 7 of a difference of two."""

_VARIANCE = 21.25  # of the low nibbles


class Scratch(NamedTuple):
    """What the passes over the head write to."""

    scales: NDArray[np.float32]  # (FEW, hidden_size / 32), 16 times those of the inputs
    offsets: NDArray[np.int32]  # (FEW, hidden_size / 32), -16 * 7.5 times the inputs' sum
    variances: NDArray[np.float32]  # (FEW, hidden_size / 32), of a run with a weight scale of 1
    lower: NDArray[np.float32]  # (FEW, n_tiles), what a tile's largest logit is at least
    upper: NDArray[np.float32]  # (FEW, n_tiles), what it is at most
    thresholds: NDArray[np.float32]  # (FEW,), what the n_best largest logits are at least
    bounds: NDArray[np.float32]  # (n_threads, 2, SOME, 16)


def allocate(n_threads: int, hidden_size: int, n_tiles: int) -> Scratch:
    runs, tiles = (FEW, hidden_size // 32), (FEW, n_tiles)
    return Scratch(
        np.zeros(runs, np.float32),
        np.zeros(runs, np.int32),
        np.zeros(runs, np.float32),
        np.zeros(tiles, np.float32),
        np.zeros(tiles, np.float32),
        np.zeros(FEW, np.float32),
        np.zeros((n_threads, 2, SOME, 16), np.float32),
    )


@stage
def prepare(t, thread, h, scratch):
    """What `rank` needs to know of a token's inputs."""
    codes = address_of(h.codes[t])
    for run in range(h.scales.shape[1]):
        first, second = load_i8(codes + 32 * run), load_i8(codes + 32 * run + 16)
        squares = horizontal_sum(first * first + second * second)
        scale = h.scales[t, run]
        scratch.scales[t, run] = 16 * scale
        scratch.offsets[t, run] = h.offsets[t, run] // 16 * 15  # -128 of the sum to -120
        scratch.variances[t, run] = _VARIANCE * squares * scale * scale


def _rank_kernel(n):
    """The kernel of one tile for n tokens."""

    @kernel
    def rank_tile(
        matrix,
        w,
        ahead,
        share,
        codes,
        codes_stride,
        scales,
        offsets,
        variances,
        stride,
        bounds,
    ):
        """Bounds of 16 logits of n tokens: bounds[0, t] what they are at least, [1, t] at most.

        w: address of the tile's high plane; ahead, share, the inputs: as in matmul's kernels;
        bounds: address of float32 (2, SOME, 16).
        """
        part, gap = 256 // share, SCALES // share
        estimate, variance = zeros(n), zeros(n)
        for _ in range(matrix[N_IN] // matrix[GROUP_SIZE]):
            scale = load_f16(w)
            square = scale * scale
            w, ahead = w + SCALES, ahead + gap
            for _ in range(matrix[GROUP_SIZE] // 32):
                for line in range(0, part, 64):
                    prefetch(ahead + line)
                ahead += part
                dots = dots_int4(w, codes, codes_stride, offsets, stride, n)
                estimate = add_scaled(estimate, dots, scale, scales, stride)
                variance = add_outer(variance, square, variances, stride)
                w, codes = w + 256, codes + 32
                scales, offsets, variances = scales + 4, offsets + 4, variances + 4
        store_rows(bounds, 64, estimate, n)
        store_rows(bounds + 64 * SOME, 64, variance, n)
        for t in range(0, 64 * n, 64):
            low, high = bounds + t, bounds + 64 * SOME + t
            middle, reach = load_f32(low), splat(MARGIN) * sqrt(load_f32(high))
            store_f32(low, middle - reach)
            store_f32(high, middle + reach)

    return rank_tile


_rank_one, _rank_some = _rank_kernel(1), _rank_kernel(SOME)


@stage
def rank(item, thread, matrices, vocab_size, h, scratch, n_threads):
    """Between which bounds the largest logit of every tile lies; one of ITEMS * n_threads items.

    matrices: the embedding's row of the table, (1, N_COLUMNS); h: inputs of up to FEW tokens.
    """
    matrix = matrices[0]
    n_tiles, n_tokens = matrix[N_TILES], len(h.codes)
    bounds, passes = scratch.bounds[thread], (n_tokens + SOME - 1) // SOME
    start = first_tile(item, n_tiles, n_threads)
    stop = first_tile(item + 1, n_tiles, n_threads)
    for tile in range(start, stop):
        w, _ = tile_address(matrix, tile)
        for first in range(0, n_tokens, SOME):
            ahead, _ = look_ahead(matrix, tile, first // SOME, passes)
            args = (
                matrix,
                w,
                ahead,
                passes,
                address_of(h.codes[first]),
                h.codes.strides[0],
                address_of(scratch.scales[first]),
                address_of(scratch.offsets[first]),
                address_of(scratch.variances[first]),
                scratch.scales.strides[0],
                address_of(bounds),
            )
            if n_tokens - first == 1:
                _rank_one(*args)
            else:
                _rank_some(*args)
            for t in range(first, min(first + SOME, n_tokens)):
                scratch.lower[t, tile] = horizontal_max(load_f32(address_of(bounds[0, t - first])))
                scratch.upper[t, tile] = horizontal_max(load_f32(address_of(bounds[1, t - first])))
    if stop == n_tiles and vocab_size < 16 * n_tiles:
        # Rows that fill up the last tile are no tokens: it promises nothing, and is always read.
        for t in range(n_tokens):
            scratch.lower[t, n_tiles - 1] = -math.inf
            scratch.upper[t, n_tiles - 1] = math.inf


@stage
def find_threshold(t, thread, n_best, scratch):
    """The n_best-th largest lower bound: so many logits at least are no smaller."""
    lower, best = scratch.lower[t], np.full(n_best, -np.inf, np.float32)  # rising
    for tile in range(lower.size):
        value = lower[tile]
        if value > best[0]:
            place = 0
            while place + 1 < n_best and best[place + 1] < value:
                best[place] = best[place + 1]
                place += 1
            best[place] = value
    scratch.thresholds[t] = best[0]


@stage
def refine(item, thread, matrices, h, scratch, cap, logits, n_threads):
    """The logits of the tiles that may hold one of the largest, -inf for the others."""
    matrix = matrices[0]
    n_tiles = matrix[N_TILES]
    nothing = splat(-math.inf)
    start = first_tile(item, n_tiles, n_threads)
    stop = first_tile(item + 1, n_tiles, n_threads)
    for tile in range(start, stop):
        for t in range(len(h.codes)):
            out = logits[t, 16 * tile : 16 * tile + 16]
            if scratch.upper[t, tile] >= scratch.thresholds[t]:
                inputs = some_inputs(h, t, t + 1, matrix[N_IN])
                multiply_few(matrix, tile, tile + 1, inputs, address_of(out), 0)
                if cap > 0:
                    soft_cap(out, cap)
            else:
                store_f32(address_of(out), nothing)
