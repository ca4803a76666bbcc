"""The keys and values of the tokens so far, for every layer.

A layer with a sliding window keeps a ring of the window's tokens and one chunk more, so that the
tokens of a chunk are written before the first of them is attended to; other layers keep the whole
context. Position p lies in slot p modulo the layer's capacity, a multiple of BLOCK.

A layer's memory, head by head, so that a head's tokens are one stream:

    keys    (n_kv_heads, capacity / BLOCK, head_dim, BLOCK): a tile's tokens side by side, as the
            rows of a weight matrix are, so that a vector register holds the scores of 16 tokens
    values  (n_kv_heads, capacity, head_dim)
    scales  (n_kv_heads, capacity) for keys, the same for values; int8 only
"""

import numpy as np
from numpy.typing import NDArray

from quantize.config import GemmaConfig

# Columns of the table that describes the cache to the kernels, a row a layer, int64. Scales are
# there for int8 only.
KEYS, VALUES, KEY_SCALES, VALUE_SCALES, CAPACITY = range(5)
N_COLUMNS = 5

KINDS = {"f16": np.float16, "int8": np.int8}

BLOCK = 16
"""Positions of a tile of keys; none lies across the end of a ring."""


class KVCache:
    """Keys and values of `length` tokens, float16 or int8 with one scale for a head and token.

    Memory is taken from the operating system as it is first used.
    """

    def __init__(self, config: GemmaConfig, context: int, kind: str, chunk_size: int) -> None:
        self.config = config
        self.context = context
        self.kind = kind
        self.chunk_size = chunk_size
        self.length = 0
        self._capacities = [
            -(-min(context, config.sliding_window + chunk_size if slides else context) // BLOCK)
            * BLOCK
            for slides in config.sliding_layers
        ]
        heads = sum(self._capacities) * config.n_kv_heads
        values = heads * config.head_dim
        self._data = np.zeros((2, values), KINDS[kind])
        self._scales = np.zeros((2, heads if kind == "int8" else 0), np.float32)
        self.table = self._table()

    def _table(self) -> NDArray[np.int64]:
        table = np.zeros((self.config.n_layers, N_COLUMNS), np.int64)
        slots = 0
        for layer, capacity in enumerate(self._capacities):
            heads = slots * self.config.n_kv_heads
            values = heads * self.config.head_dim
            for column in (KEYS, VALUES):
                table[layer, column] = self._data[column, values:].ctypes.data
            if self.kind == "int8":
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
        twin.length = self.length
        slots = 0
        for capacity in self._capacities:
            layer = slice(slots, slots + capacity)
            used = -(-min(self.length, capacity) // BLOCK) * BLOCK
            for copied, original in zip(twin._heads(layer), self._heads(layer), strict=True):
                copied[:, :, :used] = original[:, :, :used]
            slots += capacity
        return twin

    def _heads(self, slots: slice) -> list[NDArray[np.generic]]:
        """A layer's memory, (2 keys or values, n_kv_heads, capacity, ...); scales where there are.

        Keys lie in tiles of BLOCK slots, so slots up to a multiple of BLOCK are the same memory.
        """
        n, size = self.config.n_kv_heads, self.config.head_dim
        start, stop = slots.start * n, slots.stop * n
        data = self._data[:, start * size : stop * size].reshape(2, n, -1, size)
        scales = self._scales[:, start:stop]
        return [data, scales.reshape(2, n, -1)] if scales.size else [data]

    def clear(self) -> None:
        self.length = 0

    def truncate(self, length: int) -> None:
        """Forgets the tokens after the first `length`.

        Raises ValueError where a sliding window has already overwritten what the shorter context
        would attend to; clear it then, and start again.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} tokens to {length}")
        for capacity in set(self._capacities) if length else ():
            oldest_needed = max(0, length + 1 - self.config.sliding_window)
            if capacity < self.context and oldest_needed < self.length - capacity:
                raise ValueError(f"the sliding window no longer holds token {oldest_needed}")
        self.length = length
