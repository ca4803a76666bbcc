"""The commands of a chat: lines that begin with a slash."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from gemma_cli.cli import answering, loading, options, output, sessions, terminal
from gemma_cli.cli.prompt import Values
from gemma_cli.cli.talk import NotNow, Talk
from gemma_cli.models import find_model, list_models
from gemma_cli.session import Session, find_session, last_message, list_sessions, new_path
from quantize.errors import GemmaError

KEYS = [
    ("Ctrl-C", "stop the answer; at the prompt drop the line, twice leave"),
    ("Ctrl-J, Alt-Enter", 'a new line; or put the message between lines of """'),
    ("Ctrl-G, Ctrl-R, Tab", "write in $EDITOR; search what you said; complete"),
]


@dataclass(frozen=True, slots=True)
class Command:
    """`run` does it, given what follows the name; it returns what the prompt is to hold then."""

    usage: str
    about: str
    run: Callable[[Talk, str], str | None]
    values: Values | None = lambda typed: ()


def obey(talk: Talk, line: str) -> str:
    """Does what a command says, or tells why not; returns what the prompt is to hold then: a
    message that is edited."""
    name, _, argument = line.partition(" ")
    command = COMMANDS.get(ALIASES.get(name, name))
    try:
        if not command:
            raise GemmaError(f"There is no command {name}. {_did_you_mean(name, COMMANDS)}")
        if argument.strip() and not command.usage:
            raise GemmaError(f"Nothing was done: {name} stands by itself.")
        return command.run(talk, argument.strip()) or ""
    except NotNow:
        pass
    except GemmaError as error:
        output.note(str(error))
    except typer.BadParameter as error:
        output.note(error.message)
    return ""


def _did_you_mean(name: str, names: Collection[str]) -> str:
    begun = [each for each in names if name and each.startswith(name)]
    close = begun if len(begun) == 1 else get_close_matches(name, names, 1)
    return f"Did you mean {close[0]}?" if close else f"There are {', '.join(names)}."


def is_command(text: str) -> bool:
    """Whether a message is meant as a command: /word, not the path of a file."""
    return re.match(r"/[\w?]+( [^\n]*)?$", text) is not None


def _help(talk: Talk, argument: str) -> None:
    commands = [(f"{name} {c.usage}".rstrip(), c.about) for name, c in COMMANDS.items()]
    output.note_table([*commands, *KEYS])  # They fit on a screen of 24 lines, with the prompt.


def _system(talk: Talk, argument: str) -> None:
    if argument:
        loading.wants_chat(talk.file, talk.chat, argument)
        talk.session.instruct(None if argument == "none" else argument)
    output.note(f"System text: {talk.session.system or 'none'}")


# Settings

WHOLE = "a whole number"


@dataclass(frozen=True, slots=True)
class Setting:
    parse: Callable[[str], Any]
    about: str
    values: str = "a number"


def _count(text: str) -> int:
    if int(text) < 0:
        raise ValueError("less than none")
    return int(text)


SETTINGS = {
    "temperature": Setting(float, "0 always takes the likeliest token, more is more varied"),
    "top-k": Setting(int, "draw from so many of the likeliest tokens; 0: from all", WHOLE),
    "top-p": Setting(float, "draw from the likeliest tokens that hold so much probability"),
    "min-p": Setting(float, "leave out tokens less likely than so much of the likeliest"),
    "repeat-penalty": Setting(float, "above 1, the last 64 tokens are less likely to come again"),
    "seed": Setting(int, "fixes the draws", WHOLE),
    "max-tokens": Setting(_count, "end an answer after so many tokens", f"{WHOLE} from 0"),
    "stop": Setting(lambda text: [text], "end an answer before this text", "a text"),
    "draft": Setting({"on": True, "off": False}.__getitem__, "guess tokens and check", "on or off"),
}


def _set(talk: Talk, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if name and name not in SETTINGS:
        raise GemmaError(f"There is no setting {name}. {_did_you_mean(name, SETTINGS)}")
    if value := value.strip():
        key, settings = name.replace("-", "_"), dict(talk.session.settings)
        settings.pop(key, None)
        if value != "default":
            settings[key] = _parse(name, value)
        talk.session.set(settings)
    defaults = {"max_tokens": talk.max_tokens(), "draft": True}
    effective = defaults | asdict(talk.sampling()) | talk.session.settings
    rows = []
    for each, setting in SETTINGS.items():
        key = each.replace("-", "_")
        shown = _spell(effective.get(key))
        source = "" if key in talk.session.settings else "default"
        rows.append((each, shown, source, setting.about))
    output.note_table([row for row in rows if name in {"", row[0]}])


def _parse(name: str, value: str) -> Any:
    setting = SETTINGS[name]
    key = name.replace("-", "_")
    try:
        parsed = setting.parse(value)
    except (KeyError, ValueError):
        raise GemmaError(f"{name} cannot be {value}: give {setting.values}, or default.") from None
    try:
        options.given(**{key: parsed} if key in answering.SAMPLING else {})
    except typer.BadParameter as error:
        raise GemmaError(f"{name} cannot be {value}: {error.message}") from None
    return parsed


def _spell(value: Any) -> str:
    match value:
        case None | []:
            return "none"
        case bool():
            return "on" if value else "off"
        case list():
            return " ".join(map(repr, value))
    return str(value)


def _setting_values(typed: str) -> Iterable[str]:
    name, blank, _ = typed.partition(" ")
    if not blank:
        return SETTINGS
    if name not in SETTINGS:
        return ()
    return ["default", *(("on", "off") if name == "draft" else ())]


# What was said


def _regen(talk: Talk, argument: str) -> None:
    _need_turns(talk)
    talk.answer_again()


def _undo(talk: Talk, argument: str) -> None:
    _need_turns(talk)
    n, text = last_message(talk.session)
    talk.session.keep(n)
    output.note(f"Withdrawn: {_beginning(text)}")


def _edit(talk: Talk, argument: str) -> str:
    _need_turns(talk)
    return last_message(talk.session)[1]


def _continue(talk: Talk, argument: str) -> None:
    _need_turns(talk)
    if talk.session.turns[-1].role == "user":
        raise GemmaError("The last message has no answer yet: /regen asks for one.")
    answer = talk.go_on()
    if answer.finish_reason == "stop" and not answer.text:
        output.note("The model has nothing to add.")


def _need_turns(talk: Talk) -> None:
    if not talk.session.turns:
        raise GemmaError("Nothing was said yet.")


def _beginning(text: str, n: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= n else line[: n - 3] + "..."


def _file(talk: Talk, argument: str) -> None:
    if argument == "none":
        talk.files.clear()
    elif argument:
        path = Path(argument).expanduser()
        text = loading.read_files([path])[0]
        if "\0" in text:
            raise GemmaError(f"{path} is not a text.")
        n_tokens = len(talk.ready().tokenizer.encode(text))
        capacity = talk.ready().cache.capacity
        if n_tokens >= capacity:
            raise GemmaError(
                f"{path} has {n_tokens:,} tokens, and the context holds {capacity:,}: start the "
                "chat with a larger -c/--context, or give a part of it."
            )
        talk.files[path.name] = text
        size = output.size(len(text.encode("utf-8", "surrogateescape")))
        output.note(f"{path}: {size}, {output.count(n_tokens, 'token')}.")
    names = ", ".join(talk.files)
    output.note(f"In front of your next message: {names}." if names else "No file is to be sent.")


def _tokens(talk: Talk, argument: str) -> None:
    _need_turns(talk)
    conversation, session = talk.ready(), talk.session
    rows = []
    for turn in session.turns[: session.n_left]:
        rows.append((turn.role, "-", _beginning(turn.text)))
    turns = session.turns[session.n_left :]
    for turn, ids in zip(turns, conversation.parts, strict=True):
        rows.append((turn.role, f"{len(ids):,}", _beginning(turn.text)))
    used, capacity = conversation.n_tokens, conversation.cache.capacity
    output.note_table([*rows, ("", f"{used:,}", f"of {capacity:,}; {capacity - used:,} are left")])
    if session.n_left:
        short = " A summary stands for them." if session.summary else ""
        output.note(f"The first {session.n_left} turns have left the context.{short}")


def _stats(talk: Talk, argument: str) -> None:
    conversation, answer = talk.ready(), talk.answer
    file, cache = talk.file, conversation.cache
    rows = [
        ("model", f"{file.path}, {output.size(file.size)}"),
        ("threads", str(conversation.model.n_threads)),
        (
            "context",
            f"{conversation.n_tokens:,} of {cache.capacity:,} tokens, "
            f"{output.size(cache.nbytes)} ({cache.kind})",
        ),
        ("session", str(talk.session.path or "not kept")),
    ]
    if answer:
        rows += [
            (
                "last prompt",
                f"{output.count(answer.prompt_tokens, 'token')}, {answer.prefilled:,} read in "
                f"{answer.prefill_s:.2f} s ({answer.prefill_tok_s:.1f}/s)",
            ),
            (
                "last answer",
                f"{output.count(len(answer.ids), 'token')} in {answer.decode_s:.2f} s "
                f"({answer.decode_tok_s:.1f}/s), {answer.finish_reason}",
            ),
        ]
    output.note_table(rows)


def _copy(talk: Talk, argument: str) -> None:
    """OSC 52 of xterm's control sequences: the terminal puts base64 into the clipboard."""
    answers = [turn.text for turn in talk.session.turns if turn.role == "model"]
    if not answers:
        raise GemmaError("There is no answer to copy yet.")
    text = answers[-1].strip()
    terminal.copy(text)
    output.note(f"Copied {len(text):,} characters, if this terminal lets programs do so.")


# Sessions, files and models


def _session_names(typed: str) -> Iterable[str]:
    return [path.stem for path in reversed(list_sessions())]


def _model_names(typed: str) -> Iterable[str]:
    return [path.stem for path in list_models()]


def _save(talk: Talk, argument: str) -> None:
    if not argument:
        raise GemmaError("Give the name: /save NAME")
    talk.session.rename(argument)
    output.note(f"This conversation is kept as {argument}.")


def _load(talk: Talk, argument: str) -> None:
    if not argument:
        raise GemmaError("Give the name of a session; /sessions lists them.")
    path = find_session(argument)
    if path == talk.session.path:
        raise GemmaError(f"This is {argument} already.")
    talk.change_session(Session.open(path))
    talk.show_last()


def _sessions(talk: Talk, argument: str) -> None:
    described = sessions.describe()
    if not described:
        raise GemmaError("No conversation was kept yet.")
    output.note_table(sessions.as_rows(described))


def _export(talk: Talk, argument: str) -> None:
    _need_turns(talk)
    if not argument:
        raise GemmaError("Give a file: /export FILE.md or FILE.json")
    path = Path(argument).expanduser()
    sessions.export(talk.session, path)
    output.note(f"Written to {path}.")


def _model(talk: Talk, argument: str) -> None:
    if argument:
        talk.change_model(find_model(argument))
    output.note(f"Model: {talk.path}")


def _clear(talk: Talk, argument: str) -> None:
    before = talk.session
    session = Session(new_path() if before.path else None)
    session.instruct(before.system)
    session.set(before.settings)
    talk.files.clear()
    talk.change_session(session)
    kept = f" The one before is kept as {before.name}." if before.path and before.turns else ""
    output.note(f"Cleared: a new conversation.{kept}")


COMMANDS = {
    "/clear": Command("", "begin a new conversation", _clear),
    "/continue": Command("", "have the last answer go on", _continue),
    "/copy": Command("", "copy the last answer to the clipboard", _copy),
    "/edit": Command("", "edit your last message, and have it answered", _edit),
    "/export": Command("FILE.md|.json", "write the conversation to a file", _export, None),
    "/file": Command("PATH", "put a file's text in front of your next message", _file, None),
    "/help": Command("", "show this", _help),
    "/load": Command("NAME", "go on with another session", _load, _session_names),
    "/model": Command("NAME", "go on with another model", _model, _model_names),
    "/quit": Command("", "leave, as Ctrl-D does", lambda talk, argument: None),
    "/regen": Command("", "have the last message answered again", _regen),
    "/save": Command("NAME", "name this session", _save),
    "/sessions": Command("", "list the sessions", _sessions),
    "/set": Command("NAME VALUE", "list or change how answers are made", _set, _setting_values),
    "/stats": Command("", "show the speed and what is used", _stats),
    "/system": Command("TEXT|none", "what the model should keep to", _system),
    "/tokens": Command("", "show what the context holds", _tokens),
    "/undo": Command("", "withdraw your last message and its answer", _undo),
}
ALIASES = {"/?": "/help", "/exit": "/quit", "/bye": "/quit"}
