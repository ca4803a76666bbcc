"""Make `tests/written/adapters/`: LoRA adapters as PEFT saves them, and what PEFT merges.

Not a test. It needs torch, transformers and peft; the tests that read what it leaves do not:

    python tests/make_adapters.py

    plain/      all projections, r 4, with other ranks and alphas for some
    rslora/     some projections, in bfloat16, scaled by the root of its rank
    merged.npz  matrices of gemma3-shards, by their names, in float32: "plain:NAME" with the first
                merged, "both:NAME" with the second on top
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

GOLDEN = Path(__file__).parent / "golden"
WRITTEN = Path(__file__).parent / "written"
BASE = GOLDEN / "gemma3-shards"
PLAIN = LoraConfig(
    r=4,
    lora_alpha=10,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    rank_pattern={"down_proj": 3, r"layers\.1\.self_attn\.q_proj": 2},
    alpha_pattern={"^model.layers.2.mlp.up_proj": 1, "v_proj": 32},
)
RSLORA = LoraConfig(r=6, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "down_proj"])


def save(config: LoraConfig, name: str, dtype: torch.dtype) -> None:
    """An adapter with random matrices."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)
    noise = torch.Generator().manual_seed(len(name))
    for key, weight in model.named_parameters():
        if "lora_" in key:
            spread = weight.shape[1] ** -0.5
            weight.data = (torch.randn(weight.shape, generator=noise) * spread).to(dtype)
    folder = WRITTEN / "adapters" / name
    config.base_model_name_or_path = BASE.name
    model.save_pretrained(folder)
    (folder / "README.md").unlink()


def main() -> None:
    folder = WRITTEN / "adapters"
    shutil.rmtree(folder, ignore_errors=True)
    save(PLAIN, "plain", torch.float32)
    save(RSLORA, "rslora", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    merged = {}
    for name, label, config in (("plain", "plain", PLAIN), ("rslora", "both", RSLORA)):
        model = PeftModel.from_pretrained(model, folder / name, autocast_adapter_dtype=True)
        model = model.merge_and_unload()
        for key, weight in model.named_parameters():
            if any(f".{target}." in key for target in config.target_modules):
                merged[f"{label}:{key}"] = weight.detach().numpy().copy()
    np.savez_compressed(folder / "merged.npz", **merged)


if __name__ == "__main__":
    main()
