"""Batches: each answer is the one that its prompt gets alone, in order, however they come."""

import time
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from threading import Event
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markov import VOCAB_SIZE, Cache, Config, Markov

from gemma_cli.answer import Answer, respond, respond_batch
from gemma_cli.generation import (
    AHEAD,
    BATCH_SIZE,
    Continuation,
    PromptTooLong,
    generate,
    generate_batch,
)
from gemma_cli.runtime import Model, isa
from gemma_cli.sampling import Sampler, Sampling
from quantize.checkpoint import open_checkpoint
from quantize.modelfile import ModelFile
from quantize.pipeline import quantize

GOLDEN = Path(__file__).parent / "golden"
STOP = frozenset({1})
GREEDY = Sampling(temperature=0)


def alone(
    model: Any, cache: Any, prompt: list[int], sampling: Sampling, max_tokens: int | None = None
) -> tuple[list[int], str]:
    """The ids and the reason for their end."""
    ids: list[int] = []
    making = generate(model, cache, prompt, Sampler(sampling), STOP, max_tokens=max_tokens)
    while True:
        try:
            ids.append(next(making))
        except StopIteration as end:
            return ids, end.value


def together(
    model: Any,
    cache: Any,
    prefix: list[int],
    prompts: Iterable[list[int]],
    sampling: Sampling,
    **options: Any,
) -> Iterator[Continuation]:
    """The continuations as they end."""
    for c in generate_batch(model, cache, prefix, prompts, Sampler(sampling), STOP, **options):
        if c.finish_reason or c.error:
            yield c


prompts = st.lists(st.integers(2, VOCAB_SIZE - 1), min_size=1, max_size=12)


@settings(deadline=None)  # threads take the time that they are given
@given(
    st.integers(0, 1000),
    st.lists(st.integers(2, VOCAB_SIZE - 1), max_size=6),
    st.lists(st.tuples(st.booleans(), prompts), max_size=12),
    st.builds(Sampling, temperature=st.sampled_from([0.0, 1.0]), top_k=st.just(3), seed=st.just(5)),
    st.integers(1, 5),
    st.none() | st.integers(0, 9),
)
def test_the_same_as_alone(
    seed: int,
    prefix: list[int],
    rests: list[tuple[bool, list[int]]],
    sampling: Sampling,
    batch_size: int,
    max_tokens: int | None,
) -> None:
    capacity = 16
    asked = [[*prefix, *rest] if shares else rest for shares, rest in rests]
    model, cache = Markov(seed), Cache(capacity, list(prefix))
    done = {
        c.index: c
        for c in together(
            model, cache, prefix, asked, sampling, batch_size=batch_size, max_tokens=max_tokens
        )
    }
    assert sorted(done) == list(range(len(asked)))
    for i, prompt in enumerate(asked):
        c = done[i]
        if len(prompt) > capacity:
            assert isinstance(c.error, PromptTooLong)
            assert c.ids == []
            continue
        expected = alone(Markov(seed), Cache(capacity), prompt, sampling.at(i), max_tokens)
        assert (c.ids, c.finish_reason) == expected
        assert c.cached <= min(len(prefix), len(prompt) - 1)
        if rests[i][0]:
            assert c.cached == len(prefix)
    assert cache.ids == prefix


def test_no_more_caches_are_made_than_grow_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    copy = Cache.copy
    monkeypatch.setattr(Cache, "copy", lambda cache: copies.append(cache) or copy(cache))
    asked = [[2, 3 + i % 4] for i in range(20)]
    done = list(together(Markov(0), Cache(), [], asked, GREEDY, batch_size=3, max_tokens=5))
    assert len(done) == 20
    assert len(copies) <= 3  # fewer where prompts come no faster than answers end


def test_places_are_filled_at_once() -> None:
    """What a new prompt has of its own is read in one run with the others' next ids."""
    model, lengths = Markov(0), [4, 1, 2, 9, 1, 3, 2]
    n_asked = 0

    def prompts() -> Iterator[list[int]]:
        nonlocal n_asked
        for _ in lengths:
            n_asked += 1
            yield [2, 3]
        n_asked += 1

    sample = Sampler(GREEDY)
    n_begun = 0
    for c in generate_batch(
        cast(Any, model), cast(Any, Cache()), [], prompts(), sample, frozenset(), batch_size=3
    ):
        if len(c.ids) == lengths[c.index]:
            c.finish_reason = "stop"
        n_begun += not c.ids
        while n_asked < min(n_begun + 2, len(lengths) + 1):
            time.sleep(0.001)  # until the next prompt is there
    # Of 2 ids where a prompt begins, of 1 where it goes on.
    assert [len(call) for call in model.calls] == [6, 4, 4, 4, 4, 3, 1, 1, 1, 1]


def test_a_long_prompt_is_read_before() -> None:
    """One that does not fit a run with others is read before; of those that do, some may wait."""
    model = Markov(0)
    most, sizes = model.batch_tokens, [18, 30, 1, 17, 18]
    asked = [[2 + i % 5 for i in range(n)] for n in sizes]
    done = list(together(model, Cache(60), [], asked, GREEDY, batch_size=3, max_tokens=4))
    for c in done:
        expected = alone(Markov(0), Cache(60), asked[c.index], GREEDY, 4)
        assert (c.ids, c.finish_reason) == expected
    assert sorted(c.index for c in done) == list(range(len(asked)))
    assert max(map(len, model.calls)) == 29  # what `forward` read alone, without the last id
    assert all(len(call) <= most for call in model.calls if len(call) != 29)


def test_prompts_are_taken_when_they_are_needed() -> None:
    """Of endlessly many; and no more than AHEAD while the first one is not done."""
    taken = count()
    endless = ([2, 3 + next(taken) % 2] for _ in count())
    batch = generate_batch(
        cast(Any, Markov(0)), cast(Any, Cache(100_000)), [], endless, Sampler(GREEDY), frozenset()
    )
    for c in batch:
        if c.index and c.ids:
            c.finish_reason = "stop"
            if c.index == AHEAD - 1:
                break
    assert {c.index for c in islice(batch, 200)} == {0}
    # Some wait in the queue, and one for a place in it.
    assert next(taken) <= AHEAD + BATCH_SIZE + 1


def test_a_prompt_that_is_long_in_coming_holds_nothing_up() -> None:
    first_is_done = Event()

    def slow() -> Iterator[list[int]]:
        yield [2, 3]
        assert first_is_done.wait(60)
        yield [2, 4]

    indices = []
    for c in together(Markov(0), Cache(), [], slow(), GREEDY, max_tokens=5):
        indices.append(c.index)
        first_is_done.set()
    assert indices == [0, 1]


def test_what_goes_wrong_with_the_prompts_is_raised_after_them() -> None:
    def failing() -> Iterator[list[int]]:
        yield [2, 3]
        raise OSError("gone")

    done = []
    with pytest.raises(OSError, match="gone"):
        done.extend(together(Markov(0), Cache(), [], failing(), GREEDY, max_tokens=5))
    assert [c.ids for c in done] == [alone(Markov(0), Cache(), [2, 3], GREEDY, 5)[0]]


@pytest.mark.parametrize("batch_size", [0, 17])
def test_a_batch_too_large(batch_size: int) -> None:
    with pytest.raises(ValueError, match="batch size must be between 1 and 16"):
        list(together(Markov(0), Cache(), [], [[2]], GREEDY, batch_size=batch_size))


@pytest.fixture(scope="module", params=["gemma2-odd", "gemma3-shards"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Random models with sliding windows, in 8 bits."""
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    quantize(open_checkpoint(GOLDEN / request.param), path, bits=8)
    return Model(ModelFile.open(path), n_threads=2)


@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_a_model_says_the_same(model: Model, kv: str) -> None:
    # With AMX, as many tokens as do not use it: a prompt's beginning by itself would be rounded in
    # another way than with the rest.
    prefix = [2, *range(10, 18 if isa.AMX else 30)]
    asked = [[*prefix, *range(40, 41 + i)] for i in range(6)] + [prefix, [2, 10, 11, 50]]
    sampling = Sampling(0.5, seed=3)
    cache = model.new_cache(64, kv)
    model.forward(prefix, cache)
    for c in together(model, cache, prefix, asked, sampling, batch_size=3, max_tokens=30):
        own = model.new_cache(64, kv)
        assert (c.ids, c.finish_reason) == alone(
            model, own, asked[c.index], sampling.at(c.index), 30
        )


class Digits:
    """A tokenizer whose ids have letters: "a" for 0."""

    eos_id = 1

    def piece_id(self, piece: str) -> int | None:
        return None

    def token_bytes(self, token: int) -> bytes:
        return bytes([ord("a") + token])


@settings(deadline=None)
@given(st.integers(0, 1000), st.lists(prompts, max_size=8), st.lists(st.text("cdef", min_size=1)))
def test_answers_come_in_order(seed: int, asked: list[list[int]], stops: list[str]) -> None:
    tokenizer: Any = Digits()
    sampling = Sampling(seed=seed)
    made = list(
        respond_batch(
            cast(Any, Markov(seed)),
            tokenizer,
            cast(Any, Cache(10)),
            [],
            asked,
            Sampler(sampling),
            stops=stops,
            batch_size=3,
        )
    )
    assert len(made) == len(asked)
    for i, (prompt, answer) in enumerate(zip(asked, made, strict=True)):
        if len(prompt) > 10:
            assert isinstance(answer, PromptTooLong)
            continue
        assert isinstance(answer, Answer)
        expected = respond(
            cast(Any, Markov(seed)),
            tokenizer,
            cast(Any, Cache(10)),
            prompt,
            Sampler(sampling.at(i)),
            emit=lambda piece: None,
            stops=stops,
        )
        assert (answer.text, answer.ids) == (expected.text, expected.ids)
        assert answer.finish_reason == expected.finish_reason
        assert answer.prompt_tokens == answer.prefilled == len(prompt)
        assert answer.prefill_s > 0
        assert answer.decode_s >= 0


def test_the_error_says_what_fits() -> None:
    [c] = together(Markov(0), Cache(3), [], [[2, 3, 4, 5]], GREEDY)
    assert str(c.error) == str(PromptTooLong(4, 3, Config.context_length))
