"""Compiled kernels on the disk: where they lie, and whether they are there.

Numba notices a change of the file that a cached function stands in, but not of what it calls in
other files, nor of another CPU's features. So the folder's name is a hash of all that the machine
code depends on.
"""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import llvmlite.binding as llvm

from gemma_cli.models import cache_folder
from gemma_cli.runtime import isa


def _folder() -> Path:
    """The folder of this machine's kernels, of these very sources."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    cpu = (llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), isa.NAME)
    versions = (version("numba"), version("llvmlite"), version("numpy"), platform.python_version())
    digest.update(repr((cpu, versions)).encode())
    return cache_folder() / "kernels" / digest.hexdigest()[:16]


FOLDER = _folder()
"""Where this process looks for its kernels and keeps them."""


def needs_compiling() -> bool:
    """Whether the next use of the runtime compiles its kernels, for half a minute at most."""
    return not any(FOLDER.glob("**/*.nbi"))
