"""Drafts: what they are, when they are made, and that they change no answer."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markov import VOCAB_SIZE, Cache, Markov

from gemma_cli.drafting import COST, CREDIT, INCOME, LONGEST, PromptLookup
from gemma_cli.generation import FORCED, generate
from gemma_cli.runtime import Model
from gemma_cli.runtime.model import MOST_ROWS
from gemma_cli.sampling import Sampler, Sampling
from quantize.checkpoint import open_checkpoint
from quantize.modelfile import ModelFile
from quantize.pipeline import quantize

GOLDEN = Path(__file__).parent / "golden"
STOP = 1


def first_draft(prompt: list[int], token: int) -> list[int]:
    return PromptLookup(prompt).draft([*prompt, token], LONGEST)


def test_a_draft_and_its_first_id_fit_one_call() -> None:
    assert LONGEST < FORCED + 1 == MOST_ROWS


def test_a_draft_is_what_came_after() -> None:
    assert first_draft([7, 8, 9, 5, 6, 1, 7, 8], 9) == [5, 6, 1]
    assert first_draft([7, 8, 9, 5, 6, 1, 7, 8], 6) == []
    # After three ids rather than after two, though two came later.
    assert first_draft([7, 8, 9, 5, 6, 1, 8, 9, 3, 3, 7, 8], 9) == [5, 6, 1]
    # After two if there is no more; the last time rather than the first.
    assert first_draft([8, 9, 5, 6, 1, 8, 9, 3, 4, 2, 8], 9) == [3, 4, 2]
    # What repeats goes round.
    assert first_draft([1, 2, 3, 4, 4, 4], 4) == [4, 4, 4]
    assert first_draft([1], 1) == first_draft([1, 1], 1) == []


def follow(next_id: Callable[[list[int]], int], prompt: list[int], n: int) -> list[list[int]]:
    """The drafts for an answer of at least n ids, in which next_id(draft) comes after a draft that
    is right up to its last id, or wrong from the first if it gives another one."""
    context, lookup, drafts = [*prompt, prompt[0]], PromptLookup(prompt), []
    while len(context) < len(prompt) + n:
        drafts.append(lookup.draft(context, LONGEST))
        token = next_id(drafts[-1])
        if drafts[-1] and drafts[-1][0] == token:
            context += drafts[-1]
        context.append(token)
    return drafts


def test_drafts_that_are_right_grow() -> None:
    drafts = follow(lambda draft: 5, [5] * 20, 60)
    assert [len(draft) for draft in drafts] == [3, *[7] * 7]


@given(st.lists(st.integers(2, 4), min_size=5, max_size=40), st.integers(1, 500))
def test_drafts_that_are_wrong_cost_little(prompt: list[int], n: int) -> None:
    drafts = follow(lambda draft: draft[0] % 3 + 2 if draft else 3, prompt, n)
    assert COST * sum(map(len, drafts)) <= CREDIT + INCOME * n


def test_drafts_come_back_when_they_are_right() -> None:
    calls = count()

    def next_id(draft: list[int]) -> int:
        right = next(calls) >= 400
        return 6 if draft and draft[0] == 5 and not right else 5

    lengths = [len(draft) for draft in follow(next_id, [5] * 20, 1000)]
    assert max(lengths[5:400]) == 1
    assert lengths[-3:] == [7, 7, 7]


def run(
    model: Any, cache: Any, prompt: list[int], sampling: Sampling, **options: Any
) -> tuple[list[int], str]:
    stop_ids = options.pop("stop_ids", frozenset({STOP}))
    ids: list[int] = []
    making = generate(model, cache, prompt, Sampler(sampling), stop_ids, **options)
    while True:
        try:
            ids.append(next(making))
        except StopIteration as end:
            return ids, end.value


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.2, 1.0]),
    top_k=st.sampled_from([0, 2, 64]),
    repeat_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 1000),
)
prompts = st.lists(st.integers(2, VOCAB_SIZE - 1), min_size=1, max_size=30)


@settings(deadline=None)  # hundreds of calls of a model
@given(
    st.integers(0, 1000), prompts, samplings, st.none() | st.integers(0, 50), st.integers(30, 60)
)
def test_the_answer_is_the_same(
    seed: int, prompt: list[int], sampling: Sampling, max_tokens: int | None, capacity: int
) -> None:
    plain, drafting = Cache(capacity), Cache(capacity)
    expected = run(Markov(seed), plain, prompt, sampling, max_tokens=max_tokens)
    made = run(Markov(seed), drafting, prompt, sampling, max_tokens=max_tokens, draft=True)
    assert made == expected
    assert drafting.ids == plain.ids


def test_drafts_save_calls() -> None:
    model, prompt = Markov(3), [5, 6, 7]
    ids, _ = run(model, Cache(), prompt, Sampling(temperature=0), draft=True, stop_ids=frozenset())
    assert len(ids) == 200 - 3 + 1
    assert len(model.calls) < 80  # it repeats itself after a while


@settings(deadline=None)
@given(st.integers(0, 1000), prompts, samplings, st.integers(0, 40))
def test_an_answer_left_early(seed: int, prompt: list[int], sampling: Sampling, n: int) -> None:
    """The cache holds what was said, and the sampler goes on as if there had been no drafts."""
    logits = np.zeros(VOCAB_SIZE, np.float32)
    left = []
    for draft in (False, True):
        cache, sample = Cache(), Sampler(sampling)
        making = generate(
            cast(Any, Markov(seed)), cast(Any, cache), prompt, sample, frozenset(), draft=draft
        )
        ids = [next(making) for _ in range(n)]
        making.close()
        assert cache.ids == [*prompt, *ids][: cache.length]
        left.append((ids, cache.ids, [sample(logits, []) for _ in range(10)]))
    assert left[0] == left[1]


def test_ctrl_c_while_a_draft_is_checked() -> None:
    prompt, greedy = [5, 6, 7], Sampling(temperature=0)
    model = Markov(3)
    run(model, Cache(), prompt, greedy, draft=True, stop_ids=frozenset())
    checks = [i for i, call in enumerate(model.calls) if i and len(call) > 1]
    assert len(checks) > 5
    for call in checks:
        model, cache, ids = Markov(3), Cache(), list[int]()
        model.interrupt_at = call
        making = generate(
            cast(Any, model), cast(Any, cache), prompt, Sampler(greedy), frozenset(), draft=True
        )
        with pytest.raises(KeyboardInterrupt):
            ids.extend(making)
        assert cache.ids == [*prompt, *ids]


@pytest.fixture(scope="module", params=["gemma2-odd", "gemma3-shards"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Random models with sliding windows, in 8 bits."""
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    quantize(open_checkpoint(GOLDEN / request.param), path, bits=8)
    return Model(ModelFile.open(path), n_threads=2)


@pytest.mark.parametrize("kv", ["f16", "int8"])
@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_a_model_says_the_same(
    model: Model, kv: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward_each = Model.forward_each

    def counted(self: Model, ids: Any, cache: Any, **options: Any) -> Any:
        rows.append(len(ids))
        return forward_each(self, ids, cache, **options)

    monkeypatch.setattr(Model, "forward_each", counted)
    sampling = Sampling(temperature, top_k=2, seed=1)
    prompt = [2, *[10, 11, 12, 13, 14] * 8]
    n = min(150, model.config.context_length - len(prompt))
    expected = run(model, model.new_cache(len(prompt) + n, kv), prompt, sampling, max_tokens=n)
    assert not rows
    cache = model.new_cache(len(prompt) + n, kv)
    assert run(model, cache, prompt, sampling, max_tokens=n, draft=True) == expected
    assert rows
