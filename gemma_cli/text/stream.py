"""Tokens to text while they come."""

import codecs

from gemma_cli.text.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes one token after the other, holding back characters that are not complete yet.

    The pushes and the flush joined are what `Tokenizer.decode` makes of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def push(self, token: int) -> str:
        """Return the text that is certain now; bytes that can become none are surrogates."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """Return what is held back, as surrogates, and start afresh."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
