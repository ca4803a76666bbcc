"""The architecture as a checkpoint states it: Hugging Face's config.json and GGUF's metadata."""

from collections.abc import Mapping

from quantize.config import GENERATIONS, MAX_LAYERS, Fields, GemmaConfig
from quantize.errors import GemmaError, shown

# What transformers assumes for a key that config.json leaves out (Gemma3TextConfig, Gemma2Config
# and GemmaConfig, the same from 4.50 to 5). Gemma 3 4B and up leave out whatever equals them.
_HF_DEFAULTS: dict[str, dict[str, int | float]] = {
    "gemma": {
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rope_theta": 10_000.0,
    },
    "gemma2": {
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    },
    "gemma3": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rope_theta": 1_000_000.0,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    },
}
_RMS_NORM_EPS = 1e-6
_LOCAL_ROPE_BASE = 10_000.0
_GEMMA2_ATTENTION_CAP, _GEMMA2_FINAL_CAP = 50.0, 30.0
# Every n-th layer is global, the others slide.
_PATTERN = {"gemma2": 2, "gemma3": 6}


def config_from_hf(config: Mapping[str, object], where: str) -> GemmaConfig:
    """The architecture in a parsed config.json, of the text model if there are others.

    Understands the spellings of transformers 4 and 5. Raises GemmaError, naming `where`, for other
    architectures and for variants of Gemma that would run wrongly.
    """
    top = Fields(config, where)
    model_type = top.text("model_type")
    if "quantization_config" in config:
        raise GemmaError(
            f"{where} belongs to a checkpoint that is already quantized, which is not supported"
            " outside GGUF; use the original one in bfloat16."
        )
    text = top.mapping("text_config") if model_type == "gemma3" else top
    generation = "gemma3" if model_type == "gemma3_text" else model_type
    if generation not in GENERATIONS:
        raise _unsupported(model_type, where)
    if text is not top and text.text("model_type", "gemma3_text") != "gemma3_text":
        raise _unsupported(f"{model_type} with {text.text('model_type')}", where)
    _refuse_variants(text, generation)

    defaults = _HF_DEFAULTS[generation]
    n_layers = _layer_count(text, "num_hidden_layers", defaults["num_hidden_layers"])
    head_dim = text.integer("head_dim", defaults["head_dim"])
    rope_base, rope_scale, rope_local_base = _hf_rope(text, generation)
    sliding_layers = _hf_sliding_layers(text, generation, n_layers)
    window = (
        text.integer("sliding_window", defaults["sliding_window"]) if any(sliding_layers) else 0
    )
    # Gemma 1 has no such key: its scores are scaled by the head's size.
    scalar = text.number("query_pre_attn_scalar", defaults.get("query_pre_attn_scalar", head_dim))
    caps = generation == "gemma2"
    return GemmaConfig(
        generation=generation,
        vocab_size=text.integer("vocab_size", defaults["vocab_size"]),
        hidden_size=text.integer("hidden_size", defaults["hidden_size"]),
        intermediate_size=text.integer("intermediate_size", defaults["intermediate_size"]),
        n_layers=n_layers,
        n_heads=text.integer("num_attention_heads", defaults["num_attention_heads"]),
        n_kv_heads=text.integer("num_key_value_heads", defaults["num_key_value_heads"]),
        head_dim=head_dim,
        context_length=text.integer("max_position_embeddings", defaults["max_position_embeddings"]),
        rms_norm_eps=text.number("rms_norm_eps", _RMS_NORM_EPS),
        query_scale=_inverse_root(scalar),
        rope_base=rope_base,
        rope_scale=rope_scale,
        rope_local_base=rope_local_base,
        sliding_window=window,
        sliding_layers=sliding_layers,
        attention_soft_cap=_hf_cap(text, "attn_logit_softcapping", caps * _GEMMA2_ATTENTION_CAP),
        final_soft_cap=_hf_cap(text, "final_logit_softcapping", caps * _GEMMA2_FINAL_CAP),
    ).checked(where)


def config_from_gguf(metadata: Mapping[str, object], where: str, *, vocab_size: int) -> GemmaConfig:
    """The architecture in a GGUF file's metadata; the vocabulary's size is the embedding's rows.

    An absent key means what it means to llama.cpp, with one exception: Gemma 3 must state its RoPE
    base. Raises GemmaError, naming `where`, like `config_from_hf`.
    """
    fields = Fields(metadata, where)
    generation = fields.text("general.architecture")
    if generation not in GENERATIONS:
        raise _unsupported(generation, where)

    def key(name: str) -> str:
        return f"{generation}.{name}"

    n_layers = _layer_count(fields, key("block_count"))
    hidden_size = fields.integer(key("embedding_length"))
    n_heads = fields.integer(key("attention.head_count"))
    by_heads = hidden_size // max(n_heads, 1)
    head_dim = fields.integer(key("attention.key_length"), by_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key(name), head_dim) != head_dim:
            raise fields.wrong(key(name), f"the length of the keys, {head_dim},")
    if metadata.get(key("attention.causal")) is False:
        raise _bidirectional(where)

    window = 0
    if generation == "gemma2":
        window = fields.integer(key("attention.sliding_window"), 4096)
    elif generation == "gemma3":
        window = fields.integer(key("attention.sliding_window"), 0)
    sliding_layers = (
        _gguf_sliding_layers(fields, key("attention.sliding_window_pattern"), generation, n_layers)
        if window
        else (False,) * n_layers
    )
    rope_base = (
        fields.number(key("rope.freq_base"))
        if generation == "gemma3"
        else fields.number(key("rope.freq_base"), 10_000.0)
    )
    rope_local_base = fields.number(
        key("rope.freq_base_swa"), _LOCAL_ROPE_BASE if generation == "gemma3" else rope_base
    )
    # GGUF has no query_pre_attn_scalar. Like llama.cpp: by the head's size, except in the two 27B
    # models, which are known by their number of layers.
    is_27b = (generation, n_layers) in (("gemma2", 46), ("gemma3", 62))
    caps = generation == "gemma2"
    return GemmaConfig(
        generation=generation,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer(key("feed_forward_length")),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=fields.integer(key("attention.head_count_kv"), n_heads),
        head_dim=head_dim,
        context_length=fields.integer(key("context_length")),
        rms_norm_eps=fields.number(key("attention.layer_norm_rms_epsilon")),
        query_scale=_inverse_root(by_heads if is_27b else head_dim),
        rope_base=rope_base,
        rope_scale=_gguf_rope_scale(fields, key("rope"), generation),
        rope_local_base=rope_local_base,
        sliding_window=window if any(sliding_layers) else 0,
        sliding_layers=sliding_layers,
        attention_soft_cap=fields.number(
            key("attn_logit_softcapping"), caps * _GEMMA2_ATTENTION_CAP
        ),
        final_soft_cap=fields.number(key("final_logit_softcapping"), caps * _GEMMA2_FINAL_CAP),
    ).checked(where)


def _unsupported(architecture: str, where: str) -> GemmaError:
    return GemmaError(
        f"{where} describes the architecture {shown(architecture)}, which is not supported; use a"
        " checkpoint of Gemma 1, 2 or 3."
    )


def _bidirectional(where: str) -> GemmaError:
    return GemmaError(
        f"{where} describes a model whose attention looks both ways (an embedding model, it"
        " generates no text); use a checkpoint of Gemma 1, 2 or 3."
    )


def _inverse_root(scalar: float) -> float:
    """scalar ** -0.5; 0.0, which `checked` refuses, if there is none."""
    return float(scalar**-0.5) if scalar > 0 else 0.0


def _layer_count(fields: Fields, key: str, *default: object) -> int:
    """Bounded before anything of that length is built."""
    n_layers = fields.integer(key, *default)
    if not 0 < n_layers <= MAX_LAYERS:
        raise fields.wrong(key, f"an integer of 1 to {MAX_LAYERS}")
    return n_layers


def _refuse_variants(text: Fields, generation: str) -> None:
    """Raises GemmaError for what a Gemma's config.json may ask for and the kernels do not do."""
    # transformers reads Gemma 1's "gelu" as the tanh approximation too: that is what was trained.
    activations = {"gelu_pytorch_tanh"} | ({"gelu"} if generation == "gemma" else set())
    keys = ("hidden_act", "hidden_activation") if generation == "gemma" else ("hidden_activation",)
    for key in keys:
        if text.text(key, "gelu_pytorch_tanh") not in activations:
            raise text.wrong(key, "gelu_pytorch_tanh")
    if text.values.get("attention_bias"):
        raise text.wrong("attention_bias", "false")
    if text.values.get("use_bidirectional_attention"):
        raise _bidirectional(text.where)


def _hf_cap(text: Fields, key: str, default: float) -> float:
    """A soft cap: null means none, an absent key the default."""
    if key not in text.values:
        return default
    return text.number(key, 0.0)


def _hf_rope(text: Fields, generation: str) -> tuple[float, float, float]:
    """RoPE's base and scale in global layers, and its base in sliding ones.

    transformers 4 has rope_theta, rope_scaling and rope_local_base_freq; transformers 5 has
    rope_parameters, for each kind of layer if there are two.
    """
    parameters = text.mapping("rope_parameters", {})
    per_kind = "full_attention" in parameters.values or "sliding_attention" in parameters.values
    full = parameters.mapping("full_attention", {}) if per_kind else parameters
    sliding = parameters.mapping("sliding_attention", {})
    base = full.number(
        "rope_theta", text.number("rope_theta", _HF_DEFAULTS[generation]["rope_theta"])
    )
    # Before Gemma 3 there is one RoPE for all layers.
    local_default = _LOCAL_ROPE_BASE if generation == "gemma3" else base
    local = sliding.number("rope_theta", text.number("rope_local_base_freq", local_default))
    scaling = text.mapping("rope_scaling", full.values)
    scale = _linear_scale(scaling, "rope_type" if "rope_type" in scaling.values else "type")
    if _linear_scale(sliding, "rope_type") != 1.0 or (generation == "gemma2" and scale != 1.0):
        raise GemmaError(
            f"{text.where} scales the RoPE of its sliding layers, which no released Gemma does and"
            " is not supported; use an unmodified checkpoint."
        )
    return base, scale, local


def _linear_scale(scaling: Fields, type_key: str) -> float:
    kind = scaling.text(type_key, "default")
    if kind == "default":
        return 1.0
    if kind != "linear":
        raise scaling.wrong(type_key, "'default' or 'linear'")
    return scaling.number("factor")


def _hf_sliding_layers(text: Fields, generation: str, n_layers: int) -> tuple[bool, ...]:
    if generation == "gemma":
        return (False,) * n_layers
    kinds = {"sliding_attention": True, "full_attention": False}
    if text.values.get("layer_types") is not None:
        types = text.array("layer_types")
        if len(types) != n_layers or not all(isinstance(t, str) and t in kinds for t in types):
            raise text.wrong("layer_types", f"a list of {n_layers} times {' or '.join(kinds)}")
        return tuple(kinds[str(kind)] for kind in types)
    pattern = _PATTERN[generation]
    # Gemma 2 has no such key; transformers writes Gemma 3's with an underscore at times.
    if generation == "gemma3":
        pattern = text.integer("_sliding_window_pattern", pattern)
        pattern = text.integer("sliding_window_pattern", pattern)
    if pattern == 0:
        raise text.wrong("sliding_window_pattern", "a positive integer")
    return tuple((layer + 1) % pattern != 0 for layer in range(n_layers))


def _gguf_sliding_layers(
    fields: Fields, key: str, generation: str, n_layers: int
) -> tuple[bool, ...]:
    """The pattern says for each layer whether it slides, or every how many layers one does not."""
    if isinstance(fields.values.get(key), list):
        entries = fields.array(key)
        if len(entries) != n_layers or not all(isinstance(e, int) for e in entries):
            raise fields.wrong(key, f"a list of {n_layers} truth values")
        return tuple(bool(entry) for entry in entries)
    pattern = fields.integer(key, _PATTERN[generation])
    if pattern == 0:
        return (True,) * n_layers
    return tuple((layer + 1) % pattern != 0 for layer in range(n_layers))


def _gguf_rope_scale(fields: Fields, rope: str, generation: str) -> float:
    kind = fields.text(f"{rope}.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise fields.wrong(f"{rope}.scaling.type", "'none' or 'linear'")
    # The second is the key's older name; 0 is llama.cpp's "not set".
    factor = fields.number(f"{rope}.scaling.factor", fields.number(f"{rope}.scale_linear", 0.0))
    scale = 1.0 if kind == "none" or factor == 0.0 else factor
    if generation == "gemma2" and scale != 1.0:
        raise fields.wrong(f"{rope}.scaling.factor", "1 (no Gemma 2 scales its RoPE)")
    return scale
