"""Prompts: the turns of Gemma 1 to 3, and plain text.

The format is built in; a template that comes with a checkpoint is never run. Markers are put in as
ids, and a user's text is encoded apart from them, so whatever it spells it stays text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gemma_cli.text.tokenizer import Tokenizer
from quantize.errors import GemmaError

END_OF_TURN = "<end_of_turn>"


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side said."""

    role: Literal["user", "model"]
    text: str


def raw_prompt(tokenizer: Tokenizer, text: str | bytes) -> list[int]:
    """Return the ids of a text to be continued: BOS, once, and the text."""
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def chat_prompt(tokenizer: Tokenizer, turns: Sequence[Turn], system: str | None) -> list[int]:
    """Return the ids of a conversation up to where the model answers.

    As https://ai.google.dev/gemma/docs/core/prompt-structure lays it out and the template of the
    checkpoints does: a turn's text is stripped; there is no system role, so the system text stands
    in front of the first turn. Raises GemmaError if the tokenizer has no turn markers.
    """
    start, end = _marker(tokenizer, "<start_of_turn>"), _marker(tokenizer, END_OF_TURN)
    newline = tokenizer.encode("\n")
    ids = [tokenizer.bos_id]
    prefix = f"{system}\n\n" if system else ""
    for turn in turns:
        text = tokenizer.encode(f"{turn.role}\n{prefix}{turn.text.strip()}")
        ids += [start, *text, end, *newline]
        prefix = ""
    return [*ids, start, *tokenizer.encode("model\n")]


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
