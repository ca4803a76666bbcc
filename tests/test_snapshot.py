"""Snapshots of a cache: the same answers as without them, whatever is on the disk."""

import contextlib
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from program import load
from safetensors.numpy import load as load_arrays

from gemma_cli import snapshot, space
from gemma_cli.runtime import KVCache, Model

IDS = list(np.random.default_rng(0).integers(3, 250, 300))  # more than the windows' rings hold


@pytest.fixture(scope="module")
def model(home: Path) -> Model:
    return load(home, "chat")[0]


def filled(model: Model, n: int, kind: str = "f16") -> KVCache:
    cache = model.new_cache(400, kind)
    model.forward(IDS[:n], cache)
    return cache


def goes_on(model: Model, cache: KVCache) -> list[float]:
    logits = model.forward([5, 6, 7], cache)
    return [*logits, *model.forward([8], cache)]


@pytest.mark.parametrize("kind", ["f16", "int8"])
@pytest.mark.parametrize("n", [1, 100, 300])
def test_it_goes_on_as_if_nothing_had_been(model: Model, tmp_path: Path, kind: str, n: int) -> None:
    path = tmp_path / "state" / "one.safetensors"
    cache = filled(model, n, kind)
    assert snapshot.save(path, model.file, cache, IDS[:n])
    assert path.stat().st_mode & 0o777 == 0o600
    for context in (400, 1000):
        again = model.new_cache(context, kind)
        assert snapshot.restore(path, model.file, again) == IDS[:n]
        assert goes_on(model, again) == goes_on(model, filled(model, n, kind))
    assert os.listdir(path.parent) == ["one.safetensors"]


def test_what_does_not_match_is_ignored(model: Model, home: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    assert snapshot.save(path, model.file, filled(model, 300), IDS)

    def restored(file: object, cache: KVCache) -> list[int]:
        model.forward([1, 2, 3], cache)
        ids = snapshot.restore(path, file, cache)  # type: ignore[arg-type]
        assert cache.length == len(ids)
        return ids

    cache = model.new_cache(400)
    assert restored(model.file, cache) == IDS
    digests = dict(model.file.sha256) | {"final_norm": "0" * 64}
    assert restored(replace(model.file, sha256=digests), cache) == []
    assert restored(load(home, "base")[0].file, cache) == []
    assert restored(model.file, model.new_cache(400, "int8")) == []
    assert restored(model.file, model.new_cache(299)) == []
    assert restored(model.file, Model(model.file, chunk_size=64).new_cache(400)) == []  # its rings
    path.unlink()
    assert restored(model.file, cache) == []


def test_a_damaged_one_is_ignored(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    assert snapshot.save(path, model.file, filled(model, 100), IDS[:100])
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    cache = model.new_cache(400)
    for at in [*range(0, 40), *rng.integers(0, len(whole), 200)]:
        data = bytearray(whole)
        data[at] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        # A name's letter in the header may change and nothing else.
        assert snapshot.restore(path, model.file, cache) in ([], IDS[:100])
        if cache.length:
            assert goes_on(model, cache) == goes_on(model, filled(model, 100))
    for cut in rng.integers(0, len(whole), 50):
        path.write_bytes(whole[:cut])
        assert snapshot.restore(path, model.file, cache) == []


def header_of(whole: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def with_ids(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["ids"].update(changes)


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no ids": lambda header: header.pop("ids"),
    "ids as floats": with_ids(dtype="F32"),
    "ids in rows": with_ids(shape=[10, 10]),
    "ids as bfloat16": with_ids(dtype="BF16", shape=[200]),
    "ids of an unknown type": with_ids(dtype="Q4_0"),
    "no metadata": lambda header: header.pop("__metadata__"),
    "another version": lambda header: header["__metadata__"].update(version="2"),
    "another model": lambda header: header["__metadata__"].update(model="0" * 64),
    "no checksum": lambda header: header["__metadata__"].pop("sha256"),
    "another checksum": lambda header: header["__metadata__"].update(sha256="0" * 64),
    "a reach of text": lambda header: header["__metadata__"].update(reach="far"),
    "a reach of 10,000 digits": lambda header: header["__metadata__"].update(reach="9" * 10_000),
    "a reach below the length": lambda header: header["__metadata__"].update(reach="5"),
    "a ring of -1": lambda header: header["__metadata__"].update(ring="-1"),
    "another ring": lambda header: header["__metadata__"].update(ring="16", reach="400"),
    "a layer less": lambda header: header.pop("layers.0"),
    "a layer of another name": lambda header: header.update({"layers.9": header.pop("layers.0")}),
    "a layer of another type": lambda header: header["layers.0"].update(dtype="F16"),
    "a layer in another shape": lambda header: header["layers.0"]["shape"].reverse(),
    "an overlap": lambda header: header["layers.0"].update(header["layers.1"]),
    "offsets of 2^63": with_ids(data_offsets=[2**63, 2**63 + 400]),
    "offsets backwards": lambda header: header["ids"]["data_offsets"].reverse(),
    "a shape of 2^62": with_ids(shape=[2**62, 4]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_one_is_ignored(
    model: Model, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    """Also where it is sealed with a checksum that is right."""
    path = tmp_path / "one.safetensors"
    assert snapshot.save(path, model.file, filled(model, 100), IDS[:100])
    header, data = header_of(path.read_bytes())
    change(header)
    cache = model.new_cache(400)
    may_be_sealed = "sha256" in header.get("__metadata__", {})
    for seal in (False, may_be_sealed and change is not HOSTILE["another checksum"]):
        if seal:
            with contextlib.suppress(Exception):  # what the package does not read at all
                header["__metadata__"]["sha256"] = snapshot._digest(load_arrays(path.read_bytes()))
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        assert snapshot.restore(path, model.file, cache) == []
        assert cache.length == 0


def test_what_is_no_snapshot_is_ignored(model: Model, tmp_path: Path) -> None:
    path, cache = tmp_path / "one.safetensors", model.new_cache(400)
    path.mkdir()
    assert snapshot.restore(path, model.file, cache) == []
    path.rmdir()
    os.mkfifo(path)
    assert snapshot.restore(path, model.file, cache) == []
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)  # no such memory
    assert snapshot.restore(path, model.file, cache) == []


def test_what_a_killed_run_had_begun_goes(model: Model, tmp_path: Path) -> None:
    old, new = tmp_path / "a.safetensors.partial", tmp_path / "b.safetensors.partial"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    assert snapshot.save(tmp_path / "c.safetensors", model.file, filled(model, 10), IDS[:10])
    assert sorted(os.listdir(tmp_path)) == [new.name, "c.safetensors"]


def test_it_is_not_begun_where_it_cannot_be_kept(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.safetensors"
    cache = filled(model, 100)
    with pytest.raises(ValueError, match="holds 100 tokens"):
        snapshot.save(path, model.file, cache, IDS[:99])
    path.write_bytes(b"of an earlier turn")
    monkeypatch.setattr(snapshot, "LARGEST", 1000)
    assert not snapshot.save(path, model.file, cache, IDS[:100])
    assert not path.exists()
    assert not snapshot.save(path, model.file, model.new_cache(400), [])
    assert os.listdir(tmp_path) == []


def test_the_longest_unused_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    disk = 100

    def disk_usage(folder: Path) -> usage:
        used = sum(path.stat().st_size for path in folder.iterdir())
        return usage(disk, used, disk - used)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    monkeypatch.setattr(space, "RESERVE", 20)

    def fill() -> None:
        (tmp_path / "kept.jsonl").write_bytes(b"x" * 10)
        for n, name in enumerate("bca"):
            (tmp_path / f"{name}.safetensors").write_bytes(b"x" * 20)
            os.utime(tmp_path / f"{name}.safetensors", (n, n))

    def left() -> str:
        return "".join(sorted(path.stem[0] for path in tmp_path.glob("*.safetensors")))

    for n_bytes, budget, room, names in (
        (5, 1000, True, "abc"),
        (15, 1000, True, "ac"),
        (50, 1000, True, "a"),
        (71, 1000, False, ""),
        (0, 45, True, "ac"),
        (10, 30, True, "a"),
        (0, 0, True, ""),
        (31, 30, False, ""),
    ):
        fill()
        assert space.make_room(tmp_path, n_bytes, budget) == room
        assert left() == names, n_bytes
    assert (tmp_path / "kept.jsonl").exists()
