"""Which answers go round in a loop, and which only look so."""

import re
from collections.abc import Iterable, Sequence
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from program import Cli, load

from gemma_cli.answer import respond, respond_batch
from gemma_cli.guard import LOOP, SHORT, SHORT_LOOP, SILENCE, Guard
from gemma_cli.sampling import Sampler, Sampling

GREEDY = Sampler(Sampling(temperature=0))


def ended_at(ids: Iterable[int], silent: frozenset[int] = frozenset()) -> int | None:
    """After how many ids the guard ends the answer."""
    guard, seen = Guard(), list[int]()
    for token in ids:
        seen.append(token)
        if guard.stops(seen, b"" if token in silent else b"x"):
            return len(seen)
    return None


@given(
    before=st.lists(st.integers(0, 9), max_size=200),
    block=st.lists(st.integers(0, 9), min_size=1, max_size=128),
)
def test_every_loop_ends_in_time(before: list[int], block: list[int]) -> None:
    end = ended_at(islice(chain(before, cycle(block)), len(before) + SHORT_LOOP + 64))
    assert end is not None
    n = next(n for n in range(1, 129) if (block * 2)[n : n + len(block)] == block)  # its own block
    loop = SHORT_LOOP if n <= SHORT else LOOP
    assert max(loop, SILENCE) <= end < len(before) + loop + 64


@given(st.lists(st.integers(0, 9), min_size=1, max_size=128), st.integers(0, 300))
def test_what_repeats_less_goes_on(block: list[int], at: int) -> None:
    run = list(islice(cycle(block), LOOP - 1))
    assert ended_at([*range(100, 100 + at), *run, 77, *run, 78]) is None


@given(st.lists(st.integers(0, 3), max_size=300), st.integers(1, 60))
def test_silence(before: list[int], n: int) -> None:
    silent = frozenset({5, 6})
    assert ended_at(before, silent) is None
    flood = islice(cycle([5, 6, 6]), n)
    expected = len(before) + SILENCE if n >= SILENCE else None
    assert ended_at([*before, *flood], silent) == expected


def words(*lines: str) -> list[int]:
    """A text as ids of its words, blanks and signs: there are more of them than of any tokenizer's
    pieces in such texts."""
    pieces = re.findall(r"\w+|\s|[^\w\s]", "\n".join(lines))
    known = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return [known[piece] for piece in pieces]


TEXTS = {
    "an empty table": ["| " * 8 + "|"] * 100,
    "a table of zeros": ["| row | 0 | 0 | 0 |"] * 60,
    "numbered rows": [f"| {i} | 0 | 0 | 0 |" for i in range(2000)],
    "an array of zeros": ["0, " * 256],
    "an array in C": ["    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,"] * 32,
    "a ruler": ["-" * 1000],
    "blank lines": ["\n" * 1000],
    "a deep indentation": [" " * 1500],
    "a list": [f"{i}. The same thing again." for i in range(2000)],
    "closing braces": ["}"] * 500,
    "a chorus": ["Row, row, row your boat, gently down the stream,", "merrily on."] * 30,
    "a matrix": [" ".join("1" if i == j else "0" for j in range(40)) for i in range(40)],
    "a test's dots": ["." * 1200],
    "primes": [" ".join(map(str, range(10_000)))],
    "base64": ["A" * 1900],
}


@pytest.mark.parametrize("lines", TEXTS.values(), ids=TEXTS)
def test_texts_that_people_ask_for_go_on(lines: Sequence[str]) -> None:
    assert ended_at(words(*lines)) is None


def test_source_code_and_prose_go_on() -> None:
    folder = Path(__file__).parents[1]
    files = [*folder.glob("*/*.py"), folder / "README.md", folder / "LICENSE"]
    assert len(files) > 50
    for file in files:
        assert ended_at(words(file.read_text())) is None, file


# Answers


def endless_text(home: Path) -> tuple[Any, Any, list[int]]:
    """A model that only counts to three, over and over."""
    model, tokenizer = load(home, "base")
    ids = tokenizer.encode("the man met")

    class Loop:
        config, batch_tokens = model.config, model.batch_tokens

        def forward(self, new: Sequence[int], cache: Any, **_: object) -> Any:
            model.forward(new, cache)
            return self.row(new[-1])

        def forward_batch(self, runs: Sequence[Sequence[int]], caches: Any, **_: object) -> Any:
            model.forward_batch(runs, caches)
            return [self.row(new[-1]) for new in runs]

        def row(self, token: int) -> Any:
            row = np.zeros(model.config.vocab_size, np.float32)
            row[ids[(ids.index(token) + 1) % len(ids)] if token in ids else ids[0]] = 1
            return row

        def new_cache(self) -> Any:
            return model.new_cache(5000)

    return cast(Any, Loop()), tokenizer, ids


def test_an_answer_that_goes_round_ends(home: Path) -> None:
    model, tokenizer, ids = endless_text(home)
    answers = {}
    for guard in (True, False):
        answers[guard] = respond(
            model, tokenizer, model.new_cache(), [2, *ids], GREEDY,
            emit=lambda piece: None, guard=guard, max_tokens=2500,
        )  # fmt: skip
    assert answers[True].finish_reason == "loop"
    assert SHORT_LOOP <= len(answers[True].ids) <= SHORT_LOOP + len(ids) + 64
    assert answers[True].text == tokenizer.decode(answers[True].ids)
    assert (answers[False].finish_reason, len(answers[False].ids)) == ("length", 2500)
    cache = model.new_cache()
    model.forward([2], cache)
    first, other = respond_batch(
        model, tokenizer, cache, [2], [[2, *ids], [2, *ids[:1]]], GREEDY, max_tokens=2500,
        guard=True,
    )  # fmt: skip
    assert (first.finish_reason, other.finish_reason) == ("loop", "loop")
    assert first.ids == answers[True].ids


def test_run_and_map_say_so(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_cli.guard._is_loop", lambda ids: len(ids) >= 50)
    how = ("-m", "base", "-t", "0", "-n", "150", "--json")
    ended = cli("run", *how, "the man")
    assert (ended.status, ended.json["finish_reason"]) == (0, "loop")
    assert re.fullmatch("gemma-cli: The answer went round.*--no-guard.*\n", ended.err)
    assert ended.json["completion_tokens"] == 64
    free = cli("run", *how, "the man", "--no-guard")
    assert (free.json["finish_reason"], free.err) == ("length", "")
    assert free.json["ids"][:64] == ended.json["ids"]  # type: ignore[index]
    mapped = cli("map", *how, "the", stdin=b"man\n")
    assert (mapped.status, mapped.json["finish_reason"]) == (0, "loop")
    assert mapped.err.startswith("gemma-cli: Line 1: The answer went round")
    assert cli("map", *how, "--no-guard", "the", stdin=b"man\n").json["finish_reason"] != "loop"
