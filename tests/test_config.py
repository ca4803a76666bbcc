"""The architecture as published config.json files and GGUF metadata state it."""

import json
from dataclasses import asdict, replace

import pytest
from checkpoints import Json, gguf_metadata

from quantize.checkpoint.architecture import config_from_gguf, config_from_hf
from quantize.config import GemmaConfig
from quantize.errors import GemmaError

# What the published files say about the architecture, without their other keys.
GEMMA_2B: Json = {
    "model_type": "gemma",
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
GEMMA2_27B: Json = {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA3_270M: Json = {
    "model_type": "gemma3_text",
    "_sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "use_bidirectional_attention": False,
    "vocab_size": 262144,
}
# The smallest multimodal one leaves out all that transformers assumes.
GEMMA3_4B: Json = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
}
GEMMA3_27B: Json = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}


def alternating(n_layers: int, period: int) -> tuple[bool, ...]:
    """Gemma's layers slide, except every `period`-th."""
    return tuple(layer % period != period - 1 for layer in range(n_layers))


EXPECTED = {
    "gemma-2b": (
        GEMMA_2B,
        GemmaConfig(
            generation="gemma",
            vocab_size=256000,
            hidden_size=2048,
            intermediate_size=16384,
            n_layers=18,
            n_heads=8,
            n_kv_heads=1,
            head_dim=256,
            context_length=8192,
            rms_norm_eps=1e-6,
            query_scale=1 / 16,
            rope_base=1e4,
            rope_scale=1.0,
            rope_local_base=1e4,
            sliding_window=0,
            sliding_layers=(False,) * 18,
            attention_soft_cap=0.0,
            final_soft_cap=0.0,
        ),
    ),
    "gemma-2-27b": (
        GEMMA2_27B,
        GemmaConfig(
            generation="gemma2",
            vocab_size=256000,
            hidden_size=4608,
            intermediate_size=36864,
            n_layers=46,
            n_heads=32,
            n_kv_heads=16,
            head_dim=128,
            context_length=8192,
            rms_norm_eps=1e-6,
            query_scale=144**-0.5,
            rope_base=1e4,
            rope_scale=1.0,
            rope_local_base=1e4,
            sliding_window=4096,
            sliding_layers=alternating(46, 2),
            attention_soft_cap=50.0,
            final_soft_cap=30.0,
        ),
    ),
    "gemma-3-270m": (
        GEMMA3_270M,
        GemmaConfig(
            generation="gemma3",
            vocab_size=262144,
            hidden_size=640,
            intermediate_size=2048,
            n_layers=18,
            n_heads=4,
            n_kv_heads=1,
            head_dim=256,
            context_length=32768,
            rms_norm_eps=1e-6,
            query_scale=1 / 16,
            rope_base=1e6,
            rope_scale=1.0,
            rope_local_base=1e4,
            sliding_window=512,
            sliding_layers=alternating(18, 6),
            attention_soft_cap=0.0,
            final_soft_cap=0.0,
        ),
    ),
    "gemma-3-4b": (
        GEMMA3_4B,
        GemmaConfig(
            generation="gemma3",
            vocab_size=262208,
            hidden_size=2560,
            intermediate_size=10240,
            n_layers=34,
            n_heads=8,
            n_kv_heads=4,
            head_dim=256,
            context_length=131072,
            rms_norm_eps=1e-6,
            query_scale=1 / 16,
            rope_base=1e6,
            rope_scale=8.0,
            rope_local_base=1e4,
            sliding_window=1024,
            sliding_layers=alternating(34, 6),
            attention_soft_cap=0.0,
            final_soft_cap=0.0,
        ),
    ),
    "gemma-3-27b": (
        GEMMA3_27B,
        GemmaConfig(
            generation="gemma3",
            vocab_size=262208,
            hidden_size=5376,
            intermediate_size=21504,
            n_layers=62,
            n_heads=32,
            n_kv_heads=16,
            head_dim=128,
            context_length=131072,
            rms_norm_eps=1e-6,
            query_scale=168**-0.5,
            rope_base=1e6,
            rope_scale=8.0,
            rope_local_base=1e4,
            sliding_window=1024,
            sliding_layers=alternating(62, 6),
            attention_soft_cap=0.0,
            final_soft_cap=0.0,
        ),
    ),
}
CONFIGS = [config for _, config in EXPECTED.values()]


@pytest.mark.parametrize("name", EXPECTED)
def test_published_config(name: str) -> None:
    published, expected = EXPECTED[name]
    assert config_from_hf(published, name) == expected


def without(config: Json, *keys: str) -> Json:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        (GEMMA_2B, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        (GEMMA2_27B, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        (
            GEMMA3_270M,
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
        ),
    ],
)
def test_rope_parameters_of_transformers_5(older: Json, newer: Json) -> None:
    older_keys = ("rope_theta", "rope_scaling", "rope_local_base_freq")
    assert config_from_hf(without(older, *older_keys) | newer, "x") == config_from_hf(older, "x")


def test_rope_parameters_are_read_not_assumed() -> None:
    kinds = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    keys = ("rope_theta", "rope_scaling", "rope_local_base_freq")
    config = config_from_hf(without(GEMMA3_270M, *keys) | {"rope_parameters": kinds}, "x")
    assert (config.rope_base, config.rope_scale, config.rope_local_base) == (5e5, 4.0, 2e4)


@pytest.mark.parametrize("key", ["sliding_window_pattern", "_sliding_window_pattern"])
def test_pattern_of_sliding_layers(key: str) -> None:
    config = without(GEMMA3_270M, "layer_types", "_sliding_window_pattern") | {key: 3}
    assert config_from_hf(config, "x").sliding_layers == alternating(18, 3)
    no_sliding = config_from_hf(config | {key: 1}, "x")
    assert no_sliding.sliding_layers == (False,) * 18
    assert no_sliding.sliding_window == 0


def test_older_spelling_of_the_scaling() -> None:
    config = GEMMA3_270M | {"rope_scaling": {"type": "linear", "factor": 8}}
    assert config_from_hf(config, "x").rope_scale == 8.0


def test_soft_caps_absent_or_null() -> None:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    absent = config_from_hf(without(GEMMA2_27B, *caps), "x")
    assert (absent.attention_soft_cap, absent.final_soft_cap) == (50.0, 30.0)
    null = config_from_hf(GEMMA2_27B | dict.fromkeys(caps), "x")
    assert (null.attention_soft_cap, null.final_soft_cap) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({}, "model_type"),
        ({"model_type": "llama"}, "llama"),
        ({"model_type": "gemma3n", "text_config": {}}, "gemma3n"),
        ({"model_type": "recurrent_gemma"}, "recurrent_gemma"),
        ({"model_type": "gemma3"}, "text_config"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma4_text"}}, "gemma4_text"),
        (GEMMA3_270M | {"use_bidirectional_attention": True}, "both ways"),
        (GEMMA3_270M | {"attention_bias": True}, "attention_bias"),
        (GEMMA3_270M | {"hidden_activation": "silu"}, "silu"),
        (GEMMA3_270M | {"hidden_activation": "gelu"}, "gelu"),
        (GEMMA_2B | {"hidden_act": "relu"}, "relu"),
        (GEMMA3_270M | {"quantization_config": {"bits": 4}}, "quantized"),
        (GEMMA3_270M | {"head_dim": 72}, "head_dim"),
        (GEMMA3_270M | {"hidden_size": 650}, "hidden_size"),
        (GEMMA3_270M | {"hidden_size": "640"}, "hidden_size"),
        (GEMMA3_270M | {"hidden_size": True}, "hidden_size"),
        (GEMMA3_270M | {"num_key_value_heads": 3}, "heads"),
        (GEMMA3_270M | {"num_key_value_heads": 0}, "n_kv_heads"),
        (GEMMA3_270M | {"num_hidden_layers": 10**12}, "num_hidden_layers"),
        (GEMMA3_270M | {"num_hidden_layers": 17}, "layer_types"),
        (GEMMA3_270M | {"layer_types": ["chunked_attention"] * 18}, "layer_types"),
        (GEMMA3_270M | {"layer_types": None, "_sliding_window_pattern": 0}, "pattern"),
        (GEMMA3_270M | {"sliding_window": 0}, "sliding window"),
        (GEMMA3_270M | {"query_pre_attn_scalar": -1}, "query_scale"),
        (GEMMA3_270M | {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        (GEMMA3_270M | {"final_logit_softcapping": -30.0}, "final_soft_cap"),
        (GEMMA3_270M | {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "yarn"),
        (GEMMA3_270M | {"rope_scaling": {"rope_type": "linear"}}, "factor"),
        (GEMMA3_270M | {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scale"),
        (GEMMA2_27B | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "sliding layers"),
    ],
)
def test_config_that_cannot_be_run(config: Json, named: str) -> None:
    with pytest.raises(GemmaError, match=named) as caught:
        config_from_hf(config, "the/config.json")
    assert "the/config.json" in str(caught.value)


@pytest.mark.parametrize("config", CONFIGS, ids=list(EXPECTED))
def test_gguf_metadata_says_the_same_as_config_json(config: GemmaConfig) -> None:
    # The two 27B models among these state their query scale in config.json only.
    read = config_from_gguf(gguf_metadata(config), "x.gguf", vocab_size=config.vocab_size)
    assert read == config


def test_gguf_metadata_that_states_more() -> None:
    metadata = gguf_metadata(CONFIGS[2]) | {
        "gemma3.rope.freq_base_swa": 2e4,
        "gemma3.attention.sliding_window_pattern": [True, False] * 9,
        "gemma3.final_logit_softcapping": 30.0,
    }
    config = config_from_gguf(metadata, "x.gguf", vocab_size=9)
    assert config.rope_local_base == 2e4
    assert config.sliding_layers == (True, False) * 9
    assert config.final_soft_cap == 30.0
    every_third = metadata | {"gemma3.attention.sliding_window_pattern": 3}
    config = config_from_gguf(every_third, "x.gguf", vocab_size=9)
    assert config.sliding_layers == alternating(18, 3)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("general.architecture", None, "general.architecture"),
        ("general.architecture", "gemma3n", "gemma3n"),
        ("general.architecture", "gemma-embedding", "gemma-embedding"),
        ("gemma3.rope.freq_base", None, "rope.freq_base"),
        ("gemma3.block_count", None, "block_count"),
        ("gemma3.block_count", 2**32, "block_count"),
        ("gemma3.attention.head_count", [4] * 18, "head_count"),
        ("gemma3.attention.head_count", 0, "n_heads"),
        ("gemma3.attention.value_length", 128, "value_length"),
        ("gemma3.rope.dimension_count", 64, "dimension_count"),
        ("gemma3.attention.causal", False, "both ways"),
        ("gemma3.rope.scaling.type", "yarn", "yarn"),
        ("gemma3.attention.sliding_window_pattern", [True], "pattern"),
    ],
)
def test_gguf_metadata_that_cannot_be_run(key: str, value: object, named: str) -> None:
    metadata = gguf_metadata(CONFIGS[2]) | {key: value}
    with pytest.raises(GemmaError, match=named) as caught:
        config_from_gguf(metadata, "the.gguf", vocab_size=262144)
    assert "the.gguf" in str(caught.value)


@pytest.mark.parametrize("config", CONFIGS, ids=list(EXPECTED))
def test_json_and_back(config: GemmaConfig) -> None:
    assert GemmaConfig.from_json(config.to_json(), "x") == config


@pytest.mark.parametrize("field", list(asdict(CONFIGS[0])))
def test_json_needs_every_field_with_its_type(field: str) -> None:
    values = json.loads(CONFIGS[0].to_json())
    for broken in (without(values, field), values | {field: {}}, values | {field: -1}):
        with pytest.raises(GemmaError, match=r"model\.safetensors"):
            GemmaConfig.from_json(json.dumps(broken), "model.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"generation": "gemma", "generation": "gemma"}',
        CONFIGS[0].to_json().replace("{", '{"more": 1, '),
        CONFIGS[0].to_json().replace("1e-06", "NaN"),
        CONFIGS[0].to_json().replace("[false, ", "[0, "),
        CONFIGS[0].to_json().replace("[false, ", "[true, "),
    ],
)
def test_json_of_another_kind(text: str) -> None:
    with pytest.raises(GemmaError, match=r"model\.safetensors"):
        GemmaConfig.from_json(text, "model.safetensors")


def test_what_a_generation_has() -> None:
    post = [replace(CONFIGS[0], generation=g).has_post_norms for g in ("gemma", "gemma2", "gemma3")]
    qk = [replace(CONFIGS[0], generation=g).has_qk_norm for g in ("gemma", "gemma2", "gemma3")]
    assert post == [False, True, True]
    assert qk == [False, False, True]
