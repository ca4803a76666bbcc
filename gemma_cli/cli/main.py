"""The program: its commands, and the one place where failures become sentences and statuses."""

import os
import sys
import traceback
from typing import Annotated

import typer

from gemma_cli import __version__
from gemma_cli.cli import (
    bench,
    chat,
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
from gemma_cli.cli import map as map_lines
from gemma_cli.generation import PromptTooLong
from quantize.errors import GemmaError

app = typer.Typer(
    name="gemma-cli",
    help="Run Google's Gemma on ordinary CPUs.",
    epilog="Start with: gemma-cli quantize demo, then: gemma-cli run 'The capital of France is'",
    no_args_is_help=True,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quantize")(quantize.quantize)
app.command("run")(run.run)
app.command("chat")(chat.chat)
app.command("map")(map_lines.map_lines)
app.command("bench")(bench.bench)
app.command("eval")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("tokenize")(tokenize.tokenize)
app.command("models")(models.models)
app.add_typer(sessions.app, name="sessions")


def _print_version(wanted: bool) -> None:
    if wanted:
        output.write(f"gemma-cli {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


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
            app()
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
