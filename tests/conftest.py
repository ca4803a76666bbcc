"""What tests of the command line share."""

import io
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from program import CONTEXT, GOLDEN, Cli, Result, load

from gemma_cli.cli.main import execute
from gemma_cli.runtime import compilation
from gemma_cli.text.chat import stop_ids
from gemma_cli.text.tokenizer import Tokenizer
from quantize.checkpoint import open_checkpoint
from quantize.pipeline import quantize

# The same examples in every run: what fails is what was changed.
settings.register_profile("seeded", derandomize=True)
settings.load_profile("seeded")

# What runs the tests in the background, or under nohup, may have these ignored, which the program
# respects and hands on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `$GEMMA_CLI_HOME` with two models: `base`, and `chat` with a long context; and outside the
    models' folder `endless`, whose greedy answers do not end."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "cache").mkdir(mode=0o700)
    (folder / "cache" / "kernels").symlink_to(compilation.FOLDER.parent)  # compiled once for all
    base = GOLDEN / "gemma-mha"
    quantize(open_checkpoint(base), folder / "models" / "base.safetensors", bits=32)
    chat = folder / "checkpoint"
    shutil.copytree(GOLDEN / "gemma3-shards", chat)
    (chat / "tokenizer_config.json").write_text('{"chat_template": "not rendered"}')
    config = json.loads((chat / "config.json").read_text())
    (chat / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    quantize(open_checkpoint(chat), folder / "models" / "chat.safetensors", bits=32)
    never_end(chat)
    quantize(open_checkpoint(chat), folder / "endless.safetensors", bits=32)
    model = load(folder, "base")[0]
    model.forward([2], model.new_cache(1))  # compiles, if that was not done yet
    return folder


def never_end(checkpoint: Path) -> None:
    """Makes the embeddings of a checkpoint's stop ids zero, and so their logits."""
    ids = stop_ids(Tokenizer((checkpoint / "tokenizer.model").read_bytes()))
    name = "model.embed_tokens.weight"
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    shard = checkpoint / index["weight_map"][name]
    data = bytearray(shard.read_bytes())
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])[name]
    row = 2 * entry["shape"][1]  # bfloat16
    for token in ids:
        start = 8 + length + entry["data_offsets"][0] + token * row
        data[start : start + row] = bytes(row)
    shard.write_bytes(data)


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
