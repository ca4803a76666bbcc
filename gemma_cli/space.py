"""Files that can be made again, and how much of the disk they may take."""

import shutil
import time
from contextlib import suppress
from pathlib import Path

BUDGET = 4 * 2**30
"""Bytes of such files in a folder."""

RESERVE = 2**30
"""Bytes of the disk that they leave to others."""

STALE = 3600
"""Seconds after which nobody writes to a partial file any more."""


def make_room(folder: Path, n_bytes: int, budget: int = BUDGET) -> bool:
    """Deletes files of the folder until there is room for n bytes more, those first that were used
    the longest ago; tells whether there is. What a run that was killed had begun goes, too."""
    for path in folder.glob("*.safetensors.partial"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()
    found = [(path.stat(), path) for path in folder.glob("*.safetensors")]
    taken = sum(about.st_size for about, _ in found)
    for about, path in sorted(found, key=lambda each: each[0].st_mtime_ns):
        free = shutil.disk_usage(folder).free
        if taken + n_bytes <= budget and free >= n_bytes + RESERVE:
            return True
        path.unlink(missing_ok=True)
        taken -= about.st_size
    return n_bytes <= budget and shutil.disk_usage(folder).free >= n_bytes + RESERVE
