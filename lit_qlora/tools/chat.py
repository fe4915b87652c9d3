"""Owns the verb chat: an answer to one question, from --prompt or a pipe, or a conversation at the terminal or on a
page.

The conversation itself is in `lit_qlora.tools.answering.terminal` or `lit_qlora.tools.answering.web`. Knows no model.
"""

import os
import sys
from typing import Any

from lit_qlora.chosen import choose_adapter
from lit_qlora.errors import UserError, require
from lit_qlora.model.generate import Sampling
from lit_qlora.storage.files import decoded
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.tools.answering.answerer import Answerer, check_prompt
from lit_qlora.tools.answering.dialog import cut_note
from lit_qlora.tools.answering.terminal import Terminal, harmless
from lit_qlora.tools.answering.web import check_gradio, serve


def chat(
    run: str | None = None,
    adapter: str | None = None,
    base: str | None = None,
    prompt: str | None = None,
    system: str | None = None,
    web: bool = False,
    share: bool = False,
    port: int | None = None,
    **drawn: Any,
) -> None:
    """Talk with a run's best adapter.

    Args:
        run: run folder; default: the run that was started last.
        adapter: an adapter folder instead of a run.
        base: the base of that adapter; default: the one that run or folder names.
        prompt: a question to answer once. Without it, a conversation at the terminal (/help lists its commands);
            if standard input is not a terminal, all of it is one question.
        system: the system text; default: the one that the run was trained with, if any; "" for none.
        web: chat in a browser (pip install -r requirements-web.txt).
        share: with --web, request a public link from gradio's servers, as needed on Colab.
        port: with --web, the port to listen on; default: the first free one from 7860 on.
        drawn: the arguments of `Sampling`.

    Raises:
        UserError: for options that don't go together, no adapter, or a question that can't be asked.
    """
    sampling = Sampling(**drawn)
    source: dict[str, Any] = {"option": "prompt"}
    if web:
        require(prompt is None, "prompt", "no question beside --web, where it is asked on the page", prompt)
        check_gradio()
    elif share or port is not None:
        raise UserError("it only works together with --web", option="share" if share else "port")
    elif prompt is None and not sys.stdin.isatty():
        source = {"place": "standard input"}
        prompt = decoded(sys.stdin.buffer.read(), remedy="convert it, with iconv for example", **source)
    if prompt is not None and not prompt.strip():
        raise UserError("expected a question, got nothing", remedy="write one, or leave --prompt out to talk", **source)
    answerer = Answerer(choose_adapter(run, adapter, base))
    # Found before the model is loaded; in a conversation the system text alone, beside any question.
    question = Conversation((Turn("user", "hello" if prompt is None else prompt),), system)
    check_prompt(question, answerer.encoder.prompt_format, **source)
    if web:
        serve(answerer, sampling, system, share, port)
    elif prompt is None:
        Terminal(answerer, sampling, system).run()
    else:
        answerer.prompt(question, sampling)
        answerer.model  # noqa: B018  # with the prompt, all that an error can be of: it would be the only line
        if not (run or adapter):  # on standard error, since the answer may be piped
            print(f"(the newest run's adapter answers: {answerer.adapter})", file=sys.stderr, flush=True)
        _answer_once(answerer, question, sampling)


def _answer_once(answerer: Answerer, question: Conversation, sampling: Sampling) -> None:
    is_terminal = sys.stdout.isatty()

    def show(text: str) -> bool:
        print(harmless(text) if is_terminal else text, end="", flush=True)
        return True

    try:
        answer = answerer.stream(question, sampling, show)
        print(flush=True)
    except BrokenPipeError:  # whoever reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if not answer.stopped:
        print(cut_note(sampling), file=sys.stderr)
