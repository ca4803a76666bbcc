"""A conversation: what was said, and what holds for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from gemma_cli.text.chat import Turn


@dataclass
class Session:
    """The turns of a conversation and its system text."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    n_answers: int = 0  # ever made, also those withdrawn: the draws of each are its own

    def add(self, turn: Turn) -> None:
        self.turns.append(turn)
        self.n_answers += turn.role == "model"

    def keep(self, n: int) -> None:
        """Withdraws all turns but the first n."""
        del self.turns[n:]
