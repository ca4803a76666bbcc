"""Beginnings of prompts, read once and kept on the disk for other runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_cli import snapshot
from quantize.cache import cache_folder

if TYPE_CHECKING:
    from gemma_cli.runtime import KVCache, Model


def prompts_folder() -> Path:
    return cache_folder() / "prompts"


def restore_prefix(model: Model, cache: KVCache, prefix_ids: Sequence[int]) -> bool:
    """Fills the cache with a prompt's beginning, if that was kept; else the cache is empty."""
    path = _path(model, cache, prefix_ids)
    if snapshot.restore(path, model.file, cache) == list(prefix_ids):
        return True
    cache.clear()
    return False


def keep_prefix(model: Model, cache: KVCache, prefix_ids: Sequence[int]) -> bool:
    """Keeps what the cache holds, a prompt's beginning; tells whether there was room for it. What
    was used the longest ago goes first (`snapshot.save`)."""
    try:
        return snapshot.save(_path(model, cache, prefix_ids), model.file, cache, prefix_ids)
    except OSError:
        return False


def _path(model: Model, cache: KVCache, prefix_ids: Sequence[int]) -> Path:
    what = f"{snapshot.model_key(model.file)} {cache.kind} {list(prefix_ids)}"
    return prompts_folder() / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.safetensors"
