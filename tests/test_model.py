"""A whole model: the same bits however its tokens are given to it, whatever logits are wanted.

But where there is AMX, which rounds inputs of many tokens in another way than those of few.
"""

import os
from dataclasses import replace
from pathlib import Path

import guarded
import numpy as np
import pytest
from checkpoints import random_weights, tiny, write_hf
from numpy.typing import NDArray

from gemma_cli.runtime import Model, isa
from quantize.checkpoint import open_checkpoint
from quantize.errors import GemmaError
from quantize.modelfile import ModelFile
from quantize.pipeline import quantize

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(folder.name for folder in GOLDEN.iterdir())


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp(str(request.param)) / "model.safetensors"
    quantize(open_checkpoint(GOLDEN / str(request.param)), path, bits=8)
    return Model(guarded.weights(ModelFile.open(path)), n_threads=2, chunk_size=48)


def random_ids(model: Model, n: int, seed: int = 0) -> NDArray[np.int32]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, model.config.vocab_size, n).astype(np.int32)


# Of the logits' spread, on average over the vocabulary. int8 inputs and bfloat16 ones err by up to
# 2^-8, which these models, small and random, enlarge to 3e-2, and to 7e-2 at single positions.
AMX_TOLERANCE = 0.15


def assert_same(actual: NDArray[np.float32], expected: NDArray[np.float32], exactly: bool) -> None:
    if exactly:
        np.testing.assert_array_equal(actual, expected)
    else:
        assert np.sqrt(np.mean((actual - expected) ** 2)) < AMX_TOLERANCE * expected.std()


@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_logits_after_each_id_are_those_one_by_one(model: Model, kv: str) -> None:
    ids = random_ids(model, 120)
    one, several = model.new_cache(200, kv), model.new_cache(200, kv)
    expected = np.stack([model.forward([token], one) for token in ids])
    for start, stop in ((0, 16), (16, 17), (17, 24), (24, 104), (104, 107), (107, 120)):
        part, exactly = ids[start:stop], not isa.AMX or stop <= 24
        if len(part) <= 16:
            assert_same(model.forward_each(part, several), expected[start:stop], exactly)
        else:  # in chunks, through expanded panels
            assert_same(model.forward(part, several), expected[stop - 1], exactly)


def test_several_caches_side_by_side_are_each_alone(model: Model) -> None:
    """With an id each, with few and with many in all, as far as each kernel takes them."""
    prompts = [random_ids(model, n, seed=n) for n in (3, 40, 75, 1)]
    caches = [model.new_cache(130) for _ in prompts]
    alone = [model.new_cache(130) for _ in prompts]
    for prompt, *both in zip(prompts, caches, alone, strict=True):
        for cache in both:
            model.forward(prompt, cache)
    lengths = [(1, 1, 1, 1), (2, 1, 7, 6), (30, 1, 12, 5), (1, 17, 1, 1), (1, 1, 1, 1)]
    for seed, some in enumerate(lengths):
        if sum(some) > model.batch_tokens:
            continue
        runs = [random_ids(model, n, seed=seed + n) for n in some]
        expected = [model.forward(ids, cache) for ids, cache in zip(runs, alone, strict=True)]
        np.testing.assert_array_equal(model.forward_batch(runs, caches), expected)
        assert [cache.length for cache in caches] == [cache.length for cache in alone]
    with pytest.raises(ValueError, match="too many"):
        model.forward_batch([[1] * model.batch_tokens, [1]], caches[:2])


@pytest.mark.parametrize("n_best", [1, 5])
def test_the_best_logits_are_the_best_of_all(model: Model, n_best: int) -> None:
    ids = random_ids(model, 60)
    every, best = model.new_cache(100), model.new_cache(100)
    expected = np.stack([model.forward([token], every) for token in ids])
    logits = np.concatenate(
        [model.forward_each(part, best, n_best=n_best) for part in np.array_split(ids, 7)]
    )
    known = np.isfinite(logits)
    np.testing.assert_array_equal(logits[known], expected[known])
    largest = np.argsort(-expected, axis=1, kind="stable")[:, :n_best]
    np.testing.assert_array_equal(np.argsort(-logits, axis=1, kind="stable")[:, :n_best], largest)
    everything = model.forward([1], every, n_best=model.config.vocab_size)
    assert np.isfinite(everything).all()


def test_a_truncated_cache_goes_on_as_if_nothing_had_been_there(model: Model) -> None:
    """By as many tokens as a draft has, also where sliding windows have gone round."""
    ids = random_ids(model, 90)
    plain, cut = model.new_cache(120), model.new_cache(120)
    model.forward(ids[:70], plain)
    model.forward(ids[:70], cut)
    model.forward_each(random_ids(model, 16, seed=5), cut)
    cut.truncate(70)
    np.testing.assert_array_equal(model.forward(ids[70:], cut), model.forward(ids[70:], plain))


def test_a_copied_cache_goes_on_like_the_first(model: Model) -> None:
    ids = random_ids(model, 90)
    cache = model.new_cache(120)
    model.forward(ids[:75], cache)
    twin = cache.copy()
    expected = model.forward(ids[75:], cache)
    np.testing.assert_array_equal(model.forward(ids[75:], twin), expected)


@pytest.mark.parametrize("kind", ["f16", "int8"])
@pytest.mark.parametrize("n", [5, 64, 90])
def test_a_restored_cache_goes_on_like_the_first(model: Model, kind: str, n: int) -> None:
    """Also in a longer context, and where sliding windows have gone round."""
    cache = model.new_cache(120, kind)
    model.forward(random_ids(model, n), cache)
    state = cache.state()
    arrays = {name: array.copy() for name, array in state.arrays.items()}
    twin = model.new_cache(150, kind)
    model.forward(random_ids(model, 30, seed=3), twin)
    twin.restore(replace(state, arrays=arrays))
    more = random_ids(model, 20, seed=4)
    np.testing.assert_array_equal(model.forward(more, twin), model.forward(more, cache))


def test_a_state_that_does_not_fit_is_refused(model: Model) -> None:
    cache = model.new_cache(120)
    model.forward(random_ids(model, 90), cache)
    state = cache.state()
    twin = model.new_cache(120)
    arrays = dict(state.arrays)
    cut = {name: array[:, :, :-16] for name, array in arrays.items()}
    for wrong in (
        replace(state, length=121, reach=121),
        replace(state, length=0),
        replace(state, reach=80),
        replace(state, ring=state.ring + 16),
        replace(state, arrays=cut),
        replace(state, arrays=dict(list(arrays.items())[1:])),
        replace(state, arrays={name: array.astype(np.float32) for name, array in arrays.items()}),
    ):
        with pytest.raises(ValueError, match=r"\S"):
            twin.restore(wrong)
        assert twin.length == 0
    with pytest.raises(ValueError, match="layers"):
        model.new_cache(120, "int8").restore(state)
    with pytest.raises(ValueError, match="context of 60"):
        model.new_cache(60).restore(state)


def test_what_a_window_has_lost_stays_lost(model: Model) -> None:
    """However often a cache is truncated, and when it is restored."""
    ids = random_ids(model, 90)
    cache = model.new_cache(120)
    model.forward(ids, cache)
    cache.truncate(75)
    for held in (cache, cache.copy()):
        if any(model.config.sliding_layers):  # the window is 8 tokens, its ring 64
            with pytest.raises(ValueError, match="no longer holds"):
                held.truncate(19)
        held.truncate(60)
        expected = model.new_cache(120)
        model.forward(ids[:60], expected)
        # Ids from 48 on went with many others before, and go with few now.
        assert_same(model.forward([5], held), model.forward([5], expected), not isa.AMX)


# Numbers that overflow


def scaled(tmp_path: Path, generation: str, matrix: str, factor: float, bits: int) -> Model:
    """A tiny model, one matrix of which is so many times as large."""
    config = tiny(generation)
    weights = random_weights(config)
    weights[matrix] = weights[matrix] * np.float32(factor)
    folder = write_hf(tmp_path / "checkpoint", config, weights, "F32")
    quantize(open_checkpoint(folder), tmp_path / "a.safetensors", bits=bits, method="rtn")
    file = guarded.weights(ModelFile.open(tmp_path / "a.safetensors"))
    return Model(file, n_threads=2, chunk_size=48)


@pytest.mark.parametrize("generation", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("n", [1, 60])
def test_values_beyond_float16(tmp_path: Path, generation: str, bits: int, n: int) -> None:
    model = scaled(tmp_path, generation, "layers.1.attn_v", 1e5, bits)
    for kv in ("f16", "int8"):
        assert np.isfinite(model.forward(random_ids(model, n), model.new_cache(100, kv))).all()


@pytest.mark.parametrize("generation", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize("bits", [16, 32])  # others have no scales that are as large
@pytest.mark.parametrize("n", [1, 60])
@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_values_that_overflow_are_named(
    tmp_path: Path, generation: str, bits: int, n: int, kv: str
) -> None:
    model = scaled(tmp_path, generation, "layers.1.attn_v", 3e38, bits)
    with pytest.raises(GemmaError, match=r"a\.safetensors .*values of layer 1 .*verify"):
        model.forward(random_ids(model, n), model.new_cache(100, kv))


@pytest.mark.parametrize("generation", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize("matrix", ["attn_o", "ffn_down", "ffn_up"])
@pytest.mark.parametrize("factor", [1e25, 1e38])
def test_activations_that_overflow_are_an_error(
    tmp_path: Path, generation: str, matrix: str, factor: float
) -> None:
    model = scaled(tmp_path, generation, f"layers.0.{matrix}", factor, 32)
    for n in (1, 60):
        with pytest.raises(GemmaError, match=r"a\.safetensors has .* too large or not numbers"):
            model.forward(random_ids(model, n), model.new_cache(100))


def test_a_file_that_is_written_to_while_it_is_in_use(tmp_path: Path) -> None:
    model = scaled(tmp_path, "gemma", "embed", 1, 8)
    path, cache = model.file.path, model.new_cache(100)
    data = path.read_bytes()
    model.forward([1], cache)
    path.with_name("new").write_bytes(bytes(len(data)))
    path.with_name("new").replace(path)  # another file: the one in use is still whole
    model.forward([1], cache)
    path.unlink()
    model.forward([1], cache)
    path.write_bytes(data)
    model = Model(ModelFile.open(path))
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(1, 1))
    with pytest.raises(GemmaError, match=r"a\.safetensors was changed while it was in use"):
        model.forward([1], cache)
