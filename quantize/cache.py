"""The folder for what can be made again: where it is, and who may write there."""

import os
import stat
import sys
from pathlib import Path

from quantize.errors import GemmaError


def cache_folder() -> Path:
    """`$GEMMA_CLI_HOME/cache`, else the platform's folder for what can be made again."""
    if home := os.environ.get("GEMMA_CLI_HOME"):
        return Path(home) / "cache"
    import platformdirs  # noqa: PLC0415 (not needed by most commands)

    return platformdirs.user_cache_path("gemma-cli", appauthor=False)


def make_folder(folder: Path, *, may_be_read: bool = True) -> None:
    """Makes a folder; raises GemmaError if there is one that others can write to.

    Whoever can write above it could put another in its place, but none that this user owns.
    """
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.stat()
    except OSError:  # Then nothing is kept, and nothing is read.
        return
    if sys.platform == "win32":  # whose permissions are not in these bits
        return
    owners = (os.geteuid(), 0) if may_be_read else (os.geteuid(),)
    forbidden = stat.S_IWGRP | stat.S_IWOTH if may_be_read else stat.S_IRWXG | stat.S_IRWXO
    if about.st_uid not in owners or about.st_mode & forbidden:
        raise GemmaError(
            f"{folder} is for machine code that gemma-cli runs, and others can write there; delete "
            "it, or set GEMMA_CLI_HOME to a folder of your own."
        )
