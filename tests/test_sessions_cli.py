"""Conversations that are kept, on the command line."""

import json
import re
from pathlib import Path

import pytest
from program import Cli

LINES = [b"the man", b"ten hens", b"in the inn"]
TALK = ("chat", "--top-k", "20", "--seed", "3", "-n", "9")


@pytest.fixture
def state(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> Path:
    """The folder of sessions of a home with the usual models and nothing said."""
    (tmp_path / "models").symlink_to(home / "models")
    (tmp_path / "cache").symlink_to(home / "cache")
    monkeypatch.setenv("GEMMA_CLI_HOME", str(tmp_path))
    return tmp_path / "state" / "sessions"


def answers(out: str) -> list[object]:
    return [json.loads(line)["ids"] for line in out.splitlines()]


@pytest.mark.parametrize("model", ["chat", "base"])
@pytest.mark.parametrize("how", ["snapshot", "transcript"])
def test_it_goes_on_with_the_same_ids(cli: Cli, state: Path, model: str, how: str) -> None:
    """As if it had not been interrupted; the options come from the session."""
    args = (*TALK, "-m", model, "--system", "be lean")
    whole = answers(cli(*args, "--json", "--no-save", stdin=b"\n".join(LINES)).out)
    assert not state.exists()
    parts = answers(cli(*args, "--json", stdin=LINES[0]).out)
    (session,) = state.glob("*.jsonl")
    for line in LINES[1:]:
        snapshot = session.with_suffix(".safetensors")
        assert snapshot.exists()
        if how == "transcript":
            snapshot.unlink()
        result = cli("chat", "--continue", "--json", "--stats", stdin=line)
        parts += answers(result.out)
        n_read = int(re.findall(r"prompt: (\d+) tokens", result.err)[0])
        n_prompt = json.loads(result.out)["prompt_tokens"]
        assert (n_read == n_prompt) == (how == "transcript")
    assert parts == whole
    assert list(state.glob("*.jsonl")) == [session]


def test_a_session_with_a_name(cli: Cli, state: Path) -> None:
    assert cli("chat", "-m", "chat", "--session", "one", "-n", "3", stdin=b"the man\n").status == 0
    assert cli("chat", "-m", "chat", "-n", "3", stdin=b"another\n").status == 0
    result = cli("chat", "--session", "one", "--system", "be lean", stdin=b"ten hens\n")
    assert result.status == 0
    shown = json.loads(cli("sessions", "show", "one", "--json").out)
    said = [(message["role"], message["content"]) for message in shown["messages"]]
    assert [role for role, _ in said] == ["system", "user", "assistant", "user", "assistant"]
    assert [text for role, text in said if role != "assistant"] == [
        "be lean",
        "the man",
        "ten hens",
    ]
    assert shown["settings"] == {"max_tokens": 3}


def test_sessions(cli: Cli, state: Path, tmp_path: Path) -> None:
    assert "No conversation was kept yet" in cli("sessions", "list").err
    assert json.loads(cli("sessions", "list", "--json").out) == []
    for name in ("one", "two"):
        cli("chat", "-m", "chat", "--session", name, "-n", "3", stdin=b"the man\nten hens\n")
    lines = cli("sessions", "list").out.splitlines()
    assert [line.split()[0] for line in lines] == ["one", "two"]
    assert "4 turns" in lines[0]
    assert "the man" in lines[0]
    assert [each["turns"] for each in json.loads(cli("sessions", "list", "--json").out)] == [4, 4]

    text = cli("sessions", "show", "one").out
    assert text.startswith("# the man\n")
    for name in ("talk.md", "talk.json"):
        assert cli("sessions", "export", "one", tmp_path / name).status == 0
        again = cli("sessions", "export", "one", tmp_path / name)
        assert (again.status, "is there already" in again.err) == (1, True)
    assert json.loads((tmp_path / "talk.json").read_text())["name"] == "one"
    assert (tmp_path / "talk.md").read_text().startswith("# the man\n")
    assert cli("sessions", "export", "one", tmp_path / "talk.txt").status == 1

    assert cli("sessions", "rm", "one", "three").status == 1
    assert cli("sessions", "rm", "one").status == 0
    assert {path.stem for path in state.iterdir()} == {"two"}
    missing = cli("sessions", "show", "tow")
    assert (missing.status, "Did you mean two" in missing.err) == (1, True)


def test_a_damaged_session_is_told_of(cli: Cli, state: Path) -> None:
    cli("chat", "-m", "chat", "--session", "one", "-n", "3", stdin=b"the man\n")
    cli("chat", "-m", "chat", "--session", "two", "-n", "3", stdin=b"the man\n")
    with open(state / "one.jsonl", "a") as file:
        file.write("}\n")
    result = cli("sessions", "list")
    assert (result.status, len(result.out.splitlines())) == (0, 1)
    assert "one.jsonl is damaged in line" in result.err
    assert cli("chat", "--session", "one", stdin=b"a\n").status == 1


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (["chat", "-m", "chat", "--continue", "--no-save"], 2),
        (["chat", "-m", "chat", "--continue", "--session", "one"], 2),
        (["chat", "-m", "chat", "--continue"], 1),
        (["chat", "-m", "chat", "--session", "../one"], 1),
        (["sessions", "show", "one"], 1),
        (["sessions", "rm"], 2),
    ],
)
def test_wrong_usage(cli: Cli, state: Path, args: list[str], status: int) -> None:
    result = cli(*args, stdin=b"the man\n")
    assert (result.status, result.out) == (status, "")
    assert "Traceback" not in result.err


def test_a_session_whose_model_is_gone(cli: Cli, state: Path, tmp_path: Path) -> None:
    cli("chat", "-m", "chat", "--session", "one", "-n", "3", stdin=b"the man\n")
    (tmp_path / "models").unlink()
    result = cli("chat", "--session", "one", stdin=b"ten hens\n")
    assert (result.status, "chat is neither a file nor a name" in result.err) == (1, True)
