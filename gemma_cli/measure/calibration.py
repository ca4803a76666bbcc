"""Calibration: what a text makes of each matrix's inputs, gathered layer by layer.

The checkpoint itself is run, in float32 and with NumPy, all sequences through one layer before the
next: so only one layer's weights are in memory, besides the residual stream of every token.

Tokens do not count alike. An error in what attention or a feed-forward block adds to the residual
stream counts in relation to the stream, which is normalised before it is used; where the sum's new
part is normalised as well (Gemma 2 and 3), in relation to that, too. Keys and values count as often
as they are attended to: those of BOS, mostly, for all the tokens after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from gemma_cli.runtime.model import default_threads
from quantize.checkpoint import Checkpoint
from quantize.config import GemmaConfig
from quantize.errors import GemmaError
from quantize.memory import check_memory
from quantize.statistics import InputStatistics
from quantize.tensors import matrix_shapes

Floats = NDArray[np.float32]

SEQUENCE = 512
"""Tokens that attend to each other, as when quality is measured."""

_HELD_OUT = 12  # One sequence in so many is not for calibration.

_DOUBT = 5000
"""Tokens that say that a matrix's inputs do not depend on each other, beside those of the text:
how they do differs from text to text, so what is off the diagonal of a Gram matrix shrinks (Ledoit
and Wolf 2004, doi:10.1016/S0047-259X(03)00096-4). Rounded by GPTQ with 16,000 tokens, Gemma 3
270M diverged on WikiText by 0.053 without, by 0.048 with 1,800 and with 4,100; with 97,000 tokens
by 0.042 with 2,000, 0.041 with 5,000, 0.043 with 11,000 (without the ten worst of 1,700 positions;
0.001 is noise)."""

_BLOCK = 128
"""Inputs, or fewer that divide a matrix's, whose dependence on each other is gathered where it is
not of all. Searched with that, Gemma 3 270M diverged from its checkpoint by 0.064 instead of 0.070,
with blocks of 32 by 0.068."""

_BATCH = 8  # sequences whose inputs to a layer's matrices are held at once
_GRAM_COLUMNS = 256  # that a thread computes at a time
_HEAD_LOGITS = 1 << 25  # held at once: 134 MB
_HEAD_WEIGHTS = 1 << 22  # of the output head that a thread reads at a time

_MATRICES = (
    ("attn_q", "attn_k", "attn_v"),
    ("attn_o",),
    ("ffn_gate", "ffn_up"),
    ("ffn_down",),
)
"""A layer's matrices by the input that they share, in the order of `layer`'s inputs."""


def default_text() -> str:
    """Prose, dialogue and code in many languages, written for this project (Apache-2.0)."""
    return files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")


def sequences(ids: Sequence[int], bos_id: int) -> list[NDArray[np.int32]]:
    """Cuts a text's ids (without BOS) into sequences that begin with BOS."""
    step = SEQUENCE - 1
    return [
        np.array([bos_id, *ids[start : start + step]], np.int32)
        for start in range(0, len(ids), step)
    ]


def split(
    text: Sequence[NDArray[np.int32]],
) -> tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]]:
    """The sequences to calibrate on, and those held out, all of them whole, to verify with."""
    whole = [ids for ids in text if len(ids) == SEQUENCE]
    held_out = whole[_HELD_OUT - 1 :: _HELD_OUT]
    # Only the last sequence can be shorter.
    del whole[_HELD_OUT - 1 :: _HELD_OUT]
    return [*whole, *text[len(whole) + len(held_out) :]], held_out


def check_room(checkpoint: Checkpoint, text: Sequence[NDArray[np.int32]], *, whole: bool) -> None:
    """Raises GemmaError if there is not enough memory for a Calibration, and for `compensation`
    with whole Gram matrices: for a layer's weights, every token's residual stream, and what a batch
    makes of them."""
    config, longest, n_tokens = checkpoint.config, max(map(len, text)), sum(map(len, text))
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = config.n_heads * config.head_dim
    shapes = matrix_shapes(config).items()
    weights = sum(n * m for name, (n, m) in shapes if name.startswith("layers.0."))
    # A batch's inputs are there twice when they are joined.
    batch = _BATCH * longest * 2 * (2 * hidden + attention + inner)
    batch += default_threads() * longest * (3 * attention + 3 * inner + 2 * longest)
    # The Gram matrices of all of a layer's inputs; then one, a copy of it, and its factor.
    widths = (hidden, attention, hidden, inner)
    grams = sum(n * n for n in widths) + 2 * max(widths) ** 2 if whole else 0
    check_memory(
        4 * (weights + n_tokens * hidden + batch + grams),
        f"Running {checkpoint.path} over {n_tokens} tokens of text takes",
        "end other programs, or use --method search without --calibrate and --verify",
    )


class Calibration:
    """The input statistics of each matrix, by its name; `quantize.statistics.Calibration`.

    Matrices are asked for in the order of the layers, and a layer is run when it is reached. Gram
    matrices are `whole`, of 4 n_in^2 bytes each while they are in use, or of blocks of inputs.
    When the last was asked for, `stream` is what the output head is multiplied by. Raises
    GemmaError if there is not enough memory.
    """

    stream: list[Floats]
    """The residual stream of each sequence, (n, hidden_size), behind the layers that were run."""

    def __init__(
        self, checkpoint: Checkpoint, text: Sequence[NDArray[np.int32]], *, whole: bool
    ) -> None:
        check_room(checkpoint, text, whole=whole)
        self.stream = []
        self._statistics = _statistics(checkpoint, text, whole, self.stream)
        self._names: tuple[str, ...] = ()
        self._current: InputStatistics

    def __call__(self, name: str) -> InputStatistics:
        while name not in self._names:
            # What was there is given up before the next is gathered: it may be a gigabyte.
            self._names, self._current = next(self._statistics)
        return self._current


def _statistics(
    checkpoint: Checkpoint,
    text: Sequence[NDArray[np.int32]],
    whole: bool,
    stream: list[Floats],
) -> Iterator[tuple[tuple[str, ...], InputStatistics]]:
    """The statistics of matrices that share their inputs, and their names; fills `stream`."""
    config, embedding = checkpoint.config, checkpoint.tensors["embed"]

    def embed(ids: NDArray[np.int32]) -> Floats:
        unique, where = np.unique(ids, return_inverse=True)
        rows = np.concatenate([embedding.rows(int(i), int(i) + 1) for i in unique])
        return rows[where] * np.float32(np.sqrt(config.hidden_size))

    stream[:] = [embed(ids) for ids in text]
    with ThreadPoolExecutor(default_threads()) as pool:
        for i in range(config.n_layers):
            weights = _layer_weights(checkpoint, i)
            gathered = [_Sums(whole) for _ in _MATRICES]
            for start in range(0, len(stream), _BATCH):
                batch = slice(start, start + _BATCH)
                done = list(pool.map(partial(layer, config, weights, i), stream[batch]))
                stream[batch] = [x for x, _, _ in done]
                for k, sums in enumerate(gathered):
                    sums.add(
                        np.concatenate([inputs[k] for _, inputs, _ in done]),
                        np.concatenate([counts[k] for _, _, counts in done]),
                        pool,
                    )
            del weights
            for names, sums in zip(_MATRICES, gathered, strict=True):
                yield tuple(f"layers.{i}.{name}" for name in names), sums.means()
        sums = _Sums(whole)
        norm = checkpoint.tensors["final_norm"].values()
        for start in range(0, len(stream), _BATCH):
            batch = slice(start, start + _BATCH)
            stream[batch] = [rms_norm(x, norm, config.rms_norm_eps) for x in stream[batch]]
            x = np.concatenate(stream[batch])
            sums.add(x, np.ones(len(x), np.float32), pool)
        yield ("embed",), sums.means()


class _Sums:
    """Sums over the inputs of a matrix, batch after batch."""

    def __init__(self, whole: bool) -> None:
        self._whole = whole
        self._n_tokens, self._count = 0, 0.0
        self._gram: Floats | None = None

    def add(self, x: Floats, counts: Floats, pool: ThreadPoolExecutor) -> None:
        """x: (n, n_in); counts: (n,), how much each of them counts. Both are overwritten."""
        n_in = x.shape[1]
        self._n_tokens += len(x)
        self._count += float(counts.sum(dtype=np.float64))
        x *= np.sqrt(counts, out=counts)[:, None]
        if self._gram is None:
            size = n_in if self._whole else math.gcd(n_in, _BLOCK)
            self._gram = np.zeros((n_in // size, size, size), np.float32)
        blocks = zip(self._gram, np.split(x, len(self._gram), axis=1), strict=True)

        def columns(gram: Floats, x: Floats, start: int) -> None:
            stop = start + _GRAM_COLUMNS
            gram[start:, start:stop] += x[:, start:].T @ x[:, start:stop]

        starts = range(0, self._gram.shape[1], _GRAM_COLUMNS)
        done = [pool.submit(columns, *block, start) for block in blocks for start in starts]
        for future in done:
            future.result()

    def means(self) -> InputStatistics:
        if self._gram is None:
            raise ValueError("there is no text")
        gram, belief = self._gram, self._n_tokens / (self._n_tokens + _DOUBT)
        squares = np.einsum("bii->bi", gram) / np.float32(self._count)
        gram *= np.float32(belief / self._count)
        np.einsum("bii->bi", gram)[:] = squares
        for start in range(0, gram.shape[1], _GRAM_COLUMNS):
            stop = start + _GRAM_COLUMNS
            gram[:, start:stop, stop:] = gram[:, stop:, start:stop].transpose(0, 2, 1)
        return InputStatistics(gram)


def _layer_weights(checkpoint: Checkpoint, i: int) -> dict[str, Floats]:
    """A layer's tensors in float32, by their names within it."""
    prefix = f"layers.{i}."
    return {
        name.removeprefix(prefix): tensor.values()
        if len(tensor.shape) == 1
        else tensor.rows(0, tensor.shape[0])
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(prefix)
    }


def logits(checkpoint: Checkpoint, x: Floats) -> Iterator[Floats]:
    """The logits (vocab_size,) of each of the output head's inputs (n, hidden_size), in order.

    A block of positions is in memory at a time; what is yielded is overwritten by the next block.
    Raises GemmaError if they are not finite.
    """
    head, cap = checkpoint.tensors["embed"], np.float32(checkpoint.config.final_soft_cap)
    n_vocab, n_in = head.shape
    n_positions = max(1, _HEAD_LOGITS // n_vocab)
    step = max(1, _HEAD_WEIGHTS // n_in)
    out = np.empty((n_positions, n_vocab), np.float32)
    with ThreadPoolExecutor(default_threads()) as pool:
        for start in range(0, len(x), n_positions):
            inputs = x[start : start + n_positions]
            block = out[: len(inputs)]

            def fill(at: int, inputs: Floats = inputs, block: Floats = block) -> None:
                piece = slice(at, min(at + step, n_vocab))
                with np.errstate(all="ignore"):  # What comes of it is not finite, and reported.
                    product = inputs @ head.rows(piece.start, piece.stop).T
                block[:, piece] = cap * np.tanh(product / cap) if cap else product

            list(pool.map(fill, range(0, n_vocab, step)))
            if not np.isfinite(block).all():
                raise GemmaError(
                    f"{checkpoint.path} gives numbers that overflow float32; the checkpoint is "
                    "damaged, get it again."
                )
            yield from block


# The equations of runtime/forward.py in float32, a sequence at a time.


def layer(
    config: GemmaConfig, weights: dict[str, Floats], i: int, x: Floats
) -> tuple[Floats, tuple[Floats, ...], tuple[Floats, ...]]:
    """A sequence's residual stream (n, hidden_size) after layer i, what its matrices were
    multiplied by, and how much each token counts there: the inputs of q, k and v, of o, of gate and
    up, and of down, each (n, n_in) and (n,)."""

    def norm(y: Floats, name: str) -> Floats:
        return rms_norm(y, weights[name], config.rms_norm_eps) if name in weights else y

    def counts(y: Floats, name: str) -> Floats:
        # The mean squares of the stream and, if it is normalised, of what was added to it.
        squares = np.mean(x * x, axis=1) + np.float32(config.rms_norm_eps)
        if name in weights:
            squares *= np.mean(y * y, axis=1) + np.float32(config.rms_norm_eps)
        return np.asarray(1 / squares, np.float32)

    h = norm(x, "attn_norm")
    mixed, attended = _attention(config, weights, i, h)
    y = mixed @ weights["attn_o"].T
    x = x + norm(y, "post_attn_norm")
    mixed_counts = counts(y, "post_attn_norm")
    h2 = norm(x, "ffn_norm")
    gated = _gelu(h2 @ weights["ffn_gate"].T)
    gated *= h2 @ weights["ffn_up"].T
    y = gated @ weights["ffn_down"].T
    x = x + norm(y, "post_ffn_norm")
    ones = np.ones(len(x), np.float32)
    inputs, counted = (h, mixed, h2, gated), (1 + attended, mixed_counts, ones)
    return x, inputs, (*counted, counts(y, "post_ffn_norm"))


def _attention(
    config: GemmaConfig, weights: dict[str, Floats], i: int, h: Floats
) -> tuple[Floats, Floats]:
    """Causal attention before its output projection, (n, n_heads * head_dim), and how much each
    token is attended to, (n,): the sum of the squares of its weights, as errors add up, averaged
    over the heads."""
    n, d = len(h), config.head_dim

    def heads(name: str, n_heads: int, norm: str) -> Floats:
        y = (h @ weights[name].T).reshape(n, n_heads, d)
        return rms_norm(y, weights[norm], config.rms_norm_eps) if norm in weights else y

    slides = config.sliding_layers[i]
    base = config.rope_local_base if slides else config.rope_base
    scale = 1.0 if slides else config.rope_scale
    angles = np.arange(n)[:, None] * (base ** (-np.arange(d // 2) / (d // 2)) / scale)
    cos = np.cos(angles).astype(np.float32)[:, None]
    sin = np.sin(angles).astype(np.float32)[:, None]

    def rotate(y: Floats) -> Floats:
        a, b = y[..., : d // 2], y[..., d // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    q = rotate(heads("attn_q", config.n_heads, "q_norm")) * np.float32(config.query_scale)
    k = rotate(heads("attn_k", config.n_kv_heads, "k_norm"))
    v = heads("attn_v", config.n_kv_heads, "")
    behind = np.arange(n)[:, None] - np.arange(n)
    hidden = behind < 0
    if slides:
        hidden |= behind >= config.sliding_window
    mixed = np.empty((n, config.n_heads, d), np.float32)
    attended = np.zeros(n, np.float32)
    group = config.n_heads // config.n_kv_heads
    for head in range(config.n_heads):
        scores = q[:, head] @ k[:, head // group].T
        if cap := np.float32(config.attention_soft_cap):
            scores = cap * np.tanh(scores / cap)
        scores[hidden] = -np.inf
        scores -= scores.max(1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(1, keepdims=True)
        mixed[:, head] = scores @ v[:, head // group]
        attended += np.einsum("ts,ts->s", scores, scores)
    return mixed.reshape(n, -1), attended / np.float32(config.n_heads)


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return np.asarray(x / np.sqrt(mean_square + np.float32(eps)) * weight, np.float32)


def _gelu(x: Floats) -> Floats:
    """Its tanh approximation: x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    u = x * x
    u *= np.float32(-2 * np.sqrt(2 / np.pi) * 0.044715)
    u -= np.float32(2 * np.sqrt(2 / np.pi))
    u *= x
    with np.errstate(over="ignore"):
        np.exp(u, out=u)
    u += 1
    np.divide(x, u, out=u)
    return u
