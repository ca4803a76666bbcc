"""Options that several commands share, each declared once."""

import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class KV(StrEnum):
    """Formats of the KV cache."""

    F16 = "f16"
    INT8 = "int8"


def one_of(*choices: int) -> Callable[[int], int]:
    def check(value: int) -> int:
        if value not in choices:
            raise typer.BadParameter(f"{value} is not one of {', '.join(map(str, choices))}.")
        return value

    return check


def check_plot(path: Path | None) -> Path | None:
    """Raises a usage error or GemmaError, before any work, if a figure cannot be written there."""
    from gemma_cli.measure import plots

    if path is None:
        return None
    if path.suffix.lower() not in plots.SUFFIXES:
        raise typer.BadParameter(f"{path} does not end with {' or '.join(plots.SUFFIXES)}.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{path} is no file in a folder that exists.")
    plots.require()
    return path


ModelName = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        envvar="GEMMA_CLI_MODEL",
        metavar="FILE|NAME",
        help="A model file, or a name that `gemma-cli models` lists. Default: the only one there.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        max=max(os.cpu_count() or 1, 1),
        metavar="N",
        help="Threads to compute with. Default: one for each core.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

# How a prompt is made.
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw",
        help="Ask for an answer, or for the text to go on. Default: --chat for an "
        "instruction-tuned model, --raw for a base model.",
        show_default=False,
    ),
]
System = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="What the model should know and keep to, in front."),
]
Files = Annotated[
    list[Path] | None,
    typer.Option(
        "-f",
        "--file",
        metavar="FILE",
        help="Text to add after PROMPT, before standard input. Repeatable.",
        show_default=False,
    ),
]

# How an answer is made.
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "-n",
        "--max-tokens",
        min=0,
        metavar="N",
        help="Stop after N tokens. Default: 256 with --raw, else when the context is full.",
        show_default=False,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "-t",
        "--temperature",
        min=0,
        metavar="X",
        help="0 always takes the likeliest token, more is more varied. [default: the "
        "checkpoint's, else 1.0]",
        show_default=False,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Draw from the N likeliest tokens; 0: all. [default: the checkpoint's, else 64]",
        show_default=False,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        metavar="X",
        help="Draw from the likeliest tokens that hold X of the probability. [default: the "
        "checkpoint's, else 0.95]",
        show_default=False,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        metavar="X",
        help="Leave out tokens less likely than X times the likeliest. [default: 0]",
        show_default=False,
    ),
]
RepeatPenalty = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Above 1: make the last 64 tokens less likely to come again. [default: 1]",
        show_default=False,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Fixes the draws: the same seed, the same answer.",
        show_default=False,
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="End the answer before this text. Repeatable.",
        show_default=False,
    ),
]
Draft = Annotated[
    bool,
    typer.Option(
        "--draft/--no-draft",
        help="Guess tokens from what was said before and check several at once: the same answer, "
        "sooner where text repeats.",
    ),
]
Batch = Annotated[
    int,
    typer.Option("--batch", min=1, max=16, metavar="N", help="Answer N lines at a time."),
]
Context = Annotated[
    int | None,
    typer.Option(
        "-c",
        "--context",
        min=1,
        metavar="N",
        help="Tokens that prompt and answer may have. Default: 4096, more for a longer prompt, "
        "as far as the model goes.",
        show_default=False,
    ),
]
KVFormat = Annotated[
    KV,
    typer.Option("--kv", help="How the context is kept in memory; int8 takes half."),
]
SessionName = Annotated[
    str | None,
    typer.Option(
        "--session",
        metavar="NAME",
        help="Go on with this session, or begin it.",
        show_default=False,
    ),
]
Stats = Annotated[bool, typer.Option("--stats", help="Print speeds to standard error.")]
NdJson = Annotated[
    bool,
    typer.Option("--ndjson", help="Print JSON lines: each piece of text, the whole object last."),
]
JsonLines = Annotated[
    bool, typer.Option("--ndjson", "--json", help="Print a JSON object for each line.")
]


def given(**values: float | None) -> dict[str, Any]:
    """The sampling options that were given, checked before a model is loaded for them.

    Raises a usage error if one is out of its range.
    """
    chosen: dict[str, Any] = {name: x for name, x in values.items() if x is not None}
    if not chosen:
        return chosen  # and NumPy, which takes a tenth of a second, can wait
    from gemma_cli.sampling import Sampling

    try:
        Sampling(**chosen)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.") from None
    return chosen
