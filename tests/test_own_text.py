"""Text that a model draws to be calibrated with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma_cli.generation import generate
from gemma_cli.measure import own_text
from gemma_cli.measure.calibration import SEQUENCE
from gemma_cli.runtime import Model
from gemma_cli.sampling import Sampler
from quantize.checkpoint import open_checkpoint
from quantize.modelfile import ModelFile
from quantize.pipeline import quantize

GOLDEN = Path(__file__).parent / "golden"


def drawn_alone(model: Model, bos_id: int, index: int, length: int) -> list[int]:
    """What `generate` makes of BOS alone."""
    sample = Sampler(own_text._SAMPLING).at(index)
    making = generate(
        model, model.new_cache(length), [bos_id], sample, frozenset(), max_tokens=length - 1
    )
    return [bos_id, *making]


@pytest.mark.parametrize("context", [SEQUENCE + 1, 40])
def test_sequences_are_those_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: int
) -> None:
    monkeypatch.setattr(own_text, "N_SEQUENCES", 20)  # more than are drawn at a time
    checkpoint = open_checkpoint(GOLDEN / "gemma3-shards")
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, context_length=context))
    quantize(checkpoint, tmp_path / "model", bits=8)
    file = ModelFile.open(tmp_path / "model")
    done: list[int] = []
    drawn = own_text.draw(Model(file, 1), 2, done.append)
    assert done == list(range(1, 21))
    length = min(context, SEQUENCE)
    assert [ids.shape for ids in drawn] == [(length,)] * 20
    for index in (0, 7, 19):
        assert drawn[index].tolist() == drawn_alone(Model(file, 1), 2, index, length)
    assert len({ids.tobytes() for ids in drawn}) == 20
    again = own_text.draw(Model(file, 2), 2)
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))
