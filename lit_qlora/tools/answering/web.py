"""Owns the conversation on a page: chat --web, through gradio, which is an optional extra.

The conversations are in `lit_qlora.tools.answering.tabs`; this module has their layout and the actions of buttons.
Knows no model.
"""

import io
import logging
import os
import threading
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lit_qlora.errors import UserError, require
from lit_qlora.figures.samples import short_prompts
from lit_qlora.model.generate import Sampling
from lit_qlora.ranges import check_ranges
from lit_qlora.text.conversation import Turn
from lit_qlora.tools.answering.answerer import Answerer
from lit_qlora.tools.answering.door import Door
from lit_qlora.tools.answering.tabs import Tab, WebQuestion, Worker, add_message

ASK, STOP = "Ask", "Stop"
"""Labels of the buttons beside a question: words, for those who hear the page."""
OLDEST_GRADIO = (6, 29)
"""The oldest supported gradio, as in requirements-web.txt."""

CSS = """
.gradio-container {width: 100%; max-width: 64rem !important; margin: auto}
.gradio-container > main {padding: .5rem 1rem !important}
.dark {color-scheme: dark}
#columns {height: calc(100dvh - 22rem); min-height: 20rem; flex-wrap: nowrap}
#adapter, #base {height: 100% !important}
#columns .md {white-space: pre-wrap; overflow-wrap: anywhere}
#columns label {position: static; width: fit-content}
#columns .top-panel {display: none}
#name h1 {font-size: 1.25rem; margin: 0}
#name p {margin: 0; opacity: .75}
#examples button {white-space: normal}
@media (max-width: 40rem) {
  #columns {flex-direction: column}
  #adapter, #base {height: auto !important; min-height: 0; flex: 1 1 0}
}
#notice {border-left: 3px solid var(--color-accent); padding-left: .7rem}
"""

Updates = dict[Any, Any]
"""The components of the page that change, with their new values."""


def check_gradio() -> None:
    """Check that a supported gradio is installed.

    Raises:
        UserError: with how to install one.
    """
    try:
        found = version("gradio")
    except PackageNotFoundError:
        found = ""
    if not found or tuple(map(int, found.split(".")[:2])) < OLDEST_GRADIO:
        what = f"gradio {found} is too old" if found else "gradio is not installed"
        raise UserError(what, option="web", remedy="pip install -r requirements-web.txt")


def serve(answerer: Answerer, sampling: Sampling, system: str | None, share: bool, port: int | None) -> None:
    """Serve the page until a signal ends the process.

    Args:
        answerer: answers.
        sampling: initial values of the page's fields.
        system: initial system text; None for that of training.
        share: True to request a public link from gradio's servers.
        port: port to listen at; None for the first free one from 7860 on.

    Raises:
        UserError: for a port that is taken, and if no link is available.
    """
    require(sampling.seed < 2**53, "seed", "below 2**53, as far as a page counts", sampling.seed)
    check_ranges({"port": port})
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = Page(answerer, sampling, system)
    try:
        answerer.model  # noqa: B018  # loaded now, and not under the first question
        print(f"{page.name}: {page.open(share, port)} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    finally:
        page.close()


class Page:
    """The page, and the one thread that answers, one question after the other.

    Args:
        answerer: answers.
        sampling: how to sample; see `Dialog`.
        system: the system text; None for that of training, empty for none.
    """

    def __init__(self, answerer: Answerer, sampling: Sampling, system: str | None) -> None:
        import gradio

        self.start = (answerer, sampling, system)
        kind, where = ("run", answerer.run.path) if answerer.run else ("adapter", answerer.adapter)
        # Names alone: a page that is shared need not show where its owner keeps things.
        self._trained = where.resolve().name
        self.name = f"base {answerer.base.public_name}, {kind} {self._trained}"
        self._worker = Worker(answerer)
        self._update = gradio.update
        self._blocks = self._build(gradio)

    def open(self, share: bool, port: int | None) -> str:
        """Start the server.

        Args:
            share: as for `serve`.
            port: as for `serve`.

        Returns:
            Its address.

        Raises:
            UserError: as `serve` does.
        """
        from gradio.themes import Soft
        from starlette.middleware import Middleware

        functions = self._blocks.fns.items()
        fields = {number: [field.get_block_name() for field in function.inputs] for number, function in functions}
        try:
            with redirect_stdout(io.StringIO()):  # a page on why there is no link; one line below
                _, here, shared = self._blocks.launch(
                    share=share, server_port=port, prevent_thread_lock=True, inline=False, quiet=True, css=CSS,
                    theme=Soft(font="system-ui", font_mono="ui-monospace"), footer_links=[], ssr_mode=False,
                    run_history=False, enable_monitoring=False, max_file_size=1,
                    app_kwargs={"middleware": [Middleware(Door, fields)]},
                )  # fmt: skip
        except OSError as error:
            raise UserError(
                f"{port or 'each that was tried'} is taken", option="port", remedy="give another with --port"
            ) from error
        if share and not shared:
            raise UserError("gradio's servers gave no link", option="share", remedy="try again, or leave --share out")
        return str(shared or here)

    def close(self) -> None:
        """Stop the server, and the current answer."""
        if self._blocks.is_running:
            self._blocks.server.force_exit = True  # without waiting for open pages, and a word on each
            logging.getLogger("uvicorn.error").disabled = True
        self._blocks.close(verbose=False)
        self._worker.close()

    def _build(self, gradio: Any) -> Any:
        answerer, sampling, _ = self.start
        column = partial(gradio.Chatbot, render_markdown=False, latex_delimiters=[], buttons=[], min_width=280)
        field = partial(gradio.Number, min_width=120)
        title, base = f"Chat with {self._trained}", answerer.base.public_name
        about = f"{base}, fine-tuned in this run" if answerer.run else f"{base}, with an adapter"
        examples = short_prompts(answerer.run.samples) if answerer.run else []  # held out
        with gradio.Blocks(title=f"{title} | lit-qlora", analytics_enabled=False, fill_width=True) as blocks:
            gradio.HTML(f"<h1>{escape(title)}</h1><p>{escape(about)}</p>", elem_id="name")
            with gradio.Row(elem_id="columns"):
                self._of_adapter = column(label="Adapter", elem_id="adapter")
                self._of_base = column(label="Base alone", elem_id="base", visible=False)
            self._notice = gradio.HTML(visible=False, elem_id="notice")
            self._question = gradio.Textbox(
                label="Your question", placeholder="Ask something", show_label=False, max_lines=8, autofocus=True,
                submit_btn=ASK, elem_id="question",
            )  # fmt: skip
            with gradio.Row(elem_id="examples", visible=bool(examples)):
                for number, text in enumerate(examples):
                    button = gradio.Button(text, size="sm", elem_id=f"example{number}", min_width=100)
                    button.click(partial(str, text), None, self._question, api_visibility="private", queue=False)
            with gradio.Row():
                self._compares = gradio.Checkbox(label="Ask the base, too", elem_id="compare", min_width=100)
                self._reset = gradio.Button("New conversation", size="md", elem_id="reset", min_width=100)
            with gradio.Accordion("Settings", open=False, elem_id="settings"):
                system = gradio.Textbox(Tab(*self.start).effective_system, label="System text", elem_id="system")
                with gradio.Row():
                    temperature = field(sampling.temperature, label="Temperature", step=0.1, elem_id="temperature")
                    top_p = field(sampling.top_p, label="Top-p", step=0.05, elem_id="top_p")
                    self._seed = field(sampling.seed, label="Seed", precision=0, elem_id="seed")
                    limit = field(sampling.max_new_tokens, label="Answer limit", precision=0, elem_id="limit")
            self._connect([system, limit, temperature, top_p, self._seed], gradio.State())
        return blocks

    def _connect(self, settings: list[Any], tab: Any) -> None:
        self._tab = tab
        buttons = [self._question, self._compares, self._reset]
        columns = [self._of_adapter, self._of_base]
        # Nothing here is for programs; who waits for whom is the worker's matter, and the page shows it.
        options: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        # What streams is given whole each time: a component that a generator leaves out once loses its value.
        stream = (self._worker.stream, [tab, self._compares], columns)
        asks = self._question.submit(
            self._ask, [tab, self._question, *settings], [tab, self._notice, *buttons], **options
        )
        answered = asks.then(*stream, **options)
        answered.then(lambda tab: (tab.sampling if tab else self.start[1]).seed, tab, self._seed, **options)
        compares = self._compares.input(self._compare, [tab, self._compares], [self._of_base, *buttons], **options)
        for event in (answered, compares.then(*stream, **options)):  # whatever its result, another may follow
            event.then(lambda: self._ready(True), None, buttons, **options)
        self._question.stop(self._stop, tab, None, queue=False, **options)
        self._reset.click(self._forget, tab, [self._notice, *columns], queue=False, **options)

    # What happens on the page

    def _ask(self, tab: Tab | None, question: str | None, system: str | None, *settings: float | None) -> Updates:
        tab = tab or Tab(*self.start)
        if tab.answering or not question or not question.strip():  # an empty field may be null
            return {self._tab: tab}
        try:
            tab.set_system(system or "")
            tab.sampling = _sampling(tab.sampling, *settings)
            conversation, note = tab.fitting([*tab.turns, Turn("user", question)])
        except UserError as error:
            return {self._tab: tab, **self._with_note(str(error))}
        tab.for_adapter = tab.for_base = WebQuestion(question, conversation, tab.sampling)
        add_message(tab.of_adapter, "user", question)
        add_message(tab.of_adapter, "assistant", note)
        return {self._tab: tab, **self._with_note(""), **self._ready(False, value="")}

    def _compare(self, tab: Tab | None, compares: bool) -> Updates:
        """Show or hide the column of the base; shown, it gets the answer to the last question."""
        answers = compares and tab is not None and tab.for_base is not None
        return {self._of_base: self._update(visible=compares), **self._ready(not answers)}

    def _stop(self, tab: Tab | None) -> None:
        if tab:
            tab.stopped = True

    def _forget(self, tab: Tab | None) -> Updates:
        if tab and not tab.answering:
            tab.forget()
            tab.of_adapter, tab.of_base, tab.for_base = [], [], None
        shown = tab.shown if tab else ([], [])
        return {**self._with_note(""), self._of_adapter: shown[0], self._of_base: shown[1]}

    def _with_note(self, problem: str) -> Updates:
        return {self._notice: self._update(value=escape(problem), visible=bool(problem))}

    def _ready(self, ready: bool, **question: str) -> Updates:
        """Enable asking, or else stopping."""
        return {
            self._question: self._update(submit_btn=ready and ASK, stop_btn=not ready and STOP, **question),
            self._compares: self._update(interactive=ready),
            self._reset: self._update(interactive=ready),
        }


def _sampling(
    given: Sampling, limit: float | None, temperature: float | None, top_p: float | None, seed: float | None
) -> Sampling:
    """The values of the fields, and of ``given`` what has no field. Raises UserError for missing or invalid ones."""
    if limit is None or temperature is None or top_p is None or seed is None:
        raise UserError("expected a number in each field", option="settings")
    # A page sends 2 for 2.0.
    return replace(given, max_new_tokens=int(limit), temperature=float(temperature), top_p=float(top_p), seed=int(seed))
