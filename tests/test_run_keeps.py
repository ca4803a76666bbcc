"""What `run` keeps on the disk: the session that it goes on with, and beginnings of prompts."""

import json
import os
from pathlib import Path

import pytest
from program import Cli

from gemma_cli import session as sessions
from gemma_cli import snapshot

WORDS = ("the man", "ten hens", "a ham in the inn")
DRAWN = ("--top-k", "20", "--seed", "3", "-n", "9")
LONG = "the man met ten hens in the inn and ate a ham. " * 20  # more than the windows' rings hold


@pytest.fixture
def own_home(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> Path:
    """A home with the usual models and kernels, in which nothing was kept yet."""
    (tmp_path / "models").symlink_to(home / "models")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(home / "cache" / "kernels")
    monkeypatch.setenv("GEMMA_CLI_HOME", str(tmp_path))
    return tmp_path


def messages(cli: Cli, name: str) -> list[tuple[str, str]]:
    shown = json.loads(cli("sessions", "show", name, "--json").out)
    return [(message["role"], message["content"]) for message in shown["messages"]]


@pytest.mark.parametrize("model", ["chat", "base"])
@pytest.mark.parametrize("how", ["snapshot", "transcript"])
def test_a_turn_from_a_script(cli: Cli, own_home: Path, model: str, how: str) -> None:
    """The ids are those of a chat without interruption, whose options are given once."""
    given = ("-m", model, "--system", "be lean", *DRAWN)
    lines = "\n".join(WORDS).encode()
    whole = cli("chat", "--no-save", *given, "--json", stdin=lines).out.splitlines()
    for n, words in enumerate(WORDS):
        args = given if n == 0 else ()
        result = cli("run", "--session", "one", words, *args, "--json", "--stats")
        assert result.status == 0
        assert result.json["ids"] == json.loads(whole[n])["ids"]
        read = int(result.err.partition("prompt: ")[2].split()[0])
        assert (read < result.json["prompt_tokens"]) == (how == "snapshot" and n > 0)  # type: ignore[operator]
        kept = own_home / "state" / "sessions" / "one.safetensors"
        assert kept.exists()
        if how == "transcript":
            kept.unlink()
    said = messages(cli, "one")
    assert [text for role, text in said if role == "user"] == list(WORDS)
    assert cli("chat", "--session", "one", stdin=b"ten\n").status == 0  # the same session


def test_a_first_turn_is_what_run_says(cli: Cli, own_home: Path) -> None:
    alone = cli("run", "-m", "chat", *DRAWN, "the man", "--json", stdin=b"ten\n").json
    first = cli("run", "-m", "chat", *DRAWN, "the man", "--json", "--session", "a", stdin=b"ten\n")
    assert first.json["ids"] == alone["ids"]
    assert messages(cli, "a")[0] == ("user", "the man\n\nten")


def test_a_turn_that_fails_leaves_the_session(cli: Cli, own_home: Path) -> None:
    args = ("run", "-m", "chat", "--session", "one", "-t", "0")
    assert cli(*args, "the man", "-n", "3").status == 0
    before = messages(cli, "one")
    assert cli(*args, LONG, "-c", "40").status == 3
    assert messages(cli, "one") == before
    cut = cli(*args, "the man", "--regex", "[a-z]{50}", "-n", "2")
    assert (cut.status, cut.out) == (1, "")
    assert messages(cli, "one") == before
    form = cli(*args, "the man", "--choice", "a ham", "--choice", "ten")
    assert form.out in {"a ham", "ten"}
    assert messages(cli, "one") == [*before, ("user", "the man"), ("assistant", form.out)]


def test_a_session_that_needs_more_context(cli: Cli, own_home: Path) -> None:
    args = ("run", "-m", "chat", "--session", "one", "-n", "2")
    assert cli(*args, LONG * 8).status == 0
    n_tokens = cli(*args, LONG, "--json").json["prompt_tokens"]
    assert isinstance(n_tokens, int)
    assert n_tokens > 4096


def test_a_session_that_cannot_be_kept(
    cli: Cli, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sessions.os, "write", fail)
    result = cli("run", "-m", "chat", "--session", "one", "the man", "-n", "3", "-t", "0")
    assert result.status == 1
    assert result.err == "gemma-cli: The session cannot be kept: No space left on device.\n"
    assert result.out == cli("run", "-m", "chat", "the man", "-n", "3", "-t", "0").out


def prefilled(err: str) -> int:
    return int(err.partition("prompt: ")[2].split()[0])


@pytest.mark.parametrize("model", ["chat", "base"])
@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_a_prompts_beginning_is_kept(
    cli: Cli, own_home: Path, tmp_path: Path, model: str, kv: str
) -> None:
    manual = tmp_path / "manual.txt"
    manual.write_text(LONG if model == "chat" else LONG[:250])
    args = ("run", "-m", model, *DRAWN, "--kv", kv, "--json", "--stats", "-f", str(manual), "eat")
    reads = []
    for question in (b"ten hens", b"the man", b"\n\nthe", b"the man"):
        plain = cli(*args, stdin=question)
        kept = cli(*args, "--cache-prompt", stdin=question)
        assert (plain.status, kept.status) == (0, 0)
        assert kept.json["ids"] == plain.json["ids"]
        assert kept.json["prompt_tokens"] == plain.json["prompt_tokens"]
        reads.append((prefilled(kept.err), prefilled(plain.err)))
    first, *others = reads
    assert first[0] >= first[1]
    assert all(n < 20 < n_plain for n, n_plain in others)
    files = list((own_home / "cache" / "prompts").iterdir())
    assert len(files) == 1
    assert files[0].stat().st_mode & 0o777 == 0o600
    # One that is damaged is of no use, and is made anew.
    files[0].write_bytes(files[0].read_bytes()[:-9])
    again = cli(*args, "--cache-prompt", stdin=b"the man")
    assert again.json["ids"] == plain.json["ids"]
    assert prefilled(again.err) >= prefilled(plain.err)
    assert prefilled(cli(*args, "--cache-prompt", stdin=b"the man").err) < 20


def test_a_system_text_is_kept_for_each_model(cli: Cli, own_home: Path) -> None:
    args = ("--chat", "--system", LONG, "-t", "0", "-n", "5", "--json", "--stats")
    for model in ("chat", str(own_home / "models" / ".." / "models" / "chat.safetensors")):
        plain = cli("run", "-m", model, "the man", *args)
        kept = cli("run", "-m", model, "the man", *args, "--cache-prompt")
        assert kept.json["ids"] == plain.json["ids"]
    assert prefilled(kept.err) < 20
    assert len(os.listdir(own_home / "cache" / "prompts")) == 1


def test_what_is_kept_of_prompts_is_bounded(
    cli: Cli, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("run", "-m", "chat", "--chat", "-n", "1", "the man", "--cache-prompt", "--system")
    assert cli(*args, LONG).status == 0
    (first,) = (own_home / "cache" / "prompts").iterdir()
    budget = int(first.stat().st_size * 2.5)
    make_room = snapshot.make_room
    monkeypatch.setattr(snapshot, "make_room", lambda folder, n: make_room(folder, n, budget))
    for n in range(4):
        assert cli(*args, f"{n} {LONG}").err == ""
        size = sum(path.stat().st_size for path in first.parent.iterdir())
        assert size <= budget
    assert not first.exists()
    monkeypatch.setattr(snapshot, "LARGEST", 100)
    result = cli(*args, LONG)
    assert result.status == 0
    assert result.err == "gemma-cli: There is no room on the disk to keep the prompt's beginning.\n"


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (["--session", "one", "--cache-prompt", "a"], 2),
        (["--session", "../one", "a"], 1),
        (["--session", "one"], 2),
        (["--cache-prompt", LONG, "-c", "40"], 3),
    ],
)
def test_wrong_usage(cli: Cli, own_home: Path, args: list[str], status: int) -> None:
    result = cli("run", "-m", "chat", *args)
    assert (result.status, result.out) == (status, "")
    assert "Traceback" not in result.err
    assert not (own_home / "state").exists()
