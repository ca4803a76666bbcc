"""The streams: the answer to standard output, everything else to standard error."""

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from quantize.errors import visible

# C0 but newline and tab, DEL, and C1: a terminal could take them for commands (OWASP LLM05).
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Bytes that are not UTF-8, as Python holds them in a string.
_ESCAPED_BYTE = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """Text that a terminal shows and cannot obey."""
    return _ESCAPED_BYTE.sub("\ufffd", _CONTROL.sub("", text))


def write(text: str) -> None:
    """Writes to standard output at once: cleaned for a terminal, as it is for a file or pipe."""
    sys.stdout.write(clean(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_json(value: object) -> None:
    write(_ESCAPED_BYTE.sub("\ufffd", json.dumps(value, ensure_ascii=False)) + "\n")


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equally many cells in columns, with no frame: easy to read, cut and grep.

    Names in them show all that they hide, and command nothing.
    """
    rows = [[clean(visible(cell)).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows)
    return ["  ".join(row).rstrip() for row in cells]


def note_table(rows: Sequence[Sequence[str]]) -> None:
    """Writes rows to standard error; on a terminal, what is too long stays in the last column."""
    indent = sum(max(map(len, column)) + 2 for column in list(zip(*rows, strict=True))[:-1])
    note("\n".join(table(rows)), indent)


def write_table(rows: Sequence[Sequence[str]]) -> None:
    for line in table(rows):
        write(line + "\n")


def note(text: str, indent: int = 0) -> None:
    """Writes a line to standard error; on a terminal, lines that are wrapped between words.

    Names in it show all that they hide, and command nothing.
    Lines after the first of what is wrapped are indented, if there is room for that.
    """
    text = visible(text)
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns
        wrapper = textwrap.TextWrapper(
            columns,
            subsequent_indent=" " * indent if indent <= columns // 2 else "",
            replace_whitespace=False,
            break_long_words=False,
            break_on_hyphens=False,
        )
        text = "\n".join(map(wrapper.fill, text.split("\n")))
    print(clean(text), file=sys.stderr, flush=True)


def count(n: int, noun: str) -> str:
    """For example "1 token", "2,048 tokens"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def size(n_bytes: float) -> str:
    """For example "151.3 MB", in powers of 1000."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        n_bytes /= 1000
        if n_bytes < 1000:
            return f"{n_bytes:.1f} {unit}"
    return f"{n_bytes / 1000:.1f} TB"


class Update(Protocol):
    """Moves a progress bar to the amount done, with a detail to show beside its label."""

    def __call__(self, done: int, detail: str = "") -> None: ...


@contextmanager
def progress_bar(
    label: str, total: int, *, in_bytes: bool = False, shown: bool = True
) -> Iterator[Update]:
    """Gives a function that moves a bar on standard error.

    Without a terminal there is no bar. The bar goes when all is done, or with the block.
    """
    if not (shown and sys.stderr.isatty()):
        yield lambda done, detail="": None
        return
    from rich import progress
    from rich.console import Console

    amount = progress.DownloadColumn() if in_bytes else progress.MofNCompleteColumn()
    columns = [
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        amount,
        progress.TimeRemainingColumn(),
    ]
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)

        def update(done: int, detail: str = "") -> None:
            bar.update(task, completed=done, description=f"{label} {detail}".rstrip())
            if done >= total:
                bar.stop()

        yield update


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Says what takes so long: a spinner on a terminal, else a line."""
    if not sys.stderr.isatty():
        note(text)
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(clean(text)):
        yield
