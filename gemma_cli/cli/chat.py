"""gemma-cli chat: a conversation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_cli.cli import answering, loading, options, output, terminal
from gemma_cli.generation import PromptTooLong
from gemma_cli.models import find_model, state_folder

if TYPE_CHECKING:
    from gemma_cli.answer import Answer
    from gemma_cli.cli.loading import Loaded
    from gemma_cli.conversation import Conversation
    from gemma_cli.text.chat import Format

COMMANDS = {
    "/clear": "forget the conversation and start again",
    "/help": "show this",
    "/quit": "leave (or Ctrl-D)",
}
KEYS = """\
Ctrl-C   stop the answer
Ctrl-J   begin a new line, as Alt-Enter does; or put the message between lines of three quotes
Ctrl-G   write in $EDITOR
Ctrl-R   search what you said before"""


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
    plain: Annotated[
        bool, typer.Option("--plain", help="Print answers as they are, not as Markdown.")
    ] = False,
    stats: options.Stats = False,
    json: options.Json = False,
    ndjson: options.NdJson = False,
) -> None:
    """Talk with the model, turn by turn.

    What was said stays in the model's context, so that each turn reads only what is new. A base
    model talks in a plain transcript, or with --raw goes on with each text by itself. If standard
    input is not a terminal, each of its lines is a turn.
    """
    chatting = Chat(
        path=find_model(model),
        chat=chat,
        system=system,
        sampling=options.given(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            seed=seed,
        ),
        max_tokens=max_tokens,
        stops=stop or [],
        draft=draft,
        context=context,
        kv=kv.value,
        threads=threads,
        markdown=not (plain or json or ndjson) and terminal.shows_more_than_lines(),
        form=answering.Form(json, ndjson, stats, newline=True),
    )
    if sys.stdin.isatty():
        converse(chatting)
        return
    for line in piped_lines():
        if chatting.say(line).finish_reason == "interrupted":
            raise typer.Exit(130)


@dataclass
class Chat:
    """A conversation on the command line: its options, and its model once that is loaded."""

    path: Path
    chat: bool | None
    system: str | None
    sampling: dict[str, Any]
    max_tokens: int | None
    stops: list[str]
    draft: bool
    context: int | None
    kv: str
    threads: int | None
    markdown: bool
    form: answering.Form
    answer: Answer | None = None  # the last one
    _conversation: Conversation | None = None
    _loading: Future[Loaded] | None = None
    _doing: str = "loading"
    _started: float = field(default_factory=perf_counter)
    _load_s: float = 0.0  # what the next answer had to wait for

    def begin(self) -> Future[Loaded]:
        """Has the model loaded in a thread of its own; once."""
        if not self._loading:
            self._loading = loading.meanwhile(self._load)
        return self._loading

    def _load(self) -> Loaded:
        @contextlib.contextmanager
        def waiting(text: str) -> Iterator[None]:
            before, self._doing = self._doing, text
            yield
            self._doing = before

        loaded = loading.load(str(self.path), self.threads, waiting)
        if self.markdown:
            import gemma_cli.cli.markdown  # noqa: F401 (takes a tenth of a second, too)
        return loaded

    @property
    def loaded(self) -> bool:
        return self._conversation is not None

    def ready(self) -> Conversation:
        """Waits for the model, and says what there is to know about it; once."""
        if self._conversation:
            return self._conversation
        if self.begin().done() or not sys.stdin.isatty():
            loaded = self.begin().result()
        else:
            with output.waiting(f"{self._doing.capitalize()} ..."):
                loaded = self.begin().result()
        from gemma_cli.conversation import Conversation
        from gemma_cli.session import Session

        layout = self._layout(loaded)
        cache = loaded.model.new_cache(loading.context_size(loaded.file, self.context), self.kv)
        self._conversation = Conversation(
            Session(self.system), loaded.model, loaded.tokenizer, cache, layout
        )
        self._load_s = perf_counter() - self._started
        return self._conversation

    def _layout(self, loaded: Loaded) -> Format:
        """How the conversation is laid out for the model; says so where it is not as expected."""
        is_base = loaded.file.chat == "base"
        about = f"{self.path.stem} is a base model: taught to go on with text, not to answer. "
        if self.chat is False:
            loading.wants_chat(loaded.file, self.chat, self.system)  # no place for a system text
            output.note(f"{about if is_base else ''}Each of your texts is gone on with by itself.")
            return "raw"
        if is_base:
            how = "Gemma's turns" if self.chat else "a transcript of User and Assistant"
            output.note(f"{about}It is given {how}; --raw leaves your text as it is.")
        return "transcript" if is_base and not self.chat else "turns"

    def say(self, text: str) -> Answer:
        """Answers a message and prints the answer. A message that gets none is withdrawn."""
        from gemma_cli.text.chat import Turn

        conversation = self.ready()
        session = conversation.session
        n_turns = len(session.turns)
        session.add(Turn("user", text))
        try:
            return self._answer(conversation)
        finally:
            if session.turns[-1].role == "user":
                session.keep(n_turns)

    def _answer(self, conversation: Conversation) -> Answer:
        loaded = self.begin().result()
        max_tokens = self.max_tokens
        if max_tokens is None and conversation.format != "turns":
            max_tokens = answering.RAW_TOKENS
        form = self.form
        with contextlib.ExitStack() as stack:
            if self.markdown and conversation.format != "raw":
                from gemma_cli.cli.markdown import MarkdownScreen

                screen = stack.enter_context(
                    contextlib.closing(MarkdownScreen(sys.stdout, terminal.size))
                )
                form = replace(form, write=screen.write, newline=False)
            check = stack.enter_context(terminal.interruptible())
            new = conversation.rewind()
            progress = stack.enter_context(answering.reading(loaded.model, new))

            def emit(piece: str) -> None:
                form.piece(piece)
                check()

            def read(done: int) -> None:
                progress(done)
                check()

            answer = conversation.answer(
                answering.make_sampling(loaded.file, self.sampling),
                emit=emit,
                stops=self.stops,
                max_tokens=max_tokens,
                draft=self.draft,
                progress=read,
            )
        form.end(answer, self._load_s)
        self._load_s = 0.0  # the next turn waits for no loading
        self.answer = answer
        return answer

    def status(self) -> str:
        """The line below the prompt: the model, the context, the speed."""
        parts = [self.path.stem]
        if not self._conversation:
            parts.append(self._doing)
        else:
            used, capacity = self._conversation.n_tokens, self._conversation.cache.capacity
            parts.append(f"{used:,} of {capacity:,} tokens")
        if self.answer and self.answer.decode_tok_s:
            parts.append(f"{self.answer.decode_tok_s:.0f} tokens/s")
        return " · ".join(parts)


def converse(chat: Chat) -> None:
    """Talks with someone at a terminal."""
    with terminal.leaving_properly(), terminal.keys_kept():
        from gemma_cli.cli.prompt import open_prompt

        prompt = open_prompt(
            {name: (about, None) for name, about in COMMANDS.items()},
            chat.status,
            state_folder() / "history",
        )
        output.note("/help shows the commands; Ctrl-D leaves.")
        unsent = ""
        while True:
            begin = None if chat.loaded else chat.begin
            text = prompt.ask(unsent, begin=begin, arrived=chat.ready)
            if text is None or text == "/quit":
                return
            unsent = obey(chat, text) if text in COMMANDS else send(chat, text)


def send(chat: Chat, text: str) -> str:
    """Has a message answered; returns it if it was withdrawn before there was an answer."""
    try:
        answer = chat.say(text)
    except KeyboardInterrupt:  # while the model was loading
        return text
    except PromptTooLong as error:
        output.note(f"{error} This turn was left out; /clear starts again.")
        return ""
    if answer.finish_reason != "interrupted" or answer.ids:
        return ""
    output.note("Stopped before the answer began: your message is in the prompt again.")
    return text


def obey(chat: Chat, command: str) -> str:
    if command == "/clear":
        chat.ready().session.keep(0)
        output.note("Cleared.")
    else:
        output.note("\n".join(f"{name:8} {about}" for name, about in COMMANDS.items()))
        output.note(KEYS)
    return ""


def piped_lines() -> Iterator[str]:
    """The lines of standard input that say something."""
    for line in sys.stdin:
        if line.strip():
            yield line.removesuffix("\n").removesuffix("\r")
