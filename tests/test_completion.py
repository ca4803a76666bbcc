"""Tab in real shells, and what the program tells them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from program import Cli, program
from terminals import START_OTHER, Terminal

CLEAR_LINE = "\x15"

SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "source <(gemma-cli completion bash)"),
    "zsh": (
        ["zsh", "-f", "-i"],
        "autoload -Uz compinit; compinit -u -D; source <(gemma-cli completion zsh)",
    ),
    "fish": (["fish", "-N", "-i"], "gemma-cli completion fish | source"),
}
# What is typed before Tab, and what the line becomes.
COMPLETED = {
    "ls | gemma-cli map --choi": "ls | gemma-cli map --choice ",
    "gemma-cli run -m ch": "gemma-cli run -m chat ",
    "gemma-cli run --model=ba": "gemma-cli run --model=base ",
    "gemma-cli chat --session di": "gemma-cli chat --session diary ",
    "gemma-cli sessions show di": "gemma-cli sessions show diary ",
    "gemma-cli run -f note": "gemma-cli run -f notes.txt ",
    "gemma-cli quantize demo --adapter lo": "gemma-cli quantize demo --adapter lora/",
}


def offered(cli: Cli, *words: str) -> list[str]:
    result = cli("_complete", "--", *words)
    assert (result.status, result.err) == (0, "")
    return [line.split("\t")[0] for line in result.out.splitlines()]


def test_what_a_word_can_become(cli: Cli, home: Path) -> None:
    assert {"run", "chat", "map", "sessions", "quantize"} <= set(offered(cli, ""))
    assert "_complete" not in offered(cli, "")
    for words in (("run", "-m"), ("chat", "--model"), ("eval", "--base"), ("run", "--model", "=")):
        assert offered(cli, *words, "") == ["base", "chat"]
    assert offered(cli, "run", "-m", "b") == offered(cli, "run", "-t", "0", "-m", "b") == ["base"]
    assert offered(cli, "run", "--model=b") == ["--model=base"]
    assert offered(cli, "quantize", "demo", "--method", "") == ["rtn", "search", "gptq"]
    assert offered(cli, "quantize", "demo", "--bits", "") == ["4", "8", "16", "32"]
    assert offered(cli, "run", "--temp") == ["--temperature"]
    assert set(offered(cli, "sessions", "")) == {"list", "show", "export", "rm"}
    # Names of files are the shell's.
    for words in (("run", "-f", ""), ("quantize", ""), ("run", "-m", "./")):
        assert offered(cli, *words) == []


def test_nothing_heavy_is_loaded_for_it(home: Path) -> None:
    command, environment = program(home)
    code = (
        "import sys; sys.argv[0] = 'gemma-cli'; from gemma_cli.cli import main; main.execute(); "
        "print(*sys.modules)"
    )
    result = subprocess.run(
        [command[0], "-c", code, "_complete", "--", "run", "-m", ""],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    *lines, modules = result.stdout.splitlines()
    assert lines == ["base\t", "chat\t"]
    assert not {"numpy", "numba", "rich", "prompt_toolkit"} & set(modules.split())


@pytest.mark.parametrize("shell", [shell for shell in SHELLS if shutil.which(shell)])
def test_in_a_shell(home: Path, tmp_path: Path, shell: str) -> None:
    command, setup = SHELLS[shell]
    for name in ("notes.txt", "lora/weights", "bin/gemma-cli", "state/sessions/diary.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "models").symlink_to(home / "models")
    start = tmp_path / "bin" / "gemma-cli"
    start.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gemma_cli "$@"\n')
    start.chmod(0o755)
    path = f"{start.parent}:{program(home)[1]['PATH']}"
    with Terminal(
        *(tmp_path, *command),
        start=START_OTHER,
        width=200,
        timeout=180,
        **{"PATH": path, "HOME": str(tmp_path), "PS1": "$ ", "HISTFILE": ""},
    ) as terminal:
        terminal.wait_for("[$#>%]")
        terminal.type(f"cd {tmp_path}; {setup}; echo rea''dy\n")
        terminal.wait_for("(?m)^ready")
        for typed, completed in COMPLETED.items():
            terminal.type(f"{typed}\tX")
            terminal.wait_for(re.escape(f"{completed}X"))
            terminal.type(CLEAR_LINE)
