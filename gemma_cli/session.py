"""Conversations as they are kept: what was said, and what holds for it.

A session is a file of JSON Lines that only its owner can read. Each line is a change of the
conversation, appended when it happens:

    {"gemma_cli": 1, "time": ...}      the first line: the version of this format
    {"model": name, "tokenizer": ...}  who answers from here on, and a hash of its tokenizer
    {"system": text or null}           the system text
    {"settings": {name: value}}        the options that were given for answers
    {"role": "user", "text": ...}      a turn
    {"role": "model", "text": ..., "ids": [...], "finish_reason": ...}
    {"keep": n}                        all turns but the first n are withdrawn
    {"leave": n, "summary": ...}       the first n turns leave the model's context; a text or null
                                       stands for them there

So a run that is killed loses no more than the answer that was being made. Beside it may lie what
the model's cache held, NAME.safetensors (`snapshot.py`), which can be made again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from difflib import get_close_matches
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any

from gemma_cli.models import state_folder
from gemma_cli.space import make_room
from gemma_cli.text.chat import Turn
from quantize.config import check_json_size
from quantize.errors import GemmaError, shown, visible

try:
    import fcntl
except ImportError:  # Windows, where two programs may write to one session
    fcntl = None  # type: ignore[assignment]

VERSION = 1
LARGEST = 250_000_000
"""Bytes of a session's file: some 20 contexts of the largest models, ids included."""

_MOST_VALUES = 3_000_000  # of a line: an answer's ids

SUFFIX, SNAPSHOT_SUFFIX = ".jsonl", ".safetensors"

# JSON leaves these as they are, but a terminal or a strict reader would not.
_NOT_PLAIN = re.compile("[\x7f-\x9f\ud800-\udfff]")


class Session:
    """A conversation that is kept in `path`, or in memory only.

    The file is made with the first turn. What cannot be written stays in memory, `failure` tells
    why, and the next change tries again.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.model = ""
        self.tokenizer = ""
        self.system: str | None = None
        self.settings: dict[str, Any] = {}
        self.turns: list[Turn] = []
        self.n_left = 0  # turns that are no longer in the model's context
        self.summary: str | None = None  # and what stands for them there
        self.n_answers = 0  # ever made, also those withdrawn: the draws of each are its own
        self.failure: OSError | None = None
        self.created = _now()
        self._unwritten: list[dict[str, Any]] = [{"gemma_cli": VERSION, "time": self.created}]
        self._file: int | None = None

    @property
    def name(self) -> str:
        return self.path.stem if self.path else ""

    @property
    def context(self) -> tuple[str | None, list[Turn]]:
        """The system text and the turns that the model gets to see."""
        system = self.system
        if self.summary:
            summary = f"What was said before, in short: {self.summary}"
            system = f"{system}\n\n{summary}" if system else summary
        return system, self.turns[self.n_left :]

    # Changes

    def use(self, model: str, tokenizer: str) -> None:
        """Notes who answers. Another tokenizer's ids are of no use: only the texts stay."""
        if (model, tokenizer) != (self.model, self.tokenizer):
            self._change({"model": model, "tokenizer": tokenizer})

    def forget_ids_from(self, n: int) -> None:
        """Leaves turns with ids that the model does not have their text alone."""
        self.turns = [
            replace(turn, ids=None) if turn.ids and max(turn.ids) >= n else turn
            for turn in self.turns
        ]

    def instruct(self, system: str | None) -> None:
        if system != self.system:
            self._change({"system": system})

    def set(self, settings: Mapping[str, Any]) -> None:
        if settings != self.settings:
            self._change({"settings": dict(settings)})

    def add(self, turn: Turn, finish_reason: str | None = None) -> None:
        line: dict[str, Any] = {"time": _now(), "role": turn.role, "text": turn.text}
        if turn.role == "model":
            line |= {"finish_reason": finish_reason, "ids": turn.ids}
        self._change(line)

    def keep(self, n: int) -> None:
        """Withdraws all turns but the first n."""
        if n < len(self.turns):
            self._change({"keep": n})

    def leave(self, n: int, summary: str | None = None) -> None:
        """Takes the first n turns out of the model's context, for a summary if there is one."""
        self._change({"leave": n, "summary": summary})

    def _change(self, line: dict[str, Any]) -> None:
        self._apply(line)
        self._unwritten.append(line)
        if self.path and self.turns:
            self.write()

    def _apply(self, line: dict[str, Any]) -> None:
        """Raises KeyError, TypeError or ValueError if the line is none of the format's."""
        match line:
            case {"model": str(model), "tokenizer": str(tokenizer)}:
                if tokenizer != self.tokenizer:
                    self.turns = [replace(turn, ids=None) for turn in self.turns]
                self.model, self.tokenizer = model, tokenizer
            case {"system": None | str() as system}:
                self.system = system
            case {"settings": dict(settings)}:
                if wrong := [name for name, x in settings.items() if not _is_setting(name, x)]:
                    raise ValueError(
                        f"its setting {wrong[0]} cannot be {shown(settings[wrong[0]])}"
                    )
                self.settings = settings
            case {"role": "user", "text": str(text)}:
                self.turns.append(Turn("user", text))
            case {"role": "model", "text": str(text), "ids": None | list() | tuple() as ids}:
                if not all(type(token) is int and 0 <= token < 2**31 for token in ids or ()):
                    raise ValueError("its ids are none")
                self.turns.append(Turn("model", text, None if ids is None else tuple(ids)))
                self.n_answers += 1
            case {"keep": int(n)} if 0 <= n <= len(self.turns):
                del self.turns[n:]
                self.n_left = min(self.n_left, n)
            case {"leave": int(n), "summary": None | str() as summary} if 0 <= n <= len(self.turns):
                self.n_left, self.summary = n, summary
            case {"gemma_cli": int(version), "time": str(time)}:
                if version != VERSION:
                    raise ValueError(f"its format has version {version}")
                self.created = time
            case _:
                raise ValueError("it is no change of a conversation")

    # The file

    @classmethod
    def open(cls, path: Path, *, to_write: bool = True) -> Session:
        """Reads a session to go on with it, or only to look at it.

        A last line without an end was being written when its program was killed: it is left out.
        Raises GemmaError if the file cannot be read or is damaged, or if another program writes to
        it; FileNotFoundError if there is none.
        """
        session = cls(path)
        header, session._unwritten = session._unwritten, []
        if path.exists() and not path.is_file():  # a pipe would not end
            raise GemmaError(f"{path} is not a file: give the session another name.")
        try:
            if to_write:
                session._open(os.O_RDWR)
            n_bytes = path.stat().st_size
            data = path.read_bytes() if n_bytes <= LARGEST else b""
        except FileNotFoundError:
            raise
        except OSError as error:
            raise GemmaError(f"{path} cannot be read: {error.strerror}.") from None
        if n_bytes > LARGEST:
            session.close()
            raise GemmaError(f"{path} has {n_bytes} bytes, more than any conversation: delete it.")
        whole = data.rfind(b"\n") + 1
        if not whole:  # it was killed in its first line
            session._unwritten = header
        for n, raw in enumerate(data[:whole].splitlines(), 1):
            try:
                line = _read_line(raw)
                if n == 1 and "gemma_cli" not in line:
                    raise ValueError("it does not begin a session")
                session._apply(line)
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                session.close()
                readable = not isinstance(error, (UnicodeError, json.JSONDecodeError))
                why = error if readable else "it is not JSON"
                raise GemmaError(
                    f"{path} is damaged in line {n} ({why}): delete that line to leave it out."
                ) from None
        if session._file is not None and whole < len(data):
            os.ftruncate(session._file, whole)
        return session

    def _open(self, flags: int) -> None:
        assert self.path
        file = os.open(self.path, flags | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o600)
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise GemmaError(
                f"The session {self.name} is open in another gemma-cli: end that one first, or use "
                "another --session."
            ) from None
        self._file = file

    def write(self) -> None:
        """Writes the changes that are only in memory; if that fails, `failure` tells why."""
        assert self.path
        text = "".join(_to_json(line) + "\n" for line in self._unwritten)
        data = text.encode()
        try:
            if self._file is None:
                self._create()
            assert self._file is not None
            try:
                self._append(data)
            except OSError as error:
                if error.errno not in {ENOSPC, EDQUOT}:
                    raise
                # Snapshots can be made again; what was said cannot.
                make_room(self.path.parent, 0, budget=0)
                self._append(data)
        except OSError as error:
            self.failure = error
        else:
            self.failure = None
            self._unwritten.clear()

    def _append(self, data: bytes) -> None:
        """Writes all of the data, or nothing."""
        assert self._file is not None
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, data) < len(data):
                raise OSError(ENOSPC, os.strerror(ENOSPC))
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def _create(self) -> None:
        """Makes the file; a name that is taken meanwhile gets a number."""
        assert self.path
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.path
        for n in range(2, 1000):
            try:
                self._open(os.O_RDWR | os.O_CREAT | os.O_EXCL)
                return
            except FileExistsError:
                self.path = path.with_name(f"{path.stem}-{n}{SUFFIX}")
        self._open(os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def rename(self, name: str) -> None:
        """Gives the session another name, and keeps it from now on if it was not.

        Raises GemmaError if there is one of that name, or it cannot be.
        """
        path = session_path(name)
        if path == self.path and self._file is not None:
            return
        if path.exists():
            raise GemmaError(f"There is a session {name} already: choose another name.")
        before, self.path = self.path, path
        if self._file is None or before is None:
            if self.turns:
                self.write()
            return
        try:
            os.rename(before, path)
            with suppress(FileNotFoundError):
                os.rename(snapshot_path(before), snapshot_path(path))
        except OSError as error:
            self.path = before
            raise GemmaError(f"{before} cannot be renamed: {error.strerror}.") from None

    def close(self) -> None:
        """Lets others go on with the session."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _read_line(raw: bytes) -> dict[str, Any]:
    text = raw.decode()
    check_json_size(text, _MOST_VALUES)
    line = json.loads(text)
    if not isinstance(line, dict):
        raise ValueError("it is no change of a conversation")
    return line


def _is_setting(name: str, value: object) -> bool:
    """Whether a value is of the type of that option for answers; other names mean nothing here."""
    if name in {"temperature", "top_p", "min_p", "repeat_penalty"}:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in {"top_k", "seed", "max_tokens"}:
        return type(value) is int and value >= 0
    if name == "stop":
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    return name != "draft" or isinstance(value, bool)


def _to_json(line: dict[str, Any]) -> str:
    text = json.dumps(line, ensure_ascii=False)
    return json.dumps(line) if _NOT_PLAIN.search(text) else text


# The folder of sessions


def sessions_folder() -> Path:
    return state_folder() / "sessions"


def session_path(name: str) -> Path:
    """Where the session of a name is or would be. Raises GemmaError if it can be none."""
    if not re.fullmatch(r"\w[\w.+-]{0,99}", name) or visible(name) != name:
        raise GemmaError(
            f"{name!r} cannot be the name of a session: letters, digits and any of . + - _ can, "
            "up to 100."
        )
    return sessions_folder() / (name + SUFFIX)


def snapshot_path(session: Path) -> Path:
    return session.with_suffix(SNAPSHOT_SUFFIX)


def new_path() -> Path:
    """Where a session without a name goes: it is named after the time."""
    return session_path(f"{datetime.now():%Y-%m-%d-%H%M%S}")


def list_sessions() -> list[Path]:
    """The files of all sessions, that changed last comes last."""
    found = [path for path in sessions_folder().glob("*" + SUFFIX) if path.is_file()]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def named_session(name: str) -> Session:
    """The session of a name, to go on with it or to begin it. Raises as `Session.open` does, and
    GemmaError if the name can be none."""
    path = session_path(name)
    return Session.open(path) if path.exists() else Session(path)


def find_session(name: str) -> Path:
    """The file of a session. Raises GemmaError, which says what there is, if there is none."""
    path = session_path(name)
    if path.is_file():
        return path
    names = [session.stem for session in list_sessions()]
    close = get_close_matches(name, names, 1)
    hint = f" Did you mean {close[0]}?" if close else " `gemma-cli sessions list` shows all."
    raise GemmaError(f"There is no session {name}.{hint}")


# A session for others


def last_message(session: Session) -> tuple[int, str]:
    """Which turn is the user's last message, and what it says."""
    n = max(n for n, turn in enumerate(session.turns) if turn.role == "user")
    return n, session.turns[n].text


def title(session: Session) -> str:
    """The first line that was said."""
    said = session.turns[0].text.strip() if session.turns else ""
    return said.partition("\n")[0] or session.name


def as_markdown(session: Session) -> str:
    """The conversation for people to read, also what has left the model's context."""
    parts = [f"# {title(session)}", f"{session.model}, {session.created}"]
    if session.system:
        parts += ["## System", session.system]
    for turn in session.turns:
        parts += ["## User" if turn.role == "user" else "## Assistant", turn.text.strip()]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_messages(session: Session) -> dict[str, Any]:
    """The conversation in the form that other programs know: a model and its messages."""
    messages = [{"role": "system", "content": session.system}] if session.system else []
    for turn in session.turns:
        role = "user" if turn.role == "user" else "assistant"
        messages.append({"role": role, "content": turn.text})
    return {
        "name": session.name,
        "created": session.created,
        "model": session.model,
        "settings": session.settings,
        "messages": messages,
    }
