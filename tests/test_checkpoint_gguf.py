"""GGUF files: what is read from them, and that nothing damaged gets through.

The oracle is the gguf package of the llama.cpp project: it writes the files and dequantizes.
"""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import TOKENS, Weights, gguf_name, random_weights, tiny, write_gguf
from gguf import GGMLQuantizationType, GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.checkpoint.gguf import GGUFTensor, read_gguf
from quantize.errors import GemmaError
from quantize.packing import IQ4_NL_LEVELS

GEMMA3 = tiny("gemma3")
WEIGHTS = random_weights(GEMMA3)
TYPES = [
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K"),
    *("Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
]


def assert_holds(checkpoint: Checkpoint, weights: Weights) -> None:
    assert list(checkpoint.tensors) == list(weights)
    for name, expected in weights.items():
        tensor = checkpoint.tensors[name]
        read = tensor.values() if expected.ndim == 1 else tensor.rows(0, len(expected))
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, expected, err_msg=name)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("generation", ["gemma", "gemma2", "gemma3"])
def test_every_generation(tmp_path: Path, generation: str, dtype: str) -> None:
    config = tiny(generation)
    weights = random_weights(config)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", config, weights, dtype))
    assert checkpoint.config == config
    assert_holds(checkpoint, weights)
    assert checkpoint.tensors["embed"].dtype == dtype


def test_a_file_is_known_without_its_suffix(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", GEMMA3, WEIGHTS)
    assert_holds(open_checkpoint(path.rename(tmp_path / "sha256-0123")), WEIGHTS)


def random_tensor(dtype: str, n_rows: int = 24, n_in: int = 512) -> GGUFTensor:
    """Random blocks: all codes, and scales that are finite because no byte exceeds 0x7b."""
    kind = GGMLQuantizationType[dtype]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (n_rows, n_in // block_size * block_bytes)
    data = np.random.default_rng(1).integers(0, 0x7C, shape, dtype=np.uint8)
    if dtype in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL"):
        blocks = data.reshape(n_rows, -1, block_bytes)
        blocks[:, :, 2:] = np.random.default_rng(2).integers(0, 256, blocks[:, :, 2:].shape)
    return GGUFTensor("x", (n_rows, n_in), dtype, data.size, data)


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_of_every_type(dtype: str) -> None:
    tensor = random_tensor(dtype)
    tensor.data.flags.writeable = False  # as a mapped file is
    expected = gguf.quants.dequantize(tensor.data, GGMLQuantizationType[dtype])
    assert len(np.unique(expected)) > 100
    for start, stop in ((0, 24), (3, 4), (5, 22)):
        rows = tensor.rows(start, stop)
        assert (rows.shape, rows.dtype) == ((stop - start, 512), np.float32)
        assert rows.flags.writeable
        np.testing.assert_array_equal(rows, expected[start:stop])


@pytest.mark.parametrize(
    ("dtype", "lowest", "highest"),
    [("Q4_0", -8, 7), ("Q5_0", -16, 15), ("Q8_0", -128, 127), ("IQ4_NL", 0, 15)],
)
def test_grid_is_the_tensor_bit_for_bit(dtype: str, lowest: int, highest: int) -> None:
    tensor = random_tensor(dtype)
    grid = tensor.grid(3, 20)
    assert grid is not None
    assert (grid.codes.shape, grid.codes.dtype) == ((17, 512), np.int8)
    assert (grid.scales.shape, grid.scales.dtype) == ((17, 16), np.float16)
    assert (grid.codes.min(), grid.codes.max()) == (lowest, highest)
    levels = np.array(IQ4_NL_LEVELS, np.int8)[grid.codes] if dtype == "IQ4_NL" else grid.codes
    weights = np.repeat(grid.scales.astype(np.float32), 32, axis=1) * levels
    expected = gguf.quants.dequantize(tensor.data, GGMLQuantizationType[dtype])[3:20]
    np.testing.assert_array_equal(weights.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", sorted(set(TYPES) - {"Q4_0", "Q5_0", "Q8_0", "IQ4_NL"}))
def test_other_types_have_no_grid(dtype: str) -> None:
    assert random_tensor(dtype).grid(0, 8) is None


def test_quantized_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", GEMMA3, WEIGHTS, "Q4_0"))
    up = checkpoint.tensors["layers.1.ffn_up"]
    assert (up.name, up.dtype, up.nbytes) == ("blk.1.ffn_up.weight", "Q4_0", 96 * 64 // 32 * 18)
    # Q4_0 keeps a block's largest magnitude m as -8 steps: steps of m / 8, and the far side cut.
    error = np.abs(up.rows(0, 96) - WEIGHTS["layers.1.ffn_up"])
    assert error.max() <= 0.5 / 8 * 1.001


def test_type_that_is_not_supported(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", GEMMA3, WEIGHTS, "F16")
    data = path.read_bytes()
    name = b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 16
    assert data[at : at + 4] == struct.pack("<I", GGMLQuantizationType.F16)
    path.write_bytes(data[:at] + struct.pack("<I", GGMLQuantizationType.I16) + data[at + 4 :])
    with pytest.raises(GemmaError, match=r"blk\.0\.ffn_up\.weight.*I16"):
        open_checkpoint(path)


def test_metadata_of_every_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma")
    expected: dict[str, object] = {"general.architecture": "gemma"}
    numbers = {
        **{"uint8": 255, "int8": -128, "uint16": 2**16 - 1, "int16": -(2**15)},
        **{"uint32": 2**32 - 1, "int32": -(2**31), "uint64": 2**64 - 1, "int64": -(2**63)},
        **{"float32": 0.5, "float64": 0.1, "bool": True},
    }
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(f"x.{name}", value)
        expected[f"x.{name}"] = value
    arrays = {"strings": ["", "é", "▁▁"], "ints": [1, -2], "floats": [0.5, 2.0], "bools": [True]}
    for name, array in arrays.items():
        writer.add_array(f"x.{name}", array)
        expected[f"x.{name}"] = array
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, tensors = read_gguf(tmp_path / "x.gguf")
    assert metadata == expected
    assert [type(value) for value in metadata.values()] == [type(v) for v in expected.values()]
    assert tensors == {}


def test_chat_sampling_and_notes(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    base = open_checkpoint(write_gguf(path, GEMMA3, WEIGHTS))
    assert (base.chat, base.sampling, base.notes) == ("base", {}, ())
    stated = {
        "tokenizer.chat_template": "{{ 1 / 0 }}",
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 64,
    }
    chat = open_checkpoint(write_gguf(path, GEMMA3, WEIGHTS, metadata=stated))
    assert chat.chat == "gemma"
    assert chat.sampling == {"temperature": 0.5, "top_k": 64.0}


def test_image_tensors_are_left_out(tmp_path: Path) -> None:
    pixels = {"v.patch_embd": np.ones((2, 8), np.float32), "mm.norm": np.ones(8, np.float32)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", GEMMA3, pixels | WEIGHTS))
    assert_holds(checkpoint, WEIGHTS)
    assert "images are not read" in checkpoint.notes[0]


def test_output_head(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    same = WEIGHTS | {"output": WEIGHTS["embed"]}
    assert_holds(open_checkpoint(write_gguf(path, GEMMA3, same)), WEIGHTS)
    other = WEIGHTS | {"output": -WEIGHTS["embed"]}
    with pytest.raises(GemmaError, match=r"output\.weight.*differs"):
        open_checkpoint(write_gguf(path, GEMMA3, other))


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A split file as the gguf package writes it."""
    write_gguf(tmp_path / "x.gguf", GEMMA3, WEIGHTS, "Q8_0", tensors_in_a_part=10)
    return sorted(tmp_path.iterdir())


@pytest.mark.parametrize("metadata_alone", [False, True])
def test_any_part_of_a_split_file(tmp_path: Path, metadata_alone: bool) -> None:
    whole = open_checkpoint(write_gguf(tmp_path / "whole.gguf", GEMMA3, WEIGHTS, "Q8_0"))
    (tmp_path / "parts").mkdir()
    path = tmp_path / "parts" / "x.gguf"
    write_gguf(path, GEMMA3, WEIGHTS, "Q8_0", tensors_in_a_part=10, metadata_alone=metadata_alone)
    parts = sorted(path.parent.iterdir())
    count = 4 if metadata_alone else 3
    assert [part.name for part in parts] == [
        f"x-0000{i}-of-0000{count}.gguf" for i in range(1, count + 1)
    ]
    for part in parts:
        checkpoint = open_checkpoint(part)
        assert checkpoint.config == whole.config
        assert checkpoint.tokenizer_model == whole.tokenizer_model
        assert list(checkpoint.tensors) == list(whole.tensors)
        for name, tensor in whole.tensors.items():
            ours, n_rows = checkpoint.tensors[name], tensor.shape[0]
            if len(tensor.shape) == 1:
                np.testing.assert_array_equal(ours.values(), tensor.values())
            else:
                np.testing.assert_array_equal(ours.rows(0, n_rows), tensor.rows(0, n_rows))


def test_parts_that_are_missing(parts: list[Path]) -> None:
    parts[1].unlink()
    for part in (parts[0], parts[2]):
        with pytest.raises(GemmaError, match=rf"1 are missing \({parts[1].name}\)"):
            open_checkpoint(part)


def test_parts_with_other_names(parts: list[Path]) -> None:
    for name in ("x.gguf", "x-00001-of-00004.gguf", "x-1-of-3.gguf", "sha256-0123"):
        renamed = parts[0].with_name(name)
        parts[0].rename(renamed)
        with pytest.raises(GemmaError, match=r"3 parts.*-of-00003\.gguf"):
            open_checkpoint(renamed)
        renamed.rename(parts[0])


def test_parts_that_contradict_each_other(parts: list[Path], tmp_path: Path) -> None:
    originals = [part.read_bytes() for part in parts]
    # One in another's place, and the first of another model.
    swapped = [originals[1], originals[0], originals[2]]
    repeated = [originals[0], originals[0], originals[2]]
    (tmp_path / "other").mkdir()
    fewer = {name: WEIGHTS[name] for name in list(WEIGHTS)[:-1]}
    write_gguf(tmp_path / "other" / "x.gguf", GEMMA3, fewer, tensors_in_a_part=10)
    foreign = [originals[0], originals[1], sorted((tmp_path / "other").iterdir())[2].read_bytes()]
    whole = write_gguf(tmp_path / "whole.gguf", GEMMA3, WEIGHTS).read_bytes()
    for contents in (swapped, repeated, foreign, [originals[0], whole, originals[2]]):
        for part, data in zip(parts, contents, strict=True):
            part.write_bytes(data)
        for part in parts:
            if part.read_bytes() != whole:
                with pytest.raises(GemmaError, match=r"-of-00003\.gguf"):
                    open_checkpoint(part)
    for part, data in zip(parts, originals, strict=True):
        part.write_bytes(data)
    count = b"split.tensors.count" + struct.pack("<I", GGUFValueType.INT32)
    for part, data in zip(parts, originals, strict=True):
        at = data.index(count) + len(count)
        more = struct.pack("<i", len(WEIGHTS) + 1)
        part.write_bytes(data[:at] + more + data[at + 4 :])
    with pytest.raises(GemmaError, match=f"{len(WEIGHTS)} tensors where they claim"):
        open_checkpoint(parts[0])


@pytest.mark.parametrize("name", ["embed", "layers.1.post_ffn_norm", "final_norm"])
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    rest = {key: values for key, values in WEIGHTS.items() if key != name}
    with pytest.raises(GemmaError, match=f"lacks the tensor '{name}'"):
        open_checkpoint(write_gguf(tmp_path / "x.gguf", GEMMA3, rest))


def test_another_architecture_than_the_tensors(tmp_path: Path) -> None:
    gemma2 = random_weights(tiny("gemma2"))
    with pytest.raises(GemmaError, match="q_norm"):
        open_checkpoint(write_gguf(tmp_path / "x.gguf", GEMMA3, gemma2))
    with pytest.raises(GemmaError, match=r"blk\.0\.attn_q_norm\.weight"):
        open_checkpoint(write_gguf(tmp_path / "x.gguf", tiny("gemma2"), WEIGHTS))


def test_broken_vocabulary(tmp_path: Path) -> None:
    for key, value in (
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.scores", [0.0]),
        ("tokenizer.ggml.tokens", TOKENS[:9]),
    ):
        path = write_gguf(tmp_path / "x.gguf", GEMMA3, WEIGHTS, metadata={key: value})
        with pytest.raises(GemmaError, match=r"x\.gguf"):
            open_checkpoint(path)


# The format itself

U32, F32, STRING, ARRAY = 4, 6, 8, 9


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(key: str | bytes, kind: int, data: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + data


def info(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    counts = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name) + counts + struct.pack("<IQ", kind, offset)


def file_of(
    values: list[bytes],
    infos: list[bytes],
    data: bytes = bytes(64),
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    n_values: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    counts = (
        len(infos) if n_tensors is None else n_tensors,
        len(values) if n_values is None else n_values,
    )
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(values + infos)
    return header + bytes(-len(header) % 32) + data


ALIGNMENT = "general.alignment"
# Two tensors of 5 and 8 floats: the first is padded from 20 to 32 bytes.
INFOS = [info("a", (5,)), info("b", (4, 2), offset=32)]
VALUES = [
    value("x.number", U32, struct.pack("<I", 7)),
    value("x.list", ARRAY, struct.pack("<IQ", STRING, 2) + string("one") + string("two")),
]
WHOLE = file_of(VALUES, INFOS)
HEADER_END = len(WHOLE) - 64

MALFORMED = {
    "empty": b"",
    "other magic": file_of(VALUES, INFOS, magic=b"GGML"),
    "version 0": file_of(VALUES, INFOS, version=0),
    "version 1": file_of(VALUES, INFOS, version=1),
    "version 4": file_of(VALUES, INFOS, version=4),
    "big-endian": file_of(VALUES, INFOS, version=3 << 24),
    "2^63 values": file_of(VALUES, INFOS, n_values=2**63),
    "2^64 - 1 tensors": file_of(VALUES, INFOS, n_tensors=2**64 - 1),
    "one tensor more": file_of(VALUES, INFOS, n_tensors=3, data=bytes(8)),
    "duplicate key": file_of([*VALUES, VALUES[0]], INFOS),
    "duplicate tensor": file_of(VALUES, [INFOS[0], info("a", (4, 2), offset=32)]),
    "key not UTF-8": file_of([value(b"\xff", U32, bytes(4))], INFOS),
    "string not UTF-8": file_of([value("x", STRING, string(b"\xc3"))], INFOS),
    "string of 2^63": file_of([value("x", STRING, struct.pack("<Q", 2**63))], INFOS),
    "string of 2^64 - 1": file_of([value("x", STRING, struct.pack("<Q", 2**64 - 1))], INFOS),
    "value type 13": file_of([value("x", 13, bytes(8))], INFOS),
    "value type 2^32 - 1": file_of([value("x", 2**32 - 1, bytes(8))], INFOS),
    "nested array": file_of([value("x", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(20))], INFOS),
    "array of type 13": file_of([value("x", ARRAY, struct.pack("<IQ", 13, 1))], INFOS),
    "2^64 - 1 strings": file_of([value("x", ARRAY, struct.pack("<IQ", STRING, 2**64 - 1))], INFOS),
    "2^62 numbers": file_of([value("x", ARRAY, struct.pack("<IQ", U32, 2**62))], INFOS),
    "alignment 0": file_of([value(ALIGNMENT, U32, struct.pack("<I", 0))], INFOS),
    "alignment 33": file_of([value(ALIGNMENT, U32, struct.pack("<I", 33))], INFOS),
    "alignment 2^31": file_of([value(ALIGNMENT, U32, struct.pack("<I", 2**31))], INFOS),
    "alignment 64": file_of([value(ALIGNMENT, U32, struct.pack("<I", 64))], INFOS),
    "alignment a string": file_of([value(ALIGNMENT, STRING, string("32"))], INFOS),
    "alignment a float": file_of([value(ALIGNMENT, F32, struct.pack("<f", 32))], INFOS),
    "5 dimensions": file_of(VALUES, [info("a", (1, 1, 1, 1, 1))]),
    "2^32 - 1 dimensions": file_of(VALUES, [string("a") + struct.pack("<I", 2**32 - 1)]),
    "exabytes": file_of(VALUES, [info("a", (2**40, 2**20))]),
    "size wraps to 0": file_of(VALUES, [info("a", (2**32, 2**30))]),
    "size wraps when padded": file_of(VALUES, [info("a", (2**62 - 1,))]),
    "no elements": file_of(VALUES, [info("a", (0, 4))]),
    "no elements of 2^64 - 1": file_of(VALUES, [info("a", (0, 2**64 - 1))]),
    "unknown type": file_of(VALUES, [info("a", (8,), kind=99)]),
    "removed type": file_of(VALUES, [info("a", (8,), kind=4)]),
    "part of a block": file_of(VALUES, [info("a", (33,), kind=2)]),
    "offset - 1": file_of(VALUES, [INFOS[0], info("b", (4, 2), offset=31)]),
    "offset + 1": file_of(VALUES, [INFOS[0], info("b", (4, 2), offset=33)], bytes(96)),
    "offset + alignment": file_of(VALUES, [INFOS[0], info("b", (4, 2), offset=64)], bytes(96)),
    "offset + 2^63": file_of(VALUES, [INFOS[0], info("b", (4, 2), offset=2**63 + 32)]),
    "offset 2^64 - 32": file_of(VALUES, [INFOS[0], info("b", (4, 2), offset=2**64 - 32)]),
    "overlap": file_of(VALUES, [INFOS[0], info("b", (4, 2), offset=0)]),
    "first tensor not first": file_of(VALUES, [info("a", (5,), offset=32)]),
    "a row too few": file_of(VALUES, [INFOS[0], info("b", (4,), offset=32)], bytes(96)),
    "bytes behind the tensors": file_of(VALUES, INFOS, bytes(65)),
    "a row too many": file_of(VALUES, [INFOS[0], info("b", (4, 3), offset=32)]),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_gguf(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(GemmaError, match=r"x\.gguf"):
        read_gguf(path)


def test_handmade_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    data = np.arange(16, dtype="<f4").tobytes()
    for version in (2, 3):
        path.write_bytes(file_of(VALUES, INFOS, data, version=version))
        metadata, tensors = read_gguf(path)
        assert metadata == {"x.number": 7, "x.list": ["one", "two"]}
        np.testing.assert_array_equal(tensors["a"].values(), np.arange(5))
        # The inner dimension is stated first.
        np.testing.assert_array_equal(tensors["b"].rows(0, 2), [[8, 9, 10, 11], [12, 13, 14, 15]])


def test_own_alignment(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    values = [value(ALIGNMENT, U32, struct.pack("<I", 8))]
    # The data begin 24 bytes before the next multiple of 32.
    path.write_bytes(file_of(values, [INFOS[0], info("b", (4, 2), offset=24)], bytes(32)))
    assert read_gguf(path)[1]["b"].shape == (2, 4)


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for size in range(len(WHOLE)):
        path.write_bytes(WHOLE[:size])
        with pytest.raises(GemmaError):
            read_gguf(path)
    path.write_bytes(WHOLE)
    assert list(read_gguf(path)[1]) == ["a", "b"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, HEADER_END - 1), st.integers(0, 255))
def test_changed_header_byte_is_read_or_refused(tmp_path: Path, at: int, byte: int) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])
    try:
        _, tensors = read_gguf(path)
    except GemmaError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) <= 64


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_byte_of_a_whole_model_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    if not path.exists():
        write_gguf(path, GEMMA3, WEIGHTS)
    whole = path.read_bytes()
    header_end = whole.index(gguf_name("final_norm").encode()) + 64
    at = data.draw(st.integers(0, header_end))
    changed = bytes([data.draw(st.integers(0, 255))])
    path.with_suffix(".x.gguf").write_bytes(whole[:at] + changed + whole[at + 1 :])
    try:
        checkpoint = open_checkpoint(path.with_suffix(".x.gguf"))
    except GemmaError:
        return
    assert list(checkpoint.tensors) == list(WEIGHTS)
