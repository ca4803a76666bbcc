"""From `-m` to a model that is ready to run."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, TypeVar, get_args

import typer

from gemma_cli import integrity
from gemma_cli.cli import output
from gemma_cli.cli.options import KV, Cut
from gemma_cli.models import find_model
from quantize.errors import GemmaError
from quantize.memory import check_memory

if TYPE_CHECKING:
    from gemma_cli.runtime import Model
    from gemma_cli.text.tokenizer import Tokenizer
    from quantize.config import GemmaConfig
    from quantize.modelfile import ModelFile

T = TypeVar("T")

DEFAULT_CONTEXT = 4096
ROOM_FOR_ANSWER = 1024  # beyond a prompt that makes the context longer than its default
LARGE = 2 * 10**9  # bytes that take more than a second or two to check
RUNTIME_BYTES = 150_000_000
"""What Python, the compiled kernels and a tokenizer take, besides the context."""

RUNTIME_ADDRESSES = 1_000_000_000
"""The addresses of the libraries and of threads, most of them only set aside, besides."""

CUT_MARK = "\n[...]\n"


@dataclass(frozen=True, slots=True)
class Loaded:
    file: ModelFile
    tokenizer: Tokenizer
    model: Model


def open_model(name: str | None) -> ModelFile:
    """Maps a model file. Raises GemmaError if there is not enough memory to run a model, which
    what this begins to load would not say in words."""
    path = find_model(name)
    n_bytes = path.stat().st_size if path.is_file() else 0
    what = f"Running {path.stem} takes at least"
    check_memory(RUNTIME_BYTES, what, "end other programs", mapped=RUNTIME_ADDRESSES + n_bytes)
    from quantize.modelfile import ModelFile

    return ModelFile.open(path)


def load_tokenizer(file: ModelFile) -> Tokenizer:
    from gemma_cli.text.tokenizer import Tokenizer

    return Tokenizer(file.tokenizer_model)


Waiting = Callable[[str], AbstractContextManager[None]]
"""Says what takes so long while it does."""


def load_model(file: ModelFile, threads: int | None, waiting: Waiting = output.waiting) -> Model:
    """Reads a file through that is new or has changed, and compiles the kernels if this machine has
    not done so yet. Raises GemmaError if the file is damaged."""
    if not integrity.was_found_whole(file):
        takes_long = file.size > LARGE
        with waiting("Checking the model file: once.") if takes_long else nullcontext():
            integrity.check(file)
    from gemma_cli.runtime import Model
    from gemma_cli.runtime.compilation import needs_compiling

    model = Model(file, threads)
    if needs_compiling():
        with waiting("Compiling for this CPU: once, up to half a minute."):
            model.forward([0], model.new_cache(1))
    return model


def load(name: str | None, threads: int | None, waiting: Waiting = output.waiting) -> Loaded:
    """Opens a model file; the tokenizer loads while the kernels do."""
    # Loading makes objects by the hundred thousand that live to the end: looking through them for
    # garbage again and again would take a tenth of a second.
    gc.disable()
    file = open_model(name)
    _read_ahead(file.path)
    with ThreadPoolExecutor(1) as pool:
        tokenizer = pool.submit(load_tokenizer, file)
        model = load_model(file, threads, waiting)
        loaded = Loaded(file, tokenizer.result(), model)
    gc.freeze()
    gc.enable()
    return loaded


def meanwhile(load: Callable[[], T]) -> Future[T]:
    """Has something loaded in a thread of its own, while someone types."""
    future: Future[T] = Future()

    def work() -> None:
        # Who types waits for the interpreter's lock as long as this.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(interval / 10)
        try:
            future.set_result(load())
        except BaseException as error:
            future.set_exception(error)
        finally:
            sys.setswitchinterval(interval)

    Thread(target=work, daemon=True).start()
    return future


def _read_ahead(path: Path) -> None:
    """Has the disk begin to read while Python loads the runtime, on systems that can be asked."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def check_context(file: ModelFile, tokens: int, option: str) -> None:
    """Raises a usage error if the model cannot have a context of so many tokens."""
    longest = file.config.context_length
    if tokens > longest:
        raise typer.BadParameter(
            f"{file.path.name} has a context of at most {longest} tokens.", param_hint=option
        )


def cache_bytes(config: GemmaConfig, context: int) -> dict[str, int]:
    """The size of a KV cache for so many tokens, by its format."""
    from gemma_cli.runtime.kv_cache import count_bytes
    from gemma_cli.runtime.model import CHUNK_SIZE

    return {kv: count_bytes(config, context, kv, CHUNK_SIZE) for kv in get_args(KV)}


def context_size(file: ModelFile, asked: int | None, needed: int = 0) -> int:
    """The context's capacity in tokens: what was asked for, else enough for what is needed."""
    if asked is None:
        return min(max(DEFAULT_CONTEXT, needed), file.config.context_length)
    check_context(file, asked, "--context")
    return asked


def wants_chat(file: ModelFile, chat: bool | None, system: str | None) -> bool:
    """Whether to chat or to go on with the text; a usage error if that leaves no place for
    --system."""
    chosen = file.chat != "base" if chat is None else chat
    if system and not chosen:
        reason = "--raw has none" if chat is False else f"{file.path.name} is a base model"
        raise typer.BadParameter(
            f"A system text needs the turns of a chat: {reason}.", param_hint="--system"
        )
    return chosen


def read_files(paths: Sequence[Path]) -> list[str]:
    """The files' texts, bytes that are not UTF-8 kept as surrogates."""
    try:
        return [path.read_bytes().decode("utf-8", "surrogateescape") for path in paths]
    except OSError as error:
        raise GemmaError(f"{error.filename} cannot be read: {error.strerror}.") from None


def prompt_text(prompt: str | None, *texts: str) -> str:
    """PROMPT and the texts of files and input, those that are not empty, with a blank line between
    them; a last newline of a text does not count."""
    stripped = (text.removesuffix("\n").removesuffix("\r") for text in texts)
    return "\n\n".join(part for part in (prompt, *stripped) if part)


def fit(
    tokenizer: Tokenizer, make_ids: Callable[[str], list[int]], text: str, most: int, cut: Cut
) -> tuple[str, list[int], int]:
    """A text cut so that the ids of a prompt with it are at most `most`; the ids, and how many
    tokens of the text are left out. Where it is cut stands CUT_MARK. What is around the text is
    not cut, so the ids may be more."""
    ids, fitting = make_ids(text), text
    if len(ids) <= most:
        return text, ids, 0
    tokens = tokenizer.encode(text)
    kept, over = len(tokens), len(ids) - most
    while over > 0 and kept > 0:  # what is cut can take more tokens than before
        kept = max(0, kept - over)
        first = {"head": 0, "middle": (kept + 1) // 2, "tail": kept}[cut]
        head, tail = tokens[:first], tokens[len(tokens) - (kept - first) :]
        fitting = tokenizer.decode(head) + CUT_MARK + tokenizer.decode(tail)
        ids = make_ids(fitting)
        over = len(ids) - most
    return fitting, ids, len(tokens) - kept


def room_for_prompt(file: ModelFile, asked: int | None, max_tokens: int | None) -> int:
    """The most tokens that a prompt may have so that there is room for the answer."""
    context = file.config.context_length if asked is None else context_size(file, asked)
    return context - (min(ROOM_FOR_ANSWER, context // 4) if max_tokens is None else max_tokens)


def prompt_ids(tokenizer: Tokenizer, text: str, system: str | None, chat: bool) -> list[int]:
    """The ids of the first turn of a chat, or of a text to go on with."""
    from gemma_cli.text.chat import Turn, chat_prompt, raw_prompt

    if chat:
        return chat_prompt(tokenizer, [Turn("user", text)], system)
    return raw_prompt(tokenizer, text)
