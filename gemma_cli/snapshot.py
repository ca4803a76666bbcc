"""What a model's cache holds, on the disk: read again in far less time than computed again.

A snapshot is a safetensors file (https://github.com/huggingface/safetensors): `ids` (n,) int32, the
tokens, and the arrays of a `CacheState`. Its metadata bind it to the model file, to the CPU and the
code that computed it, and to its own bytes. One that does not match is ignored: what it would have
given is computed again, and the answers are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gemma_cli.runtime.compilation import FOLDER
from gemma_cli.runtime.kv_cache import CacheState, KVCache
from gemma_cli.space import make_room

if TYPE_CHECKING:
    from quantize.modelfile import ModelFile

VERSION = "1"

LARGEST = 2**30
"""Bytes of a snapshot; what needs more is computed again."""


_LARGEST_HEADER = 10_000_000


def save(path: Path, file: ModelFile, cache: KVCache, ids: Sequence[int]) -> bool:
    """Writes what the cache holds, `ids`; tells whether there was room for it.

    A snapshot is replaced as a whole, and goes where there is no room. Raises OSError.
    """
    state = cache.state()
    if state.length != len(ids):
        raise ValueError(f"the cache holds {state.length} tokens, not {len(ids)}")
    n_bytes = sum(array.nbytes for array in state.arrays.values())
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not ids or n_bytes > LARGEST or not make_room(path.parent, n_bytes):
        path.unlink(missing_ok=True)
        return False
    arrays = {name: np.ascontiguousarray(array) for name, array in state.arrays.items()}
    arrays["ids"] = np.array(ids, np.int32)
    metadata = {
        "format": "gemma-cli snapshot",
        "version": VERSION,
        "model": model_key(file),
        "reach": str(state.reach),
        "ring": str(state.ring),
        "sha256": _digest(arrays),
    }
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        save_file(arrays, partial, metadata)
        os.replace(partial, path)
    except SafetensorError as error:  # it could not be written
        partial.unlink(missing_ok=True)
        raise OSError(str(error)) from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return True


def restore(path: Path, file: ModelFile, cache: KVCache) -> list[int]:
    """Fills the cache with what a snapshot holds; returns the ids.

    Returns none, and the cache is empty, if there is no snapshot that matches.
    """
    cache.clear()
    try:
        if not path.is_file() or path.stat().st_size > LARGEST + _LARGEST_HEADER:
            return []  # a pipe would not end, and so much was never written
        with safe_open(path, framework="numpy") as snapshot:
            metadata = snapshot.metadata()
            if (metadata["version"], metadata["model"]) != (VERSION, model_key(file)):
                return []
            arrays = {name: snapshot.get_tensor(name) for name in snapshot.keys()}  # noqa: SIM118
        if metadata["sha256"] != _digest(arrays):
            return []
        ids_read = arrays.pop("ids")
        if ids_read.dtype != np.int32 or ids_read.ndim != 1:
            return []
        ids: list[int] = ids_read.tolist()
        reach, ring = int(metadata["reach"]), int(metadata["ring"])
        cache.restore(CacheState(len(ids), reach, ring, arrays))
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError):
        cache.clear()
        return []
    with suppress(OSError):
        os.utime(path)  # it is the last one that was used
    return ids


def model_key(file: ModelFile) -> str:
    """A hash of all that the numbers in a cache depend on, besides the tokens."""
    what = json.dumps([sorted(file.sha256.items()), FOLDER.name])
    return hashlib.sha256(what.encode()).hexdigest()


def _digest(arrays: Mapping[str, NDArray[np.generic]]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.view(np.uint8).data if array.size else b"")
    return digest.hexdigest()
