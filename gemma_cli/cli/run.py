"""gemma-cli run: one answer."""

import sys
from functools import partial
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_cli.cli import answering, config, loading, options, output, signals
from gemma_cli.generation import n_common
from gemma_cli.session import Session, named_session
from quantize.errors import GemmaError

if TYPE_CHECKING:
    from gemma_cli.conversation import Conversation
    from gemma_cli.text.chat import Format


def run(
    invocation: typer.Context,
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
    guard: options.Guard = True,
    context: options.Context = None,
    truncate: options.Truncate = None,
    kv: options.KVFormat = "f16",
    threads: options.Threads = None,
    session: options.SessionName = None,
    cache_prompt: options.CachePrompt = False,
    stats: options.Stats = False,
    json: options.Json = False,
    ndjson: options.NdJson = False,
    logprobs: options.Logprobs = None,
) -> None:
    """Print one answer.

    The prompt is PROMPT, then each --file, then standard input if it is piped, with a blank line
    between them; a last newline of a file does not count.

    With --session, the prompt is the next message of a conversation that is kept, as `chat` keeps
    it, with its model, system text and settings unless others are given.

    An answer of a given form (--json-schema, --schema, --regex, --choice) is printed when it is
    whole. If the token limit cuts it off before, a pipe gets none of it, and the status is 1. Ask
    for the form in the prompt, too: the model is kept to it, not told of it.

    Examples:

    gemma-cli run "Why is the sky blue?"

    gemma-cli run "Summarize:" < article.txt

    git diff | gemma-cli run "Write a commit message." --system "Be terse."

    gemma-cli run -f mail.txt --schema 'name, age int' "Who writes?" | jq .age

    gemma-cli run --session diary "What did I do on Monday?"

    gemma-cli run --cache-prompt -f manual.txt "Answer:" <<< "How do I reset it?"
    """
    started = perf_counter()
    files = loading.read_files(file or [])
    piped = "" if sys.stdin.isatty() else sys.stdin.read()
    texts = [part for part in (loading.prompt_text(None, text) for text in (*files, piped)) if part]
    text = loading.prompt_text(None, *texts)
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
    if session is not None and cache_prompt:
        raise typer.BadParameter(
            "A session keeps what was read by itself.", param_hint="--session and --cache-prompt"
        )
    grammar = options.grammar(json_schema, schema, regex, choice, stop)
    given = options.given(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
    )
    others = {"max_tokens": max_tokens, "stop": stop or None, "draft": None if draft else False}
    given |= {name: value for name, value in others.items() if value is not None}

    # Without a name it is a conversation of one message, in memory.
    kept = Session() if session is None else named_session(session)
    weaker = config.weaker_than(kept, invocation)
    given = {name: value for name, value in given.items() if name not in weaker}
    model = None if "model" in weaker else model
    system = None if "system" in weaker else system
    loaded = loading.load(model or kept.model or None, threads)
    from gemma_cli.conversation import Conversation
    from gemma_cli.text.chat import Turn, turn_ids

    system = kept.system if system is None else system or None
    layout: Format = "transcript"
    if session is None or chat is not None or loaded.file.chat != "base":
        layout = "turns" if loading.wants_chat(loaded.file, chat, system) else "raw"
    settings = kept.settings | given
    sampling = answering.make_sampling(loaded.file, answering.sampling_of(settings))
    limit: int | None = settings.get(
        "max_tokens", None if layout == "turns" else answering.RAW_TOKENS
    )

    def message(*texts: str) -> Turn:
        return Turn("user", "\n\n".join(part for part in (prompt, *texts) if part))

    def make_ids(turn: Turn) -> list[int]:
        parts = turn_ids(loaded.tokenizer, [*kept.context[1], turn], kept.context[0], layout)
        return list(chain.from_iterable(parts))

    kept.instruct(system)
    kept.set(settings)
    if truncate:
        most = loading.room_for_prompt(loaded.file, context, limit)
        text, _, n_cut = loading.fit(
            loaded.tokenizer, lambda text: make_ids(message(text)), text, most, truncate
        )
        if n_cut:
            output.note(f"gemma-cli: Tokens left out of the {truncate}: {n_cut}.")
    if cache_prompt:
        # The last part may be anything: these could hardly be more different.
        one, other = (make_ids(message(*texts[:-1], last)) for last in ("a", "0"))
        start_ids = one[: n_common(one, other)]
    n_before = len(kept.turns)
    signals.become_exceptions()
    kept.add(message(text))
    try:
        new_cache = partial(loaded.model.new_cache, kv=kv)
        conversation = Conversation(kept, loaded.model, loaded.tokenizer, new_cache(1), layout)
        room = loading.ROOM_FOR_ANSWER if limit is None else limit
        size = loading.context_size(loaded.file, context, conversation.n_tokens + room)
        conversation.cache = new_cache(size)
        if session is not None:
            conversation.resume(kept)
        sample = answering.make_sampler(loaded, sampling, grammar, logprobs)
        form = answering.Form(
            json,
            ndjson,
            stats,
            newline=sys.stdout.isatty(),
            whole=bool(grammar) and not sys.stdout.isatty(),
        )
        load_s = perf_counter() - started
        n_read, read_s = 0, 0.0
        if cache_prompt:
            n_read, read_s = read_start(conversation, start_ids)
        with answering.reading(loaded.model, conversation.rewind()) as progress:
            answer = conversation.answer(
                sample,
                emit=form.piece,
                stops=settings.get("stop", ()),
                max_tokens=limit,
                draft=settings.get("draft", True),
                guard=guard,
                progress=progress,
            )
        answer.prefilled += n_read
        answer.prefill_s += read_s
        if not answer.has_form:
            kept.keep(n_before)
        form.end(answer, load_s)
        if answer.finish_reason == "loop":
            output.note(f"gemma-cli: {answering.LOOPS}")
        if session is not None:
            conversation.keep()
    finally:
        if kept.turns[n_before:] and kept.turns[-1].role == "user":  # it got no answer
            kept.keep(n_before)
        kept.close()
    if answer.finish_reason == "interrupted":
        raise typer.Exit(130)
    if not answer.has_form:
        raise GemmaError(answering.cut_off(answer))
    if kept.failure:
        raise GemmaError(f"The session cannot be kept: {kept.failure.strerror}.")


def read_start(conversation: "Conversation", prefix_ids: list[int]) -> tuple[int, float]:
    """Fills the conversation's empty cache with the beginning of its prompt, which is on the disk
    from then on; returns how many ids were computed for it, and the seconds that it took."""
    from gemma_cli.prompt_cache import keep_prefix, restore_prefix

    model, cache, n_read = conversation.model, conversation.cache, 0
    if max(len(prefix_ids), conversation.n_tokens) > cache.capacity:
        return 0, 0.0  # there will be no answer
    started = perf_counter()
    if not restore_prefix(model, cache, prefix_ids):
        n_read = len(prefix_ids)
        with answering.reading(model, n_read) as progress:
            model.forward(prefix_ids, cache, n_best=1, progress=progress)
        if not keep_prefix(model, cache, prefix_ids):
            output.note("gemma-cli: There is no room on the disk to keep the prompt's beginning.")
    conversation.cached = prefix_ids
    return n_read, perf_counter() - started
