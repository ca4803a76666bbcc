"""Whole kernels for `emulated.py`: a matrix product, and attention of many tokens.

As functions of two addresses, of a case and of its result, which holds what else they write to.
To be imported when `lowered.pretend_cpu` has been called, as the runtime is.
"""

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import reference
import twins
from llvmlite import binding as llvm
from llvmlite import ir
from numba import carray, types
from numba.core import codegen
from numba.extending import intrinsic
from numpy.typing import NDArray

from gemma_cli.runtime import amx, attention, inputs, matmul, tables, workspace
from gemma_cli.runtime.kernel import kernel
from gemma_cli.runtime.kv_cache import BLOCK, CAPACITY, KEY_SCALES, KEYS, VALUE_SCALES, VALUES
from gemma_cli.runtime.tables import Shape
from quantize.packing import (
    INT4_FORMATS,
    IQ4_NL_LEVELS,
    LINEAR_LEVELS,
    DoubleScales,
    Scales,
    scale_bytes,
)

Array = NDArray[Any]


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return b.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), codegen


@kernel
def _array(address, shape, dtype):
    return carray(_pointer(address), shape, dtype)


def _offsets(record: np.dtype[Any]) -> Any:
    """The offsets of a record's fields, by their names."""
    return namedtuple("Offsets", record.names)(*(record.fields[n][1] for n in record.names))


# The matrix product, of rounding its inputs, too.

N_IN, N_OUT, GROUP_SIZE = 256, 40, 64
COLUMNS = -(-N_OUT // 16) * 16
TOKEN_COUNTS = (1, workspace.TOKENS + 1, workspace.FEW + 3)
ROWS = max(TOKEN_COUNTS) + workspace.TOKENS  # with some to spare
PANEL_BYTES = workspace.scratch_bytes(ROWS)
BLOCKS = workspace.allocate_blocks(ROWS, N_IN, exact=False).shape

PRODUCT = np.dtype(
    [
        ("matrix", np.int64, tables.N_COLUMNS),
        ("n_tokens", np.int64),
        ("x", np.float32, (ROWS, N_IN)),
        ("codebook", np.uint8, 16),
        ("tiles", np.uint8, 4 * COLUMNS * N_IN),
    ],
    align=True,
)
PRODUCT_RESULT = np.dtype(
    [
        ("y", np.float32, (ROWS, COLUMNS)),
        ("counters", np.int64, (1, 16)),
        ("codes", np.int8, (ROWS, N_IN)),
        ("scales", np.float32, (ROWS, N_IN // 32)),
        ("offsets", np.int32, (ROWS, N_IN // 32)),
        ("blocks", np.uint16, BLOCKS),
        ("panel", np.uint8, PANEL_BYTES),
    ],
    align=True,
)
_IN, _OUT = _offsets(PRODUCT), _offsets(PRODUCT_RESULT)

_KINDS = (
    ("int4", tables.INT4, LINEAR_LEVELS),
    ("int4", tables.INT4_CODEBOOK, IQ4_NL_LEVELS),
    ("int4_dq", tables.INT4_CODEBOOK, IQ4_NL_LEVELS),
    ("int8", tables.INT8, LINEAR_LEVELS),
    ("int8_planes", tables.PLANES, LINEAR_LEVELS),
    ("bf16", tables.BF16, LINEAR_LEVELS),
    ("f32", tables.F32, LINEAR_LEVELS),
)


@kernel
def product(case, out):
    n = _array(case + _IN.n_tokens, (1,), np.int64)[0]
    matrices = _array(case + _IN.matrix, (1, tables.N_COLUMNS), np.int64)
    matrices[0, tables.ADDRESS] = case + _IN.tiles
    matrices[0, tables.CODEBOOK] = case + _IN.codebook
    h = workspace.Inputs(
        _array(case + _IN.x, (n, N_IN), np.float32),
        _array(out + _OUT.codes, (n, N_IN), np.int8),
        _array(out + _OUT.scales, (n, N_IN // 32), np.float32),
        _array(out + _OUT.offsets, (n, N_IN // 32), np.int32),
        _array(out + _OUT.blocks, BLOCKS, np.uint16),
    )
    for t in range(n):
        inputs.round_inputs(h, t, 0, N_IN)
    counters = _array(out + _OUT.counters, (1, 16), np.int64)
    counters[:] = 0
    y = _array(out + _OUT.y, (n, COLUMNS), np.float32)
    panels = _array(out + _OUT.panel, (1, PANEL_BYTES), np.uint8)
    matmul.matmul(counters, 0, matmul.ITEMS, 0, matrices, h, y, panels, 1)


def products() -> tuple[Array, Callable[[Array, Array], None]]:
    """Cases of every format and count of tokens, and the check of their results."""
    rng = np.random.default_rng(4)
    cases = np.zeros(len(_KINDS) * len(TOKEN_COUNTS), PRODUCT)
    matrices = []
    for i, case in enumerate(cases):
        fmt, number, codebook = _KINDS[i % len(_KINDS)]
        if number in (tables.BF16, tables.F32):
            m = twins.floating(fmt, rng.standard_normal((N_OUT, N_IN)).astype(np.float32))
        else:
            low, high, dtype = (0, 16, np.uint8) if fmt in INT4_FORMATS else (-128, 128, np.int8)
            shape = N_OUT, N_IN // GROUP_SIZE
            scales: Scales = rng.standard_normal(shape).astype(np.float16)
            if fmt == "int4_dq":
                units = 2.0 ** rng.integers(-12, -5, N_OUT)
                codes = rng.integers(-127, 128, shape, np.int8)
                scales = DoubleScales(codes, units.astype(np.float32))
            m = twins.coded(fmt, rng.integers(low, high, (N_OUT, N_IN), dtype), scales, codebook)
        matrices.append(m)
        case["matrix"] = 0, number, len(m.tiles), N_IN, m.group_size, 0, scale_bytes(fmt)
        case["n_tokens"] = TOKEN_COUNTS[i // len(_KINDS)]
        case["x"] = rng.standard_normal((ROWS, N_IN))
        case["codebook"] = np.array(codebook) + 128
        case["tiles"][: m.tiles.size] = m.tiles.ravel()

    def check(cases: Array, out: Array) -> None:
        """By the bound of assert_close in test_kernels.py."""
        for case, result, m in zip(cases, out, matrices, strict=True):
            n, n_terms = case["n_tokens"], N_IN // 32 if m.group_size else N_IN
            expected, magnitudes = twins.matmul(m, case["x"][:n])
            error = np.abs(result["y"][:n, :N_OUT] - expected)
            assert (error <= (n_terms + 2) * twins.EPSILON * magnitudes).all(), m.format

    return cases, check


# Attention, of storing keys and values, too, and over the end of a span.

N, N_HEADS, N_KV_HEADS, HEAD_DIM = workspace.SPAN + 14, 4, 2, 32
SLOTS = -(-N // BLOCK) * BLOCK
CAP = 2.0
QUERIES = N * N_HEADS // N_KV_HEADS
SCRATCH_ROWS = workspace.ROWS + workspace.ITEM_ROWS

ATTENTION = np.dtype(
    [
        ("window", np.int64),
        ("starts", np.int64, 2),
        ("positions", np.int64, 1),
        ("k", np.float32, (N, N_KV_HEADS, HEAD_DIM)),
        ("v", np.float32, (N, N_KV_HEADS, HEAD_DIM)),
        ("q", np.float32, (N_KV_HEADS, QUERIES, HEAD_DIM)),
    ],
    align=True,
)
ATTENTION_RESULT = np.dtype(
    [
        ("y", np.float32, (N, N_HEADS * HEAD_DIM)),
        ("counters", np.int64, (1, 16)),
        ("cache", np.int64, 5),
        ("keys", np.int16, (N_KV_HEADS, SLOTS, HEAD_DIM)),
        ("values", np.int16, (N_KV_HEADS, SLOTS, HEAD_DIM)),
        ("cache_scales", np.float32, (2, N_KV_HEADS, SLOTS)),
        ("query_codes", np.int16, (N_KV_HEADS * QUERIES + workspace.ROWS, HEAD_DIM)),
        ("query_scales", np.float32, N_KV_HEADS * QUERIES + workspace.ROWS),
        ("scores", np.float32, (1, workspace.ROWS, workspace.SPAN)),
        ("weights", np.int16, (1, workspace.ROWS, workspace.SPAN)),
        ("weight_scales", np.float32, (1, workspace.ROWS)),
        ("sums", np.float32, (1, SCRATCH_ROWS, HEAD_DIM)),
        ("maxima", np.float32, (1, SCRATCH_ROWS)),
        ("divisors", np.float32, (1, SCRATCH_ROWS)),
    ],
    align=True,
)
_A_IN, _A_OUT = _offsets(ATTENTION), _offsets(ATTENTION_RESULT)
_SHAPE = Shape(0, 0, 0, 0, N_HEADS, N_KV_HEADS, 0, 0, 0.0, 0.0, CAP, 0.0)


@kernel
def attend(case, out):
    cache = _array(out + _A_OUT.cache, (5,), np.int64)
    cache[KEYS], cache[VALUES] = out + _A_OUT.keys, out + _A_OUT.values
    cache[KEY_SCALES] = out + _A_OUT.cache_scales
    cache[VALUE_SCALES] = cache[KEY_SCALES] + 4 * N_KV_HEADS * SLOTS
    cache[CAPACITY] = SLOTS
    k = _array(case + _A_IN.k, (N, N_KV_HEADS, HEAD_DIM), np.float32)
    v = _array(case + _A_IN.v, (N, N_KV_HEADS, HEAD_DIM), np.float32)
    for t in range(N):
        for head in range(N_KV_HEADS):
            attention.store_head(k[t, head], v[t, head], cache, head, t, False)
    sums = _array(out + _A_OUT.sums, (1, SCRATCH_ROWS, HEAD_DIM), np.float32)
    maxima = _array(out + _A_OUT.maxima, (1, SCRATCH_ROWS), np.float32)
    divisors = _array(out + _A_OUT.divisors, (1, SCRATCH_ROWS), np.float32)
    scratch = workspace.AttentionScratch(
        _array(out + _A_OUT.scores, (1, workspace.ROWS, workspace.SPAN), np.float32),
        _array(out + _A_OUT.weights, (1, workspace.ROWS, workspace.SPAN), np.int16),
        _array(out + _A_OUT.weight_scales, (1, workspace.ROWS), np.float32),
        *(sums, maxima, divisors),
        *(sums, maxima, divisors),  # for partial results, which are not made here
    )
    counters = _array(out + _A_OUT.counters, (1, 16), np.int64)
    counters[:] = 0
    vectors = _array(case + _A_IN.q, (N_KV_HEADS, QUERIES, HEAD_DIM), np.float32)
    codes = _array(out + _A_OUT.query_codes, (N_KV_HEADS, QUERIES, HEAD_DIM), np.int16)
    scales = _array(out + _A_OUT.query_scales, (N_KV_HEADS, QUERIES), np.float32)
    for head in range(N_KV_HEADS):
        for row in range(QUERIES):
            scales[head, row] = attention.round_query(vectors[head, row], codes[head, row], False)
    q = workspace.Queries(codes, scales)
    y = _array(out + _A_OUT.y, (N, N_HEADS * HEAD_DIM), np.float32)
    window = _array(case + _A_IN.window, (1,), np.int64)[0]
    starts = _array(case + _A_IN.starts, (2,), np.int64)
    positions = _array(case + _A_IN.positions, (1,), np.int64)
    caches = _array(out + _A_OUT.cache, (1, 1, 5), np.int64)
    items = attention.n_row_items(starts, _SHAPE, True)
    run = starts, positions, caches, 0, _SHAPE, window, False, True
    attention.attend_rows(counters, 0, items, 0, q, *run, (scratch,), y)


def attentions() -> tuple[Array, Callable[[Array, Array], None]]:
    """A case with a window and one without, and the check of their results."""
    rng = np.random.default_rng(5)
    cases = np.zeros(2, ATTENTION)
    cases["window"] = 0, 40
    cases["starts"][:, 1] = N
    for name in "kvq":
        cases[name] = rng.standard_normal(cases[name].shape)

    def check(cases: Array, out: Array) -> None:
        """By the bound of test_attention_is_the_twins in test_attention.py."""
        roundings = reference.ROUNDINGS["f16"]
        for case, result in zip(cases, out, strict=True):
            q = case["q"].reshape(N_KV_HEADS, N, -1, HEAD_DIM).transpose(1, 0, 2, 3)
            heads = q.reshape(N, N_HEADS, HEAD_DIM), case["k"], case["v"]
            q, k, v = (
                rounding(x).astype(np.float64) for rounding, x in zip(roundings, heads, strict=True)
            )
            expected, magnitudes = twins.attention(q, k, v, int(case["window"]), CAP)
            # Rounding here may end otherwise than there: a code of a query or key, 1e-4 of it.
            score_error = (1e-4 + 4 * twins.EPSILON) * (magnitudes + CAP)
            relative = 2 * (score_error + 2e-7 + (N + 20) * twins.EPSILON)
            relative += workspace.SPAN / 2 / 32767
            error = np.abs(result["y"].reshape(expected.shape) - expected).max(-1)
            assert (error <= relative * np.abs(v).max()).all()

    return cases, check


# What AMX computes with, and when it is given back.


@kernel
def multiply_blocks(case, out):
    numbers = _array(case, (4,), np.int64)
    amx.multiply_blocks(case, numbers[0], numbers[1], out, numbers[2], numbers[3])


@kernel
def share(case, out):
    amx.configure()
    amx.mark()
    _array(out, (1,), np.int64)[0] = amx.lost(case)
    amx.release()


def compile_only(function: Any) -> tuple[str, llvm.ModuleRef]:
    """A kernel's name in LLVM, and its code with all that it calls; none of it for this CPU."""
    # Machine code would be made of what counts an array's owners, and changes LLVM's.
    codegen.JITCodeLibrary._finalize_specific = lambda self: None
    function.compile(types.void(types.int64, types.int64))
    (compiled,) = function.overloads.values()
    return compiled.fndesc.llvm_func_name, compiled.library._final_module
