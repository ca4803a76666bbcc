"""Every source's vocabulary as one SentencePiece model, safe to feed with users' text.

A model file carries a serialized `ModelProto` (sentencepiece_model.proto of google/sentencepiece).
Its wire format is written and read here: the generated Python module of the sentencepiece package
works with one generation of protobuf only, and the few fields needed are simple.

Original Gemma tokenizers type markers such as `<start_of_turn>` or `<unused7>` differently from
generation to generation. SentencePiece finds user-defined pieces in text but never control pieces,
so here markers become control pieces once, and whoever loads the model can trust it.
"""

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import sentencepiece

from quantize.checkpoint.source import read_file
from quantize.config import check_json_size
from quantize.errors import GemmaError, shown

# Gemma 3's take 5 and 33 MB; the second holds 2.5 million values by the count of check_json_size.
LARGEST_MODEL = 20_000_000
_LARGEST_JSON = 64_000_000
_MAX_JSON_VALUES = 3_500_000
_MAX_FIELDS = 1_000_000

SPACE = "▁"  # U+2581, how SentencePiece writes a space


class PieceType(IntEnum):
    """Kinds of pieces; ModelProto and GGUF number them alike."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """One entry of the vocabulary: its text (spaces as `▁`), merge score and kind."""

    text: str
    score: float
    kind: PieceType


def control_pieces_as_control(model_proto: bytes, where: str = "The tokenizer") -> bytes:
    """Type every marker of a SentencePiece model as a control piece.

    All else is kept byte for byte; a model whose markers are typed so already comes back equal.
    `where` names the file in errors. Raises GemmaError if this is no SentencePiece model with byte
    fallback, BOS and EOS that leaves text as it is, as Gemma's does.
    """
    out = bytearray()
    try:
        for n_fields, (number, field, value) in enumerate(_fields(model_proto, _MODEL_KINDS)):
            if n_fields > _MAX_FIELDS:
                raise ValueError(f"it has more than {_MAX_FIELDS} fields")
            if number in _NORMALIZERS:
                _check_normalizer(value)
            if number == _PIECES and (b"<" in value or b"[" in value):  # every marker has one
                text, score, kind = _read_piece(value)
                safe = _safe_kind(text, kind)
                out += field if safe == kind else _write_pieces([text], [score], [safe])
            else:
                out += field
    except (ValueError, struct.error) as error:
        raise GemmaError(
            f"{where} is not a SentencePiece model ({error}); download it again."
        ) from error
    return _checked(bytes(out), where)


def sentencepiece_from_gguf(metadata: Mapping[str, object], where: str = "The GGUF file") -> bytes:
    """Build a ModelProto from the `tokenizer.ggml.*` keys of a GGUF file.

    `where` names the file in errors. Raises GemmaError if keys are missing or disagree.
    """

    def sequence(key: str, kinds: set[type]) -> Sequence[object]:
        values = metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(values, Sequence) or isinstance(values, str | bytes):
            raise GemmaError(f"{where} has no list tokenizer.ggml.{key}; convert the model anew.")
        if not set(map(type, values)) <= kinds:
            raise GemmaError(
                f"{where} has values of a wrong type in tokenizer.ggml.{key}; convert it anew."
            )
        return values

    model = metadata.get("tokenizer.ggml.model")
    if model != "llama":
        raise GemmaError(
            f"{where} has a tokenizer of the kind {shown(model)}, not 'llama', which Gemma 1 to 3 "
            "use; choose a Gemma 1, 2 or 3 model."
        )
    tokens = cast(Sequence[str], sequence("tokens", {str}))
    scores = cast(Sequence[float], sequence("scores", {float, int}))
    kinds = cast(Sequence[int], sequence("token_type", {int}))
    if not (np.abs(np.array(scores, np.float64)) < 1e30).all():  # NaN too
        raise GemmaError(f"{where} has tokenizer scores that are no numbers; convert it anew.")
    if not len(tokens) == len(scores) == len(kinds):
        raise GemmaError(
            f"{where} has {len(tokens)} tokens, {len(scores)} scores and {len(kinds)} token types; "
            "the numbers must agree, so convert the model anew."
        )
    special = {}
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id", -1)
        if not isinstance(index, int) or not -1 <= index < len(tokens):
            raise GemmaError(
                f"{where} has no token number {shown(index)} ({key}); convert it anew."
            )
        # By name first: some files of tuned models call end-of-turn EOS, and lose the real one.
        special[role] = ids.get(f"<{role}>", index)

    if unknown := set(kinds).difference(PieceType):
        raise GemmaError(f"{where} has the unknown token type {min(unknown)}; convert it anew.")
    # GGUF holds user-defined pieces as they stand in a text, with plain spaces. Text reaches the
    # matcher with its spaces written as ▁, so runs of spaces would never be found.
    user_defined = PieceType.USER_DEFINED
    texts = [
        token.replace(" ", SPACE) if kind == user_defined else token
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    return _model(texts, scores, kinds, special, where)


def sentencepiece_from_tokenizer_json(path: Path) -> bytes:
    """Build a ModelProto from the `tokenizer.json` of a Hugging Face Gemma.

    A piece's score is minus the rank of the first merge that makes it: SentencePiece merges by
    score, so the order is the same. Raises GemmaError if the file is not Gemma's kind: BPE with
    byte fallback, whose normalizer only writes spaces as `▁`.
    """
    where = f"The tokenizer {path}"
    try:
        text = str(read_file(path, _LARGEST_JSON), "utf-8-sig")
        check_json_size(text, _MAX_JSON_VALUES)
        root = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GemmaError(f"{where} is not JSON ({error}); download it again.") from error
    try:
        if root["model"]["type"] != "BPE" or root["model"]["byte_fallback"] is not True:
            raise ValueError("it is not BPE with byte fallback")
        if not _only_escapes_spaces(root["normalizer"]):
            raise ValueError("its normalizer does other things than writing spaces as ▁")
        if not _keeps_text_whole(root["pre_tokenizer"]):
            raise ValueError("it cuts the text before merging")
        texts, scores, kinds = _columns_of_json(root)
        unknown = root["model"]["unk_token"]
        if not isinstance(unknown, str):
            raise ValueError("its unknown token is no text")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise GemmaError(
            f"{where} is not like Gemma's ({what:.200}); choose a Gemma 1, 2 or 3 model."
        ) from error
    ids = {text: index for index, text in enumerate(texts)}
    special = {
        "bos": ids.get("<bos>", -1),
        "eos": ids.get("<eos>", -1),
        "unk": ids.get(unknown, -1),
        "pad": ids.get("<pad>", -1),
    }
    return _model(texts, scores, kinds, special, where)


# What is a marker

# User-defined pieces of Gemma that are markup in ordinary text, and stay such.
_MARKUP = re.compile(
    r"</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup"
    r"|code|a|html|body|img|span|bbox|ul|li|div|iframe|footer)>"
)
_BRACKETED = re.compile(r"<.+>|\[.+\]")
# Some published GGUF files even type these as normal pieces.
_MARKER = re.compile(
    r"<(pad|eos|bos|mask|2mass|unused\d+|(start|end)_of_\w+|\w+_soft_token|\|.+\|)>"
    r"|\[(@BOS@|multimodal)\]"
)


def _safe_kind(text: str, kind: int) -> int:
    if kind in (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.BYTE):
        return kind
    marker = _MARKER.fullmatch(text) is not None
    if kind == PieceType.USER_DEFINED and _BRACKETED.fullmatch(text):
        marker = _MARKUP.fullmatch(text) is None
    return PieceType.CONTROL if marker else kind


# Reading tokenizer.json


def _only_escapes_spaces(normalizer: object) -> bool:
    return normalizer == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _keeps_text_whole(pre_tokenizer: object) -> bool:
    # Gemma's file splits at spaces, of which the normalizer has left none.
    return pre_tokenizer is None or (
        isinstance(pre_tokenizer, dict)
        and pre_tokenizer.get("type") == "Split"
        and pre_tokenizer.get("pattern") == {"String": " "}
    )


def _columns_of_json(root: dict[str, object]) -> tuple[list[str], list[float], list[int]]:
    """The texts, scores and kinds of all pieces, by their ids."""
    model = cast(dict[str, object], root["model"])
    vocab = dict(cast(dict[str, int], model["vocab"]))
    special = {}
    for token in cast(list[dict[str, object]], root["added_tokens"]):
        # Added tokens are matched in the text itself, where a space is a space.
        text = str(token["content"]).replace(" ", SPACE)
        special[text] = bool(token["special"])
        if vocab.setdefault(text, cast(int, token["id"])) != token["id"]:
            raise ValueError(f"the added token {shown(text)} has two ids")
    by_id: list[str | None] = [None] * len(vocab)
    for text, index in vocab.items():
        if not 0 <= index < len(by_id) or by_id[index] is not None:
            raise ValueError(f"the ids are not 0 to {len(by_id) - 1}")
        by_id[index] = text

    rank: dict[str, int] = {}
    for merge in cast(list[str | list[str]], model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, len(rank))

    def kind(text: str) -> PieceType:
        if text == model["unk_token"]:
            return PieceType.UNKNOWN
        if text in special:
            return PieceType.CONTROL if special[text] else PieceType.USER_DEFINED
        return PieceType.BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", text) else PieceType.NORMAL

    texts = cast(list[str], by_id)
    # Single characters are never the result of a merge: their score is not looked at.
    return texts, [-float(rank.get(text, 0)) for text in texts], [kind(text) for text in texts]


# Writing and checking the model


def _model(
    texts: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    special: Mapping[str, int],
    where: str,
) -> bytes:
    """Serialize a BPE model; `special` maps bos, eos, unk and pad to ids, -1 for none."""
    # Every marker starts with one of these.
    safe = [
        _safe_kind(text, kind) if text.startswith(("<", "[")) else kind
        for text, kind in zip(texts, kinds, strict=True)
    ]
    for index in set(special.values()) - {-1}:
        # Published GGUF files type <unk> as control, but a model must have one unknown piece.
        safe[index] = PieceType.UNKNOWN if index == special["unk"] else PieceType.CONTROL
    try:
        out = _write_pieces(texts, scores, safe)
    except UnicodeEncodeError as error:
        raise GemmaError(
            f"{where} has a piece that is no text (number {texts.index(error.object)}); download"
            " it again."
        ) from error
    trainer = _integer(3, 2) + _integer(4, len(texts)) + _integer(35, 1)  # BPE, byte_fallback
    for number, role in enumerate(("unk", "bos", "eos", "pad")):
        index = special[role]
        trainer += _integer(40 + number, index)
        if index >= 0:
            trainer += _bytes(45 + number, texts[index].encode())
    # Spaces are escaped, and text is otherwise left as it is: no dummy prefix, nothing removed.
    normalizer = _bytes(1, b"identity") + _integer(3, 0) + _integer(4, 0) + _integer(5, 1)
    return _checked(out + _bytes(2, trainer) + _bytes(3, normalizer), where)


def _checked(model_proto: bytes, where: str) -> bytes:
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(model_proto)
        model.id_to_piece(list(range(len(model))))  # so that none is invalid UTF-8
    except (RuntimeError, ValueError) as error:  # SentencePiece's message may be invalid UTF-8 too
        raise GemmaError(
            f"{where} does not hold a tokenizer that SentencePiece can load; download it again."
        ) from error
    if min(model.bos_id(), model.eos_id(), model.unk_id()) < 0:
        raise GemmaError(f"{where} lacks <bos>, <eos> or <unk>; choose a Gemma 1, 2 or 3 model.")
    if not all(model.is_byte(model.piece_to_id([f"<0x{byte:02X}>" for byte in range(256)]))):
        raise GemmaError(f"{where} lacks byte pieces; choose a Gemma 1, 2 or 3 model.")
    if model.normalize("  \ufb01 ") != "▁▁\ufb01▁":
        raise GemmaError(f"{where} changes the text, which Gemma's does not; choose another model.")
    return model_proto


# The wire format (protobuf.dev/programming-guides/encoding)

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
# ModelProto: pieces = 1, trainer_spec = 2, normalizer_spec = 3, denormalizer_spec = 5.
_PIECES, _NORMALIZERS = 1, (3, 5)
_MODEL_KINDS = dict.fromkeys((_PIECES, 2, *_NORMALIZERS), _LENGTH)
_PIECE_KINDS = {1: _LENGTH, 2: _FIXED32, 3: _VARINT}
_CHARACTER_MAP = 2  # NormalizerSpec: precompiled_charsmap
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}


def _varint(value: int) -> bytes:
    if 0 <= value < 0x80:
        return bytes((value,))
    value &= (1 << 64) - 1  # negative numbers are written as their 64-bit complement
    return bytes((value & 0x7F | 0x80,)) + _varint(value >> 7)


def _integer(number: int, value: int) -> bytes:
    return _varint(number << 3 | _VARINT) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH) + _varint(len(value)) + value


@cache
def _piece_start(n_bytes: int) -> bytes:
    """What comes before the text, of `n_bytes`, in the field of a piece."""
    start = _varint(1 << 3 | _LENGTH) + _varint(n_bytes)
    return _varint(_PIECES << 3 | _LENGTH) + _varint(len(start) + n_bytes + 7) + start


def _write_pieces(texts: Iterable[str], scores: Iterable[float], kinds: Iterable[int]) -> bytes:
    # A model has 262,144 of them: as few calls for each as can be.
    rest = struct.Struct("<BfBB").pack
    score_key, kind_key = 2 << 3 | _FIXED32, 3 << 3 | _VARINT
    return b"".join(
        _piece_start(len(text)) + text + rest(score_key, score, kind_key, kind)
        for text, score, kind in zip(map(str.encode, texts), scores, kinds, strict=True)
    )


def _read_piece(message: bytes) -> Piece:
    text, score, kind = "", 0.0, PieceType.NORMAL
    for number, _, value in _fields(message, _PIECE_KINDS):
        if number == 1:
            text = value.decode()
        elif number == 2:
            (score,) = struct.unpack("<f", value)
        elif number == 3:
            kind = PieceType(_read_varint(value, 0)[0])
    return Piece(text, score, kind)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at == len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number in it has no end")


def _check_normalizer(message: bytes) -> None:
    """Raises ValueError if a normalizer changes characters.

    Gemma's does not; the table would be a structure of pointers that SentencePiece follows.
    """
    for number, _, value in _fields(message, {_CHARACTER_MAP: _LENGTH}):
        if number == _CHARACTER_MAP and value:
            raise ValueError("it changes characters, which Gemma's does not")


def _fields(data: bytes, kinds: Mapping[int, int]) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield the number, the whole bytes and the value's bytes of each field of a message.

    kinds: what known fields must be; protobuf would skip one of another kind, and read something
    else than is read here.
    """
    at = 0
    while at < len(data):
        start = at
        key, at = _read_varint(data, at)
        kind = key & 7
        if kinds.get(key >> 3, kind) != kind:
            raise ValueError(f"its field {key >> 3} is of the wrong kind {kind}")
        if kind == _LENGTH:
            size, at = _read_varint(data, at)
        elif kind == _VARINT:
            size = _read_varint(data, at)[1] - at
        elif kind in _FIXED_SIZES:
            size = _FIXED_SIZES[kind]
        else:
            raise ValueError(f"it has a field of the unknown kind {kind}")
        end = at + size
        if end > len(data):
            raise ValueError("it is cut off")
        yield key >> 3, data[start:end], data[at:end]
        at = end
