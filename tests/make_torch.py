"""Make `tests/written/torch/`: the golden checkpoints again, as PyTorch itself writes them.

Not a test. It needs torch; the tests that read what it leaves do not:

    python tests/make_torch.py

    gemma-2b-it.ckpt        gemma-mqa with the names of gemma_pytorch, in bfloat16
    gemma-2b-it-quant.ckpt  the same rounded to int8, one scale for each row
    shards/                 gemma3-shards in two .bin files with an index
"""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
WRITTEN = Path(__file__).parent / "written"
RENAMED = {
    "model.embed_tokens": "embedder",
    "q_norm": "query_norm",
    "k_norm": "key_norm",
}


def gemma_pytorch(folder: Path) -> dict[str, torch.Tensor]:
    """A Hugging Face checkpoint's state_dict as github.com/google/gemma_pytorch has it."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    state: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            continue
        if name.endswith("q_proj.weight"):
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            state[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
            continue
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)  # noqa: PLW2901
        state[name] = weight
    # A table that the module carries along, which is no weight.
    angles = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    state["freqs_cis"] = torch.polar(torch.ones_like(angles), angles)
    return state


def rounded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices as int8 with one scale for each row, which bfloat16 holds exactly."""
    quantized: dict[str, torch.Tensor] = {}
    for name, weight in state.items():
        if weight.ndim == 1 or weight.is_complex():
            quantized[name] = weight
            continue
        wide = weight.float()
        scales = (wide.abs().amax(1) / 120).to(torch.bfloat16)
        steps = wide / scales.float()[:, None]
        quantized[name] = steps.round().clamp(-128, 127).to(torch.int8)
        quantized[f"{name}_scaler"] = scales.float()
    return quantized


def main() -> None:
    out = WRITTEN / "torch"
    shutil.rmtree(out, ignore_errors=True)
    (out / "shards").mkdir(parents=True)
    state = gemma_pytorch(GOLDEN / "gemma-mqa")
    torch.save({"model_state_dict": state}, out / "gemma-2b-it.ckpt")
    torch.save({"model_state_dict": rounded(state)}, out / "gemma-2b-it-quant.ckpt")

    state = gemma_pytorch(GOLDEN / "gemma3-shards")
    state["local_freqs_cis"] = state["global_freqs_cis"] = state.pop("freqs_cis")
    names = sorted(state)
    index: dict[str, str] = {}
    for number, some in ((1, names[:17]), (2, names[17:])):
        shard = f"pytorch_model-{number:05d}-of-00002.bin"
        # One by one, as parameters: what a module's state_dict holds after load_state_dict.
        part = OrderedDict((n, torch.nn.Parameter(state[n], requires_grad=False)) for n in some)
        torch.save(part, out / "shards" / shard)
        index |= dict.fromkeys(part, shard)
    text = json.dumps({"metadata": {}, "weight_map": index}, indent=1)
    (out / "shards" / "pytorch_model.bin.index.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
