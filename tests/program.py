"""The program as tests run it, and the models that it is tried on."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma_cli.runtime import Model
from gemma_cli.text.tokenizer import Tokenizer
from quantize.modelfile import ModelFile

GOLDEN = Path(__file__).parent / "golden"
CONTEXT = 50_000


@dataclass
class Result:
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, object]:
        value: dict[str, object] = json.loads(self.out)
        return value


Cli = Callable[..., Result]


def program(home: Path) -> tuple[list[str], dict[str, str]]:
    """The command and the environment to run the program with `$GEMMA_CLI_HOME`."""
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"GEMMA_CLI_HOME": str(home), "PYTHONPATH": root, "TERM": "xterm"}
    return [sys.executable, "-m", "gemma_cli"], environment


def load(home: Path, name: str) -> tuple[Model, Tokenizer]:
    file = ModelFile.open(home / "models" / f"{name}.safetensors")
    return Model(file), Tokenizer(file.tokenizer_model)
