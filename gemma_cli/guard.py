"""Answers that have stopped going anywhere.

Small models, and greedy ones most of all, fall into loops: they say the same again and again until
the context is full (Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration",
arXiv:1904.09751), or give markers that are no text. What people ask for repeats itself, too: tables
with empty rows, rulers, arrays of zeros. So a loop is only what goes on, the same to the id, for
longer than those do.
"""

from collections.abc import Sequence

LONGEST = 128
"""Ids of the longest block whose repetition is a loop."""

LOOP = 1024
"""Ids over which a block has to repeat."""

SHORT, SHORT_LOOP = 32, 2048
"""The same for blocks of up to so many ids: rows of a table are such."""

SILENCE = 32
"""Ids without text that follow each other."""

_EVERY = 64  # ids that are looked at together


class Guard:
    """Watches the ids of one answer. It costs a microsecond or two an id."""

    def __init__(self) -> None:
        self._silent = 0

    def stops(self, ids: Sequence[int], text: bytes) -> bool:
        """Tells whether an answer goes round; ids: all so far; text: what the last one adds."""
        self._silent = 0 if text else self._silent + 1
        if self._silent >= SILENCE:
            return True
        return len(ids) % _EVERY == 0 and _is_loop(ids)


def _is_loop(ids: Sequence[int]) -> bool:
    if len(ids) < LOOP:
        return False
    block = next((n for n in range(1, LONGEST + 1) if _repeats(ids, n, LOOP)), None)
    if block is None or block > SHORT:
        return block is not None
    return len(ids) >= SHORT_LOOP and _repeats(ids, block, SHORT_LOOP)


def _repeats(ids: Sequence[int], block: int, length: int) -> bool:
    """Whether the last so many ids are a block of ids, again and again."""
    # Most are not, which their last id tells.
    return ids[-1] == ids[-1 - block] and ids[block - length :] == ids[-length:-block]
