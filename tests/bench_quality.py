"""Measure what quantizing costs beside llama.cpp, from one checkpoint, and print a table in
Markdown.

Not a test. It takes the better part of an hour and 10 GB of disk:

    make bench-quality ARGS='--text wiki.test.raw'
    make bench-quality ARGS='--text wiki.test.raw --chunks 40 --plot quality.svg'

The checkpoint is the demo's Gemma 3 270M, the reference itself in float32; the embedding has 8
bits everywhere. Both sides are calibrated on the text that comes with gemma-cli and what the model
draws itself; the text to measure with (WikiText-2's test part for the figures in README.md) has to
be another. Divergences are those of `gemma-cli eval --base` and of `llama-perplexity
--kl-divergence`, which score the same positions.
What is made stays in `.bench` (`--folder`), as do llama.cpp's programs; see bench_peers.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
from bench_peers import OURS, find_peer, made, note, requantize, run

from gemma_cli import demo
from gemma_cli.measure import own_text, plots
from gemma_cli.measure.calibration import default_text
from gemma_cli.runtime import Model
from gemma_cli.text.tokenizer import Tokenizer
from quantize.errors import GemmaError
from quantize.modelfile import ModelFile

PROGRAMS = ("llama-quantize", "llama-imatrix", "llama-perplexity")

OUR_FILES = {
    "int8": ("--bits", "8"),
    "int4 rtn": ("--method", "rtn"),
    "int4": (),
    "int4 calibrated": ("--calibrate", "own"),
    "int4 gptq": ("--method", "gptq"),
    "int4 gptq, recipe quality": ("--method", "gptq", "--recipe", "quality"),
}
"""Options of `gemma-cli quantize`."""

THEIR_FILES = {
    "Q8_0": False,
    "Q5_0": False,
    "Q4_0": False,
    "IQ4_NL": False,
    "IQ4_NL, importance matrix": True,
}
"""Types of llama-quantize, and whether it is given an importance matrix."""


@dataclass(frozen=True)
class Row:
    engine: str
    format: str
    bits: float  # a weight, in the layers' matrices
    kl: float
    kl_stderr: float
    same_top: float


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench-quality", description="Measure what quantizing costs beside llama.cpp."
    )
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--chunks", type=int, default=40, metavar="N", help="default: 40")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="default: .bench")
    parser.add_argument("--plot", type=Path, metavar="FILE.png|svg")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        peer = find_peer(folder, "native", PROGRAMS)
        note(demo.TERMS)
        rows = [
            *measure_ours(folder, options.text, options.chunks),
            *measure_theirs(folder, peer, options.text, options.chunks),
        ]
        print(table(rows))
        if options.plot:
            draw(options.plot, rows)
    except GemmaError as error:
        sys.exit(f"bench-quality: {error}")


def measure_ours(folder: Path, text: Path, chunks: int) -> list[Row]:
    def convert(*arguments: str) -> partial[object]:
        return partial(lambda path: run(*OURS, "quantize", "demo", *arguments, "-o", path))

    reference = made(folder / "reference.safetensors", convert("--bits", "32"))
    rows = []
    for name, arguments in OUR_FILES.items():
        note(f"gemma-cli, {name}: a few minutes.")
        file = made(folder / f"{slug(name)}.safetensors", convert(*arguments))

        def measure(path: Path, file: Path = file) -> None:
            files = ("-m", file, "--base", reference, "--text", text)
            path.write_text(run(*OURS, "eval", *files, "--chunks", str(chunks), "--json").stdout)

        log = made(file.with_suffix(f".{chunks}.json"), measure)
        said = json.loads(log.read_text())
        kl = said["kl"]
        rows.append(
            Row("gemma-cli", name, our_bits(file), kl["mean"], kl["stderr"], said["same_top"])
        )
    return rows


def measure_theirs(folder: Path, peer: Path, text: Path, chunks: int) -> list[Row]:
    source = demo.demo_checkpoint()
    reference = made(
        folder / "reference.gguf",
        lambda path: requantize(peer, source, path, "F32", "--allow-requantize"),
    )
    calibration = made(folder / "calibration.txt", write_text)
    # Their matrix is of the source, too: its own blocks hold the same weights, and run faster.
    importance = made(
        folder / "importance.gguf",
        lambda path: run(
            peer / "llama-imatrix", "-m", source, "-f", calibration, "-o", path, "--no-ppl"
        ),
    )
    perplexity = (peer / "llama-perplexity", "-f", text, "--chunks", str(chunks))
    base = made(
        folder / f"reference-{chunks}.kld",
        lambda path: run(*perplexity, "-m", reference, "--kl-divergence-base", path),
    )
    rows = []
    for name, weighted in THEIR_FILES.items():
        note(f"llama.cpp, {name}: a few minutes.")
        kind = name.split(",")[0]
        given = ("--imatrix", str(importance)) if weighted else ()

        def convert(path: Path, kind: str = kind, given: tuple[str, ...] = given) -> None:
            requantize(peer, reference, path, kind, *given, "--token-embedding-type", "q8_0")

        file = made(folder / f"{slug(name)}.gguf", convert)

        def measure(path: Path, file: Path = file) -> None:
            compared = ("--kl-divergence", "--kl-divergence-base", base)
            path.write_text(run(*perplexity, "-m", file, *compared).stdout)

        log = made(file.with_suffix(f".{chunks}.txt"), measure)
        rows.append(Row("llama.cpp", name, their_bits(file), *parse_theirs(log.read_text())))
    return rows


def write_text(path: Path) -> None:
    """The text that `--calibrate own` runs the checkpoint over."""
    file = ModelFile.open(path.parent / f"{slug('int8')}.safetensors")
    tokenizer = Tokenizer(file.tokenizer_model)
    drawn = own_text.draw(Model(file), tokenizer.bos_id)
    texts = [default_text(), *(tokenizer.decode(ids[1:].tolist()) for ids in drawn)]
    path.write_text("\n".join(texts), encoding="utf-8", errors="replace")


def parse_theirs(text: str) -> tuple[float, float, float]:
    """The mean divergence, its standard error and the share of the same top token."""
    kl = re.search(r"Mean\s+KLD:\s+([\d.e-]+)\s*±\s*([\d.e-]+)", text)
    same = re.search(r"Same top p:\s+([\d.]+)", text)
    if not kl or not same:
        raise GemmaError("llama-perplexity printed no divergence.")
    return float(kl[1]), float(kl[2]), float(same[1]) / 100


def our_bits(path: Path) -> float:
    matrices = [m for name, m in ModelFile.open(path).matrices.items() if name != "embed"]
    return 8 * sum(m.nbytes for m in matrices) / sum(m.n_out * m.n_in for m in matrices)


def their_bits(path: Path) -> float:
    tensors = gguf.GGUFReader(path).tensors
    matrices = [t for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    return float(8 * sum(t.n_bytes for t in matrices) / sum(t.n_elements for t in matrices))


def slug(name: str) -> str:
    return "quality-" + re.sub(r"\W+", "-", name.lower())


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| engine | format | bits a weight in the layers | KL divergence | same top token |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        digits = 5 if row.kl < 0.01 else 4
        kl = f"{row.kl:.{digits}f} ± {row.kl_stderr:.{digits}f}"
        cells = (row.engine, row.format, f"{row.bits:.2f}", kl, f"{row.same_top:.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, rows: Sequence[Row]) -> None:
    plots.require()
    points = [plots.Point(row.format, row.bits, row.kl, row.kl_stderr, row.engine) for row in rows]
    plots.plot_divergence(path, "Gemma 3 270M, embedding in 8 bits", points)
    note(f"{path} is written.")


if __name__ == "__main__":
    main()
