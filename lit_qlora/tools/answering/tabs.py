"""Owns the conversations of browser tabs, their display, and the one thread that answers them in turn.

Conversations are `Dialog`'s. Knows the answerer as something that streams answers; no page, no gradio.
"""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from html import escape
from typing import Any, NamedTuple

from lit_qlora.model.generate import Sampling
from lit_qlora.text.conversation import Conversation
from lit_qlora.tools.answering.answerer import Answer, Answerer
from lit_qlora.tools.answering.dialog import Dialog, cut_note

TICK_S = 0.05
"""Seconds between updates of an answer: smooth to the eye, and few enough for a tunnel."""

ANSWER_LIMIT = "Answer limit, under Settings,"
WAITING = "(another page is being answered; this one is next in turn)"

Messages = list[dict[str, Any]]
"""The messages of a column of the page, in gradio's form."""


class WebQuestion(NamedTuple):
    """A question, asked on the page.

    Args:
        question: what was typed.
        conversation: the open prompt that ends on it.
        sampling: how its answer is drawn.
    """

    question: str
    conversation: Conversation
    sampling: Sampling


class Tab(Dialog):
    """The conversation of one browser tab, and its display."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.of_adapter: Messages = []
        self.of_base: Messages = []
        self.for_adapter: WebQuestion | None = None
        """The last question to the adapter, until it is answered."""
        self.for_base: WebQuestion | None = None
        """The last question to the base, until it is answered."""
        self.answering = self.stopped = False

    @property
    def shown(self) -> tuple[Messages, Messages]:
        """Both columns: the adapter's, the base's."""
        return self.of_adapter, self.of_base

    @contextmanager
    def busy(self) -> Iterator[None]:
        """A context in which nothing else may be asked."""
        self.answering, self.stopped = True, False
        try:
            yield
        finally:
            self.answering = False


class Worker:
    """The one thread that answers; a question meanwhile waits in line, with a notice.

    Args:
        answerer: answers.
    """

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer
        self._thread = ThreadPoolExecutor(1)
        self._closing = False

    def close(self) -> None:
        """Stop the current answer, and drop those in line."""
        self._closing = True
        self._thread.shutdown(cancel_futures=True)

    def stream(self, tab: Tab | None, compares: bool) -> Iterator[tuple[Messages, Messages]]:
        """Answer the open question of a tab.

        Args:
            tab: the tab; None before its first question.
            compares: True to ask the base, too.

        Yields:
            Both columns, as the answers arrive.
        """
        if tab is None or tab.answering:
            return
        with tab.busy():
            if asked := tab.for_adapter:
                tab.for_adapter = None
                answer = yield from self._answer(tab, asked, tab.of_adapter, nullcontext)
                add_message(tab.of_adapter, "assistant", tab.remember(asked.question, answer))
            if compares and (asked := tab.for_base) and not tab.stopped:
                tab.for_base = None
                add_message(tab.of_base, "user", asked.question)
                yield from self._answer(tab, asked, tab.of_base, self.answerer.without_adapter)
        yield tab.shown

    def _answer(
        self, tab: Tab, asked: WebQuestion, messages: Messages, switch: Callable[[], AbstractContextManager[None]]
    ) -> Generator[tuple[Messages, Messages], None, Answer]:
        """Let the worker answer, and add its text to ``messages``, until it is complete or stopped."""
        pieces: list[str] = []

        def show(text: str) -> bool:
            pieces.append(text)
            return not (tab.stopped or self._closing)

        def answer() -> Answer:
            with switch():
                return self.answerer.stream(asked.conversation, asked.sampling, show)

        future = self._thread.submit(answer)
        message = add_message(messages, "assistant", WAITING)
        try:
            while not wait([future], TICK_S).done:
                if tab.stopped:
                    future.cancel()
                if future.running():
                    message["text"] = _escaped("".join(pieces))
                yield tab.shown
        finally:  # closing the page ends this generator, and with it the answer
            tab.stopped |= not future.done()
            future.cancel()
        done = Answer("", False) if future.cancelled() else future.result()
        message["text"] = _escaped(done.text)
        note = "" if done.stopped else cut_note(asked.sampling, ANSWER_LIMIT)
        add_message(messages, "assistant", "(stopped)" if tab.stopped else note)
        return done


def add_message(messages: Messages, role: str, text: str) -> dict[str, str]:
    """Add a message unless it is empty.

    Args:
        messages: what a column shows; changed in place.
        role: ``user`` or ``assistant``.
        text: plain text.

    Returns:
        The part of the message that holds the text, to be changed while an answer arrives.
    """
    part = {"type": "text", "text": _escaped(text)}  # a bare string would lose its indentation
    if text:
        messages.append({"role": role, "content": [part]})
    return part


def _escaped(text: str) -> str:
    """``text`` escaped for a page that renders HTML: no conversation may become that."""
    return escape(text, quote=False)
