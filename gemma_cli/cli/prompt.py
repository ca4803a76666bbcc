"""The chat's prompt on a terminal: editing, history, completion and a status line."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, is_searching
from prompt_toolkit.history import FileHistory, History, InMemoryHistory, ThreadedHistory
from prompt_toolkit.input.typeahead import clear_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPress
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import create_output
from prompt_toolkit.styles import Style
from prompt_toolkit.utils import is_dumb_terminal

from gemma_cli.cli import output, terminal
from quantize.errors import visible

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.key_binding import KeyPressEvent

PROMPT, CONTINUATION = "> ", "  "
LISTENING = 0.03  # seconds between two looks at what is typed while there is no prompt
QUOTES = '"""'

# What was asked stands out; the status does not.
STYLE = Style([("prompt", "bold fg:ansicyan"), ("bottom-toolbar", "noreverse dim")])

Values = Callable[[str], Iterable[str]]
"""What a command's argument can be, given what is typed of it."""

Commands = Mapping[str, tuple[str, str, Values | None]]
"""What the first word of a message may be: what follows it, a line about it, and the values of what
follows; None for the names of files."""

Begin = Callable[[], Future[Any]]
"""Begins what is to be done while someone types."""


def is_open(text: str) -> bool:
    """Whether a message begins with three quotes that are not closed yet."""
    return text.startswith(QUOTES) and text.count(QUOTES) % 2 == 1


def unquote(text: str) -> str:
    """A message without the three quotes around it, and without the lines that held only them."""
    if len(text) < 2 * len(QUOTES) or not (text.startswith(QUOTES) and text.endswith(QUOTES)):
        return text
    return text[len(QUOTES) : -len(QUOTES)].removeprefix("\n").removesuffix("\n")


def open_prompt(commands: Commands, status: Callable[[], str], history: Path | None) -> LinePrompt:
    """What the terminal is good for; `status` is shown below the prompt."""
    # Standard output is for answers alone if it is not a terminal.
    screen = sys.stdout if sys.stdout.isatty() else sys.stderr
    if is_dumb_terminal() or not screen.isatty():
        return LinePrompt(screen)
    return ScreenPrompt(commands, status, history, screen)


class LinePrompt:
    """Asks for one message after the other, where there is nothing but lines."""

    def __init__(self, screen: TextIO) -> None:
        self._screen = screen
        self._given_up = False  # with Ctrl-C, the last time

    def ask(
        self, default: str = "", *, begin: Begin | None, arrived: Callable[[], object]
    ) -> str | None:
        """A message, or None: Ctrl-D, or Ctrl-C twice. "" if someone gives up the default.

        When the prompt is there, `begin` is called; when what it has begun is done while someone
        still types, `arrived` is called. That may print, and if it raises, so does this.
        """
        while True:
            try:
                text = self._read(default, begin, arrived)
            except EOFError:
                return None
            except KeyboardInterrupt:
                if self._given_up and not self._typed():
                    return None
                self._given_up = True
                output.note("Ctrl-C again, or Ctrl-D, leaves.")
                if default:
                    return ""
                continue
            self._given_up = False
            if text.strip():
                return unquote(text.strip())

    def _read(self, default: str, begin: Begin | None, arrived: Callable[[], object]) -> str:
        if begin:
            begin()
            arrived()
        text = self._read_line(PROMPT)
        while is_open(text):
            text += "\n" + self._read_line(CONTINUATION)
        return text

    def _read_line(self, prompt: str) -> str:
        self._screen.write(prompt)
        self._screen.flush()
        line = sys.stdin.readline()
        if not line:
            self._screen.write("\n")  # Ctrl-D leaves the cursor behind the prompt
            raise EOFError
        return line.removesuffix("\n")

    def _typed(self) -> str:
        return ""

    @contextmanager
    def listen(self, show: Callable[[str], None]) -> Iterator[None]:
        """What is typed meanwhile is the next prompt's, and shown by `show` where that is of use,
        in another thread."""
        yield

    def forget(self) -> None:
        """Drops what was typed and not asked for yet."""
        terminal.forget_keys()

    def choose(self, choices: Mapping[str, str]) -> str:
        """Asks which it is to be, by its key; the last one, if someone gives up."""
        for key, about in choices.items():
            output.note(f"  {key}  {about}")
        *others, last = choices
        question = f"{', '.join(others)} or {last}? " if others else f"{last}? "
        while True:
            try:
                # A line, not a key: what is being typed is no choice.
                line = self._read_choice(question).strip().lower()
            except (EOFError, KeyboardInterrupt):
                return last
            if line in choices:
                return line

    def _read_choice(self, question: str) -> str:
        return self._read_line(question)


class ScreenPrompt(LinePrompt):
    """Asks with all that a terminal can show."""

    def __init__(
        self, commands: Commands, status: Callable[[], str], history: Path | None, screen: TextIO
    ) -> None:
        super().__init__(screen)
        self._session: PromptSession[str] = PromptSession(
            [("class:prompt", PROMPT)],
            multiline=True,
            prompt_continuation=CONTINUATION,
            key_bindings=_key_bindings(),
            completer=_CommandCompleter(commands),
            # The menu takes room below the prompt only where there can be one.
            complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
            bottom_toolbar=lambda: f" {output.clean(visible(status()))}",
            history=_open_history(history),
            enable_suspend=True,
            style=STYLE,
            tempfile_suffix=".md",
            output=create_output(stdout=screen),
        )

    def _read(self, default: str, begin: Begin | None, arrived: Callable[[], object]) -> str:
        app = self._session.app

        async def watch(begin: Begin) -> None:
            pending = begin()
            while not pending.done():
                await asyncio.sleep(0.05)
                app.invalidate()  # the status tells how far it is
            # prompt_toolkit's in_terminal() would show what is typed meanwhile, and take Enter for
            # a new line.
            app.renderer.erase()
            try:
                arrived()
            except Exception as error:
                app.exit(exception=error)
            app.renderer.request_absolute_cursor_position()
            app.invalidate()

        def pre_run() -> None:
            if begin:
                app.create_background_task(watch(begin))

        return self._session.prompt(default=default, pre_run=pre_run)

    @contextmanager
    def listen(self, show: Callable[[str], None]) -> Iterator[None]:
        keyboard, ended = self._session.input, Event()
        keys: list[KeyPress] = []

        def watch() -> None:
            while not ended.wait(LISTENING):
                if new := keyboard.read_keys():
                    keys.extend(new)
                    show(PROMPT + _typed_text(keys))

        thread = Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            store_typeahead(keyboard, keys)

    def forget(self) -> None:
        clear_typeahead(self._session.input)
        super().forget()

    def _typed(self) -> str:
        return self._session.default_buffer.text

    def _read_choice(self, question: str) -> str:
        return PromptSession[str](question, output=self._session.output).prompt()


def _typed_text(keys: Sequence[KeyPress]) -> str:
    """About what a prompt will make of the keys: it knows more of them."""
    text = ""
    for press in keys:
        if press.key == Keys.Backspace:
            text = text[:-1]
        elif press.key in (Keys.Enter, Keys.ControlJ):
            text += "\n"
        elif press.key == Keys.BracketedPaste:
            text += press.data.replace("\r\n", "\n").replace("\r", "\n")
        elif not isinstance(press.key, Keys):
            text += press.data
    return text


def _key_bindings() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter", filter=~is_searching)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text.lstrip()):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j", filter=~is_searching)
    def _newline(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-g", filter=~is_searching)
    def _edit(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    return keys


class _CommandCompleter(Completer):
    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        typed = document.text_before_cursor
        name, blank, argument = typed.partition(" ")
        if not typed.startswith("/") or "\n" in typed:
            return
        if not blank:
            for command, (usage, about, _) in self._commands.items():
                if command.startswith(name):
                    text = f"{command} " if usage else command
                    shown = f"{command} {usage}".rstrip()
                    yield Completion(text, -len(name), display=shown, display_meta=about)
            return
        *_, values = self._commands.get(name, ("", "", lambda typed: ()))
        if values is None:
            yield from self._paths.get_completions(Document(argument), event)
            return
        word = argument.rpartition(" ")[2]
        for value in values(argument):
            if value.startswith(word):
                yield Completion(value, -len(word))


class _History(FileHistory):
    """Kept as long as it can be written; what is not kept is no reason to stop."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def _open_history(path: Path | None) -> History:
    """The messages of earlier chats, in a file that only its owner can read; None: of this one."""
    if path is None:
        return InMemoryHistory()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    return ThreadedHistory(_History(path))
