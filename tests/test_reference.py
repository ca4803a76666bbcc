"""The NumPy reference against transformers, so that kernels may be tested against the reference."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
from numpy.typing import NDArray

from quantize.checkpoint import open_checkpoint
from quantize.config import GemmaConfig

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(GOLDEN.iterdir())

# Both sides compute in float32 from the same weights. They differ in the order of their sums, by
# at most 2e-5 of the logits' spread; a wrong equation differs by 0.1 and more (last test).
TOLERANCE = 1e-4


def read(folder: Path) -> tuple[GemmaConfig, reference.Weights]:
    checkpoint = open_checkpoint(folder)
    return checkpoint.config, reference.read_weights(checkpoint)


def error(config: GemmaConfig, weights: reference.Weights, golden: NDArray[np.float32]) -> float:
    """The largest difference of a logit, relative to the spread of the golden logits."""
    logits = reference.forward(config, weights, golden["prompt_ids"])
    return float(np.abs(logits - golden["logits"]).max() / golden["logits"].std())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_logits_of_the_prompt(folder: Path) -> None:
    assert error(*read(folder), np.load(folder / "golden.npz")) < TOLERANCE


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_greedy_continuation(folder: Path) -> None:
    config, weights = read(folder)
    golden = np.load(folder / "golden.npz")
    ids = np.concatenate([golden["prompt_ids"], golden["greedy_ids"][:-1]])
    logits = reference.forward(config, weights, ids)[len(golden["prompt_ids"]) - 1 :]
    second, best = np.sort(logits, axis=1)[:, -2:].T
    margin = TOLERANCE * golden["logits"].std()
    np.testing.assert_allclose(best - second, golden["greedy_gaps"], atol=2 * margin)
    clear = golden["greedy_gaps"] > 2 * margin
    np.testing.assert_array_equal(logits.argmax(1)[clear], golden["greedy_ids"][clear])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma-mha", {"query_scale": 0.2}),
        ("gemma-mha", {"rope_base": 1e5}),
        ("gemma2-odd", {"attention_soft_cap": 0.0}),
        ("gemma2-odd", {"final_soft_cap": 0.0}),
        ("gemma2-odd", {"query_scale": 32**-0.5}),
        ("gemma2-odd", {"sliding_window": 9}),
        ("gemma2-gqa", {"sliding_window": 7}),
        ("gemma2-gqa", {"sliding_layers": (False, True)}),
        ("gemma2-gqa", {"rope_local_base": 1e5}),
        ("gemma3-linear", {"rope_scale": 1.0}),
        ("gemma3-linear", {"rope_base": 1e4}),
        ("gemma3-linear", {"rope_local_base": 1e6}),
        ("gemma3-shards", {"sliding_layers": (True, True, True)}),
        ("gemma3-shards", {"rms_norm_eps": 1e-6}),
    ],
)
def test_golden_logits_notice_a_wrong_field(name: str, changes: dict[str, object]) -> None:
    """What the golden models are for: no field of a config may be ignored without being seen."""
    config, weights = read(GOLDEN / name)
    golden = np.load(GOLDEN / name / "golden.npz")
    assert error(replace(config, **changes), weights, golden) > 0.1
