"""The pieces of a stream are the whole text, as soon as it is certain."""

from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import TEXTS, train

from gemma_cli.text.stream import StreamDecoder
from gemma_cli.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(train())


def byte_ids(data: bytes) -> list[int]:
    ids = [TOKENIZER.piece_id(f"<0x{byte:02X}>") for byte in data]
    return [token for token in ids if token is not None]


def stream(ids: list[int]) -> list[str]:
    decoder = StreamDecoder(TOKENIZER)
    return [*map(decoder.push, ids), decoder.flush()]


def test_a_character_of_four_byte_pieces_appears_once_and_whole() -> None:
    assert stream(byte_ids("😀".encode())) == ["", "", "", "😀", ""]


def test_what_cannot_become_a_character_comes_at_once() -> None:
    lead, letter = byte_ids(b"\xf0a")
    assert stream([lead, letter]) == ["", "\udcf0a", ""]
    assert stream(byte_ids(b"\xff")) == ["\udcff", ""]


def test_flush_gives_what_is_held_back_and_starts_afresh() -> None:
    decoder = StreamDecoder(TOKENIZER)
    lead, middle, *_ = byte_ids("😀".encode())
    assert [decoder.push(lead), decoder.push(middle), decoder.flush()] == ["", "", "\udcf0\udc9f"]
    assert decoder.push(TOKENIZER.encode("the")[0]) == "the"


def test_spaces_are_kept_and_markers_have_no_text() -> None:
    start = TOKENIZER.piece_id("<start_of_turn>")
    assert start is not None
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("  the"), start, *TOKENIZER.encode(" dog ")]
    assert "".join(stream([*ids, TOKENIZER.eos_id])) == "  the dog "


@given(st.lists(st.integers(0, TOKENIZER.vocab_size + 1)))
def test_any_ids_give_the_text_that_decoding_them_together_gives(ids: list[int]) -> None:
    assert "".join(stream(ids)) == TOKENIZER.decode(ids)


@given(st.binary(max_size=12))
def test_any_bytes_come_back(data: bytes) -> None:
    text = "".join(stream(byte_ids(data)))
    assert text.encode("utf-8", "surrogateescape") == data


def test_texts_come_back() -> None:
    for text in TEXTS:
        assert "".join(stream(TOKENIZER.encode(text))) == text.replace("▁", " ")
