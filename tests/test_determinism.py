"""The same ids in every run, whatever the number of threads: `make determinism` runs it 100 times.

That a session which is resumed says the same is in test_sessions_cli.py, that conversions give the
same bytes in test_pipeline.py.
"""

import os
from pathlib import Path

import pytest
from program import GOLDEN

from gemma_cli.generation import generate
from gemma_cli.runtime import Model
from gemma_cli.sampling import Sampler, Sampling
from quantize.checkpoint import open_checkpoint
from quantize.modelfile import ModelFile
from quantize.pipeline import quantize

RUNS = int(os.environ.get("RUNS", "3"))
NAMES = sorted(folder.name for folder in GOLDEN.iterdir())
THREADS = (1, 2, 4)
PROMPT = [2, *range(5, 45)]


def answer(model: Model, kv: str, sampling: Sampling, draft: bool) -> list[int]:
    cache = model.new_cache(128, kv)
    made = generate(
        model, cache, PROMPT, Sampler(sampling), frozenset({1}), max_tokens=40, draft=draft
    )
    return list(made)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_run_gives_the_same_ids(tmp_path: Path, name: str, bits: int) -> None:
    path = tmp_path / "a.safetensors"
    quantize(open_checkpoint(GOLDEN / name), path, bits=bits, method="rtn")
    models = [Model(ModelFile.open(path), n) for n in THREADS]
    for kv in ("f16", "int8"):
        for sampling in (Sampling(temperature=0), Sampling(seed=7)):
            expected = answer(models[0], kv, sampling, draft=False)
            for run in range(RUNS):
                for model in models:
                    assert answer(model, kv, sampling, draft=bool(run % 2)) == expected
