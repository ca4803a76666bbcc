"""The keys and values of the tokens so far, for every layer.

A layer with a sliding window keeps a ring of the window's tokens and one chunk more, so that the
tokens of a chunk are written before the first of them is attended to; other layers keep the whole
context. Position p lies in slot p modulo the layer's capacity, a multiple of BLOCK.

A layer's memory, head by head, so that a head's tokens are one stream:

    keys    (n_kv_heads, capacity / BLOCK, head_dim / 2, BLOCK, 2): a tile's tokens side by side, as
            the rows of a weight matrix are, so that a vector register holds the scores of 16
            tokens, and two inputs of each, which an instruction multiplies and sums
    values  (n_kv_heads, capacity / 2, head_dim, 2): two tokens side by side
    scales  (n_kv_heads, capacity) for keys, the same for values

What is stored are integers of 16 or 8 bits. `attention` says how they are rounded.
"""

import mmap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantize.config import GemmaConfig
from quantize.memory import check_memory

# Columns of the table that describes the cache to the kernels, a row a layer, int64.
KEYS, VALUES, KEY_SCALES, VALUE_SCALES, CAPACITY = range(5)
N_COLUMNS = 5

KINDS: dict[str, type[np.generic]] = {"f16": np.int16, "int8": np.int8}
"""What keys and values are stored as. "f16" is what the command line calls 16 bits, which with a
scale are closer than a float16's 11."""

BLOCK = 16
"""Positions of a tile of keys; none lies across the end of a ring."""

_LARGE = 1 << 22  # bytes of a NumPy array for which it asks for large pages

_SMALL = 1 << 20  # bytes that a stream begins with, in small pages


@dataclass(frozen=True, slots=True)
class CacheState:
    """What a cache holds of `length` tokens.

    `arrays` has each layer's slots in use, `layers.N` (2 keys or values, n_kv_heads, slots,
    head_dim) and `scales.N` (2, n_kv_heads, slots). A ring of `ring` slots (0: there is none) has
    lost the tokens before the last `ring` of the `reach` that it once had.
    """

    length: int
    reach: int
    ring: int
    arrays: Mapping[str, NDArray[np.generic]]


def _capacities(config: GemmaConfig, context: int, chunk_size: int) -> list[int]:
    """The slots of each layer."""
    ring = config.sliding_window + chunk_size
    slots = [min(context, ring if slides else context) for slides in config.sliding_layers]
    return [-(-n // BLOCK) * BLOCK for n in slots]


def count_bytes(config: GemmaConfig, context: int, kind: str, chunk_size: int) -> int:
    """The size of a KVCache."""
    heads = 2 * sum(_capacities(config, context, chunk_size)) * config.n_kv_heads
    return heads * (config.head_dim * KINDS[kind]().itemsize + 4)


def _zeros(streams: list[int], n_kv_heads: int, dtype: type[np.generic]) -> NDArray[Any]:
    """Zeros (2, all) for a layer's streams of so many values, one for each key head.

    NumPy would ask for pages of 2 MB, and a system clears one whole when it is first used: a few
    tokens, which use a little of every stream, take longer to be stored than to be read. So a
    stream begins with small pages.
    """
    size = dtype().itemsize
    n_bytes = 2 * size * n_kv_heads * sum(streams)
    if n_bytes < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.zeros((2, n_kv_heads * sum(streams)), dtype)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system that has one size of pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        start = 0
        for stream in 2 * [n for n in streams for _ in range(n_kv_heads)]:
            stop = start + stream * size
            large = -(-(start + _SMALL) // mmap.PAGESIZE) * mmap.PAGESIZE
            if large < stop:
                memory.madvise(mmap.MADV_HUGEPAGE, large, stop - large)
            start = stop
    return np.frombuffer(memory, dtype).reshape(2, -1)


class KVCache:
    """Keys and values of `length` tokens, int16 or int8 with one scale for a head and token.

    Memory is taken from the operating system as it is first used; but if it does not have all of
    it at the beginning, that raises GemmaError.
    """

    def __init__(self, config: GemmaConfig, context: int, kind: str, chunk_size: int) -> None:
        self.config = config
        self.context = context
        self.kind = kind
        self.chunk_size = chunk_size
        self.length = 0
        self._reach = 0  # the most tokens before the last truncation
        self._capacities = _capacities(config, context, chunk_size)
        check_memory(
            count_bytes(config, context, kind, chunk_size),
            f"A context of {context} tokens takes",
            "choose a smaller one with -c/--context" + (", or --kv int8" if kind == "f16" else ""),
        )
        heads = sum(self._capacities) * config.n_kv_heads
        streams = [capacity * config.head_dim for capacity in self._capacities]
        self._data = _zeros(streams, config.n_kv_heads, KINDS[kind])
        self._scales = np.zeros((2, heads), np.float32)
        self.table = self._table()

    def _table(self) -> NDArray[np.int64]:
        table = np.zeros((self.config.n_layers, N_COLUMNS), np.int64)
        slots = 0
        for layer, capacity in enumerate(self._capacities):
            heads = slots * self.config.n_kv_heads
            values = heads * self.config.head_dim
            for column in (KEYS, VALUES):
                table[layer, column] = self._data[column, values:].ctypes.data
            table[layer, KEY_SCALES] = self._scales[0, heads:].ctypes.data
            table[layer, VALUE_SCALES] = self._scales[1, heads:].ctypes.data
            table[layer, CAPACITY] = capacity
            slots += capacity
        return table

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.context

    @property
    def nbytes(self) -> int:
        return self._data.nbytes + self._scales.nbytes

    def copy(self) -> "KVCache":
        """A cache of its own with the same tokens in it."""
        twin = KVCache(self.config, self.context, self.kind, self.chunk_size)
        twin.restore(self.state())
        return twin

    def state(self) -> CacheState:
        """What is in the cache; the arrays are views of its memory."""
        reach = max(self._reach, self.length)
        return CacheState(self.length, reach, self._ring, self._arrays(self.length))

    def restore(self, state: CacheState) -> None:
        """Holds from now on what a cache of the same model and kind held.

        Its context may be another. Raises ValueError if the state does not fit; the cache is empty
        then.
        """
        self.clear()
        if not 0 < state.length <= min(state.reach, self.context):
            raise ValueError(f"{state.length} tokens do not fit a context of {self.context}")
        whole = state.reach <= state.ring or not state.ring  # no ring has lost anything
        if state.ring != self._ring and not whole:
            raise ValueError(f"a ring of {state.ring} tokens is not one of {self._ring}")
        own = self._arrays(state.length)
        if own.keys() != state.arrays.keys():
            raise ValueError("the state has other layers")
        for name, memory in own.items():
            array = state.arrays[name]
            if (array.shape, array.dtype) != (memory.shape, memory.dtype):
                raise ValueError(f"{name} is {array.dtype} {array.shape}")
        for name, memory in own.items():
            memory[:] = state.arrays[name]
        self.length = state.length
        self._reach = state.length if whole else state.reach

    def find_overflow(self, new: int) -> int | None:
        """The first layer of which keys or values are infinite or no numbers, also of so many new
        tokens that are not counted yet."""
        for name, array in self._arrays(self.length + new).items():
            if name.startswith("scales") and not np.isfinite(array).all():
                return int(name.partition(".")[2])
        return None

    @property
    def _ring(self) -> int:
        pairs = zip(self._capacities, self.config.sliding_layers, strict=True)
        return max((capacity for capacity, slides in pairs if slides), default=0)

    def _arrays(self, length: int) -> dict[str, NDArray[np.generic]]:
        """The memory of each layer that `length` tokens take, as `CacheState` has it."""
        arrays, slots = {}, 0
        for layer, capacity in enumerate(self._capacities):
            heads = self._heads(slice(slots, slots + capacity))
            used = -(-min(length, capacity) // BLOCK) * BLOCK
            for name, memory in zip(("layers", "scales"), heads, strict=True):
                arrays[f"{name}.{layer}"] = memory[:, :, :used]
            slots += capacity
        return arrays

    def _heads(self, slots: slice) -> list[NDArray[np.generic]]:
        """A layer's memory and its scales, (2 keys or values, n_kv_heads, capacity, ...).

        Keys lie in tiles of BLOCK slots, so slots up to a multiple of BLOCK are the same memory.
        """
        n, size = self.config.n_kv_heads, self.config.head_dim
        start, stop = slots.start * n, slots.stop * n
        data = self._data[:, start * size : stop * size].reshape(2, n, -1, size)
        scales = self._scales[:, start:stop]
        return [data, scales.reshape(2, n, -1)]

    def clear(self) -> None:
        self.length = self._reach = 0

    def truncate(self, length: int) -> None:
        """Forgets the tokens after the first `length`.

        Raises ValueError where a sliding window has already overwritten what the shorter context
        would attend to; clear it then, and start again.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} tokens to {length}")
        reach = max(self._reach, self.length)
        oldest_needed = max(0, length + 1 - self.config.sliding_window)
        if length and self._ring and oldest_needed < reach - self._ring:
            raise ValueError(f"the sliding window no longer holds token {oldest_needed}")
        self.length = length
        self._reach = reach if length else 0
