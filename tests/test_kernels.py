"""Every kernel against its twin in plain NumPy (`twins.py`).

`test_isa.py` runs this file again for the other instruction sets that the machine has.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    attention,
    attention_amx,
    head,
    inputs,
    isa,
    kv_cache,
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
from gemma_cli.runtime.tables import Shape
from gemma_cli.runtime.workspace import BLOCK, FEW, TOKENS, Inputs
from quantize import packing
from quantize.grouping import round_int4, round_int8
from quantize.packing import IQ4_NL_LEVELS, LINEAR_LEVELS

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
        row = (m.tiles.ctypes.data, fmt, len(m.tiles), m.n_in, m.group_size, levels.ctypes.data)
        rows.append(row)
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
    low, high, dtype = (0, 16, np.uint8) if fmt == "int4" else (-128, 128, np.int8)
    codes = rng.integers(low, high, (n_out, n_in), dtype)
    scales = rng.standard_normal((n_out, n_in // group_size)).astype(np.float16)
    scales[rng.random(scales.shape) < 0.1] = 0
    scales[rng.random(scales.shape) < 0.1] = np.float16(2.0**-24)  # the smallest subnormal
    return twins.coded(fmt, codes, scales, codebook)


KINDS = [
    *(("int4", group, LINEAR_LEVELS) for group in GROUP_SIZES),
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


# Matrix products.


@pytest.mark.parametrize("n_tokens", [TOKENS + 3, FEW + 3])
@every_integer_kind
def test_integer_products_are_exact(
    fmt: str, group_size: int, codebook: tuple[int, ...], n_tokens: int
) -> None:
    """With scales of 1, and sums below 2^24, float32 is exact: so y is the integer product."""
    rng = np.random.default_rng(3)
    n_in, lowest, highest = 256, *((0, 15) if fmt == "int4" else (-128, 127))
    dtype = np.uint8 if fmt == "int4" else np.int8
    codes = rng.integers(lowest, highest + 1, (48, n_in), dtype)
    codes[0], codes[1] = lowest, highest
    codes[2, ::2], codes[2, 1::2] = lowest, highest
    codes[3, :16], codes[3, 16:] = highest, lowest
    m = twins.coded(fmt, codes, np.ones((48, n_in // group_size), np.float16), codebook)
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
    [("int4", IQ4_NL_LEVELS), *((f, LINEAR_LEVELS) for f in ("int8", "int8_planes", "bf16"))],
)
def test_products_of_many_tokens(fmt: str, codebook: tuple[int, ...], n_tokens: int) -> None:
    """Any number of them, and several panels' inputs; the last of which may be small."""
    rng = np.random.default_rng(27)
    for n_in, group_size in ((32, 32), (640, 128)):
        m = random_matrix(rng, fmt, 90, n_in, group_size, codebook)
        x = random_inputs(rng, n_tokens, n_in)
        assert_close(multiply([m], x, 2), m, x)


@pytest.mark.parametrize("fmt", ["int4", "int8", "int8_planes"])
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


# The head in two passes.


@njit(nogil=True)
def run_head(counters, thread, n_threads, matrices, vocab_size, h, n_best, cap, scratch, logits):
    items = matmul.ITEMS * n_threads
    head.prepare(counters, 0, 1, thread, h, scratch)
    head.rank(counters, 1, items, thread, matrices, vocab_size, h, scratch, n_threads)
    head.choose(counters, 2, 1, thread, n_best, scratch)
    head.refine_chosen(counters, 3, n_best, thread, matrices, h, scratch, cap, logits)
    head.refine(counters, 4, items, thread, matrices, n_best, h, scratch, cap, logits, n_threads)


@njit
def run_rank(counters, matrices, vocab_size, h, scratch):
    head.prepare(counters, 0, 1, 0, h, scratch)
    head.rank(counters, 1, matmul.ITEMS, 0, matrices, vocab_size, h, scratch, 1)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("n_best", [1, 40])
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
    counters = workspace.counters(5)
    on_threads(
        2,
        lambda thread: run_head(
            counters, thread, 2, table, vocab_size, h, n_best, cap, scratch, logits
        ),
    )
    known = np.isfinite(logits)
    np.testing.assert_array_equal(logits[known], whole[known])
    assert np.isneginf(logits[~known]).all()
    best = np.argsort(-whole[:vocab_size], kind="stable")[:n_best]
    assert np.isfinite(logits[best]).all()
    # Of 85 tiles of normal logits, with an estimate's error a fourteenth of their spread (a high
    # nibble's step against int8's largest weight): most tiles cannot hold the largest. One that may
    # is found before it is known how few others may.
    assert n_best > 1 or known.mean() < 0.1


def test_bounds_hold_for_weights_that_the_high_nibbles_do_not_show() -> None:
    """Groups with one large weight: the others' high nibbles are the middle ones."""
    rng = np.random.default_rng(25)
    weights = rng.standard_normal((320, 256), np.float32) / 50
    weights[:, ::32] = rng.choice([-1, 1], (320, 8))
    m = twins.coded("int8_planes", *round_int8(weights, 32))
    scratch, table = (
        workspace.allocate_head(256, len(m.tiles)),
        addresses([m], np.empty((1, 16), np.uint8)),
    )
    for _ in range(3):
        x = rng.standard_normal((1, 256)).astype(np.float32)
        [whole] = multiply([m], x)
        run_rank(workspace.counters(2), table, 320, Padded(x).inputs, scratch)
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
    for fmt, rounded, limit in (("int4", round_int4, 0.12), ("int8", round_int8, 0.012)):
        m = twins.coded(fmt, *rounded(rows, 32))
        error = np.std(multiply([m], x) - x @ rows.T) / np.std(x @ rows.T)
        # A step of Q4_0 is the largest of 32 normal values, 2.1 sigma and more, / 8, and an error
        # 1 / sqrt(12) of a step; int8's 1 / 127, twice: weights and inputs.
        assert limit / 4 < error < limit


# Attention.


@njit
def store_tokens(k, v, position, table, is_int8):
    for t in range(len(k)):
        slot = (position + t) % table[kv_cache.CAPACITY]
        for h in range(k.shape[1]):
            attention.store_head(k[t, h], v[t, h], table, h, slot, is_int8)


@team.stage
def merge(t, thread, starts, positions, s, window, scratch, out):
    attention.merge_spans(t, starts, positions, s, window, scratch, thread, out[t])


@njit(nogil=True)
def run_spans(counters, thread, q, starts, positions, caches, s, window, is_int8, scratch, out):
    items = attention.n_span_items(starts, positions, s, window)
    attention.attend_spans(
        counters, 0, items, thread, q, starts, positions, caches, 0, s, window, is_int8, scratch
    )
    merge(counters, 1, len(out), thread, starts, positions, s, window, scratch, out)


@njit(nogil=True)
def run_rows(counters, thread, q, starts, positions, caches, s, window, is_int8, scratch, out):
    items = attention.n_row_items(starts, s, True)
    run = starts, positions, caches, 0, s, window, is_int8, True
    attention.attend_rows(counters, 0, items, thread, q, *run, (scratch,), out)


@njit(nogil=True)
def run_rows_amx(counters, thread, q, starts, positions, caches, s, window, is_int8, scratch, out):
    items = attention_amx.n_row_items(starts, s, False)
    run = starts, positions, caches, 0, s, window, is_int8, False
    attention_amx.attend_rows(counters, 0, items, thread, q, *run, scratch, out)


class Cache:
    """One layer's keys and values; slots that nothing was written to hold NaN as float16."""

    def __init__(self, kind: str, capacity: int, n_kv_heads: int, head_dim: int) -> None:
        self.is_int8 = kind == "int8"
        capacity = -(-capacity // kv_cache.BLOCK) * kv_cache.BLOCK
        tiles = n_kv_heads, capacity // kv_cache.BLOCK, head_dim, kv_cache.BLOCK
        dtype, nothing = (np.int8, 99) if self.is_int8 else (np.float16, np.nan)
        self.keys = np.full(tiles, nothing, dtype)
        self.values = np.full((n_kv_heads, capacity, head_dim), nothing, dtype)
        self.scales = np.full((2, n_kv_heads, capacity), np.nan, np.float32)
        self.table = np.array(
            [
                self.keys.ctypes.data,
                self.values.ctypes.data,
                self.scales[0].ctypes.data,
                self.scales[1].ctypes.data,
                capacity,
            ],
            np.int64,
        )

    def store(self, k: Float32, v: Float32, position: int) -> None:
        store_tokens(k, v, position, self.table, self.is_int8)

    def codes(self) -> NDArray[Any]:
        """Keys and values (2, capacity, n_kv_heads, head_dim) as they lie in the cache."""
        keys = self.keys.transpose(1, 3, 0, 2).reshape(-1, len(self.keys), self.keys.shape[2])
        return np.stack([keys, self.values.transpose(1, 0, 2)])

    def stored(self) -> NDArray[np.float64]:
        """The same as numbers."""
        codes = self.codes().astype(np.float64)
        scales = self.scales.transpose(0, 2, 1)[..., None].astype(np.float64)
        return codes * scales if self.is_int8 else codes


def shape(n_heads: int, n_kv_heads: int, cap: float, head_dim: int = 0) -> Shape:
    return Shape(0, 0, 0, 0, n_heads, n_kv_heads, head_dim, 0, 0.0, 0.0, cap, 0.0)


def grouped(q: Float32, n_kv_heads: int) -> Float32:
    """Queries (n, n_heads, head_dim) as attention takes them, with rows to spare of NaN."""
    n, n_heads, head_dim = q.shape
    flat = np.full((n * n_heads + workspace.ROWS) * head_dim, np.nan, np.float32)
    rows = flat[: q.size].reshape(n_kv_heads, n * (n_heads // n_kv_heads), head_dim)
    rows[:] = q.reshape(n, n_kv_heads, -1, head_dim).transpose(1, 0, 2, 3).reshape(rows.shape)
    return rows


def attend_all(
    cache: Cache,
    q: Float32,
    k: Float32,
    v: Float32,
    window: int,
    cap: float,
    chunk: int,
    n_threads: int,
    amx: bool = False,
) -> Float32:
    """Attention of all tokens, a chunk at a time: (n, n_heads, head_dim)."""
    n_heads, n_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    s = shape(n_heads, n_kv_heads, cap, head_dim)
    out = np.full((len(q), q[0].size), np.nan, np.float32)
    partials = workspace.count_partials(n_heads, n_kv_heads, min(chunk, FEW), len(q))
    scratch: Any = workspace.allocate_attention(n_threads, head_dim, partials)
    own = workspace.allocate_amx_attention(n_threads, head_dim)
    for array in (*scratch, *own):
        array.view(np.uint8)[:] = 255  # NaN
    if amx:
        scratch = scratch, own
    for start in range(0, len(q), chunk):
        part = slice(start, start + chunk)
        cache.store(k[part], v[part], start)
        counters, rows = workspace.counters(2), grouped(q[part], n_kv_heads)

        def work(
            thread: int,
            counters: Any = counters,
            rows: Float32 = rows,
            part: slice = part,
            start: int = start,
        ) -> None:
            starts, positions = np.array([0, len(q[part])]), np.array([start])
            which = starts, positions, cache.table[None, None]
            run = run_spans if chunk <= FEW else run_rows_amx if amx else run_rows
            run(counters, thread, rows, *which, s, window, cache.is_int8, scratch, out[part])

        on_threads(n_threads, work)
    return out.reshape(q.shape)


def random_heads(
    rng: np.random.Generator, n: int, n_heads: int, n_kv_heads: int, head_dim: int
) -> tuple[Float32, Float32, Float32]:
    """Queries, keys and values whose scores are sharp: a deviation of 3."""
    q = 3 / np.sqrt(head_dim) * rng.standard_normal((n, n_heads, head_dim))
    k, v = rng.standard_normal((2, n, n_kv_heads, head_dim)).astype(np.float32)
    return q.astype(np.float32), k, v


HEADS = [(4, 1, 32), (6, 2, 64), (5, 5, 16), (9, 3, 32), (1, 1, 256)]
WINDOWS = [(0, 0.0), (1, 0.0), (7, 0.0), (40, 2.0), (200, 0.0), (0, 2.0)]


@pytest.mark.parametrize("kind", ["f16", "int8"])
@pytest.mark.parametrize(("window", "cap"), WINDOWS)
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), HEADS)
def test_attention_is_the_twins(
    n_heads: int, n_kv_heads: int, head_dim: int, window: int, cap: float, kind: str
) -> None:
    """One token at a time and in chunks, on several threads, in rings that wrap around."""
    n = 75
    rng = np.random.default_rng(12)
    q, k, v = random_heads(rng, n, n_heads, n_kv_heads, head_dim)
    whole = Cache(kind, n, n_kv_heads, head_dim)
    one_by_one = attend_all(whole, q, k, v, window, cap, chunk=1, n_threads=1)
    keys, values = whole.stored()[:, :n]
    expected, magnitudes = twins.attention(q.astype(np.float64), keys, values, window, cap)
    # A score errs by head_dim roundings of its magnitudes (see assert_close), by another of the
    # cache's scale, by 4 of the cap where there is one; that and exp's 2e-7 are relative errors of
    # a weight, once above and once below the fraction. The sums over n positions err by n more.
    score_error = ((head_dim + 2) * magnitudes + 4 * cap) * twins.EPSILON
    relative = 2 * (score_error + 2e-7 + (n + 2) * twins.EPSILON)
    error = np.abs(one_by_one - expected).max(-1)
    assert (error <= relative * np.abs(values).max()).all()
    for chunk, n_threads in ((1, 4), (5, 1), (33, 2), (n, 3)):
        capacity = min(n, window + chunk) if window else n
        cache = Cache(kind, capacity, n_kv_heads, head_dim)
        out = attend_all(cache, q, k, v, window, cap, chunk, n_threads)
        np.testing.assert_array_equal(out, one_by_one)


@pytest.mark.parametrize("kind", ["f16", "int8"])
@pytest.mark.parametrize("window", [0, 300])
def test_attention_over_several_spans(window: int, kind: str) -> None:
    n, n_heads, n_kv_heads, head_dim = 2 * workspace.SPAN + 60, 4, 2, 16
    rng = np.random.default_rng(21)
    q, k, v = random_heads(rng, n, n_heads, n_kv_heads, head_dim)
    whole = Cache(kind, n, n_kv_heads, head_dim)
    one_by_one = attend_all(whole, q, k, v, window, 0.0, chunk=1, n_threads=2)
    keys, values = whole.stored()[:, :n]
    expected, magnitudes = twins.attention(q.astype(np.float64), keys, values, window, 0.0)
    # As above; merging partial results takes some more roundings for each span.
    relative = 2 * (((head_dim + 2) * magnitudes + n + 20) * twins.EPSILON + 2e-7)
    error = np.abs(one_by_one - expected).max(-1)
    assert (error <= relative * np.abs(values).max()).all()
    for chunk in (7, FEW, 70, n):
        capacity = min(n, window + chunk) if window else n
        cache = Cache(kind, capacity, n_kv_heads, head_dim)
        out = attend_all(cache, q, k, v, window, 0.0, chunk, n_threads=2)
        np.testing.assert_array_equal(out, one_by_one)


@pytest.mark.skipif(not isa.AMX, reason="of AMX")
@pytest.mark.parametrize("kind", ["f16", "int8"])
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (1, 0.0), (40, 2.0), (300, 0.0)])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), [(6, 2, 64), (4, 1, 32)])
def test_attention_by_amx_is_the_twins(
    n_heads: int, n_kv_heads: int, head_dim: int, window: int, cap: float, kind: str
) -> None:
    """The same however many tokens go at once, over several spans, in rings that wrap around."""
    n = workspace.SPAN + 75
    rng = np.random.default_rng(28)
    q, k, v = random_heads(rng, n, n_heads, n_kv_heads, head_dim)
    whole = Cache(kind, n, n_kv_heads, head_dim)
    at_once = attend_all(whole, q, k, v, window, cap, n, n_threads=2, amx=True)
    heads = whole.codes()[:, :n].astype(np.float32)
    keys, values = twins.bfloat16(heads)  # which int8 codes are already
    if kind == "int8":
        key_scales, value_scales = whole.scales[:, :, :n, None].transpose(0, 2, 1, 3)
        keys, values = keys * key_scales, values * value_scales
    expected, magnitudes = twins.attention(twins.bfloat16(q), keys, values, window, cap)
    # As in test_attention_is_the_twins, and a weight is rounded to bfloat16 before it is used.
    score_error = ((head_dim + 2) * magnitudes + 4 * cap) * twins.EPSILON
    relative = 2 * (score_error + 2e-7 + (n + 20) * twins.EPSILON) + 2.0**-8
    error = np.abs(at_once - expected).max(-1)
    assert (error <= relative * np.abs(values).max()).all()
    for chunk, n_threads in ((17, 1), (150, 4)):
        capacity = min(n, window + chunk) if window else n
        cache = Cache(kind, capacity, n_kv_heads, head_dim)
        out = attend_all(cache, q, k, v, window, cap, chunk, n_threads, amx=True)
        n_many = n // chunk * chunk  # A rest may be FEW tokens.
        np.testing.assert_array_equal(out[:n_many], at_once[:n_many])


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (6, 1, 9), (3, 40, 1, 17)])
def test_attention_of_several_sequences(lengths: tuple[int, ...], window: int) -> None:
    """Tokens at different depths, few and many, as those of each alone."""
    rng = np.random.default_rng(22)
    n_heads, n_kv_heads, head_dim, context = 6, 2, 32, 720
    starts, positions = np.cumsum([0, *lengths]), np.array([5, 680, 300, 0])[: len(lengths)]
    n = starts[-1]
    queries, k, v = random_heads(rng, context, n_heads, n_kv_heads, head_dim)
    queries = queries[:n]
    caches = [Cache("f16", context, n_kv_heads, head_dim) for _ in lengths]
    for cache, position, length in zip(caches, positions, lengths, strict=True):
        cache.store(np.roll(k, position, 0)[: position + length], v[: position + length], 0)
    tables = np.stack([cache.table[None] for cache in caches])
    s = shape(n_heads, n_kv_heads, 0.0, head_dim)
    partials = workspace.count_partials(n_heads, n_kv_heads, min(n, FEW), context)
    scratch: Any = workspace.allocate_attention(1, head_dim, partials)
    amx = workspace.allocate_amx_attention(1, head_dim)

    def attend(some: slice) -> Float32:
        """The sequences' outputs, by the kernel that takes so many tokens as all have."""
        own = starts[some.start : some.stop + 1]
        tokens, first = slice(own[0], own[-1]), own - own[0]
        out = np.full((first[-1], n_heads * head_dim), np.nan, np.float32)
        run, memory = run_spans, scratch
        if n > FEW:
            run, memory = (run_rows_amx, (scratch, amx)) if isa.AMX else (run_rows, scratch)
        which = grouped(queries[tokens], n_kv_heads), first, positions[some], tables[some]
        run(workspace.counters(2), 0, *which, s, window, False, memory, out)
        return out

    together = attend(slice(0, len(lengths)))
    alone = [attend(slice(i, i + 1)) for i in range(len(lengths))]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    assert np.isfinite(together).all()


def test_attention_with_scores_far_apart() -> None:
    """The running maximum climbs, and falls back, by more than exp can express."""
    q, k, v = random_heads(np.random.default_rng(13), 100, 2, 1, 32)
    q *= 100
    cache = Cache("f16", 100, 1, 32)
    out = attend_all(cache, q, k, v, 0, 0.0, chunk=100, n_threads=2)
    keys, values = cache.stored()[:, :100]
    expected, magnitudes = twins.attention(q.astype(np.float64), keys, values, 0, 0.0)
    error = np.abs(out - expected).max(-1)
    relative = 2 * (34 * twins.EPSILON * magnitudes + 2e-7 + 102 * twins.EPSILON)
    assert (error <= relative * np.abs(values).max()).all()


def test_cached_heads_are_rounded_as_the_twin_rounds_them() -> None:
    rng = np.random.default_rng(14)
    k, v = (rng.standard_normal((2, 10, 3, 64)) * rng.lognormal(0, 2, (2, 10, 3, 1))).astype("f4")
    k[0, 0] = 0
    k[0, 1] = 1e-40
    half = Cache("f16", 10, 3, 64)
    half.store(k, v, 0)
    np.testing.assert_array_equal(half.codes()[:, :10], np.stack([k, v]).astype(np.float16))
    byte = Cache("int8", 10, 3, 64)
    byte.store(k, v, 0)
    heads = np.stack([k, v])
    largest = np.abs(heads).max(-1)
    np.testing.assert_array_equal(
        byte.scales[..., :10].transpose(0, 2, 1), largest / np.float32(127)
    )
    some = largest > np.float32(1e-30)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=some)
    np.testing.assert_array_equal(byte.codes()[:, :10], np.rint(heads * inverse[..., None]))


def test_keys_go_to_their_slot_of_the_ring() -> None:
    k, v = np.random.default_rng(15).standard_normal((2, 40, 2, 16)).astype(np.float32)
    cache = Cache("f16", 32, 2, 16)
    cache.store(k, v, 9)
    codes = cache.codes()
    for t in range(8, 40):
        np.testing.assert_array_equal(codes[0, (9 + t) % 32], k[t].astype(np.float16))
        np.testing.assert_array_equal(codes[1, (9 + t) % 32], v[t].astype(np.float16))


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


@njit
def store_halves(source, target):
    for i in range(0, source.size, 16):
        value = vector.load_f32(vector.address_of(source) + 4 * i)
        vector.store_f16(vector.address_of(target) + 2 * i, 2, value)


ALL_BITS = np.arange(1 << 16, dtype=np.uint16)
FINITE_HALVES = ALL_BITS[(ALL_BITS & 0x7C00) != 0x7C00]


def test_every_float16_is_loaded() -> None:
    y = np.empty(FINITE_HALVES.size, np.float32)
    load_all(True, False, FINITE_HALVES, y)
    expected = FINITE_HALVES.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(y.view(np.uint32), expected.view(np.uint32))


def test_infinities_stay_infinite_and_no_numbers_none() -> None:
    halves = np.array([0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF, 0x7BFF, 0xFBFF, 1] * 2, np.uint16)
    x, y = np.empty(16, np.float32), np.empty(16, np.uint16)
    load_all(True, False, halves, x)
    np.testing.assert_array_equal(x, halves.view(np.float16).astype(np.float32))
    store_halves(x, y)
    np.testing.assert_array_equal(y.view(np.float16), halves.view(np.float16))
    # 65,520 is in the midst of the largest float16 and what would follow it.
    large = np.float32([65519.99, 65520, 1e5, 3.4e38])
    x = np.tile(np.concatenate([large, -large]), 2)
    store_halves(x, y)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(y.view(np.float16), x.astype(np.float16))


def test_every_bfloat16_is_loaded() -> None:
    y = np.empty(ALL_BITS.size, np.float32)
    load_all(False, True, ALL_BITS, y)
    np.testing.assert_array_equal(y.view(np.uint32), ALL_BITS.astype(np.uint32) << 16)


def test_float16_is_stored_rounded_to_nearest_ties_to_even() -> None:
    """Every float16, every midpoint of two, and the float32 on both sides of it; subnormals too."""
    halves = np.sort(FINITE_HALVES.view(np.float16)[:0x7C00]).astype(np.float32)
    middle = (halves[:-1] + halves[1:]) / 2
    above, below = np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(0))
    positive = np.concatenate([halves, middle, above, below])
    x = np.concatenate([positive, -positive])
    x = np.resize(x, -(-x.size // 16) * 16)
    y = np.empty(x.size, np.uint16)
    store_halves(x, y)
    np.testing.assert_array_equal(y, x.astype(np.float16).view(np.uint16))


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
