"""Where model files live, and which one `-m` means."""

import os
from collections.abc import Sequence
from pathlib import Path

from quantize.errors import GemmaError

SUFFIX = ".safetensors"
HOW_TO_GET_ONE = (
    "make one with `gemma-cli quantize SOURCE`, or try `gemma-cli quantize demo` "
    "(after `pip install 'gemma-cli[demo]'`)"
)


def models_folder() -> Path:
    """`$GEMMA_CLI_HOME/models`, else `models` in the platform's folder for user data."""
    if home := os.environ.get("GEMMA_CLI_HOME"):
        return Path(home) / "models"
    import platformdirs  # noqa: PLC0415 (not needed by most commands)

    return platformdirs.user_data_path("gemma-cli", appauthor=False) / "models"


def state_folder() -> Path:
    """`$GEMMA_CLI_HOME/state`, else the platform's folder for what programs remember of their
    use."""
    if home := os.environ.get("GEMMA_CLI_HOME"):
        return Path(home) / "state"
    import platformdirs  # noqa: PLC0415

    return platformdirs.user_state_path("gemma-cli", appauthor=False)


def config_path() -> Path:
    """The file of defaults: `$GEMMA_CLI_HOME/config.toml`, else in the platform's folder for
    configurations."""
    if home := os.environ.get("GEMMA_CLI_HOME"):
        return Path(home) / "config.toml"
    import platformdirs  # noqa: PLC0415

    return platformdirs.user_config_path("gemma-cli", appauthor=False) / "config.toml"


def list_models() -> list[Path]:
    """The model files in the models folder, by name; hidden files are other programs' or ours
    in the making."""
    found = models_folder().glob("*" + SUFFIX)
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def find_model(model: str | None) -> Path:
    """The file that `-m` means: a path, a name in the models folder, or (for None) the only one.

    Raises `GemmaError`, which says what there is to choose from.
    """
    models = list_models()
    if not model:
        if len(models) == 1:
            return models[0]
        if not models:
            raise GemmaError(f"There is no model in {models_folder()} yet: {HOW_TO_GET_ONE}.")
        raise GemmaError(
            f"There are {len(models)} models in {models_folder()}: choose one with -m, or set "
            f"GEMMA_CLI_MODEL ({names(models)})."
        )
    path = Path(model)
    if path.is_file():
        return path
    for candidate in models:
        if model in {candidate.name, candidate.stem}:
            return candidate
    if path.is_dir():
        raise GemmaError(
            f"{path} is a folder, not a model file: if it is a checkpoint, convert it first with "
            f"`gemma-cli quantize {path}`."
        )
    known = f"has {names(models)}" if models else f"is empty; {HOW_TO_GET_ONE}"
    raise GemmaError(f"{model} is neither a file nor a name in {models_folder()}, which {known}.")


def model_name(path: Path) -> str:
    """What `-m` finds the file by, from anywhere."""
    return path.stem if path.parent == models_folder() else str(path.absolute())


def names(models: Sequence[Path]) -> str:
    return ", ".join(model.stem for model in models)
