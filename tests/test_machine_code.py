"""The compiled model on the disk; that it computes what it should is tested wherever one runs."""

import os
import subprocess
from pathlib import Path

import pytest
from program import program

from gemma_cli.runtime import machine_code

WITHOUT_NUMBA = """
import sys
class Refuse:
    def find_spec(name, *_):
        assert name.partition(".")[0] != "numba"
sys.meta_path.insert(0, Refuse)
import gemma_cli.__main__
gemma_cli.__main__.main()
"""


def test_numba_is_not_needed_where_the_code_is_there(home: Path) -> None:
    command, environment = program(home)
    args = ("run", "-m", "base", "-n", "2", "-t", "0", "the man")
    ran = [
        subprocess.run([command[0], *how, *args], env=environment, capture_output=True, check=False)
        for how in (command[1:], ("-c", WITHOUT_NUMBA))  # the first one may compile
    ]
    assert [done.returncode for done in ran] == [0, 0]
    assert ran[0].stdout == ran[1].stdout != b""


def test_only_what_is_whole_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "forward.o"
    monkeypatch.setattr(machine_code, "FILE", path)
    assert machine_code._read() is None
    code = os.urandom(1000)
    machine_code._keep(code)
    assert machine_code._read() == code
    assert list(tmp_path.iterdir()) == [path]
    kept = path.read_bytes()
    for damaged in (
        b"",
        kept[:31],
        kept[:-1],
        kept + b"x",
        kept[:500] + bytes([kept[500] ^ 1]) + kept[501:],
    ):
        path.write_bytes(damaged)
        assert machine_code._read() is None


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="whoever may write anywhere does")
def test_where_nothing_can_be_written_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_code, "FILE", tmp_path / "forward.o")
    tmp_path.chmod(0o500)
    machine_code._keep(b"code")
    assert not list(tmp_path.iterdir())
