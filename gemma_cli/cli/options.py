"""Options that several commands share, each declared once."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gemma_cli.cli import completion
from quantize.errors import GemmaError

KV = Literal["f16", "int8"]
"""Formats of the KV cache."""

Cut = Literal["head", "middle", "tail"]
"""Where a prompt that does not fit is cut."""


# The sections of --help.
MODEL = "Model and machine"
PROMPT = "Prompt"
ANSWER = "Answer"
FORM = "Form of the answer"
OUTPUT = "Output"


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
        autocompletion=completion.model_names,
        help="A model file, or a name that `gemma-cli models` lists.",
        show_default="the only one there",
        rich_help_panel=MODEL,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        max=max(os.cpu_count() or 1, 1),
        metavar="N",
        help="Threads to compute with.",
        show_default="one for each core",
        rich_help_panel=MODEL,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)
]

# How a prompt is made.
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw",
        help="Ask for an answer, or for the text to go on.",
        show_default="--chat for an instruction-tuned model",
        rich_help_panel=PROMPT,
    ),
]
System = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="What the model should know and keep to, in front.",
        rich_help_panel=PROMPT,
    ),
]
Files = Annotated[
    list[Path] | None,
    typer.Option(
        "-f",
        "--file",
        metavar="FILE",
        help="Text to add after PROMPT, before standard input. Repeatable.",
        show_default=False,
        rich_help_panel=PROMPT,
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
        help="Stop after N tokens, at the latest when the context is full.",
        show_default="256 with --raw",
        rich_help_panel=ANSWER,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "-t",
        "--temperature",
        min=0,
        metavar="X",
        help="0 always takes the likeliest token, more is more varied.",
        show_default="the checkpoint's, else 1.0",
        rich_help_panel=ANSWER,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Draw from the N likeliest tokens; 0: all.",
        show_default="the checkpoint's, else 64",
        rich_help_panel=ANSWER,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        metavar="X",
        help="Draw from the likeliest tokens that hold X of the probability.",
        show_default="the checkpoint's, else 0.95",
        rich_help_panel=ANSWER,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        metavar="X",
        help="Leave out tokens less likely than X times the likeliest.",
        show_default="0",
        rich_help_panel=ANSWER,
    ),
]
RepeatPenalty = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Above 1: make the last 64 tokens less likely to come again.",
        show_default="1",
        rich_help_panel=ANSWER,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Fixes the draws: the same seed, the same answer.",
        show_default=False,
        rich_help_panel=ANSWER,
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="End the answer before this text. Repeatable.",
        show_default=False,
        rich_help_panel=ANSWER,
    ),
]
JsonSchema = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|TEXT",
        help="Answer in JSON, on one line, as this JSON Schema says.",
        show_default=False,
        rich_help_panel=FORM,
    ),
]
Schema = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="The short form: answer with a JSON object of these properties, for example "
        "'name, age int'. Types: str (if none is said), int, float, bool.",
        show_default=False,
        rich_help_panel=FORM,
    ),
]
Regex = Annotated[
    str | None,
    typer.Option(
        metavar="RE",
        help="Answer with a text that matches this regular expression as a whole.",
        show_default=False,
        rich_help_panel=FORM,
    ),
]
Choice = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="Answer with this text, or with that of another --choice. Repeatable.",
        show_default=False,
        rich_help_panel=FORM,
    ),
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=100,
        metavar="N",
        help="In JSON: each token's logarithm of its probability, and those of the N likeliest.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
Draft = Annotated[
    bool,
    typer.Option(
        "--draft/--no-draft",
        help="Guess tokens from what was said before and check several at once: the same answer, "
        "sooner where text repeats.",
        rich_help_panel=MODEL,
    ),
]
Guard = Annotated[
    bool,
    typer.Option(
        "--guard/--no-guard",
        help="End an answer that says the same again and again, or nothing at all.",
        rich_help_panel=ANSWER,
    ),
]
Batch = Annotated[
    int,
    typer.Option(
        "--batch",
        min=1,
        max=16,
        metavar="N",
        help="Answer N lines at a time.",
        rich_help_panel=MODEL,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        "-c",
        "--context",
        min=1,
        metavar="N",
        help="Tokens that prompt and answer may have. Without it, a longer prompt gets more, as "
        "far as the model goes.",
        show_default="4096",
        rich_help_panel=MODEL,
    ),
]
Truncate = Annotated[
    Cut | None,
    typer.Option(
        help="If a prompt leaves the answer no room in the context, cut its text there rather "
        "than fail: files and standard input (for `map` the line), or PROMPT if that is all.",
        show_default=False,
        rich_help_panel=PROMPT,
    ),
]
KVFormat = Annotated[
    KV,
    typer.Option(
        "--kv",
        help="How the context is kept in memory: f16 with 16 bits a number, int8 with 8.",
        rich_help_panel=MODEL,
    ),
]
SessionName = Annotated[
    str | None,
    typer.Option(
        "--session",
        metavar="NAME",
        autocompletion=completion.session_names,
        help="Go on with this session, or begin it.",
        show_default=False,
        rich_help_panel=PROMPT,
    ),
]
CachePrompt = Annotated[
    bool,
    typer.Option(
        "--cache-prompt",
        help="Keep on the disk what the model has read of the prompt up to its last part (PROMPT, "
        "a file or standard input), so that runs that begin the same need not read it again.",
        rich_help_panel=PROMPT,
    ),
]
Stats = Annotated[
    bool, typer.Option("--stats", help="Print speeds to standard error.", rich_help_panel=OUTPUT)
]
NdJson = Annotated[
    bool,
    typer.Option(
        "--ndjson",
        help="Print JSON lines: each piece of text, the whole object last.",
        rich_help_panel=OUTPUT,
    ),
]
JsonLines = Annotated[
    bool,
    typer.Option(
        "--ndjson", "--json", help="Print a JSON object for each line.", rich_help_panel=OUTPUT
    ),
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


def grammar(
    json_schema: str | None,
    schema: str | None,
    regex: str | None,
    choices: Sequence[str] | None,
    stops: Sequence[str] | None,
) -> str | None:
    """The grammar of the answer's form, or None for any text.

    Raises a usage error, or GemmaError for a file that cannot be read or used.
    """
    forms = {
        "--json-schema": json_schema,
        "--schema": schema,
        "--regex": regex,
        "--choice": choices,
    }
    asked = [name for name, value in forms.items() if value is not None and value != []]
    if not asked:
        return None
    if len(asked) > 1:
        raise typer.BadParameter("An answer has one form.", param_hint=" and ".join(asked))
    if stops:
        raise typer.BadParameter(f"{asked[0]} says where the answer ends.", param_hint="--stop")
    from gemma_cli import constraint

    try:
        if schema is not None:
            return constraint.json_grammar(constraint.short_schema(schema))
        if regex is not None:
            return constraint.regex_grammar(regex)
        if choices:
            return constraint.choice_grammar(choices)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.", param_hint=asked[0]) from None
    assert json_schema is not None
    text, where = json_schema, None
    if not text.lstrip().startswith("{"):
        where = Path(text)
        try:
            text = where.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise GemmaError(f"{where} cannot be read: {reason}.") from None
    try:
        return constraint.json_grammar(text)
    except ValueError as error:
        if where is None:
            raise typer.BadParameter(f"{error}.", param_hint=asked[0]) from None
        raise GemmaError(f"{where} is no JSON Schema that can be kept to: {error}.") from None
