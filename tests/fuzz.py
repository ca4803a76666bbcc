"""Files of every format that is read, mutated by their structure: `make fuzz SECONDS=600`.

A seed is taken apart into what its format is made of: counts, lengths, names and offsets of GGUF,
the JSON trees of safetensors, model files, snapshots, sessions and config.json, the opcodes of a
pickle, the fields of a SentencePiece model. Hypothesis changes some of these and puts the file
together again; then it may change bytes. Whatever comes of it must be read, or be refused by a
GemmaError that is one sentence with the file's name, within 2 s and 200 MB + 1.5 times the file.

    python tests/fuzz.py [--seconds N | --examples N] [--target NAME] [--seed N]
"""

import argparse
import contextlib
import copy
import faulthandler
import hashlib
import json
import pickletools
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import torch_files
from checkpoints import (
    Json,
    encode,
    gguf_metadata,
    hf_config,
    hf_tensors,
    random_weights,
    safetensors_bytes,
    tiny,
    write_gguf,
    write_hf,
)
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_arrays
from test_sentencepiece_model import hugging_face

from gemma_cli import snapshot
from gemma_cli.runtime.kv_cache import KVCache
from gemma_cli.session import Session, as_markdown, as_messages
from gemma_cli.text.chat import turn_ids
from gemma_cli.text.tokenizer import Tokenizer
from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.checkpoint.adapter import merge_adapter
from quantize.errors import GemmaError
from quantize.modelfile import ModelFile
from quantize.pipeline import plan, quantize
from quantize.recipe import choose, rules_of

Files = dict[str, bytes]
Draw = Callable[[st.SearchStrategy[Any]], Any]

SECONDS = 2.0
MEMORY = 200_000_000
LONGEST = 1000  # of a sentence, in characters
CONFIG = tiny("gemma3")
WEIGHTS = random_weights(CONFIG)

POWERS = [2**n + by for n in (0, 5, 7, 8, 15, 16, 31, 32, 53, 62, 63, 64) for by in (-1, 0, 1)]
COUNTS = st.sampled_from([0, *POWERS]) | st.integers(0, 300)
NUMBERS = COUNTS | COUNTS.map(lambda n: -n) | st.integers(-(2**70), 2**70)
TEXTS = (
    st.text(max_size=8)
    | st.sampled_from(
        ["", "../x", "/x", "\0", "\x1b[2J", "\u202e", "\ud800", "x" * 100_000, "(a+)+$"]
    )
    | st.sampled_from(["model.safetensors", "BF16", "F32", "I8", "gemma2", "layers.0.attn_q"])
)
SCALARS = st.none() | st.booleans() | NUMBERS | st.floats() | TEXTS
NESTED = "<nested>"  # Nothing here could walk a tree of such depth.
VALUES = SCALARS | st.recursive(
    SCALARS | st.just(NESTED),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


# Mutations


class Number(NamedTuple):
    """An unsigned integer of a binary format."""

    value: int
    width: int

    def __bytes__(self) -> bytes:
        return (self.value % 256**self.width).to_bytes(self.width, "little")


def mutated_chunks(
    draw: Draw, chunks: list[bytes | Number], inserted: st.SearchStrategy[bytes]
) -> bytes:
    """Chunks of a file, some of them changed, as bytes."""
    chunks = list(chunks)
    for _ in range(draw(st.integers(1, 4))):
        if not chunks:
            break
        at, other = (draw(st.integers(0, len(chunks) - 1)) for _ in range(2))
        match draw(st.sampled_from(["change"] * 4 + ["drop", "double", "swap", "insert"])):
            case "change" if isinstance(chunk := chunks[at], Number):
                near = st.sampled_from([-64, -32, -1, 1, 32, 64]).map(lambda n: chunk.value + n)
                chunks[at] = Number(draw(near | COUNTS), chunk.width)
            case "change":
                chunks[at] = mutated_bytes(draw, bytes(chunks[at]))
            case "drop":
                del chunks[at]
            case "double":
                chunks.insert(at, chunks[other])
            case "swap":
                chunks[at], chunks[other] = chunks[other], chunks[at]
            case "insert":
                chunks.insert(at, draw(inserted))
    return b"".join(map(bytes, chunks))


def mutated_bytes(draw: Draw, data: bytes) -> bytes:
    """Some bytes changed, near the start or the end at least as often as elsewhere."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        size = len(out)
        start = draw(st.integers(0, min(size, 200)) | st.integers(0, size))
        at = start if draw(st.booleans()) else size - start
        n = draw(st.integers(1, 16))
        match draw(st.sampled_from(["set", "flip", "cut", "drop", "insert", "copy"])):
            case "set":
                out[at : at + n] = draw(st.binary(min_size=n, max_size=n))
            case "flip" if at < size:
                out[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del out[at:]
            case "drop":
                del out[at : at + n]
            case "insert":
                out[at:at] = draw(st.binary(max_size=16)) * draw(st.sampled_from([1, 1, 1000]))
            case "copy":
                out[at : at + n] = out[start : start + n]
    return bytes(out)


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON tree: a container and a key or an index of it."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in list(keys):
        yield tree, key
        yield from nodes(tree[key])


def mutated_tree(draw: Draw, tree: Any) -> Any:
    """A JSON tree with some values changed, dropped, renamed or swapped."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = list(nodes(tree))
        if not places:
            return tree
        (holder, key), (other, other_key) = (draw(st.sampled_from(places)) for _ in range(2))
        old = holder[key]
        match draw(st.sampled_from(["change"] * 4 + ["drop", "rename", "swap"])):
            case "change" if type(old) is int:
                near = st.sampled_from([-64, -1, 1, 64]).map(lambda n: old + n)  # noqa: B023
                holder[key] = draw(near | VALUES)
            case "change":
                holder[key] = draw(VALUES)
            case "drop":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[draw(TEXTS)] = holder.pop(key)
            case "swap":
                holder[key] = copy.deepcopy(other[other_key])
    return tree


def dumped(draw: Draw, tree: Any) -> bytes:
    """A tree as JSON, now and then with a key twice."""
    text = json.dumps(tree, separators=(",", ":")).replace(f'"{NESTED}"', "[" * 900 + "]" * 900)
    if draw(st.integers(0, 9)) == 0 and text.startswith("{") and "," in text:
        text = "{" + text[1 : text.index(",") + 1] + text[1:]
    return text.encode()


def sometimes(draw: Draw, data: bytes) -> bytes:
    return mutated_bytes(draw, data) if draw(st.integers(0, 4)) == 0 else data


# Seeds, and what is made of them


def folder_files(write: Callable[[Path], object]) -> Files:
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        return {p.name: p.read_bytes() for p in Path(name).rglob("*") if p.is_file()}


@cache
def hf_files() -> Files:
    return folder_files(lambda folder: write_hf(folder, CONFIG, WEIGHTS))


def header_and_data(data: bytes) -> tuple[Json, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@st.composite
def safetensors(draw: Draw) -> Files:
    header, data = header_and_data(hf_files()["model.safetensors"])
    text = dumped(draw, mutated_tree(draw, header))
    length = Number(draw(st.just(len(text)) | st.just(len(text)) | COUNTS), 8)
    return hf_files() | {"model.safetensors": sometimes(draw, bytes(length) + text + data)}


@st.composite
def shards(draw: Draw) -> Files:
    files = dict(hf_files())
    tensors = list(hf_tensors(CONFIG, WEIGHTS).items())
    del files["model.safetensors"]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = (dict(tensors[:9]), dict(tensors[9:]))
    files |= {name: safetensors_bytes(part) for name, part in zip(names, parts, strict=True)}
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = mutated_tree(draw, {"metadata": {}, "weight_map": weight_map})
    return files | {"model.safetensors.index.json": sometimes(draw, dumped(draw, index))}


SMALL_FILES: dict[str, Json] = {
    "config.json": hf_config(CONFIG)
    | {"rope_scaling": {"rope_type": "linear", "factor": 1.0}, "layer_types": None},
    "generation_config.json": {"temperature": 0.7, "top_k": 64, "top_p": 0.95},
    "tokenizer_config.json": {"chat_template": "{{ 1 }}", "added_tokens_decoder": {"0": {}}},
}


@st.composite
def small_json(draw: Draw) -> Files:
    name = draw(st.sampled_from(list(SMALL_FILES)))
    text = dumped(draw, mutated_tree(draw, SMALL_FILES[name]))
    return hf_files() | {name: sometimes(draw, text)}


@st.composite
def tokenizer_model(draw: Draw) -> Files:
    def fields(data: bytes) -> Iterator[bytes]:
        at = 0
        while at < len(data):
            end = at + 2 + data[at + 1]  # all are short here
            yield data[at:end]
            at = end

    chunks: list[bytes | Number] = list(fields(hf_files()["tokenizer.model"]))
    # Mostly markers and what follows the pieces.
    chunks = [*chunks[:6], b"".join(map(bytes, chunks[6:-5])), *chunks[-5:]]
    field = st.builds(
        lambda key, data: bytes((key, len(data))) + data,
        st.integers(0, 127),
        st.binary(max_size=20),
    )
    return hf_files() | {"tokenizer.model": mutated_chunks(draw, chunks, field)}


TOKENIZER = hugging_face()


@st.composite
def tokenizer_json(draw: Draw) -> Files:
    files = dict(hf_files())
    del files["tokenizer.model"]
    # The small parts as often as those of hundreds of pieces.
    part = draw(st.sampled_from(["", *TOKENIZER, *TOKENIZER["model"]]))
    tree = TOKENIZER | {"model": dict(TOKENIZER["model"])}
    holder = tree["model"] if part in tree["model"] else tree
    if part:
        holder[part] = mutated_tree(draw, [holder[part]])
        holder[part] = (holder[part] or [None])[0]
    else:
        tree = mutated_tree(draw, tree)
    config = json.dumps(hf_config(CONFIG) | {"vocab_size": 1024}).encode()
    embedding = encode(np.zeros((1024, 64), np.float32), "BF16")
    tensors = hf_tensors(CONFIG, WEIGHTS)
    tensors["model.embed_tokens.weight"] = ("BF16", (1024, 64), embedding)
    return files | {
        "tokenizer.json": sometimes(draw, dumped(draw, tree)),
        "config.json": config,
        "model.safetensors": safetensors_bytes(tensors),
    }


@cache
def gguf_chunks() -> list[bytes | Number]:
    """A GGUF file's parts, the vocabulary's strings of the middle in one."""
    files = folder_files(lambda folder: write_gguf(folder / "x.gguf", CONFIG, WEIGHTS, "Q4_0"))
    data = files["x.gguf"]
    chunks: list[bytes | Number] = []
    at = 0

    def raw(size: int) -> None:
        nonlocal at
        chunks.append(data[at : at + size])
        at += size

    def number(width: int) -> int:
        nonlocal at
        value = int.from_bytes(data[at : at + width], "little")
        chunks.append(Number(value, width))
        at += width
        return value

    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def values(kind: int, count: int) -> None:
        if kind != 8 and count == 1:
            number(sizes[kind])
        elif kind != 8:
            raw(sizes[kind] * count)
        for _ in range(count if kind == 8 else 0):
            raw(number(8))

    raw(4)
    number(4)
    n_tensors, n_keys = number(8), number(8)
    for _ in range(n_keys):
        raw(number(8))
        kind = number(4)
        if kind == 9:
            kind, count = number(4), number(8)
            start = len(chunks)
            values(kind, count)
            if count > 20:
                chunks[start + 8 : -8] = [b"".join(map(bytes, chunks[start + 8 : -8]))]
        else:
            values(kind, 1)
    for _ in range(n_tensors):
        raw(number(8))
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    chunks.append(data[at:])
    return chunks


def gguf_value(key: str, kind: int, data: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + data


@st.composite
def gguf(draw: Draw) -> Files:
    keys = st.sampled_from([*gguf_metadata(CONFIG), "general.alignment", "split.count", "x"])
    value = st.builds(gguf_value, keys, st.integers(0, 13), st.binary(max_size=24))
    return {"x.gguf": sometimes(draw, mutated_chunks(draw, gguf_chunks(), value))}


OPCODES = st.sampled_from(
    [
        *(bytes((op.code.encode("latin-1")[0],)) for op in pickletools.opcodes if not op.arg),
        *(torch_files.literal(value) for value in (0, -1, 2**62, "0", "x", (1, 2), (2**63, 1))),
        *(b"q\0", b"h\0", b"h\1", b"j\xff\xff\xff\xff", b"\x94", b"\x85" * 200_000, b"]" * 200_000),
        *(torch_files.global_(name) for name in ("os.system", "torch.FloatStorage", "torch.load")),
        torch_files.global_("torch._utils._rebuild_tensor_v2"),
        *(b"cos\nsystem\n", b"X\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"I1\n", b"(q\0" * 50),
    ]
)


@st.composite
def torch(draw: Draw) -> Files:
    tensors = torch_files.gemma_pytorch_tensors(CONFIG, WEIGHTS)
    program = torch_files.dictionary({"model_state_dict": torch_files.state_dict(tensors)})
    places = [at for _, _, at in pickletools.genops(program + b".")]
    chunks: list[bytes | Number] = [
        program[a:b] for a, b in zip(places, [*places[1:], None], strict=True)
    ]
    if draw(st.booleans()):
        program = mutated_chunks(draw, chunks, OPCODES)
    storages = {str(key): t.data for key, t in enumerate(tensors.values())}
    data = torch_files.archive(program, storages)
    if draw(st.booleans()):
        data = mutated_bytes(draw, data)
    config = torch_files.kaggle_config(CONFIG)
    text = dumped(draw, config if draw(st.booleans()) else mutated_tree(draw, config))
    if draw(st.booleans()) and b"[[[" not in text:
        text = repr(json.loads(text)).encode(errors="surrogatepass")
    return {
        "gemma-2b-it.ckpt": data,
        "config.json": sometimes(draw, text),
        "tokenizer.model": hf_files()["tokenizer.model"],
    }


@cache
def model_file() -> bytes:
    def write(folder: Path) -> None:
        source = write_hf(folder / "source", CONFIG, WEIGHTS)
        quantize(open_checkpoint(source), folder / "a.gemma", bits=4, method="rtn")

    return folder_files(write)["a.gemma"]


@st.composite
def models(draw: Draw) -> Files:
    header, data = header_and_data(model_file())
    texts: Any = header["__metadata__"]
    inner = ("config", "matrices", "sha256", "sampling")
    header["__metadata__"] = texts | {key: json.loads(texts[key]) for key in inner}
    header = mutated_tree(draw, header)
    texts = header.get("__metadata__") if isinstance(header, dict) else None
    if isinstance(texts, dict):
        for key in texts.keys() & set(inner):
            texts[key] = json.dumps(texts[key])
        if draw(st.integers(0, 4)):
            texts["header_sha256"] = "0" * 64
    text = dumped(draw, header)
    text += b" " * (-(8 + len(text)) % 64)
    digest = hashlib.sha256(text).hexdigest().encode()
    text = text.replace(b'"header_sha256":"' + b"0" * 64, b'"header_sha256":"' + digest)
    return {"a.gemma": sometimes(draw, len(text).to_bytes(8, "little") + text + data)}


ADAPTER: Json = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "use_rslora": False,
    "bias": "none",
    "init_lora_weights": True,
    "rank_pattern": {"up_proj": 4},
    "alpha_pattern": {"^model.layers.1.mlp.up_proj": 8},
}


@st.composite
def adapters(draw: Draw) -> Files:
    module = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    tensors = {
        f"{module}A.weight": ("F16", (4, 64), bytes(2 * 4 * 64)),
        f"{module}B.weight": ("F16", (96, 4), bytes(2 * 96 * 4)),
    }
    data = safetensors_bytes(tensors)
    config = json.dumps(ADAPTER).encode()
    if draw(st.booleans()):
        config = sometimes(draw, dumped(draw, mutated_tree(draw, ADAPTER)))
    else:
        header, rest = header_and_data(data)
        text = dumped(draw, mutated_tree(draw, header))
        data = sometimes(draw, len(text).to_bytes(8, "little") + text + rest)
    return {"adapter_config.json": config, "adapter_model.safetensors": data}


SAID: list[Json] = [
    {"gemma_cli": 1, "time": "2026-01-01T00:00:00+00:00"},
    {"model": "gemma", "tokenizer": "abc"},
    {"system": "be terse"},
    {"settings": {"temperature": 0.5, "top_k": 4, "stop": ["x"], "max_tokens": 5, "draft": True}},
    {"time": "", "role": "user", "text": "hello <end_of_turn>"},
    {"time": "", "role": "model", "text": "hi", "finish_reason": "stop", "ids": [5, 6]},
    {"leave": 1, "summary": "they met"},
    {"keep": 1},
]


@st.composite
def sessions(draw: Draw) -> Files:
    lines = [
        dumped(draw, line if draw(st.integers(0, 5)) else mutated_tree(draw, line))
        for line in mutated_list(draw, SAID)
    ]
    return {"a.jsonl": sometimes(draw, b"".join(line + b"\n" for line in lines))}


def mutated_list(draw: Draw, items: list[Any]) -> list[Any]:
    more = draw(st.lists(st.sampled_from(items), max_size=3))
    return [item for item in items if draw(st.integers(0, 9))] + more


@cache
def used() -> tuple[ModelFile, bytes]:
    """A model file and a snapshot of what a cache of it holds."""

    def write(folder: Path) -> None:
        state = empty_cache()
        state.length = 20
        assert snapshot.save(folder / "a.safetensors", file, state, range(20))

    path = Path(tempfile.mkdtemp(prefix="fuzz-model-")) / "a.gemma"
    path.write_bytes(model_file())
    file = ModelFile.open(path)
    return file, folder_files(write)["a.safetensors"]


def empty_cache() -> KVCache:
    return KVCache(CONFIG, 64, "f16", 32)


@st.composite
def snapshots(draw: Draw) -> Files:
    header, data = header_and_data(used()[1])

    def joined() -> bytes:
        text = dumped(draw, header)
        return len(text).to_bytes(8, "little") + text + data

    header = mutated_tree(draw, header)
    texts = header.get("__metadata__") if isinstance(header, dict) else None
    if isinstance(texts, dict) and draw(st.integers(0, 3)):
        with contextlib.suppress(Exception):  # sealed again, if the package reads it at all
            arrays = load_arrays(joined())
            texts["sha256"] = snapshot._digest(arrays)
    return {"a.safetensors": sometimes(draw, joined())}


LINES = st.sampled_from(
    [
        *('[formats]', '"embed" = "int8"', '"layers.*" = { format = "int4", group_size = 64 }'),
        *('"*" = "int4"', "x = 1", "[other]", "[[formats]]", 'a.b.c."d" = "int8"'),
        *("x = " + "9" * 5000, "x = 0x" + "f" * 5000, "x = 2024-13-45", 'x = """', "x = nan"),
        *("[" * 3000, "x = " + "[" * 3000, "x = " + "{a=" * 3000, "a." * 3000 + "b = 1"),
        *('"' + "*?" * 500 + '" = "int8"', '"[" = "int8"', '"\\u202e" = "int9"', "\0", "\r"),
    ]
)  # fmt: skip


@st.composite
def recipes(draw: Draw) -> Files:
    text = "\n".join(["[formats]", *draw(st.lists(LINES, max_size=5))]).encode()
    return {"mine.toml": sometimes(draw, text)}


# What reads them


def use(checkpoint: Checkpoint) -> None:
    """Reads at both ends of every tensor, and the vocabulary."""
    plan(checkpoint, 4)
    with np.errstate(all="ignore"):
        for tensor in checkpoint.tensors.values():
            if len(tensor.shape) == 1:
                assert tensor.values().shape == tensor.shape
                continue
            n = tensor.shape[0]
            for start, stop in ((0, min(3, n)), (n - 1, n)):
                assert tensor.rows(start, stop).shape == (stop - start, tensor.shape[1])
                tensor.grid(start, stop)
    sentencepiece.SentencePieceProcessor(model_proto=checkpoint.tokenizer_model).encode("ab <eos>")


def read_folder(folder: Path) -> None:
    use(open_checkpoint(folder))


def read_gguf(folder: Path) -> None:
    use(open_checkpoint(folder / "x.gguf"))


def read_model(folder: Path) -> None:
    file = ModelFile.open(folder / "a.gemma")
    file.damaged_tensors()
    for view in (*file.tiles.values(), *file.vectors.values()):
        assert view.nbytes == view.copy().nbytes


@cache
def base() -> Checkpoint:
    return open_checkpoint(write_hf(Path(tempfile.mkdtemp()) / "base", CONFIG, WEIGHTS))


def read_adapter(folder: Path) -> None:
    merged = merge_adapter(base(), folder)
    with np.errstate(all="ignore"):
        merged.tensors["layers.1.ffn_up"].rows(90, 96)


def read_recipe(folder: Path) -> None:
    rules = rules_of(str(folder / "mine.toml"), 4, 32)
    for name in WEIGHTS:
        choose(rules, name)


TOKENIZER_MODEL = hf_files()["tokenizer.model"]


def read_session(folder: Path) -> None:
    session = Session.open(folder / "a.jsonl", to_write=False)
    session.forget_ids_from(CONFIG.vocab_size)
    as_markdown(session)
    json.dumps(as_messages(session))
    _, turns = session.context
    tokenizer = Tokenizer(TOKENIZER_MODEL)
    parts = turn_ids(tokenizer, turns, None, "transcript") if turns else []
    for turn, ids in zip(turns, parts, strict=True):
        assert 0 <= min(ids, default=0) <= max(ids, default=0) < CONFIG.vocab_size
        if turn.role == "user":
            assert not any(map(tokenizer.is_control, ids[1:])), turn


def read_snapshot(folder: Path) -> None:
    state, path = empty_cache(), folder / "a.safetensors"
    ids = snapshot.restore(path, used()[0], state)
    assert state.length == len(ids)
    assert all(type(token) is int for token in ids)
    if not ids:
        raise GemmaError(f"{path} is ignored.")


class Target(NamedTuple):
    files: st.SearchStrategy[Files]
    read: Callable[[Path], None]


TARGETS: Mapping[str, Target] = {
    "safetensors": Target(safetensors(), read_folder),
    "shards": Target(shards(), read_folder),
    "json": Target(small_json(), read_folder),
    "tokenizer.model": Target(tokenizer_model(), read_folder),
    "tokenizer.json": Target(tokenizer_json(), read_folder),
    "gguf": Target(gguf(), read_gguf),
    "torch": Target(torch(), read_folder),
    "model": Target(models(), read_model),
    "adapter": Target(adapters(), read_adapter),
    "recipe": Target(recipes(), read_recipe),
    "session": Target(sessions(), read_session),
    "snapshot": Target(snapshots(), read_snapshot),
}


class Made(dict[str, bytes]):
    """Files that a traceback does not show: they are there to be looked at."""

    def __repr__(self) -> str:
        return f"<{', '.join(self)}>"


class TooSlowError(BaseException):
    """Not an Exception, so that nothing takes it for a damaged file."""


def _too_slow(*_: object) -> None:
    raise TooSlowError


@contextmanager
def limits(n_bytes: int) -> Iterator[None]:
    """So much CPU time, and so much memory more than is in use where the system can limit that."""
    memory = Path("/proc/self/statm")
    if memory.exists():
        import resource  # noqa: PLC0415

        in_use = int(memory.read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        # The mapped file is counted too.
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY + n_bytes * 3 // 2, hard))
    signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        if memory.exists():
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def check(read: Callable[[Path], None], folder: Path, files: Files) -> str:
    """Whether files are "read" or "refused"; raises AssertionError or whatever else happens."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    try:
        with limits(sum(map(len, files.values()))):
            read(folder)
    except GemmaError as error:
        sentence = str(error)
        assert str(folder) in sentence, sentence
        assert sentence.isprintable(), sentence
        assert sentence.endswith("."), sentence
        assert len(sentence) < LONGEST, sentence
        return "refused"
    return "read"


def fuzz(name: str, folder: Path, examples: int, number: int) -> Counter[str]:
    """Tries so many files of a target; what they are depends on the number only."""
    target, seen = TARGETS[name], Counter[str]()

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # the file is kept as it is
        suppress_health_check=list(HealthCheck),
    )
    @given(target.files.map(Made))
    def try_one(files: Files) -> None:
        seen[check(target.read, folder / name, files)] += 1

    try_one()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # A signal shows where it came; what hangs in compiled code ends so too.
    faulthandler.enable()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    print(f"The last file of each kind is in {folder}.", flush=True)
    base(), used(), gguf_chunks()
    seen = {name: Counter[str]() for name in TARGETS if arguments.target in (None, name)}
    failed = set[str]()
    end, number = time.monotonic() + arguments.seconds, arguments.seed
    while True:
        for name in seen:
            faulthandler.dump_traceback_later(60 + arguments.examples * SECONDS / 4, exit=True)
            try:
                seen[name] += fuzz(name, folder, arguments.examples, number)
            except (Exception, TooSlowError):
                print(f"{name}, --seed {number}: {folder / name} got through.", file=sys.stderr)
                traceback.print_exc()
                failed.add(name)
        total = sum((counts for counts in seen.values()), Counter[str]())
        print(f"seed {number}:", *(f"{n} {what}" for what, n in sorted(total.items())), flush=True)
        number += 1
        if failed or time.monotonic() >= end:
            break
    faulthandler.cancel_dump_traceback_later()
    for name, counts in seen.items():
        print(f"{name:16}", *(f"{n} {what}" for what, n in sorted(counts.items())), sep="  ")
    if not failed:
        shutil.rmtree(folder)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
