"""gemma-cli eval: how good a model is, and what quantizing it has cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_cli.cli import completion, loading, options, output
from quantize.errors import GemmaError

if TYPE_CHECKING:
    from gemma_cli.measure.quality import Quality
    from gemma_cli.runtime import Model
    from quantize.modelfile import ModelFile


def evaluate(
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="Plain text to predict.")],
    model: options.ModelName = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            autocompletion=completion.model_names,
            help="The reference to compare with: the same checkpoint with --bits 16 or 32.",
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|NAME",
            autocompletion=completion.model_names,
            help="Another model of the same checkpoint, measured after the first; can be given "
            "several times. --json then has `models`, too, a list of all.",
        ),
    ] = None,
    chunks: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Stop after N chunks of 512 tokens. Default: all."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            callback=options.check_plot,
            metavar="FILE.png|svg",
            help="With --base: draw the divergence of all models against their bits per weight "
            "(pip install 'gemma-cli[plot]').",
            show_default=False,
        ),
    ] = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Measure perplexity, and the divergence from a reference.

    --base names the reference. The text is cut into chunks of 512 tokens and the second half of
    each is predicted, as llama.cpp's llama-perplexity does it. The Kullback-Leibler divergence is
    over the whole vocabulary, in nats.

    Examples:

    gemma-cli eval --text wiki.test.raw --chunks 40

    gemma-cli eval -m gemma-int4 --base gemma-bf16 --text book.txt --json

    gemma-cli eval -m A --also B --base REFERENCE --text book.txt --plot kl.svg
    """
    if plot and not base:
        raise typer.BadParameter("A divergence needs a reference: add --base.", param_hint="--plot")
    content = loading.read_files([text])[0]
    loaded = loading.load(model, threads)
    files = [loaded.file, *map(loading.open_model, also or [])]
    base_file = loading.open_model(base) if base else None
    for file in [*files[1:], base_file] if base_file else files[1:]:
        same_rows = file.config.vocab_size == loaded.file.config.vocab_size
        if not same_rows or file.tokenizer_model != loaded.file.tokenizer_model:
            raise GemmaError(
                f"{file.path} has another vocabulary than {loaded.file.path}: only models of the "
                "same checkpoint can be compared."
            )
    reference = loading.load_model(base_file, threads) if base_file else None
    from gemma_cli.measure import quality

    loading.check_context(loaded.file, quality.CHUNK, "--model")
    cut = quality.chunks(loaded.tokenizer.encode(content), loaded.tokenizer.bos_id, chunks)
    if not cut:
        raise GemmaError(
            f"{text} is too short: one chunk takes {quality.CHUNK} tokens; give a longer text."
        )
    with output.progress_bar("Chunks", len(files) * len(cut)) as progress:

        def measure(i: int, model: "Model") -> "Quality":
            references = quality.rows_of(reference, cut) if reference else None
            return quality.measure_quality(
                model, cut, references, lambda done: progress(i * len(cut) + done)
            )

        results = [measure(0, loaded.model)]
        for i, file in enumerate(files[1:], 1):
            results.append(measure(i, loading.load_model(file, threads)))
    if plot:
        draw(plot, f"{text.name}, {len(cut)} chunks", files, results)
    if json:
        fields = described(results[0])
        if also:
            fields["models"] = [
                {"model": str(file.path), "bits_per_weight": file.bits_per_weight}
                | described(result)
                for file, result in zip(files, results, strict=True)
            ]
        output.write_json(fields)
        return
    if not also:
        output.write_table(rows(results[0], len(cut)))
        return
    table: list[tuple[str, str]] = []
    for file, result in zip(files, results, strict=True):
        heading = ("model", f"{file.path.stem}, {file.bits_per_weight:.2f} bits a weight")
        table += [("", "")] * bool(table) + [heading, *rows(result, len(cut))]
    output.write_table(table)


def draw(
    path: Path, title: str, files: "Sequence[ModelFile]", results: "Sequence[Quality]"
) -> None:
    from gemma_cli.measure import plots

    points = [
        plots.Point(file.path.stem, file.bits_per_weight, result.kl.mean, result.kl.stderr)
        for file, result in zip(files, results, strict=True)
        if result.kl
    ]
    plots.plot_divergence(path, title, points)


def rows(result: "Quality", n_chunks: int) -> list[tuple[str, str]]:
    """A result for people to read."""
    shown = [
        ("tokens", f"{result.tokens} in {n_chunks} chunks"),
        ("perplexity", f"{result.perplexity:.4f} ± {result.perplexity_stderr:.4f}"),
    ]
    if kl := result.kl:
        shown += [
            ("divergence", f"{kl.mean:.6f} ± {kl.stderr:.6f} nats"),
            ("", f"median {kl.median:.6f}, 90% {kl.p90:.6f}, 95% {kl.p95:.6f}"),
            ("", f"99% {kl.p99:.6f}, 99.9% {kl.p999:.6f}, max {kl.max:.6f}"),
            ("same top", f"{result.same_top:.2%} ± {result.same_top_stderr:.2%}"),
            (
                "top's change",
                f"{result.top_change:.2%} ± {result.top_change_stderr:.2%} of probability, RMS",
            ),
        ]
    return shown


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
