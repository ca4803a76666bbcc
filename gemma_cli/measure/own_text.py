"""Text that a model draws itself, to calibrate it with.

What a model thinks likely is what it was trained on, in the same proportions: more kinds of text
than a file of a bearable size holds (Liu et al. 2023, LLM-QAT, arXiv:2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gemma_cli.generation import generate_batch
from gemma_cli.measure.calibration import SEQUENCE
from gemma_cli.runtime import Model
from gemma_cli.runtime.model import MOST_ROWS
from gemma_cli.sampling import Sampler, Sampling

N_SEQUENCES = 128

_SAMPLING = Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=0)
"""Whatever the model holds possible. On WikiText Gemma 3 270M, rounded by GPTQ, diverged by 0.0516
with the text that comes with gemma-cli alone, by 0.0481 with such sequences, too, and by 0.0503
when each id was one of the 256 likeliest."""


def draw(
    model: Model, bos_id: int, progress: Callable[[int], None] = lambda done: None
) -> list[NDArray[np.int32]]:
    """N_SEQUENCES times BOS and ids that follow it, SEQUENCE in all or as many as the model takes.

    The same model gives the same ids. `progress` is called with the number of sequences done.
    """
    length = min(SEQUENCE, model.config.context_length)
    cache = model.new_cache(length)
    model.forward([bos_id], cache)
    drawn: dict[int, list[int]] = {}
    for continuation in generate_batch(
        model,
        cache,
        [bos_id],
        ([bos_id] for _ in range(N_SEQUENCES)),
        Sampler(_SAMPLING),
        frozenset(),  # Behind an end comes another beginning.
        max_tokens=length - 1,
        batch_size=MOST_ROWS,
    ):
        if continuation.finish_reason:
            drawn[continuation.index] = [bos_id, *continuation.ids]
            progress(len(drawn))
    return [np.array(drawn[index], np.int32) for index in sorted(drawn)]
