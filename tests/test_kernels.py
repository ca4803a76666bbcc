"""Every kernel against its twin in plain NumPy (`twins.py`).

`test_isa.py` runs this file again for the other instruction sets that the machine has.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import guarded
import numpy as np
import pytest
import twins
from numba import njit
from numpy.typing import NDArray

from gemma_cli.runtime import (
    head,
    inputs,
    isa,
    layers,
    matmul,
    matrix,
    model,
    tables,
    team,
    vector,
    workspace,
)
from gemma_cli.runtime.embedding import embed
from gemma_cli.runtime.workspace import BLOCK, FEW, TOKENS, Inputs
from quantize import packing
from quantize.grouping import round_int4, round_int8
from quantize.packing import CODE_FORMATS, INT4_FORMATS, IQ4_NL_LEVELS, LINEAR_LEVELS

Float32 = NDArray[np.float32]

GROUP_SIZES = (32, 64, 128)
FULL_LEVELS = (-128, *IQ4_NL_LEVELS[1:15], 127)
"""A codebook that has int8's lowest level, whose negative is no int8, and its highest."""

# What lies beyond an array must stay as it is; where that is a page that must not even be read
# (guarded.py), there is nothing between.
BEYOND = 0 if guarded.installed else 1

TOKEN_COUNTS = (1, 2, matmul.SOME + 1, TOKENS + 1, FEW, FEW + 3)


def addresses(matrices: Sequence[twins.Matrix], codebooks: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The table of matrices; codebooks (n_matrices, 16) is memory for their levels."""
    rows = []
    for m, levels in zip(matrices, codebooks, strict=True):
        levels[:] = np.array(m.codebook) + 128
        fmt = {
            "int8": tables.INT8,
            "int8_planes": tables.PLANES,
            "bf16": tables.BF16,
            "f32": tables.F32,
        }.get(m.format, tables.INT4 if m.codebook == LINEAR_LEVELS else tables.INT4_CODEBOOK)
        places = m.tiles.ctypes.data, levels.ctypes.data
        scales = packing.scale_bytes(m.format)
        rows.append((places[0], fmt, len(m.tiles), m.n_in, m.group_size, places[1], scales))
    return np.array(rows, np.int64)


def from_python(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel, which only compiled code can call, for Python."""

    @njit
    def call(*args):
        return kernel(*args)

    return call


def on_threads(n_threads: int, work: Callable[[int], None]) -> None:
    if n_threads == 1:
        work(0)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(work, range(n_threads)))


@njit
def round_all(h):
    for t in range(len(h.values)):
        inputs.round_inputs(h, t, 0, h.values.shape[1])


@njit
def quantize_rows(h):
    for t in range(len(h.values)):
        inputs.quantize_row(h.values[t], h.codes[t], h.scales[t], h.offsets[t])


@njit(nogil=True)
def run_matmul(counters, thread, n_threads, matrices, h, y, panels):
    items = matmul.ITEMS * n_threads
    matmul.matmul(counters, 0, items, thread, matrices, h, y, panels, n_threads)


@njit(nogil=True)
def run_matmul_gated(counters, thread, n_threads, matrices, h, gated, panels):
    items = matmul.ITEMS * n_threads
    matmul.matmul_gated(counters, 0, items, thread, matrices, h, gated, panels, n_threads)


class Padded:
    """A matrix's inputs, in rows that are further apart than they are long, with rows to spare."""

    def __init__(self, x: Float32) -> None:
        n, self.n_in = x.shape
        shape = -(-n // TOKENS) * TOKENS + TOKENS * BEYOND, self.n_in + 96 * BEYOND
        self.x = np.full(shape, np.nan, np.float32)
        self.x[:n, : self.n_in] = x
        self.codes = np.full(shape, 99, np.int8)
        self.scales = np.full((len(self.x), self.n_in // 32 + 5 * BEYOND), np.nan, np.float32)
        self.offsets = np.full(self.scales.shape, 99, np.int32)
        n_runs = self.n_in // 32
        blocks = workspace.allocate_blocks(n, self.n_in, exact=True)
        self.blocks = np.full((len(blocks) + BEYOND, blocks.shape[1]), 99, np.uint16)
        self.inputs = Inputs(
            self.x[:n, : self.n_in],
            self.codes[:n, : self.n_in],
            self.scales[:n, :n_runs],
            self.offsets[:n, :n_runs],
            self.blocks[: len(blocks)],
        )
        round_all(self.inputs)
        assert (self.blocks[len(blocks) :] == 99).all()

    def quantized(self) -> tuple[NDArray[np.int8], Float32, NDArray[np.int32]]:
        """Codes, scales and offsets, after a look at what lies beyond them."""
        quantize_rows(self.inputs)
        n_runs = self.n_in // 32
        assert (self.codes[:, self.n_in :] == 99).all()
        assert np.isnan(self.scales[:, n_runs:]).all()
        assert (self.offsets[:, n_runs:] == 99).all()
        return self.inputs.codes, self.inputs.scales, self.inputs.offsets


def multiply(matrices: Sequence[twins.Matrix], x: Float32, n_threads: int = 1) -> Float32:
    """y (n_tokens, 16 x all tiles); what lies beyond the last tile must stay as it is."""
    codebooks = np.empty((len(matrices), 16), np.uint8)
    table = addresses(matrices, codebooks)
    width = sum(m.n_columns for m in matrices)
    y = np.full((len(x) + BEYOND, width + 16 * BEYOND), np.nan, np.float32)
    n_bytes = workspace.scratch_bytes(len(x))
    panels = np.full((n_threads, n_bytes + 64 * BEYOND), 99, np.uint8)
    counters, h = workspace.counters(1), Padded(x).inputs
    on_threads(
        n_threads,
        lambda thread: run_matmul(
            counters, thread, n_threads, table, h, y[: len(x)], panels[:, :n_bytes]
        ),
    )
    assert np.isnan(y[:, width:]).all()
    assert np.isnan(y[len(x) :]).all()
    assert (panels[:, n_bytes:] == 99).all()
    return y[: len(x), :width]


def random_inputs(rng: np.random.Generator, n_tokens: int, n_in: int) -> Float32:
    """Inputs whose runs of 32 differ in size, with runs of zeros and single spikes."""
    x = rng.standard_normal((n_tokens, n_in // 32, 32)) * rng.lognormal(0, 3, (n_tokens, 1, 1))
    x[rng.random(x.shape[:2]) < 0.1] = 0
    spikes = rng.random(x.shape[:2]) < 0.1
    x[spikes, 5] = 1000
    return x.reshape(n_tokens, n_in).astype(np.float32)


def random_matrix(
    rng: np.random.Generator,
    fmt: str,
    n_out: int,
    n_in: int,
    group_size: int = 32,
    codebook: tuple[int, ...] = LINEAR_LEVELS,
) -> twins.Matrix:
    if fmt in ("bf16", "f32"):
        return twins.floating(fmt, rng.standard_normal((n_out, n_in)).astype(np.float32))
    low, high, dtype = (0, 16, np.uint8) if fmt in INT4_FORMATS else (-128, 128, np.int8)
    codes = rng.integers(low, high, (n_out, n_in), dtype)
    shape = n_out, n_in // group_size
    if fmt == "int4_dq":
        units = twins.bfloat16(rng.lognormal(-5, 1, n_out).astype(np.float32)).astype(np.float32)
        units[-1] = 2.0**-31  # the smallest unit
        double = packing.DoubleScales(rng.integers(-127, 128, shape, np.int8), units)
        return twins.coded(fmt, codes, double, codebook)
    scales = rng.standard_normal(shape).astype(np.float16)
    scales[rng.random(scales.shape) < 0.1] = 0
    scales[rng.random(scales.shape) < 0.1] = np.float16(2.0**-24)  # the smallest subnormal
    return twins.coded(fmt, codes, scales, codebook)


KINDS = [
    *(("int4", group, LINEAR_LEVELS) for group in GROUP_SIZES),
    *(("int4_dq", group, LINEAR_LEVELS) for group in GROUP_SIZES),
    ("int4_dq", 32, IQ4_NL_LEVELS),
    *(("int4", group, IQ4_NL_LEVELS) for group in GROUP_SIZES),
    ("int4", 32, FULL_LEVELS),
    *(("int8", group, LINEAR_LEVELS) for group in GROUP_SIZES),
    *(("int8_planes", group, LINEAR_LEVELS) for group in GROUP_SIZES),
    ("bf16", 0, LINEAR_LEVELS),
    ("f32", 0, LINEAR_LEVELS),
]
KIND_NAMES = [
    f"{fmt}-{group}" + {LINEAR_LEVELS: "", IQ4_NL_LEVELS: "-nl", FULL_LEVELS: "-full"}[levels]
    for fmt, group, levels in KINDS
]
every_kind = pytest.mark.parametrize(("fmt", "group_size", "codebook"), KINDS, ids=KIND_NAMES)
every_integer_kind = pytest.mark.parametrize(
    ("fmt", "group_size", "codebook"), KINDS[:-2], ids=KIND_NAMES[:-2]
)


def assert_close(y: Float32, m: twins.Matrix, x: Float32) -> None:
    """Within the rounding of float32 sums.

    A sum of n terms in one order errs by n roundings of its magnitudes at most (Higham, Accuracy
    and Stability of Numerical Algorithms, 3.1); a term itself takes two more, its two scales'
    product and, where no instruction fuses it, that product's own product. AMX adds the even and
    the odd ones of 32 inputs, one by one, and then the two sums; each time what is too small is
    lost.
    """
    lost = 0.0
    if isa.AMX and len(x) > FEW and m.format != "f32":
        expected, magnitudes = twins.matmul_bfloat16(m, x)
        # Three parts of inputs make three times the terms, but the second is 2^-8 of the first.
        n_terms = 2 * (16 + m.n_in // 32)
        lost = 3 * m.n_in * twins.SMALLEST_NORMAL * (1 + np.abs(m.weights).max())
    else:
        expected, magnitudes = twins.matmul(m, x)
        n_terms = m.n_in // 32 if m.group_size else m.n_in
    error = np.abs(y[:, : m.n_out] - expected)
    assert (error <= (n_terms + 2) * twins.EPSILON * magnitudes + lost).all()
    assert (y[:, m.n_out :] == 0).all(), "the rows that fill up the last tile are zero"


# The rounding of inputs.


def test_inputs_are_rounded_as_the_twin_rounds_them() -> None:
    rng = np.random.default_rng(1)
    x = random_inputs(rng, 50, 256)
    for row, extreme in enumerate((1e30, -1e30, 3e38, 1e-29, 1e-31, 1e-45, -0.0)):
        x[row, :32] = np.float32(extreme) * rng.random(32, np.float32)
        x[row, 32:64] = np.float32(extreme)
        x[row, 64:96] = 0
        x[row, 95] = np.float32(extreme)
    for actual, expected in zip(Padded(x).quantized(), twins.quantize_row(x), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_rounded_inputs_are_near() -> None:
    x = random_inputs(np.random.default_rng(2), 50, 256)
    codes, scales, offsets = Padded(x).quantized()
    step = np.repeat(scales, 32, axis=1)
    # Half a step, and the roundings of 127 / largest, of the product and of the scale: codes up
    # to 127 move by 3 x 127 x 2^-24 steps.
    assert (np.abs(x - step * codes) <= step * (0.5 + 400 * twins.EPSILON)).all()
    np.testing.assert_array_equal(offsets, -128 * codes.reshape(50, -1, 32).sum(-1, dtype=int))
    assert np.abs(codes.astype(int)).max() == 127


def test_ties_go_to_the_even_code() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :5] = 127, 0.5, 1.5, -0.5, -2.5
    codes, scales, _ = Padded(x).quantized()
    assert scales[0, 0] == 1
    np.testing.assert_array_equal(codes[0, :5], [127, 0, 2, 0, -2])


@pytest.mark.skipif(not isa.AMX, reason="only AMX multiplies bfloat16")
@pytest.mark.parametrize("n_tokens", [FEW + 1, 32, 50])
def test_inputs_of_many_tokens_are_rounded_to_blocks_of_bfloat16(n_tokens: int) -> None:
    x = random_inputs(np.random.default_rng(26), n_tokens, 256)
    h = Padded(x).inputs
    rest = x
    for part in h.blocks:
        rows = part.reshape(-1, 256 // 32, BLOCK, 32).transpose(0, 2, 1, 3).reshape(-1, 256)
        np.testing.assert_array_equal(rows[:n_tokens], packing.to_bfloat16(rest))
        rest = rest - packing.from_bfloat16(rows[:n_tokens])
    assert not rest.any(), "three parts have all the bits"


@pytest.mark.skipif(isa.AMX, reason="AMX multiplies bfloat16")
@pytest.mark.parametrize("n_tokens", [FEW + 1, 32, 50])
def test_codes_of_many_tokens_lie_together(n_tokens: int) -> None:
    x = random_inputs(np.random.default_rng(26), n_tokens, 256)
    blocks = Padded(x).inputs.blocks.view(np.uint8).reshape(-1, 256 // 32, inputs.TOGETHER)

    def rows(start: int, dtype: type, per_run: int) -> NDArray[Any]:
        part = blocks[..., start : start + 4 * TOKENS * per_run].copy().view(dtype)
        part = part.reshape(len(blocks), 256 // 32, per_run, TOKENS, -1)
        return part.transpose(0, 3, 1, 2, 4).reshape(len(blocks) * TOKENS, -1)[:n_tokens]

    codes, scales, offsets = twins.quantize_row(x)
    np.testing.assert_array_equal(rows(0, np.int8, 8), codes)
    np.testing.assert_array_equal(rows(inputs.CODES, np.float32, 1), scales)
    np.testing.assert_array_equal(rows(inputs.CODES + 4 * TOKENS, np.int32, 1), offsets)
    if isa.ZEN4:
        first, second = (rows(inputs.CODES + at * TOKENS, np.float32, 1) for at in (8, 12))
        eighths = np.floor(8 * (scales / np.exp2(first) - 1))
        assert ((eighths >= 0) & (eighths < 8)).all()
        rest = np.where(second > -127, np.exp2(second), 0)
        np.testing.assert_array_equal(np.exp2(first) * (1 + eighths / 8) + rest, scales)


# Matrix products.


@pytest.mark.parametrize("n_tokens", [TOKENS + 3, FEW + 3])
@every_integer_kind
def test_integer_products_are_exact(
    fmt: str, group_size: int, codebook: tuple[int, ...], n_tokens: int
) -> None:
    """With scales of 1, and sums below 2^24, float32 is exact: so y is the integer product."""
    rng = np.random.default_rng(3)
    n_in, lowest, highest = 256, *((0, 15) if fmt in INT4_FORMATS else (-128, 127))
    dtype = np.uint8 if fmt in INT4_FORMATS else np.int8
    codes = rng.integers(lowest, highest + 1, (48, n_in), dtype)
    codes[0], codes[1] = lowest, highest
    codes[2, ::2], codes[2, 1::2] = lowest, highest
    codes[3, :16], codes[3, 16:] = highest, lowest
    ones: packing.Scales = np.ones((48, n_in // group_size), np.float16)
    if fmt == "int4_dq":
        ones = packing.DoubleScales(ones.astype(np.int8), np.ones(48, np.float32))
    m = twins.coded(fmt, codes, ones, codebook)
    # What saturates vpmaddubsw: neighbours with codes of the largest magnitude and one sign.
    x = rng.integers(-127, 128, (n_tokens, n_in)).astype(np.float32)
    x[0], x[1] = 127, -127
    x[2, ::2], x[2, 1::2] = 127, -127
    x[3, :16], x[3, 16:] = -127, 127
    x[:, ::32] = 127  # makes the scale 1
    exact = twins.dots(m.levels, x.astype(np.int8))
    np.testing.assert_array_equal(multiply([m], x), exact.sum(-1))
    for run in range(n_in // 32):  # each run of 32 by itself, too: errors could cancel
        alone = np.zeros_like(x)
        alone[:, 32 * run : 32 * run + 32] = x[:, 32 * run : 32 * run + 32]
        np.testing.assert_array_equal(multiply([m], alone), exact[..., run])


@pytest.mark.parametrize("n_tokens", TOKEN_COUNTS)
@every_kind
def test_products_are_the_twins(
    fmt: str, group_size: int, codebook: tuple[int, ...], n_tokens: int
) -> None:
    rng = np.random.default_rng(4)
    x = random_inputs(rng, n_tokens, 384)
    for n_out in (1, 40):
        m = random_matrix(rng, fmt, n_out, 384, group_size, codebook)
        assert_close(multiply([m], x), m, x)


@every_kind
def test_extreme_inputs(fmt: str, group_size: int, codebook: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    m = random_matrix(rng, fmt, 20, 128, group_size, codebook)
    x = random_inputs(rng, 6, 128)
    x[0] = 1e30
    x[1] = -1e30
    x[2] = 0
    x[3] = 0
    x[3, 77] = -1e30
    x[4, :32] = 1e-30
    x[5] = 1e-20
    assert_close(multiply([m], x), m, x)


@pytest.mark.parametrize("n_tokens", [1, TOKENS, FEW + 3])
@pytest.mark.parametrize("fmt", CODE_FORMATS)
def test_inputs_that_are_no_numbers_give_none(fmt: str, n_tokens: int) -> None:
    """So that an overflow further up is seen at the end (Model.forward), not a plausible text."""
    rng = np.random.default_rng(9)
    m = random_matrix(rng, fmt, 20, 128)
    for nothing in (np.nan, np.inf, -np.inf):
        x = random_inputs(rng, n_tokens, 128)
        x[0] = nothing
        y = multiply([m], x)[:, : m.n_out]
        assert not np.isfinite(y[0]).any()
        assert np.isfinite(y[1:]).all()


def side_by_side(rng: np.random.Generator, n_in: int) -> list[twins.Matrix]:
    """Matrices of every kind, most with rows that fill no tile."""
    rows = (5, 32, 17, 1, 40, 16, 33, 7, 64, 18, 15, 31)
    return [
        random_matrix(rng, fmt, n_out, n_in, group, levels)
        for n_out, (fmt, group, levels) in zip(cycle(rows), KINDS, strict=False)
    ]


def test_matrices_side_by_side() -> None:
    rng = np.random.default_rng(6)
    matrices = side_by_side(rng, 256)
    x = random_inputs(rng, 2 * TOKENS + 3, 256)
    y = multiply(matrices, x, n_threads=2)
    start = 0
    for m in matrices:
        assert_close(y[:, start : start + m.n_columns], m, x)
        start += m.n_columns


def test_products_do_not_depend_on_threads_or_on_tokens_at_once() -> None:
    """Only AMX makes a difference, between FEW tokens and more."""
    rng = np.random.default_rng(7)
    matrices = side_by_side(rng, 256)
    x = random_inputs(rng, 70, 256)
    one_by_one = np.concatenate([multiply(matrices, x[t : t + 1]) for t in range(FEW)])
    many = multiply(matrices, x)
    for n_threads in (1, 2, 4):
        np.testing.assert_array_equal(multiply(matrices, x[:FEW], n_threads), one_by_one)
        np.testing.assert_array_equal(multiply(matrices, x[3 : FEW + 7], n_threads), many[3:23])
        np.testing.assert_array_equal(multiply(matrices, x, n_threads), many)
    np.testing.assert_array_equal(multiply(matrices, x[:5], 2), one_by_one[:5])
    if not isa.AMX:
        np.testing.assert_array_equal(many[:FEW], one_by_one)


@pytest.mark.parametrize("n_tokens", [17, 31, 33, 100, 513])
@pytest.mark.parametrize(
    ("fmt", "codebook"),
    [
        *((f, IQ4_NL_LEVELS) for f in INT4_FORMATS),
        *((f, LINEAR_LEVELS) for f in ("int8", "int8_planes", "bf16")),
    ],
)
def test_products_of_many_tokens(fmt: str, codebook: tuple[int, ...], n_tokens: int) -> None:
    """Any number of them, and several panels' inputs; the last of which may be small."""
    rng = np.random.default_rng(27)
    for n_in, group_size in ((32, 32), (640, 128)):
        m = random_matrix(rng, fmt, 90, n_in, group_size, codebook)
        x = random_inputs(rng, n_tokens, n_in)
        assert_close(multiply([m], x, 2), m, x)


@pytest.mark.parametrize("fmt", CODE_FORMATS)
def test_products_of_many_inputs_and_tiles(fmt: str) -> None:
    """More than a panel's inputs, and more tiles than go side by side, or lie in a slab."""
    rng = np.random.default_rng(23)
    n_in, n_out = workspace.PANEL + 256, 16 * packing.SLAB_TILES + 40
    m = random_matrix(rng, fmt, n_out, n_in, 32, LINEAR_LEVELS)
    x = random_inputs(rng, FEW + 3, n_in)
    y = multiply([m], x, 2)
    assert_close(y, m, x)
    if not isa.AMX:
        np.testing.assert_array_equal(y[:2], multiply([m], x[:2]))


@pytest.mark.skipif(isa.AMX, reason="AMX takes the steps one by one")
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize(("n_out", "n_tokens"), [(32, FEW + 1), (96, 33), (2080, FEW + 7)])
def test_geglu_at_once_gives_the_bits_of_its_steps(
    n_out: int, n_tokens: int, n_threads: int
) -> None:
    rng = np.random.default_rng(31)
    n_in = workspace.PANEL + 128
    gate = random_matrix(rng, "int4", n_out, n_in, 64, IQ4_NL_LEVELS)
    matrices = [gate, random_matrix(rng, "int8_planes", n_out, n_in, 128)]
    x = (rng.standard_normal((n_tokens, n_in)) / 1000).astype(np.float32)
    y = multiply(matrices, x)
    gated = np.empty((n_tokens, n_out), np.float32)
    from_python(layers.geglu)(*(half.copy().ravel() for half in np.split(y, 2, 1)), gated.ravel())
    assert (np.abs(y[:, :n_out]) < 3).mean() > 0.1, "where gelu is no straight line"
    expected = Padded(gated).blocks

    h, result = Padded(x), Padded(np.zeros_like(gated))
    result.blocks[:] = 99
    n_bytes = workspace.scratch_bytes(n_tokens)
    panels = np.full((n_threads, n_bytes + 64 * BEYOND), 99, np.uint8)
    codebooks = np.empty((2, 16), np.uint8)
    table, counters = addresses(matrices, codebooks), workspace.counters(1)
    on_threads(
        n_threads,
        lambda thread: run_matmul_gated(
            counters, thread, n_threads, table, h.inputs, result.inputs, panels[:, :n_bytes]
        ),
    )
    np.testing.assert_array_equal(result.blocks, expected)
    assert (panels[:, n_bytes:] == 99).all()


def test_weights_are_only_read(tmp_path: Path) -> None:
    """Tiles in a file that is mapped for reading: a write to them would be a segmentation fault."""
    rng = np.random.default_rng(8)
    x = random_inputs(rng, TOKENS + 1, 256)
    for i, m in enumerate(side_by_side(rng, 256)):
        path = tmp_path / f"{i}.bin"
        m.tiles.tofile(path)
        mapped = np.memmap(path, np.uint8, "r", shape=m.tiles.shape)
        copy = twins.Matrix(
            m.format, m.group_size, m.codebook, m.levels, m.scales, m.weights, mapped
        )
        np.testing.assert_array_equal(multiply([copy], x), multiply([m], x))


@every_kind
def test_tiles_have_the_size_that_packing_gives_them(
    fmt: str, group_size: int, codebook: tuple[int, ...]
) -> None:
    m = random_matrix(np.random.default_rng(9), fmt, 16, 256, group_size, codebook)
    table = addresses([m], np.empty((1, 16), np.uint8))
    assert from_python(matrix.tile_bytes)(table[0]) == packing.tile_bytes(fmt, 256, group_size)


@njit
def embed_all(table, factor, x):
    for token in range(len(x)):
        embed(table, token, factor, x[token])


# The head, plane by plane.


@njit(nogil=True)
def run_head(counters, thread, n_threads, *args):
    head.largest_logits(counters, 0, thread, n_threads, *args)


@njit
def run_rank(counters, matrix, n_planes, remainders, vocab_size, h, scratch):
    head._prepare(counters, 0, 1, 0, h, remainders, scratch)
    head._rank(counters, 1, matmul.ITEMS, 0, 1, matrix, n_planes, vocab_size, h, scratch)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("n_best", [1, head.FROM_ONE_PLANE, 40])
def test_the_largest_logits_are_those_of_the_whole_head(n_best: int, group_size: int) -> None:
    rng = np.random.default_rng(24)
    vocab_size, n_in, cap = 16 * packing.SLAB_TILES + 330, 384, 30.0
    weights = rng.standard_normal((vocab_size, n_in), np.float32)
    m = twins.coded("int8_planes", *round_int8(weights, group_size))
    x = rng.standard_normal((1, n_in)).astype(np.float32)
    [whole] = multiply([m], x)
    from_python(layers.soft_cap)(whole, cap)
    table, h = addresses([m], np.empty((1, 16), np.uint8)), Padded(x).inputs
    scratch = workspace.allocate_head(n_in, len(m.tiles))
    for array in scratch:
        array[:] = -1
    logits = np.full(m.n_columns, np.nan, np.float32)
    counters = workspace.counters(workspace.HEAD_STAGES)
    remainders = packing.remainders(m.tiles, n_in)
    args = (table[0], remainders, vocab_size, h, n_best, cap, scratch, logits)
    on_threads(2, lambda thread: run_head(counters, thread, 2, *args))
    known = np.isfinite(logits)
    np.testing.assert_array_equal(logits[known], whole[known])
    assert np.isneginf(logits[~known]).all()
    best = np.argsort(-whole[:vocab_size], kind="stable")[:n_best]
    assert np.isfinite(logits[best]).all()
    # Of 85 tiles of normal logits, with an estimate's error a fourteenth of their spread (a high
    # nibble's step against int8's largest weight): most tiles cannot hold the largest, and few more
    # are looked at than those that come first.
    assert n_best > 1 or known.mean() < (head.AT_LEAST + 4) / 85


@pytest.mark.parametrize("kind", ["one is large", "sixteen levels", "three levels", "few bits"])
@pytest.mark.parametrize("n_planes", [1, 2, 3])
def test_bounds_hold_for_codes_that_are_not_spread_evenly(n_planes: int, kind: str) -> None:
    rng = np.random.default_rng(25)
    shape = 320, 256
    large = np.where(np.arange(256) % 32, rng.normal(0, 3, shape), rng.choice([-127, 127], shape))
    codes = {
        "one is large": large,
        "sixteen levels": 16 * rng.integers(-8, 8, shape),
        "three levels": 127 * rng.integers(-1, 2, shape),
        "few bits": rng.integers(-8, 8, shape),
    }[kind].astype(np.int8)
    scales = rng.uniform(0.5, 1, (320, 8)).astype(np.float16)
    m = twins.coded("int8_planes", codes, scales)
    scratch, table = (
        workspace.allocate_head(256, len(m.tiles)),
        addresses([m], np.empty((1, 16), np.uint8)),
    )
    for _ in range(3):
        x = rng.standard_normal((1, 256)).astype(np.float32)
        [whole] = multiply([m], x)
        h, remainders = Padded(x).inputs, packing.remainders(m.tiles, 256)
        run_rank(workspace.counters(2), table[0], n_planes, remainders, 320, h, scratch)
        largest = whole.reshape(-1, 16).max(-1)
        assert (scratch.lower <= largest).all()
        assert (scratch.upper >= largest).all()


@every_kind
def test_embeddings_are_the_unpacked_rows(
    fmt: str, group_size: int, codebook: tuple[int, ...]
) -> None:
    m = random_matrix(np.random.default_rng(10), fmt, 40, 256, group_size, codebook)
    codebooks = np.empty((1, 16), np.uint8)
    table = addresses([m], codebooks)
    x = np.empty((40, 256), np.float32)
    embed_all(table[0], np.float32(np.sqrt(256 + 1)), x)
    np.testing.assert_array_equal(x, m.weights * np.float32(np.sqrt(256 + 1)))


def test_rounded_weights_multiply_like_the_weights() -> None:
    """From float rows through quantize to y: 4 and 8 bits err as much as their steps allow."""
    rng = np.random.default_rng(11)
    rows = rng.standard_normal((32, 1024)).astype(np.float32)
    x = rng.standard_normal((3, 1024)).astype(np.float32)
    for fmt, rounded, limit in (
        ("int4", round_int4, 0.12),
        ("int4_dq", partial(round_int4, double=True), 0.12),
        ("int8", round_int8, 0.012),
    ):
        m = twins.coded(fmt, *rounded(rows, 32))
        error = np.std(multiply([m], x) - x @ rows.T) / np.std(x @ rows.T)
        # A step of Q4_0 is the largest of 32 normal values, 2.1 sigma and more, / 8, and an error
        # 1 / sqrt(12) of a step; int8's 1 / 127, twice: weights and inputs.
        assert limit / 4 < error < limit


# Attention.


# Layers.


@njit
def exp_all(x, y):
    for i in range(0, 4 * x.size, 64):
        address = vector.address_of(x) + i
        vector.store_f32(vector.address_of(y) + i, vector.exp(vector.load_f32(address)))


def test_exp_over_its_whole_range() -> None:
    x = np.linspace(-87, 88, 1 << 20, dtype=np.float32)
    y = np.empty_like(x)
    exp_all(x, y)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(y / exact - 1).max() < 2e-7


def test_exp_beyond_its_range() -> None:
    x = np.repeat(np.array([-np.inf, -1e30, -87.01, 0, -0.0, 88, 1e30, np.inf], np.float32), 16)
    y = np.empty_like(x)
    exp_all(x, y)
    np.testing.assert_array_equal(y[:80:16], [0, 0, 0, 1, 1])
    np.testing.assert_allclose(y[80::16], np.exp(88.0), rtol=2e-7)


@njit
def run_rms_norm(x, weight, eps, y):
    layers.rms_norm(x, vector.address_of(weight), eps, y)


@pytest.mark.parametrize("n", [16, 48, 640, 2304])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e15])
def test_rms_norm(n: int, size: float) -> None:
    rng = np.random.default_rng(16)
    x = (size * rng.standard_normal(n)).astype(np.float32)
    weight = rng.standard_normal(n).astype(np.float32)
    exact = x / np.sqrt(np.mean(x.astype(np.float64) ** 2) + 1e-6) * weight
    y = np.empty_like(x)
    run_rms_norm(x, weight, 1e-6, y)
    # 16 sums of n / 16 squares, all positive, halved in effect by the root; three more roundings.
    np.testing.assert_allclose(y, exact, rtol=(n / 32 + 8) * twins.EPSILON)
    run_rms_norm(x, weight, 1e-6, x)
    np.testing.assert_array_equal(x, y)


def test_rms_norm_of_zeros() -> None:
    x = np.zeros(32, np.float32)
    run_rms_norm(x, np.ones(32, np.float32), 1e-6, x)
    np.testing.assert_array_equal(x, 0)


def test_rms_norm_of_squares_that_overflow() -> None:
    x = np.ones(32, np.float32)
    x[3] = 1e20
    run_rms_norm(x, np.ones(32, np.float32), 1e-6, x)
    assert np.isnan(x).all()  # not zeros, which nobody would notice


def test_add() -> None:
    x, y = np.random.default_rng(17).standard_normal((2, 48)).astype(np.float32)
    total = x + y
    from_python(layers.add)(x, y)
    np.testing.assert_array_equal(x, total)


@pytest.mark.parametrize(("base", "scale"), [(10000.0, 1.0), (1e6, 8.0)])
@pytest.mark.parametrize("position", [0, 1, 511, 131071])
def test_rotary_angles(position: int, base: float, scale: float) -> None:
    cos, sin = np.empty((2, 128), np.float32)
    frequencies = model.rotary_frequencies(256, base, scale)
    from_python(layers.rotary_angles)(position, frequencies, cos, sin)
    angles = position / scale * base ** (-np.arange(128) / 128)
    # Computed in float64 and rounded once, by 2^-25 at most; 131,072 radians cost 1e-11 besides.
    np.testing.assert_allclose(cos, np.cos(angles), rtol=0, atol=2.0**-25 + 1e-10)
    np.testing.assert_allclose(sin, np.sin(angles), rtol=0, atol=2.0**-25 + 1e-10)


def test_rotate_turns_pairs_of_the_halves() -> None:
    rng = np.random.default_rng(18)
    x = rng.standard_normal(64).astype(np.float32)
    angles = rng.uniform(-np.pi, np.pi, 32)
    turned = (x[:32] + 1j * x[32:]) * np.exp(1j * angles) * 0.25
    from_python(layers.rotate)(
        x, np.cos(angles).astype("f4"), np.sin(angles).astype("f4"), np.float32(0.25)
    )
    # Two products, of a rounded cosine and sine each, and their sum: values up to 4 x 0.25.
    np.testing.assert_allclose(x[:32], turned.real, rtol=0, atol=6 * twins.EPSILON)
    np.testing.assert_allclose(x[32:], turned.imag, rtol=0, atol=6 * twins.EPSILON)


def test_geglu() -> None:
    gate = np.linspace(-30, 30, 1 << 14, dtype=np.float32)
    gate[:4] = -1e30, 1e30, -1e18, 1e18
    up = np.random.default_rng(19).standard_normal(gate.size).astype(np.float32)
    y = np.empty_like(gate)
    from_python(layers.geglu)(gate, up, y)
    g = gate.astype(np.float64)
    u = np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)
    gelu = g / (1 + np.exp(np.clip(-2 * u, -700, 700)))  # = g / 2 (1 + tanh(u))
    # exp's argument -2 u errs by 4 roundings of itself, an error relative to exp(-2 u). Beyond
    # e^88 exp stays what it is there: what should be less is gate / e^88.
    relative = (8 * np.minimum(np.abs(u), 44) + 8) * twins.EPSILON + 2e-7
    error = relative * np.abs(gelu) + np.abs(g) * 7e-39
    assert (np.abs(y - gelu * up) <= error * np.abs(up)).all()


def test_soft_cap() -> None:
    x = np.linspace(-400, 400, 1 << 14, dtype=np.float32)
    x[:3] = -1e30, 1e30, 0
    capped = x.copy()
    from_python(layers.soft_cap)(capped, 30.0)
    exact = 30 * np.tanh(x.astype(np.float64) / 30)
    # 1 - 2 / (exp + 1) is a difference of numbers up to 2: relative to the cap, not to the result.
    np.testing.assert_allclose(capped, exact, rtol=0, atol=30 * 8 * twins.EPSILON)
    assert np.abs(capped).max() <= 30


# Loading and storing.


@njit
def load_all(load_f16, load_bf16, source, target):
    for i in range(0, source.size, 16):
        address = vector.address_of(source) + 2 * i
        y = vector.address_of(target) + 4 * i
        if load_f16:
            vector.store_f32(y, vector.load_f16(address))
        elif load_bf16:
            vector.store_f32(y, vector.load_bf16(address))


ALL_BITS = np.arange(1 << 16, dtype=np.uint16)
FINITE_HALVES = ALL_BITS[(ALL_BITS & 0x7C00) != 0x7C00]


def test_every_float16_is_loaded() -> None:
    y = np.empty(FINITE_HALVES.size, np.float32)
    load_all(True, False, FINITE_HALVES, y)
    expected = FINITE_HALVES.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(y.view(np.uint32), expected.view(np.uint32))


def test_infinities_stay_infinite_and_no_numbers_none() -> None:
    halves = np.array([0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF, 0x7BFF, 0xFBFF, 1] * 2, np.uint16)
    x = np.empty(16, np.float32)
    load_all(True, False, halves, x)
    np.testing.assert_array_equal(x, halves.view(np.float16).astype(np.float32))


def test_every_bfloat16_is_loaded() -> None:
    y = np.empty(ALL_BITS.size, np.float32)
    load_all(False, True, ALL_BITS, y)
    np.testing.assert_array_equal(y.view(np.uint32), ALL_BITS.astype(np.uint32) << 16)


# Threads.


@team.stage
def count(item, thread, hits):
    hits[item] += 1


PRIME, STEPS = 65537, 3000


@team.stage
def spread(item, thread, source, target):
    """Reads what another thread may have written in the stage before; the first item is slow."""
    value = source[(item * 7 + 3) % source.size]
    if item == 0:
        for _ in range(STEPS):
            value = value * 5 % PRIME
    target[item] = (value + item) % PRIME


@njit(nogil=True)
def run_count(counters, row, n_items, thread, hits):
    count(counters, row, n_items, thread, hits)


@njit(nogil=True)
def run_spread(counters, thread, values):
    for row in range(len(values) - 1):
        source, target = values[row], values[row + 1]
        spread(counters, row, source.size, thread, source, target)


@pytest.mark.parametrize("n_threads", [1, 2, 16])
def test_a_stage_does_every_item_once(n_threads: int) -> None:
    counters, hits = workspace.counters(1), np.zeros(10_000, np.int64)
    on_threads(n_threads, lambda thread: run_count(counters, 0, 10_000, thread, hits))
    assert (hits == 1).all()


def test_a_stage_does_not_wait_for_a_thread_that_is_late() -> None:
    counters, hits = workspace.counters(1), np.zeros(1000, np.int64)
    run_count(counters, 0, 1000, 0, hits)  # returns, though thread 1 has not come
    assert (hits == 1).all()
    run_count(counters, 0, 1000, 1, hits)
    assert (hits == 1).all()


def test_a_stage_without_items() -> None:
    counters, hits = workspace.counters(2), np.zeros(10, np.int64)

    def work(thread: int) -> None:
        run_count(counters, 0, 0, thread, hits)
        run_count(counters, 1, 10, thread, hits)

    on_threads(4, work)
    assert (hits == 1).all()


def test_stages_see_what_the_stages_before_have_written() -> None:
    """Hundreds of stages of small items, also with a thread that comes when others are ahead."""
    n_stages, width = 300, 37
    items = np.arange(width)
    expected = np.zeros((n_stages + 1, width), np.int64)
    expected[0] = items
    for row in range(n_stages):
        values = expected[row, (items * 7 + 3) % width]
        values[0] = values[0] * pow(5, STEPS, PRIME) % PRIME
        expected[row + 1] = (values + items) % PRIME
    for late in (0.0, 0.001):
        values = np.zeros_like(expected)
        values[0] = expected[0]
        counters = workspace.counters(n_stages)

        def work(
            thread: int, late: float = late, counters: Any = counters, values: Any = values
        ) -> None:
            time.sleep(late * thread)
            run_spread(counters, thread, values)

        on_threads(4, work)
        np.testing.assert_array_equal(values, expected)
