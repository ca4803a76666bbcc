"""How the runtime's functions are compiled.

A fifth of the time that the first run compiles for would go into wrappers for callers that there
are not. A division by zero gives an infinity, as in NumPy, so that no function can raise.
"""

from collections.abc import Callable
from typing import Any

from numba import njit

from gemma_cli.runtime.compilation import FOLDER
from quantize.compilation import cached


def kernel(function: Callable[..., Any]) -> Any:
    """A function that compiled code calls, and only that."""
    lean = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
    return lean(function)


def entry(function: Callable[..., Any]) -> Any:
    """A function that Python calls, kept on the disk; other threads run while it does."""
    return cached(FOLDER, no_cfunc_wrapper=True)(function)
