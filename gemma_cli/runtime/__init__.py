"""The runtime: token ids to logits. It knows no text and no terminal."""

from gemma_cli.runtime import isa  # noqa: F401, I001 -- before Numba, which reads the target CPU

from gemma_cli.runtime.kv_cache import KVCache
from gemma_cli.runtime.model import Model

__all__ = ["KVCache", "Model"]
