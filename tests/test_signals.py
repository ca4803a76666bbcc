"""Signals in every phase, and files that shrink while they are mapped: one line at the most, the
status that says what happened, and the terminal as it was."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from program import CONTEXT, GOLDEN, program
from terminals import Terminal

from quantize.checkpoint import open_checkpoint
from quantize.pipeline import quantize


def run_code(
    code: str, *arguments: object, timeout: int = 60
) -> subprocess.CompletedProcess[bytes]:
    """Python code that imports the packages, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        check=False,
        timeout=timeout,
    )


def start(home: Path, *args: str | Path) -> subprocess.Popen[bytes]:
    command, environment = program(home)
    return subprocess.Popen(
        [*command, *map(str, args)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=os.setpgrp,  # noqa: PLW1509 (an orphaned group, as the tests are, cannot stop)
    )


def endless(home: Path) -> tuple[str | Path, ...]:
    return "run", "-m", home / "endless.safetensors", "-t", "0", "-c", str(CONTEXT), "--no-guard"


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3, 0.6])
def test_while_it_loads_and_reads(home: Path, tmp_path: Path, number: int, delay: float) -> None:
    """From the first line of our code on; before, Python says what it thinks of signals."""
    long = tmp_path / "long.txt"
    long.write_text("the man met ten men on the lane " * 2500)  # the most that the context holds
    command, environment = program(home)
    when = str(int(number)), str(delay)
    result = subprocess.run(
        [command[0], "-c", SIGNALLED, *when, *map(str, endless(home)), "-f", str(long)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (result.stdout, result.stderr) == (b"", b"")
    assert result.returncode == 128 + number


# The program sends itself the signal: on a busy machine a test may sleep for longer than it asked
# to, and the text has been read by then.
SIGNALLED = """
import os, sys, threading, gemma_cli.__main__
import gemma_cli.cli.main, gemma_cli.cli.signals
number, delay = int(sys.argv.pop(1)), float(sys.argv.pop(1))
def prepare(before=gemma_cli.cli.signals.prepare):
    before()
    timer = threading.Timer(delay, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
gemma_cli.cli.signals.prepare = prepare
gemma_cli.__main__.main()
"""


def test_ctrl_c_while_modules_are_imported(home: Path) -> None:
    """Where a KeyboardInterrupt would show a traceback of an import."""
    command, environment = program(home)
    code = (
        "import builtins, os, signal, gemma_cli.__main__\n"
        "def load(name, *args, real=builtins.__import__):\n"
        "    if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *args)\n"
        "builtins.__import__ = load\n"
        "gemma_cli.__main__.main()"
    )
    result = subprocess.run(
        [command[0], "-c", code, "models"], env=environment, capture_output=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"")


@pytest.mark.parametrize("number", SIGNALS)
def test_while_it_answers(home: Path, number: int) -> None:
    process = start(home, *endless(home), "--ndjson", "the man")
    assert process.stdout
    process.stdout.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (128 + number, b"")
    lines = [json.loads(line) for line in out.splitlines()]
    if number == signal.SIGINT:
        assert lines[-1]["finish_reason"] == "interrupted"


# Slowed down, so that the signal comes in its midst.
CONVERTING = """
import time, gemma_cli.__main__, quantize.modelfile
def write(self, *args, real=quantize.modelfile.Writer.write):
    real(self, *args)
    if len(self._pending) == 9: print("converting", flush=True)
    if len(self._pending) < 10: time.sleep(0.3)
quantize.modelfile.Writer.write = write
gemma_cli.__main__.main()
"""


def convert(home: Path, output: Path) -> subprocess.Popen[bytes]:
    command, environment = program(home)
    args = ("quantize", GOLDEN / "gemma-mha", "-o", output, "--bits", "8", "--force")
    process = subprocess.Popen(
        [command[0], "-c", CONVERTING, *map(str, args)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=os.setpgrp,  # noqa: PLW1509
    )
    assert process.stdout
    assert process.stdout.readline() == b"converting\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_while_it_converts(home: Path, tmp_path: Path, number: int) -> None:
    output = tmp_path / "models" / "a.safetensors"
    output.parent.mkdir()
    output.write_bytes(b"old")
    process = convert(home, output)
    assert len(list(output.parent.iterdir())) == 2
    process.send_signal(number)
    assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 128 + number
    assert list(output.parent.iterdir()) == [output]
    assert output.read_bytes() == b"old"


def stop_and_go_on(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTSTP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    process.send_signal(signal.SIGCONT)


def test_what_is_stopped_goes_on(home: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    quantize(open_checkpoint(GOLDEN / "gemma-mha"), whole, bits=8)
    process = convert(home, tmp_path / "a")
    stop_and_go_on(process)
    assert process.communicate(timeout=60)[0].startswith(f"{tmp_path}/a: ".encode())
    assert process.returncode == 0
    assert (tmp_path / "a").read_bytes() == whole.read_bytes()

    args = (*endless(home), "--ndjson", "-n", "400", "the man")
    undisturbed = start(home, *args).communicate(timeout=60)[0].splitlines()
    process = start(home, *args)
    assert process.stdout
    lines = [process.stdout.readline()]
    stop_and_go_on(process)
    # Not `communicate`, which would miss the lines that were read along with the first.
    lines += process.stdout.readlines()
    assert process.wait(timeout=60) == 0
    assert [json.loads(line)["token"] for line in lines[:-1]] == [
        json.loads(line)["token"] for line in undisturbed[:-1]
    ]


@pytest.mark.parametrize("number", SIGNALS)
def test_where_compiled_code_does_not_return(number: int) -> None:
    code = (
        "import os, signal, subprocess, sys, numba; from gemma_cli.cli import signals\n"
        "@numba.njit(['i8(i8)'], nogil=True)\n"
        "def work(n):\n"
        "    while n: n = n * 3 | 1\n"
        "    return n\n"
        "signals.prepare()\n"
        "if sys.argv[2] == 'exceptions': signals.become_exceptions()\n"
        "subprocess.Popen(['sh', '-c', f'sleep 0.3; kill -{sys.argv[1]} {os.getpid()}'])\n"
        "work(1)"
    )
    for how in ("exceptions", "at once"):
        result = run_code(code, int(number), how)
        assert (result.returncode, result.stderr) == (128 + number, b"")


@pytest.mark.parametrize("number", SIGNALS)
def test_in_a_callback_from_c(number: int) -> None:
    """Where exceptions cannot pass; the compiler calls back whenever it has a function ready."""
    code = (
        "import ctypes, signal, sys, time; from gemma_cli.cli import signals\n"
        "signals.prepare()\n"
        "signals.become_exceptions()\n"
        "ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(int(sys.argv[1])))()\n"
        "try:\n"
        "    time.sleep(30)\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)"
    )
    result = run_code(code, int(number), timeout=20)
    assert (result.returncode, result.stderr) == (128 + number, b"")


@pytest.mark.parametrize("status", ["7", "0", "130", "137", "None", "'143'", "[143]"])
def test_an_exit_in_a_callback_that_is_no_signal(status: str) -> None:
    """Is told as Python tells it, and nothing is sent: 137 would be SIGKILL."""
    code = (
        "import ctypes, sys, time; from gemma_cli.cli import signals\n"
        "signals.prepare()\n"
        "signals.become_exceptions()\n"
        f"ctypes.CFUNCTYPE(None)(lambda: sys.exit({status}))()\n"
        "time.sleep(0.1)\n"  # ten times as long as the other would take
        "print('goes on')"
    )
    result = run_code(code, timeout=20)
    assert (result.returncode, result.stdout) == (0, b"goes on\n")
    assert b"SystemExit" in result.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_what_is_ignored_stays_so(home: Path, number: int) -> None:
    """As nohup says, and shells of what they run in the background."""
    command, environment = program(home)
    args = [*command, *map(str, endless(home)), "--ndjson", "the man"]
    with subprocess.Popen(
        ["sh", "-c", f'trap "" {number}; exec "$@"', "sh", *args],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(number)
        for _ in range(500):
            assert process.stdout.readline()
        process.kill()


def test_a_conversation_is_stopped_and_goes_on(home: Path) -> None:
    model = str(home / "endless.safetensors")
    with Terminal(home, "chat", "-m", model, "-t", "0", "--plain", "-c", str(CONTEXT)) as terminal:
        before = terminal.modes
        terminal.wait_for(r"(?m)^>")
        terminal.type("the man\r")
        terminal.wait_for(r"> the man\n.{20}")
        during = terminal.modes
        assert during != before
        terminal.type("\x1a")  # Ctrl-Z
        terminal.wait_until_stopped()
        assert terminal.modes == before
        terminal.send_signal(signal.SIGCONT)
        terminal.wait_for(rf"[\s\S]{{{len(terminal.text) + 100}}}")
        assert terminal.modes == during
        terminal.type("\x03")
        terminal.wait_for(r"tokens/s")
        terminal.type("\x04")
        assert terminal.wait() == 0


# Files that lose what is mapped


@pytest.mark.parametrize("left", [0, 5000])
def test_a_model_file_that_shrinks_while_it_is_used(home: Path, tmp_path: Path, left: int) -> None:
    path = tmp_path / "m\x1b[2J.safetensors"
    shutil.copy(home / "endless.safetensors", path)
    command, *options = endless(home)
    options[1] = path
    process = start(home, command, *options, "--ndjson", "the man")
    assert process.stdout
    process.stdout.readline()
    os.truncate(path, left)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.decode().count("\n") == 1
    assert err.startswith(f"gemma-cli: {tmp_path}/m[2J.safetensors was ".encode())
    assert b" while it was in use" in err
    assert b"\x1b" not in err


@pytest.mark.parametrize("reader", ["data.sum()", "hashlib.sha256(data).digest()", "kernel(data)"])
def test_reading_what_is_no_longer_there(tmp_path: Path, reader: str) -> None:
    """In Python's own code, where others may run meanwhile, and in compiled code."""
    path = tmp_path / "a"
    path.write_bytes(bytes(10**6))
    code = (
        "import hashlib, os, sys, numba; from pathlib import Path\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from gemma_cli.cli import signals\n"
        "from quantize.checkpoint.source import map_file\n"
        "@numba.njit(nogil=True)\n"
        "def kernel(data): return data.sum()\n"
        "signals.prepare()\n"
        "data = map_file(Path(sys.argv[1]))\n"
        "os.truncate(sys.argv[1], 4096)\n"
        f"ThreadPoolExecutor().submit(lambda: {reader}).result()"
    )
    result = run_code(code, path)
    expected = f"gemma-cli: {path} was cut short while it was in use: make it again.\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, b"", expected.encode())


def test_threads_that_lose_their_pages_together(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(10**6))
    code = (
        "import os, sys, time, numba; from pathlib import Path\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from gemma_cli.cli import signals\n"
        "from quantize.checkpoint.source import map_file\n"
        "@numba.njit(['i8(u1[:])', 'i8(Array(u1, 1, \"C\", readonly=True))'], nogil=True)\n"
        "def kernel(data): return data.sum()\n"
        "signals.prepare()\n"
        "write = os.write\n"
        "os.write = lambda *args: (write(*args), time.sleep(0.3))\n"  # lets the others come
        "data = map_file(Path(sys.argv[1]))\n"
        "os.truncate(sys.argv[1], 4096)\n"
        "pool = ThreadPoolExecutor(4)\n"
        "[pool.submit(kernel, data) for _ in range(4)][0].result()"
    )
    result = run_code(code, path)
    expected = f"gemma-cli: {path} was cut short while it was in use: make it again.\n"
    assert (result.returncode, result.stderr) == (1, expected.encode())


def test_a_terminal_is_as_it_was_when_the_model_file_is_gone(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(home / "endless.safetensors", path)
    with Terminal(home, "chat", "-m", str(path), "-t", "0", "--plain", "-c", "9999") as terminal:
        before = terminal.modes
        terminal.wait_for(r"(?m)^>")
        terminal.type("the man\r")
        terminal.wait_for(r"> the man\n.{20}")
        os.truncate(path, 0)
        assert terminal.wait() == 1
        assert terminal.modes == before
    # Lines are broken anywhere, wherever the answer was.
    assert "whileitwasinuse" in "".join(terminal.text.split())
