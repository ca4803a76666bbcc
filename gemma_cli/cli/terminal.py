"""The terminal between two prompts."""

import os
import signal
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]


def shows_more_than_lines() -> bool:
    """Whether standard output is a terminal on which something can be drawn again."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in {None, "", "dumb", "unknown"}


def size() -> os.terminal_size:
    """The columns and rows of standard output's terminal; COLUMNS can make it narrower."""
    columns, rows = os.get_terminal_size(sys.stdout.fileno())
    stated = os.environ.get("COLUMNS", "")
    if stated.isdecimal() and int(stated):
        columns = min(columns, int(stated))
    return os.terminal_size((columns or 80, rows or 24))


def copy(text: str) -> None:
    """Puts a text into the clipboard of the terminal: OSC 52 of xterm's control sequences."""
    screen = sys.stdout if sys.stdout.isatty() else sys.stderr
    data = b64encode(text.encode("utf-8", "replace")).decode()
    screen.write(f"\x1b]52;c;{data}\x07")
    screen.flush()


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Gives a function that raises KeyboardInterrupt if Ctrl-C was pressed.

    So an answer is interrupted between two tokens, and nothing that must be done whole is.
    """
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        pressed = True

    def check() -> None:
        nonlocal pressed
        if pressed:
            pressed = False
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def forget_keys() -> None:
    """Drops what was typed and not read yet."""
    if termios and sys.stdin.isatty():
        termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)


@contextmanager
def keys_kept() -> Iterator[None]:
    """What is typed between two prompts is not shown, and goes to the next one."""
    if termios is None or os.environ.get("TERM") == "dumb":  # there is no such prompt
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    silent = termios.tcgetattr(keyboard)
    silent[0] &= ~termios.ICRNL  # Enter is not Ctrl-J
    silent[3] = silent[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH

    def stop(number: int, _: object) -> None:  # Ctrl-Z
        termios.tcsetattr(keyboard, termios.TCSANOW, before)
        os.kill(os.getpid(), signal.SIGSTOP)
        termios.tcsetattr(keyboard, termios.TCSANOW, silent)  # here it goes on

    termios.tcsetattr(keyboard, termios.TCSANOW, silent)
    handler = signal.signal(signal.SIGTSTP, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, handler)
        termios.tcsetattr(keyboard, termios.TCSANOW, before)
