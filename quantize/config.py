"""What a Gemma model is: one frozen record, and the typed reading of the mappings it comes from."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import cast

from quantize.errors import GemmaError, shown

GENERATIONS = ("gemma", "gemma2", "gemma3")
MAX_LAYERS = 1024
MAX_INTEGER = 2**31 - 1
_MAX_JSON_VALUES = 1_000_000


@dataclass(frozen=True, slots=True)
class GemmaConfig:
    """The architecture of a text model of Gemma 1, 2 or 3.

    Reports: arXiv:2403.08295, 2408.00118, 2503.19786.
    """

    generation: str
    """"gemma", "gemma2" or "gemma3"."""
    vocab_size: int
    """Rows of the embedding; a tokenizer may have fewer pieces."""
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    context_length: int
    """Tokens that the model was trained to see."""
    rms_norm_eps: float
    query_scale: float
    """Multiplies the queries: query_pre_attn_scalar ** -0.5."""
    rope_base: float
    """RoPE's base in global layers."""
    rope_scale: float
    """Positions are divided by it in global layers; 1.0 leaves them as they are."""
    rope_local_base: float
    """RoPE's base in sliding layers."""
    sliding_window: int
    """In a sliding layer a token sees itself and the window - 1 before it; 0: no such layer."""
    sliding_layers: tuple[bool, ...]
    """For each layer, whether it slides (else it is global)."""
    attention_soft_cap: float
    """Attention scores become cap * tanh(score / cap); 0.0: they stay."""
    final_soft_cap: float
    """The same for the logits."""

    @property
    def has_post_norms(self) -> bool:
        """Whether attention and feed-forward outputs are normalized before they are added."""
        return self.generation != "gemma"

    @property
    def has_qk_norm(self) -> bool:
        """Whether each head's query and key are normalized before RoPE."""
        return self.generation == "gemma3"

    def to_json(self) -> str:
        """All fields in their order, as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, where: str) -> "GemmaConfig":
        """What `to_json` wrote. Raises GemmaError, naming `where`, for anything else."""
        values = parse_json_object(text, where)
        names = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - names):
            raise GemmaError(
                f"{where} has the unknown field {shown(unknown[0])}: the file is damaged or was"
                " written by another version; convert the checkpoint again."
            )
        read = Fields(values, where)
        sliding = read.array("sliding_layers")
        if not all(isinstance(slides, bool) for slides in sliding):
            raise read.wrong("sliding_layers", "a list of true and false")
        readers = {int: read.integer, float: read.number, str: read.text}
        scalars = {
            field.name: readers[cast(type, field.type)](field.name)
            for field in fields(cls)
            if field.type in readers
        }
        config = cls(**scalars, sliding_layers=tuple(sliding))  # type: ignore[arg-type]
        return config.checked(where)

    def checked(self, where: str) -> "GemmaConfig":
        """This record, if the kernels can run it; else GemmaError, naming `where` and why."""
        for problem in self._problems():
            raise GemmaError(
                f"{where} does not describe a Gemma model that can be run: {problem}."
                " Use an unmodified checkpoint of Gemma 1, 2 or 3."
            )
        return self

    def _problems(self) -> Iterator[str]:
        if self.generation not in GENERATIONS:
            yield f"its generation is {shown(self.generation)}"
        for name in _SIZES:
            if not 0 < getattr(self, name) <= MAX_INTEGER:
                yield f"its {name} is {getattr(self, name)}"
        for name in _SCALES:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                yield f"its {name} is {getattr(self, name)}"
        for name in ("attention_soft_cap", "final_soft_cap"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                yield f"its {name} is {getattr(self, name)}"
        if self.n_layers > MAX_LAYERS:
            yield f"it has {self.n_layers} layers"
        if self.n_heads % self.n_kv_heads:
            yield f"its {self.n_heads} query heads do not divide among {self.n_kv_heads} key heads"
        if self.head_dim % 16:
            yield f"its head_dim {self.head_dim} is not a multiple of 16"
        for name, width in (
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("attention width", self.n_heads * self.head_dim),
        ):
            if width % 32:
                yield f"its {name} {width} is not a multiple of 32"
        n_sliding = sum(self.sliding_layers)
        if len(self.sliding_layers) != self.n_layers:
            yield f"it names the kind of {len(self.sliding_layers)} of {self.n_layers} layers"
        if not 0 <= self.sliding_window <= MAX_INTEGER or bool(self.sliding_window) != (
            n_sliding > 0
        ):
            yield f"its sliding window is {self.sliding_window} for {n_sliding} sliding layers"


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "context_length",
)
_SCALES = ("rms_norm_eps", "query_scale", "rope_base", "rope_scale", "rope_local_base")
_REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Fields:
    """Typed look-ups in a mapping read from `where`; each raises GemmaError for a wrong value.

    A key that is absent or null takes the default, if there is one.
    """

    values: Mapping[str, object]
    where: str

    def _get(self, key: str, default: object) -> object:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is _REQUIRED:
            raise GemmaError(
                f"{self.where} has no {key!r}, which Gemma needs; use a complete checkpoint."
            )
        return value

    def wrong(self, key: str, expected: str) -> GemmaError:
        """The error for a value that is not what is `expected`."""
        return GemmaError(
            f"{self.where} gives {key!r} as {shown(self.values.get(key))} where {expected} belongs;"
            " use an unmodified checkpoint."
        )

    def integer(self, key: str, default: object = _REQUIRED) -> int:
        """An integer of 0 to 2**31 - 1."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_INTEGER:
            raise self.wrong(key, f"an integer of 0 to {MAX_INTEGER}")
        return value

    def number(self, key: str, default: object = _REQUIRED) -> float:
        """A finite float; an integer is widened."""
        value = self._get(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53:
            return float(value)
        if not isinstance(value, float) or not math.isfinite(value):
            raise self.wrong(key, "a finite number")
        return value

    def text(self, key: str, default: object = _REQUIRED) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def array(self, key: str, default: object = _REQUIRED) -> list[object]:
        """A list."""
        value = self._get(key, default)
        if not isinstance(value, list):
            raise self.wrong(key, "a list")
        return cast(list[object], value)

    def mapping(self, key: str, default: object = _REQUIRED) -> "Fields":
        """An object of its own."""
        value = self._get(key, default)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Fields(cast(dict[str, object], value), f"{self.where} ({key})")


def parse_json_object(text: str | bytes, where: str) -> dict[str, object]:
    """A JSON object without duplicate keys. Raises GemmaError, naming `where`, otherwise."""
    try:
        if isinstance(text, bytes):
            text = str(text, "utf-8-sig")
        check_json_size(text, _MAX_JSON_VALUES)
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise GemmaError(
            f"{where} is not valid JSON ({error}); the file is damaged, get it again."
        ) from error
    if not isinstance(value, dict):
        raise GemmaError(f"{where} is not a JSON object; the file is damaged, get it again.")
    return cast(dict[str, object], value)


def check_json_size(text: str, limit: int) -> None:
    """Raises ValueError for a text with more values than `limit`, before they are made.

    Parsed, a value takes up to 72 bytes, and one with a name up to 200, where its text may take
    three: every comma, bracket and colon is counted for what it can cost.
    """
    if sum(map(text.count, ",[{::")) > limit:
        raise ValueError(f"it holds more than {limit} values")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("an object names the same key twice")
    return values
