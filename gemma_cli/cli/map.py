"""gemma-cli map: one answer for each line."""

import re
import sys
from collections import deque
from collections.abc import Iterator
from time import perf_counter
from typing import Annotated

import typer

from gemma_cli.cli import answering, loading, options, output
from gemma_cli.generation import BATCH_SIZE, PromptTooLong, context_end, n_common


def map_lines(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to do with each line.", show_default=False)
    ],
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
    guard: options.Guard = True,
    context: options.Context = None,
    truncate: options.Truncate = None,
    batch: options.Batch = BATCH_SIZE,
    kv: options.KVFormat = "f16",
    threads: options.Threads = None,
    stats: options.Stats = False,
    ndjson: options.JsonLines = False,
    logprobs: options.Logprobs = None,
) -> None:
    """Print one answer for each line of standard input, in order.

    Each prompt is PROMPT, then each --file, then the line, with a blank line between them: what
    `run` makes of it. Several lines are answered at a time, and what their prompts begin with is
    read once. An answer is printed as one line; a line that gets none leaves its line empty, and
    the status is 1 at the end. With --seed S, line 1 gets the seed S, line 2 the seed S+1, ...

    Examples:

    gemma-cli map "Translate into French:" < words.txt > mots.txt

    tail -f app.log | gemma-cli map "An error? yes or no" --choice yes --choice no
    """
    from gemma_cli.answer import respond_batch

    started = perf_counter()
    files = loading.read_files(file or [])
    if logprobs is not None and not ndjson:
        raise typer.BadParameter("Give --ndjson, too.", param_hint="--logprobs")
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
    chatting = loading.wants_chat(loaded.file, chat, system)
    sampling = answering.make_sampling(loaded.file, given)
    if max_tokens is None and not chatting:
        max_tokens = answering.RAW_TOKENS

    before = loading.prompt_text(prompt, *files)

    def make_ids(line: str) -> list[int]:
        text = "\n\n".join(part for part in (before, line) if part)
        return loading.prompt_ids(loaded.tokenizer, text, system, chatting)

    # Lines that could hardly be more different; what a line does not share is computed for it.
    one, other = make_ids("a"), make_ids("0")
    prefix_ids = one[: n_common(one, other)]
    room = loading.ROOM_FOR_ANSWER if max_tokens is None else max_tokens
    size = loading.context_size(loaded.file, context, len(prefix_ids) + room)
    cache = loaded.model.new_cache(size, kv)
    context_end(loaded.model, cache, prefix_ids, max_tokens)  # raises if it is too long for all
    with answering.reading(loaded.model, len(prefix_ids)) as progress:
        loaded.model.forward(prefix_ids, cache, n_best=1, progress=progress)
    most = loading.room_for_prompt(loaded.file, size, max_tokens)
    lines: deque[str] = deque()  # read, and not answered yet

    def prompts() -> Iterator[list[int]]:
        # Text would take a lone \r for the end of a line.
        for number, raw in enumerate(sys.stdin.buffer, 1):
            line = raw.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")
            lines.append(line)
            if truncate is None:
                yield make_ids(line)
                continue
            _, ids, n_cut = loading.fit(loaded.tokenizer, make_ids, line, most, truncate)
            if n_cut:
                where = f"Line {number}: tokens left out of the {truncate}"
                output.note(f"gemma-cli: {where}: {n_cut}.")
            yield ids

    sample = answering.make_sampler(loaded, sampling, grammar, logprobs)
    load_s = perf_counter() - started
    n_failed = n_read = n_made = 0
    answers = respond_batch(
        loaded.model,
        loaded.tokenizer,
        cache,
        prefix_ids,
        prompts(),
        sample,
        stops=stop or [],
        max_tokens=max_tokens,
        batch_size=batch,
        guard=guard,
    )
    index = -1
    for index, answer in enumerate(answers):
        about = {"index": index, "input": lines.popleft()}
        error = None
        if isinstance(answer, PromptTooLong):
            error = str(answer)
        else:
            n_read += answer.prefilled
            n_made += len(answer.ids)
            if not answer.has_form:
                error = answering.cut_off(answer)
            elif answer.finish_reason == "loop":
                output.note(f"gemma-cli: Line {index + 1}: {answering.LOOPS}")
        if error or isinstance(answer, PromptTooLong):
            n_failed += 1
            if ndjson:
                output.write_json(about | {"error": error})
            else:
                output.write("\n")
                output.note(f"gemma-cli: Line {index + 1}: {error}")
            continue
        if ndjson:
            # No line but the first had to wait for the loading.
            output.write_json(about | answering.as_json(answer, 0.0 if index else load_s))
        else:
            output.write(re.sub("[\r\n]+", " ", answer.text).strip() + "\n")
    if stats:
        seconds = perf_counter() - started - load_s
        output.note(
            f"loaded in {load_s:.2f} s; {output.count(index + 1, 'line')} in {seconds:.2f} s: "
            f"{output.count(n_read, 'token')} read, {n_made} made ({n_made / seconds:.1f}/s)"
        )
    if n_failed:
        raise typer.Exit(1)
