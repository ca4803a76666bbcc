"""What a machine has for a model, and what a Gemma asks of it: known before either meets."""

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma_cli.runtime.model import bytes_per_token
from quantize.config import GemmaConfig
from quantize.modelfile import MatrixSpec
from quantize.packing import LINEAR_LEVELS
from quantize.recipe import choose, rules_of
from quantize.tensors import matrix_shapes

FEATURES = {
    "x86": ("avx2", "fma", "f16c", "avxvnni", "avx512bw", "avx512vnni", "avx512bf16", "amx-bf16"),
    "arm": ("neon", "dotprod", "i8mm"),
}
"""What the instruction sets of runtime/isa.py are made of, by the CPU's family and LLVM's names."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What running a model takes."""

    file_bytes: int
    bytes_per_token: int
    """That decoding one token reads."""

    def most_tok_s(self, read_gb_s: float) -> float:
        """Tokens a second that a memory with this read bandwidth (10^9 bytes a second) allows."""
        return read_gb_s * 1e9 / self.bytes_per_token


def needs_of(matrices: Mapping[str, MatrixSpec], file_bytes: int) -> Needs:
    return Needs(file_bytes, bytes_per_token(matrices))


def planned(config: GemmaConfig, bits: int = 4) -> dict[str, MatrixSpec]:
    """The matrices that `quantize` makes by default of a model of this shape."""
    rules = rules_of("default", bits, 32)
    specs = {}
    for name, (n_out, n_in) in matrix_shapes(config).items():
        rule = choose(rules, name)
        codebook = LINEAR_LEVELS if rule.format == "int4_dq" else None
        specs[name] = MatrixSpec(rule.format, n_out, n_in, rule.group_size, codebook)
    return specs


def cpu_name() -> str:
    """What its maker calls the CPU, or what is known of it."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _gemma(
    generation: str,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    n_layers: int,
    heads: tuple[int, int, int],
    context_length: int,
    window: int = 0,
    every: int = 0,
) -> GemmaConfig:
    """The shape of a model; heads: of queries, of keys, and their width; every: one layer of so
    many is global, the others have the window. What else there is to a model is left neutral."""
    slides = tuple(bool(every) and i % every != every - 1 for i in range(n_layers))
    return GemmaConfig(
        generation=generation,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        n_layers=n_layers,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        head_dim=heads[2],
        context_length=context_length,
        rms_norm_eps=1e-6,
        query_scale=heads[2] ** -0.5,
        rope_base=1e4,
        rope_scale=1.0,
        rope_local_base=1e4,
        sliding_window=window,
        sliding_layers=slides,
        attention_soft_cap=0.0,
        final_soft_cap=0.0,
    ).checked(generation)


USUAL = {
    "Gemma 3 270M": _gemma("gemma3", 262_144, 640, 2048, 18, (4, 1, 256), 32_768, 512, 6),
    "Gemma 3 1B": _gemma("gemma3", 262_144, 1152, 6912, 26, (4, 1, 256), 32_768, 512, 6),
    "Gemma 3 4B": _gemma("gemma3", 262_208, 2560, 10_240, 34, (8, 4, 256), 131_072, 1024, 6),
    "Gemma 3 12B": _gemma("gemma3", 262_208, 3840, 15_360, 48, (16, 8, 256), 131_072, 1024, 6),
    "Gemma 3 27B": _gemma("gemma3", 262_208, 5376, 21_504, 62, (32, 16, 128), 131_072, 1024, 6),
    "Gemma 2 2B": _gemma("gemma2", 256_000, 2304, 9216, 26, (8, 4, 256), 8192, 4096, 2),
    "Gemma 2 9B": _gemma("gemma2", 256_000, 3584, 14_336, 42, (16, 8, 256), 8192, 4096, 2),
    "Gemma 2 27B": _gemma("gemma2", 256_000, 4608, 36_864, 46, (32, 16, 128), 8192, 4096, 2),
    "Gemma 1 2B": _gemma("gemma", 256_000, 2048, 16_384, 18, (8, 1, 256), 8192),
    "Gemma 1 7B": _gemma("gemma", 256_000, 3072, 24_576, 28, (16, 16, 256), 8192),
}
"""The text models that Google has released, from the configurations that come with them."""
