"""Hugging Face folders: what is read from them, and that nothing damaged gets through."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from checkpoints import (
    Json,
    encode,
    hf_config,
    hf_tensors,
    random_weights,
    safetensors_bytes,
    tiny,
    write_hf,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.checkpoint.safetensors import read_safetensors
from quantize.errors import GemmaError

GEMMA3 = tiny("gemma3")
WEIGHTS = random_weights(GEMMA3)


def assert_holds(checkpoint: Checkpoint, weights: dict[str, np.ndarray]) -> None:
    assert list(checkpoint.tensors) == list(weights)
    for name, expected in weights.items():
        tensor = checkpoint.tensors[name]
        read = tensor.values() if expected.ndim == 1 else tensor.rows(0, len(expected))
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, expected, err_msg=name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "gemma", GEMMA3, WEIGHTS)


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("generation", ["gemma", "gemma2", "gemma3"])
def test_every_generation_and_type(tmp_path: Path, generation: str, dtype: str) -> None:
    config = tiny(generation)
    weights = random_weights(config)
    checkpoint = open_checkpoint(write_hf(tmp_path, config, weights, dtype))
    assert checkpoint.config == config
    assert_holds(checkpoint, weights)
    embed = checkpoint.tensors["embed"]
    assert (embed.dtype, embed.nbytes) == (dtype, 272 * 64 * (4 if dtype == "F32" else 2))
    assert embed.grid(0, 16) is None
    np.testing.assert_array_equal(embed.rows(5, 9), weights["embed"][5:9])


def test_every_bfloat16_is_widened_exactly(folder: Path) -> None:
    bits = np.arange(2**16)
    change(folder / "config.json", vocab_size=1024)
    tensors = hf_tensors(GEMMA3, WEIGHTS)
    tensors["model.embed_tokens.weight"] = ("BF16", (1024, 64), bits.astype("<u2").tobytes())
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    read = open_checkpoint(folder).tensors["embed"].rows(0, 1024).ravel()
    # By the definition of the format: a sign, 8 bits of exponent, 7 of fraction.
    exponent, fraction = bits >> 7 & 255, bits & 127
    expected = np.where(
        exponent == 0, np.ldexp(fraction / 128, -126), np.ldexp(1 + fraction / 128, exponent - 127)
    )
    expected[exponent == 255] = np.where(fraction[exponent == 255] == 0, np.inf, np.nan)
    np.testing.assert_array_equal(read, np.where(bits >> 15, -expected, expected))


def test_shards(folder: Path) -> None:
    tensors = list(hf_tensors(GEMMA3, WEIGHTS).items())
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {}
    for shard, part in zip(names, (tensors[:9], tensors[9:]), strict=True):
        (folder / shard).write_bytes(safetensors_bytes(dict(part)))
        weight_map |= {name: shard for name, _ in part}
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_holds(open_checkpoint(folder), WEIGHTS)
    assert_holds(open_checkpoint(folder / names[0]), WEIGHTS)

    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": names[0]}}))
    with pytest.raises(GemmaError, match=r"00001-of-00002.*model\.norm\.weight"):
        open_checkpoint(folder)
    (folder / names[1]).unlink()
    with pytest.raises(GemmaError, match=r"00002-of-00002.*does not exist"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "model.safetensors\0",
        "model\0.safetensors",
        "..",
        "",
        "config.json",
        "\x1b[2Jmodel.safetensors",
        7,
        None,
    ],
)
def test_shard_names_lead_nowhere_else(folder: Path, shard: object) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(GemmaError, match="plain name") as caught:
        open_checkpoint(folder)
    assert "\x1b" not in str(caught.value)


def test_one_file_of_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert_holds(open_checkpoint(folder / "other.safetensors"), WEIGHTS)
    with pytest.raises(GemmaError, match=r"no model\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", ""])
def test_text_model_of_a_multimodal_checkpoint(folder: Path, prefix: str) -> None:
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "gemma3",
                "text_config": hf_config(GEMMA3),
                "vision_config": {"model_type": "siglip_vision_model"},
            }
        )
    )
    pixels = {
        name: ("I64", (1,), bytes(8))
        for name in (
            "vision_tower.vision_model.post_layernorm.bias",
            "model.vision_tower.vision_model.x",
            "multi_modal_projector.mm_soft_emb_norm.weight",
            "model.multi_modal_projector.mm_input_projection_weight",
        )
    }
    tensors = pixels | hf_tensors(GEMMA3, WEIGHTS, prefix=prefix)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    checkpoint = open_checkpoint(folder)
    assert_holds(checkpoint, WEIGHTS)
    assert len(checkpoint.notes) == 1
    assert "images are not read" in checkpoint.notes[0]


def test_a_text_checkpoint_has_no_notes(folder: Path) -> None:
    assert open_checkpoint(folder).notes == ()


def add(folder: Path, name: str, tensor: tuple[str, tuple[int, ...], bytes]) -> None:
    tensors = hf_tensors(GEMMA3, WEIGHTS) | {name: tensor}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_output_head_that_repeats_the_embedding_is_ignored(
    folder: Path, dtype: str, name: str
) -> None:
    head = WEIGHTS["embed"]
    add(folder, name, (dtype, head.shape, encode(head, dtype)))
    assert_holds(open_checkpoint(folder), WEIGHTS)
    other = np.where(np.arange(272)[:, None] == 271, 0.5, head).astype(np.float32)
    add(folder, name, (dtype, head.shape, encode(other, dtype)))
    with pytest.raises(GemmaError, match=f"{name}.*differs"):
        open_checkpoint(folder)


def test_output_head_of_its_own(folder: Path) -> None:
    head = WEIGHTS["embed"].copy()
    head[-1, -1] += 1
    add(folder, "lm_head.weight", ("BF16", head.shape, encode(head, "BF16")))
    with pytest.raises(GemmaError, match=r"lm_head\.weight.*differs"):
        open_checkpoint(folder)
    add(folder, "lm_head.weight", ("BF16", (271, 64), encode(head[1:], "BF16")))
    with pytest.raises(GemmaError, match=r"lm_head\.weight.*differs"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.00.mlp.up_proj.weight",
        "model.layers.0.mlp.experts.weight",
        "score.weight",
        "model.embed_tokens.weight\n",
        "",
    ],
)
def test_tensor_that_gemma_does_not_have(folder: Path, name: str) -> None:
    add(folder, name, ("BF16", (1,), bytes(2)))
    with pytest.raises(GemmaError) as caught:
        open_checkpoint(folder)
    assert repr(name) in str(caught.value)


def test_tensor_given_twice(folder: Path) -> None:
    add(folder, "language_model.model.norm.weight", ("BF16", (64,), bytes(128)))
    with pytest.raises(GemmaError, match=r"both 'model\.norm\.weight' and 'language_model"):
        open_checkpoint(folder)


def test_stored_rope_tables_are_ignored(folder: Path) -> None:
    add(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", ("F32", (1,), bytes(4)))
    assert_holds(open_checkpoint(folder), WEIGHTS)


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_missing_tensor(folder: Path, name: str) -> None:
    rest = {key: values for key, values in WEIGHTS.items() if key != name}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(hf_tensors(GEMMA3, rest)))
    with pytest.raises(GemmaError, match=f"lacks the tensor '{name}'"):
        open_checkpoint(folder)


def test_tensor_of_another_shape_or_type(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for tensor in (("BF16", (64, 96), bytes(2 * 64 * 96)), ("I8", (96, 64), bytes(64 * 96))):
        add(folder, name, tensor)
        with pytest.raises(GemmaError, match=name):
            open_checkpoint(folder)


def test_vocabulary_is_needed_and_must_fit(folder: Path) -> None:
    tokenizer = folder / "tokenizer.model"
    change(folder / "config.json", vocab_size=256)
    weights = dict(WEIGHTS, embed=WEIGHTS["embed"][:256])
    (folder / "model.safetensors").write_bytes(safetensors_bytes(hf_tensors(GEMMA3, weights)))
    with pytest.raises(GemmaError, match="264 pieces"):
        open_checkpoint(folder)
    tokenizer.write_bytes(b"\x0a\xff\xff")
    with pytest.raises(GemmaError, match=r"tokenizer\.model"):
        open_checkpoint(folder)
    tokenizer.unlink()
    with pytest.raises(GemmaError, match=r"tokenizer\.model"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "text", "chat"),
    [
        ("tokenizer_config.json", '{"chat_template": "{{ 1 / 0 }}"}', "gemma"),
        ("tokenizer_config.json", '{"chat_template": null}', "base"),
        ("tokenizer_config.json", "{}", "base"),
        ("chat_template.jinja", "{{ 1 / 0 }}", "gemma"),
        ("chat_template.json", '{"chat_template": "{{ 1 / 0 }}"}', "gemma"),
    ],
)
def test_chat_if_there_is_a_template(folder: Path, file: str, text: str, chat: str) -> None:
    assert open_checkpoint(folder).chat == "base"
    (folder / file).write_text(text)
    assert open_checkpoint(folder).chat == chat


def test_sampling_defaults(folder: Path) -> None:
    assert open_checkpoint(folder).sampling == {}
    path = folder / "generation_config.json"
    path.write_text('{"top_k": 64, "top_p": 0.95, "temperature": null, "do_sample": true}')
    assert open_checkpoint(folder).sampling == {"top_k": 64.0, "top_p": 0.95}
    for wrong in ('{"top_p": 1.5}', '{"temperature": "hot"}', '{"top_k": -1}'):
        path.write_text(wrong)
        with pytest.raises(GemmaError, match=r"generation_config\.json"):
            open_checkpoint(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a":1,"a":1}'])
def test_broken_json(folder: Path, file: str, data: bytes) -> None:
    (folder / file).write_bytes(data)
    with pytest.raises(GemmaError, match=file):
        open_checkpoint(folder)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(GemmaError, match="absent"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(GemmaError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(GemmaError, match=r"text\.txt"):
        open_checkpoint(tmp_path / "text.txt")
    with pytest.raises(GemmaError):
        open_checkpoint(tmp_path / ("long" * 1000))
    with pytest.raises(GemmaError):
        open_checkpoint(tmp_path / "nul\0")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_does_not_block(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(GemmaError, match=r"model\.safetensors"):
        open_checkpoint(folder / "model.safetensors")


# The safetensors format itself

TWO: Json = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]},
}


def file_of(header: object, buffer: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + buffer


def entry(**changes: object) -> Json:
    return TWO | {"b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]} | changes}


WHOLE = file_of(TWO)
HEADER_END = len(WHOLE) - 16
MALFORMED = {
    "header longer than the file": (2**63).to_bytes(8, "little") + WHOLE[8:],
    "header a byte too long": (len(WHOLE) - 7).to_bytes(8, "little") + WHOLE[8:],
    "empty header": file_of(b""),
    "no object": file_of([TWO]),
    "space before the header": file_of(b" " + json.dumps(TWO).encode()),
    "not UTF-8": file_of(json.dumps(TWO).encode().replace(b"a", b"\xff", 1)),
    "UTF-16": file_of(json.dumps(TWO).encode("utf-16-le")),
    "deep": file_of(b'{"a":' * 100_000),
    "long number": file_of(b'{"a":' + b"9" * 5000 + b"}"),
    "duplicate tensor": file_of(json.dumps(TWO).encode().replace(b'"b"', b'"a"')),
    "duplicate field": file_of(json.dumps(TWO).encode().replace(b'"shape"', b'"dtype"')),
    "entry no object": file_of(TWO | {"b": 1}),
    "entry without a type": file_of(TWO | {"b": {"shape": [4], "data_offsets": [8, 16]}}),
    "three offsets": file_of(entry(data_offsets=[8, 12, 16])),
    "offsets no numbers": file_of(entry(data_offsets=["8", "16"])),
    "offsets truth values": file_of(entry(data_offsets=[False, True])),
    "offsets fractional": file_of(entry(data_offsets=[8.0, 16.0])),
    "negative offset": file_of(entry(data_offsets=[-8, 16])),
    "reversed": file_of(entry(data_offsets=[16, 8])),
    "past the end": file_of(entry(data_offsets=[8, 18], shape=[5])),
    "2^63": file_of(entry(data_offsets=[8, 2**63])),
    "2^64 wraps": file_of(entry(data_offsets=[8, 2**64 + 16])),
    "overlap": file_of(entry(data_offsets=[4, 12]), bytes(12)),
    "hole": file_of(entry(data_offsets=[10, 18]), bytes(18)),
    "hole at the start": file_of({"b": TWO["b"]}),
    "hole at the end": file_of(TWO, bytes(18)),
    "the same bytes twice": file_of(TWO | {"c": TWO["b"]}),
    "shape too small": file_of(entry(shape=[3])),
    "shape too large": file_of(entry(shape=[5])),
    "negative shape": file_of(entry(shape=[-2, -2])),
    "fractional shape": file_of(entry(shape=[2.0, 2])),
    "shape overflows": file_of(entry(shape=[2**62, 2**62, 4])),
    "many dimensions": file_of(entry(shape=[1] * 100 + [4])),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_safetensors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(GemmaError, match=r"x\.safetensors"):
        read_safetensors(path)


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE)
    assert list(read_safetensors(path)) == ["a", "b"]
    for size in range(len(WHOLE)):
        path.write_bytes(WHOLE[:size])
        with pytest.raises(GemmaError):
            read_safetensors(path)
    path.write_bytes(WHOLE + b"\0")
    with pytest.raises(GemmaError):
        read_safetensors(path)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, HEADER_END - 1), st.integers(0, 255))
def test_changed_header_byte_is_read_or_refused(tmp_path: Path, at: int, byte: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])
    try:
        tensors = read_safetensors(path)
    except GemmaError:
        return
    assert sum(tensor.data.size for tensor in tensors.values()) == 16
