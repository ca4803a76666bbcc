"""Files made to cost more than they hold, or to be taken for something else: refused at once.

Files that are merely damaged are with the tests of their readers, and mutated ones in fuzz.py.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch_files
from checkpoints import (
    VOCABULARY,
    hf_tensors,
    random_weights,
    safetensors_bytes,
    tiny,
    write_gguf,
    write_hf,
)
from fuzz import check, read_adapter, read_folder, read_gguf, read_model, read_recipe
from gguf import GGUFReader
from test_checkpoint_gguf import ARRAY, STRING, U32, file_of, info, string, value
from torch_files import EMPTY_DICT, EMPTY_TUPLE, NONE, archive, global_, literal

from quantize.checkpoint import open_checkpoint
from quantize.checkpoint.sentencepiece_model import (
    control_pieces_as_control,
    sentencepiece_from_gguf,
)
from quantize.errors import GemmaError, shown
from quantize.pipeline import quantize

CONFIG = tiny("gemma3")
WEIGHTS = random_weights(CONFIG)
TENSORS = hf_tensors(CONFIG, WEIGHTS)
TOKENIZER = sentencepiece_from_gguf(VOCABULARY)
U8 = 0
DEEP = "[" * 900 + "]" * 900


def with_tensor(name: str, dtype: str, shape: tuple[int, ...], data: bytes = b"") -> bytes:
    return safetensors_bytes(TENSORS | {name: (dtype, shape, data)})


# Small texts that become large in memory, or long in a message.
JSON = {
    "lists": '{"x":[' + "[]," * 1_000_000 + "[]]}",
    "objects": '{"x":[' + "{}," * 1_000_000 + "{}]}",
    "names": "{" + ",".join(f'"{i}":1' for i in range(400_000)) + "}",
    "nested": '{"model_type":' + DEEP + "}",
    "too nested": '{"model_type":' + "[" * 100_000 + "]" * 100_000 + "}",
    "a long name": json.dumps({"x" * 1_000_000: 1, "model_type": "y" * 1_000_000}),
    "a long number": '{"model_type": "gemma", "head_dim": ' + "9" * 4000 + "}",
    "escapes": json.dumps({"model_type": "\x1b[2J\u202e\ud800\0"}),
    "of 11 MB": '{"model_type": "gemma3_text"}' + " " * 11_000_000,
}


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_json(tmp_path: Path, file: str, text: str) -> None:
    files = {
        "config.json": json.dumps({"model_type": "gemma3_text"}).encode(),
        "tokenizer.model": TOKENIZER,
        file: text.encode(),
    }
    if file == "model.safetensors":
        files[file] = len(text).to_bytes(8, "little") + text.encode()
    elif file == "tokenizer.json":
        write_hf(tmp_path / "x", CONFIG, WEIGHTS)
        files |= {
            n: (tmp_path / "x" / n).read_bytes() for n in ("config.json", "model.safetensors")
        }
        del files["tokenizer.model"]
    assert check(read_folder, tmp_path / "x", files) == "refused"


NAME = "model.norm.weight"
SAFETENSORS = {
    "no elements of 2^62": with_tensor(NAME, "BF16", (0, 2**62, 2**62)),
    "no elements": with_tensor(NAME, "BF16", (0,)),
    "no dimensions": with_tensor(NAME, "BF16", (), b"\0\0"),
    "a long name": with_tensor("x" * 1_000_000, "BF16", (1,), b"\0\0"),
    "a name of escapes": with_tensor("\x1b[2J\u202e", "BF16", (1,), b"\0\0"),
    "a long type": with_tensor(NAME, "X" * 1_000_000, (1,), b"\0\0"),
    "a GGUF file inside": with_tensor("GGUF", "U8", (100,), b"GGUF" + bytes(96)),
    "a zip file behind": safetensors_bytes(TENSORS) + archive(NONE, {}),
    "a GGUF file": file_of([], []),
    "a pickle": b"\x80\x02}.",
    "a zip file": archive(NONE, {}),
    "a header that is HTML": (20).to_bytes(8, "little") + b"<html><script>x</scr",
}


@pytest.mark.parametrize("data", SAFETENSORS.values(), ids=SAFETENSORS)
def test_safetensors(tmp_path: Path, data: bytes) -> None:
    files = {"model.safetensors": data, "tokenizer.model": TOKENIZER}
    config = write_hf(tmp_path / "x", CONFIG, WEIGHTS) / "config.json"
    files["config.json"] = config.read_bytes()
    assert check(read_folder, tmp_path / "x", files) == "refused"


def array(kind: int, count: int, data: bytes) -> bytes:
    return value("x", ARRAY, struct.pack("<IQ", kind, count) + data)


GGUF: dict[str, bytes | Callable[[], bytes]] = {
    "3 million numbers": file_of([array(U8, 3_000_000, bytes(3_000_000))], []),
    "3 million strings": file_of([array(STRING, 3_000_000, bytes(24_000_000))], []),
    "100,000 keys": file_of([value(str(i), U8, b"\0") for i in range(100_000)], []),
    "100,000 tensors": file_of([], [info(str(i), (8,), 0, 32 * i) for i in range(100_000)]),
    "a string of 17 MiB": lambda: file_of([value("x", STRING, string(b"x" * (17 << 20)))], []),
    "strings of 60 MB": lambda: file_of(
        [value(str(i), STRING, string(b"x" * 10**7)) for i in range(6)], []
    ),
    "a key of 2^63": file_of([struct.pack("<QI", 2**63, U8)], []),
    "a key of 1 MB": file_of([value("x" * 10**6, U32, b"\0" * 4)] * 2, []),
    "a tensor's name of 2^63": file_of([], [struct.pack("<QI", 2**63, 1)]),
    "a tensor's name of 1 MB": file_of([], [info("x" * 10**6, (33,), 2)]),
    "an architecture of 1 MB": file_of([value("general.architecture", 8, string("x" * 10**6))], []),
    "an architecture of escapes": file_of(
        [value("general.architecture", 8, string("\x1b]52;c;x\a\u202e"))], []
    ),
    "99,999 parts": file_of([value("split.count", U32, struct.pack("<I", 99_999))], []),
    "2^31 - 1 parts": file_of([value("split.count", U32, struct.pack("<I", 2**31 - 1))], []),
    "a pickle": b"GGUF\x80\x02}.",
}  # fmt: skip


@pytest.mark.parametrize("data", GGUF.values(), ids=GGUF)
def test_gguf(tmp_path: Path, data: bytes | Callable[[], bytes]) -> None:
    data = data() if callable(data) else data
    assert check(read_gguf, tmp_path / "x", {"x.gguf": data}) == "refused"


def directory(n: int) -> bytes:
    """A zip file of so many empty entries."""
    return archive(NONE, {}, entries={f"archive/{i}": b"" for i in range(n)})


def zip64(size: int, offset: int) -> bytes:
    """The end of a zip file (APPNOTE.TXT 4.3.14 to 4.3.16) whose directory is there."""
    end = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, 1, 1, size, offset)
    locator = struct.pack("<IIQI", 0x07064B50, 0, 4, 1)
    last = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    return b"PK\x03\x04" + end + locator + last


TORCH = {
    "lists": archive(b"]" * 1_900_000, {}),
    "nothing, taken": archive(b"N0" * 900_000, {}),
    "a name of lists in each other": archive(
        EMPTY_TUPLE + b"q\0" + b"h\0h\0\x86q\0" * 60 + literal("x") + b"\x93", {}
    ),
    "a deep name": archive(EMPTY_TUPLE + b"\x85" * 100_000 + literal("x") + b"\x93", {}),
    "a list that holds itself": archive(b"]q\0h\0a" + literal("x") + b"\x93", {}),
    "a name of 1 MB": archive(global_("x." + "y" * 10**6), {}),
    "a key of 1 MB": archive(torch_files.storage("F32", "x" * 10**6, 1), {}),
    "a number of 2000 digits": archive(
        EMPTY_DICT + literal("x") + b"\x8b" + struct.pack("<I", 999) + b"\x7f" * 999 + b"sR", {}
    ),
    "50,000 entries": directory(50_000),
    "a directory of 2^63": zip64(2**63, 0),
    "a directory at 2^64 - 1": zip64(46, 2**64 - 1),
    "a directory of 2^62 at 2^62": zip64(2**62, 2**62),
    "a safetensors file": safetensors_bytes(TENSORS),
    "a GGUF file": file_of([], []),
}


@pytest.mark.parametrize("data", TORCH.values(), ids=TORCH)
def test_torch(tmp_path: Path, data: bytes) -> None:
    files = {"gemma-2b-it.ckpt": data, "tokenizer.model": TOKENIZER}
    assert check(read_folder, tmp_path / "x", files) == "refused"


CONFIGS = {
    "signs": "-" * 90_000 + "1",
    "sums": "1" + "+1" * 45_000,
    "attributes": "a" + ".a" * 45_000,
    "brackets": "(" * 90_000,
    "sets": "{" * 90_000,
    "calls": "a" + "()" * 45_000,
    "strings in strings": "f'" + "{f'" * 900,
    "a power": "9**9**9**9",
    "a product": "['x'] * 10**12",
    "a number of 5000 digits": "{'head_dim': 0x" + "f" * 5000 + "}",
    "a million bytes": "{'head_dim': '" + "x" * 1_000_000 + "'}",
    "odd escapes": r"{'head_dim': '\d\x'}",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_config_in_python(tmp_path: Path, text: str) -> None:
    path = torch_files.write_ckpt(
        tmp_path / "y", CONFIG, torch_files.gemma_pytorch_tensors(CONFIG, WEIGHTS)
    )
    files = {path.name: path.read_bytes(), "config.json": text.encode()}
    files["tokenizer.model"] = TOKENIZER
    assert check(read_folder, tmp_path / "x", files) == "refused"


def model(*fields: bytes) -> bytes:
    return TOKENIZER + b"".join(fields)


def field(number: int, data: bytes) -> bytes:
    return bytes((number << 3 | 2, len(data))) + data


MARKER = field(1, b"<start_of_turn>") + b"\x15\0\0\0\0"
USER_DEFINED = b"\x18\x04"
TOKENIZERS = {
    "a table of characters": model(field(3, field(2, b"\4\0\0\0\0\0\0\0x\0"))),
    "one for the way back": model(field(5, field(2, b"\4\0\0\0\0\0\0\0x\0"))),
    "a text that protobuf skips": model(field(1, MARKER + USER_DEFINED + b"\x08\x61")),
    "a kind that protobuf skips": model(field(1, MARKER + USER_DEFINED + b"\x1d\3\0\0\0")),
    "a kind as text": model(field(1, MARKER + USER_DEFINED + b"\x1a\1\3")),
    "a normalizer as a number": model(b"\x18\1"),
    "a kind of 2^32 + 4": model(field(1, MARKER + b"\x18\x84\x80\x80\x80\x10")),
    "2 million fields": model(b"\x38\0" * 2_000_000),
    "a group": model(b"\x0b\x0c"),
}


@pytest.mark.parametrize("data", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizer_model(tmp_path: Path, data: bytes) -> None:
    folder = write_hf(tmp_path / "x", CONFIG, WEIGHTS)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["tokenizer.model"] = data
    assert check(read_folder, tmp_path / "x", files) == "refused"


def test_a_marker_of_another_kind_is_no_text() -> None:
    """What the readers of the two test cases above would have let through."""
    plain = control_pieces_as_control(model(field(1, MARKER + USER_DEFINED)))
    loaded = sentencepiece.SentencePieceProcessor(model_proto=plain)
    marker = loaded.piece_to_id("<start_of_turn>")
    assert loaded.is_control(marker)
    assert marker not in loaded.encode("<start_of_turn>")


PATTERNS = ["(a+)+$", "(.*)*x", "(a|a)" * 30, "(?:x+x+)+y", ".*" * 30 + "x", "x" * 400, "(a)\\2{9}"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_adapter_patterns(tmp_path: Path, key: str, pattern: str) -> None:
    files = whole_adapter() | {"adapter_config.json": adapter_config(**{key: {pattern: 4}})}
    assert check(read_adapter, tmp_path / "x", files) == "refused"


def adapter_config(**changes: object) -> bytes:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    return json.dumps(config | {"init_lora_weights": True} | changes).encode()


def whole_adapter() -> dict[str, bytes]:
    module = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    a, b = ("F16", (4, 64), bytes(512)), ("F16", (96, 4), bytes(768))
    data = safetensors_bytes({f"{module}A.weight": a, f"{module}B.weight": b})
    return {"adapter_config.json": adapter_config(), "adapter_model.safetensors": data}


@pytest.mark.parametrize(
    "pattern", ["up_proj", "^model.layers.1.mlp.up_proj", r".*\.1\.mlp\.up_proj$", "[a-z]+_proj|x"]
)
def test_ordinary_adapter_patterns(tmp_path: Path, pattern: str) -> None:
    config = adapter_config(rank_pattern={pattern: 4, "x": 7}, r=9)
    files = whole_adapter() | {"adapter_config.json": config}
    assert check(read_adapter, tmp_path / "x", files) == "read"


RECIPES = {
    "a number of 5000 digits": "x = " + "9" * 5000,
    "a hexadecimal number": "[formats]\nx = 0x" + "f" * 5000,
    "nested": "x = " + "[" * 50_000,
    "dotted": "a." * 40_000 + "b = 1",
    "100 kB and more": "#" * 100_001,
    "a pattern of 90 kB": '[formats]\n"' + "x" * 90_000 + '" = "int9"',
    "a pattern of escapes": '[formats]\n"\\u001b[2J\\u202e" = "int9"',
    "NUL": "\0",
    "no UTF-8": "\udcff",
}


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES)
def test_recipes(tmp_path: Path, text: str) -> None:
    files = {"mine.toml": text.encode(errors="surrogateescape")}
    assert check(read_recipe, tmp_path / "x", files) == "refused"


MODELS = {
    "lists": '{"__metadata__":{"format":"gemma-cli"},"x":[' + "[]," * 1_000_000 + "[]]}",
    "a long version": json.dumps({"__metadata__": {"format": "gemma-cli", "version": "x" * 10**6}}),
    "a nested version": '{"__metadata__":{"format":"gemma-cli","version":' + DEEP + "}}",
    "a long chat": json.dumps(
        {"__metadata__": {"format": "gemma-cli", "version": "3", "chat": "x" * 10**6}}
    ),
    "a long field": json.dumps(
        {"__metadata__": {"format": "gemma-cli", "version": "3", "x" * 10**6: ""}}
    ),
    "26 MB": json.dumps({"__metadata__": {"format": "gemma-cli"}}) + " " * 26_000_000,
}


@pytest.mark.parametrize("text", MODELS.values(), ids=MODELS)
def test_model_files(tmp_path: Path, text: str) -> None:
    data = len(text).to_bytes(8, "little") + text.encode()
    assert check(read_model, tmp_path / "x", {"a.gemma": data}) == "refused"


# Nothing is read past the end of a file, and nothing written then


DELTAS = (-(2**63), -4096, -34, -32, -18, -2, -1, 1, 2, 18, 32, 34, 4096, 2**63)


def test_gguf_offsets_and_sizes(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", CONFIG, WEIGHTS, "Q8_0")
    data = path.read_bytes()
    reader = GGUFReader(path)
    start = reader.data.ctypes.data
    # Of each tensor the offset, which is stated last, and the two or three numbers of its shape.
    places = [
        int(numbers.ctypes.data) - start + 8 * i
        for t in reader.tensors
        for numbers in (t.field.parts[-1], t.field.parts[3])
        for i in range(len(numbers))
    ]
    assert len(places) == sum(1 + values.ndim for values in WEIGHTS.values())
    output = tmp_path / "models" / "a.safetensors"
    for place in places:
        offset = struct.unpack_from("<Q", data, place)[0]
        for delta in DELTAS:
            changed = bytearray(data)
            struct.pack_into("<Q", changed, place, (offset + delta) % 2**64)
            path.write_bytes(changed)
            with pytest.raises(GemmaError, match=str(path)):
                quantize(open_checkpoint(path), output, bits=8)
    assert not output.parent.exists()


def test_safetensors_offsets_and_sizes(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "x", CONFIG, WEIGHTS)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    output = tmp_path / "models" / "a.safetensors"
    for name in list(header)[1:]:
        for delta in DELTAS:
            for moved in ((1, 0), (0, 1), (1, 1), "shape"):
                changed = header | {name: dict(header[name])}
                if moved == "shape":
                    first, *others = header[name]["shape"]
                    changed[name]["shape"] = [first + delta, *others]
                else:
                    at = header[name]["data_offsets"]
                    changed[name]["data_offsets"] = [at[i] + moved[i] * delta for i in range(2)]
                text = json.dumps(changed).encode()
                path.write_bytes(len(text).to_bytes(8, "little") + text + tensors)
                with pytest.raises(GemmaError, match=str(path)):
                    quantize(open_checkpoint(folder), output, bits=8)
    assert not output.parent.exists()


def test_ckpt_offsets_and_sizes(tmp_path: Path) -> None:
    tensors = torch_files.gemma_pytorch_tensors(CONFIG, WEIGHTS)
    path = torch_files.write_ckpt(tmp_path / "x", CONFIG, tensors)
    output = tmp_path / "models" / "a.safetensors"
    for name, t in tensors.items():
        n_items, (first, *others) = int(np.prod(t.shape)), t.shape
        for delta in (-1, 1, 32, 2**63):
            for changed in (
                replace(t, offset=delta),
                replace(t, n_items=n_items + delta),
                replace(t, shape=(first + delta, *others)),
            ):
                path.write_bytes(torch_files.saved(tensors | {name: changed}))
                with pytest.raises(GemmaError, match=str(path)):
                    quantize(open_checkpoint(path), output, bits=8)
    assert not output.parent.exists()


def test_values_are_shown_short_and_on_one_line() -> None:
    loop: list[object] = []
    loop.append(loop)
    for worst in (
        "x" * 10**6,
        b"x" * 10**6,
        "\x1b\n\u202e\ud800",
        [[[[[1]]]]],
        loop,
        16**5000,
        {1: 2},
        "\u3164\u00ad\u200b",
    ):
        assert len(shown(worst)) <= 200
        assert shown(worst).isprintable()
    assert shown("gemma") == "'gemma'"
