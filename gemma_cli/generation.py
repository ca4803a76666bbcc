"""Token ids to more token ids."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

from gemma_cli.drafting import PromptLookup
from quantize.errors import GemmaError

if TYPE_CHECKING:  # so that the command line can name PromptTooLong without loading the kernels
    import numpy as np
    from numpy.typing import NDArray

    from gemma_cli.runtime import KVCache, Model
    from gemma_cli.sampling import Sampler

FinishReason = Literal["stop", "length", "interrupted"]


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
    """Yields sampled ids until a stop id (not yielded), `max_tokens` or the end of the cache.

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
    n_best = sample.sampling.n_best
    new, drafted = context[cache.length :], list[int]()
    try:
        rows: Iterable[NDArray[np.float32]]
        rows = [model.forward(new, cache, n_best=n_best, progress=progress)]
        while True:
            # A row of logits is right if the ids before it are: the first always, the next ones as
            # far as the sampler draws what was drafted. It draws once for each id, from the same
            # logits as without a draft; so the ids are the same.
            for row, guess in zip_longest(rows, drafted):
                token = sample(row, context)
                if token in stop_ids:
                    return "stop"
                yield token
                if token != guess:
                    cache.truncate(len(context))
                context.append(token)
                if len(context) == end:
                    return "length"
                if token != guess:
                    break
            # The last id of the answer is never in the cache, so it cannot be drafted either.
            drafted = lookup.draft(context, end - len(context) - 1) if lookup else []
            new = [context[-1], *drafted]
            if drafted:
                rows = model.forward_each(new, cache, n_best=n_best)
            else:
                rows = [model.forward(new, cache, n_best=n_best)]
    finally:
        cache.truncate(min(cache.length, len(context)))


def context_end(
    model: Model, cache: KVCache, prompt_ids: Sequence[int], max_tokens: int | None
) -> int:
    """The most tokens that prompt and answer can have: one more than the cache, as the last id
    needs no place in it. Raises `PromptTooLong` if the cache cannot hold the prompt."""
    if len(prompt_ids) > cache.capacity:
        raise PromptTooLong(len(prompt_ids), cache.capacity, model.config.context_length)
    end = cache.capacity + 1
    return end if max_tokens is None else min(end, len(prompt_ids) + max_tokens)
