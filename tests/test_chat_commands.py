"""The commands of a chat, on a small random model."""

import io
import json
import re
from base64 import b64decode
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from gemma_cli.answer import Answer
from gemma_cli.cli import output, terminal
from gemma_cli.cli.answering import Form
from gemma_cli.cli.chat import send
from gemma_cli.cli.chat_commands import COMMANDS, SETTINGS, is_command, obey
from gemma_cli.cli.prompt import LinePrompt, ScreenPrompt
from gemma_cli.cli.talk import Talk
from gemma_cli.session import Session, new_path
from gemma_cli.text.chat import Turn

Say = Callable[[str], str]


@pytest.fixture
def talk(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Talk:
    (tmp_path / "models").symlink_to(home / "models")
    monkeypatch.setenv("GEMMA_CLI_HOME", str(tmp_path))
    talk = Talk(
        path=tmp_path / "models" / "chat.safetensors",
        session=Session(new_path()),
        chat=None,
        context=None,
        kv="f16",
        threads=None,
        markdown=False,
        form=Form(False, False, False, newline=False, write=lambda text: None),
    )
    talk.session.set({"temperature": 0.0, "max_tokens": 5})
    return talk


@pytest.fixture
def say(talk: Talk, capsys: pytest.CaptureFixture[str]) -> Say:
    """Types a line; returns what is told on standard error."""

    def say(line: str) -> str:
        if is_command(line):
            assert obey(talk, line) == ""
        else:
            assert send(talk, line, instead=False) == ""
        return capsys.readouterr().err

    return say


def texts(talk: Talk) -> list[str]:
    return [turn.text for turn in talk.session.turns if turn.role == "user"]


def reopened(talk: Talk) -> Session:
    assert talk.session.path
    return Session.open(talk.session.path, to_write=False)


def test_what_is_a_command() -> None:
    for text in ("/help", "/set temperature 1", "/nothing", "/?"):
        assert is_command(text)
    for text in ("help", "/usr/bin/env what?", "/set\nx", "/", "/ set", "a /help", "/etc"[:1]):
        assert not is_command(text)


def test_help_and_typos(say: Say) -> None:
    shown = say("/help")
    for name, command in COMMANDS.items():
        assert re.search(rf"(?m)^{name} .*{re.escape(command.about)}$", shown)
    assert "Ctrl-C" in shown
    assert "Did you mean /system?" in say("/sytem be lean")
    assert "Did you mean top-k?" in say("/set topk 3")
    assert "Did you mean temperature?" in say("/set temp 3")
    assert "There are /clear" in say("/zzz")


def test_what_a_command_does_not_take(talk: Talk, say: Say) -> None:
    say("the man")
    for name in ("/undo", "/clear", "/quit", "/bye"):
        assert say(f"{name} all") == f"Nothing was done: {name} stands by itself.\n"
    assert texts(talk) == ["the man"]


def test_system(talk: Talk, say: Say) -> None:
    assert say("/system") == "System text: none\n"
    assert say("/system be lean") == "System text: be lean\n"
    say("the man")
    assert reopened(talk).system == "be lean"
    say("/system none")
    assert reopened(talk).system is None


def test_every_setting(talk: Talk, say: Say) -> None:
    listed = say("/set")
    for name, setting in SETTINGS.items():
        assert re.search(rf"(?m)^{name} .*{re.escape(setting.about)}$", listed)
    assert re.search(r"(?m)^temperature +0.0 {8,}", listed)
    assert re.search(r"(?m)^top-k +64 +default", listed)
    for name, value, kept in (
        ("temperature", "0.5", 0.5),
        ("top-k", "3", 3),
        ("top-p", "0.5", 0.5),
        ("min-p", "0.1", 0.1),
        ("repeat-penalty", "1.1", 1.1),
        ("seed", "7", 7),
        ("max-tokens", "2", 2),
        ("stop", "the end", ["the end"]),
        ("draft", "off", False),
    ):
        shown = say(f"/set {name} {value}")
        assert shown.startswith(name)
        assert value in shown
        assert talk.session.settings[name.replace("-", "_")] == kept
    assert talk.sampling().temperature == 0.5
    for wrong in (
        *("temperature -1", "temperature warm", "temperature nan", "top-k 1.5", "top-p 2"),
        *("min-p 2", "repeat-penalty 0", "seed -1", "max-tokens -1", "draft maybe"),
    ):
        before = dict(talk.session.settings)
        assert "cannot be" in say(f"/set {wrong}")
        assert talk.session.settings == before
    for name, value in (("top-k", "1.5"), ("seed", "1.5"), ("max-tokens", "-1")):
        assert "give a whole number" in say(f"/set {name} {value}")
    say("/set temperature default")
    assert "temperature" not in talk.session.settings
    say("the man")
    assert reopened(talk).settings == talk.session.settings
    assert talk.answer
    assert len(talk.answer.ids) == 2


def test_regen_undo_and_continue(talk: Talk, say: Say) -> None:
    for command in ("/regen", "/undo", "/edit", "/continue", "/tokens", "/export x.md"):
        assert say(command) == "Nothing was said yet.\n"
    say("the man")
    first = talk.session.turns[1]
    say("ten hens")
    say("/regen")
    assert texts(talk) == ["the man", "ten hens"]
    assert talk.session.n_answers == 3
    assert say("/undo") == "Withdrawn: ten hens\n"
    assert talk.session.turns == [Turn("user", "the man"), first]
    say("/continue")
    longer = talk.session.turns[1]
    assert longer.text.startswith(first.text)
    assert longer.ids
    assert first.ids
    assert longer.ids[: len(first.ids)] == first.ids
    assert len(longer.ids) == len(first.ids) + 5
    assert reopened(talk).turns == talk.session.turns


def test_edit(talk: Talk, say: Say) -> None:
    say("the man")
    say("ten hens")
    turns = list(talk.session.turns)
    assert obey(talk, "/edit") == "ten hens"
    assert talk.session.turns == turns  # until it is sent
    assert send(talk, "ten men", instead=True) == ""
    assert texts(talk) == ["the man", "ten men"]


def test_nothing_is_lost_if_an_answer_does_not_come(
    talk: Talk, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    say("the man")
    turns = list(talk.session.turns)
    conversation = talk.ready()
    forward = conversation.model.forward

    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation.model, "forward", stop)
    for text, instead in (("ten hens", False), ("ten men", True)):
        assert send(talk, text, instead=instead) == text
        assert talk.session.turns == turns
    say("/regen")
    assert talk.session.turns == turns
    say("/continue")
    assert talk.session.turns == turns
    monkeypatch.setattr(conversation.model, "forward", forward)
    say("ten hens")
    assert texts(talk) == ["the man", "ten hens"]


def test_an_answer_that_was_at_its_end(
    talk: Talk, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    say("the man")
    monkeypatch.setattr(talk, "go_on", lambda: Answer(1, finish_reason="stop"))
    assert say("/continue") == "The model has nothing to add.\n"


def test_only_the_first_answer_waits_for_the_loading(talk: Talk, say: Say) -> None:
    talk.form = Form(False, False, stats=True, newline=False, write=lambda text: None)
    assert "loaded in" in say("the man")
    assert say("ten hens").startswith("prompt: ")


def test_files(talk: Talk, say: Say, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ten hens\n")
    (tmp_path / "b").write_bytes(b"\0\1")
    n_tokens = len(talk.ready().tokenizer.encode("ten hens\n"))
    assert "No file" in say("/file")
    assert f"a.txt: 9 B, {n_tokens} tokens." in say(f"/file {tmp_path}/a.txt")
    assert "is not a text" in say(f"/file {tmp_path}/b")
    assert "cannot be read" in say(f"/file {tmp_path}/none")
    (tmp_path / "large").write_text("the man " * 9000)
    assert "context holds 4,096" in say(f"/file {tmp_path}/large")
    assert "a.txt" in say("/file")
    say("count them")
    assert texts(talk) == ["a.txt:\nten hens\n\ncount them"]  # as `run --file` makes it
    assert not talk.files
    say(f"/file {tmp_path}/a.txt")
    assert "No file" in say("/file none")


def test_sessions(talk: Talk, say: Say, tmp_path: Path) -> None:
    assert "No conversation" in say("/sessions")
    say("the man")
    assert "Give the name" in say("/save")
    say("/save first")
    turns = list(talk.session.turns)
    shown = say("/clear")
    assert "kept as first" in shown
    assert talk.session.turns == []
    assert talk.session.settings["max_tokens"] == 5
    say("ten hens")
    assert re.search(r"(?m)^first .*the man$", say("/sessions"))
    assert "There is a session first already" in say("/save first")
    assert "Did you mean first?" in say("/load firts")
    shown = say("/load first")
    assert "> the man" in shown
    assert talk.session.turns == turns
    assert "This is first already" in say("/load first")
    read = talk.ready().rewind()
    assert read == 1  # all but the last id came from the snapshot
    say("in the inn")
    assert texts(talk) == ["the man", "in the inn"]


def test_export(talk: Talk, say: Say, tmp_path: Path) -> None:
    say("the man")
    say(f"/export {tmp_path}/a.md")
    assert "the man" in (tmp_path / "a.md").read_text()
    say(f"/export {tmp_path}/a.json")
    messages = json.loads((tmp_path / "a.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert "is there already" in say(f"/export {tmp_path}/a.md")
    assert "must end in .md or .json" in say(f"/export {tmp_path}/a.txt")
    assert "Give a file" in say("/export")


def test_tokens_and_stats(talk: Talk, say: Say) -> None:
    say("the man")
    conversation = talk.ready()
    shown = say("/tokens")
    counts = [int(n) for n in re.findall(r"(?m)^(?:user|model)? +([\d,]+) ", shown)]
    assert counts[-1] == sum(counts[:-1]) == len(conversation.prompt_ids())
    shown = say("/stats")
    assert "5 tokens" in shown
    assert "chat.safetensors" in shown


def test_another_model_keeps_the_transcript(talk: Talk, say: Say, tmp_path: Path) -> None:
    say("the man")
    before = talk.session.turns[1]
    assert "nothing is neither" in say("/model nothing")
    assert talk.path.stem == "chat"
    shown = say("/model base")
    assert "base is a base model" in shown
    assert talk.ready().format == "transcript"
    say("ten hens")
    assert texts(talk) == ["the man", "ten hens"]
    kept = reopened(talk)
    assert kept.model == "base"
    assert kept.turns[1].text == before.text
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing of use")
    assert "not a gemma-cli model" in say(f"/model {tmp_path}/damaged.safetensors")
    assert talk.path.stem == "base"
    say("in the inn")


def test_copy(talk: Talk, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    monkeypatch.setattr(terminal, "copy", copied.append)
    assert "no answer to copy" in say("/copy")
    say("the man")
    say("/copy")
    assert copied == [talk.session.turns[1].text.strip()]


def test_the_clipboards_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.copy("a\x1b]0;é")
    found = re.fullmatch(r"\x1b\]52;c;([A-Za-z0-9+/=]+)\x07", capsys.readouterr().err)
    assert found
    assert b64decode(found[1]).decode() == "a\x1b]0;é"


def test_values_of_commands(talk: Talk, say: Say) -> None:
    say("the man")
    say("/save first")

    def values(command: str, typed: str) -> list[str]:
        function = COMMANDS[command].values
        assert function
        return list(function(typed))

    assert set(values("/set", "t")) == set(SETTINGS)
    assert values("/set", "draft o") == ["default", "on", "off"]
    assert values("/set", "nothing x") == []
    assert values("/load", "") == ["first"]
    assert values("/model", "") == ["base", "chat"]
    assert COMMANDS["/file"].values is None


# The context is nearly full


class Chooser:
    """Chooses what it was told to, and remembers what there was to choose from."""

    def __init__(self, talk: Talk, keys: str) -> None:
        self.keys = list(keys)
        self.asked: list[Mapping[str, str]] = []
        talk.context = 400
        talk.choose = self

    def __call__(self, choices: Mapping[str, str]) -> str:
        self.asked.append(choices)
        return self.keys.pop(0)


def fill(talk: Talk, say: Say, left: int = 5) -> None:
    """Says something as long as there are so many tokens left for the answer."""
    conversation = talk.ready()
    while True:
        turns = [*talk.session.turns, Turn("user", "the man")]
        if sum(conversation.count(turns)) + left > conversation.cache.capacity:
            return
        say("the man")


def test_the_oldest_turns_are_dropped(talk: Talk, say: Say) -> None:
    chooser = Chooser(talk, "d")
    fill(talk, say)
    turns = list(talk.session.turns)
    shown = say("ten hens")
    assert "The context holds 400 tokens" in shown
    assert list(chooser.asked[0])[:3] == ["d", "s", "l"]
    session = talk.session
    assert session.turns[: len(turns)] == turns
    assert texts(talk)[-1] == "ten hens"
    assert session.n_left > 0
    assert session.turns[session.n_left].role == "user"
    assert talk.answer
    assert talk.answer.prompt_tokens <= 200
    assert (reopened(talk).n_left, reopened(talk).turns) == (session.n_left, session.turns)
    assert f"The first {session.n_left} turns have left the context" in say("/tokens")


def test_the_oldest_turns_are_summarised(talk: Talk, say: Say) -> None:
    Chooser(talk, "s")
    fill(talk, say)
    shown = say("ten hens")
    summary = talk.session.summary
    assert summary
    assert output.clean(f"In short: {summary}") in shown
    system, turns = talk.session.context
    assert system
    assert summary in system
    assert turns[-2].text == "ten hens"
    assert reopened(talk).summary == summary


def test_too_much_for_a_summary(talk: Talk, say: Say, capsys: pytest.CaptureFixture[str]) -> None:
    chooser = Chooser(talk, "sn")
    text = "the man"
    while talk.ready().count([Turn("user", text)])[0] < 380:
        text += " the"
    say(text)
    assert send(talk, "ten hens", instead=False) == "ten hens"
    assert len(chooser.asked) == 2
    assert "They do not fit with what asks for a summary" in capsys.readouterr().err
    assert texts(talk) == [text]
    assert not talk.session.summary


def test_a_larger_context(talk: Talk, say: Say) -> None:
    Chooser(talk, "l")
    fill(talk, say)
    say("ten hens")
    assert talk.ready().cache.capacity == 800
    assert talk.session.n_left == 0
    assert talk.answer
    assert talk.answer.prefilled < talk.answer.prompt_tokens / 2  # the rest was kept


def test_an_answer_in_what_is_left(talk: Talk, say: Say) -> None:
    chooser = Chooser(talk, "an")
    fill(talk, say, left=40)
    say("/set max-tokens 100")
    shown = say("the man")
    assert list(chooser.asked[0]) == ["d", "s", "l", "a", "n"]
    assert "The context is full, and the answer ends there" in shown
    assert talk.answer
    assert talk.answer.finish_reason == "length"
    turns = list(talk.session.turns)
    say("/continue")  # there is no room to answer in, now
    assert list(chooser.asked[1]) == ["d", "s", "l", "n"]
    assert talk.session.turns == turns


def test_nothing_now(talk: Talk, say: Say) -> None:
    Chooser(talk, "nnd")
    fill(talk, say)
    turns = list(talk.session.turns)
    assert send(talk, "ten hens", instead=False) == "ten hens"
    assert send(talk, "ten hens " * 40, instead=True) == "ten hens " * 40
    assert talk.session.turns == turns
    say("ten hens")


def test_a_message_that_is_too_long(
    talk: Talk, say: Say, capsys: pytest.CaptureFixture[str]
) -> None:
    chooser = Chooser(talk, "nlnd")
    text = "the man met ten men " * 90
    n_tokens = sum(talk.ready().count([Turn("user", text)]))
    assert n_tokens > 800
    assert send(talk, text, instead=False) == text
    assert list(chooser.asked[0]) == ["l", "n"]
    assert f"this takes {n_tokens:,}" in say(text)  # doubled as often as it takes, at once
    assert texts(talk) == [text]
    send(talk, text, instead=False)
    assert list(chooser.asked[2]) == ["d", "s", "l", "n"]

    longest = talk.file.config.context_length
    assert send(talk, "hens " * longest, instead=False)
    assert "The model takes no more" in capsys.readouterr().err
    assert len(chooser.asked) == 3


def test_choosing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    choices = {"d": "drop", "n": "nothing"}
    screen = io.StringIO()
    for typed, key in (("d\n", "d"), ("x\n\ndo it\n D \n", "d"), ("", "n")):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert LinePrompt(screen).choose(choices) == key
    assert "d  drop" in capsys.readouterr().err
    for typed, key in (("d\r", "d"), ("do it\rd\r", "d"), ("\x03", "n"), ("\x04", "n")):
        with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
            keys.send_text(typed)
            prompt = ScreenPrompt({}, lambda: "", None, screen)
            assert prompt.choose(choices) == key
