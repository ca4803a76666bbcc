"""gemma-cli chat: a conversation."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from gemma_cli.cli import answering, config, loading, options, output, signals, terminal
from gemma_cli.cli.talk import NotNow, Talk
from gemma_cli.generation import PromptTooLong
from gemma_cli.models import find_model, state_folder
from gemma_cli.session import Session, list_sessions, named_session, new_path
from quantize.errors import GemmaError


def chat(
    invocation: typer.Context,
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
    kv: options.KVFormat = "f16",
    threads: options.Threads = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Print answers as they are, not as Markdown.")
    ] = False,
    stats: options.Stats = False,
    go_on: Annotated[
        bool, typer.Option("--continue", help="Go on with the conversation that was last.")
    ] = False,
    session: options.SessionName = None,
    no_save: Annotated[
        bool, typer.Option("--no-save", help="Keep nothing of this conversation on the disk.")
    ] = False,
    json: options.Json = False,
    ndjson: options.NdJson = False,
) -> None:
    """Talk with the model, turn by turn.

    What was said stays in the model's context, so that each turn reads only what is new. A base
    model talks in a plain transcript, or with --raw goes on with each text by itself. If standard
    input is not a terminal, each of its lines is a turn.

    Every conversation is kept, readable by you alone: `gemma-cli sessions` lists them, and
    --continue or --session NAME goes on with one, with its model, system text and settings unless
    others are given.

    Examples:

    gemma-cli chat --system "Be terse."

    gemma-cli chat --continue

    printf '%s\\n' "Hello" "Say it in French" | gemma-cli chat --no-save
    """
    sampling = options.given(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
    )
    kept = open_session(session, go_on, no_save)
    weaker = config.weaker_than(kept, invocation)
    model = None if "model" in weaker else model
    talk = Talk(
        path=find_model(model or kept.model or None),
        session=kept,
        chat=chat,
        context=context,
        kv=kv,
        threads=threads,
        markdown=not (plain or json or ndjson) and terminal.shows_more_than_lines(),
        form=answering.Form(json, ndjson, stats, newline=True),
    )
    if system is not None and "system" not in weaker:
        kept.instruct(system or None)
    others = {"max_tokens": max_tokens, "stop": stop, "draft": None if draft else False}
    given = sampling | {name: value for name, value in others.items() if value is not None}
    kept.set(kept.settings | {name: value for name, value in given.items() if name not in weaker})
    signals.become_exceptions()
    try:
        if sys.stdin.isatty():
            converse(talk, None if no_save else state_folder() / "history")
            return
        for line in piped_lines():
            if talk.say(line).finish_reason == "interrupted":
                raise typer.Exit(130)
    finally:
        talk.leave()


def open_session(name: str | None, go_on: bool, no_save: bool) -> Session:
    """The session to go on with, or a new one; it is on the disk when something was said."""
    if (name is not None) + go_on + no_save > 1:
        raise typer.BadParameter("Give one of them.", param_hint="--continue, --session, --no-save")
    if no_save:
        return Session()
    if go_on:
        known = list_sessions()
        if not known:
            raise GemmaError("No conversation was kept yet: gemma-cli chat begins one.")
        return Session.open(known[-1])
    return Session(new_path()) if name is None else named_session(name)


def converse(talk: Talk, history: Path | None) -> None:
    """Talks with someone at a terminal."""
    with terminal.keys_kept():
        from gemma_cli.cli.chat_commands import COMMANDS, is_command, obey
        from gemma_cli.cli.prompt import open_prompt

        commands = {name: (c.usage, c.about, c.values) for name, c in COMMANDS.items()}
        prompt = open_prompt(commands, talk.status, history)
        talk.choose, talk.listen = prompt.choose, prompt.listen
        output.note("/help shows the commands; Ctrl-D leaves.")
        if talk.session.turns:
            talk.show_last()
        unsent, edited = "", False
        while True:
            begin = None if talk.loaded else talk.begin
            text = prompt.ask(unsent, begin=begin, arrived=talk.ready)
            if text is None or text in {"/quit", "/exit", "/bye"}:
                break
            if is_command(text):
                unsent = obey(talk, text)
                edited = bool(unsent)
            elif text:
                unsent = send(talk, text, instead=edited, forget=prompt.forget)
                edited = edited and bool(unsent)
            else:
                unsent, edited = "", False
        if talk.session.path and talk.session.turns and not talk.session.failure:
            output.note(f"Kept as {talk.session.name}: gemma-cli chat --continue goes on with it.")


def send(
    talk: Talk, text: str, *, instead: bool, forget: Callable[[], None] = terminal.forget_keys
) -> str:
    """Has a message answered; returns it if it was withdrawn before there was an answer.

    What was typed meanwhile is not meant for a prompt that holds a text: `forget` drops it.
    """
    files = [f"{name}:\n{content}" for name, content in talk.files.items()]
    try:
        answer = talk.say(loading.prompt_text(None, *files, text), instead=instead)
    except KeyboardInterrupt:  # while the model was loading
        forget()
        return text
    except NotNow:
        return text
    except PromptTooLong as error:
        output.note(f"{error} Your message is in the prompt again.")
        return text
    if answer.finish_reason == "interrupted" and not answer.ids:
        output.note("Stopped before the answer began: your message is in the prompt again.")
        forget()
        return text
    talk.files.clear()
    return ""


def piped_lines() -> Iterator[str]:
    """The lines of standard input that say something."""
    for line in sys.stdin:
        if line.strip():
            yield line.removesuffix("\n").removesuffix("\r")
