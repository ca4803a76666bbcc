"""Markdown on a terminal while it comes.

A block (a paragraph, an item of a list, a table, ...) that no text to come can change is printed
for good. Only the last one is drawn again as it grows: the lines of it that changed, and never more
than fit the screen. So nothing flickers, and the scrollback holds the answer once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock
from time import perf_counter, sleep
from typing import TextIO

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, ListItem, Markdown
from rich.segment import Segment, Segments
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

from gemma_cli.cli.output import clean

WIDEST = 100  # columns: longer lines are hard to read

# Seconds between two drawings: as many as keep drawing to a tenth of the time, within bounds.
SHARE, SHORTEST, LONGEST = 0.1, 0.03, 0.5

SETTLING = 0.1  # seconds without a change of size

THEME = Theme({"markdown.code": "bold cyan", "markdown.hr": "dim"})

CLEAR_LINE, CLEAR_BELOW = "\x1b[K", "\x1b[J"  # from the cursor on
DIM, NORMAL = "\x1b[2m", "\x1b[m"
CHANGED = "\0"  # no line


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of Markdown that stands for itself; `joined` to the one before, if it goes on with
    that one's list, so that no blank line comes between them."""

    source: str
    joined: bool = False


@cache
def _parser() -> MarkdownIt:
    # What looks like HTML is text here: a terminal shows none, and nothing may be left out.
    return MarkdownIt().enable(["strikethrough", "table"]).disable(["html_block", "html_inline"])


def split(source: str, joined: bool = False) -> list[Block]:
    """The blocks of a text that grows: what comes can change the last one only, or add to them.

    The items of a list are blocks of their own. `joined` is about the first block.
    """
    lines = source.split("\n")
    starts: list[tuple[int, bool]] = []
    in_list = False
    # The last line has not ended: it could be anything yet, and belongs to what is before it.
    for token in _parser().parse("\n".join([*lines[:-1], ""])):
        if token.map and token.level == 0:
            in_list = token.type in {"bullet_list_open", "ordered_list_open"}
            starts.append((token.map[0], False))
        elif token.map and token.level == 1 and in_list and token.map[0] > starts[-1][0]:
            starts.append((token.map[0], True))
    if not starts:
        return [Block(source.lstrip("\n"), joined)]
    starts[0] = (starts[0][0], joined)
    ends = [start for start, _ in starts[1:]] + [len(lines)]
    return [
        Block("\n".join(lines[start:end]), joined)
        for (start, joined), end in zip(starts, ends, strict=True)
    ]


def is_fence(source: str) -> bool:
    """Whether a block is code between fences: its lines stay as they are when more come."""
    return [token.type for token in _parser().parse(source)] == ["fence"]


_MARKS = "*_`~#|=>- \n"
_NUMBER = re.compile(r"(^|\n)[ \t]*\d+[.)]?$")


def completed(source: str) -> str:
    """The beginning of a block, shown as if it ended here: marks at its end may be no text."""
    source = _NUMBER.sub("", source.rstrip(_MARKS)).rstrip(_MARKS)
    paragraph = source.rpartition("\n\n")[2]
    for mark in ("`", "**"):
        if paragraph.count(mark) % 2:
            return source + mark
    return source


class _Heading(Heading):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Code(CodeBlock):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Nothing around it, so that it can be copied.
        code = str(self.text).rstrip()
        yield Syntax(
            code, self.lexer_name, theme=self.theme, word_wrap=True, background_color="default"
        )


class _Item(ListItem):
    def render_number(
        self, console: Console, options: ConsoleOptions, number: int, last_number: int
    ) -> RenderResult:
        numeral, *rest = super().render_number(console, options, number, last_number)
        assert isinstance(numeral, Segment)
        yield Segment(f"{number}. ".rjust(len(numeral.text)), numeral.style)
        yield from rest


class _Markdown(Markdown):
    elements = Markdown.elements | {
        "heading_open": _Heading,
        "fence": _Code,
        "code_block": _Code,
        "list_item_open": _Item,
    }

    def __init__(self, source: str) -> None:
        # A link is shown with where it goes: a terminal would hide that.
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.parsed = _parser().parse(source)
        for token in self.parsed:
            for child in token.children or ():
                _show(child)


def _show(token: Token) -> None:
    """Models mean the ends of their lines; and an image is shown as its text and its address."""
    if token.type == "softbreak":
        token.type = "hardbreak"
    elif token.type == "image":
        token.type, token.tag = "text", ""
        token.content = f"{token.content} ({token.attrs.get('src', '')})"
        token.children = None


def render(console: Console, source: str, width: int) -> list[str]:
    """The lines of a piece of Markdown as the terminal takes them, no wider than `width` cells.

    There are no blank lines around them.
    """
    options = console.options.update(width=width, height=None)
    shown: list[Segment] = []
    for line in console.render_lines(_Markdown(source), options, pad=False):
        shown += [*_without_blanks(line), Segment.line()]
    with console.capture() as captured:
        console.print(Segments(shown), end="", soft_wrap=True)
    lines = captured.get().strip("\n")
    return lines.split("\n") if lines else []


def _without_blanks(line: list[Segment]) -> list[Segment]:
    """A line without the blanks at its end, which nobody sees until they are copied."""
    while line and not line[-1].text.rstrip():
        line.pop()
    return [*line[:-1], Segment(line[-1].text.rstrip(), line[-1].style)] if line else []


class MarkdownScreen:
    """Prints one answer in Markdown as it comes, after a blank line and with one at its end.

    `size` is asked before each drawing. Between two writes nobody else may move the cursor. Below
    what is drawn stands what `show` was given, until the answer is whole.
    """

    def __init__(
        self,
        out: TextIO,
        size: Callable[[], os.terminal_size],
        console: Console | None = None,
    ) -> None:
        self._out = out
        self._size = size
        self._console = console or Console(file=out, theme=THEME)
        self._open = Block("")  # what is drawn again as it grows
        self._fixed = ""  # its beginning, if that was printed for good: code
        self._n_fixed = 0  # the lines of it
        self._drawn: list[str] = []  # the other lines; the cursor is below them
        self._width = 0
        self._seen: os.terminal_size | None = None
        self._due = 0.0  # when to draw next
        self._below = ""  # what is to stand in the cursor's line
        self._bottom = ""  # what stands there
        self._lock = Lock()  # `show` may be called by another thread

    def write(self, text: str) -> None:
        """Takes the next piece of the answer; it is shown now or with one of the next."""
        with self._lock:
            self._open = Block(self._open.source + clean(text), self._open.joined)
            began = perf_counter()
            if began < self._due:
                return
            if not self._settled():
                self._due = began + SETTLING
                return
            self._draw()
            ended = perf_counter()
            self._due = ended + min(max((ended - began) / SHARE, SHORTEST), LONGEST)

    def show(self, text: str) -> None:
        """Shows one line, the end of it if it is long; before an answer begins, not yet."""
        with self._lock:
            self._below = clean(text).replace("\n", " / ").replace("\t", " ")
            if self._width and self._size() == self._seen:
                self._bottom = self._fitting()
                self._out.write(f"\r{self._bottom}{CLEAR_BELOW}")
                self._out.flush()

    def _fitting(self) -> str:
        """What the screen has room for of the line below."""
        room = max(0, self._width - 1)
        text = self._below[max(0, len(self._below) - room) :]
        while cell_len(text) > room:
            text = text[1:]
        return f"{DIM}{text}{NORMAL}" if text else ""

    def close(self) -> None:
        """Shows all of the answer."""
        self.show("")
        if self._open.source:
            while not self._settled():
                sleep(SETTLING)
            self._draw(whole=True)
            self._out.write("\n")
            self._out.flush()

    def _settled(self) -> bool:
        """Whether the terminal has the size that it had when this was asked before. While someone
        drags its edge, nobody knows where the cursor is."""
        before, self._seen = self._seen, self._size()
        return before in {None, self._seen}

    def _draw(self, whole: bool = False) -> None:
        assert self._seen
        columns, rows = self._seen
        if columns != self._width:
            self._resize(columns)
        *finished, self._open = split(self._open.source, self._open.joined)
        if whole:
            finished.append(self._open)
        lines: list[str] = []
        for block in finished:
            lines += self._lines(block)[self._n_fixed :]
            self._fixed, self._n_fixed = "", 0
        n_final = len(lines)
        if not whole:
            source = self._open.source
            code = is_fence(source)
            growing = self._lines(Block(source if code else completed(source), self._open.joined))
            growing = growing[self._n_fixed :]
            if code and len(growing) > rows // 2:
                n_final += self._fix(source[: source.rfind("\n") + 1])
            lines += growing
        # Of what is drawn again no more than fits; all of it comes when it is finished.
        n_hidden = max(0, len(lines) - n_final - (rows - 1))
        del lines[n_final : n_final + n_hidden]
        self._paint(lines, n_final)

    def _lines(self, block: Block) -> list[str]:
        """A block's lines, with the blank one before it."""
        lines = render(self._console, block.source, min(self._width - 1, WIDEST))
        return lines if block.joined or not lines else ["", *lines]

    def _fix(self, source: str) -> int:
        """Takes a beginning of the open block as final; returns the number of its new lines."""
        before = self._n_fixed
        self._fixed = source
        self._n_fixed = max(before, len(self._lines(Block(source, self._open.joined))))
        return self._n_fixed - before

    def _resize(self, columns: int) -> None:
        # Terminals wrap lines that have become too long; the cursor is in the last row of these.
        if self._drawn or self._bottom:
            lines = [*self._drawn, self._bottom]
            cells = [Text.from_ansi(line).cell_len for line in lines]
            self._drawn = [CHANGED] * (sum(max(1, -(-n // columns)) for n in cells) - 1)
        self._width = columns
        self._n_fixed = len(self._lines(Block(self._fixed, self._open.joined)))

    def _paint(self, lines: Sequence[str], n_final: int) -> None:
        """Makes the drawn lines into these, of which the first n are not drawn again."""
        pairs = zip(self._drawn, lines, strict=False)
        same = next((i for i, (old, new) in enumerate(pairs) if old != new), None)
        if same is None:
            same = min(len(self._drawn), len(lines))
        up = len(self._drawn) - same
        self._drawn = list(lines[n_final:])
        if up or lines[same:]:
            back = f"\x1b[{up}A" if up else ""
            new = "".join(f"{line}{CLEAR_LINE}\n" for line in lines[same:])
            self._bottom = self._fitting()
            self._out.write(f"{back}\r{new}{CLEAR_BELOW}{self._bottom}")
            self._out.flush()
