"""What to do when a conversation is about to fill its context. Nothing is cut unasked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemma_cli.cli import answering, output, terminal
from gemma_cli.generation import PromptTooLong
from gemma_cli.session import Session
from gemma_cli.text.chat import Turn

if TYPE_CHECKING:
    from gemma_cli.cli.talk import Talk
    from gemma_cli.conversation import Conversation

ROOM = 512  # tokens that an answer should find, or an eighth of the context

SUMMARY_TOKENS = 256
SUMMARISE = (
    "Summarise our conversation so far in at most 120 words. Keep names, numbers, what was decided "
    "and what is still open."
)


def have_room(talk: Talk, turns: Sequence[Turn]) -> bool:
    """Whether these turns of the session, the last of which is to be answered, leave room for that.

    If they do not, someone chooses what to do; False: nothing, and there is to be no answer.
    """
    conversation, session = talk.ready(), talk.session
    limit = talk.max_tokens()
    while True:
        capacity = conversation.cache.capacity
        room = min(ROOM, capacity // 8, *([limit] if limit else []))
        counts = conversation.count(turns[session.n_left :])
        used = sum(counts)
        left = capacity - used
        if left >= room or not talk.choose:
            return True
        choices = {}
        n = _oldest(turns, session.n_left, counts, capacity // 2)
        dropped = n - session.n_left
        if dropped and sum(counts[dropped:]) < capacity and conversation.format != "raw":
            oldest = f"the oldest {dropped} of {len(counts)} turns"
            choices["d"] = f"drop {oldest} from it (the session keeps them)"
            choices["s"] = f"have {oldest} summarised, and the summary in their place"
        longer = talk.longer_context(used + room)
        if longer and longer[0] > used:
            size, n_bytes = longer
            choices["l"] = f"make it larger: {size:,} tokens, {output.size(n_bytes)} of memory"
        if left > 0:
            choices["a"] = "answer all the same, and end where it is full"
        output.note(
            f"The context holds {capacity:,} tokens, "
            + (f"and {left:,} are left for the answer." if left > 0 else f"this takes {used:,}.")
        )
        if not choices:
            output.note("The model takes no more: shorten it.")
            return False
        choices["n"] = "do nothing now"
        match talk.choose(choices):
            case "d":
                session.leave(n)
            case "s":
                if summary := _summarise(conversation, turns[session.n_left : n]):
                    session.leave(n, summary)
            case "l":
                assert longer
                talk.lengthen_context(longer[0])
            case "a":
                return True
            case _:
                return False


def _oldest(turns: Sequence[Turn], n_left: int, counts: Sequence[int], wanted: int) -> int:
    """How many turns are to leave, so that the others have no more than the wanted tokens: up to a
    message of the user, at the most the last one."""
    messages = [n for n in range(n_left, len(turns)) if turns[n].role == "user"]
    for n in messages:
        if sum(counts[n - n_left :]) <= wanted:
            return n
    return messages[-1] if messages else n_left


def _summarise(conversation: Conversation, turns: Sequence[Turn]) -> str:
    """The model's summary of these turns, the first ones of its context; "" if there is none."""
    from gemma_cli.conversation import Conversation
    from gemma_cli.sampling import Sampler, Sampling

    session = Session()
    session.instruct(conversation.session.context[0])
    for turn in [*turns, Turn("user", SUMMARISE)]:
        session.add(turn)
    other = Conversation(
        session,
        conversation.model,
        conversation.tokenizer,
        conversation.cache,
        conversation.format,
    )
    other.cached = conversation.cached  # it begins like the other
    try:
        with (
            terminal.interruptible() as check,
            answering.reading(other.model, other.rewind()) as bar,
        ):

            def progress(done: int) -> None:
                bar(done)
                check()

            answer = other.answer(
                Sampler(Sampling(temperature=0)),
                emit=lambda piece: check(),
                max_tokens=SUMMARY_TOKENS,
                progress=progress,
            )
    except PromptTooLong:
        output.note("They do not fit with what asks for a summary; nothing was changed.")
        return ""
    finally:
        conversation.cached = other.cached
    summary = answer.text.strip()
    if answer.finish_reason == "interrupted" or not summary:
        output.note("There is no summary; nothing was changed.")
        return ""
    output.note(f"In short: {summary}")
    return summary
