"""Model files that were found whole: one is read through when it is first used, and again when it
has changed since. A note for each lies in the cache folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.cache import cache_folder, make_folder
from quantize.errors import GemmaError

if TYPE_CHECKING:
    from quantize.modelfile import ModelFile

NAMED = 5  # damaged tensors


def was_found_whole(file: ModelFile) -> bool:
    """Whether every checksum was compared since the file was last written to, by its time."""
    try:
        return _note(file).read_text() == _state(file)
    except OSError:
        return False


def check(file: ModelFile, progress: Callable[[int], None] | None = None) -> None:
    """Compares every checksum with what is there; progress: as for `ModelFile.damaged_tensors`.

    Raises GemmaError if some do not agree.
    """
    damaged = file.damaged_tensors(progress)
    if damaged:
        more = f" and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        raise GemmaError(
            f"{file.path} is damaged: {', '.join(damaged[:NAMED])}{more} of {len(file.tensors)} "
            "tensors do not have their checksums; convert the checkpoint again."
        )
    note = _note(file)
    make_folder(note.parents[1])
    with suppress(OSError):
        note.parent.mkdir(mode=0o700, exist_ok=True)
        note.write_text(_state(file))


def _note(file: ModelFile) -> Path:
    """Where it is told of a file, whatever its name becomes."""
    return cache_folder() / "whole" / f"{file.state.device:x}-{file.state.inode:x}"


def _state(file: ModelFile) -> str:
    return f"{file.state.size} {file.state.modified_ns}\n"
