"""Sessions as they are kept: whatever happens to the file, what was said before is there."""

import json
import os
import re
from errno import ENOSPC
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_cli import session as sessions
from gemma_cli.session import Session, as_markdown, as_messages, find_session, list_sessions
from gemma_cli.text.chat import Turn
from quantize.errors import GemmaError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_CLI_HOME", str(tmp_path))
    return sessions.sessions_folder()


def state(session: Session) -> dict[str, object]:
    names = ("model", "tokenizer", "system", "settings", "turns", "n_left", "summary", "n_answers")
    return {name: getattr(session, name) for name in (*names, "created")}


def talk(session: Session) -> None:
    session.use("gemma", "abc")
    session.instruct("be terse")
    session.add(Turn("user", "hello\nthere"))
    session.add(Turn("model", "hi", (5, 6)), "stop")


TEXT = st.text(st.characters(exclude_categories=[]), max_size=8)  # surrogates, too
CHANGES = st.one_of(
    st.tuples(st.just("use"), st.sampled_from(["a", "b"]), st.sampled_from(["x", "y"])),
    st.tuples(st.just("instruct"), st.none() | TEXT),
    st.tuples(st.just("set"), st.just({"temperature": 0.5}) | st.just({"stop": ["\n"]})),
    st.tuples(st.just("user"), TEXT),
    st.tuples(st.just("model"), TEXT, st.none() | st.lists(st.integers(0, 300)).map(tuple)),
    st.tuples(st.just("keep"), st.integers(0, 5)),
    st.tuples(st.just("leave"), st.integers(0, 5), st.none() | TEXT),
)


@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(CHANGES, max_size=12))
def test_what_is_kept_is_what_was_said(changes: list[tuple]) -> None:
    for path in list_sessions():
        path.unlink()
    session = Session(sessions.session_path("one"))
    for kind, *values in changes:
        if kind in {"user", "model"}:
            session.add(Turn(kind, *values), "stop")
        elif kind != "leave":
            getattr(session, kind)(*values)
        elif values[0] <= len(session.turns):
            session.leave(*values)
        assert session.failure is None
    session.close()
    assert (len(list_sessions()) == 1) == any(kind in {"user", "model"} for kind, *_ in changes)
    for path in list_sessions():
        again = Session.open(path, to_write=False)
        assert state(again) == state(session)
        data = path.read_bytes()
        assert not re.search(b"[\x00-\x09\x0b-\x1f\x7f]", data)
        assert not re.search("[\x7f-\x9f]", data.decode())  # strict UTF-8
        assert all(json.loads(line) for line in data.splitlines())


def test_a_line_is_there_when_it_was_said_and_nobody_else_can_read_it(folder: Path) -> None:
    session = Session(sessions.new_path())
    session.instruct("be terse")
    assert not folder.exists()  # nothing was said
    session.add(Turn("user", "hello"))
    assert session.path
    assert Session.open(session.path, to_write=False).turns == [Turn("user", "hello")]
    assert session.path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


def test_wherever_it_is_killed_the_whole_lines_stay(folder: Path) -> None:
    session = Session(sessions.session_path("one"))
    talk(session)
    session.close()
    assert session.path
    data = session.path.read_bytes()
    lines = data.splitlines(keepends=True)
    for cut in range(len(data)):
        session.path.write_bytes(data[:cut])
        n_whole = data[:cut].count(b"\n")
        again = Session.open(session.path)
        assert len(again.turns) == max(0, n_whole - 3)
        again.add(Turn("user", "more"))
        again.close()
        kept = session.path.read_bytes()
        assert kept.startswith(b"".join(lines[:n_whole]))
        assert kept.count(b"\n") == max(n_whole, 1) + 1  # the first line is made again
        last = Session.open(session.path, to_write=False).turns[-1]
        assert last == Turn("user", "more")


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        "5",
        '{"role": "user"}',
        '{"role": "user", "text": 5}',
        '{"role": "model", "text": "a", "ids": "b"}',
        '{"role": "model", "text": "a", "ids": [1.5]}',
        '{"keep": 9}',
        '{"keep": -1}',
        '{"leave": 9, "summary": null}',
        '{"gemma_cli": 2, "time": ""}',
        "[" * 100_000,
        '{"settings": ' + '{"a":' * 100_000,
        '{"keep": ' + "9" * 5000 + "}",
        '{"role": "model", "text": "a", "ids": [' + "0," * 3_100_000 + "0]}",
        '{"role": "model", "text": "a", "ids": [-1]}',
        '{"role": "model", "text": "a", "ids": [9223372036854775808]}',
        '{"role": "model", "text": "a", "ids": [true]}',
        '{"role": "system", "text": "a"}',
        '{"role": "user", "text": null}',
        '{"settings": []}',
        '{"settings": {"temperature": "hot"}}',
        '{"settings": {"temperature": true}}',
        '{"settings": {"top_k": 1.5}}',
        '{"settings": {"seed": -1}}',
        '{"settings": {"max_tokens": null}}',
        '{"settings": {"max_tokens": -1}}',
        '{"settings": {"stop": "x"}}',
        '{"settings": {"stop": [1]}}',
        '{"settings": {"draft": 1}}',
        '{"system": 5}',
        '{"model": "a", "tokenizer": 5}',
        '{"leave": 0.5, "summary": null}',
        '{"leave": 0, "summary": 5}',
        "NaN",
        "\ud800",
        "\0",
        "",
    ],
)
def test_a_damaged_line_is_named(line: str) -> None:
    session = Session(sessions.session_path("one"))
    talk(session)
    session.close()
    assert session.path
    with open(session.path, "a", errors="surrogatepass") as file:
        file.write(line + "\n")
    with pytest.raises(GemmaError, match=r"one\.jsonl is damaged in line 6 .*\.$"):
        Session.open(session.path)
    session.path.write_text(line + "\n", errors="surrogatepass")
    with pytest.raises(GemmaError, match=r"damaged in line 1") as caught:
        Session.open(session.path)
    assert len(str(caught.value)) < 400 + len(str(session.path))
    assert str(caught.value).isprintable()


def test_what_is_no_session(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sessions.session_path("one")
    path.parent.mkdir(parents=True)
    path.mkdir()
    with pytest.raises(GemmaError, match=r"one\.jsonl is not a file"):
        Session.open(path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(GemmaError, match=r"one\.jsonl is not a file"):
        Session.open(path)
    path.unlink()
    monkeypatch.setattr(sessions, "LARGEST", 100)
    path.write_bytes(b"x" * 101)
    with pytest.raises(GemmaError, match="has 101 bytes, more than any conversation"):
        Session.open(path)
    escapes = ("x\0", "x\x1b[2J", "x\u202e", "x\u200b", "x\u3164", "a\n", "\udcff")
    for name in ("", "..", "../x", "/x", "a/b", "<eos>", *escapes):
        with pytest.raises(GemmaError, match="cannot be the name of a session"):
            sessions.session_path(name)


def test_ids_that_the_model_does_not_have_are_dropped() -> None:
    session = Session()
    talk(session)
    session.add(Turn("model", "more", (5, 300)), "stop")
    session.forget_ids_from(301)
    assert session.turns[-1].ids == (5, 300)
    session.forget_ids_from(300)
    assert [turn.ids for turn in session.turns] == [None, (5, 6), None]


def test_two_programs_do_not_write_to_one_session() -> None:
    session = Session(sessions.session_path("one"))
    talk(session)
    assert session.path
    with pytest.raises(GemmaError, match="one is open in another gemma-cli"):
        Session.open(session.path)
    assert Session.open(session.path, to_write=False).turns == session.turns
    session.close()
    Session.open(session.path).close()


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Snapshots go first; then the session stays in memory, and is written when there is room."""
    session = Session(sessions.session_path("one"))
    talk(session)
    assert session.path
    before = session.path.read_bytes()
    (folder / "one.safetensors").write_bytes(b"large")
    write, full = os.write, [True]

    def write_some(file: int, data: bytes) -> int:
        if full[0] and not any(folder.glob("*.safetensors")):
            full[0] = False
            return write(file, data)
        if full[0]:
            return write(file, data[:7])
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write_some)
    session.add(Turn("user", "more"))
    assert session.failure is None
    assert not list(folder.glob("*.safetensors"))
    kept = session.path.read_bytes()
    assert kept.startswith(before)
    assert kept.count(b"\n") == before.count(b"\n") + 1

    session.add(Turn("model", "not kept", (7,)), "stop")
    assert session.failure is not None
    assert session.path.read_bytes() == kept
    monkeypatch.setattr(os, "write", write)
    session.add(Turn("user", "and more"))
    assert session.failure is None
    session.close()
    assert state(Session.open(session.path)) == state(session)


def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where a folder should be")
    session = Session(sessions.session_path("one"))
    talk(session)
    assert session.failure is not None
    assert len(session.turns) == 2


def test_another_tokenizers_ids_are_dropped() -> None:
    session = Session()
    talk(session)
    session.use("other", "abc")
    assert session.turns[1] == Turn("model", "hi", (5, 6))
    session.use("other", "def")
    assert session.turns[1] == Turn("model", "hi")


def test_what_the_model_gets_to_see() -> None:
    session = Session()
    talk(session)
    session.add(Turn("user", "more"))
    assert session.context == ("be terse", session.turns)
    session.leave(2)
    assert session.context == ("be terse", session.turns[2:])
    session.leave(2, "They met.")
    system, turns = session.context
    assert system
    assert system.startswith("be terse\n\n")
    assert system.endswith("They met.")
    assert turns == [Turn("user", "more")]


def test_names(folder: Path) -> None:
    for name in ("", ".hidden", "a/b", "../a", "a b", "-x", "a" * 101, "a\n"):
        with pytest.raises(GemmaError, match="cannot be the name"):
            sessions.session_path(name)
    session = Session(sessions.session_path("one"))
    talk(session)
    (folder / "one.safetensors").write_bytes(b"")
    other = Session(sessions.session_path("one"))  # begun at the same time
    talk(other)
    assert other.name == "one-2"
    with pytest.raises(GemmaError, match="There is a session one-2 already"):
        session.rename("one-2")
    session.rename("Zweite.1")
    assert {path.name for path in folder.iterdir()} == {
        *("one-2.jsonl", "Zweite.1.jsonl", "Zweite.1.safetensors")
    }
    session.add(Turn("user", "more"))
    session.close()
    assert Session.open(find_session("Zweite.1")).turns == session.turns
    with pytest.raises(GemmaError, match=r"Did you mean Zweite\.1"):
        find_session("Zweite1")
    unsaved = Session()
    talk(unsaved)
    unsaved.rename("kept")
    assert Session.open(find_session("kept"), to_write=False).turns == unsaved.turns


def test_the_last_changed_comes_last(folder: Path) -> None:
    for n, name in enumerate(("b", "c", "a")):
        talk(Session(sessions.session_path(name)))
        os.utime(folder / f"{name}.jsonl", (n, n))
    assert [path.stem for path in list_sessions()] == ["b", "c", "a"]


def test_forms_for_others() -> None:
    session = Session()
    talk(session)
    session.leave(2)
    assert as_messages(session)["messages"] == [
        {"role": "system", "content": "be terse"},
        {"role": "user", "content": "hello\nthere"},
        {"role": "assistant", "content": "hi"},
    ]
    assert as_markdown(session) == (
        f"# hello\n\ngemma, {session.created}\n\n## System\n\nbe terse\n\n"
        "## User\n\nhello\nthere\n\n## Assistant\n\nhi\n"
    )
