"""Prompts: the turns of Gemma 1 to 3, a transcript for base models, and plain text.

The formats are built in; a template that comes with a checkpoint is never run. Markers are put in
as ids, and a user's text is encoded apart from them, so whatever it spells it stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

from quantize.errors import GemmaError

if TYPE_CHECKING:
    from gemma_cli.text.tokenizer import Tokenizer

START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"

Format = Literal["turns", "transcript", "raw"]
"""How a conversation is laid out for a model: Gemma's turns, lines of a plain transcript, or as the
last text alone, to go on with."""

STOP_TEXTS: dict[Format, tuple[str, ...]] = {
    "turns": (),
    "transcript": ("\nUser:", "\nAssistant:"),
    "raw": (),
}
"""The texts that end an answer, besides the ids that do."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side said. A model's `ids` are its own: its text could be encoded differently."""

    role: Literal["user", "model"]
    text: str
    ids: tuple[int, ...] | None = None


def raw_prompt(tokenizer: Tokenizer, text: str | bytes) -> list[int]:
    """Return the ids of a text to be continued: BOS, once, and the text."""
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def chat_prompt(tokenizer: Tokenizer, turns: Sequence[Turn], system: str | None) -> list[int]:
    """Return the ids of a conversation up to where the model answers, in Gemma's turns.

    As https://ai.google.dev/gemma/docs/core/prompt-structure lays it out and the template of the
    checkpoints does: a turn's text is stripped; there is no system role, so the system text stands
    in front of the first turn. Raises GemmaError if the tokenizer has no turn markers.
    """
    return list(chain.from_iterable(turn_ids(tokenizer, turns, system, "turns")))


def turn_ids(
    tokenizer: Tokenizer, turns: Sequence[Turn], system: str | None, format: Format
) -> list[list[int]]:
    """Return the ids of each turn; joined, they are the prompt.

    The first turn's begin with BOS and the system text. The last turn's go up to where the model
    answers, or, if it is the model's own, to where it goes on. Of a conversation that grows the ids
    only grow. Raises GemmaError if the tokenizer lacks what the format takes.
    """
    parts: list[list[int]] = []
    if format == "raw":
        asked = max(i for i, turn in enumerate(turns) if turn.role == "user")
        parts = [[] for _ in turns[:asked]] + [raw_prompt(tokenizer, turns[asked].text)]
        return parts + [list(turn.ids or ()) for turn in turns[asked + 1 :]]
    layout = _gemma_turn if format == "turns" else _transcript_turn
    prefix = f"{system}\n\n" if system else ""
    for turn in turns:
        opening, said, closing = layout(tokenizer, turn, prefix)
        parts.append([*opening, *said, *closing])
        prefix = ""
    if turns[-1].role == "model":
        del parts[-1][len(parts[-1]) - len(closing) :]
    else:
        parts[-1] += layout(tokenizer, Turn("model", "", ()), "")[0]
    parts[0].insert(0, tokenizer.bos_id)
    return parts


_Layout = tuple[Sequence[int], Sequence[int], Sequence[int]]  # what is before, said, and after


def _gemma_turn(tokenizer: Tokenizer, turn: Turn, prefix: str) -> _Layout:
    start, end = _marker(tokenizer, START_OF_TURN), _marker(tokenizer, END_OF_TURN)
    closing = [end, *tokenizer.encode("\n")]
    if turn.ids is not None:
        return [start, *tokenizer.encode(f"{turn.role}\n{prefix}")], turn.ids, closing
    return [start], tokenizer.encode(f"{turn.role}\n{prefix}{turn.text.strip()}"), closing


def _transcript_turn(tokenizer: Tokenizer, turn: Turn, prefix: str) -> _Layout:
    name = "User:" if turn.role == "user" else "Assistant:"
    newline = tokenizer.encode("\n")
    if turn.ids is not None:
        return tokenizer.encode(prefix + name), turn.ids, newline
    return tokenizer.encode(prefix), tokenizer.encode(f"{name} {turn.text.strip()}"), newline


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that end an answer: EOS, and end-of-turn if the tokenizer has it."""
    end = tokenizer.piece_id(END_OF_TURN)
    return frozenset((tokenizer.eos_id,) if end is None else (tokenizer.eos_id, end))


def _marker(tokenizer: Tokenizer, piece: str) -> int:
    token = tokenizer.piece_id(piece)
    if token is None:
        raise GemmaError(
            f"The model's tokenizer has no {piece}, so it cannot chat; use --raw, or an "
            "instruction-tuned Gemma 1, 2 or 3."
        )
    return token
