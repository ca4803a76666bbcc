"""gemma-cli tokenize: the ids and pieces of a text."""

import sys
from typing import Annotated

import typer

from gemma_cli.cli import loading, options, output


def tokenize(
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="Default: standard input, if piped.")
    ] = None,
    model: options.ModelName = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="The whole prompt of a chat's first turn, as the model sees it."
        ),
    ] = False,
    system: options.System = None,
    count: Annotated[bool, typer.Option("--count", help="Only how many there are.")] = False,
    json: options.Json = False,
) -> None:
    """Show the ids and pieces of a text, one to a line.

    BOS, the beginning of a prompt, comes with --chat only.

    Examples:

    gemma-cli tokenize "The capital of France is"

    gemma-cli tokenize --count < book.txt

    gemma-cli tokenize --chat --system "Be terse." "Hello"
    """
    if text is None:
        if sys.stdin.isatty():
            raise typer.BadParameter(
                "There is no text: give it as an argument or on standard input.",
                param_hint="TEXT",
            )
        text = sys.stdin.read()
    if system and not chat:
        raise typer.BadParameter("A system text needs --chat.", param_hint="--system")
    tokenizer = loading.load_tokenizer(loading.open_model(model))
    ids = loading.prompt_ids(tokenizer, text, system, chat=True) if chat else tokenizer.encode(text)
    if count:
        if json:
            output.write_json({"count": len(ids)})
        else:
            output.write(f"{len(ids)}\n")
        return
    pieces = [tokenizer.piece(token) for token in ids]
    if json:
        output.write_json({"ids": ids, "pieces": pieces})
    elif ids:
        width = len(str(tokenizer.vocab_size))
        # A piece can be a newline; shown as Python spells it, it stays on its line.
        shown = (piece if piece.isprintable() else repr(piece)[1:-1] for piece in pieces)
        output.write("".join(f"{i:>{width}}  {p}\n" for i, p in zip(ids, shown, strict=True)))
