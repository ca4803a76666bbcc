"""Downloads of Gemma that are for other programs: which one to take instead."""

from fnmatch import fnmatch
from pathlib import Path

from quantize.errors import GemmaError

# What files are called in them.
_FORMATS = {
    "Flax (an Orbax checkpoint)": ("_METADATA", "manifest.ocdbt", "checkpoint"),
    "Keras": ("*.weights.h5", "*.h5", "*.keras", "preprocessor.json"),
    "gemma.cpp": ("*.sbs",),
    "LiteRT (TensorFlow Lite)": ("*.tflite", "*.task", "*.litertlm"),
}


def refuse_other_formats(path: Path) -> None:
    """Raises GemmaError if a file, or what a folder or its subfolders hold, has such a format."""
    # Flax has its files in a folder of their own, beside the tokenizer.
    found = [*path.glob("*"), *path.glob("*/*")] if path.is_dir() else [path]
    names = [file.name for file in found if file.is_file()]
    for kind, patterns in _FORMATS.items():
        if any(fnmatch(name, pattern) for name in names for pattern in patterns):
            raise GemmaError(
                f"{path} is a checkpoint for {kind}, which is not read; take the same model's"
                ' "Transformers" or "PyTorch" download on Kaggle, its folder on Hugging Face, or a'
                " GGUF file."
            )
