"""gemma-cli completion: what the Tab key offers in a shell.

A shell has the program tell what a word can become (`_complete`), since only that knows the models
and sessions that there are. Nothing is loaded for it but the command line's own modules.
"""

from typing import Annotated, Literal

import typer

from gemma_cli.cli import output
from gemma_cli.models import list_models
from gemma_cli.session import list_sessions

Shell = Literal["bash", "zsh", "fish"]

# Each passes the words up to the cursor, the last of them unfinished, and gets lines of a word and
# what it is. Where there are none, the shell completes names of files.
SCRIPTS: dict[Shell, str] = {
    "bash": r"""
_gemma_cli() {
    local word about
    COMPREPLY=()
    while IFS=$'\t' read -r word about; do
        COMPREPLY+=("$(printf %q "$word")")
    done < <("${1/#\~/$HOME}" _complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o default -F _gemma_cli gemma-cli
""",
    "zsh": r"""
#compdef gemma-cli
_gemma_cli() {
    local word about
    local -a found
    while IFS=$'\t' read -r word about; do
        found+=("${word//:/\\:}${about:+:$about}")
    done < <(${~${(Q)words[1]}} _complete -- "${(@Q)words[2,CURRENT]}" 2>/dev/null)
    if (( $#found )); then
        _describe gemma-cli found
    else
        _files
    fi
}
if [[ $funcstack[1] == _gemma-cli ]]; then
    _gemma_cli "$@"
else
    compdef _gemma_cli gemma-cli
fi
""",
    "fish": r"""
function __gemma_cli_complete
    set -l words (commandline -opc)
    set -l word (commandline -ct)
    set -l found ($words[1] _complete -- $words[2..] "$word" 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\n' $found
    else
        __fish_complete_path "$word"
    end
end
complete -c gemma-cli -f -a '(__gemma_cli_complete)'
""",
}


def completion(
    shell: Annotated[
        Shell, typer.Argument(metavar="bash|zsh|fish", help="The shell.", show_default=False)
    ],
) -> None:
    """Print a script that lets Tab complete.

    It completes commands, options and their values, the names of models and sessions, and files.
    Have your shell read it when it starts; in zsh, after compinit.

    Examples:

    echo 'source <(gemma-cli completion bash)' >> ~/.bashrc

    echo 'source <(gemma-cli completion zsh)' >> ~/.zshrc

    gemma-cli completion fish > ~/.config/fish/completions/gemma-cli.fish
    """
    output.write(SCRIPTS[shell].lstrip())


def complete(context: typer.Context, words: list[str]) -> None:
    """Print what the last word can become, after the other words of a command line."""
    # Click's own resolution of words, which Typer calls for its scripts.
    from typer._completion_classes import BashComplete

    *args, last = words
    # bash takes --model=gem for three words.
    args = [w for i, w in enumerate(args) if not (w == "=" and args[i - 1].startswith("--"))]
    last = last.lstrip("'\"")
    before = last[: last.index("=") + 1] if last.startswith("--") and "=" in last else ""
    group = context.find_root().command
    for item in BashComplete(group, {}, "gemma-cli", "").get_completions(args, last):
        about = (item.help or "").partition(". ")[0]
        output.write(f"{before}{item.value}\t{' '.join(about.split())}\n")


# What options offer


def model_names() -> list[str]:
    return [path.stem for path in list_models()]


def session_names() -> list[str]:
    """What changed last comes first."""
    return [path.stem for path in reversed(list_sessions())]
