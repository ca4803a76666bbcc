"""Text to token ids and back: SentencePiece, made safe for text from anywhere."""

import re
from collections.abc import Iterable
from itertools import compress, zip_longest

import sentencepiece

from quantize.errors import GemmaError

# SentencePiece needs 100 bytes of memory a character and cannot be interrupted, so a long text goes
# to it in blocks. No piece spans a line's end and the next newline (SentencePiece is trained on
# lines; runs of newlines are pieces of their own), so cutting there changes no id.
_BLOCK = re.compile(r"(?s:.{65536})\n*[^\n]*|(?s:.+)")
_INVALID_BYTES = re.compile("([\udc80-\udcff]+)")  # as surrogateescape writes them
_OTHER_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


class Tokenizer:
    """A SentencePiece model whose markers are control pieces, as every model file carries it.

    Raises GemmaError if `model_proto` is not such a model.
    """

    def __init__(self, model_proto: bytes) -> None:
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model_proto)
        except (RuntimeError, ValueError) as error:  # its message may be invalid UTF-8
            raise GemmaError(
                "The model file's tokenizer cannot be loaded; quantize the checkpoint again."
            ) from error
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.pad_id: int = self._model.pad_id()
        self.unk_id: int = self._model.unk_id()
        self._byte_ids: list[int] = self._model.piece_to_id([f"<0x{b:02X}>" for b in range(256)])

    def encode(self, text: str | bytes) -> list[int]:
        """Return the ids that SentencePiece gives, without BOS; never a control id.

        Bytes are read as UTF-8. SentencePiece would replace what is invalid by U+FFFD; here each
        invalid byte becomes its byte piece, so that nothing is lost. In a `str` such bytes are the
        surrogates that `surrogateescape` leaves; any other lone surrogate becomes U+FFFD. Only a
        `▁` (U+2581) does not come back as it was: the vocabulary has it for the space.
        """
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        parts = _INVALID_BYTES.split(_OTHER_SURROGATE.sub("\ufffd", text))
        ids: list[int] = []
        for valid, invalid in zip_longest(parts[::2], parts[1::2], fillvalue=""):
            for block in _BLOCK.findall(valid):
                ids += self._model.encode(block)
            ids += map(self._byte_ids.__getitem__, invalid.encode("utf-8", "surrogateescape"))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; control pieces have none.

        Bytes that are not UTF-8 become surrogates, as `surrogateescape` writes them: encoded the
        same way, the text is the model's own bytes.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "surrogateescape")

    def token_bytes(self, token: int) -> bytes:
        """Return what a token adds to the text; b"" for control pieces."""
        if self.is_control(token):
            return b""
        piece = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes((int(piece[3:5], 16),))
        return piece.replace("▁", " ").encode()

    def all_token_bytes(self) -> list[bytes]:
        """Return `token_bytes` of every token, in a third of the time."""
        ids = list(range(self.vocab_size))
        texts = [piece.replace("▁", " ").encode() for piece in self._model.id_to_piece(ids)]
        for byte, token in enumerate(self._byte_ids):
            texts[token] = bytes((byte,))
        for token in compress(ids, self._model.is_control(ids)):
            texts[token] = b""
        texts[self.unk_id] = b""
        return texts

    def is_control(self, token: int) -> bool:
        """Tell whether a token is no text: control, <unk>, or a padding row of the embedding."""
        return (
            token >= self.vocab_size
            or self._model.is_control(token)
            or self._model.is_unknown(token)
        )

    def piece(self, token: int) -> str:
        """Return a token as the vocabulary spells it, with `▁` for spaces."""
        return self._model.id_to_piece(token) if token < self.vocab_size else f"<{token}>"

    def piece_id(self, piece: str) -> int | None:
        """Return the id of a piece as the vocabulary spells it, or None."""
        token: int = self._model.piece_to_id(piece)
        return token if self._model.id_to_piece(token) == piece else None
