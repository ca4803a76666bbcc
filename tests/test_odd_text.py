"""Texts and names that are meant for somebody else: for the terminal, the model, or the eye."""

import io
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoints import random_weights, tiny, write_hf
from program import Cli, load
from rich.console import Console
from tiny_tokenizer import train

from gemma_cli.cli import output
from gemma_cli.cli.answering import Form
from gemma_cli.cli.markdown import MarkdownScreen
from gemma_cli.runtime import Model, bandwidth
from gemma_cli.text.stream import StreamDecoder
from gemma_cli.text.tokenizer import Tokenizer
from quantize.errors import visible

TOKENIZER = Tokenizer(train())

# What a model could say to a terminal (ECMA-48; xterm's ctlseqs; OWASP LLM05).
ESCAPES = {
    "the clipboard (OSC 52)": b"\x1b]52;c;cm0gLXJmIC8=\x07",
    "the clipboard, ended by ST": b"\x1b]52;c;cm0gLXJmIC8=\x1b\\",
    "a link (OSC 8)": b"\x1b]8;;http://x.example\x1b\\https://y.example\x1b]8;;\x1b\\",
    "the title (OSC 0)": b"\x1b]0;root@host\x07",
    "a notification (OSC 9)": b"\x1b]9;4;1;50\x07",
    "an image (OSC 1337)": b"\x1b]1337;File=inline=1:AAAA\x07",
    "clear (CSI)": b"\x1b[2J\x1b[H",
    "a colour (CSI)": b"\x1b[31;1mred\x1b[0m",
    "the cursor up (CSI)": b"\x1b[5A\x1b[1000D",
    "another screen (CSI)": b"\x1b[?1049h",
    "a question (CSI)": b"\x1b[6n\x1b[c\x1b[21t",
    "bracketed paste (CSI)": b"\x1b[201~rm -rf /\r",
    "a macro (DCS)": b"\x1bP0;1|17/70776e\x1b\\",
    "a question (DCS)": b'\x1bP$q"p\x1b\\',
    "an image (sixel)": b"\x1bPq#0;2;0;0;0~-\x1b\\",
    "APC, PM, SOS": b"\x1b_Gi=1;AAAA\x1b\\\x1b^x\x1b\\\x1bXx\x1b\\",
    "reset": b"\x1bc\x1b#8\x1b(0",
    "C1 in UTF-8": "\x9b2J \x9d52;c;AA\x07 \x90q\x9c \x85 \x84".encode(),
    "C1 as bytes": b"\x9b2J \x9d0;x\x07 \x90q\x9c",
    "over what was written": b"safe\rrm -rf /\b\b\b\x7f\x0b\x0c",
    "rings and shifts": b"\x07\x05\x0e\x0f\x00\x18\x1a",
    "escapes in escapes": b"\x1b\x1b[\x1b]2J\x1b[\x9b2J",
}


def cuts(data: bytes) -> Iterator[list[int]]:
    """The ids of some bytes cut in two anywhere, and of each byte by itself."""
    for at in range(len(data) + 1):
        yield TOKENIZER.encode(data[:at]) + TOKENIZER.encode(data[at:])
    yield [TOKENIZER.encode(b"\xff")[0] - 0xFF + byte for byte in data]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def streamed(ids: Sequence[int], write: Callable[[str], Any]) -> None:
    decoder, form = StreamDecoder(TOKENIZER), Form(False, False, False, False, write)
    for token in ids:
        form.piece(decoder.push(token))
    form.piece(decoder.flush())


@pytest.mark.parametrize("data", ESCAPES.values(), ids=ESCAPES)
def test_a_model_cannot_command_a_terminal(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    text = data.decode("utf-8", "surrogateescape")
    for ids in cuts(data):
        assert TOKENIZER.decode(ids) == text
        screen = Screen()
        monkeypatch.setattr(sys, "stdout", screen)
        streamed(ids, output.write)
        shown = screen.getvalue()
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", shown)
        assert shown == output.clean(text)
        out = io.StringIO()
        markdown = MarkdownScreen(out, lambda: (80, 24), Console(file=out, color_system=None))
        streamed(ids, markdown.write)
        markdown.close()
        own = re.sub(r"\x1b\[(\d+A|K|J)|[\n\r]", "", out.getvalue())
        assert not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", own)


# Control tokens


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids that a model is given to read."""
    read: list[list[int]] = []

    def forward(self: Model, ids: Any, *args: Any, real: Any = Model.forward, **kwargs: Any) -> Any:
        read.append(list(map(int, ids)))
        return real(self, ids, *args, **kwargs)

    def forward_batch(
        self: Model, runs: Any, *args: Any, real: Any = Model.forward_batch, **kwargs: Any
    ) -> Any:
        read.extend(list(ids) for ids in runs)
        return real(self, runs, *args, **kwargs)

    monkeypatch.setattr(Model, "forward", forward)
    monkeypatch.setattr(Model, "forward_batch", forward_batch)
    return read


CHANNELS = [
    "prompt", "system", "file", "stdin", "map", "map's prompt", "choice", "stop", "session",
    "session's system", "history",
]  # fmt: skip


@pytest.mark.parametrize("chat", ["--chat", "--raw"])
@pytest.mark.parametrize("channel", CHANNELS)
def test_what_is_said_stays_text(
    cli: Cli,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompts: list[list[int]],
    channel: str,
    chat: str,
) -> None:
    """Every control piece of the vocabulary, wherever it is said: as many control ids as without.
    And no name of a file becomes part of a prompt."""
    (tmp_path / "models").symlink_to(home / "models")
    monkeypatch.setenv("GEMMA_CLI_HOME", str(tmp_path))
    tokenizer = load(home, "chat")[1]
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size) if tokenizer.is_control(i)]
    assert {"<start_of_turn>", "<end_of_turn>"} <= set(pieces)
    pieces += ["<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "[multimodal]", "<unused0>"]
    if chat == "--raw" and "system" in channel:
        pytest.skip("there is no system text")

    def ids(said: str, number: int) -> Counter[int]:
        name = tmp_path / f"<end_of_turn>{number}<eos>.txt"
        name.write_text(said)
        state = tmp_path / "state" / "sessions" / f"s{number}.jsonl"
        options = ["-m", "chat", chat, "-n", "1", "-t", "0"]  # What is made is not read.
        stdin = b""
        match channel:
            case "prompt":
                args = ["run", said]
            case "system":
                args = ["run", "x", "--system", said]
            case "file":
                args = ["run", "-f", str(name)]
            case "stdin":
                args, stdin = ["run"], said.encode()
            case "map":
                args, stdin = ["map", "x"], said.encode()
            case "map's prompt":
                args, stdin = ["map", said], b"x"
            case "choice":
                args = ["run", "x", "--choice", said]
            case "stop":
                args = ["run", "x", "--stop", said]
            case "session":
                args = ["run", "--session", f"s{number}", said]
            case "session's system":
                args = ["run", "--session", f"s{number}", "--system", said, "x"]
            case _:
                state.parent.mkdir(parents=True, exist_ok=True)
                lines = (
                    {"gemma_cli": 1, "time": ""},
                    {"model": said, "tokenizer": said},
                    {"role": "user", "text": said},
                    {"role": "model", "text": said, "ids": None},
                )
                state.write_text("".join(json.dumps(line) + "\n" for line in lines))
                args = ["run", "--session", f"s{number}", "x"]
        prompts.clear()
        result = cli(*args, *options, stdin=stdin)
        assert result.status in (0, 1 if channel == "choice" else 0), result.err
        if "session" in channel:
            kept = [json.loads(line) for line in state.read_text().splitlines()]
            assert said in [line.get("text", line.get("system")) for line in kept]
        return Counter(token for read in prompts for token in read if tokenizer.is_control(token))

    plain = ids("x", 1)
    assert plain[tokenizer.bos_id] >= 1
    assert ids("".join(f"a{piece}b " for piece in pieces), 2) == plain


# Names


HIDDEN = "inno\u202ecent\u200b\u2066\ufeffe\u3164\u00ad"


def test_what_one_would_not_see_is_spelled_out() -> None:
    spelled = r"inno\u202ecent\u200b\u2066\ufeffe\u3164\xad"
    assert visible(HIDDEN) == spelled
    for text in ("gemma", "é 模型 😀", "👩\u200d💻", "می\u200cخواهم", "a\nb"):
        assert visible(text) == text
    assert visible("a\u200db") == r"a\u200db"
    assert output.table([[HIDDEN, "a\x1b[2J\nb"]]) == [f"{spelled}  a[2J b"]


UNSEEN = re.compile("[\x1b\u202e\u200b\u2066\ufeff\u3164\u00ad]")


def test_names_of_files_and_in_files(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setenv("GEMMA_CLI_HOME", str(tmp_path / HIDDEN))
    config = tiny("gemma3")
    source = write_hf(tmp_path / f"{HIDDEN}\x1b[2J", config, random_weights(config))
    path = tmp_path / HIDDEN / "models" / f"{HIDDEN}\x1b]0;x\x07.safetensors"
    result = cli("quantize", source, "-o", path)
    assert (result.status, path.exists()) == (0, True)
    assert not UNSEEN.search(result.err)
    commands: list[list[str | Path]] = [
        ["inspect", "-m", path],
        ["verify", "-m", path],
        ["quantize", source, "-o", path],  # it exists
        ["quantize", source, "-o", path, "--dry-run"],
        ["inspect", "-m", f"{path}x"],
        ["run", "-m", path, "-c", "999999999", "x"],
        ["quantize", source.parent / f"{HIDDEN}.gguf"],
        ["doctor"],
        ["models"],
        ["config"],
    ]
    for args in commands:
        result = cli(*args)
        assert not UNSEEN.search(result.err), args
        assert not UNSEEN.search(result.out.replace("\x1b", "")), args  # a pipe obeys nothing
        assert r"\u202e" in result.out + result.err, args


@pytest.mark.skipif(sys.platform == "darwin", reason="names of files are UTF-8 there")
def test_invalid_utf8_everywhere(
    cli: Cli, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = os.fsdecode(b"od\xffd\xc3")
    monkeypatch.setenv("GEMMA_CLI_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    shutil.copy(home / "models" / "chat.safetensors", tmp_path / "models" / f"{odd}.safetensors")
    file = tmp_path / f"{odd}.txt"
    file.write_bytes(b"th\xffe \xf0\x9f\x98")
    said = ["-n", "3", "-t", "0"]
    source = tmp_path / odd
    config = tiny("gemma3")
    write_hf(source, config, random_weights(config))
    for args, stdin in (
        (["run", odd, *said], b""),
        (["run", "-m", odd, "-f", file, "--json", *said], b"\xff\xfe"),
        (["run", "--system", odd, "--stop", odd, "--ndjson", "x", *said], b""),
        (["run", "--session", "s", odd, *said], b"\xff"),
        (["run", "--session", "s", odd, *said], b""),
        (["sessions", "show", "s"], b""),
        (["sessions", "list", "--json"], b""),
        (["sessions", "export", "s", tmp_path / f"{odd}.md"], b""),
        (["map", odd, *said], b"\xff\n\xc3\n"),
        (["map", "--ndjson", odd, *said], b"\xff\n\xc3\n"),
        (["chat", "--no-save", *said], b"\xff\n/file " + os.fsencode(file) + b"\n/tokens\n"),
        (["tokenize", odd], b""),
        (["tokenize", "--json"], b"\xff"),
        (["models"], b""),
        (["models", "--json"], b""),
        (["inspect"], b""),
        (["verify", "-m", odd], b""),
        (["quantize", source], b""),
        (["quantize", source, "--force", "--json"], b""),
    ):
        result = cli(*args, stdin=stdin)
        assert result.status == 0, (args, result.err)
        result.err.encode()
        if "json" in str(args):
            assert [json.loads(line) for line in result.out.splitlines()]
            result.out.encode()
    for args in (["run", "-m", odd + "x", "y"], ["run", "-f", odd, "y"], ["quantize", odd + "x"]):
        result = cli(*args)
        assert result.status == 1
        assert re.fullmatch(r"gemma-cli: [^\n]+\.\n", result.err)
        result.err.encode()
