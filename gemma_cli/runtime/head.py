"""The largest logits, from half of the output head's bytes.

The head is the embedding, an int8 matrix whose codes lie as two planes of nibbles (PLANES). With
code = 16 h + l, and l in its mean, 7.5, a logit is estimated from the high plane alone:

    estimate = sum over i of scale (16 h[i] + 7.5) x[i]

What l adds to a code is as good as random, uniform on -7.5 to 7.5 with a variance of 21.25, so the
estimate errs with the variance of 21.25 sum over i of (scale x[i])^2. A token whose estimate lies
within MARGIN deviations of the largest ones may be one of them: for the tiles with such tokens the
low plane is read, too, and their logits are those of the whole matrix, bit for bit.

First come as many tiles as there are logits to find, those that promise most. What these hold is a
bound without an error, and leaves fewer of the others: of Gemma 3 270M's tiles 0.06 instead of 0.4%
for the largest logit, 3 instead of 8% for the 64 largest.

That is for one position. Several have the whole matrix read: they take so long to multiply that
the low plane comes meanwhile, and together they would need more of its tiles.
"""

import math

from gemma_cli.runtime.codes import dots_int4
from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.layers import soft_cap
from gemma_cli.runtime.matmul import first_tile, look_ahead, multiply_few
from gemma_cli.runtime.matrix import SCALES, tile_address
from gemma_cli.runtime.tables import GROUP_SIZE, N_IN, N_TILES
from gemma_cli.runtime.team import stage
from gemma_cli.runtime.vector import (
    add_outer,
    add_scaled,
    address_of,
    horizontal_max,
    horizontal_sum,
    load_f16,
    load_f32,
    load_i8,
    splat,
    sqrt,
    store_f32,
    zeros,
)

MARGIN = 5.0
"""Deviations of an estimate's error to allow for, up and down: 7 of a difference of two."""

_VARIANCE = 21.25  # of the low nibbles
_DONE = -math.inf  # A bound that no tile has.


@stage
def prepare(item, thread, h, scratch):
    """What `rank` needs to know of a token's inputs, Inputs of one token."""
    codes = address_of(h.codes)
    for run in range(h.scales.shape[1]):
        first, second = load_i8(codes + 32 * run), load_i8(codes + 32 * run + 16)
        squares = horizontal_sum(first * first + second * second)
        scale = h.scales[0, run]
        scratch.scales[run] = 16 * scale
        scratch.offsets[run] = h.offsets[0, run] // 16 * 15  # -128 of the sum to -120
        scratch.variances[run] = _VARIANCE * squares * scale * scale


@kernel
def _rank_tile(matrix, w, x, scratch):
    """What 16 logits are at least, and what they are at most.

    w: address of the tile's high plane; x: of the token's codes.
    """
    scales, offsets = address_of(scratch.scales), address_of(scratch.offsets)
    variances = address_of(scratch.variances)
    estimate, variance = zeros(1), zeros(1)
    for _ in range(matrix[N_IN] // matrix[GROUP_SIZE]):
        scale = load_f16(w)
        square = scale * scale
        w += SCALES
        for _ in range(matrix[GROUP_SIZE] // 32):
            look_ahead(w, 256, 1)
            dots = dots_int4(w, 0, x, offsets, 1, 1)
            estimate = add_scaled(estimate, dots, scale, scales)
            variance = add_outer(variance, square, variances, 4)
            w, x = w + 256, x + 32
            scales, offsets, variances = scales + 4, offsets + 4, variances + 4
    reach = splat(MARGIN) * sqrt(variance[0])
    return estimate[0] - reach, estimate[0] + reach


@stage
def rank(item, thread, matrices, vocab_size, h, scratch, n_threads):
    """Between which bounds the largest logit of every tile lies; one of ITEMS * n_threads items.

    matrices: the embedding's row of the table, (1, N_COLUMNS); h: Inputs of one token.
    """
    matrix, x = matrices[0], address_of(h.codes)
    n_tiles = matrix[N_TILES]
    start = first_tile(item, n_tiles, n_threads)
    stop = first_tile(item + 1, n_tiles, n_threads)
    for tile in range(start, stop):
        w, _ = tile_address(matrix, tile)
        lower, upper = _rank_tile(matrix, w, x, scratch)
        scratch.lower[tile], scratch.upper[tile] = horizontal_max(lower), horizontal_max(upper)
    if stop == n_tiles and vocab_size < 16 * n_tiles:
        # Rows that fill up the last tile are no tokens: it promises nothing, and is always read.
        scratch.lower[n_tiles - 1], scratch.upper[n_tiles - 1] = -math.inf, math.inf


@stage
def choose(item, thread, n_best, scratch):
    """The n_best tiles with the largest lower bounds."""
    best, chosen = scratch.best, scratch.chosen
    for place in range(n_best):
        best[place], chosen[place] = -math.inf, 0
    for tile, value in enumerate(scratch.lower):
        if value > best[0]:
            place = 0
            while place + 1 < n_best and best[place + 1] < value:
                best[place], chosen[place] = best[place + 1], chosen[place + 1]
                place += 1
            best[place], chosen[place] = value, tile


@kernel
def _refine_tile(matrix, tile, h, cap, logits):
    """Fills the tile's logits -> the largest, as it is before the soft cap."""
    out = logits[16 * tile : 16 * tile + 16]
    multiply_few(matrix, tile, tile + 1, h, address_of(out), 0)
    largest = horizontal_max(load_f32(address_of(out)))
    if cap > 0:
        soft_cap(out, cap)
    return largest


@stage
def refine_chosen(place, thread, matrices, h, scratch, cap, logits):
    """The logits of a chosen tile, and what the largest is. An item of n_best."""
    if scratch.best[place] > -math.inf:
        tile = scratch.chosen[place]
        scratch.best[place] = _refine_tile(matrices[0], tile, h, cap, logits)
        scratch.upper[tile] = _DONE


@stage
def refine(item, thread, matrices, n_best, h, scratch, cap, logits, n_threads):
    """The logits, (16 n_tiles,), of the other tiles that may hold one of the largest, else -inf."""
    matrix = matrices[0]
    n_tiles = matrix[N_TILES]
    nothing = splat(-math.inf)
    least = math.inf  # So many logits at least are no smaller.
    for place in range(n_best):
        least = min(least, scratch.best[place])
    start = first_tile(item, n_tiles, n_threads)
    stop = first_tile(item + 1, n_tiles, n_threads)
    for tile in range(start, stop):
        if scratch.upper[tile] >= least:
            _refine_tile(matrix, tile, h, cap, logits)
        elif scratch.upper[tile] != _DONE:
            store_f32(address_of(logits[16 * tile : 16 * tile + 16]), nothing)
