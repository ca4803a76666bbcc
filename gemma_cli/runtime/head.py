"""The largest logits, from a third of the output head's bytes.

The head is the embedding, an int8 matrix whose codes lie in planes (quantize.packing): the two
highest bits of code + 128, the next, the next, and the low nibble. With u the bits that are read,
worth 2^n each, and l the rest, whose mean and variance `packing.remainders` has found, a logit is

    sum over i of scale (2^n u[i] + l[i] - 128) x[i]

and estimated with l's mean in place of l. What l adds is as good as random, so that the estimate
errs with the variance of var(l) sum over i of (scale x[i])^2. A token whose estimate lies within
MARGIN deviations of the largest ones may be one of them: of the tiles with such tokens more planes
are read, and in the end all. Their logits are those of the whole matrix, bit for bit.

In each of two rounds, those tiles come first that promise most. What they hold is a bound without
an error, and leaves fewer of the others. If the largest logit is wanted, 1.7% of Gemma 3 270M's
tiles are left after one plane in the median, and 6% in the mean: where a text may go on in many
ways, estimates tell little. After two it is 0.1%. If the 64 largest are wanted, 62% would be left
after one plane; so two are read at once, which leave 8%, and then three, which leave 1%.

That is for one position. Several have the whole matrix read: they take so long to multiply that
the other planes come meanwhile, and together they would need more of their tiles.
"""

import math

import numpy as np

from gemma_cli.runtime.codes import dots_one_plane, dots_three_planes, dots_two_planes
from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.layers import soft_cap
from gemma_cli.runtime.matmul import ITEMS, first_tile, multiply_few
from gemma_cli.runtime.matrix import OTHERS, advance, look_ahead, run_bytes, tile_address
from gemma_cli.runtime.tables import GROUP_SIZE, HALF_SCALES, N_IN, N_TILES, PLANES
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
from quantize.packing import PLANE_BITS, SLAB_TILES

MARGIN = 5.0
"""Deviations of an estimate's error to allow for, up and down: 7 of a difference of two."""

FROM_ONE_PLANE = 4
"""Up to so many of the largest logits are looked for from one plane on, more from two."""

AT_LEAST = 16
"""Tiles that come first in a round, or twice as many as there are logits to find."""

_DONE = -math.inf  # A bound that no tile has.


@stage
def _prepare(item, thread, h, remainders, scratch):
    """What `bounds` needs to know of a token's inputs, Inputs of one token."""
    codes = address_of(h.codes)
    for run in range(h.scales.shape[1]):
        first, second = load_i8(codes + 32 * run), load_i8(codes + 32 * run + 16)
        squares = horizontal_sum(first * first + second * second)
        scale, unread = h.scales[0, run], 8
        for planes in range(3):
            unread -= PLANE_BITS[planes]
            mean, variance = remainders[planes]
            unit = 1 << unread
            offset = h.offsets[0, run] * (1 - mean / 128)  # -128 of the sum to mean - 128
            scratch.scales[planes, run] = unit * scale
            scratch.offsets[planes, run] = np.int32(round(offset / unit))
            # One more, for what is rounded besides.
            scratch.variances[planes, run] = (variance + 1) * squares * scale * scale


def _bounds_kernel(n_planes):
    """The kernel that estimates a tile's logits from its first planes."""
    dots_upper = (dots_one_plane, dots_two_planes, dots_three_planes)[n_planes - 1]

    @kernel
    def bounds(matrix, tile, x, scratch):
        """What 16 logits are at least, and what they are at most; x: address of the codes."""
        w, others = tile_address(matrix, tile)
        part = run_bytes(PLANES)
        row = 4 * (n_planes - 1) * scratch.scales.shape[1]
        scales, offsets = address_of(scratch.scales) + row, address_of(scratch.offsets) + row
        variances = address_of(scratch.variances) + row
        estimate, variance = zeros(1), zeros(1)
        for _ in range(matrix[N_IN] // matrix[GROUP_SIZE]):
            scale = load_f16(w)
            square = scale * scale
            w += HALF_SCALES
            for _ in range(matrix[GROUP_SIZE] // 32):
                look_ahead(w, part, 1)
                for other in range(n_planes - 1):
                    look_ahead(others[other], 32 * OTHERS[other], 1)
                dots = dots_upper(w, others, x, offsets, 1, 1)
                estimate = add_scaled(estimate, dots, scale, scales)
                variance = add_outer(variance, square, variances, 4)
                w, others, x = w + part, advance(others, 32), x + 32
                scales, offsets, variances = scales + 4, offsets + 4, variances + 4
        reach = splat(MARGIN) * sqrt(variance[0])
        return estimate[0] - reach, estimate[0] + reach

    return bounds


_bounds_of_one, _bounds_of_two, _bounds_of_three = map(_bounds_kernel, (1, 2, 3))


@kernel
def _rank_tile(matrix, tile, n_planes, vocab_size, h, scratch):
    """Between which bounds the tile's largest logit lies."""
    x = address_of(h.codes)
    if 16 * tile + 16 > vocab_size:
        # Rows that fill up the last tile are no tokens: it promises nothing, and is always read.
        scratch.lower[tile], scratch.upper[tile] = -math.inf, math.inf
        return
    if n_planes == 1:
        lower, upper = _bounds_of_one(matrix, tile, x, scratch)
    elif n_planes == 2:
        lower, upper = _bounds_of_two(matrix, tile, x, scratch)
    else:
        lower, upper = _bounds_of_three(matrix, tile, x, scratch)
    scratch.lower[tile], scratch.upper[tile] = horizontal_max(lower), horizontal_max(upper)


@stage
def _rank(item, thread, n_threads, matrix, n_planes, vocab_size, h, scratch):
    """Ranks all tiles; one of ITEMS * n_threads items."""
    start = first_tile(item, matrix[N_TILES], n_threads)
    stop = first_tile(item + 1, matrix[N_TILES], n_threads)
    for tile in range(start, stop):
        _rank_tile(matrix, tile, n_planes, vocab_size, h, scratch)


@kernel
def _slab(item, n_tiles):
    """The tiles of a slab: so few that whoever has the time takes those in which much is left."""
    return range(item * SLAB_TILES, min(item * SLAB_TILES + SLAB_TILES, n_tiles))


@stage
def _rank_again(slab, thread, matrix, n_planes, vocab_size, h, scratch):
    """Ranks a slab's tiles that may hold one of the largest logits."""
    for tile in _slab(slab, matrix[N_TILES]):
        if scratch.upper[tile] >= scratch.least[0]:
            _rank_tile(matrix, tile, n_planes, vocab_size, h, scratch)


@stage
def _choose(item, thread, n_chosen, scratch):
    """The n_chosen tiles with the largest lower bounds, the largest last."""
    best, chosen = scratch.best, scratch.chosen
    for place in range(n_chosen):
        best[place], chosen[place] = -math.inf, 0
    for tile, value in enumerate(scratch.lower):
        if value > best[0]:
            place = 0
            while place + 1 < n_chosen and best[place + 1] < value:
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
def _refine_chosen(place, thread, matrix, h, scratch, cap, logits):
    """The logits of a chosen tile, if they are not known, and what the largest is."""
    tile = scratch.chosen[place]
    if scratch.best[place] > -math.inf and scratch.upper[tile] != _DONE:
        largest = _refine_tile(matrix, tile, h, cap, logits)
        scratch.best[place], scratch.lower[tile], scratch.upper[tile] = largest, largest, _DONE


@stage
def _settle(item, thread, n_best, n_chosen, scratch):
    """What n_best logits at least are not below: the chosen tiles' largest are that good."""
    best = scratch.best
    for n_sorted in range(1, n_chosen):
        value, place = best[n_sorted], n_sorted
        while place and best[place - 1] > value:
            best[place] = best[place - 1]
            place -= 1
        best[place] = value
    scratch.least[0] = best[n_chosen - n_best]


@stage
def _refine(slab, thread, matrix, h, scratch, cap, logits):
    """The logits of a slab's other tiles that may hold one of the largest, else -inf."""
    nothing = splat(-math.inf)
    for tile in _slab(slab, matrix[N_TILES]):
        if scratch.upper[tile] >= scratch.least[0]:
            _refine_tile(matrix, tile, h, cap, logits)
        elif scratch.upper[tile] != _DONE:
            store_f32(address_of(logits[16 * tile : 16 * tile + 16]), nothing)


@kernel
def largest_logits(
    counters,
    row,
    thread,
    n_threads,
    matrix,
    remainders,
    vocab_size,
    h,
    n_best,
    cap,
    scratch,
    logits,
):
    """Logits after one token, float32 (16 n_tiles,): the n_best largest for certain, or -inf.

    Of `forward`'s HEAD_STAGES from `row` on. matrix: the embedding's row of the table, PLANES;
    remainders: as packing.remainders gives them; h: Inputs of one token; n_best: n_tiles at most;
    cap: the soft cap, or 0.
    """
    n_tiles, n_planes = matrix[N_TILES], 1 if n_best <= FROM_ONE_PLANE else 2
    n_slabs = (n_tiles + SLAB_TILES - 1) // SLAB_TILES
    n_chosen = min(max(2 * n_best, AT_LEAST), n_tiles)
    _prepare(counters, row, 1, thread, h, remainders, scratch)
    _rank(
        counters,
        row + 1,
        ITEMS * n_threads,
        thread,
        n_threads,
        matrix,
        n_planes,
        vocab_size,
        h,
        scratch,
    )
    _choose(counters, row + 2, 1, thread, n_chosen, scratch)
    _refine_chosen(counters, row + 3, n_chosen, thread, matrix, h, scratch, cap, logits)
    _settle(counters, row + 4, 1, thread, n_best, n_chosen, scratch)
    _rank_again(counters, row + 5, n_slabs, thread, matrix, n_planes + 1, vocab_size, h, scratch)
    _choose(counters, row + 6, 1, thread, n_chosen, scratch)
    _refine_chosen(counters, row + 7, n_chosen, thread, matrix, h, scratch, cap, logits)
    _settle(counters, row + 8, 1, thread, n_best, n_chosen, scratch)
    _refine(counters, row + 9, n_slabs, thread, matrix, h, scratch, cap, logits)
