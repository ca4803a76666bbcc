"""The runtime's kernels on the disk, and whether they are there."""

from pathlib import Path

from gemma_cli.runtime import isa
from quantize.compilation import kernels_folder

FOLDER = kernels_folder(Path(__file__).parent.glob("*.py"), isa.NAME)
"""Where this process looks for its kernels and keeps them."""

FILE = FOLDER / "forward.o"
"""Those of a model, as machine_code.py keeps them."""


def needs_compiling() -> bool:
    """Whether the next use of a model compiles its kernels, for half a minute at most."""
    return not FILE.exists()
