"""LoRA adapters: the oracle is what PEFT merged (make_adapters.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import encode, random_weights, safetensors_bytes, tiny, write_gguf, write_hf
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.checkpoint.adapter import merge_adapter
from quantize.checkpoint.names import from_hugging_face
from quantize.checkpoint.safetensors import read_safetensors
from quantize.errors import GemmaError
from quantize.modelfile import ModelFile
from quantize.pipeline import plan, quantize

GOLDEN = Path(__file__).parent / "golden"
WRITTEN = Path(__file__).parent / "written"
ADAPTERS = WRITTEN / "adapters"
MERGED = np.load(ADAPTERS / "merged.npz")
CONFIG = tiny("gemma3")
WEIGHTS = random_weights(CONFIG)
MATRIX = "layers.1.ffn_up"
MODULE = "model.layers.1.mlp.up_proj"


def assert_merged(checkpoint: Checkpoint, label: str) -> None:
    names = [name.removeprefix(f"{label}:") for name in MERGED if name.startswith(f"{label}:")]
    assert len(names) == {"plain": 21, "both": 6}[label]
    for name in names:
        ours = checkpoint.tensors[from_hugging_face(name, "gemma3") or ""]
        expected = MERGED[f"{label}:{name}"]
        # Both round a sum of at most 6 products and the weight, in orders of their own.
        tolerance = 8 * 2**-24 * np.abs(expected).max()
        np.testing.assert_allclose(ours.rows(0, len(expected)), expected, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(ours.rows(5, 9), ours.rows(0, len(expected))[5:9])


def test_what_peft_merges() -> None:
    base = open_checkpoint(GOLDEN / "gemma3-shards")
    one = merge_adapter(base, ADAPTERS / "plain")
    assert_merged(one, "plain")
    both = merge_adapter(one, ADAPTERS / "rslora")
    assert_merged(both, "both")
    assert both.name == "gemma3-shards + plain + rslora"
    for name, tensor in base.tensors.items():
        changed = name.split(".")[-1] in {"attn_q", "ffn_down"}
        assert (both.tensors[name] is one.tensors[name]) == (not changed)
        if name == "embed" or len(tensor.shape) == 1:
            assert both.tensors[name] is tensor


def write_adapter(
    folder: Path,
    modules: dict[str, tuple[tuple[int, int], tuple[int, int]]],
    **config: object,
) -> Path:
    """An adapter of random matrices, of the shapes of lora_A and lora_B for each module."""
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(7)
    tensors = {}
    for module, shapes in modules.items():
        for half, shape in zip("AB", shapes, strict=True):
            values = (noise.integers(-8, 8, shape) / 16).astype(np.float32)
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = (
                "F16",
                shape,
                encode(values, "F16"),
            )
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    stated = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder


RIGHT = {MODULE: ((4, 64), (96, 4))}


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_hf(tmp_path / "base", CONFIG, WEIGHTS))


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.1.mlp.up_proj",
        "model.language_model.layers.1.mlp.up_proj",  # transformers 5, multimodal
        "language_model.model.layers.1.mlp.up_proj",  # transformers 4, multimodal
    ],
)
def test_names_of_every_kind_of_base(base: Checkpoint, tmp_path: Path, module: str) -> None:
    folder = write_adapter(tmp_path / "lora", {module: RIGHT[MODULE]})
    merged = merge_adapter(base, folder)
    pair = read_safetensors(folder / "adapter_model.safetensors")
    a, b = (
        pair[f"base_model.model.{module}.lora_{half}.weight"].data.view(np.float16) for half in "AB"
    )
    # Multiples of 2^-9 below 16: exact in float32.
    change = 2 * (b.reshape(96, 4).astype(np.float64) @ a.reshape(4, 64).astype(np.float64))
    assert np.abs(change).max() > 0.5
    np.testing.assert_array_equal(merged.tensors[MATRIX].rows(0, 96), WEIGHTS[MATRIX] + change)
    assert merged.notes == ()


def test_a_merged_model_file(base: Checkpoint, tmp_path: Path) -> None:
    merged = merge_adapter(base, write_adapter(tmp_path / "lora", RIGHT))
    merged = merge_adapter(merged, write_adapter(tmp_path / "lora2", RIGHT))
    quantize(merged, tmp_path / "a.safetensors", bits=32)
    quantize(base, tmp_path / "b.safetensors", bits=32)
    a, b = (ModelFile.open(tmp_path / f"{name}.safetensors") for name in "ab")
    assert a.source == "base + lora + lora2"
    assert {name for name in a.sha256 if a.sha256[name] != b.sha256[name]} == {MATRIX}


def test_grids_are_kept_where_nothing_changes(tmp_path: Path) -> None:
    base = open_checkpoint(write_gguf(tmp_path / "x.gguf", CONFIG, WEIGHTS, "Q4_0"))
    merged = merge_adapter(base, write_adapter(tmp_path / "lora", RIGHT))
    exact = {p.name for p in plan(base, 4) if p.exact}
    assert MATRIX in exact
    assert {p.name for p in plan(merged, 4) if p.exact} == exact - {MATRIX}
    quantize(merged, tmp_path / "a.safetensors", bits=4)


def test_the_image_part_is_left_out(base: Checkpoint, tmp_path: Path) -> None:
    images = {"model.vision_tower.vision_model.encoder.layers.0.mlp.fc1": ((4, 8), (8, 4))}
    merged = merge_adapter(base, write_adapter(tmp_path / "lora", RIGHT | images))
    assert len(merged.notes) == 1
    assert "left out" in merged.notes[0]
    with pytest.raises(GemmaError, match="no LoRA matrices"):
        merge_adapter(base, write_adapter(tmp_path / "other", images))


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "LOHA"},
        {"peft_type": "ADALORA"},
        {"peft_type": None},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 1], [0, 2]]},
        {"alora_invocation_tokens": [1]},
        {"target_parameters": ["x"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "something new"},
        {"init_lora_weights": ["pissa"]},
        {"r": 0},
        {"r": 8},
        {"r": "4"},
        {"r": None},
        {"lora_alpha": None},
        {"lora_alpha": "NaN"},
        {"rank_pattern": {"up_proj": 3}},
        {"rank_pattern": {"up_proj": 0}},
        {"rank_pattern": [3]},
        {"rank_pattern": {"(": 3}},
        {"alpha_pattern": {"up_proj": None}},
    ],
    ids=str,
)
def test_other_adapters(base: Checkpoint, tmp_path: Path, config: dict[str, object]) -> None:
    folder = write_adapter(tmp_path / "lora", RIGHT, **config)
    with pytest.raises(GemmaError, match="adapter_config"):
        merge_adapter(base, folder)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_ways_to_begin_that_leave_the_base(base: Checkpoint, tmp_path: Path, start: object) -> None:
    folder = write_adapter(tmp_path / "lora", RIGHT, init_lora_weights=start)
    assert merge_adapter(base, folder).tensors[MATRIX].dtype == "F32"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector.weight", (96,)),
        ("base_model.model.model.layers.1.mlp.up_proj.lora_B.bias", (96,)),
        ("base_model.model.model.embed_tokens.lora_embedding_A", (4, 272)),
        ("base_model.model.model.embed_tokens.weight", (272, 64)),
        ("base_model.model.lm_head.lora_A.weight", (4, 64)),
        ("base_model.model.model.embed_tokens.lora_A.weight", (4, 64)),
        ("base_model.model.model.layers.1.mlp.experts.lora_A.weight", (4, 64)),
        ("base_model.model.model.layers.2.mlp.up_proj.lora_A.weight", (4, 64)),
        ("base_model.model.model.layers.0.input_layernorm.lora_A.weight", (4, 64)),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", (4, 64)),  # no B
        ("model.layers.1.mlp.up_proj.weight", (96, 64)),
    ],
)
def test_tensors_that_cannot_be_merged(
    base: Checkpoint, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    folder = write_adapter(tmp_path / "lora", RIGHT)
    path = folder / "adapter_model.safetensors"
    entries = read_safetensors(path).items()
    tensors = {key: (e.dtype, e.shape, e.data.tobytes()) for key, e in entries}
    tensors[name] = ("F16", shape, bytes(2 * int(np.prod(shape))))
    path.write_bytes(safetensors_bytes(tensors))
    with pytest.raises(GemmaError, match="adapter_model"):
        merge_adapter(base, folder)


@pytest.mark.parametrize(
    "shapes",
    [
        ((4, 96), (64, 4)),
        ((4, 64), (97, 4)),
        ((3, 64), (96, 3)),
        ((4, 64), (96, 3)),
        ((64, 4), (4, 96)),
    ],
)
def test_adapters_of_other_shapes(
    base: Checkpoint, tmp_path: Path, shapes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    with pytest.raises(GemmaError, match="use the adapter of this very model"):
        merge_adapter(base, write_adapter(tmp_path / "lora", {MODULE: shapes}))


def test_what_is_no_adapter(base: Checkpoint, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", RIGHT)
    for file, match in (
        ("adapter_model.safetensors", r"no adapter_model\.safetensors"),
        ("adapter_config.json", r"no adapter_config\.json"),
    ):
        (folder / file).rename(tmp_path / "away")
        with pytest.raises(GemmaError, match=match):
            merge_adapter(base, folder)
        (tmp_path / "away").rename(folder / file)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(GemmaError, match=r"adapter_config\.json"):
        merge_adapter(base, folder)
    with pytest.raises(GemmaError, match="holds no"):
        merge_adapter(base, tmp_path / "absent")


def test_a_damaged_adapter_is_named(base: Checkpoint, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", RIGHT)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\x00\x7e")  # a NaN
    with pytest.raises(GemmaError, match=r"adapter_model\.safetensors.*not a number"):
        quantize(merge_adapter(base, folder), tmp_path / "a.safetensors", bits=4)
    assert not (tmp_path / "a.safetensors").exists()


KEYS = st.sampled_from(["r", "lora_alpha", "use_rslora", "alpha_pattern"])
NUMBERS = st.integers() | st.floats()
PATTERNS = st.dictionaries(st.text(max_size=3), NUMBERS)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, st.none() | st.booleans() | NUMBERS | PATTERNS))
def test_any_config_is_merged_or_refused(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, object]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    if not folder.exists():
        write_hf(folder, CONFIG, WEIGHTS)
    lora = write_adapter(tmp_path_factory.getbasetemp() / "lora", RIGHT, **config)
    try:
        rows = merge_adapter(open_checkpoint(folder), lora).tensors[MATRIX].rows(0, 96)
    except GemmaError:
        return
    assert np.isfinite(rows).all()
