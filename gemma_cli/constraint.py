"""Answers of a given form: which ids may come next, by llguidance's parser.

llguidance (github.com/guidance-ai/llguidance) walks a grammar and the vocabulary's trie together.
What is drawn is left to the sampler.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from quantize.errors import GemmaError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gemma_cli.text.tokenizer import Tokenizer

try:
    import llguidance
except ImportError:  # the extra is not installed
    llguidance = None  # type: ignore[assignment]

# As json.dumps writes it: one line, and no room for a model to lose itself in spaces.
_JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


def require() -> None:
    """Raises GemmaError if llguidance is not installed."""
    if llguidance is None:
        raise GemmaError(
            "An answer of a given form takes the package llguidance, which is not installed: "
            "pip install 'gemma-cli[constrained]'."
        )


def json_grammar(schema: str) -> str:
    """The grammar of a JSON Schema's values, on one line, properties in the schema's order.

    Raises ValueError, with a reason, if it is no schema or says what llguidance cannot do.
    """
    require()
    parsed = json.loads(schema)
    if not isinstance(parsed, dict | bool):
        raise ValueError("a schema is an object")
    return _checked(llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_STYLE))


def regex_grammar(regex: str) -> str:
    """The grammar of the texts that match from their beginning to their end (Rust's syntax of
    regular expressions, without look-around). Raises ValueError as json_grammar does."""
    require()
    return _checked(llguidance.LLMatcher.grammar_from_regex(_without_anchors(regex)))


def choice_grammar(choices: Sequence[str]) -> str:
    """The grammar of a few texts. Raises ValueError as json_grammar does."""
    require()
    if not all(choices):
        raise ValueError("a choice is empty")
    texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return _checked(llguidance.LLMatcher.grammar_from_lark(f"start: {texts}"))


def short_schema(text: str) -> str:
    """The JSON Schema of an object with the properties of a list such as "name, age int"; they are
    str, int, float or bool, str if nothing is said. Raises ValueError, with a reason."""
    properties: dict[str, dict[str, str]] = {}
    for item in text.replace("\n", ",").split(","):
        name, *types = item.split() or [""]
        kind = types[0] if types else "str"
        if not name or len(types) > 1 or kind not in _TYPES or name in properties:
            raise ValueError(
                f"{item.strip()!r} is not a new name and one of {', '.join(_TYPES)}, as in "
                "'name, age int'"
            )
        properties[name] = {"type": _TYPES[kind]}
    return json.dumps(
        {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    )


def _without_anchors(regex: str) -> str:
    """The whole text is matched in any case; the parser knows no anchors."""
    regex = regex.removeprefix("^")
    backslashes = len(regex[:-1]) - len(regex[:-1].rstrip("\\"))
    return regex[:-1] if regex.endswith("$") and backslashes % 2 == 0 else regex


def _checked(grammar: str) -> str:
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise ValueError(_one_line(messages[0]))
    return grammar


def _one_line(message: str) -> str:
    """A parser's message without the places and excerpts around it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("error: ")), lines[0])
    return re.sub(r"^(at \d+\(\d+\)|error): ", "", said).rstrip(".")


class _Pieces:
    """The vocabulary as llguidance asks for it."""

    is_tokenizer_wrapper = True
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens = tokenizer.all_token_bytes()  # control pieces are empty: no text leads there
        # Rows that fill up the embedding are no tokens.
        self.tokens += [b""] * (vocab_size - len(self.tokens))

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text)


class Vocabulary:
    """A tokenizer's pieces in a trie. Making it takes most of a second of Gemma 3's 262,144."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> None:
        require()
        self.size = vocab_size
        self.stop_ids = stop_ids
        self.eos_id = tokenizer.eos_id
        # "Slices" of the vocabulary, known beforehand, would save less time than making them takes.
        pieces = llguidance.TokenizerWrapper(_Pieces(tokenizer, vocab_size))
        self.trie = llguidance.LLTokenizer(pieces, eos_token=self.eos_id, slices=[])


class Constraint:
    """The form of one answer, and how far it has come.

    `forced` are the ids of text that must come next, as the tokenizer would divide it. Any other
    division would be right, too: they spare the model the choice. Raises GemmaError when a grammar
    takes the parser too much time or memory.
    """

    def __init__(self, vocabulary: Vocabulary, grammar: str) -> None:
        self._vocabulary = vocabulary
        self._start(llguidance.LLMatcher(vocabulary.trie, grammar, log_level=0))

    def _start(self, matcher: Any) -> None:
        self._matcher = matcher
        self._stopped = False
        self._check()
        self.forced: list[int] = matcher.compute_ff_tokens()

    def copy(self) -> Constraint:
        """One of its own, as far as this one has come."""
        twin = object.__new__(Constraint)
        twin._vocabulary = self._vocabulary
        twin._start(self._matcher.deep_copy())
        return twin

    @property
    def satisfied(self) -> bool:
        """Whether the answer, as it is, has the form."""
        return bool(self._matcher.is_accepting())

    @property
    def ended(self) -> bool:
        """Whether nothing more may come."""
        return self._stopped or bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """Which ids may come next, (vocab_size,); those that end the answer once it has the
        form."""
        vocabulary = self._vocabulary
        mask = np.zeros(-(-vocabulary.size // 32), np.uint32)  # a bit for each id, the lowest first
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()
        bits = np.unpackbits(mask.view(np.uint8), count=vocabulary.size, bitorder="little")
        bits[list(vocabulary.stop_ids)] = bits[vocabulary.eos_id]
        return bits.view(np.bool_)

    def allows(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of a few ids may come next. To try one takes the parser a microsecond; to look at
        all takes it milliseconds, where text is free, which is a third of a small model's time."""
        eos, stops = self._vocabulary.eos_id, self._vocabulary.stop_ids
        tried = ([eos if token in stops else token] for token in ids.tolist())
        may = np.array([self._matcher.validate_tokens(one) == 1 for one in tried], np.bool_)
        self._check()
        return may

    def accept(self, token: int) -> None:
        """Goes on by an id that is allowed."""
        if token in self._vocabulary.stop_ids:
            self._stopped, self.forced = True, []
            return
        self._matcher.consume_token(token)
        self._check()
        self.forced = [] if self.ended else self._matcher.compute_ff_tokens()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GemmaError(
                "The form asked of the answer is too much for the parser "
                f"({_one_line(self._matcher.get_error())}): make it simpler."
            )
