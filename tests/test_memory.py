"""Where memory is short, a sentence says how much is needed, before anything begins."""

import re
import resource
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import random_weights, tiny, write_hf
from program import CONTEXT, Cli, load, program

from gemma_cli.runtime.kv_cache import KVCache
from quantize import memory
from quantize.errors import GemmaError

GB = 10**9
V2 = "sys/fs/cgroup/user/app"
V1 = "sys/fs/cgroup/memory/docker/x"
STATM = Path("/proc/self/statm")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has the system say what is given: files by their paths."""

    def say(free: int, files: dict[str, str] | None = None) -> None:
        meminfo = f"MemTotal: 9 kB\nMemAvailable: {free // 1024} kB\nSwapFree: 0 kB\n"
        for name, text in {"proc/meminfo": meminfo, **(files or {})}.items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(memory, "_ROOT", tmp_path / "root")

    return say


def test_this_system_says_how_much_is_left() -> None:
    left = memory.memory_left()
    assert left is not None
    assert 10**6 < left < 10**15


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, 8 * GB),
        ({"proc/self/cgroup": "0::/user/app\n"}, 8 * GB),
        (
            {
                "proc/self/cgroup": "0::/user/app\n",
                f"{V2}/memory.max": "3000000000\n",
                f"{V2}/memory.current": "2000000000\n",
                f"{V2}/memory.stat": "anon 5\ninactive_file 300000000\nactive_file 100000000\n",
            },
            1.4 * GB,
        ),
        (
            {  # a limit of the group above; none of its own
                "proc/self/cgroup": "0::/user/app\n",
                f"{V2}/memory.max": "max\n",
                f"{V2}/memory.current": "2000000000\n",
                f"{V2}/memory.stat": "anon 5\n",
                "sys/fs/cgroup/user/memory.max": "2500000000\n",
                "sys/fs/cgroup/user/memory.current": "2600000000\n",
                "sys/fs/cgroup/user/memory.stat": "inactive_file 200000000\n",
            },
            0.1 * GB,
        ),
        (
            {
                "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/x\n",
                f"{V1}/memory.limit_in_bytes": "1000000000\n",
                f"{V1}/memory.usage_in_bytes": "900000000\n",
                f"{V1}/memory.stat": "inactive_file 7\ntotal_inactive_file 100000000\n",
            },
            0.2 * GB,
        ),
        (
            {  # more than there may be, as after a limit was lowered
                "proc/self/cgroup": "0::/user/app\n",
                f"{V2}/memory.max": "1\n",
                f"{V2}/memory.current": "2000000000\n",
                f"{V2}/memory.stat": "",
            },
            0,
        ),
        ({"proc/self/cgroup": "garbage\n", f"{V2}/memory.max": "x"}, 8 * GB),
    ],
)
def test_what_is_left(system: Callable[..., None], files: dict[str, str], left: float) -> None:
    system(8 * GB, files)
    assert memory.memory_left() == pytest.approx(left, abs=1024)
    memory.check_memory(int(left) - 1024, "It takes", "do less")
    message = "It takes 9.0 GB of memory, and .* are left; do less."
    with pytest.raises(GemmaError, match=message):
        memory.check_memory(9 * GB, "It takes", "do less")


def test_no_system_that_says_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    assert (memory.memory_left(), memory.addresses_left()) == (None, None)
    memory.check_memory(2**80, "It takes", "do less")


def test_a_context_is_refused_before_it_is_taken(
    cli: Cli, home: Path, system: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    n_bytes = load(home, "chat")[0].new_cache(CONTEXT).nbytes
    monkeypatch.setattr("gemma_cli.cli.loading.RUNTIME_BYTES", 0)
    monkeypatch.setattr("gemma_cli.cli.main._BYTES", 0)
    system(n_bytes - 2048)
    asked = "-m", "chat", "-t", "0", "-n", "3"
    for command in ("run", "map"):
        result = cli(command, *asked, "-c", str(CONTEXT), "x", stdin=b"y\n")
        assert (result.status, result.out) == (1, "")
        sentence = rf"gemma-cli: A context of {CONTEXT} tokens takes \S+ .B of memory, and .*"
        assert re.fullmatch(sentence + r"-c/--context, or --kv int8\.\n", result.err)
    assert cli("run", *asked, "-c", str(CONTEXT), "--kv", "int8", "x").status == 0
    assert cli("run", *asked, "x").status == 0
    system(0)
    assert cli("run", *asked, "x").status == 1


def test_a_calibration_is_refused_before_it_begins(
    cli: Cli, tmp_path: Path, system: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma_cli.cli.main._BYTES", 0)
    config = tiny("gemma3")
    source = write_hf(tmp_path / "source", config, random_weights(config))
    system(1_000_000)
    for how in (("--calibrate", "default"), ("--method", "gptq"), ("--verify",)):
        result = cli("quantize", source, "-o", tmp_path / "new" / "a", *how)
        assert (result.status, result.out) == (1, "")
        assert re.fullmatch(rf"gemma-cli: Running {source} over .* are left; .*\n", result.err)
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("megabytes", [100, 250, 430, 800, 4000])
def test_limits_of_the_address_space(home: Path, megabytes: int) -> None:
    """Whatever they are: an answer, or a sentence; no signal, nothing of a library's own."""
    command, environment = program(home)
    result = subprocess.run(
        [*command, "run", "-m", "base", "-t", "0", "-n", "3", "--threads", "2", "the man"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_AS, (megabytes << 20, megabytes << 20)
        ),
    )
    if result.returncode == 0:
        assert (bool(result.stdout), result.stderr) == (True, b"")
    else:
        assert (result.returncode, result.stdout) == (1, b"")
        sentence = rb"gemma-cli: (gemma-cli|Running base) takes at least .* of addresses, .*\.\n"
        assert re.fullmatch(sentence, result.stderr)


@pytest.mark.skipif(not STATM.exists(), reason="only Linux says how much is in use")
def test_a_few_tokens_take_little_of_a_long_context() -> None:
    config = replace(tiny("gemma"), n_layers=8, context_length=1 << 17)
    few = KVCache(config, 16, "f16", 16)
    few.length = 5
    for array in few.state().arrays.values():
        array[:] = np.random.default_rng(0).standard_normal(array.shape)
    before = resident()
    many = KVCache(config, 1 << 16, "f16", 16)  # 32 streams of 4 MB
    many.restore(few.state())
    # A page of 4 KB of each stream; in pages of 2 MB it would be 64 MB.
    assert resident() - before < 8_000_000
    for name, array in few.state().arrays.items():
        assert np.array_equal(many.state().arrays[name], array)
    many.length = 1 << 16
    for name, array in many.state().arrays.items():
        taken = few.state().arrays[name].shape[2]
        assert not array[:, :, taken:].any()


def resident() -> int:
    return int(STATM.read_text().split()[1]) * resource.getpagesize()
