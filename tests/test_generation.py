"""Generation and answers with a model whose next token is known."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gemma_cli.answer import Answer, StopTexts, respond
from gemma_cli.generation import PromptTooLong, generate
from gemma_cli.sampling import Sampler, Sampling

GREEDY = Sampler(Sampling(temperature=0))
EOS = 1


@dataclass
class Config:
    context_length: int = 100


@dataclass
class Cache:
    capacity: int = 50
    ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.ids)

    def truncate(self, length: int) -> None:
        assert length <= self.length
        del self.ids[length:]


class Counter:
    """A model that counts on from the last id, with 256 ids; 99 is followed by EOS."""

    config = Config()

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.interrupt_at = -1  # the call in which someone presses Ctrl-C

    def forward(
        self,
        ids: Sequence[int],
        cache: Cache,
        *,
        n_best: int,
        progress: Callable[[int], None] | None = None,
    ) -> NDArray[np.float32]:
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt
        assert cache.length + len(ids) <= cache.capacity
        self.calls.append(list(ids))
        cache.ids += ids
        if progress:
            progress(len(ids))
        logits = np.zeros(256, dtype=np.float32)
        logits[EOS if ids[-1] == 99 else ids[-1] + 1] = 1
        return logits


class Letters:
    """A tokenizer whose id is a byte's value; EOS is 1."""

    eos_id = EOS

    def piece_id(self, piece: str) -> int | None:
        return None

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


def run(
    model: Counter, cache: Cache, prompt_ids: list[int], max_tokens: int | None = None
) -> tuple[list[int], str]:
    ids: list[int] = []

    def collect() -> Iterator[int]:
        reason.append(
            (
                yield from generate(
                    cast(Any, model),
                    cast(Any, cache),
                    prompt_ids,
                    GREEDY,
                    frozenset({EOS}),
                    max_tokens=max_tokens,
                )
            )
        )

    reason: list[str] = []
    ids += collect()
    return ids, reason[0]


def test_stops_at_a_stop_id_and_does_not_yield_it() -> None:
    cache = Cache()
    assert run(Counter(), cache, [2, 95]) == ([96, 97, 98, 99], "stop")
    assert cache.ids == [2, 95, 96, 97, 98, 99]


def test_stops_after_max_tokens() -> None:
    model = Counter()
    assert run(model, Cache(), [2, 10], max_tokens=3) == ([11, 12, 13], "length")
    assert model.calls == [[2, 10], [11], [12]]  # nothing is computed for a token not wanted


def test_no_tokens_wanted() -> None:
    model = Counter()
    assert run(model, Cache(), [2, 10], max_tokens=0) == ([], "length")
    assert model.calls == []


def test_stops_when_the_cache_is_full() -> None:
    # The last token needs no place: nothing comes after it.
    assert run(Counter(), Cache(capacity=4), [2, 10]) == ([11, 12, 13], "length")
    assert run(Counter(), Cache(capacity=2), [2, 10]) == ([11], "length")


def test_a_prompt_too_long_names_both_counts() -> None:
    with pytest.raises(PromptTooLong, match=r"51 tokens .* holds 50: .* up to 100"):
        run(Counter(), Cache(capacity=50), [2] * 51)
    with pytest.raises(PromptTooLong, match=r"101 tokens .* holds 100: .* takes no more"):
        run(Counter(), Cache(capacity=100), [2] * 101)


def test_what_the_cache_holds_is_not_computed_again() -> None:
    model, cache = Counter(), Cache(ids=[2, 10, 11])
    assert run(model, cache, [2, 10, 11, 50, 60], max_tokens=1) == ([61], "length")
    assert model.calls == [[50, 60]]
    with pytest.raises(ValueError, match="beyond"):
        run(model, cache, [2, 10])


def test_the_sampler_sees_the_whole_context() -> None:
    seen: list[list[int]] = []

    class Watched(Sampler):
        def __call__(
            self, logits: NDArray[np.float32], history: Sequence[int], *, all_there: bool = False
        ) -> int | None:
            seen.append(list(history))
            return super().__call__(logits, history, all_there=all_there)

    sample = Watched(Sampling(temperature=0))
    ids = generate(
        cast(Any, Counter()), cast(Any, Cache(ids=[2])), [2, 10], sample, frozenset(), max_tokens=2
    )
    assert list(ids) == [11, 12]
    assert seen == [[2, 10], [2, 10, 11]]


def answer(model: Counter, cache: Cache, prompt: str, **options: Any) -> tuple[Answer, list[str]]:
    pieces: list[str] = []
    made = respond(
        cast(Any, model),
        cast(Any, Letters()),
        cast(Any, cache),
        list(prompt.encode()),
        GREEDY,
        emit=pieces.append,
        **options,
    )
    assert "".join(pieces) == made.text
    return made, pieces


def test_an_answer_streams() -> None:
    made, pieces = answer(Counter(), Cache(), "_")
    assert pieces == ["`", "a", "b", "c"]
    assert (made.text, made.finish_reason, made.prompt_tokens) == ("`abc", "stop", 1)
    assert made.ids == list(b"`abc")


def test_a_stop_text_across_tokens_is_not_printed() -> None:
    made, pieces = answer(Counter(), Cache(), "@", stops=["DX", "EF"])
    # D is held back until E shows that DX does not come; each id is told of all the same.
    assert pieces == ["A", "B", "C", "", "D", ""]
    assert made.finish_reason == "stop"
    assert made.ids == list(b"ABCDEF")


def test_text_held_back_comes_at_the_end() -> None:
    made, pieces = answer(Counter(), Cache(), "@", stops=["BCDE"], max_tokens=3)
    assert pieces == ["A", "", "", "BC"]
    assert made.finish_reason == "length"


def test_the_next_turn_begun_is_not_the_answers() -> None:
    # Gone on with from there, its other half would not be found, and the model speak for the user.
    made, pieces = answer(Counter(), Cache(), "@", ends=["BCDE"], max_tokens=3)
    assert "".join(pieces) == made.text == "A"
    assert made.ids == list(b"ABC")
    made, _ = answer(Counter(), Cache(), "@", ends=["BCDE"], stops=["CX"], max_tokens=6)
    assert (made.text, made.finish_reason) == ("A", "stop")


def test_ctrl_c_ends_the_answer_only() -> None:
    model, cache = Counter(), Cache()
    model.interrupt_at = 2
    made, _ = answer(model, cache, "@")
    assert (made.text, made.finish_reason) == ("AB", "interrupted")
    # The conversation goes on from what is there.
    assert cache.ids == list(b"@A")
    model.interrupt_at = 0
    model.calls.clear()
    made, _ = answer(model, Cache(), "@")
    assert (made.text, made.ids, made.finish_reason) == ("", [], "interrupted")


def test_speeds_are_numbers_even_for_no_tokens() -> None:
    made, _ = answer(Counter(), Cache(), "@", max_tokens=0)
    assert isfinite(made.prefill_tok_s)
    assert isfinite(made.decode_tok_s)
    assert Answer(5).prefill_tok_s == Answer(5).decode_tok_s == 0.0


@given(st.text("ab", max_size=12), st.lists(st.text("ab", max_size=4), max_size=3), st.data())
def test_stop_texts_whatever_the_pieces(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    watch = StopTexts(stops)
    seen = [watch.push(text[a:b]) for a, b in pairwise(cuts)]
    seen.append(watch.flush())

    # Literally: the shortest beginning that ends with a stop text, less the longest such text.
    ends = [n for n in range(len(text) + 1) if any(s and text[:n].endswith(s) for s in stops)]
    if ends:
        found = max(len(s) for s in stops if text[: ends[0]].endswith(s))
        assert "".join(seen) == text[: ends[0] - found]
    else:
        assert "".join(seen) == text
    assert watch.found == bool(ends)
