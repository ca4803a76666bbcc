"""gemma-cli run: one answer."""

import sys
from time import perf_counter
from typing import Annotated

import typer

from gemma_cli.cli import answering, loading, options


def run(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What to answer or go on with.")
    ] = None,
    model: options.ModelName = None,
    file: options.Files = None,
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
    """Print one answer.

    The prompt is PROMPT, then each --file, then standard input if it is piped, with a blank line
    between them; a last newline of a file does not count.

    Examples:

    gemma-cli run "Why is the sky blue?"

    gemma-cli run "Summarize:" < article.txt

    git diff | gemma-cli run "Write a commit message." --system "Be terse."
    """
    started = perf_counter()
    files = loading.read_files(file or [])
    text = loading.prompt_text(prompt, *files, "" if sys.stdin.isatty() else sys.stdin.read())
    if not text:
        raise typer.BadParameter(
            'There is nothing to answer: give a prompt (gemma-cli run "Why is the sky blue?"), '
            "a --file, or text on standard input.",
            param_hint="PROMPT",
        )
    given = options.given(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
    )
    loaded = loading.load(model, threads)
    from gemma_cli.answer import respond
    from gemma_cli.sampling import Sampler

    chatting = loading.wants_chat(loaded.file, chat, system)
    prompt_ids = loading.prompt_ids(loaded.tokenizer, text, system, chatting)
    if max_tokens is None and not chatting:
        max_tokens = answering.RAW_TOKENS
    room = loading.ROOM_FOR_ANSWER if max_tokens is None else max_tokens
    cache = loaded.model.new_cache(
        loading.context_size(loaded.file, context, len(prompt_ids) + room), kv.value
    )
    sampling = answering.make_sampling(loaded.file, given)
    form = answering.Form(json, ndjson, stats, newline=sys.stdout.isatty())
    load_s = perf_counter() - started
    with answering.reading(loaded.model, len(prompt_ids)) as progress:
        answer = respond(
            loaded.model,
            loaded.tokenizer,
            cache,
            prompt_ids,
            Sampler(sampling),
            emit=form.piece,
            stops=stop or [],
            max_tokens=max_tokens,
            draft=draft,
            progress=progress,
        )
    form.end(answer, load_s)
    if answer.finish_reason == "interrupted":
        raise typer.Exit(130)
