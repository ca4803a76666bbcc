"""gemma-cli sessions: the conversations that were kept."""

import json as json_module
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_cli.cli import completion, options, output
from gemma_cli.cli import help as help_pages
from gemma_cli.session import (
    Session,
    as_markdown,
    as_messages,
    find_session,
    list_sessions,
    snapshot_path,
    title,
)
from quantize.errors import GemmaError

app = typer.Typer(
    cls=help_pages.Group,
    help="List, show, export and remove kept conversations.",
    epilog="""\
Examples
gemma-cli sessions list
gemma-cli sessions show 2026-11-24-041604 | less
gemma-cli sessions export 2026-11-24-041604 talk.md""",
    no_args_is_help=True,
)


Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="As `gemma-cli sessions list` shows it.",
        autocompletion=completion.session_names,
        show_default=False,
    ),
]


@app.command("list", cls=help_pages.Command)
def list_(json: options.Json = False) -> None:
    """List the conversations, the last one last.

    Each with its name, when it changed, its turns, model and first line.
    """
    described = describe()
    if json:
        output.write_json(described)
    elif described:
        output.write_table(as_rows(described))
    else:
        output.note("No conversation was kept yet: gemma-cli chat keeps each.")


def describe() -> list[dict[str, Any]]:
    """What there is to know of each session; one that is damaged is told of and left out."""
    described: list[dict[str, Any]] = []
    for path in list_sessions():
        try:
            session = Session.open(path, to_write=False)
        except (GemmaError, FileNotFoundError) as error:
            output.note(f"gemma-cli: {error}")
            continue
        changed = datetime.fromtimestamp(path.stat().st_mtime).astimezone()
        described.append(
            {
                "name": session.name,
                "path": str(path),
                "changed": changed.isoformat(timespec="seconds"),
                "turns": len(session.turns),
                "model": session.model,
                "title": title(session),
            }
        )
    return described


def as_rows(described: list[dict[str, Any]]) -> Sequence[tuple[str, ...]]:
    rows = []
    for each in described:
        changed = f"{datetime.fromisoformat(each['changed']):%Y-%m-%d %H:%M}"
        model, first = Path(each["model"]).stem, each["title"]
        shown = first if len(first) <= 50 else first[:47] + "..."
        turns = output.count(each["turns"], "turn")
        rows.append((each["name"], changed, turns, model, shown))
    return rows


@app.command("show", cls=help_pages.Command)
def show(name: Name, json: options.Json = False) -> None:
    """Print a conversation, as Markdown or as a JSON object."""
    session = Session.open(find_session(name), to_write=False)
    if json:
        output.write_json(as_messages(session))
    else:
        output.write(as_markdown(session))


@app.command("export", cls=help_pages.Command)
def export_(
    name: Name,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.md|FILE.json", help="A file that is not there yet.", show_default=False
        ),
    ],
) -> None:
    """Write a conversation to a file, as Markdown or JSON."""
    export(Session.open(find_session(name), to_write=False), file)


def export(session: Session, path: Path) -> None:
    """Raises GemmaError if the file's name is no good, or there is one already."""
    if path.suffix == ".md":
        text = as_markdown(session)
    elif path.suffix == ".json":
        text = json_module.dumps(as_messages(session), ensure_ascii=False, indent=2) + "\n"
    else:
        raise GemmaError(f"{path} must end in .md or .json.")
    data = re.sub("[\ud800-\udfff]", "\ufffd", text).encode()
    try:
        with open(path, "xb") as out:
            out.write(data)
    except FileExistsError:
        raise GemmaError(f"{path} is there already: choose another name.") from None
    except OSError as error:
        raise GemmaError(f"{path} cannot be written: {error.strerror}.") from None


@app.command("rm", cls=help_pages.Command)
def remove(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME",
            help="One or more.",
            autocompletion=completion.session_names,
            show_default=False,
        ),
    ],
) -> None:
    """Remove conversations."""
    for path in [find_session(name) for name in names]:
        snapshot_path(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
