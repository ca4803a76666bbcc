"""The runtime: token ids to logits. It knows no text and no terminal."""

from gemma_cli.runtime import isa  # noqa: F401, I001 -- before Numba, which reads the target CPU

import numba

from gemma_cli.runtime.compilation import FOLDER

# Read by every `cache=True` below this package.
numba.config.CACHE_DIR = str(FOLDER)

from gemma_cli.runtime.kv_cache import KVCache  # noqa: E402
from gemma_cli.runtime.model import Model  # noqa: E402

__all__ = ["KVCache", "Model"]
