"""Drafts of what comes next, taken from what was there before: prompt lookup.

Apoorv Saxena, "Prompt Lookup Decoding" (2023), github.com/apoorvumang/prompt-lookup-decoding: what
is summarized, corrected or continued is often said again. The model checks a whole draft at once,
reading its weights once.
"""

from collections.abc import Sequence
from itertools import cycle, islice

LONGEST = 7
"""Ids of a draft: with the id before them as many tokens as a CPU with AVX-512 multiplies at once.
More take twice the time, and are right less often."""

NGRAMS = (3, 2)  # ids that must have been there before, the longer ones first

# A draft, with the id before it, is twice as long as what was right of the one before. What drafts
# gain is theirs to lose, counted in the time of one id without a draft; where nothing repeats, an
# answer loses no more than CREDIT and then the INCOME.
SHORTEST = 3
COST = 0.2  # of each id in a draft
CREDIT = 1.0  # at first
INCOME = 0.01  # for each id of the answer
MOST_CREDIT = 2 * COST * LONGEST  # more would put off the end of drafts that are wrong


class PromptLookup:
    """Makes drafts for one answer. They change its speed and not its ids."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram: where its last occurrence ends
        self._indexed = NGRAMS[0]  # the n-grams that end before this are in it
        self._length = len(prompt_ids)
        self._size = SHORTEST
        self._drafted = 0
        self._credit = CREDIT

    def draft(self, context: Sequence[int], most: int) -> list[int]:
        """Up to `most` ids that may come after the context; [] if none are worth their time.

        The context is the prompt and the answer so far. Since the last draft it has grown by what
        was right of it and one id more.
        """
        new = len(context) - self._length
        if self._drafted:
            self._size = max(SHORTEST, 2 * new - 1)
        self._credit += (new - 1) - COST * self._drafted + INCOME * new
        self._credit = min(self._credit, MOST_CREDIT)
        self._length = len(context)
        size = min(self._size, LONGEST, most, int(self._credit / COST))
        draft = self._look_up(context, size) if size > 0 else []
        self._drafted = len(draft)
        return draft

    def skip(self, context: Sequence[int], certain: int) -> None:
        """In place of a draft: as many ids that come after the context are certain anyway."""
        self._length = len(context) + certain
        self._drafted = 0

    def _look_up(self, context: Sequence[int], size: int) -> list[int]:
        """What came after the last n-gram when it was there before; [] if it was not."""
        for end in range(self._indexed, len(context)):
            for n in NGRAMS:
                self._ends[tuple(context[end - n : end])] = end
        self._indexed = max(self._indexed, len(context))
        for n in NGRAMS:
            end = self._ends.get(tuple(context[-n:]), 0)
            if end:
                # What came after may be no more than what repeats: it goes round.
                return list(islice(cycle(context[end : end + size]), size))
        return []
