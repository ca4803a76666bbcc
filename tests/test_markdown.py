"""Markdown that comes piece by piece, on pyte's screens and on one that wraps its lines anew."""

import io
import os
import re
from collections.abc import Callable

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from wcwidth import wcswidth

from gemma_cli.cli import markdown
from gemma_cli.cli.markdown import Block, MarkdownScreen, completed, render, split

TEXT = """\
# Title

A paragraph with `code`, **bold text that is quite long**, *emphasis* and 日本語の文字 in it. It is
long enough for a few lines
and has a line that ends early.

1. first
2. second, with more
   - nested
   - nested again

     and a paragraph
3. third
* other
* list

```python
def f(x):
    return "a string that is too long for a narrow terminal, at least for one of forty columns"


# the end
```
| a | b |
|---|:-:|
| x | 1 |
| <b>y</b> | 2 |

> quoted
> text

***
Setext
------
    indented code

[link](https://example.org/?a=1_b_) and ![image](i.png) & <div>html</div>.
- one

- two
"""


def sizes(columns: int, rows: int) -> Callable[[], os.terminal_size]:
    return lambda: os.terminal_size((columns, rows))


def console(out: io.StringIO) -> Console:
    return Console(file=out, force_terminal=True, color_system="standard", theme=markdown.THEME)


@pytest.fixture(autouse=True)
def always_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHORTEST", "LONGEST", "SETTLING"):
        monkeypatch.setattr(markdown, name, 0.0)


def expected(text: str, columns: int) -> list[str]:
    """The lines of an answer, each block rendered by itself."""
    out = io.StringIO()
    lines: list[str] = []
    for block in split(text):
        rendered = render(Console(file=out, color_system=None), block.source, columns - 1)
        lines += rendered if block.joined else ["", *rendered]
    return [*lines, ""]


def show(
    pieces: list[str], columns: int, rows: int, below: str = ""
) -> tuple[list[str], list[int]]:
    """What is on a screen and in its scrollback in the end, and how far up each drawing went.

    below: what someone types meanwhile.
    """
    out = io.StringIO()
    screen = MarkdownScreen(out, sizes(columns, rows), console(out))
    for n, piece in enumerate(pieces):
        if below:
            screen.show(below[: n + 1])
        screen.write(piece)
    screen.close()
    shown = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.001)
    pyte.Stream(shown).feed(out.getvalue().replace("\n", "\r\n"))
    above = ["".join(line[x].data for x in range(columns)) for line in shown.history.top]
    lines = [line.rstrip() for line in [*above, *shown.display]]
    assert shown.cursor.x == 0
    ups = [int(n) for n in re.findall(r"\x1b\[(\d+)A", out.getvalue())]
    return lines[: len(above) + shown.cursor.y], ups


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (40, 8), (200, 50), (20, 3)])
@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
@pytest.mark.parametrize("below", ["", "> more than fits a line, \u9762\u767d\u3044 " * 9])
def test_an_answer_is_on_the_terminal_once(columns: int, rows: int, size: int, below: str) -> None:
    pieces = [TEXT[i : i + size] for i in range(0, len(TEXT), size)]
    lines, ups = show(pieces, columns, rows, below)
    assert lines == expected(TEXT, min(columns, markdown.WIDEST + 1))
    assert max(ups, default=0) < rows  # no line is drawn again that has left the screen


def test_a_long_block_is_on_the_terminal_once() -> None:
    code = "```c\n" + "".join(f"int line_{n} = {n};\n" for n in range(50)) + "```\n"
    table = "| n | square |\n|---|---|\n" + "".join(f"| {n} | {n * n} |\n" for n in range(50))
    text = f"{code}\n{table}\nThe end."
    lines, ups = show([text[i : i + 9] for i in range(0, len(text), 9)], 80, 24)
    assert lines == expected(text, 80)
    assert max(ups) < 24


def test_code_is_printed_for_good_before_it_ends() -> None:
    code = "```\n" + "".join(f"line {n}\n" for n in range(100))
    out = io.StringIO()
    screen = MarkdownScreen(out, sizes(80, 24), console(out))
    for line in code.splitlines(keepends=True):
        screen.write(line)
    shown = pyte.HistoryScreen(80, 24, history=1000, ratio=0.001)
    pyte.Stream(shown).feed(out.getvalue().replace("\n", "\r\n"))
    above = ["".join(line[x].data for x in range(80)).strip() for line in shown.history.top]
    below = [line.strip() for line in shown.display]
    assert [*above, *below] == ["", *(f"line {n}" for n in range(100)), ""]


def test_what_is_typed_stands_below_the_answer() -> None:
    out = io.StringIO()
    screen = MarkdownScreen(out, sizes(20, 6), console(out))
    shown = pyte.Screen(20, 6)
    stream = pyte.Stream(shown)

    def lines() -> list[str]:
        stream.feed(out.getvalue().replace("\n", "\r\n"))
        out.seek(0)
        out.truncate()
        return [line.rstrip() for line in shown.display]

    screen.show("> early")
    assert lines() == [""] * 6  # A bar may stand there.
    screen.write("One line")
    assert lines() == ["", "One line", "> early", "", "", ""]
    screen.show("> ear")
    assert lines() == ["", "One line", "> ear", "", "", ""]
    screen.show("> the end of what\tis long\nshows")
    assert lines()[2] == "hat is long / shows"
    screen.write(".\n\nAnother.\n")
    assert lines()[1:4] == ["One line.", "", "Another."]
    assert lines()[4] == "hat is long / shows"
    screen.close()
    assert lines() == ["", "One line.", "", "Another.", "", ""]


class ReflowingTerminal:
    """Wraps its lines anew when its width changes, as most terminals do."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.lines = [""]  # the cursor is at the end of the last

    def rows(self, line: str) -> int:
        return max(1, -(-len(line) // self.width))

    def feed(self, data: str) -> None:
        for text in re.findall(r"\x1b\[\d*[A-Za-z]|[^\x1b]+", re.sub(r"\x1b\[[\d;]*m", "", data)):
            if text.endswith("A") and text.startswith("\x1b"):
                up = int(text[2:-1]) - (self.rows(self.lines[-1]) - 1)
                while up > 0:
                    up -= self.rows(self.lines[-2])
                    del self.lines[-1]
                    self.lines[-1] = ""
                assert up == 0  # it went to the beginning of a line
            elif not text.startswith("\x1b"):
                if "\r" in text:  # what is there is drawn anew
                    self.lines[-1] = ""
                *lines, last = text.rpartition("\r")[2].split("\n")
                for line in lines:
                    self.lines[-1] += line
                    self.lines.append("")
                self.lines[-1] += last


@pytest.mark.parametrize("below", ["", "> " + "typed " * 20])
def test_resizing(below: str) -> None:
    text = re.sub("[^\x00-\x7f]", "x", TEXT)
    out = io.StringIO()
    terminal = ReflowingTerminal(80)
    screen = MarkdownScreen(
        out, lambda: os.terminal_size((terminal.width, 50)), Console(file=out, color_system=None)
    )
    for n, start in enumerate(range(0, len(text), 6)):
        screen.write(text[start : start + 6])
        screen.show(below[:n])
        terminal.feed(out.getvalue())
        out.seek(0)
        out.truncate()
        terminal.width = (80, 80, 31, 31, 31, 120, 120)[n % 7]
    screen.close()
    terminal.feed(out.getvalue())

    def letters(lines: list[str]) -> str:
        return re.sub(r"[\s─▌-]", "", "".join(lines))

    assert letters(terminal.lines) == letters(expected(text, 80))


def test_what_is_shown() -> None:
    lines = expected(TEXT, 80)
    shown = "\n".join(lines)
    assert all(wcswidth(line) < 80 for line in lines)
    assert all(line == line.rstrip() for line in lines)
    for text in (
        "\nTitle\n",
        "\n1. first\n2. second, with more\n    • nested\n",
        "\n • other\n • list\n",
        "\ndef f(x):\n    return",
        "<b>y</b>",
        "link (https://example.org/?a=1_b_) and image (i.png) & <div>html</div>.",
        "and has a line that ends early.\n\n",
        "▌ quoted\n▌ text\n",
        "\nindented code\n",
        "\n • one\n • two\n",
    ):
        assert text in shown, text
    for marks in ("**", "`", "#", "|"):
        assert marks not in shown.replace("# the end", "")


def test_colours_are_left_out_where_nobody_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    screen = MarkdownScreen(out, sizes(80, 24), console(out))
    screen.write(TEXT)
    screen.close()
    assert "\x1b[1m" in out.getvalue()  # bold is no colour
    assert not re.search(r"\x1b\[[\d;]*3\d", out.getvalue())


def test_an_answer_cannot_command_the_terminal() -> None:
    out = io.StringIO()
    screen = MarkdownScreen(out, sizes(80, 24), Console(file=out, color_system=None))
    for piece in ("a\x1b]52;c;", "YQ==\x07\x9b2J\r", "[x](\x1b[2J) `\x1b[1A`\n", "\x1b[5A"):
        screen.write(piece)
    screen.close()
    controls = re.sub(r"\x1b\[(\d+A|K|J)|[\n\r]", "", out.getvalue())
    assert not re.search("[\x00-\x1f\x7f-\x9f]", controls)
    assert "5A" not in re.findall(r"\x1b\[(\d+A)", out.getvalue())


def test_nothing_said_is_nothing_shown() -> None:
    out = io.StringIO()
    MarkdownScreen(out, sizes(80, 24), console(out)).close()
    assert out.getvalue() == ""


def without_blank_ends(text: str) -> str:
    return re.sub(r"\A(\s*\n)+", "", text).strip("\n")


FRAGMENTS = st.lists(st.sampled_from([*re.findall(r"[^\n]*\n|\S+ ?", TEXT), "\n", "a", "- ", "  "]))


@given(FRAGMENTS.map("".join), st.data())
def test_what_comes_changes_the_last_block_only(text: str, data: st.DataObject) -> None:
    blocks = split(text)
    joined = "\n".join(block.source for block in blocks)
    assert without_blank_ends(joined) == without_blank_ends(text)
    cut = data.draw(st.integers(0, len(text)))
    begun = split(text[:cut])
    assert begun[:-1] == blocks[: len(begun) - 1]
    # It can be gone on with from the last block alone.
    n, last = len(begun) - 1, begun[-1]
    assert split(last.source + text[cut:], last.joined) == blocks[n:]


@pytest.mark.parametrize(
    ("begun", "shown"),
    [
        ("a **bold", "a **bold**"),
        ("a **bold** and `co", "a **bold** and `co`"),
        ("a `**", "a"),
        ("- item\n- ", "- item"),
        ("1. item\n2", "1. item"),
        ("1. item\n2. ", "1. item"),
        ("in 1998", "in 1998"),
        ("a | b\n--", "a | b"),
        ("`a` ``", "`a"),
        ("", ""),
    ],
)
def test_a_block_that_is_not_at_its_end(begun: str, shown: str) -> None:
    assert completed(begun).rstrip("`") == shown.rstrip("`")


def test_blocks() -> None:
    assert split("1. a\n2. b\n\n3. c\n\ntext") == [
        Block("1. a"),
        Block("2. b\n", joined=True),
        Block("3. c\n\ntext", joined=True),
    ]
    assert split("a\n\nb\n\n") == [Block("a\n"), Block("b\n\n")]
    assert split("\n\n") == [Block("")]
