"""gemma-cli chat: a conversation."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import typer

from gemma_cli.cli import answering, loading, options, output
from gemma_cli.generation import PromptTooLong

if TYPE_CHECKING:
    from gemma_cli.text.tokenizer import Tokenizer


COMMANDS = {"/help", "/?", "/clear", "/quit", "/exit"}
HELP = """\
/clear  forget the conversation and start again
/help   show this
/quit   leave (or Ctrl-D)
Ctrl-C  stop the answer"""


def chat(
    model: options.ModelName = None,
    system: options.System = None,
    chat: options.Chat = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repeat_penalty: options.RepeatPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    draft: options.Draft = True,
    context: options.Context = None,
    kv: options.KVFormat = options.KV.F16,
    threads: options.Threads = None,
    stats: options.Stats = False,
    json: options.Json = False,
    ndjson: options.NdJson = False,
) -> None:
    """Talk with the model, turn by turn.

    The conversation stays in memory, so each turn only reads what is new. A base model has no
    turns: it goes on with each line by itself. If standard input is not a terminal, each of its
    lines is a turn.
    """
    started = perf_counter()
    sampling = options.given(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
    )
    loaded = loading.load(model, threads)
    chatting = loading.wants_chat(loaded.file, chat, system)
    cache = loaded.model.new_cache(loading.context_size(loaded.file, context), kv.value)
    sample = answering.make_sampler(loaded.file, sampling)
    form = answering.Form(json, ndjson, stats, newline=True)
    load_s = perf_counter() - started
    if not chatting:
        output.note("Not a chat: the model goes on with your text, each line by itself.")
        if loaded.file.chat == "base":
            output.note(f"{loaded.file.path.name} is a base model and was not taught to answer.")
        max_tokens = answering.RAW_TOKENS if max_tokens is None else max_tokens
    interactive = sys.stdin.isatty()
    if interactive:
        output.note("/help shows the commands; Ctrl-D leaves.")

    conversation: list[int] = []  # the ids that the model has seen, answers included
    for line in terminal_lines() if interactive else piped_lines():
        if interactive and line in COMMANDS:
            if line in {"/quit", "/exit"}:
                break
            if line == "/clear":
                conversation = []
                cache.clear()
            output.note("Cleared." if line == "/clear" else HELP)
            continue
        if not chatting:
            conversation = []
            cache.clear()
        prompt_ids = next_prompt(loaded.tokenizer, conversation, line, system, chatting)
        try:
            answer = answering.answer_prompt(
                loaded,
                cache,
                prompt_ids,
                sample,
                form,
                stops=stop or [],
                max_tokens=max_tokens,
                draft=draft,
            )
        except PromptTooLong as error:
            if not interactive:
                raise
            output.note(f"{error} This turn was left out; /clear starts again.")
            continue
        form.end(answer, load_s)
        load_s = 0.0  # the next turn waits for no loading
        conversation = [*prompt_ids, *answer.ids]
        if len(conversation) >= cache.capacity:
            output.note("The context is full: /clear starts again, -c/--context makes it larger.")
        if answer.finish_reason == "interrupted" and not interactive:
            raise typer.Exit(130)


def next_prompt(
    tokenizer: "Tokenizer", conversation: Sequence[int], text: str, system: str | None, chat: bool
) -> list[int]:
    """The ids of the conversation with a turn more, up to where the model answers.

    The answers in it stay the ids that the model gave, which are in the cache; the text of them
    could be encoded differently. Their end-of-turn is put in here: the one that the model gave
    ended the answer and is not part of it.
    """
    if not conversation:
        return loading.prompt_ids(tokenizer, text, system, chat)
    end = tokenizer.piece_id("<end_of_turn>")
    assert end is not None  # the first turn had one
    turn = loading.prompt_ids(tokenizer, text, None, chat)[1:]  # BOS stands in front already
    return [*conversation, end, *tokenizer.encode("\n"), *turn]


def piped_lines() -> Iterator[str]:
    """The lines of standard input that say something."""
    for line in sys.stdin:
        if line.strip():
            yield line.removesuffix("\n").removesuffix("\r")


def terminal_lines() -> Iterator[str]:
    """Lines that someone types, with editing and a history where Python has readline.

    Ctrl-C drops a line. The prompt goes to standard error if standard output is not a terminal.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input uses it)
    ask = input if sys.stdout.isatty() else ask_on_stderr
    while True:
        try:
            line = ask("> ").strip()
        except KeyboardInterrupt:
            output.note("\n/quit or Ctrl-D leaves.")
            continue
        except EOFError:
            output.note("")
            return
        if line:
            yield line


def ask_on_stderr(prompt: str) -> str:
    """What `input` does, but with the prompt on standard error."""
    sys.stderr.write(prompt)
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
