"""Threads of a model: they end with it, however it was left, and work on nothing but their run."""

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from program import Cli, program

from gemma_cli.generation import generate
from gemma_cli.runtime import Model, machine_code, workspace
from gemma_cli.sampling import Sampler, Sampling
from quantize.modelfile import ModelFile

IDS = [2, *range(5, 25)]


def model_of(home: Path) -> Model:
    return Model(ModelFile.open(home / "endless.safetensors"), n_threads=4)


@pytest.fixture
def started(home: Path) -> Callable[[], set[threading.Thread]]:
    """Gives the threads that were started in the test."""
    before = set(threading.enumerate())
    return lambda: set(threading.enumerate()) - before


def assert_they_end(threads: set[threading.Thread]) -> None:
    gc.collect()
    for thread in threads:
        thread.join(60)
    assert not [thread.name for thread in threads if thread.is_alive()]


def test_they_end_with_the_model(home: Path, started: Callable[[], set[threading.Thread]]) -> None:
    model = model_of(home)
    model.forward(IDS, model.new_cache(50))
    threads = started()
    assert 1 <= len(threads) <= 3  # as many as could not be done without
    del model
    assert_they_end(threads)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
def test_they_end_where_an_answer_is_broken_off(
    home: Path, started: Callable[[], set[threading.Thread]], error: type[BaseException]
) -> None:
    def answer() -> None:
        model = model_of(home)
        sampler = Sampler(Sampling(temperature=0))
        for n, _ in enumerate(generate(model, model.new_cache(500), IDS, sampler, frozenset())):
            if n == 3:
                raise error

    with pytest.raises(error):
        answer()
    assert_they_end(started())


@pytest.mark.parametrize("command", ["run", "map"])
def test_commands_leave_none(
    cli: Cli, home: Path, started: Callable[[], set[threading.Thread]], command: str
) -> None:
    model = str(home / "endless.safetensors")
    for stdin in (b"the man\nthe men", b"the man " * 10_000):  # which does not fit
        cli(command, "-m", model, "-t", "0", "-n", "5", "-c", "100", "--threads", "4", stdin=stdin)
    assert_they_end(started())


LIBRARY = """
import signal, sys
from gemma_cli.generation import generate
from gemma_cli.runtime import Model
from gemma_cli.sampling import Sampler, Sampling
from quantize.modelfile import ModelFile
from pathlib import Path
model = Model(ModelFile.open(Path(sys.argv[1])), n_threads=4)
sampler = Sampler(Sampling(temperature=0))
for n, _ in enumerate(generate(model, model.new_cache(500), [2, 5, 6], sampler, frozenset())):
    if n == 3:
        exec(sys.argv[2])
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("sys.exit(7)", 7),
        ("1 / 0", 1),
        ("signal.raise_signal(signal.SIGINT)", -signal.SIGINT),
        ("pass", 0),
    ],
)
def test_a_process_of_somebody_else_ends(home: Path, end: str, status: int) -> None:
    """Which has none of the program's handlers, and does not leave by os._exit."""
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY, str(home / "endless.safetensors"), end],
        env=program(home)[1],
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == status, done.stderr


@pytest.mark.parametrize("known", [True, False])
def test_a_run_waits_for_threads_of_one_that_was_interrupted(
    home: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Ctrl-C may come when a thread has its work, and knows of it or not. It uses the memory that
    the next run would."""
    model = model_of(home)
    expected = model.forward(IDS, model.new_cache(50)).copy()
    while (model._threads[:, workspace.STATE] != workspace.ASLEEP).any():
        time.sleep(0.001)
    gate, entered, busy = threading.Event(), list[bool](), list[bool]()
    load, calls = machine_code.load, model._calls

    def watched(example: tuple[Any, ...]) -> machine_code.Code:
        code = load(example)

        def serve(row: int, thread: int) -> None:
            entered.append(gate.wait(20))
            code.serve(row, thread)

        def call(rows: int, n: int, program: int) -> int:
            busy.append(workspace.CALLED in model._states.tolist())
            return code.call(rows, n, program)

        return code._replace(serve=serve, call=call)

    class Interrupted:
        def put(self, call: Any) -> None:
            if known:
                calls[0].put(call)
            raise KeyboardInterrupt

    monkeypatch.setattr(machine_code, "load", watched)
    cache = model.new_cache(50)
    with monkeypatch.context() as patch:
        patch.setattr(model, "_calls", [Interrupted(), *calls[1:]])
        with pytest.raises(KeyboardInterrupt):
            model.forward(IDS, cache)
    held = weakref.ref(cache)
    del cache
    gc.collect()
    assert held()  # what the thread has yet to write to
    threading.Timer(0.3, gate.set).start()
    np.testing.assert_array_equal(model.forward(IDS, model.new_cache(50)), expected)
    assert entered[0]
    assert busy == [
        False,
        False,
    ]  # The second was called when the threads were done with the first.
    gc.collect()
    assert not held()


def test_threads_that_wait_are_called_and_go_to_sleep(home: Path) -> None:
    model = model_of(home)

    def one_by_one(model: Model, *pauses: float) -> np.ndarray[Any, Any]:
        cache, logits = model.new_cache(50), []
        for i, pause in zip(IDS, cycle(pauses), strict=False):
            logits.append(model.forward([i], cache))
            time.sleep(pause)
        return np.array(logits)

    # A thread waits for a millisecond.
    paused = one_by_one(model, 0, 0, 0.0005, 0.0015, 0.005)
    np.testing.assert_array_equal(paused, one_by_one(model, 0))
    kept = weakref.ref(model)
    del model
    deadline = time.monotonic() + 20
    while kept() and time.monotonic() < deadline:  # A thread that waits has it, too.
        time.sleep(0.001)
    assert not kept()
