"""Model files: what other readers see in them, and that no damaged one is opened."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import VOCABULARY, tiny
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from quantize import packing
from quantize.checkpoint.sentencepiece_model import sentencepiece_from_gguf
from quantize.errors import GemmaError
from quantize.modelfile import Description, MatrixSpec, ModelFile, create
from quantize.tensors import matrix_shapes, norm_sizes

Json = dict[str, Any]
CONFIG = tiny("gemma3")
TOKENIZER = sentencepiece_from_gguf(VOCABULARY)
FORMATS = {"attn_q": "int8", "attn_k": "bf16", "ffn_up": "f32", "ffn_down": "int4_dq"}
CODEBOOK = tuple(range(-120, 120, 15))


def spec(name: str, shape: tuple[int, int]) -> MatrixSpec:
    fmt = FORMATS.get(name.rsplit(".", maxsplit=1)[-1], "int4")
    group_size = 32 if fmt in packing.CODE_FORMATS else 0
    codebook = CODEBOOK if fmt in packing.INT4_FORMATS else None
    return MatrixSpec(fmt, *shape, group_size, codebook)


DESCRIPTION = Description(
    config=CONFIG,
    chat="gemma",
    sampling={"temperature": 0.5, "top_k": 64},
    recipe="by hand",
    source="täst",
    tokenizer_model=TOKENIZER,
    matrices={name: spec(name, shape) for name, shape in matrix_shapes(CONFIG).items()},
)


def tensor_bytes() -> dict[str, bytes]:
    """Random bytes for every tensor but the tokenizer, norms without what fills them up."""
    rng = np.random.default_rng(0)
    sizes = {name: 4 * n for name, n in norm_sizes(CONFIG).items()}
    sizes |= {name: m.nbytes for name, m in DESCRIPTION.matrices.items()}
    return {name: rng.bytes(size) for name, size in sizes.items()}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "a.safetensors"
    with create(path, DESCRIPTION) as writer:
        for name, data in tensor_bytes().items():
            # In two parts, as a conversion writes them.
            values = np.frombuffer(data, np.uint8)
            writer.write(name, [values[:100], values[100:]])
    return path


def split(path: Path) -> tuple[Json, bytes]:
    """The header and the tensors' bytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]["header_sha256"]  # which would tell of any change
    return header, data[8 + length :]


def join(path: Path, header: Json | str, tensors: bytes) -> Path:
    """A file with that header, filled up to a multiple of 64 bytes as the format asks for."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + tensors)
    return path


# What is in a file


def test_everything_comes_back(original: Path) -> None:
    file = ModelFile.open(original)
    for name in ("config", "chat", "sampling", "recipe", "source", "tokenizer_model", "matrices"):
        assert getattr(file, name) == getattr(DESCRIPTION, name)
    for name, data in tensor_bytes().items():
        if name in file.tiles:
            tiles, m = file.tiles[name], file.matrices[name]
            assert tiles.tobytes() == data
            assert tiles.shape[1] == packing.tile_bytes(m.format, m.n_in, m.group_size)
            assert not tiles.flags.writeable
        else:
            assert file.vectors[name].tobytes() == data
            assert file.vectors[name].dtype == np.float32
    assert file.vectors.keys() | file.tiles.keys() == tensor_bytes().keys()
    assert file.size == original.stat().st_size


def test_bits_per_weight_count_scales_and_rows_filled_up(original: Path) -> None:
    file = ModelFile.open(original)
    n_bytes = sum(len(data) for name, data in tensor_bytes().items() if name in file.tiles)
    weights = sum(n_out * n_in for n_out, n_in in matrix_shapes(CONFIG).values())
    assert file.bits_per_weight == 8 * n_bytes / weights
    assert {m.format: m.bits_per_weight for m in file.matrices.values()} == {
        "int4": 4.5,
        "int4_dq": 4.25 + 16 / CONFIG.intermediate_size,
        "int8": 8.5,
        "bf16": 16.0,
        "f32": 32.0,
    }


def test_the_safetensors_package_sees_the_same(original: Path) -> None:
    header, _ = split(original)
    ours = ModelFile.open(original)
    with safe_open(original, "numpy") as theirs:
        metadata = theirs.metadata()
        assert len(metadata.pop("header_sha256")) == 64
        assert metadata == header["__metadata__"]
        assert set(theirs.keys()) == {"tokenizer", *norm_sizes(CONFIG), *matrix_shapes(CONFIG)}
        tokenizer = theirs.get_tensor("tokenizer").tobytes()
        assert tokenizer == TOKENIZER + bytes(-len(TOKENIZER) % 64)
        for name, vector in ours.vectors.items():
            assert theirs.get_tensor(name)[: len(vector)].tobytes() == vector.tobytes()
        for name, tiles in ours.tiles.items():
            entry = theirs.get_slice(name)
            assert entry.get_shape() == list(ours.matrices[name].shape)
            assert entry.get_dtype() == ours.matrices[name].dtype
            if entry.get_dtype() != "BF16":  # numpy has none
                assert theirs.get_tensor(name).tobytes() == tiles.tobytes()


def test_every_tensor_is_aligned_and_has_its_checksum(original: Path) -> None:
    header, tensors = split(original)
    checksums = json.loads(header.pop("__metadata__")["sha256"])
    assert (original.stat().st_size - len(tensors)) % 64 == 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        assert start % 64 == 0
        assert hashlib.sha256(tensors[start:stop]).hexdigest() == checksums[name]
    file = ModelFile.open(original)
    for view in [*file.tiles.values(), *file.vectors.values()]:
        assert view.ctypes.data % 64 == 0


def test_tensors_out_of_turn_or_of_another_size_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    first, second, *_ = tensor_bytes()
    data = np.frombuffer(tensor_bytes()[first], np.uint8)
    for name, part in ((second, data), (first, data[:-64]), (first, np.tile(data, 2))):
        with pytest.raises(ValueError, match=name), create(path, DESCRIPTION) as writer:
            writer.write(name, [part])
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"{second} was not"), create(path, DESCRIPTION) as writer:
        writer.write(first, [data])
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_replaced_and_a_link_in_its_place_not_followed(
    tmp_path: Path,
) -> None:
    path, partial = tmp_path / "a.safetensors", tmp_path / "a.safetensors.partial"
    partial.write_bytes(b"x" * 10_000_000)
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")

    def write() -> None:
        with create(path, DESCRIPTION) as writer:
            for name, data in tensor_bytes().items():
                writer.write(name, [np.frombuffer(data, np.uint8)])

    write()
    ModelFile.open(path)
    partial.symlink_to(precious)
    write()
    os.link(precious, partial)
    write()
    assert precious.read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "precious"]


# What is refused


def test_a_file_cut_at_any_byte_of_its_header_is_refused(original: Path, tmp_path: Path) -> None:
    data = original.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(data)
    data_start = 8 + int.from_bytes(data[:8], "little")
    for size in range(data_start, -1, -1):
        os.truncate(path, size)
        with pytest.raises(GemmaError, match=str(path)):
            ModelFile.open(path)


def test_a_file_cut_around_any_tensor_or_with_more_is_refused(
    original: Path, tmp_path: Path
) -> None:
    data = original.read_bytes()
    header, tensors = split(original)
    ends = {e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"}
    path = tmp_path / "cut.safetensors"
    sizes = {len(data) - len(tensors) + end + by for end in ends for by in (-64, -1, 0, 1, 64)}
    for size in sorted(sizes - {len(data)}):
        path.write_bytes((data + bytes(64))[:size])
        with pytest.raises(GemmaError, match=str(path)):
            ModelFile.open(path)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 2**31, 2**63, 2**64 - 1])
def test_an_impossible_header_length_is_refused(
    original: Path, tmp_path: Path, length: int
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + original.read_bytes()[8:])
    with pytest.raises(GemmaError, match=r"not a gemma-cli model file|not valid JSON"):
        ModelFile.open(path)


@pytest.mark.parametrize(
    "header",
    [
        "{}",
        "[]",
        "null",
        "{",
        ' {"__metadata__": {"format": "gemma-cli"}}',
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"__metadata__": null}',
        '{"__metadata__": []}',
        '{"__metadata__": {"format": "pt"}}',
        '{"__metadata__": {"format": ["gemma-cli"]}}',
        '{"__metadata__": {"format": "gemma-cli"}}',
        '{"__metadata__": {"format": "gemma-cli", "version": "3"}}',
        '{"__metadata__": {"format": "gemma-cli", "version": "3"}, "__metadata__": {}}',
        '{"n": ' + "9" * 10_000 + "}",
        '{"\\ud800": 1}',
    ],
)
def test_other_headers_are_refused(tmp_path: Path, header: str) -> None:
    path = join(tmp_path / "a.safetensors", header, b"")
    with pytest.raises(GemmaError, match=str(path)):
        ModelFile.open(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for name in (path, tmp_path):
        with pytest.raises(GemmaError, match=str(name)):
            ModelFile.open(name)
    os.mkfifo(path)
    with pytest.raises(GemmaError, match=str(path)):
        ModelFile.open(path)


def test_another_version_is_refused_by_its_number(original: Path, tmp_path: Path) -> None:
    header, tensors = split(original)
    header["__metadata__"]["version"] = "1"
    with pytest.raises(GemmaError, match=r"version 1 .* reads version 3; convert"):
        ModelFile.open(join(tmp_path / "a", header, tensors))


def in_metadata(key: str, change: Callable[[Any], object]) -> Callable[[Json], object]:
    """A change of one of the JSON texts among the metadata."""

    def apply(header: Json) -> None:
        value = json.loads(header["__metadata__"][key])
        changed = change(value)
        text = changed if isinstance(changed, str) else json.dumps(value)
        header["__metadata__"][key] = text

    return apply


def in_matrix(name: str, **changes: object) -> Callable[[Json], object]:
    return in_metadata("matrices", lambda m: m[name].update(changes))


def in_entry(name: str, **changes: object) -> Callable[[Json], object]:
    return lambda header: header[name].update(changes)


def with_metadata(**changes: object) -> Callable[[Json], object]:
    return lambda header: header["__metadata__"].update(changes)


def moved(name: str, start: int, stop: int) -> Callable[[Json], object]:
    """A tensor whose offsets are that far from where they belong."""

    def apply(header: Json) -> None:
        at = header[name]["data_offsets"]
        header[name]["data_offsets"] = [at[0] + start, at[1] + stop]

    return apply


def swapped(header: Json) -> None:
    first, second = "layers.0.attn_norm", "layers.1.attn_norm"
    header[first], header[second] = header[second], header[first]


INT4, INT8, BF16, NORM = "layers.0.attn_o", "layers.0.attn_q", "layers.0.attn_k", "final_norm"
DAMAGE: dict[str, Callable[[Json], object]] = {
    "no tokenizer": lambda header: header.pop("tokenizer"),
    "no norm": lambda header: header.pop(NORM),
    "no matrix": lambda header: header.pop(INT4),
    "another tensor": lambda header: header.update(x=header[NORM]),
    "a tensor that is null": lambda header: header.update(x=None),
    "an empty tensor": lambda header: header.update(
        x={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    ),
    "two tensors swapped": swapped,
    "an overlap": moved(INT4, -64, 0),
    "a hole": moved(INT4, 64, 0),
    "too long": moved(INT4, 0, 64),
    "too short": moved(NORM, 0, -64),
    "not aligned": moved(INT4, 1, 1),
    "before the file": moved("tokenizer", -64, -64),
    "behind the file": moved("embed", 2**40, 2**40),
    "overflowing": moved("embed", 2**63, 2**63),
    "overflowing twice": moved("embed", 2**64, 2**64),
    "backwards": lambda header: header[INT4]["data_offsets"].reverse(),
    "one offset": in_entry(INT4, data_offsets=[0]),
    "no offsets": in_entry(INT4, data_offsets=None),
    "offsets of texts": in_entry(INT4, data_offsets=["0", "64"]),
    "another dtype": in_entry(INT4, dtype="I8"),
    "another dtype's": in_entry(BF16, dtype="F16"),
    "another shape": in_entry(INT4, shape=[1, 1, 64]),
    "no shape": lambda header: header[INT4].pop("shape"),
    "an entry that is a list": lambda header: header.update({INT4: []}),
    "metadata that are a number": with_metadata(recipe=1),
    "no config": lambda header: header["__metadata__"].pop("config"),
    "no checksums": lambda header: header["__metadata__"].pop("sha256"),
    "no source": lambda header: header["__metadata__"].pop("source"),
    "an unknown chat": with_metadata(chat="chatml"),
    "no chat": with_metadata(chat=None),
    "config of another model": in_metadata("config", lambda c: c.update(hidden_size=96)),
    "config with more layers": in_metadata(
        "config", lambda c: c.update(n_layers=3, sliding_layers=[True] * 3)
    ),
    "config with the most layers": in_metadata(
        "config", lambda c: c.update(n_layers=1024, sliding_layers=[True] * 1024)
    ),
    "config of exabytes": in_metadata(
        "config", lambda c: c.update(vocab_size=2**31 - 1, intermediate_size=2**31 - 32)
    ),
    "config that is a list": with_metadata(config="[]"),
    "a tokenizer of no bytes": with_metadata(tokenizer_bytes="0"),
    "a tokenizer of fewer than no bytes": with_metadata(tokenizer_bytes="-1"),
    "a tokenizer beyond its tensor": with_metadata(tokenizer_bytes=str(len(TOKENIZER) + 64)),
    "a tokenizer of some bytes": with_metadata(tokenizer_bytes="some"),
    "a tokenizer of endless bytes": with_metadata(tokenizer_bytes="9" * 10_000),
    "sampling that is a list": with_metadata(sampling="[]"),
    "sampling at no temperature": in_metadata("sampling", lambda s: s.update(temperature="hot")),
    "sampling at NaN": with_metadata(sampling='{"temperature": NaN}'),
    "sampling below zero": in_metadata("sampling", lambda s: s.update(temperature=-1)),
    "sampling twice": with_metadata(sampling='{"top_k": 1, "top_k": 2}'),
    "no matrices": with_metadata(matrices="{}"),
    "a matrix less": in_metadata("matrices", lambda m: m.pop(INT4)),
    "a matrix more": in_metadata("matrices", lambda m: m.update(x=m[INT4])),
    "a matrix that is a list": in_metadata("matrices", lambda m: m.update({INT4: []})),
    "a matrix without a format": in_metadata("matrices", lambda m: m[INT4].pop("format")),
    "a matrix of an unknown format": in_matrix(INT4, format="int3"),
    "a matrix of another format": in_matrix(INT4, format="int8", codebook=None),
    "a matrix with more rows": in_matrix(INT4, n_out=80),
    "a matrix with fewer inputs": in_matrix(INT4, n_in=96),
    "a matrix of no inputs": in_matrix(INT4, n_in=0),
    "a matrix of huge size": in_matrix(INT4, n_out=2**70),
    "a matrix with half a row": in_matrix(INT4, n_out=64.5),
    "groups of 0": in_matrix(INT4, group_size=0),
    "groups of -32": in_matrix(INT4, group_size=-32),
    "groups of 16": in_matrix(INT4, group_size=16),
    "groups of 64": in_matrix(INT4, group_size=64),
    "groups of 128 in 64 inputs": in_matrix(INT8, group_size=128),
    "groups of a text": in_matrix(INT4, group_size="32"),
    "groups of bfloat16": in_matrix(BF16, group_size=32),
    "no codebook": in_matrix(INT4, codebook=None),
    "an empty codebook": in_matrix(INT4, codebook=[]),
    "a codebook of 15": in_matrix(INT4, codebook=[0] * 15),
    "a codebook of 17": in_matrix(INT4, codebook=[0] * 17),
    "a codebook of 9 bits": in_matrix(INT4, codebook=[0] * 15 + [128]),
    "a codebook of halves": in_matrix(INT4, codebook=[0.5] * 16),
    "a codebook of truths": in_matrix(INT4, codebook=[True] * 16),
    "a codebook of texts": in_matrix(INT4, codebook=["0"] * 16),
    "a codebook that is a number": in_matrix(INT4, codebook=16),
    "a codebook for 8 bits": in_matrix(INT8, codebook=list(CODEBOOK)),
    "a checksum less": in_metadata("sha256", lambda s: s.pop(INT4)),
    "a checksum more": in_metadata("sha256", lambda s: s.update(x="0" * 64)),
    "a short checksum": in_metadata("sha256", lambda s: s.update({INT4: "0" * 63})),
    "a checksum that is a number": in_metadata("sha256", lambda s: s.update({INT4: 0})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_header_that_contradicts_itself_is_refused(
    original: Path, tmp_path: Path, damage: str
) -> None:
    header, tensors = split(original)
    ModelFile.open(join(tmp_path / "a", header, tensors))  # so that it is the damage that counts
    DAMAGE[damage](header)
    path = join(tmp_path / "a.safetensors", header, tensors)
    with pytest.raises(GemmaError, match=f"{path} .*; (convert|use|the file is damaged)"):
        ModelFile.open(path)


def test_no_tensor_may_lie_elsewhere_or_have_another_size(original: Path, tmp_path: Path) -> None:
    header, tensors = split(original)
    for name in header.keys() - {"__metadata__"}:
        for by in (-1, 64, 2**63):
            for damage in (moved(name, by, 0), moved(name, 0, by), moved(name, by, by)):
                changed = header | {name: json.loads(json.dumps(header[name]))}
                damage(changed)
                path = join(tmp_path / "a.safetensors", changed, tensors)
                with pytest.raises(GemmaError, match=f"{path} .*; convert"):
                    ModelFile.open(path)


def test_norms_shorter_throughout_are_refused(original: Path, tmp_path: Path) -> None:
    header, tensors = split(original)
    stop = header["tokenizer"]["data_offsets"][1]
    # The last 64 bytes of the first norm, 16 of its weights, are gone and all after it moves up.
    for name, entry in header.items():
        if name not in ("__metadata__", "tokenizer"):
            start = 0 if name == "layers.0.attn_norm" else 64
            entry["data_offsets"][0] -= start
            entry["data_offsets"][1] -= 64
    header["layers.0.attn_norm"]["shape"][0] -= 16
    path = join(tmp_path / "a.safetensors", header, tensors[:stop] + tensors[stop + 64 :])
    with safe_open(path, "numpy"):  # a proper file of that format
        pass
    with pytest.raises(GemmaError, match=r"layers\.0\.attn_norm"):
        ModelFile.open(path)


def test_a_duplicate_key_is_refused(original: Path, tmp_path: Path) -> None:
    header, tensors = split(original)
    text = json.dumps(header)
    for key in ("__metadata__", "tokenizer", INT4):
        twice = text[:-1] + f', "{key}": {json.dumps(header[key])}}}'
        path = join(tmp_path / "a.safetensors", twice, tensors)
        with pytest.raises(GemmaError, match="same key twice"):
            ModelFile.open(path)


def test_a_header_that_leaves_tensors_unaligned_is_refused(original: Path, tmp_path: Path) -> None:
    data = original.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path = tmp_path / "a.safetensors"
    path.write_bytes((length + 32).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 32)
    with path.open("ab") as file:
        file.write(data[8 + length :])
    with safe_open(path, "numpy"):
        pass
    with pytest.raises(GemmaError, match="damaged"):
        ModelFile.open(path)


def test_any_flipped_bit_is_found(original: Path, tmp_path: Path) -> None:
    """One in each byte of the header, and three in each tensor."""
    data = original.read_bytes()
    header, tensors = split(original)
    data_start = len(data) - len(tensors)
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    assert ModelFile.open(path).damaged_tensors() == []
    rng = np.random.default_rng(0)
    with path.open("r+b", buffering=0) as file:

        def flip(at: int, bit: int) -> None:
            file.seek(at)
            file.write(bytes([data[at] ^ 1 << bit]))

        for at in range(data_start):
            flip(at, int(rng.integers(8)))
            with pytest.raises(GemmaError, match=str(path)):
                ModelFile.open(path)
            file.seek(at)
            file.write(data[at : at + 1])
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                for at in (start, int(rng.integers(start, stop)), stop - 1):
                    flip(data_start + at, int(rng.integers(8)))
                    assert ModelFile.open(path).damaged_tensors() == [name]
                    file.seek(data_start + at)
                    file.write(data[data_start + at : data_start + at + 1])


@pytest.mark.parametrize("digest", ["", "0" * 64, "é", "0" * 63])
def test_another_checksum_of_the_header_is_refused(
    original: Path, tmp_path: Path, digest: str
) -> None:
    header, tensors = split(original)
    header["__metadata__"]["header_sha256"] = digest
    if digest:
        with pytest.raises(GemmaError, match="its header does not have its checksum"):
            ModelFile.open(join(tmp_path / "a", header, tensors))
    else:
        ModelFile.open(join(tmp_path / "a", header, tensors))


def test_an_unknown_field_is_refused(original: Path, tmp_path: Path) -> None:
    header, tensors = split(original)
    header["__metadata__"]["header_sha257"] = "0" * 64
    with pytest.raises(GemmaError, match="the unknown field 'header_sha257'"):
        ModelFile.open(join(tmp_path / "a", header, tensors))


# Two at a time


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with create(path, DESCRIPTION) as first:
        with (
            pytest.raises(GemmaError, match="another gemma-cli; wait"),
            create(path, DESCRIPTION),
        ):
            pass
        for name, data in tensor_bytes().items():
            first.write(name, [np.frombuffer(data, np.uint8)])
    assert ModelFile.open(path).damaged_tensors() == []
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_whose_file_was_taken_away_replaces_nothing(tmp_path: Path) -> None:
    path, partial = tmp_path / "a.safetensors", tmp_path / "a.safetensors.partial"

    def write() -> None:
        with create(path, DESCRIPTION) as writer:
            for name, data in tensor_bytes().items():
                writer.write(name, [np.frombuffer(data, np.uint8)])
            partial.unlink()
            partial.write_bytes(b"another's")

    with pytest.raises(GemmaError, match="another gemma-cli"):
        write()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(partial.name, b"another's")]


@settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4))
@example(flips=[(0.0, 1)])
def test_flipped_bits_of_the_header_raise_nothing_else(
    original: Path, tmp_path: Path, flips: list[tuple[float, int]]
) -> None:
    data = bytearray(original.read_bytes())
    data_start = 8 + int.from_bytes(data[:8], "little")
    for place, bits in flips:
        data[int(place * (data_start - 1))] ^= bits
    path = tmp_path / "a.safetensors"
    # As if it had been written so: its own checksum would tell of every change.
    digest = re.search(rb'"header_sha256":"([^"]*)"', data[:data_start])
    if digest and len(digest[1]) == 64:
        at = slice(digest.start(1), digest.end(1))
        data[at] = b"0" * 64
        data[at] = hashlib.sha256(data[8:data_start]).hexdigest().encode()
    path.write_bytes(data)
    try:
        file = ModelFile.open(path)
    except GemmaError:
        return
    # A digit of a checksum, of a number or of a text for people: the weights are in place.
    expected = tensor_bytes()
    assert all(tiles.tobytes() == expected[name] for name, tiles in file.tiles.items())
