"""Calibration against the NumPy reference, and that it is worth its time."""

from pathlib import Path

import numpy as np
import pytest
import reference
from checkpoints import random_weights, tiny, write_hf
from numpy.typing import NDArray

from gemma_cli.measure import calibration
from gemma_cli.measure.calibration import Calibration, default_text, sequences, split
from quantize.checkpoint import open_checkpoint
from quantize.config import GemmaConfig
from quantize.tensors import matrix_shapes

Array = NDArray[np.float32]


def reference_inputs(
    config: GemmaConfig, weights: dict[str, Array], ids: NDArray[np.int32]
) -> dict[str, Array]:
    """What the reference multiplies each matrix by, seen from outside: each matrix is replaced by
    one that remembers it."""
    seen: dict[str, Array] = {}

    class Remembering:
        def __init__(self, name: str) -> None:
            self.name = name

        def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: object) -> Array:
            x, _ = args
            seen[self.name] = np.array(x)
            return np.matmul(np.array(x), weights[self.name].T)

        @property
        def T(self) -> "Remembering":  # noqa: N802
            return self

        def __getitem__(self, index: object) -> Array:
            return np.asarray(weights[self.name][index])  # type: ignore[index]

    spied = {
        name: Remembering(name) if name in matrix_shapes(config) else w
        for name, w in weights.items()
    }
    reference.forward(config, spied, ids)  # type: ignore[arg-type]
    return seen


def token_counts(
    config: GemmaConfig, weights: dict[str, Array], text: list[NDArray[np.int32]]
) -> dict[str, NDArray[np.float64]]:
    """How much each token of a text counts for each matrix."""
    stream = [weights["embed"][ids] * np.float32(np.sqrt(config.hidden_size)) for ids in text]
    counts = {}
    for i in range(config.n_layers):
        prefix = f"layers.{i}."
        own = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
        done = [calibration.layer(config, own, i, x) for x in stream]
        stream = [x for x, _, _ in done]
        for k, names in enumerate(calibration._MATRICES):
            for name in names:
                counts[prefix + name] = np.concatenate([c[k] for _, _, c in done]).astype(float)
    return counts


@pytest.mark.parametrize("generation", ["gemma", "gemma3"])
def test_what_is_added_counts_in_relation_to_the_stream(generation: str) -> None:
    config, rng = tiny(generation), np.random.default_rng(1)
    weights = {
        name.removeprefix("layers.0."): w
        for name, w in random_weights(config).items()
        if name.startswith("layers.0.")
    }
    x = rng.standard_normal((9, config.hidden_size)).astype(np.float32)
    after, inputs, counts = calibration.layer(config, weights, 0, x)
    added = inputs[3] @ weights["ffn_down"].T
    expected = np.mean(after**2, 1)
    if generation == "gemma3":  # normalises it first
        expected *= np.mean(added**2, 1) + config.rms_norm_eps
    # The epsilon beside the stream's mean square, about 1, is lost in the tolerance.
    np.testing.assert_allclose(counts[3], 1 / expected, rtol=1e-4)
    assert (counts[2] == 1).all()
    # Every token gives weights that sum to 1, whose squares do to at most 1; the first only to
    # itself, so that it is attended to by 1 at least.
    attended = counts[0] - 1
    assert attended[0] >= 1
    assert attended.sum() <= len(x) * (1 + 1e-6)
    assert (attended > 0).all()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("generation", ["gemma", "gemma2", "gemma3"])
def test_statistics_are_those_of_the_reference(
    generation: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(generation)
    checkpoint = open_checkpoint(write_hf(tmp_path / "c", config, random_weights(config)))
    rng = np.random.default_rng(0)
    text = [rng.integers(0, config.vocab_size, n, dtype=np.int32) for n in (20, 33, 7)]
    monkeypatch.setattr(calibration, "_BATCH", 2)
    monkeypatch.setattr(calibration, "_BLOCK", 32)
    monkeypatch.setattr(calibration, "_GRAM_COLUMNS", 16)
    monkeypatch.setattr(calibration, "_DOUBT", 30)  # about as many as there are
    gathered = Calibration(checkpoint, text, whole=whole)
    weights = dict(reference.read_weights(checkpoint))
    inputs = [reference_inputs(config, weights, ids) for ids in text]
    counts = token_counts(config, weights, text)
    for name in matrix_shapes(config):
        x = np.concatenate([seen[name] for seen in inputs]).astype(np.float64)
        statistics = gathered(name)
        count = counts.get(name, np.ones(len(x)))
        gram = (x.T * count) @ x / count.sum()
        # So many tokens besides, whose inputs do not depend on each other.
        gram = (len(x) * gram + 30 * np.diag(np.diag(gram))) / (len(x) + 30)
        # Both work in float32, in another order: a few roundings a layer.
        tolerance = {"rtol": 1e-3, "atol": 1e-4 * np.abs(gram).max()}
        np.testing.assert_allclose(statistics.mean_squares, np.diag(gram), **tolerance)
        size = len(gram) if whole else 32
        cuts = [slice(start, start + size) for start in range(0, len(gram), size)]
        assert len(cuts) > 1 or whole
        blocks = [gram[cut, cut] for cut in cuts]
        np.testing.assert_allclose(statistics.gram, blocks, **tolerance)


def test_sequences_hold_every_id_once_after_bos() -> None:
    ids = list(range(10, 1210))
    cut = sequences(ids, bos_id=2)
    assert [int(s[0]) for s in cut] == [2] * len(cut)
    assert [int(i) for s in cut for i in s[1:]] == ids
    assert max(map(len, cut)) == calibration.SEQUENCE


def test_every_twelfth_whole_sequence_is_held_out() -> None:
    text = sequences(list(range(30 * 511 + 17)), bos_id=2)
    calibrated, held_out = split(text)
    assert [int(s[1]) for s in held_out] == [11 * 511, 23 * 511]
    kept = [i for i in range(31) if i not in {11, 23}]
    assert [int(s[1]) for s in calibrated] == [511 * i for i in kept]
    assert len(calibrated[-1]) == 18

    text = sequences(list(range(11 * 511 + 17)), bos_id=2)  # the twelfth is not whole
    calibrated, held_out = split(text)
    assert (len(calibrated), held_out) == (12, [])


def test_the_default_text_is_short_and_mixed() -> None:
    text = default_text()
    assert len(text.encode()) <= 200_000
    for word in ("def ", "的", "は", "и ", "und ", "SELECT"):
        assert word in text
