"""Compiled kernels on the disk: where they lie, and who may write there.

Numba notices a change of the file that a cached function stands in, but not of what it calls in
other files, nor of another CPU's features. So a folder's name is a hash of all that the machine
code depends on. What lies there is unpickled and run: nobody else may have put it there.
"""

import hashlib
import os
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from quantize.cache import cache_folder, make_folder


def kernels_folder(sources: Iterable[Path], *more: str) -> Path:
    """The folder of this machine's kernels, of these very sources and whatever `more` says.

    It is made, for this user alone, where that is possible. Raises GemmaError if others can write
    to it or to what it lies in.
    """
    digest = hashlib.sha256()
    for source in sorted(sources):
        digest.update(source.name.encode() + source.read_bytes())
    cpu = (llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), *more)
    versions = (version("numba"), version("llvmlite"), version("numpy"), platform.python_version())
    digest.update(repr((cpu, versions)).encode())
    cache = cache_folder()
    kernels = cache / "kernels"
    folder = kernels / digest.hexdigest()[:16]
    make_folder(cache)
    make_folder(kernels)
    # Numba's files have the permissions of any new file: what is above them keeps others out.
    make_folder(folder, may_be_read=False)
    return folder


def cached(folder: Path, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that compiles for callers in Python and keeps the code in a `kernels_folder`.

    Other threads run meanwhile, and a division by zero gives an infinity, as in NumPy. Where
    nothing can be written, the function is compiled in each process.
    """

    import numba  # noqa: PLC0415 (takes a quarter of a second, and who only asks where needs none)

    def compile_for(function: Callable[..., Any]) -> Any:
        # Numba asks for the folder when a function is decorated, and would fall back on others.
        others, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
        try:
            decorate = numba.njit(
                cache=os.access(folder, os.W_OK), nogil=True, error_model="numpy", **options
            )
            return decorate(function)
        finally:
            numba.config.CACHE_DIR = others

    return compile_for


FOLDER = kernels_folder(Path(__file__).parent.glob("*.py"))
"""Where this process looks for the quantizer's kernels and keeps them."""
