"""Checkpoints, one reader for each kind of source, all behind one record."""

from pathlib import Path

from quantize.checkpoint.source import Checkpoint, Grid, SourceTensor
from quantize.errors import GemmaError

__all__ = ["Checkpoint", "Grid", "SourceTensor", "open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a Hugging Face folder, a safetensors file in one, or a GGUF file.

    Nothing but headers and small files is read; tensors are mapped. Raises GemmaError if the
    checkpoint is absent, damaged, incomplete or not a Gemma that can be run.
    """
    try:
        return _open(path)
    except OSError as error:
        raise GemmaError(f"{path} cannot be read ({error}); check the file.") from error


def _open(path: Path) -> Checkpoint:
    # The gguf package alone takes a fifth of a second to import: only where it is needed.
    if path.is_dir() or path.suffix == ".safetensors":
        from quantize.checkpoint.safetensors import open_hugging_face  # noqa: PLC0415

        return open_hugging_face(path) if path.is_dir() else open_hugging_face(path.parent, path)
    if path.suffix == ".gguf" or _starts_with_gguf(path):
        from quantize.checkpoint.gguf import open_gguf  # noqa: PLC0415

        return open_gguf(path)
    if not path.exists():
        raise GemmaError(f"{path} does not exist; check the path.")
    raise GemmaError(
        f"{path} is not a checkpoint that can be read; give a Hugging Face folder, a .safetensors"
        " or a .gguf file."
    )


def _starts_with_gguf(path: Path) -> bool:
    """Model stores keep files under their checksums, without a suffix."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
