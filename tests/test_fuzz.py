"""A short run of fuzz.py, always with the same files; in a process of its own, which it limits."""

import json
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

from quantize.errors import GemmaError


def test_mutated_files_are_read_or_refused() -> None:
    command = [sys.executable, Path(__file__).parent / "fuzz.py", "--examples", "60"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-5000:]
    for name in fuzz.TARGETS:
        (line,) = (line for line in result.stdout.splitlines() if line.split()[0] == name)
        assert "refused" in line


def test_what_is_mutated_is_whole(tmp_path: Path) -> None:
    whole = {
        fuzz.read_folder: fuzz.hf_files(),
        fuzz.read_gguf: {"x.gguf": b"".join(map(bytes, fuzz.gguf_chunks()))},
        fuzz.read_model: {"a.gemma": fuzz.model_file()},
    }
    for read, files in whole.items():
        assert fuzz.check(read, tmp_path / "x", files) == "read"
    for name, values in fuzz.SMALL_FILES.items():
        files = fuzz.hf_files() | {name: json.dumps(values).encode()}
        assert fuzz.check(fuzz.read_folder, tmp_path / "x", files) == "read"


def hang(_: Path) -> None:
    while True:
        pass


def swell(_: Path) -> None:
    bytearray(fuzz.MEMORY + 100_000_000)


def whisper(_: Path) -> None:
    raise GemmaError("A file is damaged.")


@pytest.mark.parametrize(
    ("read", "raised"),
    [("hang", "TooSlowError"), ("swell", "MemoryError"), ("whisper", "AssertionError")],
)
def test_the_limits_hold(tmp_path: Path, read: str, raised: str) -> None:
    code = (
        "import fuzz, sys, test_fuzz, pathlib; fuzz.SECONDS = 0.1;"
        f"fuzz.check(test_fuzz.{read}, pathlib.Path(sys.argv[1]), {{}})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert result.returncode == 1
    assert raised in result.stderr
