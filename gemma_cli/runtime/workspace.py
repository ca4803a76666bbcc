"""The memory that the kernels work in, and the sizes of it.

Nothing here needs Numba: a model is ready to run code that was compiled before without it.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemma_cli.runtime import isa

TOKENS = 8 if isa.AVX512 else 4
"""Tokens whose sums are held at once: what fits the vector registers."""

FEW = 16
"""Tokens up to which codes of weights are used as they are read."""

CODES, TOGETHER = 32 * TOKENS, (48 if isa.ZEN4 else 40) * TOKENS
"""Bytes of the codes of 32 inputs of TOKENS tokens, and with what lies there besides (Inputs)."""

TABLE = 512 if isa.ZEN4 else 64
"""Bytes of 16 scales of weights, expanded (`codes.expand_scales`)."""

EXPANDED = 512 + TABLE
"""Bytes of 32 inputs of a tile, expanded: codes and then scales."""

# Of AMX.

TILE = 1024
"""Bytes of a tile."""

BLOCK = 32
"""Rows and columns of sums that are computed at once, in four tiles."""

STEP = 2 * TILE
"""Bytes of BLOCK rows or columns of 32 inputs."""

# Of matrix products: of vectors, and of AMX.

PANEL = 512
"""Inputs of a tile that are expanded at once, a multiple of every group size: with their scales up
to 16 KB."""

SIDE = 8
"""Tiles that go through the inputs side by side, so that these come from the L2 cache."""

ROW = 64
"""Bytes of a token's sums for a tile."""

AMX_PANEL = 256
"""Inputs that are expanded at once, a multiple of 32."""

AMX_PAIR = 2
"""Tiles that are expanded at once."""

AMX_SIDE = 16
"""Tiles that go through the inputs side by side."""

AMX_ROW = 4 * 16 * AMX_PAIR
"""Bytes of a token's sums for a pair of tiles."""

LINE = 64
"""Bytes of a cache line."""

# Of threads, besides the one that Python calls (`team.serve`).

ASLEEP, AWAKE, CALLED = range(3)
"""States: it waits in the interpreter, or in compiled code; it has a program to run."""

STATE, PROGRAM = 0, 1
"""Columns of a thread's row: its state, and the address of its program's arguments."""

THREAD_COLUMNS = 16
"""Of such a row, so that no two share cache lines."""

# Of attention.

SPAN = 256 if isa.AMX else 128
"""Positions of a partial result, a multiple of BLOCK: few enough for two threads to share a short
context, and many where the matrix units take them all at once."""

ROWS = TOKENS
"""Queries whose sums are held at once: what fits the vector registers."""

ITEM_ROWS = 32
"""Queries of an item that goes through all spans: they find a span's keys and values in the L2."""

AMX_ROWS = 128
"""Queries of an item, a multiple of BLOCK."""


class Inputs(NamedTuple):
    """Inputs as float32, and what they are rounded to: for several tokens `blocks`, too, and for
    matrix units these alone."""

    values: NDArray[np.float32]  # (n_tokens, n_in)
    codes: NDArray[np.int8]  # (n_tokens, n_in)
    scales: NDArray[np.float32]  # (n_tokens, n_in / 32)
    offsets: NDArray[np.int32]  # (n_tokens, n_in / 32)
    # For matrix units bfloat16: a row for each part, (n_tokens / BLOCK rounded up, n_in / 32, BLOCK
    # tokens, 32 inputs). Else one row, (n_tokens / TOKENS rounded up, n_in / 32, TOGETHER bytes):
    # codes (8, TOKENS, 4 inputs), then scales, offsets and, for ZEN4, exponents (2, TOKENS).
    blocks: NDArray[np.uint16]


class Queries(NamedTuple):
    """Queries as attention takes them: integers times a scale for each of them.

    n_rows is n_tokens * n_heads / n_kv_heads, those of a key head token by token.
    """

    codes: NDArray[np.int16]  # (n_kv_heads, n_rows, head_dim)
    scales: NDArray[np.float32]  # (n_kv_heads, n_rows)


class AttentionScratch(NamedTuple):
    """What `attend` writes to: its threads' own memory, and partial results for `merge`."""

    scores: NDArray[np.float32]  # (n_threads, ROWS, SPAN)
    weights: NDArray[np.int16]  # (n_threads, ROWS, SPAN)
    weight_scales: NDArray[np.float32]  # (n_threads, ROWS)
    sums: NDArray[np.float32]  # (n_threads, ROWS + ITEM_ROWS, head_dim): a partial result, totals
    maxima: NDArray[np.float32]  # (n_threads, ROWS + ITEM_ROWS)
    divisors: NDArray[np.float32]  # (n_threads, ROWS + ITEM_ROWS)
    partial_sums: NDArray[np.float32]  # (n_partials, ROWS, head_dim)
    partial_maxima: NDArray[np.float32]  # (n_partials, ROWS)
    partial_divisors: NDArray[np.float32]  # (n_partials, ROWS)


class AMXAttentionScratch(NamedTuple):
    """A thread's memory: what is multiplied, bfloat16 in the order of tiles, and what is summed."""

    queries: NDArray[np.uint16]  # (n_threads, AMX_ROWS * head_dim), in blocks as inputs are
    keys: NDArray[np.uint16]  # (n_threads, SPAN * head_dim)
    values: NDArray[np.uint16]  # (n_threads, SPAN * head_dim)
    scores: NDArray[
        np.float32
    ]  # (n_threads, AMX_ROWS, SPAN + 16): rows in different parts of a cache
    rounded: NDArray[np.uint16]  # (n_threads, AMX_ROWS * SPAN), of all, in blocks
    sums: NDArray[np.float32]  # (n_threads, 2 a span's or total, AMX_ROWS, head_dim)
    maxima: NDArray[np.float32]  # (n_threads, 2, AMX_ROWS)
    divisors: NDArray[np.float32]  # (n_threads, 2, AMX_ROWS)
    lines: NDArray[np.uint8]  # (n_threads, 64), for `amx.lost`


class HeadScratch(NamedTuple):
    """What the passes over the head write to."""

    # Of each run of 32 inputs, for one plane that is read, for two and for three.
    scales: NDArray[np.float32]  # (3, hidden_size / 32), times what a code's last bit is worth
    offsets: NDArray[np.int32]  # (3, hidden_size / 32), which `dots_one_plane` adds
    variances: NDArray[np.float32]  # (3, hidden_size / 32), with a weight scale of 1
    lower: NDArray[np.float32]  # (n_tiles,), what a tile's largest logit is at least
    upper: NDArray[np.float32]  # (n_tiles,), what it is at most
    best: NDArray[np.float32]  # (n_tiles,), n_chosen: the largest of `lower`, then of logits
    chosen: NDArray[np.int64]  # (n_tiles,), n_chosen: the tiles that they are of
    least: NDArray[np.float32]  # (1,), what n_best logits are not below


class Scratch(NamedTuple):
    """Intermediate values of a chunk; `h` and `outputs` serve matrices of every width.

    `h` has rows to spare up to a multiple of TOKENS. Of `gated` only the blocks are memory of its
    own, since it is filled while `h` is read.
    """

    x: NDArray[np.float32]  # (chunk, hidden_size), the residual stream
    h: Inputs  # of the widest matrix
    gated: Inputs  # of the feed-forward output
    outputs: NDArray[np.float32]  # (chunk, widest set of matrix outputs)
    queries: Queries  # of a chunk, and as many rows as attention reads beyond
    panels: NDArray[np.uint8]  # (n_threads, scratch_bytes(chunk))
    angles: NDArray[np.float32]  # (2 global or sliding, 2 cos or sin, chunk, head_dim / 2)
    attention: AttentionScratch
    attention_amx: AMXAttentionScratch
    head: HeadScratch
    overflow: NDArray[np.int64]  # (1,), 1 once a sum of squares in the residual stream is no number


def threads(n: int) -> NDArray[np.int64]:
    """(n, THREAD_COLUMNS), threads that are asleep."""
    return aligned((n, THREAD_COLUMNS), np.int64)


def aligned(shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    """Zeros that begin with a cache line, so that no row of a tile lies in two."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(n_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + n_bytes].view(dtype).reshape(shape)


def allocate_blocks(n_tokens: int, n_in: int, exact: bool) -> NDArray[np.uint16]:
    """Memory for `blocks`; exact: for bf16 weights, too."""
    if not isa.AMX:
        return aligned((1, -(-n_tokens // TOKENS) * (n_in // 32) * TOGETHER // 2), np.uint16)
    return aligned((3 if exact else 1, -(-n_tokens // BLOCK) * BLOCK * n_in), np.uint16)


def scratch_bytes(n_tokens: int) -> int:
    """Bytes that a thread needs to multiply so many tokens."""
    if isa.AMX:
        n_blocks = -(-n_tokens // BLOCK)
        sums = AMX_SIDE // AMX_PAIR * n_blocks * BLOCK * AMX_ROW
        return LINE + AMX_PANEL // 32 * STEP + sums
    return PANEL // 32 * EXPANDED + SIDE * -(-n_tokens // TOKENS) * TOKENS * ROW


def allocate_attention(n_threads: int, head_dim: int, n_partials: int) -> AttentionScratch:
    """Scratch memory; n_partials as `count_partials` gives it."""

    def array(*shape: int) -> NDArray[np.float32]:
        return np.zeros(shape, np.float32)

    rows = ROWS + ITEM_ROWS
    return AttentionScratch(
        array(n_threads, ROWS, SPAN),
        np.zeros((n_threads, ROWS, SPAN), np.int16),
        array(n_threads, ROWS),
        array(n_threads, rows, head_dim),
        array(n_threads, rows),
        array(n_threads, rows),
        array(n_partials, ROWS, head_dim),
        array(n_partials, ROWS),
        array(n_partials, ROWS),
    )


def count_partials(n_heads: int, n_kv_heads: int, n_tokens: int, context: int) -> int:
    """Partial results of n_tokens, of whatever sequences, that see a whole context."""
    group = n_heads // n_kv_heads
    blocks = n_tokens * -(-group // ROWS)  # Each token may be a sequence's only one.
    return n_kv_heads * blocks * (-(-context // SPAN) + 1)


def allocate_amx_attention(n_threads: int, head_dim: int) -> AMXAttentionScratch:
    """Scratch memory, nothing without AMX."""
    n = n_threads if isa.AMX else 0
    return AMXAttentionScratch(
        aligned((n, AMX_ROWS * head_dim), np.uint16),
        aligned((n, SPAN * head_dim), np.uint16),
        aligned((n, SPAN * head_dim), np.uint16),
        aligned((n, AMX_ROWS, SPAN + 16), np.float32),
        aligned((n, AMX_ROWS * SPAN), np.uint16),
        aligned((n, 2, AMX_ROWS, head_dim), np.float32),
        aligned((n, 2, AMX_ROWS), np.float32),
        aligned((n, 2, AMX_ROWS), np.float32),
        aligned((n, 64), np.uint8),
    )


def allocate_head(hidden_size: int, n_tiles: int) -> HeadScratch:
    n_runs = hidden_size // 32
    return HeadScratch(
        np.zeros((3, n_runs), np.float32),
        np.zeros((3, n_runs), np.int32),
        np.zeros((3, n_runs), np.float32),
        np.zeros(n_tiles, np.float32),
        np.zeros(n_tiles, np.float32),
        np.zeros(n_tiles, np.float32),
        np.zeros(n_tiles, np.int64),
        np.zeros(1, np.float32),
    )


STAGES, HEAD_STAGES = 11, 10
"""Stages of a layer, and of the output head."""


def n_stages(n_layers: int) -> int:
    """Rows of counters that `forward` needs."""
    return 1 + STAGES * n_layers + HEAD_STAGES


def counters(n_stages: int) -> NDArray[np.int64]:
    """Zeroed counters for so many stages; they are zeroed again before they are used again."""
    return np.zeros((n_stages, 16), np.int64)
