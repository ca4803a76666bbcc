"""Checkpoints, one reader for each kind of source, all behind one record."""

from pathlib import Path

from quantize.checkpoint.source import Checkpoint, Grid, SourceTensor
from quantize.errors import GemmaError

__all__ = ["Checkpoint", "Grid", "SourceTensor", "open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a folder of Hugging Face or Kaggle, or a file of one, or GGUF.

    Nothing but headers and small files is read; tensors are mapped. Raises GemmaError if the
    checkpoint is absent, damaged, incomplete or not a Gemma that can be run.
    """
    try:
        return _open(path)
    except OSError as error:
        raise GemmaError(f"{path} cannot be read ({error}); check the file.") from error


def _open(path: Path) -> Checkpoint:
    # Only the reader that is needed: the gguf package takes a fifth of a second to import.
    from quantize.checkpoint import (  # noqa: PLC0415
        elsewhere,
        safetensors,
        torch_ckpt,
        torch_file,
    )

    if path.is_dir():
        if safetensors.is_in(path):
            return safetensors.open_hugging_face(path)
        if torch_ckpt.is_in(path):
            return torch_ckpt.open_torch(path)
        elsewhere.refuse_other_formats(path)
        return safetensors.open_hugging_face(path)
    start = _first_bytes(path)
    if path.suffix == ".gguf" or start.startswith(b"GGUF"):
        from quantize.checkpoint.gguf import open_gguf  # noqa: PLC0415

        return open_gguf(path)
    # After the length of its header, a safetensors file goes on with a JSON object.
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return safetensors.open_hugging_face(path.parent, path)
    elsewhere.refuse_other_formats(path)
    if path.suffix in torch_ckpt.SUFFIXES or start.startswith(torch_file.ZIP_MAGIC):
        return torch_ckpt.open_torch(path.parent, path)
    if not path.exists():
        raise GemmaError(f"{path} does not exist; check the path.")
    raise GemmaError(
        f"{path} is not a checkpoint that can be read; give a folder of Hugging Face or Kaggle, or"
        " a .safetensors, .ckpt or .gguf file."
    )


def _first_bytes(path: Path) -> bytes:
    """Model stores keep files under their checksums, without a suffix."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(9)
