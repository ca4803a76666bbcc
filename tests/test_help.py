"""--help: readable in any terminal and pipe, with examples, and quick."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from program import Cli
from terminals import Terminal

from gemma_cli.cli.main import COMMANDS

NAMES = [name for commands in COMMANDS.values() for name in commands]
PAGES = [[], *([name] for name in NAMES), *(["sessions", n] for n in ("list", "show", "rm"))]


def pages_id(page: list[str]) -> str:
    return " ".join(page) or "gemma-cli"


@pytest.mark.parametrize("page", PAGES, ids=pages_id)
@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_page(cli: Cli, monkeypatch: pytest.MonkeyPatch, page: list[str], columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    result = cli(*page, "-h")
    assert (result.status, result.err) == (0, "")
    assert result.out == cli(*page, "--help").out
    text, _, examples = result.out.partition("\nExamples:\n")
    # Click makes no lines of less than 50 columns.
    assert max(map(len, text.split("\n"))) <= min(max(columns - 2, 50), 98)
    assert max(map(len, examples.split("\n"))) <= 80
    assert not re.search("(?m)^ .* $", result.out)
    assert re.match(rf"Usage: gemma-cli {pages_id(page) if page else ''}", result.out)
    assert not re.search("<bool>|<str>|[{}\x1b╭│\N{NON-BREAKING HYPHEN}]", text)
    assert not re.search(r"\\\[", text)
    assert examples or page[:1] == ["sessions"]
    assert all("gemma-cli " in line for line in examples.rstrip().split("\n") if line)


def test_every_command_says_in_a_line_what_it_does(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for page in ([], ["sessions"]):
        assert "..." not in cli(*page, "--help").out.partition("Options:")[0].partition("\n")[2]


@pytest.mark.parametrize("setting", [{}, {"TERM": "dumb"}, {"NO_COLOR": "1"}], ids=str)
def test_headings_on_a_terminal(home: Path, setting: dict[str, str]) -> None:
    with Terminal(home, "run", "--help", height=120, **setting) as terminal:
        assert terminal.wait() == 0
        assert "Form of the answer:\n" in terminal.text
        assert (b"\x1b[1mPrompt" in terminal.received) == (not setting)
        assert (b"\x1b" in terminal.received) == (not setting)


def test_help_loads_no_more_than_it_needs() -> None:
    """What takes time: compilers, arrays, and what draws."""
    code = (
        "import sys; sys.argv = ['gemma-cli', '--help']; from gemma_cli.cli import main; "
        "main.execute(); print(*sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split("\n")[-2].split())
    assert "typer" in loaded
    assert not loaded & {"numpy", "numba", "llvmlite", "rich", "prompt_toolkit"}
