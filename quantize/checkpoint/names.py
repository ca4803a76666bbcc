"""Ours, Hugging Face's, gemma_pytorch's and GGUF's names of tensors.

Ours are listed in quantize.tensors.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from quantize.checkpoint.source import SourceTensor
from quantize.config import GemmaConfig
from quantize.errors import GemmaError, shown
from quantize.tensors import tensor_shapes

FUSED = "attn_qkv"
"""The rows of attn_q, attn_k and attn_v in one matrix, as gemma_pytorch keeps them."""

_HF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_o",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "post_attention_layernorm": "post_attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffn_norm",
}
_GGUF_LAYER = {
    "attn_norm": "attn_norm",
    "attn_q": "attn_q",
    "attn_k": "attn_k",
    "attn_v": "attn_v",
    "attn_output": "attn_o",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "post_attention_norm": "post_attn_norm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "ffn_gate",
    "ffn_up": "ffn_up",
    "ffn_down": "ffn_down",
    "post_ffw_norm": "post_ffn_norm",
}
# gemma_pytorch (github.com/google/gemma_pytorch, gemma/model.py), where it differs.
_GEMMA_PYTORCH_LAYER = {
    "self_attn.qkv_proj": FUSED,
    "self_attn.query_norm": "q_norm",
    "self_attn.key_norm": "k_norm",
}
_HF_TOP = {"embed_tokens": "embed", "norm": "final_norm"}
_GEMMA_PYTORCH_TOP = {
    "embedder": "embed",
    "text_token_embedder": "embed",
    "model.norm": "final_norm",
}
_GGUF_TOP = {"token_embd": "embed", "output_norm": "final_norm", "output": "head"}

_HF_NAME = re.compile(
    r"(?:(?P<head>(?:language_model\.)?lm_head)"
    r"|(?:model\.language_model\.|language_model\.model\.|model\.)?"
    r"(?:layers\.(?P<layer>0|[1-9][0-9]{0,3})\.)?(?P<part>[a-z_.]+))\.weight"
)
_GEMMA_PYTORCH_NAME = re.compile(
    r"(?:model\.layers\.(?P<layer>0|[1-9][0-9]{0,3})\.)?(?P<part>[a-z_.]+)\.weight"
)
_GGUF_NAME = re.compile(r"(?:blk\.(?P<layer>0|[1-9][0-9]{0,3})\.)?(?P<part>[a-z_]+)\.weight")
_IMAGES = re.compile(
    r"(?:model\.)?(?:vision_tower|vision_model|multi_modal_projector)\.|(?:v|mm)\."
    r"|(?:siglip_vision_model|mm_soft_embedding_norm|mm_input_projection)\."
)
# Tables of RoPE's frequencies that some checkpoints carry along.
_COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq|(?:local_|global_)?freqs_cis")


def from_hugging_face(name: str, generation: str) -> str | None:
    """Our name for Hugging Face's, "head" for the output head, None if there is none."""
    match = _HF_NAME.fullmatch(name)
    if match is None:
        return None
    if match["head"]:
        return "head"
    if match["layer"] is None:
        return _HF_TOP.get(match["part"])
    part = _hf_part(match["part"], generation)
    return f"layers.{match['layer']}.{part}" if part else None


def _hf_part(part: str, generation: str) -> str | None:
    # Gemma 1 has no norm after attention: there the name means the one before the feed-forward.
    first = generation == "gemma" and part == "post_attention_layernorm"
    return "ffn_norm" if first else _HF_LAYER.get(part)


def from_gemma_pytorch(name: str, generation: str) -> str | None:
    """Our name for gemma_pytorch's, or one that ends in `FUSED`; None if there is none."""
    match = _GEMMA_PYTORCH_NAME.fullmatch(name)
    if match is None:
        return None
    if match["layer"] is None:
        return _GEMMA_PYTORCH_TOP.get(match["part"])
    part = _GEMMA_PYTORCH_LAYER.get(match["part"]) or _hf_part(match["part"], generation)
    return f"layers.{match['layer']}.{part}" if part else None


def from_gguf(name: str) -> str | None:
    """Our name for GGUF's, "head" for the output head, None if there is none."""
    match = _GGUF_NAME.fullmatch(name)
    if match is None:
        return None
    if match["layer"] is None:
        return _GGUF_TOP.get(match["part"])
    part = _GGUF_LAYER.get(match["part"])
    return f"layers.{match['layer']}.{part}" if part else None


def is_of_images(name: str) -> bool:
    """Whether a source's name is one in the image part of a multimodal model."""
    return _IMAGES.match(name) is not None


def text_tensors(
    names: Iterable[str],
    rename: Callable[[str], str | None],
    where: str,
) -> tuple[dict[str, str], bool]:
    """Our names to the source's, of the text model only, and whether there are image tensors too.

    Raises GemmaError for a tensor that is no part of Gemma, or for two of the same meaning.
    """
    ours: dict[str, str] = {}
    has_images = False
    for name in names:
        if is_of_images(name):
            has_images = True
            continue
        if _COMPUTED.fullmatch(name):
            continue
        our_name = rename(name)
        if our_name is None:
            raise GemmaError(
                f"{where} holds the tensor {shown(name)}, which no Gemma 1, 2 or 3 has: without it"
                " the answers would be wrong. Use an unmodified checkpoint (adapters must be"
                " merged)."
            )
        if our_name in ours:
            raise GemmaError(
                f"{where} holds both {shown(ours[our_name])} and {shown(name)}, which mean the"
                " same tensor; use an unmodified checkpoint."
            )
        ours[our_name] = name
    return ours, has_images


def complete(
    tensors: Mapping[str, SourceTensor], config: GemmaConfig, where: str
) -> dict[str, SourceTensor]:
    """Exactly the tensors of `tensor_shapes`, in that order.

    Raises GemmaError if one is missing, superfluous or of another shape, or if the checkpoint has
    an output head that is not its embedding.
    """
    shapes = tensor_shapes(config)
    for name, tensor in tensors.items():
        if name != "head" and name not in shapes:
            raise GemmaError(
                f"{where} holds the tensor {tensor.name!r}, which its architecture"
                f" ({config.generation}, {config.n_layers} layers) does not have; use an unmodified"
                " checkpoint."
            )
    for name, shape in shapes.items():
        if name not in tensors:
            raise GemmaError(
                f"{where} lacks the tensor {name!r} of a {config.generation} model with"
                f" {config.n_layers} layers; get the whole checkpoint."
            )
        if tensors[name].shape != shape:
            raise GemmaError(
                f"{where} holds {tensors[name].name!r} with the shape {tensors[name].shape} where"
                f" its configuration asks for {shape}; get the checkpoint again."
            )
    if "head" in tensors and not _same(tensors["head"], tensors["embed"]):
        raise GemmaError(
            f"{where} has an output head ({tensors['head'].name!r}) that differs from its"
            " embedding; Gemma's are the same tensor and only that is supported."
        )
    return {name: tensors[name] for name in shapes}


def _same(a: SourceTensor, b: SourceTensor) -> bool:
    if a.shape != b.shape:
        return False
    step = 4096
    return all(
        np.array_equal(a.rows(start, start + step), b.rows(start, start + step))
        for start in range(0, a.shape[0], step)
    )
