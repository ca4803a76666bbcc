"""gemma-cli doctor: what this machine has for models, and what may be wrong."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gemma_cli.cli import config, loading, options, output
from gemma_cli.models import config_path, list_models, model_name, models_folder
from quantize.cache import cache_folder
from quantize.errors import GemmaError, visible

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gemma_cli.measure.machine import Needs
    from quantize.config import GemmaConfig

CONTEXT = loading.DEFAULT_CONTEXT


def doctor(
    invocation: typer.Context, threads: options.Threads = None, json: options.Json = False
) -> None:
    """Show what this machine can run, how fast, and what is wrong.

    The CPU's features and the kernels chosen for them, memory and the bandwidth that it is read
    with, the folders, the configuration, and the models: those that are here, and Google's in 4
    bits. Writing a token reads a model's weights once, so the bandwidth bounds the speed; `bench`
    measures what a model reaches. The status is 1 if there is something to mend.

    Examples:

    gemma-cli doctor

    gemma-cli doctor --json | jq '.models[] | select(.fits) | .name'
    """
    problems: list[str] = []
    try:
        config.read_defaults(invocation.find_root())
    except GemmaError as error:
        problems.append(str(error))
    usable = not problems
    found: dict[str, Any] = {
        "cpu": describe_cpu(),
        "compiled": describe_kernels(),
        "memory": describe_memory(threads),
        "config": {
            "path": str(config_path()),
            "exists": config_path().is_file(),
            "usable": usable,
        },
    }
    memory = found["memory"]
    found["models_folder"] = str(models_folder())
    found["models"] = describe_models(memory, problems)
    found["usual"] = describe_usual(memory)
    found["problems"] = problems
    if json:
        output.write_json(found)
    else:
        show(found)
    if problems:
        raise typer.Exit(1)


def describe_cpu() -> dict[str, Any]:
    from gemma_cli.measure.machine import FEATURES, cpu_name
    from gemma_cli.runtime import isa
    from gemma_cli.runtime.model import default_threads

    return {
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "threads": default_threads(),
        "features": {name: isa.FEATURES.get(name, False) for name in FEATURES.get(isa.MACHINE, ())},
        "kernels": isa.NAME,
        "supported": isa.supported(isa.FEATURES),
    }


def describe_kernels() -> dict[str, Any]:
    """Where compiled kernels lie; the import raises GemmaError if others could change them."""
    from gemma_cli.runtime.compilation import FOLDER, needs_compiling

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    return {
        "path": str(FOLDER),
        "ready": not needs_compiling(),
        "bytes": size(FOLDER),
        "cache_bytes": size(cache_folder()),
    }


def describe_memory(threads: int | None) -> dict[str, Any]:
    from gemma_cli.runtime.bandwidth import read_bandwidth
    from gemma_cli.runtime.model import default_threads
    from quantize.memory import memory_left

    wait = output.waiting("Measuring how fast memory is read.")
    with wait if sys.stderr.isatty() else nullcontext():
        gb_s = read_bandwidth(threads or default_threads())
    return {"free": memory_left(), "read_gb_s": gb_s, "threads": threads or default_threads()}


def describe_models(memory: dict[str, Any], problems: list[str]) -> list[dict[str, Any]]:
    """The models in the folder; one that is damaged is a problem and left out."""
    from gemma_cli.measure.machine import needs_of
    from quantize.modelfile import ModelFile

    described = []
    for path in list_models():
        try:
            file = ModelFile.open(path)
        except GemmaError as error:
            problems.append(str(error))
            continue
        needs = needs_of(file.matrices, file.size)
        described.append(_described(model_name(path), file.config, needs, memory))
    return described


def describe_usual(memory: dict[str, Any]) -> list[dict[str, Any]]:
    from gemma_cli.measure.machine import USUAL, needs_of, planned

    described = []
    for name, shape in USUAL.items():
        matrices = planned(shape)
        needs = needs_of(matrices, sum(m.nbytes for m in matrices.values()))
        described.append(_described(name, shape, needs, memory))
    return described


def _described(
    name: str, shape: "GemmaConfig", needs: "Needs", memory: dict[str, Any]
) -> dict[str, Any]:
    context = min(CONTEXT, shape.context_length)
    cache = loading.cache_bytes(shape, context)["f16"]
    free = memory["free"]
    return {
        "name": name,
        "bytes": needs.file_bytes,
        "context": context,
        "cache_bytes": cache,
        "fits": None if free is None else needs.file_bytes + cache <= free,
        "bytes_per_token": needs.bytes_per_token,
        "most_tok_s": needs.most_tok_s(memory["read_gb_s"]),
    }


def show(found: dict[str, Any]) -> None:
    """What was found, for a person."""
    from rich.console import Console

    # What is piped is not to be cut to a width.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    cpu, compiled, memory = found["cpu"], found["compiled"], found["memory"]
    best = cpu["supported"][0]
    chosen = "the best that it has" if cpu["kernels"] == best else f"it has {best}, too"
    ready = "ready" if compiled["ready"] else "to be compiled once, in up to half a minute"
    features = " ".join(name if has else f"no {name}" for name, has in cpu["features"].items())
    free = "unknown" if memory["free"] is None else output.size(memory["free"])
    settings = found["config"]
    state = "in use" if settings["usable"] else "cannot be used"
    rows = {
        "CPU": f"{cpu['name']}, {cpu['cores']} cores",
        "features": features or "none that matter",
        "kernels": f"{cpu['kernels']}: {chosen}; {cpu['threads']} threads",
        "compiled": f"{compiled['path']}: {ready}, {output.size(compiled['bytes'])}; only you can "
        f"write there; all caches hold {output.size(compiled['cache_bytes'])}",
        "memory": f"{free} left; read with {memory['read_gb_s']:.1f} GB/s "
        f"({memory['threads']} threads)",
        "defaults": f"{settings['path']}: {state if settings['exists'] else 'not there'}",
        "models": found["models_folder"],
    }
    if sys.stdout.isatty():
        console.print(_facts(rows))
    else:
        output.write_table(list(rows.items()))
    for heading, models in (
        ("model", found["models"]),
        ("if it were here, in 4 bits", found["usual"]),
    ):
        if models:
            console.print()
            console.print(_table(heading, models))
    for problem in found["problems"]:
        output.note(f"gemma-cli: {problem}")


def _facts(rows: dict[str, str]) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, "bold"), Text(output.clean(visible(value)), overflow="fold"))
    return table


def _table(heading: str, models: list[dict[str, Any]]) -> "RenderableType":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(heading, overflow="fold")
    for name in ("size", "4k context", "fits", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for model in models:
        fits = {True: Text("yes", "green"), False: Text("no", "red"), None: Text("?")}
        speed = (
            f"{model['most_tok_s']:.1f}"
            if model["most_tok_s"] < 10
            else (f"{model['most_tok_s']:.0f}")
        )
        table.add_row(
            Text(output.clean(visible(model["name"]))),
            output.size(model["bytes"]),
            output.size(model["cache_bytes"]),
            fits[model["fits"]],
            f"up to {speed}" if model["fits"] is not False else "-",
        )
    return table
