"""A model file is read through when it is first used, and again only when it has changed."""

import os
import shutil
from pathlib import Path

import pytest
from program import Cli

from quantize.cache import cache_folder
from quantize.modelfile import ModelFile


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose every checksum was compared, in order."""
    files: list[Path] = []
    compare = ModelFile.damaged_tensors

    def noted(file: ModelFile, *arguments: object) -> list[str]:
        files.append(file.path)
        return compare(file, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ModelFile, "damaged_tensors", noted)
    return files


def test_it_is_read_through_once(cli: Cli, home: Path, tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "copy.safetensors"
    shutil.copy(home / "models" / "base.safetensors", path)
    run = ("run", "-m", path, "-n", "1", "-t", "0", "a")
    first = cli(*run)
    assert (first.status, first.err, reads) == (0, "", [path])
    assert cli(*run).out == first.out
    assert reads == [path]
    elsewhere = path.with_name("renamed.safetensors")
    path.rename(elsewhere)
    assert cli("run", "-m", elsewhere, *run[3:]).out == first.out
    assert reads == [path]
    elsewhere.touch()
    assert cli("run", "-m", elsewhere, *run[3:]).out == first.out
    assert reads == [path, elsewhere]
    assert cli("verify", "-m", elsewhere).status == 0  # is always asked for on purpose
    assert len(reads) == 3
    notes = cache_folder() / "whole"
    assert notes.stat().st_mode & 0o077 == 0


def test_a_bit_that_changed_is_noticed_by_the_time_of_the_file(
    cli: Cli, home: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(home / "models" / "base.safetensors", path)
    run = ("run", "-m", path, "-n", "1", "-t", "0", "a")
    assert cli(*run).status == 0
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4  # in the embedding, which lies last
    path.write_bytes(data)
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))  # whatever the clock's steps are
    for command in (run, ("verify", "-m", path)):
        damaged = cli(*command)
        assert (damaged.status, damaged.out) == (1, "")
        assert damaged.err.startswith(f"gemma-cli: {path} is damaged: embed of ")
