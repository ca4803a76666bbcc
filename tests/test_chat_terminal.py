"""Conversations at a terminal."""

import re
import signal
from pathlib import Path

import pytest
from program import CONTEXT
from terminals import Terminal

from gemma_cli.session import Session

CTRL_C, CTRL_D, CTRL_R = "\x03", "\x04", "\x12"
TALK = ("chat", "-m", "chat", "-t", "0", "--plain")


def endless(home: Path) -> tuple[str, ...]:
    model = str(home / "endless.safetensors")
    return "chat", "-m", model, "-t", "0", "--plain", "-c", str(CONTEXT)


def test_a_conversation(home: Path) -> None:
    with Terminal(home, *endless(home)) as terminal:
        terminal.wait_for(r"(?m)^>")
        terminal.type("the man\r")  # maybe before there is a model
        terminal.wait_for(r"> the man\n.{20}")
        terminal.type("ten hens" + CTRL_C)  # stops the answer
        terminal.wait_for(r"\n> ten hens\n[\s\S]*tokens/s")  # what was typed was not for it
        terminal.type(CTRL_C)
        terminal.wait_for(r"Ctrl-C again")
        terminal.type("/clear\r")
        terminal.wait_for(r"Cleared")
        terminal.wait_for(r"\n>\n[\s\S]* 0 of 50,000 tokens")
        terminal.type(CTRL_C)
        terminal.wait_for(r"Cleared[\s\S]*Ctrl-C again[\s\S]*\n>\n")
        terminal.type(CTRL_C)
        assert terminal.wait() == 0


def test_what_is_typed_during_an_answer(home: Path) -> None:
    """It is seen at once, below the answer, and is the next prompt's."""
    without_plain = (argument for argument in endless(home) if argument != "--plain")
    with Terminal(home, *without_plain) as terminal:
        terminal.wait_for(r"(?m)^>")
        terminal.type("the man\r")
        terminal.wait_for(r"> the man\n\n.{20}")
        terminal.type("/quik")
        terminal.wait_for(r"> the man\n\n[\s\S]+\n> /quik\s*$")
        terminal.type("\x7ft\r\x1b[200~a\tb\rc\x1b[201~")
        terminal.wait_for(r"\n> /quit / a b / c\s*$")
        terminal.type(CTRL_C)
        assert terminal.wait() == 0
        assert len(re.findall("/quit", terminal.text)) == 1


def test_history_across_conversations(home: Path, tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(home / "models")
    (tmp_path / "cache").symlink_to(home / "cache")
    with Terminal(tmp_path, *TALK, "-n", "3") as terminal:
        terminal.wait_for(r"(?m)^>")
        terminal.type("ten hens\r")
        terminal.wait_for(r"> ten hens\n.+\n>")
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
    with Terminal(tmp_path, *TALK, "-n", "3") as terminal:
        terminal.wait_for(r"0 of 4,096 tokens")
        terminal.type(CTRL_R + "ten h")
        terminal.wait_for(r"(?m)^> ten hens$")
        terminal.type("\r\r")
        terminal.wait_for(r"> ten hens\n.+\n>")
        terminal.type(CTRL_D)
        assert terminal.wait() == 0


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_a_plain_terminal(home: Path, environment: dict[str, str]) -> None:
    with Terminal(home, *TALK, "-n", "5", **environment) as terminal:
        terminal.wait_for(r"(?m)^>")
        terminal.type("the man\r" if "NO_COLOR" in environment else "the man\n")
        terminal.wait_for(r"> the man\n.+\n>")
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
    # Set a graphic rendition: 30 to 48 and 90 to 107 are colours (ECMA-48 and aixterm).
    renditions = b";".join(re.findall(rb"\x1b\[([\d;]*)m", terminal.received)).split(b";")
    assert not {int(n or 0) for n in renditions} & {*range(30, 39), *range(40, 49), *range(90, 108)}
    assert "TERM" not in environment or b"\x1b" not in terminal.received


@pytest.mark.parametrize("plain", [False, True])
def test_markdown(home: Path, plain: bool) -> None:
    args = ("chat", "-m", "base", "-t", "0", "-n", "9", *["--plain"] * plain)
    with Terminal(home, *args) as terminal:
        terminal.wait_for(r"base model[\s\S]*\n>")
        terminal.type("the man\r")
        terminal.wait_for(r"> the man\n[\s\S]+\n>")
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
    answer = terminal.received.rpartition(b"the man")[2]
    assert (b"\x1b[K\r\n" in answer) == (not plain)


def test_a_model_that_is_none(home: Path, tmp_path: Path) -> None:
    with Terminal(home, "chat", "-m", "nothing") as terminal:
        assert terminal.wait() == 1
    assert "nothing is neither a file" in terminal.text
    assert "/help" not in terminal.text

    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing of use")
    with Terminal(home, "chat", "-m", str(damaged)) as terminal:  # known when someone may type
        assert terminal.wait() == 1
    assert "is not a gemma-cli model file" in terminal.text.replace("\n", " ")


def test_a_signal_leaves_the_terminal_as_it_was(home: Path) -> None:
    with Terminal(home, *endless(home)) as terminal:
        before = terminal.modes
        terminal.wait_for(r"(?m)^>")
        terminal.type("the man\r")
        terminal.wait_for(r"> the man\n.{20}")
        assert terminal.modes != before
        terminal.send_signal(signal.SIGTERM)
        assert terminal.wait() == 128 + signal.SIGTERM
        assert terminal.modes == before


def test_reading_a_long_message_can_be_stopped(home: Path) -> None:
    with Terminal(home, *endless(home)) as terminal:
        terminal.wait_for(r"0 of 50,000 tokens")
        terminal.type("\x1b[200~" + "the man met ten men\n" * 1200 + "\x1b[201~\r")
        terminal.wait_for(r"Reading the prompt")
        terminal.type(CTRL_C)
        terminal.wait_for(r"in the prompt again\.\n[\s\S]*the man met ten men\n[\s\S]* 0 of 50,000")
        terminal.type(CTRL_C + CTRL_C)
        assert terminal.wait() == 0


def test_a_killed_conversation_is_kept(home: Path, tmp_path: Path) -> None:
    """All but the answer that was being made; and it goes on."""
    (tmp_path / "models").symlink_to(home / "models")
    (tmp_path / "cache").symlink_to(home / "cache")
    with Terminal(tmp_path, *endless(home), "-n", "9") as terminal:
        terminal.wait_for(r"(?m)^>")
        terminal.type("the man\r")
        terminal.wait_for(r"> the man\n[\s\S]+\n>\n")
        terminal.type("/set max-tokens 49000\r")
        terminal.wait_for(r"(?m)^max-tokens +49000")
        terminal.type("ten hens\r")
        terminal.wait_for(r"> ten hens\n.{20}")
        terminal.send_signal(signal.SIGKILL)
        assert terminal.wait() == -signal.SIGKILL
    (path,) = (tmp_path / "state" / "sessions").glob("*.jsonl")
    session = Session.open(path)
    assert [turn.role for turn in session.turns] == ["user", "model", "user"]
    session.close()

    with Terminal(tmp_path, "chat", "--continue", "--plain") as terminal:
        terminal.wait_for(r"> ten hens\nIt has no answer yet")
        terminal.type("/set max-tokens 9\r")
        terminal.wait_for(r"(?m)^max-tokens +9")
        terminal.type("/regen\r")
        terminal.wait_for(r"> /regen\n[\s\S]+\n>\n")
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
        assert f"Kept as {session.name}" in terminal.text
    assert len(Session.open(path).turns) == 4


def test_what_is_not_to_be_kept(home: Path, tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(home / "models")
    (tmp_path / "cache").symlink_to(home / "cache")
    with Terminal(tmp_path, *TALK, "-n", "9", "--no-save") as terminal:
        terminal.wait_for(r"(?m)^>")
        terminal.type("the man\r")
        terminal.wait_for(r"> the man\n[\s\S]+\n>\n[\s\S]*not kept")
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
    assert not (tmp_path / "state").exists()
