"""Conversations against the same ones read anew, on a small random Gemma with sliding windows."""

from itertools import chain
from pathlib import Path

import pytest
from program import load
from tiny_tokenizer import train

from gemma_cli.answer import Answer, respond
from gemma_cli.conversation import Conversation, said
from gemma_cli.runtime import Model
from gemma_cli.sampling import Sampler, Sampling
from gemma_cli.session import Session
from gemma_cli.text.chat import STOP_TEXTS, Format, Turn, turn_ids
from gemma_cli.text.tokenizer import Tokenizer

DRAWN = Sampling(top_k=20, seed=7)


@pytest.fixture(scope="module")
def loaded(home: Path) -> tuple[Model, Tokenizer]:
    return load(home, "chat")


class Talk:
    """A conversation, each of whose answers is also made of its turns alone."""

    def __init__(self, loaded: tuple[Model, Tokenizer], format: Format = "turns") -> None:
        self.model, self.tokenizer = loaded
        self.session = Session()
        self.session.instruct("be lean")
        self.format: Format = format
        cache = self.model.new_cache(1000)
        self.conversation = Conversation(self.session, *loaded, cache, format)

    def answer(self, max_tokens: int = 12) -> Answer:
        parts = turn_ids(self.tokenizer, self.session.turns, self.session.system, self.format)
        anew = respond(
            self.model,
            self.tokenizer,
            self.model.new_cache(1000),
            list(chain.from_iterable(parts)),
            Sampler(DRAWN.at(self.session.n_answers)),
            emit=lambda piece: None,
            ends=STOP_TEXTS[self.format],
            max_tokens=max_tokens,
        )
        pieces: list[str] = []
        unread = self.conversation.rewind()
        answer = self.conversation.answer(Sampler(DRAWN), emit=pieces.append, max_tokens=max_tokens)
        assert (answer.ids, answer.text) == (anew.ids, anew.text)
        assert "".join(pieces) == answer.text
        assert answer.prefilled == unread
        return answer

    def say(self, text: str, max_tokens: int = 12) -> Answer:
        self.session.add(Turn("user", text))
        return self.answer(max_tokens)


@pytest.mark.parametrize("format", ["turns", "transcript", "raw"])
def test_answers_are_those_of_the_whole_conversation(
    loaded: tuple[Model, Tokenizer], format: Format
) -> None:
    talk = Talk(loaded, format)
    first = talk.say("the man")
    second = talk.say("ten hens")
    assert second.prefilled < first.prompt_tokens + len(first.ids)  # or nothing was kept
    talk.session.keep(3)
    assert talk.answer().prefilled <= 2  # another answer: no more than the last ids are read
    talk.say("a long answer", max_tokens=150)
    talk.session.keep(2)  # past what the windows hold
    talk.say("the lane")
    talk.session.instruct("be mean")
    talk.say("the tin")
    assert [turn.role for turn in talk.session.turns] == ["user", "model"] * 3


@pytest.mark.parametrize("format", ["turns", "transcript", "raw"])
def test_an_answer_goes_on(loaded: tuple[Model, Tokenizer], format: Format) -> None:
    talk = Talk(loaded, format)
    first = talk.say("the man", max_tokens=5)
    second = talk.answer()
    (_, turn) = talk.session.turns
    assert turn.ids == (*first.ids, *second.ids)
    assert turn.text == first.text + second.text
    talk.say("ten hens")


def test_what_is_interrupted(loaded: tuple[Model, Tokenizer]) -> None:
    talk = Talk(loaded)
    text = "the man met ten men " * 20
    talk.session.add(Turn("user", text))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    answer = talk.conversation.answer(Sampler(DRAWN), emit=print, progress=interrupt)
    assert (answer.finish_reason, answer.ids) == ("interrupted", [])
    assert len(talk.session.turns) == 1
    assert talk.conversation.rewind() == answer.prompt_tokens - talk.model.chunk_size
    talk.session.keep(0)
    talk.say(text)  # goes on from what was read

    talk.session.add(Turn("user", "ten hens"))
    answer = talk.conversation.answer(Sampler(DRAWN), emit=interrupt)
    assert answer.finish_reason == "interrupted"
    assert talk.session.turns[-1] == Turn("model", answer.text, tuple(answer.ids))
    talk.say("the tin")


def test_an_error_leaves_a_conversation_that_can_go_on(loaded: tuple[Model, Tokenizer]) -> None:
    talk = Talk(loaded)
    talk.say("the man")

    def fail(piece: str) -> None:
        raise RuntimeError("on purpose")

    talk.session.add(Turn("user", "ten hens"))
    with pytest.raises(RuntimeError):
        talk.conversation.answer(Sampler(DRAWN), emit=fail)
    talk.answer()


def test_the_ids_of_what_was_said() -> None:
    tokenizer = Tokenizer(train())
    ids = [*tokenizer.encode("the dog sleeps"), *tokenizer.encode(b"\xc3\xff")]
    whole = tokenizer.decode(ids)
    assert said(tokenizer, Answer(0, whole, ids)) == tuple(ids)
    for cut in range(len(whole)):
        kept = said(tokenizer, Answer(0, whole[:cut], ids))
        assert tokenizer.decode(kept) == whole[:cut]
        whole_ones = [n for n in range(len(ids)) if len(tokenizer.decode(ids[:n])) <= cut]
        assert list(kept[: max(whole_ones)]) == ids[: max(whole_ones)]
