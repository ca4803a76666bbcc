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
    from gemma_cli.cli.loading import Loaded
    from gemma_cli.runtime import Model
    from gemma_cli.sampling import Sampler, Sampling
    from quantize.modelfile import ModelFile

RAW_TOKENS = 256  # a base model rarely ends by itself

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed")


def sampling_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some settings that are about sampling."""
    return {name: x for name, x in settings.items() if name in SAMPLING}


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


def make_sampler(
    loaded: Loaded, sampling: Sampling, grammar: str | None, n_top: int | None
) -> Sampler:
    """One that keeps to the grammar, if there is one, and keeps the logprobs, if n_top says so."""
    from gemma_cli.sampling import Sampler
    from gemma_cli.text.chat import stop_ids

    if grammar is None:
        return Sampler(sampling, n_top=n_top)
    from gemma_cli.constraint import Constraint, Vocabulary

    ends = stop_ids(loaded.tokenizer)
    vocabulary = Vocabulary(loaded.tokenizer, loaded.file.config.vocab_size, ends)
    return Sampler(sampling, Constraint(vocabulary, grammar), n_top)


def cut_off(answer: Answer) -> str:
    """What to say of an answer that has not got the form asked for."""
    made = output.count(len(answer.ids), "token")
    return (
        f"The answer was cut off after {made}, before it had the form asked for: "
        "raise -n/--max-tokens or -c/--context, or ask for less."
    )


LOOPS = "The answer went round in a loop and was ended; --no-guard lets it go on."


@dataclass(frozen=True, slots=True)
class Form:
    """How answers are printed."""

    json: bool
    ndjson: bool
    stats: bool
    newline: bool  # after an answer; it is not the model's
    write: Callable[[str], None] = output.write  # for text
    whole: bool = False  # no text but that of an answer that has the form asked for

    def piece(self, text: str) -> None:
        if not text:
            return
        if self.ndjson:
            output.write_json({"token": text})
        elif not self.json and not self.whole:
            self.write(text)

    def end(self, answer: Answer, load_s: float) -> None:
        """Prints what comes after the pieces."""
        if self.json or self.ndjson:
            output.write_json(as_json(answer, load_s))
        elif self.whole and answer.has_form:
            self.write(answer.text)
        elif self.newline:
            output.write("\n")
        if self.stats:
            loaded = f"loaded in {load_s:.2f} s; " if load_s else ""
            read = output.count(answer.prefilled, "token")
            made = output.count(len(answer.ids), "token")
            output.note(
                f"{loaded}prompt: {read} in {answer.prefill_s:.2f} s "
                f"({answer.prefill_tok_s:.1f}/s); answer: {made} in {answer.decode_s:.2f} s "
                f"({answer.decode_tok_s:.1f}/s); {answer.finish_reason}"
            )


def as_json(answer: Answer, load_s: float) -> dict[str, object]:
    logprobs = {} if answer.logprobs is None else {"logprobs": answer.logprobs}
    return {
        "text": answer.text,
        "ids": answer.ids,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.ids),
        "finish_reason": answer.finish_reason,
        **logprobs,
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
