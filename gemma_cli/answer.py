"""Answers as they grow: ids to text, stop texts, the reason for its end, and its timing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from gemma_cli.generation import (
    BATCH_SIZE,
    FinishReason,
    PromptTooLong,
    generate,
    generate_batch,
)
from gemma_cli.guard import Guard
from gemma_cli.text.chat import stop_ids
from gemma_cli.text.stream import StreamDecoder

if TYPE_CHECKING:
    from gemma_cli.runtime import KVCache, Model
    from gemma_cli.sampling import Logprobs, Sampler
    from gemma_cli.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Answer:
    """One answer. `text` and `ids` grow while it is made; times are in seconds."""

    prompt_tokens: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    prefilled: int = 0  # prompt tokens computed, that is: not found in the cache
    prefill_s: float = 0.0  # up to and with the first sampled id
    decode_s: float = 0.0
    logprobs: list[dict[str, object]] | None = None  # of each id, as JSON has them; if asked for
    has_form: bool = True  # that which was asked for

    @property
    def prefill_tok_s(self) -> float:
        return self.prefilled / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Ids after the first, which comes out of the prefill, in a second."""
        return max(0, len(self.ids) - 1) / self.decode_s if self.decode_s else 0.0


class StopTexts:
    """Finds which of some texts ends first in a stream of pieces, whatever the pieces are."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self.found = False
        self._held = ""  # could be the beginning of a stop text

    def push(self, piece: str) -> str:
        """Returns what is certain to stand before any stop text."""
        if self.found:
            return ""
        text = self._held + piece
        starts = [(text.find(stop), stop) for stop in self.stops]
        found = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if found:
            self.found, self._held = True, ""
            return text[: min(found)[1]]
        held = max((overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Returns what was held back: no stop text came of it."""
        text, self._held = self._held, ""
        return text


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


class Transcript:
    """Writes an answer down as its ids come: the text, where it stops, and the times.

    `emit` is given what each id adds to the text, also if that is nothing. `ends` are stop texts of
    which even a beginning is none of the answer, when that is cut off there: the next turn's.
    `guard`: an answer that goes round in a loop ends.
    """

    def __init__(
        self,
        answer: Answer,
        tokenizer: Tokenizer,
        sample: Sampler,
        stops: Sequence[str],
        emit: Callable[[str], None],
        guard: bool,
        ends: Sequence[str] = (),
    ) -> None:
        self.answer = answer
        self._tokenizer, self._sample = tokenizer, sample
        self._emit = emit
        self._decoder, self._watch = StreamDecoder(tokenizer), StopTexts([*ends, *stops])
        self._ends = ends
        self._guard = Guard() if guard else None
        self._started = perf_counter()

    def clock(self) -> None:
        """Takes the time at which an id or the end has come."""
        passed = perf_counter() - self._started
        if self.answer.prefill_s:
            self.answer.decode_s = passed - self.answer.prefill_s
        else:
            self.answer.prefill_s = passed

    def push(self, token: int) -> FinishReason | None:
        """Takes the next id; returns why the answer ends with it, if it does."""
        self.answer.ids.append(token)
        self._say(self._watch.push(self._decoder.push(token)))
        if self._watch.found:
            return "stop"
        if self._guard and self._guard.stops(self.answer.ids, self._tokenizer.token_bytes(token)):
            return "loop"
        return None

    def close(self, reason: FinishReason) -> None:
        self.answer.finish_reason = reason
        if self._sample.n_top is not None:
            logprobs = self._sample.logprobs[: len(self.answer.ids)]
            self.answer.logprobs = [describe(self._tokenizer, of_id) for of_id in logprobs]
        if self._sample.constraint:
            self.answer.has_form = self._sample.constraint.satisfied
        rest = self._watch.push(self._decoder.flush()) + self._watch.flush()
        begun = max((overlap(rest, end) for end in self._ends), default=0)
        if rest := rest[: len(rest) - begun]:
            self._say(rest)

    def _say(self, piece: str) -> None:
        self.answer.text += piece
        self._emit(piece)


def describe(tokenizer: Tokenizer, logprobs: Logprobs) -> dict[str, object]:
    """An id's logprobs as JSON has them: id, piece, logprob and the same of the likeliest ids."""

    def entry(token: int, logprob: float) -> dict[str, object]:
        return {"id": token, "piece": tokenizer.piece(token), "logprob": logprob}

    top = [entry(*likely) for likely in logprobs.top]
    return entry(logprobs.token, logprobs.logprob) | {"top": top}


def respond(
    model: Model,
    tokenizer: Tokenizer,
    cache: KVCache,
    prompt_ids: Sequence[int],
    sample: Sampler,
    *,
    emit: Callable[[str], None],
    stops: Sequence[str] = (),
    ends: Sequence[str] = (),
    max_tokens: int | None = None,
    draft: bool = False,
    guard: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Answer:
    """Makes one answer and gives its text to `emit`, which is called after each id.

    Ctrl-C ends the answer, not the program: `finish_reason` is then "interrupted". With `guard`, an
    answer that goes round in a loop (guard.py) ends, with "loop". `ends` are those of `Transcript`.
    The cache holds a beginning of `prompt_ids` + `ids`. Raises what `generate` raises.
    """
    answer = Answer(len(prompt_ids), prefilled=len(prompt_ids) - cache.length)
    transcript = Transcript(answer, tokenizer, sample, stops, emit, guard, ends)
    ids = generate(
        model,
        cache,
        prompt_ids,
        sample,
        stop_ids(tokenizer),
        max_tokens=max_tokens,
        draft=draft,
        progress=progress,
    )
    reason: FinishReason = "stop"
    try:
        with closing(ids):
            while True:
                try:
                    token = next(ids)
                except StopIteration as end:
                    reason = end.value
                    break
                finally:
                    transcript.clock()
                if ended := transcript.push(token):
                    reason = ended
                    break
    except KeyboardInterrupt:
        reason = "interrupted"
    transcript.close(reason)
    return answer


def respond_batch(
    model: Model,
    tokenizer: Tokenizer,
    cache: KVCache,
    prefix_ids: Sequence[int],
    prompts: Iterable[Sequence[int]],
    sample: Sampler,
    *,
    stops: Sequence[str] = (),
    max_tokens: int | None = None,
    batch_size: int = BATCH_SIZE,
    guard: bool = False,
) -> Iterator[Answer | PromptTooLong]:
    """Makes an answer for each prompt, several at a time, and yields them in order.

    A prompt that is too long gives the error in place of its answer. Arguments and exceptions are
    those of `generate_batch`; an answer's times go on while others are worked on.
    """
    transcripts: dict[int, Transcript] = {}
    done: dict[int, Answer | PromptTooLong] = {}
    turn = 0
    for c in generate_batch(
        model,
        cache,
        prefix_ids,
        prompts,
        sample,
        stop_ids(tokenizer),
        max_tokens=max_tokens,
        batch_size=batch_size,
    ):
        if c.error:
            done[c.index] = c.error
        elif c.index not in transcripts:
            answer = Answer(len(c.prompt_ids), prefilled=len(c.prompt_ids) - c.cached)
            transcripts[c.index] = Transcript(answer, tokenizer, c.sample, stops, _keep, guard)
        else:
            transcript = transcripts[c.index]
            transcript.clock()
            for token in c.ids[len(transcript.answer.ids) :]:
                if reason := transcript.push(token):
                    c.finish_reason = reason
                    break
            if c.finish_reason:
                transcript.close(c.finish_reason)
                done[c.index] = transcripts.pop(c.index).answer
        while turn in done:
            yield done.pop(turn)
            turn += 1


def _keep(piece: str) -> None:
    """The text is in the answer."""
