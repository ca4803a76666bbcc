"""Vocabularies as other formats hold them give the ids of the tokenizer they came from."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tiny_tokenizer import CORPUS, MARKERS, MARKUP, NEWLINES, SPACES, TABS, TEXTS, processor, train

from quantize.checkpoint.sentencepiece_model import (
    control_pieces_as_control,
    sentencepiece_from_gguf,
    sentencepiece_from_tokenizer_json,
)
from quantize.errors import GemmaError

ORACLE = processor(train())
IDS = list(range(len(ORACLE)))
PIECES: list[str] = ORACLE.id_to_piece(IDS)
PLAIN = [piece.replace(" ", "▁") for piece in [*SPACES, *NEWLINES, *TABS, *MARKUP]]
BYTE = re.compile("<0x[0-9A-F]{2}>")


def assert_same_tokenizer(model_proto: bytes) -> None:
    model = processor(model_proto)
    assert model.id_to_piece(IDS) == PIECES
    assert len(model) == len(IDS)
    for kind in ("is_control", "is_unknown", "is_byte", "is_unused"):
        assert getattr(model, kind)(IDS) == getattr(ORACLE, kind)(IDS)
    for special in ("pad_id", "eos_id", "bos_id", "unk_id"):
        assert getattr(model, special)() == getattr(ORACLE, special)()
    for text in [*TEXTS, *CORPUS.splitlines(), CORPUS, *MARKERS, "the<start_of_turn>dog"]:
        assert model.encode(text) == ORACLE.encode(text)


# GGUF


def gguf(**changes: object) -> dict[str, object]:
    """Return the metadata that a converter writes: spaces plain in user-defined pieces."""
    metadata: dict[str, object] = {
        "model": "llama",
        "tokens": [piece.replace("▁", " ") if piece in PLAIN else piece for piece in PIECES],
        "scores": ORACLE.get_score(IDS),
        "token_type": [
            # <unk> is a control token in the files as published.
            3
            if ORACLE.is_control(i) or ORACLE.is_unknown(i)
            else 6
            if ORACLE.is_byte(i)
            else 4
            if PIECES[i] in PLAIN
            else 1
            for i in IDS
        ],
        "padding_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "unknown_token_id": 3,
        "add_space_prefix": False,
    }
    metadata.update(changes)
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def test_gguf_gives_the_tokenizer_it_was_made_from() -> None:
    assert_same_tokenizer(sentencepiece_from_gguf(gguf()))


def test_gguf_markers_become_control_whatever_their_type() -> None:
    types: Any = gguf()["tokenizer.ggml.token_type"]
    for wrong in (1, 4):
        retyped = [wrong if PIECES[i] in MARKERS else kind for i, kind in enumerate(types)]
        assert_same_tokenizer(sentencepiece_from_gguf(gguf(token_type=retyped)))


def test_gguf_special_ids_go_by_name_before_number() -> None:
    end_of_turn = PIECES.index("<end_of_turn>")
    assert_same_tokenizer(sentencepiece_from_gguf(gguf(eos_token_id=end_of_turn)))
    assert_same_tokenizer(sentencepiece_from_gguf(gguf(bos_token_id=None, unknown_token_id=None)))


def replaced(key: str, index: int, value: object) -> dict[str, object]:
    values: Any = gguf()[f"tokenizer.ggml.{key}"]
    return gguf(**{key: [*values[:index], value, *values[index + 1 :]]})


@pytest.mark.parametrize(
    ("metadata", "what"),
    [
        (gguf(model="gpt2"), "kind 'gpt2'"),
        (gguf(model=None), "kind None"),
        (gguf(tokens=None), "no list tokenizer.ggml.tokens"),
        (gguf(scores=None), "no list tokenizer.ggml.scores"),
        (gguf(token_type="3" * len(IDS)), "no list tokenizer.ggml.token_type"),
        (gguf(scores=[0.0]), f"{len(IDS)} tokens, 1 scores"),
        (gguf(tokens=[], scores=[], token_type=[]), "no token number"),
        (gguf(bos_token_id=len(IDS)), r"no token number \d+ \(bos\)"),
        (gguf(unknown_token_id=-2), r"no token number -2 \(unknown\)"),
        (gguf(eos_token_id="1"), r"no token number '1' \(eos\)"),
        (replaced("tokens", 2, "<BOS>") | {"tokenizer.ggml.bos_token_id": -1}, "lacks <bos>"),
        (replaced("tokens", 300, 7), "wrong type in tokenizer.ggml.tokens"),
        (replaced("tokens", 300, PIECES[301]), "can load"),
        (replaced("tokens", 300, ""), "can load"),
        (replaced("tokens", 300, "\ud800"), "piece that is no text"),
        (replaced("tokens", PIECES.index("<0x41>"), "<0xZZ>"), "can load"),
        (replaced("token_type", PIECES.index("<0x41>"), 1), "can load"),
        (replaced("token_type", 300, 0), "unknown token type 0"),
        (replaced("token_type", 300, 7), "unknown token type 7"),
        (replaced("scores", 300, float("nan")), "scores"),
        (replaced("scores", 300, 1e300), "scores"),
    ],
)
def test_damaged_gguf_metadata_is_one_sentence(metadata: dict[str, object], what: str) -> None:
    with pytest.raises(GemmaError, match=f"^some.gguf .*{what}"):
        sentencepiece_from_gguf(metadata, "some.gguf")


# tokenizer.json


def hugging_face() -> dict[str, Any]:
    """Return what a converter writes: each pair that makes a piece, best score first."""
    merges = []
    for i in IDS:
        piece = PIECES[i]
        if not (ORACLE.is_control(i) or ORACLE.is_unknown(i) or ORACLE.is_byte(i)):
            halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            known = [[left, right] for left, right in halves if {left, right} <= set(PIECES)]
            merges += [(ORACLE.get_score(i), pair) for pair in known]
    merges.sort(key=lambda merge: -merge[0])
    return {
        "added_tokens": [
            {"id": i, "content": PIECES[i], "special": PIECES[i] not in PLAIN}
            for i in IDS
            if ORACLE.is_control(i) or ORACLE.is_unknown(i) or PIECES[i] in PLAIN
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(PIECES)},
            "merges": [pair for _, pair in merges],
        },
    }


def write(folder: Path, root: object) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(root), encoding="utf-8")
    return path


@pytest.mark.parametrize("spell", [list, " ".join])
def test_tokenizer_json_gives_the_tokenizer_it_was_made_from(
    tmp_path: Path, spell: Callable[[list[str]], object]
) -> None:
    root = hugging_face()
    root["model"]["merges"] = [spell(pair) for pair in root["model"]["merges"]]
    assert_same_tokenizer(sentencepiece_from_tokenizer_json(write(tmp_path, root)))


def test_tokenizer_json_markers_become_control_though_added_as_ordinary(tmp_path: Path) -> None:
    root = hugging_face()
    for token in root["added_tokens"]:
        token["special"] = False
    assert_same_tokenizer(sentencepiece_from_tokenizer_json(write(tmp_path, root)))


def test_an_added_token_may_follow_the_vocabulary(tmp_path: Path) -> None:
    root = hugging_face()
    added = {"id": len(IDS), "content": "<image_soft_token>", "special": True}
    root["added_tokens"].append(added)
    model = processor(sentencepiece_from_tokenizer_json(write(tmp_path, root)))
    assert model.is_control(len(IDS))
    assert len(model) == len(IDS) + 1


def with_gap(root: dict[str, Any]) -> None:
    root["model"]["vocab"]["the"] = len(IDS) + 5


def with_two_ids(root: dict[str, Any]) -> None:
    root["added_tokens"][0]["id"] = 5


def without_bos(root: dict[str, Any]) -> None:
    vocab = root["model"]["vocab"]
    vocab["<BOS>"] = vocab.pop("<bos>")
    root["added_tokens"] = [t for t in root["added_tokens"] if t["content"] != "<bos>"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda root: root.pop("model"), "no 'model'"),
        (lambda root: root["model"].update(type="Unigram"), "not BPE"),
        (lambda root: root["model"].update(byte_fallback=False), "byte fallback"),
        (lambda root: root["model"].update(vocab=[["a", "b"]]), "not like Gemma's"),
        (lambda root: root["model"].update(merges=["a b c"]), "not like Gemma's"),
        (lambda root: root["model"].update(merges=[7]), "not like Gemma's"),
        (lambda root: root["model"].update(unk_token=["<unk>"]), "unknown token is no text"),
        (lambda root: root["model"].update(unk_token=None), "unknown token is no text"),
        (lambda root: root.update(normalizer={"type": "NFKC"}), "normalizer"),
        (lambda root: root.update(pre_tokenizer={"type": "ByteLevel"}), "cuts the text"),
        (lambda root: root.update(added_tokens=None), "not like Gemma's"),
        (with_gap, "ids are not 0 to"),
        (with_two_ids, "two ids"),
        (without_bos, "lacks <bos>"),
    ],
)
def test_another_tokenizer_json_is_one_sentence(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], what: str
) -> None:
    root = hugging_face()
    change(root)
    path = write(tmp_path, root)
    with pytest.raises(GemmaError, match=f"{re.escape(str(path))} .*{what}"):
        sentencepiece_from_tokenizer_json(path)


@pytest.mark.parametrize("text", ["", "[", "[]", "null", "[" * 100_000, '{"model": 1}', "\ufeff{}"])
def test_tokenizer_json_that_is_something_else_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(GemmaError, match=re.escape(str(path))):
        sentencepiece_from_tokenizer_json(path)


def test_a_missing_tokenizer_json_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(GemmaError, match="does not exist"):
        sentencepiece_from_tokenizer_json(tmp_path / "tokenizer.json")


# tokenizer.model


def test_a_model_that_is_safe_already_is_kept_byte_for_byte() -> None:
    assert control_pieces_as_control(train()) == train()


def test_user_defined_markers_become_control_and_nothing_else_changes() -> None:
    original = train(markers_as_control=False)
    before = processor(original)
    after = processor(control_pieces_as_control(original))
    ids = list(range(len(before)))
    assert after.id_to_piece(ids) == before.id_to_piece(ids)
    assert after.get_score(ids) == before.get_score(ids)
    retyped = {
        piece
        for piece, was, now in zip(
            before.id_to_piece(ids), before.is_control(ids), after.is_control(ids), strict=True
        )
        if was != now
    }
    assert retyped == set(MARKERS)
    for marker in MARKERS:
        assert before.piece_to_id(marker) in before.encode(marker)
        assert after.piece_to_id(marker) not in after.encode(marker)
        assert after.decode(after.encode(marker)) == marker
    for text in TEXTS:
        assert after.encode(text) == before.encode(text)


def test_no_cut_off_model_is_taken() -> None:
    model = train()
    for size in [*range(0, len(model), 97), *range(len(model) - 60, len(model))]:
        with pytest.raises(GemmaError, match=r"^x\.model "):
            control_pieces_as_control(model[:size], "x.model")


@pytest.mark.parametrize("piece", [b"<0x41>", b"the"])
def test_a_piece_that_is_invalid_utf8_is_not_taken(piece: bytes) -> None:
    with pytest.raises(GemmaError):
        control_pieces_as_control(train().replace(piece, b"\xff" + piece[1:]))


def test_a_model_that_changes_the_text_is_not_taken() -> None:
    # NormalizerSpec.add_dummy_prefix (field 3, an integer), from 0 to 1.
    model = train()
    at = model.rindex(b"identity") + len("identity")
    assert model[at : at + 4] == b"\x12\x00\x18\x00"
    changed = model[: at + 3] + b"\x01" + model[at + 4 :]
    assert sentencepiece.SentencePieceProcessor(model_proto=changed).normalize("x") == "▁x"
    with pytest.raises(GemmaError, match="changes the text"):
        control_pieces_as_control(changed)
