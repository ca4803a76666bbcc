"""Train a small Gemma 3 on a text, to have a second kind of real weights to measure quantizers on.

Not a test. It needs torch and transformers, and takes a few minutes on two cores:

    python tests/make_trained.py TEXT FOLDER [--steps 300]

The first nine tenths of the text are trained on. FOLDER gets a checkpoint as it is published
(bfloat16 safetensors, `config.json`, a SentencePiece model) and `held-out.txt`, the last tenth, to
measure with:

    gemma-cli quantize FOLDER --bits 32 -o base.safetensors
    gemma-cli quantize FOLDER --bits 4 -o int4.safetensors
    gemma-cli eval -m int4.safetensors --base base.safetensors --text FOLDER/held-out.txt
"""

from __future__ import annotations

import argparse
import io
import json
import math
from pathlib import Path

import sentencepiece
import torch
from make_golden import GEMMA3
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

N_PIECES = 4096
BATCH, LENGTH = 8, 256
LEARNING_RATE = 2e-3

CONFIG = GEMMA3 | {
    "head_dim": 64,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 64,
    "sliding_window": 128,
    "vocab_size": N_PIECES,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small Gemma 3 on a text.")
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    cut = text.rindex("\n", 0, len(text) * 9 // 10)
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "held-out.txt").write_text(text[cut:], encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2, sort_keys=True) + "\n")
    tokenizer = train_tokenizer(text[:cut])
    (folder / "tokenizer.model").write_bytes(tokenizer)

    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    ids = torch.tensor(processor.encode(text[:cut]))
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig.from_dict(CONFIG))
    train(model, ids, options.steps)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2, sort_keys=True) + "\n")


def train_tokenizer(text: str) -> bytes:
    """A SentencePiece model with Gemma's settings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=N_PIECES,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def train(model: Gemma3ForCausalLM, ids: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
    )
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,))
        batch = torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])
        batch[:, 0] = 2  # BOS
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main()
