"""gemma-cli eval: how good a model is, and what quantizing it has cost."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_cli.cli import loading, options, output
from quantize.errors import GemmaError

if TYPE_CHECKING:
    from gemma_cli.measure.quality import Quality


def evaluate(
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="Plain text to predict.")],
    model: options.ModelName = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            help="The reference to compare with: the same checkpoint with --bits 16 or 32.",
        ),
    ] = None,
    chunks: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Stop after N chunks of 512 tokens. Default: all."),
    ] = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Measure perplexity, and with --base the divergence from a reference.

    The text is cut into chunks of 512 tokens and the second half of each is predicted, as
    llama.cpp's llama-perplexity does it. The Kullback-Leibler divergence is over the whole
    vocabulary, in nats.
    """
    content = loading.read_files([text])[0]
    loaded = loading.load(model, threads)
    reference = None
    if base:
        base_file = loading.open_model(base)
        if base_file.tokenizer_model != loaded.file.tokenizer_model:
            raise GemmaError(
                f"{base_file.path} has another tokenizer than {loaded.file.path}: the reference "
                "must be the same checkpoint."
            )
        reference = loading.load_model(base_file, threads)
    from gemma_cli.measure import quality

    loading.check_context(loaded.file, quality.CHUNK, "--model")
    cut = quality.chunks(loaded.tokenizer.encode(content), loaded.tokenizer.bos_id, chunks)
    if not cut:
        raise GemmaError(
            f"{text} is too short: one chunk takes {quality.CHUNK} tokens; give a longer text."
        )
    with output.progress_bar("Chunks", len(cut)) as progress:
        references = quality.rows_of(reference, cut) if reference else None
        result = quality.measure_quality(loaded.model, cut, references, progress)
    if json:
        output.write_json(described(result))
        return
    rows = [
        ("tokens", f"{result.tokens} in {len(cut)} chunks"),
        ("perplexity", f"{result.perplexity:.4f} ± {result.perplexity_stderr:.4f}"),
    ]
    if kl := result.kl:
        rows += [
            ("divergence", f"{kl.mean:.6f} ± {kl.stderr:.6f} nats"),
            ("", f"median {kl.median:.6f}, 90% {kl.p90:.6f}, 95% {kl.p95:.6f}"),
            ("", f"99% {kl.p99:.6f}, 99.9% {kl.p999:.6f}, max {kl.max:.6f}"),
            ("same top", f"{result.same_top:.2%} ± {result.same_top_stderr:.2%}"),
            (
                "top's change",
                f"{result.top_change:.2%} ± {result.top_change_stderr:.2%} of probability, RMS",
            ),
        ]
    output.write_table(rows)


def described(result: "Quality") -> dict[str, object]:
    """A result as --json shows it."""
    fields: dict[str, object] = {
        "tokens": result.tokens,
        "perplexity": result.perplexity,
        "perplexity_stderr": result.perplexity_stderr,
    }
    if kl := result.kl:
        shown = ("mean", "stderr", "median", "p90", "p99", "max")
        fields["kl"] = {name: getattr(kl, name) for name in shown}
        fields["same_top"] = result.same_top
    return fields
