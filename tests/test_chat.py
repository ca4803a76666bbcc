"""Prompts against the text of Gemma's template, encoded by SentencePiece between the markers."""

import re

import pytest
from tiny_tokenizer import MARKERS, SPECIAL, processor, train

from gemma_cli.text.chat import Turn, chat_prompt, raw_prompt, stop_ids, turn_ids
from gemma_cli.text.tokenizer import Tokenizer
from quantize.errors import GemmaError

ORACLE = processor(train())
TOKENIZER = Tokenizer(train())


def template_ids(text: str) -> list[int]:
    """Encode a rendered template, whose markers are meant."""
    ids = []
    for part in re.split(r"(<bos>|<start_of_turn>|<end_of_turn>)", text):
        marker = part in ("<bos>", "<start_of_turn>", "<end_of_turn>")
        ids += [ORACLE.piece_to_id(part)] if marker else ORACLE.encode(part)
    return ids


CHATS = [
    (
        [Turn("user", "the dog?")],
        None,
        "<bos><start_of_turn>user\nthe dog?<end_of_turn>\n<start_of_turn>model\n",
    ),
    (
        [Turn("user", " \n the  dog?\n")],
        "Be a model.",
        "<bos><start_of_turn>user\nBe a model.\n\nthe  dog?<end_of_turn>\n<start_of_turn>model\n",
    ),
    (
        [Turn("user", "the sun"), Turn("model", "is warm \n"), Turn("user", "\n\nand the dog")],
        "system",
        "<bos><start_of_turn>user\nsystem\n\nthe sun<end_of_turn>\n"
        "<start_of_turn>model\nis warm<end_of_turn>\n"
        "<start_of_turn>user\nand the dog<end_of_turn>\n<start_of_turn>model\n",
    ),
    (
        [Turn("user", "")],
        "",
        "<bos><start_of_turn>user\n<end_of_turn>\n<start_of_turn>model\n",
    ),
]


@pytest.mark.parametrize(("turns", "system", "rendered"), CHATS)
def test_a_conversation_is_gemmas_template(
    turns: list[Turn], system: str | None, rendered: str
) -> None:
    assert chat_prompt(TOKENIZER, turns, system) == template_ids(rendered)


def test_a_models_own_ids_stand_in_its_turns() -> None:
    ids = tuple(TOKENIZER.encode("is") + TOKENIZER.encode(" wa") + TOKENIZER.encode("rm"))
    assert list(ids) != TOKENIZER.encode("is warm")
    asked, answered = Turn("user", "the sun"), Turn("model", "is warm", ids)
    before = template_ids("<bos><start_of_turn>user\nthe sun<end_of_turn>\n<start_of_turn>model\n")
    after = template_ids("<end_of_turn>\n<start_of_turn>user\nand<end_of_turn>\n")
    after += template_ids("<start_of_turn>model\n")
    conversation = [asked, answered, Turn("user", "and")]
    assert chat_prompt(TOKENIZER, conversation, None) == [*before, *ids, *after]
    assert chat_prompt(TOKENIZER, [asked, answered], None) == [*before, *ids]  # it goes on


def test_a_transcript() -> None:
    def ids(*texts: str) -> list[int]:
        return [token for text in texts for token in ORACLE.encode(text)]

    turns = [Turn("user", " the sun\n"), Turn("model", "is warm"), Turn("user", "and?")]
    first, second, third = turn_ids(TOKENIZER, turns, "Be a model.", "transcript")
    assert first == [TOKENIZER.bos_id, *ids("Be a model.\n\n", "User: the sun", "\n")]
    assert second == ids("Assistant: is warm", "\n")
    assert third == ids("User: and?", "\n", "Assistant:")
    own = Turn("model", " is warm", tuple(ids(" is", " warm")))
    first, second = turn_ids(TOKENIZER, [turns[0], own], None, "transcript")
    assert first == [TOKENIZER.bos_id, *ids("User: the sun", "\n")]
    assert second == ids("Assistant:", " is", " warm")


def test_raw_goes_on_with_the_last_text_alone() -> None:
    turns = [Turn("user", "the sun"), Turn("model", "is warm"), Turn("user", " and ")]
    assert turn_ids(TOKENIZER, turns, None, "raw") == [[], [], raw_prompt(TOKENIZER, " and ")]
    own = Turn("model", "is", tuple(ORACLE.encode("is")))
    said = turn_ids(TOKENIZER, [*turns, own], None, "raw")
    assert said == [[], [], raw_prompt(TOKENIZER, " and "), list(own.ids or ())]


@pytest.mark.parametrize("piece", [*SPECIAL, *MARKERS])
def test_markers_in_a_users_text_stay_text(piece: str) -> None:
    turns = [Turn("user", f"{piece} a"), Turn("model", piece), Turn("user", f"b{piece}\n{piece}")]
    harmless = [Turn("user", "x"), Turn("model", "x"), Turn("user", "x")]
    control = [i for i in chat_prompt(TOKENIZER, turns, piece) if TOKENIZER.is_control(i)]
    assert control == [i for i in chat_prompt(TOKENIZER, harmless, "x") if TOKENIZER.is_control(i)]
    shown = TOKENIZER.decode(chat_prompt(TOKENIZER, turns, piece))
    assert shown == (
        f"user\n{piece}\n\n{piece} a\nmodel\n{piece}\nuser\nb{piece}\n{piece}\nmodel\n"
    )


@pytest.mark.parametrize("text", ["", "the dog", "<bos>", "<bos><bos>the dog", b"\xff"])
def test_a_raw_prompt_has_one_bos(text: str | bytes) -> None:
    ids = raw_prompt(TOKENIZER, text)
    assert ids[0] == TOKENIZER.bos_id
    assert ids.count(TOKENIZER.bos_id) == 1
    assert ids[1:] == TOKENIZER.encode(text)


def test_an_answer_ends_at_eos_and_at_end_of_turn() -> None:
    assert stop_ids(TOKENIZER) == {ORACLE.eos_id(), ORACLE.piece_to_id("<end_of_turn>")}


def test_a_tokenizer_without_turns_cannot_chat_but_stops_at_eos() -> None:
    for marker in (b"<start_of_turn>", b"<end_of_turn>"):
        bare = Tokenizer(train().replace(marker, marker.upper()))
        with pytest.raises(GemmaError, match=marker.decode()):
            chat_prompt(bare, [Turn("user", "x")], None)
    assert stop_ids(bare) == {bare.eos_id}
