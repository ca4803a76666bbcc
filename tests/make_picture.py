"""Makes the README's picture of a chat: what a terminal shows of a real one, as SVG.

    python tests/make_picture.py [--model NAME]

Not a test. It wants the model, which `gemma-cli quantize demo --bits 8` makes, in the usual place
or in $GEMMA_CLI_HOME. Nothing of the conversation is kept, and with temperature 0 it is the same
on every machine that rounds alike; only the speed in the status line is its own.
"""

import argparse
import io
import re
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text
from terminals import Terminal

from gemma_cli.models import models_folder
from quantize.cache import cache_folder

PICTURE = Path(__file__).parents[1] / ".github" / "chat.svg"
WIDTH, HEIGHT = 84, 25
SAID = (
    "What is the capital of France?",
    "What is water made of?",
    "What is 2 + 3?",
    "/tokens",
)
PYTE_NAMES = {"brown": "yellow", "brightbrown": "bright_yellow", "default": "default"}
"""Colours that pyte calls otherwise than Rich does."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="gemma-3-270m-int8")
    model = parser.parse_args().model
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        (home / "models").symlink_to(models_folder())
        (home / "cache").symlink_to(cache_folder())
        args = ("chat", "-m", model, "-t", "0")
        with Terminal(
            *(home, *args), width=WIDTH, height=HEIGHT, TERM="xterm-256color", NO_COLOR=""
        ) as terminal:
            terminal.wait_for("tokens left|of [0-9,]+ tokens")
            for n, text in enumerate(SAID, 1):
                terminal.type(f"{text}\r")
                terminal.wait_for(prompts(n + 1))
            draw(terminal, f"gemma-cli chat -m {model} -t 0")


def prompts(n: int) -> str:
    """A pattern of the n-th prompt."""
    return rf"(?:(?:^|\n)>(?: .*)?\n[\s\S]*?){{{n}}}\Z"


def draw(terminal: Terminal, title: str) -> None:
    rows = [*terminal.screen.history.top]
    rows += [terminal.screen.buffer[y] for y in range(terminal.screen.lines)]
    lines = [text(row) for row in rows]
    while lines and not lines[0].plain:
        del lines[0]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text("\n").join(lines), overflow="crop", no_wrap=True)
    svg = console.export_svg(title=title, unique_id="chat")
    # Pictures on a page can load nothing, so that Rich's font would never come.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(re.sub(r"[ \t]+\n", "\n", svg))
    print(f"{PICTURE}: {len(svg)} bytes")


def text(row: Any) -> Text:
    """A line of pyte's screen for Rich."""
    shown = Text()
    for _, alike in groupby((row[x] for x in range(WIDTH)), lambda cell: cell[1:]):
        cells = list(alike)
        cell = cells[0]
        style = Style(
            color=color(cell.fg),
            bgcolor=color(cell.bg),
            bold=cell.bold,
            italic=cell.italics,
            underline=cell.underscore,
            reverse=cell.reverse,
        )
        shown.append("".join(each.data for each in cells), style)
    shown.rstrip()
    return shown


def color(name: str) -> Color | None:
    if re.fullmatch("[0-9a-f]{6}", name):
        return Color.parse(f"#{name}")
    name = PYTE_NAMES.get(name, name.replace("bright", "bright_"))
    return None if name == "default" else Color.parse(name)


if __name__ == "__main__":
    main()
