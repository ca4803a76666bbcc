"""PyTorch checkpoints: what is read from them, and that nothing hostile is run or gets through.

The files in written/torch were written by torch.save (make_torch.py); the others by torch_files.py.
"""

import contextlib
import json
import pickle
import shutil
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import hf_config, hf_tensors, random_weights, tiny, write_hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_checkpoint_safetensors import assert_holds
from test_config import EXPECTED
from test_pipeline import dequantized
from torch_files import (
    BUILD,
    EMPTY_DICT,
    EMPTY_TUPLE,
    MARK,
    NONE,
    PROTO,
    REDUCE,
    SETITEM,
    STOP,
    TUPLE,
    Tensor,
    archive,
    dictionary,
    gemma_pytorch_tensors,
    global_,
    kaggle_config,
    literal,
    saved,
    state_dict,
    storage,
    tensor,
    write_ckpt,
)

from quantize.checkpoint import open_checkpoint
from quantize.checkpoint.gemma_pytorch import config_from_shapes
from quantize.checkpoint.torch_file import TorchTensor, read_torch
from quantize.errors import GemmaError
from quantize.modelfile import ModelFile
from quantize.pipeline import plan, quantize
from quantize.tensors import tensor_shapes

GOLDEN = Path(__file__).parent / "golden"
WRITTEN = Path(__file__).parent / "written"
GEMMA = tiny("gemma")
WEIGHTS = random_weights(GEMMA)
TENSORS = gemma_pytorch_tensors(GEMMA, WEIGHTS)


def golden(tmp_path: Path, source: str, *files: str, drop: tuple[str, ...] = ()) -> Path:
    """A Kaggle folder: some of written/torch, with the tokenizer and config of another golden."""
    folder = tmp_path / "kaggle"
    folder.mkdir()
    for file in files:
        shutil.copy(WRITTEN / "torch" / file, folder)
    shutil.copy(GOLDEN / source / "tokenizer.model", folder)
    config = json.loads((GOLDEN / source / "config.json").read_text())
    for key in drop:
        del config[key]
    (folder / "config.json").write_text(repr(config))
    return folder


# What torch.save wrote


def assert_same_model(a: Path, b: Path) -> None:
    """Two model files with the same tensors, byte for byte."""
    first, second = ModelFile.open(a), ModelFile.open(b)
    assert first.config == second.config
    digests = dict(first.sha256), dict(second.sha256)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("bits", [4, 16])
def test_a_ckpt_gives_what_the_hugging_face_folder_gives(tmp_path: Path, bits: int) -> None:
    folder = golden(tmp_path, "gemma-mqa", "gemma-2b-it.ckpt", drop=("model_type",))
    from_ckpt, from_hf = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    quantize(open_checkpoint(folder / "gemma-2b-it.ckpt"), from_ckpt, bits=bits)
    quantize(open_checkpoint(GOLDEN / "gemma-mqa"), from_hf, bits=bits)
    assert_same_model(from_ckpt, from_hf)
    quantize(open_checkpoint(folder), from_ckpt, bits=bits, force=True)
    assert_same_model(from_ckpt, from_hf)


def test_shards_with_an_index(tmp_path: Path) -> None:
    shards = sorted(path.name for path in (WRITTEN / "torch" / "shards").iterdir())
    folder = golden(tmp_path, "gemma3-shards", *(f"shards/{name}" for name in shards))
    from_bin, from_hf = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    quantize(open_checkpoint(folder), from_bin, bits=16)
    quantize(open_checkpoint(GOLDEN / "gemma3-shards"), from_hf, bits=16)
    assert_same_model(from_bin, from_hf)
    quantize(open_checkpoint(folder / shards[1]), from_bin, bits=16, force=True)
    assert_same_model(from_bin, from_hf)
    (folder / shards[1]).unlink()
    with pytest.raises(GemmaError, match=rf"{shards[1]}.*does not exist"):
        open_checkpoint(folder)


def test_int8_rows_with_a_scale_each(tmp_path: Path) -> None:
    folder = golden(tmp_path, "gemma-mqa", "gemma-2b-it-quant.ckpt", drop=("model_type",))
    checkpoint, original = open_checkpoint(folder), open_checkpoint(GOLDEN / "gemma-mqa")
    for name, shape in tensor_shapes(checkpoint.config).items():
        ours, theirs = checkpoint.tensors[name], original.tensors[name]
        if len(shape) == 1:
            np.testing.assert_array_equal(ours.values(), theirs.values())
            continue
        wide = theirs.rows(0, shape[0])
        # The nearest of steps of a row's maximum / 120, rounded to the 8 bits of bfloat16.
        step = np.abs(wide).max(1, keepdims=True) / 120 * (1 + 2**-8)
        error = np.abs(ours.rows(0, shape[0]) - wide)
        assert (error <= step * 0.5001).all()
        assert error.max() > 0


# Our own files, of which the contents are known


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("generation", ["gemma", "gemma2", "gemma3"])
def test_every_generation_and_type(tmp_path: Path, generation: str, dtype: str) -> None:
    config = tiny(generation)
    weights = random_weights(config)
    path = write_ckpt(tmp_path / "x", config, gemma_pytorch_tensors(config, weights, dtype))
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == config
    assert_holds(checkpoint, weights)
    assert checkpoint.tensors["embed"].dtype == dtype
    np.testing.assert_array_equal(
        checkpoint.tensors["layers.1.attn_v"].rows(5, 9), weights["layers.1.attn_v"][5:9]
    )


@pytest.mark.parametrize("text", ["json", "dict", "trailing comma", "hugging face"])
def test_spellings_of_config_json(tmp_path: Path, text: str) -> None:
    path = write_ckpt(tmp_path / "x", GEMMA, TENSORS)
    values = kaggle_config(GEMMA)
    texts = {
        "json": json.dumps(values),
        "dict": repr(values),
        "trailing comma": repr(values)[:-1] + ",\n}",
        "hugging face": json.dumps(hf_config(GEMMA)),
    }
    (path.parent / "config.json").write_text(texts[text])
    assert open_checkpoint(path).config == GEMMA


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "{1: 2}",
        "{'head_dim': __import__('os').system('true')}",
        "{'head_dim': 'x'}",
        "{'head_dim': 0}",
        "{'head_dim': 24}",
        "{'head_dim': -32}",
        "(" * 10_000,
        "{'head_dim': 32, 'num_attention_heads': 3}",
        "\0",
    ],
)
def test_broken_config_json(tmp_path: Path, text: str) -> None:
    path = write_ckpt(tmp_path / "x", GEMMA, TENSORS)
    (path.parent / "config.json").write_text(text)
    with pytest.raises(GemmaError):
        open_checkpoint(path)


@pytest.mark.parametrize("model", EXPECTED)
def test_the_released_sizes_are_known_by_their_shapes(model: str) -> None:
    config = EXPECTED[model][1]
    shapes = dict(tensor_shapes(config))
    for layer in range(config.n_layers):
        parts = [shapes.pop(f"layers.{layer}.attn_{part}") for part in "qkv"]
        shapes[f"layers.{layer}.attn_qkv"] = (sum(rows for rows, _ in parts), config.hidden_size)
    found = config_from_shapes(config.generation, shapes, {}, "x.ckpt")
    assert found == config


def test_an_unknown_size_needs_its_config(tmp_path: Path) -> None:
    path = write_ckpt(tmp_path / "x", GEMMA, TENSORS)
    (path.parent / "config.json").write_text("{'head_dim': 32}")
    assert open_checkpoint(path).config == replace(GEMMA, context_length=8192, rms_norm_eps=1e-6)
    (path.parent / "config.json").unlink()
    with pytest.raises(GemmaError, match=r"no released Gemma.*config\.json"):
        open_checkpoint(path)


def test_hugging_faces_own_pytorch_files(tmp_path: Path) -> None:
    config = tiny("gemma3")
    weights = random_weights(config)
    folder = write_hf(tmp_path / "x", config, weights)
    (folder / "model.safetensors").unlink()
    tensors = {n: Tensor(*tensor) for n, tensor in hf_tensors(config, weights).items()}
    program = state_dict(tensors)
    storages = {str(key): t.data for key, t in enumerate(tensors.values())}
    (folder / "pytorch_model.bin").write_bytes(archive(program, storages))
    assert_holds(open_checkpoint(folder), weights)
    (folder / "config.json").unlink()
    with pytest.raises(GemmaError, match=r"config\.json"):
        open_checkpoint(folder)


def quantized(scale_dtype: str, scales: np.ndarray) -> tuple[dict[str, Tensor], np.ndarray]:
    """TENSORS with a random int8 gate projection with these scales, and its values."""
    name = "model.layers.1.mlp.gate_proj.weight"
    codes = np.random.default_rng(0).integers(-128, 128, (96, 64), np.int8)
    data = scales.astype("<f4").tobytes()
    if scale_dtype == "BF16":
        data = (scales.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return TENSORS | {
        name: Tensor("I8", codes.shape, codes.tobytes()),
        f"{name}_scaler": Tensor(scale_dtype, (96,), data),
    }, codes.astype(np.float32) * scales[:, None].astype(np.float32)


@pytest.mark.parametrize("scale_dtype", ["BF16", "F32"])
def test_int8_codes_are_kept_if_float16_holds_the_scales(tmp_path: Path, scale_dtype: str) -> None:
    scales = np.ldexp(np.arange(128, 224) / 128, np.arange(96) % 18 - 17)
    tensors, expected = quantized(scale_dtype, scales)
    checkpoint = open_checkpoint(write_ckpt(tmp_path / "x", GEMMA, tensors))
    read = checkpoint.tensors["layers.1.ffn_gate"]
    assert (read.dtype, read.nbytes) == ("I8", 96 * 64)
    np.testing.assert_array_equal(read.rows(0, 96), expected)
    grid = read.grid(3, 90)
    assert grid is not None
    assert (grid.codes.dtype, grid.scales.shape) == (np.int8, (87, 2))
    kept = grid.codes * np.repeat(grid.scales.astype(np.float32), 32, axis=1)
    np.testing.assert_array_equal(kept, expected[3:90])
    exact = {p.name: p.exact for p in plan(checkpoint, 8)}
    assert exact.pop("layers.1.ffn_gate")
    assert not any(exact.values())
    assert not any(p.exact for p in plan(checkpoint, 4))
    quantize(checkpoint, tmp_path / "a.safetensors", bits=8)
    written = dequantized(ModelFile.open(tmp_path / "a.safetensors"), "layers.1.ffn_gate")
    np.testing.assert_array_equal(written, expected)


def test_scales_that_float16_would_round(tmp_path: Path) -> None:
    scales = np.full(96, 2.0**-8)
    scales[95] += 2.0**-20
    tensors, expected = quantized("F32", scales)
    checkpoint = open_checkpoint(write_ckpt(tmp_path / "x", GEMMA, tensors))
    read = checkpoint.tensors["layers.1.ffn_gate"]
    assert read.grid(0, 1) is None
    np.testing.assert_array_equal(read.rows(0, 96), expected)
    assert not any(p.exact for p in plan(checkpoint, 8))
    quantize(checkpoint, tmp_path / "a.safetensors", bits=8)


def test_int8_needs_its_scales(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate_proj.weight"
    tensors, _ = quantized("F32", np.ones(96))
    for wrong in (
        {k: t for k, t in tensors.items() if k != f"{name}_scaler"},
        tensors | {f"{name}_scaler": Tensor("F32", (48,), bytes(192))},
        tensors | {f"{name}_scaler": Tensor("F32", (96, 1), bytes(384))},
        tensors | {f"{name}_scaler": Tensor("F32", (), bytes(4))},
        tensors | {f"{name}_scaler": Tensor("F64", (96,), bytes(768))},
        tensors | {name: TENSORS[name]},
        tensors | {name: Tensor("F64", (96, 64), bytes(8 * 96 * 64))},
    ):
        with pytest.raises(GemmaError, match=name):
            open_checkpoint(write_ckpt(tmp_path / "x", GEMMA, wrong))
    infinite = tensors | {f"{name}_scaler": Tensor("F32", (96,), b"\0\0\x80\x7f" * 96)}
    checkpoint = open_checkpoint(write_ckpt(tmp_path / "x", GEMMA, infinite))
    with pytest.raises(GemmaError, match=r"infinite in layers\.1\.ffn_gate"):
        quantize(checkpoint, tmp_path / "a.safetensors", bits=8)


@pytest.mark.parametrize(
    ("path", "chat"),
    [
        ("gemma-2b-it.ckpt", "gemma"),
        ("gemma-1.1-7b-it-quant.ckpt", "gemma"),
        ("gemma-3-270m-it/1/model.ckpt", "gemma"),
        ("gemma-2b.ckpt", "base"),
        ("gemma-2b-italian.ckpt", "base"),
        ("it/x.ckpt", "base"),
    ],
)
def test_a_name_says_whether_it_chats(tmp_path: Path, path: str, chat: str) -> None:
    target = tmp_path / path
    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(write_ckpt(target.parent, GEMMA, TENSORS, target.name))
    assert checkpoint.chat == chat
    assert any("base model" in note for note in checkpoint.notes) == (chat == "base")


def test_what_is_beside_it(tmp_path: Path) -> None:
    path = write_ckpt(tmp_path / "x", GEMMA, TENSORS)
    (path.parent / "generation_config.json").write_text('{"top_k": 64}')
    assert open_checkpoint(path).sampling == {"top_k": 64.0}
    shutil.copy(path, path.with_name("second.ckpt"))
    with pytest.raises(GemmaError, match=r"gemma-2b-it\.ckpt, second\.ckpt"):
        open_checkpoint(path.parent)
    (path.parent / "tokenizer.model").unlink()
    with pytest.raises(GemmaError, match=r"no tokenizer\.model"):
        open_checkpoint(path)


def test_image_tensors_are_left_out(tmp_path: Path) -> None:
    config = tiny("gemma3")
    weights = random_weights(config)
    tensors = gemma_pytorch_tensors(config, weights)
    tensors["text_token_embedder.weight"] = tensors.pop("embedder.weight")
    for name in ("siglip_vision_model.x", "mm_soft_embedding_norm.weight", "local_freqs_cis"):
        tensors[name] = Tensor("C64", (2,), bytes(16))
    checkpoint = open_checkpoint(write_ckpt(tmp_path / "x", config, tensors))
    assert_holds(checkpoint, weights)
    assert "images are not read" in checkpoint.notes[0]


@pytest.mark.parametrize("name", [name for name in TENSORS if "layers.1" not in name])
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    rest = {key: t for key, t in TENSORS.items() if key != name}
    with pytest.raises(GemmaError):
        open_checkpoint(write_ckpt(tmp_path / "x", GEMMA, rest))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("embedder.weight", ()),
        ("embedder.weight", (272,)),
        ("model.layers.0.self_attn.qkv_proj.weight", (264, 64)),
        ("model.layers.0.self_attn.qkv_proj.weight", (32, 64)),
        ("model.layers.1.self_attn.qkv_proj.weight", (264, 64)),
        ("model.layers.1.self_attn.qkv_proj.weight", ()),
        ("model.layers.1.mlp.up_proj.weight", (96, 64, 1)),
        ("model.norm.weight", ()),
        ("model.layers.0.mlp.experts.weight", (1,)),
    ],
)
def test_tensor_of_another_shape(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    tensors = TENSORS | {name: Tensor("BF16", shape, bytes(2 * int(np.prod(shape))))}
    with pytest.raises(GemmaError):
        open_checkpoint(write_ckpt(tmp_path / "x", GEMMA, tensors))


@pytest.mark.parametrize(
    "program", [literal(3), EMPTY_DICT, dictionary({"model_state_dict": literal(3)}), NONE]
)
def test_no_state_dict(tmp_path: Path, program: bytes) -> None:
    path = write_ckpt(tmp_path / "x", GEMMA, TENSORS)
    path.write_bytes(archive(program, {}))
    with pytest.raises(GemmaError, match="no model_state_dict"):
        open_checkpoint(path)


# The format itself


def read(tmp_path: Path, data: bytes) -> object:
    path = tmp_path / "x.ckpt"
    path.write_bytes(data)
    return read_torch(path)


def test_views_of_a_storage(tmp_path: Path) -> None:
    items = np.arange(24, dtype="<f4")
    views = {
        "whole": Tensor("F32", (4, 6), items.tobytes()),
        "transposed": Tensor("F32", (6, 4), items.tobytes(), strides=(1, 6)),
        "columns": Tensor("F32", (4, 2), items.tobytes(), (6, 1), offset=3, n_items=24),
        "scalar": Tensor("F32", (), items.tobytes(), offset=23, n_items=24),
        "none": Tensor("F32", (0, 6), b"", n_items=0),
        "one": Tensor("F32", (1, 2, 1), items.tobytes(), (2**62, 1, 9), offset=22, n_items=24),
    }
    loaded = read(
        tmp_path, archive(state_dict(views), {str(i): views[n].data for i, n in enumerate(views)})
    )
    assert isinstance(loaded, dict)
    grid = items.reshape(4, 6)
    expected = {
        "whole": grid,
        "transposed": grid.T,
        "columns": grid[:, 3:5],
        "scalar": items[23],
        "none": grid[:0],
        "one": items[22:].reshape(1, 2, 1),
    }
    for name, values in expected.items():
        assert isinstance(loaded[name], TorchTensor)
        assert loaded[name].data.shape == values.shape
        np.testing.assert_array_equal(loaded[name].data, values)


def test_what_comes_beside_the_weights(tmp_path: Path) -> None:
    program = dictionary(
        {"epoch": literal(10**12), "names": literal(("a", True)), "none": NONE, "new": EMPTY_DICT}
    )
    expected = {"epoch": 10**12, "names": ("a", True), "none": None, "new": {}}
    assert read(tmp_path, archive(program, {})) == expected
    # As PyTorch writes it on request, in the standard library's words.
    value = {"a": [1, 2.5, -3, 10**30, "é", None, (False, {})], "b": OrderedDict(c=1)}
    for protocol in (2, 4, 5):
        data = pickle.dumps(value, protocol)
        start = 2 if protocol > 1 else 0
        assert read(tmp_path, archive(data[start:-1], {})) == value


def test_a_module_leaves_its_metadata(tmp_path: Path) -> None:
    one = {"x": Tensor("F32", (1,), bytes(4))}
    metadata = dictionary({"_metadata": dictionary({"": dictionary({"version": literal(1)})})})
    loaded = read(tmp_path, archive(state_dict(one) + metadata + BUILD, {"0": bytes(4)}))
    assert isinstance(loaded, dict)
    assert list(loaded) == ["x"]


ONE = storage("F32", "0", 4)
FOUR = {"0": bytes(16)}


def program(offset: int, shape: object, strides: object, source: bytes = ONE) -> bytes:
    return tensor(source, offset, shape, strides)


MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "no zip file": b"text" * 10,
    "the old format": pickle.dumps(0x1950A86A20F9469CFC6C, 2),
    "only a start": b"PK\x03\x04",
    "no pickle": archive(NONE, {}, root="a").replace(b"data.pkl", b"code.pkl"),
    "two folders": archive(NONE, {}, entries={"other/data.pkl": b"N."}),
    "a file in no folder": archive(NONE, {}, entries={"data.pkl": b"N."}),
    "up": archive(NONE, {}, entries={"archive/../x": b""}),
    "absolute": archive(NONE, {}, entries={"/archive/x": b""}),
    "NUL": archive(NONE, {}, entries={"archive/xNULy": b""}).replace(b"xNULy", b"x\0\0\0y"),
    "backslash": archive(NONE, {}, entries={"archive/..|x": b""}).replace(b"..|x", b"..\\x"),
    "folder": archive(NONE, {}, entries={"archive/data/": b""}),
    "entry twice": archive(NONE, {"1": b"", "2": b""}).replace(b"data/2", b"data/1"),
    "big-endian": archive(NONE, {}, order="big"),
    "compressed pickle": archive(NONE, {}, compressed=["archive/data.pkl"]),
    "compressed storage": archive(program(0, (4,), (1,)), FOUR, compressed=["archive/data/0"]),
    "storage missing": archive(program(0, (4,), (1,)), {}),
    "storage short": archive(program(0, (4,), (1,)), {"0": bytes(15)}),
    "storage long": archive(program(0, (4,), (1,)), {"0": bytes(20)}),
    "storage of -4": archive(program(0, (4,), (1,), storage("F32", "0", -4)), FOUR),
    "storage of 2^62": archive(program(0, (4,), (1,), storage("F32", "0", 2**62)), FOUR),
    "storage elsewhere": archive(program(0, (4,), (1,), storage("F32", "../0", 4)), FOUR),
    "offset": archive(program(1, (4,), (1,)), FOUR),
    "negative offset": archive(program(-1, (4,), (1,)), FOUR),
    "offset 2^63": archive(program(2**63, (4,), (1,)), FOUR),
    "offset 2^64 wraps": archive(program(2**64, (4,), (1,)), FOUR),
    "a row too many": archive(program(0, (3, 2), (2, 1)), FOUR),
    "negative size": archive(program(0, (-4,), (1,)), FOUR),
    "2^62 x 4": archive(program(0, (2**62, 4), (4, 1)), FOUR),
    "none of 2^62": archive(program(0, (0, 2**62, 2**62), (1, 1, 1)), FOUR),
    "negative stride": archive(program(3, (4,), (-1,)), FOUR),
    "stride 0": archive(program(0, (1000, 4), (0, 1)), FOUR),
    "stride overlaps": archive(program(0, (2, 3), (1, 1)), FOUR),
    "stride 2^62": archive(program(0, (2, 2), (2**62, 1)), FOUR),
    "strides for more": archive(program(0, (4,), (1, 1)), FOUR),
    "many dimensions": archive(program(0, (1,) * 9, (1,) * 9), FOUR),
    "shape of strings": archive(program(0, ("4",), (1,)), FOUR),
    "shape of truth values": archive(program(0, (True,), (1,)), FOUR),
    "shape no tuple": archive(program(0, 4, (1,)), FOUR),
    "deep shape": archive(
        global_("torch._utils._rebuild_tensor_v2") + MARK + ONE + literal(0) + EMPTY_TUPLE
        + b"\x85" * 100_000 + literal((1,)) + literal(False) + NONE + TUPLE + REDUCE, FOUR,
    ),
    "deep key": archive(EMPTY_DICT + EMPTY_TUPLE + b"\x85" * 1_000_000 + NONE + SETITEM, {}),
    "deep function": archive(EMPTY_TUPLE + b"\x85" * 100_000 + EMPTY_TUPLE + REDUCE, {}),
    "list as a key": archive(EMPTY_DICT + b"]" + NONE + SETITEM, {}),
    "a key without a value": archive(EMPTY_DICT + MARK + literal("x") + b"u", {}),
    "nothing": archive(b"", {}),
    "two results": archive(NONE + NONE, {}),
    "an open mark": archive(MARK + NONE, {}),
    "no mark": archive(TUPLE, {}),
    "takes from nothing": archive(NONE + SETITEM, {}),
    "memo of nothing": archive(b"q\0", {}),
    "memo that is not there": archive(b"h\1", {}),
    "memo of 2^32 - 1": archive(NONE + b"j\xff\xff\xff\xff", {}),
    "unknown opcode": archive(b"\xff", {}),
    "string of 2^32 - 1": archive(b"X\xff\xff\xff\xff", {}),
    "string of 2^63": archive(b"\x8d" + struct.pack("<Q", 2**63), {}),
    "number of 2^31 - 1 bytes": archive(b"\x8b" + struct.pack("<I", 2**31 - 1), {}),
    "no UTF-8": archive(b"X\1\0\0\0\xff", {}),
    "no end": archive(NONE, {}).replace(PROTO + NONE + STOP, PROTO + NONE + NONE),
    "big pickle": archive(NONE + b"0N" * 2_100_000, {}),
}  # fmt: skip


ALLOWED_EVENTS = {"open", "mmap.__new__", "os.fstat", "object.__getattr__", "os.stat"}
_watching: list[list[str]] = []


@pytest.fixture(scope="module", autouse=True)
def _audit(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("first") / "x.ckpt"
    for data in (WHOLE, archive(b"", {}), b""):  # imports what it needs
        path.write_bytes(data)
        with contextlib.suppress(GemmaError):
            read_torch(path)
    sys.addaudithook(lambda event, _: _watching[-1].append(event) if _watching else None)


def refusal(tmp_path: Path, data: bytes, match: str) -> str:
    """The sentence in which a file is refused; nothing is done meanwhile but that it is read."""
    path = tmp_path / "x.ckpt"
    path.write_bytes(data)
    _watching.append([])
    try:
        with pytest.raises(GemmaError, match=match) as caught:
            read_torch(path)
    finally:
        events = set(_watching.pop())
    assert "open" in events
    assert events <= ALLOWED_EVENTS
    return str(caught.value)


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_torch_file(tmp_path: Path, data: bytes) -> None:
    refusal(tmp_path, data, r"x\.ckpt")


def directory_of(data: bytes) -> int:
    """Where the zip file's directory starts (APPNOTE.TXT 4.3.16)."""
    return int(struct.unpack_from("<I", data, len(data) - 6)[0])


def test_entries_that_overlap(tmp_path: Path) -> None:
    data = archive(program(0, (4,), (1,)), FOUR | {"1": bytes(16)})
    at = directory_of(data)
    places = []
    while data[at : at + 4] == b"PK\x01\x02":
        name_bytes = struct.unpack_from("<H", data, at + 28)[0]
        places.append(at + 42)  # of the offset of its header, 4.3.12
        at += 46 + name_bytes
    offsets = [struct.unpack_from("<I", data, place)[0] for place in places]
    assert isinstance(read(tmp_path, data), TorchTensor)
    for offset in (*offsets[:-1], offsets[-1] - 1, offsets[-1] + 1, 2**32 - 2, len(data) - 20):
        moved = bytearray(data)
        struct.pack_into("<I", moved, places[-1], offset)
        with pytest.raises(GemmaError):
            read(tmp_path, bytes(moved))


WHOLE = saved({"x": Tensor("BF16", (2, 3), bytes(12)), "y": Tensor("I8", (4,), bytes(4))})


def test_truncated_anywhere(tmp_path: Path) -> None:
    assert isinstance(read(tmp_path, WHOLE), dict)
    for size in range(len(WHOLE)):
        with pytest.raises(GemmaError):
            read(tmp_path, WHOLE[:size])


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_changed_byte_is_read_or_refused(tmp_path: Path, at: int, byte: int) -> None:
    with contextlib.suppress(GemmaError):
        read(tmp_path, WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])


# Pickles that would do something


def canary(folder: Path) -> Path:
    return folder / "canary"


# Functions that make a file, with their arguments; the path of the file is PATH.
DEEDS: dict[str, tuple[str, tuple[object, ...]]] = {
    "os.system": ("os.system", ("touch PATH",)),
    "posix.system": ("posix.system", ("touch PATH",)),
    "os.mkdir": ("os.mkdir", ("PATH",)),
    "eval": ("builtins.eval", ("open('PATH', 'w')",)),
    "exec": ("builtins.exec", ("open('PATH', 'w')",)),
    "open": ("builtins.open", ("PATH", "w")),
    "io.open": ("io.open", ("PATH", "w")),
    "codecs.open": ("codecs.open", ("PATH", "w")),
    "subprocess": ("subprocess.check_call", (("touch", "PATH"),)),
    "runpy": ("runpy._run_code", ("open('PATH', 'w')", EMPTY_DICT)),
}


def push(value: object, folder: Path) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, tuple):
        return MARK + b"".join(push(v, folder) for v in value) + TUPLE
    return literal(str(value).replace("PATH", str(canary(folder))))


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def by_global(name: str, arguments: bytes) -> bytes:
    return global_(name) + arguments + REDUCE


def by_stack_global(name: str, arguments: bytes) -> bytes:
    module, _, attribute = name.rpartition(".")
    return short(module) + short(attribute) + b"\x93" + arguments + REDUCE


def by_inst(name: str, arguments: bytes) -> bytes:
    module, _, attribute = name.rpartition(".")
    return arguments[:-1] + f"i{module}\n{attribute}\n".encode()


def by_obj(name: str, arguments: bytes) -> bytes:
    return MARK + global_(name) + arguments[1:-1] + b"o"


def inside_a_tensor(name: str, arguments: bytes) -> bytes:
    call = global_(name) + arguments + REDUCE
    return global_("torch._utils._rebuild_tensor_v2") + MARK + call + TUPLE + REDUCE


def as_a_storage(name: str, arguments: bytes) -> bytes:
    return global_(name) + arguments + REDUCE + b"Q"


def as_a_value(name: str, arguments: bytes) -> bytes:
    return EMPTY_DICT + literal("x") + global_(name) + arguments + REDUCE + SETITEM


CALLS = (by_global, by_stack_global, by_inst, by_obj)
INSIDE = (inside_a_tensor, as_a_storage, as_a_value)
WAYS: dict[str, Callable[[str, bytes], bytes]] = {f.__name__: f for f in (*CALLS, *INSIDE)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("deed", DEEDS)
def test_hostile_pickles_do_nothing(tmp_path: Path, deed: str, way: str) -> None:
    name, values = DEEDS[deed]
    hostile = WAYS[way](name, push(values, tmp_path))
    if way == "by_global":  # It does what it should where it is not stopped.
        pickle.loads(PROTO + hostile + STOP)
        assert canary(tmp_path).exists()
        canary(tmp_path).rename(tmp_path / "done")
    refusal(tmp_path, archive(hostile, {}), "hostile")
    assert not canary(tmp_path).exists()


@pytest.mark.parametrize(
    "hostile",
    {
        "newobj": global_("collections.OrderedDict") + EMPTY_TUPLE + b"\x81",
        "newobj_ex": global_("collections.OrderedDict") + EMPTY_TUPLE + EMPTY_DICT + b"\x92",
        "build of a list": b"]" + NONE + BUILD,
        "build of a tensor": program(0, (4,), (1,)) + NONE + BUILD,
        "ext": b"\x82\x01",
        "persid": b"P0\n",
        "bytes": b"C\1x",
        "out-of-band buffer": b"\x97",
        "string": b"S'x'\n",
        "dup": NONE + b"2",
        "set": b"\x8f",
        "load": by_global("torch.load", EMPTY_TUPLE),
        "storage loader": by_global("torch.storage._load_from_bytes", EMPTY_TUPLE),
        "tensor v3": by_global("torch._utils._rebuild_tensor_v3", EMPTY_TUPLE),
        "device tensor": by_global("torch._utils._rebuild_device_tensor_from_numpy", EMPTY_TUPLE),
        "getattr": by_global("builtins.getattr", EMPTY_TUPLE),
        "dotted": by_stack_global("torch.serialization.os.system", EMPTY_TUPLE),
        "dict with arguments": by_global("collections.OrderedDict", literal((1,))),
        "call of a storage": by_global("torch.FloatStorage", EMPTY_TUPLE),
        "call of a dict": EMPTY_DICT + EMPTY_TUPLE + REDUCE,
        "number, a parameter": by_global("torch._utils._rebuild_parameter", literal((1, True, 0))),
        "id of another kind": literal(("module", "x", "0", "cpu", 4)) + b"Q",
        "id with a view": MARK + literal("storage") + global_("torch.FloatStorage")
        + literal("0") + literal("cpu") + literal(4) + NONE + TUPLE + b"Q",
        "name in two lines": b"cos\nsystem\nx\n",
        "a name like ours": by_global("collections.OrderedDict.fromkeys", EMPTY_TUPLE),
        "escape": global_("os.\x1b[2J"),
    }.items(),
    ids=lambda item: item[0],
)  # fmt: skip
def test_other_opcodes_and_names(tmp_path: Path, hostile: tuple[str, bytes]) -> None:
    assert "\x1b" not in refusal(tmp_path, archive(hostile[1], FOUR), "hostile|malformed")
