"""A terminal to run the program in: pyte's, whose screen and scrollback can be looked at."""

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pyte
from program import program

# The terminal is the program's controlling one, so that Ctrl-C typed there interrupts it.
CONTROL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
START = f"{CONTROL} import runpy; runpy.run_module('gemma_cli', run_name='__main__')"
START_OTHER = f"{CONTROL} import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"


class _Screen(pyte.HistoryScreen):
    """Answers what programs ask a terminal, as where the cursor is."""

    def __init__(self, columns: int, lines: int, answer: Callable[[bytes], None]) -> None:
        super().__init__(columns, lines, history=100_000, ratio=0.001)
        self._answer = answer

    def write_process_input(self, data: str) -> None:
        self._answer(data.encode())


class Terminal:
    """The program with a terminal for all three streams."""

    def __init__(
        self,
        home: Path,
        *args: str,
        width: int = 80,
        height: int = 24,
        timeout: float = 60,
        start: str = START,
        **environment: str,
    ) -> None:
        self._ours, theirs = os.openpty()
        self.received = b""
        self._deadline = time.monotonic() + timeout
        self.screen = _Screen(width, height, self.type)
        self._stream = pyte.ByteStream(self.screen)
        self._set_size(width, height)
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, *args],
            env=program(home)[1] | environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._ours)

    def _set_size(self, width: int, height: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def resize(self, width: int, height: int) -> None:
        self._set_size(width, height)
        self.screen.resize(height, width)
        self.send_signal(signal.SIGWINCH)

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait_until_stopped(self) -> None:
        """Waits until a signal has stopped the program, taking what it still writes."""
        while not os.WIFSTOPPED(os.waitpid(self._process.pid, os.WUNTRACED | os.WNOHANG)[1]):
            assert time.monotonic() < self._deadline, f"it was not stopped:\n{self.text}"
            if select.select([self._ours], [], [], 0.01)[0]:
                self._receive()

    @property
    def modes(self) -> list[Any]:
        """How the terminal treats what is typed."""
        return termios.tcgetattr(self._ours)

    def type(self, keys: str | bytes) -> None:
        os.write(self._ours, keys.encode() if isinstance(keys, str) else keys)

    def _receive(self) -> bool:
        """Takes what the program writes; tells whether it still can."""
        left = self._deadline - time.monotonic()
        ready, _, _ = select.select([self._ours], [], [], max(0, left))
        assert ready, f"nothing more came; the screen:\n{self.text}"
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # the other end is closed
            data = b""
        self.received += data
        self._stream.feed(data)
        return bool(data)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Waits until the text on the terminal matches."""
        while not (found := re.search(pattern, self.text)):
            assert self._receive(), (
                f"it left with {self._process.wait()} without {pattern!r}:\n{self.text}"
            )
        return found

    def wait(self) -> int:
        """Waits until the program leaves; returns its status."""
        while self._receive():
            pass
        return self._process.wait(10)

    @property
    def text(self) -> str:
        """What is in the scrollback and on the screen, without blanks at the ends of lines."""
        above = [self._line(line) for line in self.screen.history.top]
        return "\n".join([*above, *(line.rstrip() for line in self.screen.display)]).rstrip()

    def _line(self, line: Any) -> str:
        return "".join(line[x].data for x in range(self.screen.columns)).rstrip()
