"""Token ids to more token ids."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from queue import Empty, Queue
from threading import Thread
from typing import TYPE_CHECKING, Literal

from gemma_cli.drafting import PromptLookup
from quantize.errors import GemmaError

if TYPE_CHECKING:  # so that the command line can name PromptTooLong without loading the kernels
    import numpy as np
    from numpy.typing import NDArray

    from gemma_cli.runtime import KVCache, Model
    from gemma_cli.sampling import Sampler

FinishReason = Literal["stop", "length", "interrupted", "loop"]

BATCH_SIZE = 8
FORCED = 15  # ids that a constraint leaves no choice of, read at once with the one before them
AHEAD = 64  # answers of a batch that may wait for an earlier one


class PromptTooLong(GemmaError):  # noqa: N818 (what happened, as in FileNotFound)
    """The prompt does not fit the context; the command line exits with 3."""

    def __init__(self, prompt_tokens: int, context: int, context_length: int) -> None:
        remedy = (
            f"shorten it, or raise -c/--context (this model takes up to {context_length})"
            if context < context_length
            else "shorten it: this model takes no more"
        )
        super().__init__(
            f"The prompt has {prompt_tokens} tokens and the context holds {context}: {remedy}."
        )


def generate(
    model: Model,
    cache: KVCache,
    prompt_ids: Sequence[int],
    sample: Sampler,
    stop_ids: frozenset[int],
    *,
    max_tokens: int | None = None,
    draft: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Generator[int, None, FinishReason]:
    """Yields sampled ids until a stop id (not yielded), the end of what the sampler's constraint
    lets come, `max_tokens` or the end of the cache.

    `prompt_ids` is the whole context. The first `cache.length` of them are those already in the
    cache and are not computed again; at least one must be new. However the generator ends (`close`
    and exceptions too), the cache then holds a beginning of `prompt_ids` and the ids yielded; the
    one yielded last may be missing. `draft` guesses ids and has the model check several at once:
    the same ids come faster where the text repeats itself. `progress` is called with the number of
    new prompt tokens done.

    Returns "stop" or "length". Raises `PromptTooLong` if the cache cannot hold the prompt.
    """
    end = context_end(model, cache, prompt_ids, max_tokens)
    if cache.length >= len(prompt_ids):
        raise ValueError("the prompt must go on beyond what the cache holds")
    context = list(prompt_ids)
    if end == len(context):
        return "length"
    lookup = PromptLookup(context) if draft else None
    n_best = sample.n_best
    # Where a form begins, it may well allow none of the ids that are likely.
    all_there = sample.constraint is not None
    new, drafted = context[cache.length :], list[int]()
    try:
        rows: Iterable[NDArray[np.float32]]
        first = 0 if all_there else n_best
        rows = [model.forward(new, cache, n_best=first, progress=progress)]
        while True:
            # A row of logits is right if the ids before it are: the first always, the next ones as
            # far as the sampler draws what was drafted. It draws once for each id, from the same
            # logits as without a draft; so the ids are the same.
            for row, guess in zip_longest(rows, drafted):
                token = sample(row, context, all_there=all_there)
                all_there = False
                right = token is not None and token == guess
                if token is None:
                    token = _draw_from_all(model, cache, sample, context)
                if token in stop_ids:
                    return "stop"
                yield token
                if not right:
                    cache.truncate(len(context))
                context.append(token)
                if sample.ended:
                    return "stop"
                if len(context) == end:
                    return "length"
                if not right:
                    break
            # The last id of the answer is never in the cache, so it cannot be drafted either.
            most = end - len(context) - 1
            if drafted := list(sample.forced[: min(most, FORCED)]):
                if lookup:
                    lookup.skip(context, len(drafted))
            elif lookup:
                drafted = lookup.draft(context, most)
            new = [context[-1], *drafted]
            if drafted:
                rows = model.forward_each(new, cache, n_best=n_best)
            else:
                rows = [model.forward(new, cache, n_best=n_best)]
    finally:
        cache.truncate(min(cache.length, len(context)))


def _draw_from_all(model: Model, cache: KVCache, sample: Sampler, context: Sequence[int]) -> int:
    """The next id where the likeliest ones do not do: the logits after the context anew, all of
    them. The cache then ends with the context."""
    cache.truncate(len(context) - 1)
    token = sample(model.forward(context[-1:], cache), context, all_there=True)
    assert token is not None
    return token


def context_end(
    model: Model, cache: KVCache, prompt_ids: Sequence[int], max_tokens: int | None
) -> int:
    """The most tokens that prompt and answer can have: one more than the cache, as the last id
    needs no place in it. Raises `PromptTooLong` if the cache cannot hold the prompt."""
    if len(prompt_ids) > cache.capacity:
        raise PromptTooLong(len(prompt_ids), cache.capacity, model.config.context_length)
    end = cache.capacity + 1
    return end if max_tokens is None else min(end, len(prompt_ids) + max_tokens)


@dataclass(slots=True)
class Continuation:
    """One prompt of a batch, and what has come of it."""

    index: int
    prompt_ids: Sequence[int]
    sample: Sampler
    cached: int = 0  # tokens of the prompt that were shared, and not computed for it
    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None  # None while it grows; whoever sets it ends it
    error: PromptTooLong | None = None  # there will be no ids


@dataclass(slots=True)
class _Lane:
    """A continuation that grows."""

    continuation: Continuation
    cache: KVCache
    context: list[int]
    end: int  # of the context

    @property
    def new(self) -> list[int]:
        """Ids that are not in the cache yet; there is at least one."""
        return self.context[self.cache.length :]

    def advance(
        self,
        model: Model,
        logits: NDArray[np.float32],
        stop_ids: frozenset[int],
        *,
        all_there: bool,
    ) -> Continuation:
        """Draws the next id and those that must follow it, or finds the end."""
        sample = self.continuation.sample
        while self.continuation.finish_reason is None:
            token = sample(logits, self.context, all_there=all_there)
            if token is None:
                token = _draw_from_all(model, self.cache, sample, self.context)
            if token in stop_ids:
                self.continuation.finish_reason = "stop"
                break
            self.context.append(token)
            self.continuation.ids.append(token)
            if sample.ended:
                self.continuation.finish_reason = "stop"
            elif len(self.context) == self.end:
                self.continuation.finish_reason = "length"
            if not sample.forced or sample.n_top is not None:  # whose logits are wanted
                break
        return self.continuation


def generate_batch(
    model: Model,
    cache: KVCache,
    prefix_ids: Sequence[int],
    prompts: Iterable[Sequence[int]],
    sample: Sampler,
    stop_ids: frozenset[int],
    *,
    max_tokens: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Continuation]:
    """Goes on with up to `batch_size` prompts side by side, each weight read once for all of them.

    The ids are those that `generate` makes of each prompt alone with `sample.at(index)`; where
    there is AMX, up to roundings (runtime/matmul.py), as the prompt is then read in one piece.
    `cache` holds `prefix_ids`; each prompt starts from a copy, as far as it begins the same, and
    what it has besides is read while others go on. Prompts are taken, in a thread of their own, no
    more than `batch_size` before there is a place for them, so there may be endlessly many and one
    may be long in coming while the others go on.

    Yields a continuation when it begins, when ids have come, and when it ends; once, with its
    error, for a prompt that the cache cannot hold. It ends too if its `finish_reason` is set. None
    begins before the one AHEAD places before it has ended. An exception of `prompts` is raised when
    the prompts before it are done.
    """
    from gemma_cli.runtime.model import MOST_ROWS  # noqa: PLC0415 (not with the command line)

    if not 1 <= batch_size <= MOST_ROWS:
        raise ValueError(f"the batch size must be between 1 and {MOST_ROWS}")
    queue: Queue[Sequence[int] | Exception | None] = Queue(maxsize=batch_size)
    # A daemon: if nobody wants the rest, it waits for a place in the queue until the program ends.
    Thread(target=_read, args=(prompts, queue), daemon=True).start()
    lanes: list[_Lane] = []  # oldest first
    free: list[KVCache] = []  # of lanes that have ended: memory that is there already
    begun, reading, failure = 0, True, None
    room = max(1, model.batch_tokens - batch_size + 1)  # in a run with the others
    while reading or lanes:
        while reading and len(lanes) < batch_size:
            if lanes and begun >= lanes[0].continuation.index + AHEAD:
                break
            try:
                prompt_ids = queue.get(block=not lanes)
            except Empty:
                break
            if prompt_ids is None or isinstance(prompt_ids, Exception):
                reading, failure = False, prompt_ids
                break
            continuation = Continuation(begun, prompt_ids, sample.at(begun))
            begun += 1
            try:
                end = context_end(model, cache, prompt_ids, max_tokens)
            except PromptTooLong as error:
                continuation.error = error
                yield continuation
                continue
            own = _shared(cache, free, prefix_ids, prompt_ids)
            continuation.cached = own.length
            yield continuation
            if end == len(prompt_ids):
                free.append(own)
                continuation.finish_reason = "length"
                yield continuation
                continue
            lanes.append(_Lane(continuation, own, list(prompt_ids), end))
        for lane in lanes:
            if len(lane.new) > room:
                model.forward(lane.new[:-1], lane.cache, n_best=1)
        if lanes:
            running = _fitting(lanes, model.batch_tokens)
            # Of several the model computes all logits; for where a form begins, see `generate`.
            begins = any(not lane.continuation.ids for lane in running)
            all_there = len(running) > 1 or (begins and sample.constraint is not None)
            rows = model.forward_batch(
                [lane.new for lane in running],
                [lane.cache for lane in running],
                n_best=0 if all_there else sample.n_best,
            )
            for lane, row in zip(running, rows, strict=True):
                yield lane.advance(model, row, stop_ids, all_there=all_there)
            free += [lane.cache for lane in lanes if lane.continuation.finish_reason]
            lanes = [lane for lane in lanes if not lane.continuation.finish_reason]
    if failure:
        raise failure


def _fitting(lanes: list[_Lane], most: int) -> list[_Lane]:
    """Those whose new ids fit a run of so many, the oldest first; the others wait."""
    fitting = []
    for lane in lanes:
        if len(lane.new) <= most:
            fitting.append(lane)
            most -= len(lane.new)
    return fitting


def _read(prompts: Iterable[Sequence[int]], queue: Queue[Sequence[int] | Exception | None]) -> None:
    """Puts each prompt into the queue, and at the end None or what went wrong."""
    try:
        for prompt_ids in prompts:
            queue.put(prompt_ids)
        queue.put(None)
    except Exception as error:
        queue.put(error)


def _shared(
    cache: KVCache, free: list[KVCache], prefix_ids: Sequence[int], prompt_ids: Sequence[int]
) -> KVCache:
    """A copy of the cache, which holds the prefix, with what the prompt begins with, less at least
    its last id: that one gives the logits. A free one is taken if there is one."""
    if free:
        own = free.pop()
        own.restore(cache.state())
    else:
        own = cache.copy()
    try:
        own.truncate(n_common(prefix_ids, prompt_ids[:-1]))
    except ValueError:  # a sliding window has gone past it
        own.clear()
    return own


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
