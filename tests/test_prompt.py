"""The chat's prompt, given keys as a terminal sends them."""

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from gemma_cli.cli import prompt as prompts
from gemma_cli.cli.prompt import LinePrompt, ScreenPrompt, unquote

CTRL_C, CTRL_D, CTRL_G, CTRL_J = "\x03", "\x04", "\x07", "\n"
ENTER, ALT_ENTER = "\r", "\x1b\r"


def paste(text: str) -> str:
    return f"\x1b[200~{text}\x1b[201~"


def values(typed: str) -> list[str]:
    return ["on", "off"]


COMMANDS: prompts.Commands = {
    "/set": ("NAME", "change something", values),
    "/sessions": ("", "list them", lambda typed: []),
    "/file": ("PATH", "add a file", None),
}
Ask = Callable[..., str | None]


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys


@pytest.fixture
def ask(keyboard: PipeInput, tmp_path: Path) -> Ask:
    """What a prompt gives when someone types; prompts share a history."""

    def type_and_ask(*typed: str, default: str = "") -> str | None:
        prompt = ScreenPrompt(
            COMMANDS, lambda: "status", tmp_path / "state" / "history", io.StringIO()
        )
        for keys in typed:
            keyboard.send_text(keys)
        return prompt.ask(default, begin=None, arrived=lambda: None)

    return type_and_ask


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("hello" + ENTER, "hello"),
        (ENTER + "  " + ENTER + " hello " + ENTER, "hello"),
        ("one" + CTRL_J + "two" + ALT_ENTER + "three" + ENTER, "one\ntwo\nthree"),
        (paste("one\r\ntwo\n\nthree\n") + ENTER, "one\ntwo\n\nthree"),
        ("see: " + paste("one\ntwo") + "!" + ENTER, "see: one\ntwo!"),
        ('"""one' + ENTER + "two" + ENTER + '"""' + ENTER, "one\ntwo"),
        ('"""' + ENTER + "one" + ENTER + '"""' + ENTER, "one"),
        (paste('"""A module."""\nimport this') + ENTER, '"""A module."""\nimport this'),
        ("a" + CTRL_C + "b" + ENTER, "b"),
        ("a" + CTRL_C + "b" + CTRL_C + "c" + ENTER, "c"),
        (CTRL_C + CTRL_C, None),
        ("a" + CTRL_C + CTRL_C, None),
        (CTRL_D, None),
        ("a" + CTRL_C + CTRL_D, None),
    ],
)
def test_what_is_typed(ask: Ask, keys: str, message: str | None) -> None:
    assert ask(keys) == message


def test_a_default_can_be_edited(ask: Ask) -> None:
    assert ask("!" + ENTER, default="one\ntwo") == "one\ntwo!"
    assert ask(CTRL_C, default="one") == ""  # and be given up


def test_history_lasts_and_is_private(ask: Ask, tmp_path: Path) -> None:
    assert ask("first" + CTRL_J + "message" + ENTER) == "first\nmessage"
    assert ask("second" + ENTER) == "second"
    file = tmp_path / "state" / "history"
    assert list(FileHistory(file).load_history_strings()) == ["second", "first\nmessage"]
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_history_that_cannot_be_kept_is_no_reason_to_stop(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where a folder should be")
    assert ask("hello" + ENTER) == "hello"


def test_an_editor(
    ask: Ask, keyboard: PipeInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor, gate = tmp_path / "editor", tmp_path / "gate"
    os.mkfifo(gate)
    editor.write_text(
        f'#!/bin/sh\nprintf "%s, edited\\n" "$(cat "$1")" > "$1.new"; cat {gate}\n'
        'mv "$1.new" "$1"\n'
    )
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(editor))

    def send() -> None:
        with open(gate, "w"):  # opens when the editor does
            keyboard.send_text(ENTER)

    Thread(target=send).start()
    assert ask("a text" + CTRL_G) == "a text, edited"


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    completer = prompts._CommandCompleter(COMMANDS)

    def complete(text: str) -> list[str]:
        found = completer.get_completions(Document(text), CompleteEvent())
        return [text[: len(text) + c.start_position] + c.text for c in found]

    assert complete("/se") == ["/set ", "/sessions"]
    assert complete("/set o") == ["/set on", "/set off"]
    assert complete("/set on") == ["/set on"]
    (tmp_path / "notes.txt").touch()
    assert complete(f"/file {tmp_path}/no") == [f"/file {tmp_path}/notes.txt"]
    for nothing in ("set", "hello /se", "/nothing o", "/set\no"):
        assert complete(nothing) == []


def test_what_loads_meanwhile(ask: Ask, keyboard: PipeInput) -> None:
    done: Future[str] = Future()
    events = []

    def begin() -> Future[str]:
        events.append("begun")
        done.set_result("loaded")
        return done

    def arrived() -> None:
        events.append("arrived")
        keyboard.send_text(ENTER)

    prompt = ScreenPrompt(COMMANDS, lambda: "", None, io.StringIO())
    keyboard.send_text("typed before")
    assert prompt.ask(begin=begin, arrived=arrived) == "typed before"
    assert events == ["begun", "arrived"]

    def fail() -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        prompt.ask(begin=lambda: done, arrived=fail)


def test_lines_where_there_is_no_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = io.StringIO('\n one \n"""two\nthree"""\nlast')
    monkeypatch.setattr("sys.stdin", keys)
    screen = io.StringIO()
    prompt = LinePrompt(screen)
    said = [prompt.ask(begin=None, arrived=lambda: None) for _ in range(4)]
    assert said == ["one", "two\nthree", "last", None]
    assert screen.getvalue() == "> > >   > > \n"  # what leaving says has a line of its own
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [('"""', '"""'), ('""""""', ""), ('"""a"""', "a"), ('a """b"""', 'a """b"""')],
)
def test_quotes(text: str, message: str) -> None:
    assert unquote(text) == message
