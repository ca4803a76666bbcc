"""Answers of a given form: whatever is drawn, they have it; and nothing but the form changes."""

import json
import re
from collections.abc import Iterator
from itertools import chain, count, islice
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from markov import VOCAB_SIZE, Cache, Markov

from gemma_cli import sampling as sampling_module
from gemma_cli.constraint import (
    Constraint,
    Vocabulary,
    choice_grammar,
    json_grammar,
    regex_grammar,
    short_schema,
)
from gemma_cli.generation import generate, generate_batch
from gemma_cli.sampling import Sampler, Sampling
from gemma_cli.text.chat import stop_ids
from gemma_cli.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(tiny_tokenizer.train())
N_IDS = TOKENIZER.vocab_size + 5  # an embedding can have rows that are no tokens
ALL = np.arange(N_IDS)
STOPS = stop_ids(TOKENIZER)
VOCABULARY = Vocabulary(TOKENIZER, N_IDS, STOPS)

REGEXES = [
    "[a-z]{2,9}@[a-z]{2,9}\\.(com|org)",
    "^(yes|no)$",
    "-?[0-9]{1,3}(\\.[0-9]{2})?",
    "the (quick|brown|snow ☃) fox",
    "[^\n]{0,12}",
    "(?i)abc",
    "",
]
SCHEMAS: list[dict[str, Any]] = [
    json.loads(short_schema("name, age int, tall float, here bool")) | {
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tall": {"enum": [1.5, None, "«é»", [1, {"a": "b"}]]},
            "here": {"type": "boolean"},
        }
    },
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[A-Z][a-z]{1,5}$"}]},
    {"const": {"text": 'a "quoted" \\ line\n'}},
    {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "at": {"enum": [1, 2]},
                    "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                },
                "required": ["at", "next"],
                "additionalProperties": False,
            }
        },
    },
]  # fmt: skip
CHOICES = [["yes", "no"], ["a", "ab", "abc"], ['say "hi"', "back\\slash", "two\nlines", "snow ☃"]]


def answer(grammar: str, seed: int, most: int = 200) -> tuple[list[int], Constraint]:
    """Ids drawn from random logits, up to the end of the form."""
    random = np.random.default_rng(seed)
    constraint = Constraint(VOCABULARY, grammar)
    sample = Sampler(Sampling(top_k=0, top_p=1, seed=seed), constraint)
    ids: list[int] = []
    while not sample.ended and len(ids) < most:
        token = sample(random.normal(0, 3, N_IDS).astype(np.float32), ids)
        assert token is not None
        ids.append(token)
    return [token for token in ids if token not in STOPS], constraint


@settings(deadline=None)
@given(st.sampled_from(REGEXES), st.integers(0, 2**32))
def test_regular_expressions(regex: str, seed: int) -> None:
    ids, constraint = answer(regex_grammar(regex), seed)
    assert constraint.satisfied
    text = b"".join(map(TOKENIZER.token_bytes, ids)).decode("utf-8", "strict")
    assert re.fullmatch(regex, text)


@settings(deadline=None)
@given(st.sampled_from(SCHEMAS), st.integers(0, 2**32))
def test_json_schemas(schema: dict[str, Any], seed: int) -> None:
    ids, constraint = answer(json_grammar(json.dumps(schema)), seed)
    if constraint.satisfied:  # only a tree can grow too long
        text = TOKENIZER.decode(ids)
        Draft202012Validator(schema).validate(json.loads(text))
        assert "\n" not in text
    else:
        assert "$ref" in schema


@settings(deadline=None)
@given(st.sampled_from(CHOICES), st.integers(0, 2**32))
def test_choices(choices: list[str], seed: int) -> None:
    ids, constraint = answer(choice_grammar(choices), seed)
    assert constraint.satisfied
    assert TOKENIZER.decode(ids) in choices


def test_every_choice_can_be_drawn() -> None:
    for choices in CHOICES:
        grammar = choice_grammar(choices)
        assert {TOKENIZER.decode(answer(grammar, seed)[0]) for seed in range(60)} == set(choices)


def test_an_answer_that_is_cut_off_has_not_the_form() -> None:
    grammar = json_grammar(json.dumps(SCHEMAS[0]))
    for seed in range(3):
        whole = answer(grammar, seed)[0]
        for n in range(0, len(whole), 3):
            ids, constraint = answer(grammar, seed, n)
            assert ids == whole[:n]
            assert not constraint.satisfied
    # What could go on has it.
    ids, constraint = answer(regex_grammar("[a-z]+"), 1, 3)
    assert len(ids) == 3
    assert constraint.satisfied


def test_what_is_allowed() -> None:
    """All the text, spelled as it may be; no control piece; the end where it may be."""
    pieces = TOKENIZER.all_token_bytes()
    for text in ("a b", "小", "the quick"):
        # With another choice nothing is forced.
        grammar = choice_grammar([text, "\n"])
        texts = (text.encode(), b"\n")
        beginnings = [i for i, x in enumerate(pieces) if x and any(t.startswith(x) for t in texts)]
        allowed = np.flatnonzero(Constraint(VOCABULARY, grammar).allowed())
        assert allowed.tolist() == beginnings
        assert np.flatnonzero(Constraint(VOCABULARY, grammar).allows(ALL)).tolist() == beginnings
    any_text = Constraint(VOCABULARY, regex_grammar("(.|\n)*"))
    allowed = any_text.allowed()
    assert (any_text.allows(ALL) == allowed).all()
    for token in range(N_IDS):
        if token in STOPS:
            assert allowed[token]
        elif TOKENIZER.is_control(token):
            assert not allowed[token]
        elif len(TOKENIZER.token_bytes(token).decode("utf-8", "ignore")):
            assert allowed[token]
    assert not Constraint(VOCABULARY, regex_grammar("a+")).allowed()[list(STOPS)].any()
    assert not Constraint(VOCABULARY, regex_grammar("a+")).allows(np.array(list(STOPS))).any()


def test_a_few_ids_are_tried_without_a_look_at_all() -> None:
    """It would take a third of a small model's time."""
    constraint = Constraint(VOCABULARY, regex_grammar("[a-z ]+"))
    constraint.accept(TOKENIZER.encode("the")[0])
    allowed, matcher = constraint.allowed(), constraint._matcher
    constraint._matcher = SimpleNamespace(
        validate_tokens=matcher.validate_tokens, is_error=matcher.is_error
    )
    assert (constraint.allows(ALL) == allowed).all()


def test_forced_ids_are_the_tokenizers() -> None:
    constraint = Constraint(VOCABULARY, choice_grammar(["the quick brown fox"]))
    ids = []
    while not constraint.ended:
        ids.append(constraint.forced[0])
        constraint.accept(ids[-1])
    assert ids == TOKENIZER.encode("the quick brown fox")


def test_a_copy_goes_its_own_way() -> None:
    constraint = Constraint(VOCABULARY, choice_grammar(["yes", "no"]))
    twin = constraint.copy()
    twin.accept(TOKENIZER.encode("n")[0])
    assert TOKENIZER.decode(twin.forced) == "o"
    assert constraint.allowed()[TOKENIZER.encode("y")[0]]


def test_all_token_bytes() -> None:
    ids = range(TOKENIZER.vocab_size)
    assert TOKENIZER.all_token_bytes() == [TOKENIZER.token_bytes(token) for token in ids]


def test_the_short_form() -> None:
    assert json.loads(short_schema("name, age int")) == {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    assert list(json.loads(short_schema("b bool\nx float"))["properties"]) == ["b", "x"]


@pytest.mark.parametrize("text", ["", "a,", "a,,b", "a integer", "a int b", "a, a int"])
def test_short_forms_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="name, age int"):
        short_schema(text)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ('{"type": "objec"}', "objec"),
        ('{"not": {}}', "not"),
        ("[1]", "object"),
        ('{"a"', "delimiter"),
        ('{"$ref": "http://localhost/a"}', "localhost"),
    ],
)
def test_schemas_that_cannot_be_kept(schema: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        json_grammar(schema)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("regex", ["(a", "a(?=b)", "\\bfoo"])
def test_regular_expressions_that_cannot_be_kept(regex: str) -> None:
    with pytest.raises(ValueError, match=r"look-?around|unclosed") as error:
        regex_grammar(regex)
    assert "\n" not in str(error.value)


# A constraint in generation: on the model of the other tests, with ids that need no text.


class Maze:
    """A form of ids: which may come depends on the last two, and now and then only one way."""

    def __init__(self, seed: int, length: int, ids: tuple[int, ...] = ()) -> None:
        self.seed, self.length, self.ids = seed, length, ids

    def copy(self) -> "Maze":
        return Maze(self.seed, self.length, self.ids)

    def _ways(self, ids: tuple[int, ...]) -> list[int]:
        random = np.random.default_rng([self.seed, 9, *ids[-2:]])
        ways = random.permutation(np.arange(2, VOCAB_SIZE))
        return sorted(ways[: random.choice([1, 1, 3, 9])].tolist())

    @property
    def forced(self) -> list[int]:
        ids: tuple[int, ...] = ()
        while len(self.ids + ids) < self.length:
            ways = self._ways(self.ids + ids)
            if len(ways) > 1:
                break
            ids += (ways[0],)
        return list(ids)

    @property
    def ended(self) -> bool:
        return len(self.ids) == self.length

    @property
    def satisfied(self) -> bool:
        return self.ended

    def allowed(self) -> Any:
        allowed = np.zeros(VOCAB_SIZE, np.bool_)
        allowed[self._ways(self.ids)] = True
        return allowed

    def allows(self, ids: Any) -> Any:
        return self.allowed()[ids]

    def accept(self, token: int) -> None:
        assert token in self._ways(self.ids)
        self.ids += (token,)


@pytest.fixture(autouse=True, scope="module")
def few_are_likely() -> Iterator[None]:
    """So that often none of the likeliest ids is allowed."""
    kept = sampling_module.LIKELIEST
    sampling_module.LIKELIEST = 2
    yield
    sampling_module.LIKELIEST = kept


def expected(
    seed: int, prompt: list[int], maze: Maze, sampling: Sampling, max_tokens: int
) -> tuple[list[int], str]:
    """What the definition says: the whole logits, masked, and an unconstrained draw."""
    sample, context = Sampler(sampling), list(prompt)
    while not maze.ended:
        if len(context) == len(prompt) + max_tokens:
            return context[len(prompt) :], "length"
        logits = Markov(seed).forward(context, cast(Any, Cache(1000)))
        if maze.forced:
            token = maze.forced[0]
        else:
            kept = np.argsort(-logits, kind="stable")[: max(2, sampling.n_best) or None]
            kept = [i for i in kept if maze.allowed()[i]] or np.flatnonzero(maze.allowed()).tolist()
            masked = np.full_like(logits, -np.inf)
            masked[kept] = logits[kept]
            drawn = sample(masked, context)
            assert drawn is not None
            token = drawn
        maze.accept(token)
        context.append(token)
    return context[len(prompt) :], "stop"


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1.0]),
    top_k=st.sampled_from([1, 2, 3]),
    repeat_penalty=st.just(1.0),
    seed=st.integers(0, 1000),
)
prompts = st.lists(st.integers(2, VOCAB_SIZE - 1), min_size=1, max_size=9)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), prompts, samplings, st.integers(1, 60), st.integers(0, 70))
def test_generation_keeps_to_it(
    seed: int, prompt: list[int], sampling: Sampling, length: int, max_tokens: int
) -> None:
    """Exactly, with drafts and without them."""
    for draft in (False, True):
        sample = Sampler(sampling, cast(Any, Maze(seed, length)))
        cache, ids = Cache(), list[int]()
        model = Markov(seed)
        making = generate(
            cast(Any, model), cast(Any, cache), prompt, sample, frozenset({1}),
            max_tokens=max_tokens, draft=draft,
        )  # fmt: skip
        while True:
            try:
                ids.append(next(making))
            except StopIteration as end:
                reason = end.value
                break
        assert (ids, reason) == expected(seed, prompt, Maze(seed, length), sampling, max_tokens)
        assert cache.ids == [*prompt, *ids][: cache.length]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.lists(prompts, max_size=9), samplings, st.integers(1, 30))
def test_batches_keep_to_it(
    seed: int, asked: list[list[int]], sampling: Sampling, length: int
) -> None:
    sample = Sampler(sampling, cast(Any, Maze(seed, length)))
    done = {
        c.index: (c.ids, c.finish_reason)
        for c in generate_batch(
            cast(Any, Markov(seed)), cast(Any, Cache()), [], asked, sample, frozenset({1}),
            max_tokens=20, batch_size=3,
        )
        if c.finish_reason
    }  # fmt: skip
    assert len(done) == len(asked)
    for i, prompt in enumerate(asked):
        assert done[i] == expected(seed, prompt, Maze(seed, length), sampling.at(i), 20)


def test_what_is_forced_is_read_at_once() -> None:
    model = Markov(1)
    maze = Maze(1, 40)
    maze._ways = lambda ids: [2 + len(ids) % 9]  # type: ignore[method-assign]
    sample = Sampler(Sampling(), cast(Any, maze))
    ids = list(generate(cast(Any, model), cast(Any, Cache()), [2, 3], sample, frozenset({1})))
    assert ids == list(islice((2 + n % 9 for n in count()), 40))
    assert len(model.calls) == 4  # the prompt, and 16 ids at a time


def test_what_is_forced_to_the_end_is_not_read_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Maze, "_ways", lambda self, ids: [2 + len(ids) % 9])
    model, maze, asked = Markov(1), Maze(1, 40), [[2, 3], [4]]
    batch = generate_batch(
        cast(Any, model), cast(Any, Cache()), [], asked, Sampler(Sampling(), cast(Any, maze)),
        frozenset({1}),
    )  # fmt: skip
    done = [c.ids for c in batch if c.finish_reason]
    assert done == 2 * [list(islice((2 + n % 9 for n in count()), 40))]
    assert sorted(chain(*model.calls)) == sorted(chain(*asked))


def test_logprobs() -> None:
    random = np.random.default_rng(5)
    logits = random.normal(0, 4, 300).astype(np.float32)
    for constraint in (None, cast(Any, Maze(1, 3))):
        sample = Sampler(Sampling(top_k=5, seed=3), constraint, n_top=4)
        assert sample.n_best == 0
        rows = [np.roll(logits, i) for i in range(3)]
        ids = [sample(row[:VOCAB_SIZE], []) for row in rows]
        for row, token, made in zip(rows, ids, sample.logprobs, strict=True):
            exact = np.exp(row[:VOCAB_SIZE].astype(np.float64))
            exact = np.log(exact / exact.sum())
            assert made.token == token
            assert made.logprob == pytest.approx(exact[token], abs=1e-5)  # float32 logits
            order = np.argsort(-exact, kind="stable")[:4]
            assert [i for i, _ in made.top] == order.tolist()
            assert [p for _, p in made.top] == pytest.approx(exact[order].tolist(), abs=1e-5)
    assert Sampler(Sampling(top_k=5)).n_best == 5
