"""Owns the compiling and rendering of Jinja chat templates, in the sandbox that transformers has for them.

Knows nothing of what a template says.
"""

import hashlib
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jinja2


class _Missing(jinja2.Undefined):
    """A name that nothing stands for: it may be asked for, as in ``if tools``, and is never written as nothing."""

    def __str__(self) -> str:  # noqa: PLE0307  # it never returns
        self._fail_with_undefined_error()

    def __iter__(self) -> Any:
        self._fail_with_undefined_error()


@cache
def _environment() -> jinja2.Environment:
    """The sandbox in which transformers renders chat templates, but for `_Missing`."""
    from transformers.utils import chat_template_utils

    return chat_template_utils._compile_jinja_template("").environment.overlay(undefined=_Missing)  # type: ignore[no-any-return]


def compile_template(source: str) -> jinja2.Template:
    """Raises ValueError, with the line, for what is no Jinja, or can't be a template here."""
    if not source.strip():
        raise ValueError("expected a Jinja chat template, got nothing")
    try:
        tree = _environment().parse(source)
        if any(name.name == "strftime_now" for name in tree.find_all(jinja2.nodes.Name)):
            raise ValueError("strftime_now gives other prompts each day; write a date, or none")
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno} is no valid Jinja: {error.message}") from error
    except (RecursionError, MemoryError, SyntaxError) as error:  # Jinja's parser, or Python's of what Jinja makes of it
        raise ValueError(f"it is nested too deeply ({type(error).__name__})") from error


def render(
    template: jinja2.Template, messages: Sequence[Mapping[str, str]], bos: str, eos: str, add_generation_prompt: bool
) -> str:
    """The text of ``messages``, from the names that transformers gives to a template.

    Raises ValueError, with the line, when the template's code fails.
    """
    try:
        return template.render(
            messages=messages, bos_token=bos, eos_token=eos, add_generation_prompt=add_generation_prompt,
            tools=None, documents=None,
        )  # fmt: skip
    except Exception as error:  # whatever a template's code may raise
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == "<template>"), 1)
        raise ValueError(f"line {line} can't be rendered: {' '.join(str(error).split())}") from error


def digest(source: str) -> str:
    """The sha256 of a template."""
    return hashlib.sha256(source.encode()).hexdigest()
