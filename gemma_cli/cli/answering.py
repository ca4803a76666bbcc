"""What `run`, `chat` and `map` share: how answers are made, and the form they are printed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_cli.cli import output
from quantize.errors import GemmaError

if TYPE_CHECKING:
    from gemma_cli.answer import Answer
    from gemma_cli.runtime import Model
    from gemma_cli.sampling import Sampling
    from quantize.modelfile import ModelFile

RAW_TOKENS = 256  # a base model rarely ends by itself

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed")


def make_sampling(file: ModelFile, given: Mapping[str, Any]) -> Sampling:
    """From the options given, else the model file's defaults, else Gemma's."""
    from gemma_cli.sampling import Sampling

    types: dict[str, type] = {"temperature": float, "top_k": int, "top_p": float}
    try:
        defaults = {name: types[name](x) for name, x in file.sampling.items() if name in types}
        return Sampling(**{**defaults, **given})
    except (TypeError, ValueError) as error:
        raise GemmaError(
            f"{file.path} has sampling defaults that cannot be used ({error}); convert the "
            "checkpoint again."
        ) from None


@dataclass(frozen=True, slots=True)
class Form:
    """How answers are printed."""

    json: bool
    ndjson: bool
    stats: bool
    newline: bool  # after an answer; it is not the model's
    write: Callable[[str], None] = output.write  # for text

    def piece(self, text: str) -> None:
        if self.ndjson:
            output.write_json({"token": text})
        elif not self.json:
            self.write(text)

    def end(self, answer: Answer, load_s: float) -> None:
        """Prints what comes after the pieces."""
        if self.json or self.ndjson:
            output.write_json(as_json(answer, load_s))
        elif self.newline:
            output.write("\n")
        if self.stats:
            output.note(
                f"loaded in {load_s:.2f} s; prompt: {answer.prefilled} tokens in "
                f"{answer.prefill_s:.2f} s ({answer.prefill_tok_s:.1f}/s); answer: "
                f"{len(answer.ids)} tokens in {answer.decode_s:.2f} s "
                f"({answer.decode_tok_s:.1f}/s); {answer.finish_reason}"
            )


def as_json(answer: Answer, load_s: float) -> dict[str, object]:
    return {
        "text": answer.text,
        "ids": answer.ids,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.ids),
        "finish_reason": answer.finish_reason,
        "stats": {
            "load_s": load_s,
            "prefill_s": answer.prefill_s,
            "prefill_tok_s": answer.prefill_tok_s,
            "decode_s": answer.decode_s,
            "decode_tok_s": answer.decode_tok_s,
            "first_token_s": load_s + answer.prefill_s,
        },
    }


def reading(model: Model, new: int) -> AbstractContextManager[output.Update]:
    """A progress bar for a prompt of which so many ids are to be read; for the shortest, none."""
    # What is one chunk is read before a bar could move.
    return output.progress_bar("Reading the prompt", new, shown=new > model.chunk_size)
