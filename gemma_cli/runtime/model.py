"""A model: the mapped weights, and the compiled call that turns token ids into logits."""

import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from operator import is_
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemma_cli.runtime import isa, machine_code, tables, workspace
from gemma_cli.runtime.kv_cache import KVCache
from gemma_cli.runtime.tables import MATRICES, NORMS, Shape, Weights
from gemma_cli.runtime.workspace import FEW, TOKENS, Inputs, Queries, Scratch
from quantize import packing
from quantize.config import GemmaConfig
from quantize.errors import GemmaError
from quantize.modelfile import MatrixSpec, ModelFile
from quantize.packing import LINEAR_LEVELS

CHUNK_SIZE = 512 if isa.AMX else 128
"""Tokens processed at once: bounds the scratch memory and the time until a signal is seen.

Matrix units want more, since weights are expanded once for a chunk, and are as much faster.
"""

CHECK_SECONDS = 0.01
"""After a check of the file, until the next: that takes one or two hundredths of a small model's
time for a token."""

MOST_ROWS = FEW
"""Logits, each after another token, that `forward_each` and `forward_batch` give at once."""

Ids = Sequence[int] | NDArray[np.int32]

Calls = SimpleQueue[Callable[[], None] | None]

_FORMATS = {
    "int8": tables.INT8,
    "int8_planes": tables.PLANES,
    "bf16": tables.BF16,
    "f32": tables.F32,
}


def default_threads() -> int:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def bytes_per_token(matrices: Mapping[str, MatrixSpec]) -> int:
    """Bytes of weights that decoding one token reads, when the likeliest token is wanted.

    Of an output head in planes that is the first, and some tiles' others, a few percent, which are
    not counted.
    """
    head = matrices["embed"]
    unread = 2 * sum(packing.PLANE_BITS[1:]) if head.format == "int8_planes" else 0
    n_bytes = sum(m.nbytes for m in matrices.values())
    return n_bytes - unread * head.n_in * packing.n_tiles(head.n_out)


def rotary_frequencies(head_dim: int, base: float, scale: float) -> NDArray[np.float64]:
    """base^(-2 i / head_dim) / scale, i below head_dim / 2: the angles that a position adds.

    Rotary positions (Su et al. 2021, arXiv:2104.09864).
    """
    half = head_dim // 2
    frequencies: NDArray[np.float64] = base ** (-np.arange(half) / half) / scale
    return frequencies


def _shape(config: GemmaConfig) -> Shape:
    return Shape(**{name: getattr(config, name) for name in Shape._fields})


def _levels(m: MatrixSpec) -> NDArray[np.uint8]:
    """A matrix's codebook as the kernels read it: 16 bytes, level + 128."""
    return (np.array(m.codebook or LINEAR_LEVELS) + 128).astype(np.uint8)


def _starts(lengths: Sequence[int]) -> NDArray[np.int64]:
    """Where each of some runs begins that lie one after the other, and where the last one ends."""
    return np.array([*accumulate(lengths, initial=0)], np.int64)


def _do(calls: Calls) -> None:
    """What a thread does: call after call, until there is None."""
    while serve := calls.get():
        serve()
        del serve  # and the model with it, which may be the last reference


def _end(threads: list[Calls]) -> None:
    for calls in threads:
        calls.put(None)


class _Request(NamedTuple):
    """What `forward` is asked for, in memory that is used again for the next token."""

    kind: tuple[object, ...]  # how many ids there are of each sequence, ...
    tables: list[NDArray[np.int64]]  # of the caches
    ids: NDArray[np.int32]
    positions: NDArray[np.int64]
    last_positions: NDArray[np.int64]
    arrays: tuple[object, ...]  # these and others, kept
    parts: NDArray[np.int64]
    program: int  # address of the parts
    logits: int  # which of them is the address of the logits
    code: machine_code.Code


class Model:
    """A Gemma, ready to run from its model file.

    Token ids go in, logits come out; text is somebody else's. `n_threads` threads share the work,
    by default one a CPU that the process may use.
    """

    def __init__(
        self, file: ModelFile, n_threads: int | None = None, chunk_size: int = CHUNK_SIZE
    ) -> None:
        self.file = file
        self.config = file.config
        self.chunk_size = chunk_size
        self.n_threads = n_threads or default_threads()
        self._calls: list[Calls] = [SimpleQueue() for _ in range(1, self.n_threads)]
        for calls in self._calls:
            Thread(target=_do, args=(calls,), daemon=True).start()
        weakref.finalize(self, _end, self._calls)
        self._threads = workspace.threads(len(self._calls))
        self._rows, self._states = self._threads.ctypes.data, self._threads[:, workspace.STATE]
        self._to_wake: machine_code.Code | None = None  # if threads may not know of their program
        self._kept: tuple[object, ...] = ()  # what they write to, besides what the model has
        self._last: _Request | None = None
        self._next_check = 0.0  # of whether the file is what it was
        self._shape = _shape(self.config)
        self._codebooks: list[NDArray[np.uint8]] = []
        self._weights = self._addresses()
        self._n_tiles = packing.n_tiles(self.config.vocab_size)
        self._scratch = self._allocate()
        self._counters = workspace.counters(workspace.n_stages(self.config.n_layers))
        self._keep_same()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that decoding one token reads, when the likeliest token is wanted."""
        return bytes_per_token(self.file.matrices)

    def _addresses(self) -> Weights:
        config, file = self.config, self.file
        names = [f"layers.{i}.{name}" for i in range(config.n_layers) for name in MATRICES]
        matrices = np.array([self._matrix(name) for name in [*names, "embed"]], np.int64)
        norms = np.zeros((config.n_layers + 1, len(NORMS)), np.int64)
        for i in range(config.n_layers):
            for column, name in enumerate(NORMS):
                if f"layers.{i}.{name}" in file.vectors:
                    norms[i, column] = file.vectors[f"layers.{i}.{name}"].ctypes.data
        norms[config.n_layers, 0] = file.vectors["final_norm"].ctypes.data
        frequencies = np.stack(
            [
                rotary_frequencies(config.head_dim, config.rope_base, config.rope_scale),
                rotary_frequencies(config.head_dim, config.rope_local_base, 1.0),
            ]
        )
        slides = np.array(config.sliding_layers, np.bool_)
        exact = bool(np.isin(matrices[:, tables.FORMAT], (tables.BF16, tables.F32)).all())
        head = file.matrices["embed"]
        remainders = np.zeros((3, 2))
        if head.format == "int8_planes":
            remainders = packing.remainders(file.tiles["embed"], head.n_in)
        return Weights(matrices, norms, slides, frequencies, exact, remainders)

    def _matrix(self, name: str) -> tuple[int, ...]:
        """A matrix's row of the kernels' table."""
        m, tiles = self.file.matrices[name], self.file.tiles[name]
        codebook = _levels(m)
        self._codebooks.append(codebook)  # The table holds its address only.
        linear = m.codebook == LINEAR_LEVELS
        fmt = _FORMATS.get(m.format, tables.INT4 if linear else tables.INT4_CODEBOOK)
        addresses = tiles.ctypes.data, codebook.ctypes.data
        scales = packing.scale_bytes(m.format)
        return addresses[0], fmt, len(tiles), m.n_in, m.group_size, addresses[1], scales

    def _allocate(self) -> Scratch:
        c, chunk = self.config, self.chunk_size
        heads = c.n_heads * c.head_dim

        def rows(n: int, dtype: type) -> NDArray[Any]:
            # One cache line more than needed: rows a power of two apart would all meet in the
            # same places of a cache.
            return np.zeros((chunk + TOKENS, n + 64), dtype)

        formats = self._weights.matrices[:, tables.FORMAT]
        widest = max(c.hidden_size, c.intermediate_size, heads)
        outputs = max(c.hidden_size, 2 * c.intermediate_size, heads + 2 * c.n_kv_heads * c.head_dim)
        queries = chunk * c.n_heads // c.n_kv_heads + workspace.ROWS
        exact = bool((formats == tables.BF16).any())
        h = Inputs(
            rows(widest, np.float32),
            rows(widest, np.int8),
            rows(widest // 32, np.float32),
            rows(widest // 32, np.int32),
            workspace.allocate_blocks(chunk, max(c.hidden_size, heads), exact),
        )
        return Scratch(
            x=np.zeros((chunk, c.hidden_size), np.float32),
            h=h,
            gated=h._replace(blocks=workspace.allocate_blocks(chunk, c.intermediate_size, exact)),
            outputs=rows(outputs, np.float32),
            queries=Queries(
                np.zeros((c.n_kv_heads, queries, c.head_dim), np.int16),
                np.zeros((c.n_kv_heads, queries), np.float32),
            ),
            panels=workspace.aligned((self.n_threads, workspace.scratch_bytes(chunk)), np.uint8),
            angles=np.zeros((2, 2, chunk, c.head_dim // 2), np.float32),
            attention=workspace.allocate_attention(self.n_threads, c.head_dim, 0),
            attention_amx=workspace.allocate_amx_attention(self.n_threads, c.head_dim),
            head=workspace.allocate_head(c.hidden_size, self._n_tiles),
            overflow=np.zeros(1, np.int64),
        )

    def new_cache(self, context: int, kv: str = "f16") -> KVCache:
        """An empty cache for `context` tokens; kv: "f16" or "int8"."""
        return KVCache(self.config, context, kv, self.chunk_size)

    def _run(
        self,
        runs: Sequence[NDArray[np.int32]],
        caches: Sequence[KVCache],
        wanted: Sequence[int],
        logits: NDArray[np.float32],
        n_best: int = 0,
    ) -> None:
        """Appends each cache's ids to it; fills a row of logits after each of the wanted ids.

        wanted: how many, the last of each cache's ids.
        """
        if n_best > self._n_tiles:  # A tile's largest logit stands for it.
            n_best = 0
        self._wait_for_others()
        self._counters[:] = 0
        self._scratch.overflow[0] = 0
        lengths = tuple(len(run) for run in runs)
        few = [n for n in (sum(lengths), sum(wanted)) if n <= FEW]
        self._reserve_partials(max(few, default=0), caches[0].context)
        request = self._request(lengths, tuple(wanted), caches, logits, n_best)
        np.concatenate(runs, out=request.ids)
        for i, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
            request.positions[i] = cache.length
            request.last_positions[i] = cache.length + length - wanted[i]
        # A thread may come when the others have done everything, and must find what it looks at.
        code, self._kept, self._to_wake = request.code, (caches, logits), request.code
        if code.call(self._rows, len(self._calls), request.program):
            self._wake(code)
        self._to_wake = None
        code.run(request.program, 0)
        self._kept = ()
        self._check(lengths, caches)
        for cache, length in zip(caches, lengths, strict=True):
            cache.length += length

    def _request(
        self,
        lengths: tuple[int, ...],
        wanted: tuple[int, ...],
        caches: Sequence[KVCache],
        logits: NDArray[np.float32],
        n_best: int,
    ) -> _Request:
        """The last one again, if but the ids, positions and logits are others: one token follows
        the other, and to lay out a few arrays anew takes a hundredth of a small model's time."""
        last, tables = self._last, [cache.table for cache in caches]
        kind = lengths, wanted, n_best, logits.shape
        if last and last.kind == kind and all(map(is_, tables, last.tables)):
            last.parts[last.logits] = machine_code.address(logits)
            return last
        ids, positions = np.zeros(sum(lengths), np.int32), np.zeros(len(caches), np.int64)
        last_positions = np.zeros_like(positions)
        is_int8 = caches[0].kind == "int8"
        new = (
            *(np.array(tables), is_int8, ids, _starts(lengths), positions),
            *(n_best, _starts(wanted), last_positions),
        )
        code = machine_code.load((0, *self._same, *new, logits))
        own = machine_code.parts((*new, logits))
        parts = np.concatenate([self._parts, np.array(own, np.int64)])
        self._last = _Request(
            kind=kind,
            tables=tables,
            ids=ids,
            positions=positions,
            last_positions=last_positions,
            arrays=new,
            parts=parts,
            program=machine_code.address(parts),
            logits=len(parts) - len(machine_code.parts(logits)) + machine_code.ADDRESS,
            code=code,
        )
        return self._last

    def _wake(self, code: machine_code.Code) -> None:
        """Has all threads see whether they have a program. They keep the model meanwhile."""
        for thread, calls in enumerate(self._calls, 1):
            calls.put(partial(self._serve, code, thread))

    def _serve(self, code: machine_code.Code, thread: int) -> None:
        code.serve(self._rows + self._threads.strides[0] * (thread - 1), thread)

    def _wait_for_others(self) -> None:
        """Threads of the last run have nothing left to do, but may not have said so yet."""
        if self._to_wake:  # Ctrl-C has come meanwhile.
            self._wake(self._to_wake)
            self._to_wake = None
        while workspace.CALLED in self._states.tolist():
            time.sleep(1e-5)

    def _check(self, lengths: Sequence[int], caches: Sequence[KVCache]) -> None:
        """Raises GemmaError if the weights or what came of them cannot be relied on."""
        now = time.monotonic()
        if now > self._next_check:
            self.file.check_unchanged()
            self._next_check = now + CHECK_SECONDS
        if not self._scratch.overflow[0]:
            return
        pairs = zip(caches, lengths, strict=True)
        layers = [cache.find_overflow(length) for cache, length in pairs]
        found = [layer for layer in layers if layer is not None]
        where = f"keys and values of layer {min(found)}" if found else "activations"
        raise GemmaError(
            f"{self.file.path} has {where} that are too large or not numbers: `gemma-cli "
            "verify` tells whether the file is damaged."
        )

    def _reserve_partials(self, n_tokens: int, context: int) -> None:
        c = self.config
        n = workspace.count_partials(c.n_heads, c.n_kv_heads, n_tokens, context)
        if n > len(self._scratch.attention.partial_sums):
            larger = workspace.allocate_attention(self.n_threads, c.head_dim, n)
            self._scratch = self._scratch._replace(attention=larger)
            self._keep_same()

    def _keep_same(self) -> None:
        """The arguments of `forward` that stay the same from call to call, and their parts."""
        self._same = (
            self.n_threads,
            self._counters,
            self._shape,
            self._weights,
            self._scratch,
        )
        self._parts = np.array(machine_code.parts(self._same), np.int64)
        self._last = None

    def _new_logits(self, n: int) -> NDArray[np.float32]:
        return np.empty((n, 16 * self._n_tiles), np.float32)

    def _checked(self, ids: Ids, cache: KVCache) -> NDArray[np.int32]:
        if not len(ids):
            raise ValueError("no ids")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise ValueError("an id is outside the vocabulary")
        if cache.length + len(ids) > cache.capacity:
            raise ValueError(
                f"{cache.length} + {len(ids)} tokens exceed the cache's {cache.capacity}"
            )
        return np.ascontiguousarray(ids, np.int32)

    def forward(
        self,
        ids: Ids,
        cache: KVCache,
        *,
        n_best: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Appends ids to the cache -> logits after the last one, float32 (vocab_size,).

        n_best: how many of the largest logits are wanted; of the others some may then be -inf. 0
        wants all. Works in chunks; `progress` is called after each with the number of ids done.
        Raises ValueError when ids are empty, unknown or more than the cache holds.
        """
        array, logits = self._checked(ids, cache), self._new_logits(1)
        for start in range(0, len(array), self.chunk_size):
            chunk = array[start : start + self.chunk_size]
            done = start + len(chunk)
            self._run([chunk], [cache], [int(done == len(array))], logits, n_best)
            if progress:
                progress(done)
        return logits[0, : self.config.vocab_size]

    def forward_each(self, ids: Ids, cache: KVCache, *, n_best: int = 0) -> NDArray[np.float32]:
        """Appends up to MOST_ROWS ids to the cache -> logits after each, (len(ids), vocab_size).

        The same bits as `forward` gives, id by id. Raises ValueError as forward does.
        """
        array, logits = self._checked(ids, cache), self._new_logits(len(ids))
        self._run([array], [cache], [len(array)], logits, n_best)
        return logits[:, : self.config.vocab_size]

    @property
    def batch_tokens(self) -> int:
        """Ids that `forward_batch` takes at once.

        Matrix units round inputs in another way than is done for few tokens. With these alone, it
        makes no difference to an answer what others there are beside it.
        """
        return min(FEW, self.chunk_size) if isa.AMX else self.chunk_size

    def forward_batch(
        self, runs: Sequence[Ids], caches: Sequence[KVCache], *, n_best: int = 0
    ) -> NDArray[np.float32]:
        """Appends ids to each of up to MOST_ROWS caches -> logits after the last of each,
        (len(caches), vocab_size). There are up to `batch_tokens` ids in all.

        The same bits as `forward` gives for each alone. The caches are of one kind and context.
        Raises ValueError as forward does.
        """
        arrays = [self._checked(ids, cache) for ids, cache in zip(runs, caches, strict=True)]
        n_ids = sum(len(array) for array in arrays)
        if n_ids > self.batch_tokens:
            raise ValueError(f"{n_ids} ids for several caches are too many")
        logits = self._new_logits(len(caches))
        self._run(arrays, caches, [1] * len(arrays), logits, n_best)
        return logits[:, : self.config.vocab_size]

    def forward_all(
        self, ids: Ids, cache: KVCache, first: int = 0
    ) -> Iterator[NDArray[np.float32]]:
        """Appends ids to the cache, giving the logits after each id from ids[first] on.

        Yields blocks (n, vocab_size) of float32, in order; a block's memory is used again for the
        next. Raises ValueError as forward does.
        """
        array = self._checked(ids, cache)
        size = min(self.chunk_size, 32)  # 262,144 logits of 32 positions are 34 MB.
        logits = self._new_logits(size)
        starts = [*range(0, first, self.chunk_size), *range(first, len(array), size), len(array)]
        for start, stop in pairwise(starts):
            wanted = stop - start if start >= first else 0
            self._run([array[start:stop]], [cache], [wanted], logits)
            if wanted:
                yield logits[:wanted, : self.config.vocab_size]
