"""A conversation on the command line: its session, its model, the options of its answers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from gemma_cli.cli import answering, loading, output, terminal
from gemma_cli.session import Session, last_message
from gemma_cli.text.chat import Turn

if TYPE_CHECKING:
    from gemma_cli.answer import Answer
    from gemma_cli.cli.loading import Loaded
    from gemma_cli.conversation import Conversation
    from gemma_cli.sampling import Sampling
    from gemma_cli.text.chat import Format
    from quantize.modelfile import ModelFile


class NotNow(Exception):  # noqa: N818 (what was chosen)
    """There is no room for an answer, and who was asked about it wants none now."""


@dataclass
class Talk:
    """A session and, once that is loaded, a model that goes on with it.

    The session's settings are options for answers, by the names of `chat`'s parameters. `files` are
    texts that the next message begins with, by their names.
    """

    path: Path
    session: Session
    chat: bool | None
    context: int | None
    kv: str
    threads: int | None
    markdown: bool
    form: answering.Form
    choose: Callable[[Mapping[str, str]], str] | None = None
    """Asks someone at the terminal; the keys are what is typed."""
    listen: Callable[[Callable[[str], None]], contextlib.AbstractContextManager[None]] | None = None
    """Has what someone types during an answer shown."""
    answer: Answer | None = None  # the last one
    files: dict[str, str] = field(default_factory=dict)
    _conversation: Conversation | None = None
    _loading: Future[Loaded] | None = None
    _doing: str = "loading"
    _told: str = ""  # why the session cannot be kept
    _started: float = field(default_factory=perf_counter)
    _load_s: float = 0.0  # what the next answer had to wait for

    # The model

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
        # The first call links the compiled kernels.
        loaded.model.forward([0], loaded.model.new_cache(1))
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
        future = self.begin()
        if future.done() or not self.choose:
            loaded = future.result()
        else:
            with output.waiting(f"{self._doing[0].upper()}{self._doing[1:].rstrip('.')} ..."):
                loaded = future.result()
        from gemma_cli.conversation import Conversation

        self.sampling()  # raises if the model file's defaults are damaged
        layout = self._layout(loaded)
        context = loading.context_size(loaded.file, self.context)
        cache = loaded.model.new_cache(context, self.kv)
        self._conversation = Conversation(
            self.session, loaded.model, loaded.tokenizer, cache, layout
        )
        self._conversation.resume(self.session)
        self._load_s = perf_counter() - self._started
        return self._conversation

    @property
    def file(self) -> ModelFile:
        return self.begin().result().file

    def sampling(self) -> Sampling:
        return answering.make_sampling(self.file, answering.sampling_of(self.session.settings))

    def max_tokens(self) -> int | None:
        default = None if self.ready().format == "turns" else answering.RAW_TOKENS
        limit: int | None = self.session.settings.get("max_tokens", default)
        return limit

    def _layout(self, loaded: Loaded) -> Format:
        """How the conversation is laid out for the model; says so where it is not as expected."""
        is_base = loaded.file.chat == "base"
        about = f"{self.path.stem} is a base model: taught to go on with text, not to answer. "
        if self.chat is False:
            loading.wants_chat(loaded.file, self.chat, self.session.system)  # no place for one
            output.note(f"{about if is_base else ''}Each of your texts is gone on with by itself.")
            return "raw"
        if is_base:
            how = "Gemma's turns" if self.chat else "a transcript of User and Assistant"
            output.note(f"{about}It is given {how}; --raw leaves your text as it is.")
        return "transcript" if is_base and not self.chat else "turns"

    def change_model(self, path: Path) -> None:
        """Has another model go on; if it cannot be loaded, nothing changes."""
        before = self.path, self._conversation, self._loading
        self.path, self._conversation, self._loading = path, None, None
        try:
            self.ready()
        except BaseException:
            self.path, self._conversation, self._loading = before
            raise

    def longer_context(self, wanted: int) -> tuple[int, int] | None:
        """The tokens and the bytes of a context of twice the size, or as many times that as it
        takes to hold so many tokens, as far as the model goes; None if it goes no further."""
        cache, config = self.ready().cache, self.file.config
        longest = config.context_length
        size = min(2 * cache.capacity, longest)
        while size < min(wanted, longest):
            size = min(2 * size, longest)
        if size == cache.capacity:
            return None
        return size, loading.cache_bytes(config, size)[cache.kind]

    def lengthen_context(self, size: int) -> None:
        conversation = self.ready()
        cache = conversation.model.new_cache(size, self.kv)
        if conversation.cache.length:
            cache.restore(conversation.cache.state())
        conversation.cache, self.context = cache, size

    # The conversation

    def change_session(self, session: Session) -> None:
        """Leaves this session as it is and goes on with another."""
        self.leave()
        self.session = session
        if self._conversation:
            self._conversation.resume(session)

    def leave(self) -> None:
        """Keeps what there is to keep, and lets others go on with the session."""
        if self._conversation:
            self._conversation.keep()
        self.session.close()

    def say(self, text: str, *, instead: bool = False) -> Answer:
        """Answers a message and prints the answer; `instead` of the last message.

        If there is no answer, the session stays as it was. Raises NotNow, as the others do.
        """
        conversation, session = self.ready(), self.session
        n = last_message(session)[0] if instead else len(session.turns)
        before = session.turns[n:]
        self._need_room([*session.turns[:n], Turn("user", text)])
        with terminal.interruptible() as check:
            session.keep(n)
            session.add(Turn("user", text))
            try:
                return self._answer(conversation, check)
            finally:
                if session.turns[-1].role == "user":
                    session.keep(n)
                    for turn in before:
                        session.add(turn)

    def answer_again(self) -> Answer:
        """Answers the last message again; the answer that it had comes back if it gets none."""
        conversation = self.ready()
        last = self.session.turns[-1]
        self._need_room(self.session.turns[: len(self.session.turns) - (last.role == "model")])
        with terminal.interruptible() as check:
            if last.role == "model":
                self.session.keep(len(self.session.turns) - 1)
            try:
                return self._answer(conversation, check)
            finally:
                if last.role == "model" and self.session.turns[-1].role == "user":
                    self.session.add(last)

    def go_on(self) -> Answer:
        """Goes on with the last answer."""
        conversation = self.ready()
        self._need_room(self.session.turns)
        with terminal.interruptible() as check:
            return self._answer(conversation, check)

    def _need_room(self, turns: Sequence[Turn]) -> None:
        from gemma_cli.cli.room import have_room

        if self.choose and not have_room(self, turns):
            raise NotNow

    def _answer(self, conversation: Conversation, check: Callable[[], None]) -> Answer:
        from gemma_cli.sampling import Sampler

        settings, form = self.session.settings, self.form
        with contextlib.ExitStack() as stack:
            if self.markdown and conversation.format != "raw":
                from gemma_cli.cli.markdown import MarkdownScreen

                screen = MarkdownScreen(sys.stdout, terminal.size)
                stack.enter_context(contextlib.closing(screen))
                if self.listen:
                    stack.enter_context(self.listen(screen.show))
                form = replace(form, write=screen.write, newline=False)
            bar = stack.enter_context(answering.reading(conversation.model, conversation.rewind()))

            def emit(piece: str) -> None:
                form.piece(piece)
                check()

            def progress(done: int) -> None:
                bar(done)
                check()

            answer = conversation.answer(
                Sampler(self.sampling()),
                emit=emit,
                stops=settings.get("stop", ()),
                max_tokens=self.max_tokens(),
                draft=settings.get("draft", True),
                progress=progress,
            )
        form.end(answer, self._load_s)
        self._load_s = 0.0  # the next answer waits for no loading
        self.answer = answer
        if answer.finish_reason == "length" and conversation.n_tokens > conversation.cache.capacity:
            output.note("The context is full, and the answer ends there: /continue makes room.")
        if self.session.failure and not self._told:
            self._told = str(self.session.failure.strerror)
            output.note(f"The session cannot be kept: {self._told}.")
        return answer

    def show_last(self) -> None:
        """Prints what was said last."""
        session = self.session
        last = ", the last ones:" if session.turns else "."
        output.note(f"Session {session.name}: {output.count(len(session.turns), 'turn')}{last}")
        if not session.turns:
            return
        output.note("> " + last_message(session)[1].strip().replace("\n", "\n  "), indent=2)
        turn = session.turns[-1]
        if turn.role == "user":
            output.note("It has no answer yet: /regen asks for one.")
        elif self.markdown:
            from gemma_cli.cli.markdown import MarkdownScreen

            with contextlib.closing(MarkdownScreen(sys.stdout, terminal.size)) as screen:
                screen.write(turn.text)
        else:
            output.note(turn.text)

    def status(self) -> str:
        """The line below the prompt: the model, the context, the speed, the session."""
        parts = [self.path.stem]
        if self._conversation:
            used, capacity = self._conversation.n_tokens, self._conversation.cache.capacity
            full = " (nearly full)" if used > 0.8 * capacity else ""
            parts.append(f"{used:,} of {capacity:,} tokens{full}")
        else:
            parts.append(self._doing)
        if self.answer and self.answer.decode_tok_s:
            parts.append(f"{self.answer.decode_tok_s:.0f} tokens/s")
        parts.append(self.session.name or "not kept")
        return " · ".join(parts)
