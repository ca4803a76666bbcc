"""Signals: the program leaves with the status that says so, and the terminal is as it was."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from gemma_cli.cli import output
from quantize.errors import visible

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

Handler = Callable[[int, FrameType | None], None]

_SHOW_CURSOR = "\x1b[?25h"

GRACE = 0.7
"""Seconds until Python has to have handled a signal."""

LEAVING = 5.0
"""Seconds until the program has to have left, where a signal ends it."""

_INTERRUPT, *_TERMINATE = (
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_handled = threading.Event()
_leaving = threading.RLock()
_restorers: list[Callable[[], None]] = []
_kept: list[object] = []  # what the system calls must not go away


def prepare() -> None:
    """Has signals end the program at once, which is right while it loads and only prints."""
    _restorers.append(_terminal_restorer())
    _watch()
    _handle(_leave, _leave)
    if hasattr(signal, "SIGPIPE"):
        # Not an exception: it would have to be kept from Typer, and Python would flush the
        # closed pipe once more at its end, and complain.
        signal.signal(signal.SIGPIPE, lambda *_: os._exit(141))
    if hasattr(signal, "SIGBUS"):
        _explain_lost_pages()


def become_exceptions() -> None:
    """From here on there is something to say or to tidy up: Ctrl-C is a KeyboardInterrupt, and
    signals that end the program are a SystemExit."""
    if _restorers:
        sys.unraisablehook = _send_again
        _handle(_interrupt, _exit)


def _handle(interrupt: Handler, terminate: Handler) -> None:
    for number in (_INTERRUPT, *_TERMINATE):
        # What nohup, or a shell for what runs in the background, has set stays.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt if number == _INTERRUPT else terminate)


def _leave(number: int, _: FrameType | None) -> None:
    _leave_at_once(128 + number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _handled.set()
    signal.default_int_handler(number, frame)


def _exit(number: int, _: FrameType | None) -> None:
    _handled.set()
    sys.exit(128 + number)


def _send_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Sends a signal once more whose exception could not pass, as in a callback from C (the
    compiler has some): Python would print and forget it.

    From another thread, and a little later: sent from here, it would be handled here.
    """
    exception = unraisable.exc_value
    statuses = {128 + number: number for number in _TERMINATE}
    if isinstance(exception, KeyboardInterrupt):
        number = _INTERRUPT
    elif isinstance(exception, SystemExit) and exception.code in statuses:
        number = statuses[exception.code]
    else:  # no signal's
        sys.__unraisablehook__(unraisable)
        return
    again = threading.Timer(0.01, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _watch() -> None:
    """Ends the program where compiled code or the compiler keeps Python from handling a signal, or
    where a thread does not end. Handlers that are not of this file may take their time.
    """
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)

    def watch() -> None:
        while number := os.read(receiver, 1)[0]:
            if signal.getsignal(number) not in (_leave, _interrupt, _exit):
                continue
            if not _handled.wait(GRACE):
                _leave_at_once(128 + number)
            _handled.clear()
            if number in _TERMINATE:
                time.sleep(LEAVING)
                _leave_at_once(128 + number)

    threading.Thread(target=watch, daemon=True).start()


def _terminal_restorer() -> Callable[[], None]:
    """A function that gives the terminal the modes that it has now, and its cursor."""
    modes = None
    if termios and sys.stdin and sys.stdin.isatty():
        modes = termios.tcgetattr(sys.stdin.fileno())

    def restore() -> None:
        if modes:
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, modes)
        if sys.stderr and sys.stderr.isatty():
            os.write(2, _SHOW_CURSOR.encode())

    return restore


def _explain_lost_pages() -> None:
    """Has the program end with a sentence where a mapped file has lost what it held.

    The system tells by a signal, in the midst of whatever reads it. Python's own handlers run after
    that, and it would never end.
    """

    def lost(_: int) -> None:
        from quantize.checkpoint.source import mapped_sizes

        what = "A file that was in use cannot be read any more"
        for path, size in mapped_sizes.items():
            if not path.exists() or path.stat().st_size < size:
                what = f"{path} was cut short while it was in use"
        _leave_at_once(1, f"gemma-cli: {output.clean(visible(what))}: make it again.\n")

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lost)
    _kept.append(handler)
    ctypes.CDLL(None).signal(signal.SIGBUS, handler)


def _leave_at_once(status: int, text: str = "") -> None:
    # Several threads may lose their pages at once, and one is to say so. Never released; a signal
    # that comes meanwhile, in the same thread, passes.
    _leaving.acquire()
    for restore in _restorers:
        restore()
    os.write(2, text.encode())
    os._exit(status)
