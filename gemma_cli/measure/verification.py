"""Verification: a fresh model file beside the checkpoint that it was made of.

The checkpoint is run in float32, layer by layer as for a calibration, over text that no calibration
has seen; the file by the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from gemma_cli.measure.calibration import Calibration, default_text, logits, sequences, split
from gemma_cli.measure.quality import FIRST, measure_quality
from gemma_cli.runtime import Model
from gemma_cli.text.tokenizer import Tokenizer
from quantize.checkpoint import Checkpoint
from quantize.errors import GemmaError
from quantize.modelfile import TensorError, Verification
from quantize.tensors import matrix_shapes
from quantize.verification import tensor_errors


def held_out_text(checkpoint: Checkpoint) -> list[NDArray[np.int32]]:
    """Sequences of the default calibration text that nothing is calibrated on."""
    tokenizer = Tokenizer(checkpoint.tokenizer_model)
    _, held_out = split(sequences(tokenizer.encode(default_text()), tokenizer.bos_id))
    if not held_out:
        raise GemmaError(
            f"{checkpoint.path} has a tokenizer that makes too few tokens of the text to verify "
            "with; leave --verify out."
        )
    return held_out


def n_steps(checkpoint: Checkpoint, text: Sequence[NDArray[np.int32]]) -> int:
    """What `progress` of `verify` ends with."""
    return 2 * len(matrix_shapes(checkpoint.config)) + len(text)


def verify(
    checkpoint: Checkpoint,
    model: Model,
    text: Sequence[NDArray[np.int32]],
    progress: Callable[[int], None] = lambda done: None,
) -> Verification:
    """What a model has lost against its checkpoint, over sequences of SEQUENCE tokens.

    Raises GemmaError if the checkpoint's or the model's logits are not finite.
    """
    calibration, mean_squares = Calibration(checkpoint, text, whole=False), {}
    names = list(matrix_shapes(checkpoint.config))
    for name in names:
        mean_squares[name] = calibration(name).mean_squares
        progress(len(mean_squares))
    errors = tensor_errors(
        checkpoint, model.file, mean_squares, lambda done: progress(len(names) + done)
    )
    quality = measure_quality(
        model,
        text,
        (logits(checkpoint, x[FIRST:]) for x in calibration.stream),
        lambda done: progress(2 * len(names) + done),
    )
    if quality.kl is None or quality.same_top is None:
        raise ValueError("there is no text")
    if math.isnan(quality.perplexity):
        raise GemmaError(
            f"{checkpoint.path} makes a model that gives no finite numbers; the checkpoint is "
            "damaged, get it again."
        )
    return Verification(
        tokens=quality.tokens,
        kl=_rounded(quality.kl.mean),
        kl_stderr=_rounded(quality.kl.stderr),
        same_top=_rounded(quality.same_top),
        errors={
            name: TensorError(_rounded(e.plain), _rounded(e.weighted)) for name, e in errors.items()
        },
    )


def _rounded(x: float) -> float:
    """To four digits: more would depend on the order in which a machine adds."""
    return float(f"{x:.4g}")
