"""gemma-cli run: one answer."""

import sys
from time import perf_counter
from typing import Annotated

import typer

from gemma_cli.cli import answering, loading, options, output
from quantize.errors import GemmaError


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
    json_schema: options.JsonSchema = None,
    schema: options.Schema = None,
    regex: options.Regex = None,
    choice: options.Choice = None,
    draft: options.Draft = True,
    context: options.Context = None,
    truncate: options.Truncate = None,
    kv: options.KVFormat = options.KV.F16,
    threads: options.Threads = None,
    stats: options.Stats = False,
    json: options.Json = False,
    ndjson: options.NdJson = False,
    logprobs: options.Logprobs = None,
) -> None:
    """Print one answer.

    The prompt is PROMPT, then each --file, then standard input if it is piped, with a blank line
    between them; a last newline of a file does not count.

    An answer of a given form (--json-schema, --schema, --regex, --choice) is printed when it is
    whole. If the token limit cuts it off before, a pipe gets none of it, and the status is 1. Ask
    for the form in the prompt, too: the model is kept to it, not told of it.

    Examples:

    gemma-cli run "Why is the sky blue?"

    gemma-cli run "Summarize:" < article.txt

    git diff | gemma-cli run "Write a commit message." --system "Be terse."

    gemma-cli run -f mail.txt --schema 'name, age int' "Who writes? As JSON." | jq .age
    """
    started = perf_counter()
    files = loading.read_files(file or [])
    text = loading.prompt_text(None, *files, "" if sys.stdin.isatty() else sys.stdin.read())
    if not text:
        prompt, text = None, prompt or ""
    if not text:
        raise typer.BadParameter(
            'There is nothing to answer: give a prompt (gemma-cli run "Why is the sky blue?"), '
            "a --file, or text on standard input.",
            param_hint="PROMPT",
        )
    if logprobs is not None and not (json or ndjson):
        raise typer.BadParameter("Give --json or --ndjson, too.", param_hint="--logprobs")
    grammar = options.grammar(json_schema, schema, regex, choice, stop)
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

    chatting = loading.wants_chat(loaded.file, chat, system)
    if max_tokens is None and not chatting:
        max_tokens = answering.RAW_TOKENS

    def make_ids(text: str) -> list[int]:
        whole = "\n\n".join(part for part in (prompt, text) if part)
        return loading.prompt_ids(loaded.tokenizer, whole, system, chatting)

    if truncate is None:
        prompt_ids = make_ids(text)
    else:
        most = loading.room_for_prompt(loaded.file, context, max_tokens)
        prompt_ids, n_cut = loading.fit(loaded.tokenizer, make_ids, text, most, truncate)
        if n_cut:
            output.note(f"gemma-cli: Tokens left out of the {truncate.value}: {n_cut}.")
    room = loading.ROOM_FOR_ANSWER if max_tokens is None else max_tokens
    cache = loaded.model.new_cache(
        loading.context_size(loaded.file, context, len(prompt_ids) + room), kv.value
    )
    sampling = answering.make_sampling(loaded.file, given)
    sample = answering.make_sampler(loaded, sampling, grammar, logprobs)
    on_terminal = sys.stdout.isatty()
    form = answering.Form(
        json, ndjson, stats, newline=on_terminal, whole=bool(grammar) and not on_terminal
    )
    load_s = perf_counter() - started
    with answering.reading(loaded.model, len(prompt_ids)) as progress:
        answer = respond(
            loaded.model,
            loaded.tokenizer,
            cache,
            prompt_ids,
            sample,
            emit=form.piece,
            stops=stop or [],
            max_tokens=max_tokens,
            draft=draft,
            progress=progress,
        )
    form.end(answer, load_s)
    if answer.finish_reason == "interrupted":
        raise typer.Exit(130)
    if not answer.has_form:
        raise GemmaError(answering.cut_off(answer))
