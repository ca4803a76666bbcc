"""The tensors of a Gemma model and our names for them.

They are "embed", "final_norm" and, for each layer, "layers.{i}." and one of

    attn_norm  attn_q  attn_k  attn_v  q_norm  k_norm  attn_o  post_attn_norm
    ffn_norm   ffn_gate  ffn_up  ffn_down  post_ffn_norm

The norms q_norm and k_norm are Gemma 3's, the post norms Gemma 2's and 3's.
"""

from quantize.config import GemmaConfig


def tensor_shapes(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, (n,) or (n_out, n_in), in the order in which a token meets them.

    The embedding comes last: it is also the output head.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.n_heads * config.head_dim
    keys = config.n_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "q_norm": (config.head_dim,),
        "k_norm": (config.head_dim,),
        "attn_o": (hidden, queries),
        "post_attn_norm": (hidden,),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
        "post_ffn_norm": (hidden,),
    }
    if not config.has_qk_norm:
        del layer["q_norm"], layer["k_norm"]
    if not config.has_post_norms:
        del layer["post_attn_norm"], layer["post_ffn_norm"]
    return {
        **{f"layers.{i}.{n}": shape for i in range(config.n_layers) for n, shape in layer.items()},
        "final_norm": (hidden,),
        "embed": (config.vocab_size, hidden),
    }


def norm_sizes(config: GemmaConfig) -> dict[str, int]:
    """The vectors among `tensor_shapes`: every one is a norm's weights."""
    return {name: shape[0] for name, shape in tensor_shapes(config).items() if len(shape) == 1}


def matrix_shapes(config: GemmaConfig) -> dict[str, tuple[int, int]]:
    """The matrices among `tensor_shapes`."""
    shapes = tensor_shapes(config).items()
    return {name: (shape[0], shape[1]) for name, shape in shapes if len(shape) == 2}
