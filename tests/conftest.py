"""What tests of the command line share."""

import io
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from program import CONTEXT, GOLDEN, Cli, Result, load

from gemma_cli.cli.main import execute
from gemma_cli.runtime import compilation
from quantize.checkpoint import open_checkpoint
from quantize.pipeline import quantize


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `$GEMMA_CLI_HOME` with two models: `base`, and `chat` with a long context."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "cache").mkdir()
    (folder / "cache" / "kernels").symlink_to(compilation.FOLDER.parent)  # compiled once for all
    base = GOLDEN / "gemma-mha"
    quantize(open_checkpoint(base), folder / "models" / "base.safetensors", bits=32)
    chat = folder / "checkpoint"
    shutil.copytree(GOLDEN / "gemma3-shards", chat)
    (chat / "tokenizer_config.json").write_text('{"chat_template": "not rendered"}')
    config = json.loads((chat / "config.json").read_text())
    (chat / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    quantize(open_checkpoint(chat), folder / "models" / "chat.safetensors", bits=32)
    model = load(folder, "base")[0]
    model.forward([2], model.new_cache(1))  # compiles, if that was not done yet
    return folder


@pytest.fixture
def cli(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Iterator[Cli]:
    """Runs the program in this process."""
    monkeypatch.setenv("GEMMA_CLI_HOME", str(home))
    monkeypatch.delenv("GEMMA_CLI_MODEL", raising=False)
    handler = signal.getsignal(signal.SIGPIPE)

    def run(*args: str | Path, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["gemma-cli", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = execute()
        out, err = capfdbinary.readouterr()
        return Result(status, out.decode("utf-8", "surrogateescape"), err.decode())

    yield run
    signal.signal(signal.SIGPIPE, handler)
