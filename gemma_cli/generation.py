"""Token ids to more token ids, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Literal

from quantize.errors import GemmaError

if TYPE_CHECKING:  # so that the command line can name PromptTooLong without loading the kernels
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
    progress: Callable[[int], None] | None = None,
) -> Generator[int, None, FinishReason]:
    """Yields sampled ids until a stop id (not yielded), `max_tokens` or the end of the cache.

    `prompt_ids` is the whole context. The first `cache.length` of them are those already in the
    cache and are not computed again; at least one must be new. The id yielded last is not yet in
    the cache. `progress` is called with the number of new prompt tokens done.

    Returns "stop" or "length". Raises `PromptTooLong` if the cache cannot hold the prompt.
    """
    if len(prompt_ids) > cache.capacity:
        raise PromptTooLong(len(prompt_ids), cache.capacity, model.config.context_length)
    if cache.length >= len(prompt_ids):
        raise ValueError("the prompt must go on beyond what the cache holds")
    context = list(prompt_ids)
    if max_tokens == 0:
        return "length"
    logits = model.forward(context[cache.length :], cache, progress=progress)
    while True:
        token = sample(logits, context)
        if token in stop_ids:
            return "stop"
        context.append(token)
        yield token
        if len(context) - len(prompt_ids) == max_tokens or cache.length == cache.capacity:
            return "length"
        logits = model.forward([token], cache)
