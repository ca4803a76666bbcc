"""The program: its commands, and the one place where failures become sentences and statuses."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from gemma_cli import __version__
from gemma_cli.cli import (
    bench,
    chat,
    completion,
    config,
    doctor,
    evaluate,
    inspect,
    models,
    output,
    quantize,
    run,
    sessions,
    signals,
    tokenize,
    verify,
)
from gemma_cli.cli import help as help_pages
from gemma_cli.cli import map as map_lines
from gemma_cli.generation import PromptTooLong
from quantize.errors import GemmaError
from quantize.memory import check_memory

COMMANDS: dict[str, dict[str, Callable[..., None] | typer.Typer]] = {
    "Use a model": {
        "run": run.run,
        "chat": chat.chat,
        "map": map_lines.map_lines,
        "sessions": sessions.app,
    },
    "Get a model": {
        "quantize": quantize.quantize,
        "models": models.models,
        "inspect": inspect.inspect,
        "verify": verify.verify,
    },
    "Measure": {
        "bench": bench.bench,
        "eval": evaluate.evaluate,
        "tokenize": tokenize.tokenize,
    },
    "Around it": {
        "doctor": doctor.doctor,
        "config": config.config,
        "completion": completion.completion,
    },
}

ABOUT = """\
Environment
GEMMA_CLI_MODEL  The model to use without -m.
GEMMA_CLI_HOME  A folder for models, sessions, compiled kernels and the configuration.
GEMMA_CLI_ISA  Instructions to use; `gemma-cli doctor` shows which this CPU has.
NO_COLOR  Set to anything: no colours.

Statuses
0  Done.
1  Failed; one sentence on standard error says why.
2  Wrong usage.
3  The prompt does not fit the context.
130  Interrupted.
141  What reads the output went away.

Examples
gemma-cli quantize demo
gemma-cli run "The capital of France is"
git diff | gemma-cli run "Write a commit message."
gemma-cli chat"""

app = typer.Typer(
    name="gemma-cli",
    cls=help_pages.Group,
    help="Run Google's Gemma on ordinary CPUs.",
    epilog=ABOUT,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings=help_pages.CONTEXT_SETTINGS,
)
for heading, commands in COMMANDS.items():
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=heading)
        else:
            app.command(name, cls=help_pages.Command, rich_help_panel=heading)(command)
app.command(
    "_complete",
    cls=help_pages.Command,
    hidden=True,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
)(completion.complete)


_BYTES, _MAPPED = 50_000_000, 100_000_000 + 40_000_000 * (os.cpu_count() or 1)
"""What the program takes before it does anything, and in addresses: those of its threads most."""


def _print_version(wanted: bool) -> None:
    if wanted:
        output.write(f"gemma-cli {__version__}\n")
        raise typer.Exit


WITHOUT_DEFAULTS = ("config", "doctor", "completion", "_complete")
"""Commands that work, too, where the configuration file cannot be used."""


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    asks_for_help = {"-h", "--help"} & set(sys.argv)
    if context.invoked_subcommand not in WITHOUT_DEFAULTS and not asks_for_help:
        context.default_map = config.read_defaults(context)


def main() -> None:
    """Runs the command line and leaves with its status."""
    signals.prepare()
    status = execute()
    # Python would take another 0.3 s to take LLVM apart.
    os._exit(status)


def execute() -> int:
    """Runs the command line; returns a status of the contract (0, 1, 2, 3, 130, 141)."""
    _prepare_streams()
    try:
        try:
            # Where NumPy is loaded, its library of linear algebra would complain in its own words.
            check_memory(_BYTES, "gemma-cli takes at least", "end other programs", mapped=_MAPPED)
            app(prog_name="gemma-cli")
        finally:
            sys.stdout.flush()
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 0
    except GemmaError as error:
        output.note(f"gemma-cli: {error}")
        return 3 if isinstance(error, PromptTooLong) else 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        output.note(f"gemma-cli: {where}{error.strerror or error}.")
    except MemoryError:
        output.note("gemma-cli: There is not enough memory; try a smaller -c/--context.")
    except Exception as error:
        if os.environ.get("GEMMA_CLI_TRACEBACK"):
            traceback.print_exc()
        output.note(
            f"gemma-cli: This is an error of gemma-cli itself ({type(error).__name__}: {error}). "
            "Please report it with what GEMMA_CLI_TRACEBACK=1 shows."
        )
    return 1


def _prepare_streams() -> None:
    """UTF-8 whatever the locale, and bytes that are not UTF-8 kept."""
    # A stream that the caller closed (`>&-`) is None.
    null = open(os.devnull, "r+", encoding="utf-8")  # noqa: SIM115 (open to the end)
    sys.stdin, sys.stdout, sys.stderr = sys.stdin or null, sys.stdout or null, sys.stderr or null
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
