"""How --help looks: like a manual page, with its options in sections and its examples last, where
they are on the screen when it ends.

Typer would have Rich draw boxes. They leave a terminal of 80 columns half of its width, and loading
what draws them takes as long as the rest of the program.
"""

import os
import re
from typing import TYPE_CHECKING, Any

from typer import BadParameter
from typer.core import TyperCommand, TyperGroup

from gemma_cli.cli import output, terminal
from quantize.errors import visible

if TYPE_CHECKING:
    from typer import Context

WIDEST = 100  # columns; longer lines are hard to read
NAMES = 24  # columns of an option's name; after longer ones a new line begins
_UNBROKEN = "\N{NON-BREAKING HYPHEN}"  # while lines are made

CONTEXT_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": WIDEST,
}


class _Page:
    """What the help of commands and of groups of commands has in common."""

    def get_help(self, ctx: "Context") -> str:
        text: str = super().get_help(ctx)  # type: ignore[misc]
        return text.replace(_UNBROKEN, "-")

    def collect_usage_pieces(self, ctx: "Context") -> list[str]:
        pieces: list[str] = super().collect_usage_pieces(ctx)  # type: ignore[misc]
        return [re.sub(r"^\{(.*)\}", r"\1", piece) for piece in pieces]


class Command(_Page, TyperCommand):  # type: ignore[misc]
    """A command whose docstring ends in examples, if it has any: after a paragraph "Examples:",
    each line is one. They are shown as they are."""

    def format_help_text(self, ctx: "Context", formatter: Any) -> None:  # type: ignore[override]
        _write_text(formatter, (self.help or "").partition("\n\nExamples:\n")[0])

    def format_options(self, ctx: "Context", formatter: Any) -> None:  # type: ignore[override]
        _write_options(self, ctx, formatter)

    def format_epilog(self, ctx: "Context", formatter: Any) -> None:  # type: ignore[override]
        _, _, examples = (self.help or "").partition("\n\nExamples:\n")
        if examples:
            with formatter.section(_bold("Examples")):
                for line in filter(None, examples.split("\n")):
                    formatter.write(f"  {line}\n")


class Group(_Page, TyperGroup):  # type: ignore[misc]
    """Commands, also in sections; of the epilog each paragraph is a section, its first line the
    heading and the others a name and what there is to say of it, two blanks apart."""

    def invoke(self, ctx: "Context") -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except BadParameter as error:  # names of files can stand in it
            error.message = output.clean(visible(error.message))
            raise

    def format_help_text(self, ctx: "Context", formatter: Any) -> None:  # type: ignore[override]
        _write_text(formatter, self.help or "")

    def format_options(self, ctx: "Context", formatter: Any) -> None:  # type: ignore[override]
        self.format_commands(ctx, formatter)
        _write_options(self, ctx, formatter)

    def format_commands(self, ctx: "Context", formatter: Any) -> None:  # type: ignore[override]
        shown = {name: command for name, command in self.commands.items() if not command.hidden}
        width = max(map(len, shown))
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, command in shown.items():
            heading = getattr(command, "rich_help_panel", None) or "Commands"
            about = command.get_short_help_str(formatter.width - width - 6)
            sections.setdefault(heading, []).append((name, about))
        _write_sections(formatter, sections)

    def format_epilog(self, ctx: "Context", formatter: Any) -> None:  # type: ignore[override]
        for paragraph in filter(None, (self.epilog or "").split("\n\n")):
            heading, *lines = paragraph.split("\n")
            rows = [(name, about.strip()) for name, _, about in (n.partition("  ") for n in lines)]
            _write_sections(formatter, {heading: rows})


def _write_text(formatter: Any, text: str) -> None:
    formatter.write_paragraph()
    with formatter.indentation():
        formatter.write_text(_unbroken(text))


def _write_options(command: Any, ctx: "Context", formatter: Any) -> None:
    sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    *params, last = command.get_params(ctx)  # the last one is --help
    for param in params:
        if record := param.get_help_record(ctx):
            name, about = record
            heading = getattr(param, "rich_help_panel", None)
            if param.param_type_name == "argument":
                name, heading = param.metavar or name, heading or "Arguments"
            # Typer sets a text in the place of a default off from a value.
            about = re.sub(r"default: \((.*?)\)(?=[;\]])", r"default: \1", about)
            sections.setdefault(heading or "Options", []).append((name, about))
    found = [heading for heading, rows in sections.items() if rows and heading != "Arguments"]
    sections[found[-1] if found else "Options"].append(last.get_help_record(ctx))
    _write_sections(formatter, sections)


def _write_sections(formatter: Any, sections: dict[str, list[tuple[str, str]]]) -> None:
    """Sections of names and what there is to say of them, all in the same two columns."""
    names = [name for rows in sections.values() for name, _ in rows]
    width = max((len(name) for name in names if len(name) <= NAMES), default=NAMES)
    for heading, rows in sections.items():
        if rows:
            with formatter.section(_bold(heading)):
                padded = [
                    (name.ljust(width) if about else name, _unbroken(about)) for name, about in rows
                ]
                formatter.write_dl(padded, col_max=width)


def _unbroken(text: str) -> str:
    """Keeps what is to be copied, as gemma-cli or --max-tokens, from being cut at its hyphens."""
    return re.sub(r"(?<=\w)-(?=\w)", _UNBROKEN, text)


def _bold(text: str) -> str:
    plain = os.environ.get("NO_COLOR") or not terminal.shows_more_than_lines()
    return text if plain else f"\x1b[1m{text}\x1b[22m"
