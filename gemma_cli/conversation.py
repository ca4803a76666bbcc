"""A session that goes on: its turns in a model's cache, and answers to them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING

from gemma_cli import snapshot
from gemma_cli.answer import Answer, respond
from gemma_cli.generation import n_common
from gemma_cli.models import model_name
from gemma_cli.session import Session, snapshot_path
from gemma_cli.text.chat import STOP_TEXTS, Format, Turn, turn_ids

if TYPE_CHECKING:
    from gemma_cli.runtime import KVCache, Model
    from gemma_cli.sampling import Sampler
    from gemma_cli.text.tokenizer import Tokenizer


class Conversation:
    """A session laid out for a model. The cache keeps what was read, so each turn reads only what
    is new."""

    def __init__(
        self, session: Session, model: Model, tokenizer: Tokenizer, cache: KVCache, format: Format
    ) -> None:
        self.session = session
        self.model = model
        self.tokenizer = tokenizer
        self.cache = cache
        self.format: Format = format
        self.cached: list[int] = []  # the ids in the cache
        self._laid_out: tuple[object, list[list[int]]] | None = None

    def resume(self, session: Session) -> None:
        """Goes on with a session: its model is from here on this one, and what a snapshot that
        matches holds of it needs not be read."""
        self.session, self.cached = session, []
        file = self.model.file
        tokenizer = hashlib.sha256(file.tokenizer_model).hexdigest()[:16]
        session.use(model_name(file.path), tokenizer)
        session.forget_ids_from(self.model.config.vocab_size)
        if session.path and session.turns:
            self.cached = snapshot.restore(snapshot_path(session.path), file, self.cache)

    def keep(self) -> None:
        """Leaves a snapshot beside the session, if that is kept."""
        session = self.session
        if session.path and session.turns and not session.failure:
            with suppress(OSError):  # it can be computed again
                path = snapshot_path(session.path)
                snapshot.save(path, self.model.file, self.cache, self.cached)

    @property
    def parts(self) -> list[list[int]]:
        """The ids of each turn in the context, up to where the model answers the last one or goes
        on with its own."""
        system, turns = context = self.session.context
        if not turns:
            return []
        if not self._laid_out or self._laid_out[0] != context:
            parts = turn_ids(self.tokenizer, turns, system, self.format)
            self._laid_out = context, parts
        return self._laid_out[1]

    @property
    def n_tokens(self) -> int:
        """Tokens of the context so far, with what is around the turns."""
        return sum(map(len, self.parts))

    def count(self, turns: Sequence[Turn]) -> list[int]:
        """The tokens of each turn, if these were the context's."""
        system, _ = self.session.context
        return [len(part) for part in turn_ids(self.tokenizer, turns, system, self.format)]

    def prompt_ids(self) -> list[int]:
        return list(chain.from_iterable(self.parts))

    def rewind(self) -> int:
        """Forgets what in the cache is not the prompt's beginning; returns how much of the prompt
        is then to be read: at least the last id, as that gives the logits."""
        prompt_ids = self.prompt_ids()
        try:
            self.cache.truncate(n_common(self.cached, prompt_ids[:-1]))
        except ValueError:  # a sliding window has gone past it
            self.cache.clear()
        self.cached = prompt_ids[: self.cache.length]
        return len(prompt_ids) - self.cache.length

    def answer(
        self,
        sample: Sampler,
        *,
        emit: Callable[[str], None],
        stops: Sequence[str] = (),
        max_tokens: int | None = None,
        draft: bool = False,
        guard: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Answer:
        """Answers the last turn, and adds the answer to the session if there is any.

        A last turn of the model's own is gone on with and replaced. Each answer has a seed of its
        own. Arguments and exceptions are those of `respond`.
        """
        self.rewind()
        seen = prompt_ids = self.prompt_ids()
        try:
            answer = respond(
                self.model,
                self.tokenizer,
                self.cache,
                prompt_ids,
                sample.at(self.session.n_answers),
                emit=emit,
                stops=stops,
                ends=STOP_TEXTS[self.format],
                max_tokens=max_tokens,
                draft=draft,
                guard=guard,
                progress=progress,
            )
            seen = [*prompt_ids, *answer.ids]
        finally:
            self.cached = seen[: self.cache.length]
        if answer.ids or answer.finish_reason != "interrupted":
            text, new = answer.text, said(self.tokenizer, answer)
            ids: tuple[int, ...] | None = new
            last = self.session.turns[-1]
            if last.role == "model":
                self.session.keep(len(self.session.turns) - 1)
                text = last.text + text
                ids = None if last.ids is None else last.ids + new
            self.session.add(Turn("model", text, ids), answer.finish_reason)
        return answer


def said(tokenizer: Tokenizer, answer: Answer) -> tuple[int, ...]:
    """The ids of an answer's text: its own, up to where a stop text has cut it off."""
    text, at = answer.text.encode("utf-8", "surrogateescape"), 0
    for n, token in enumerate(answer.ids):
        piece = tokenizer.token_bytes(token)
        if not text.startswith(piece, at):
            return (*answer.ids[:n], *tokenizer.encode(text[at:]))
        at += len(piece)
    return tuple(answer.ids)
