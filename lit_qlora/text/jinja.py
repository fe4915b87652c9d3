"""Owns the compiling and rendering of Jinja chat templates, by the names that transformers gives to them.

Knows nothing of what a template says.
"""

import hashlib
import traceback
from collections.abc import Mapping, Sequence

import jinja2

from lit_qlora.text import sandbox

NO_CLOCK = "strftime_now gives different prompts each day; write a date, or none"


class RefusalError(ValueError):
    """Messages that a template refuses in words of its own, by ``raise_exception``."""


def compile_template(source: str) -> jinja2.Template:
    """Raises ValueError, with the line, for invalid Jinja, or an unsupported template."""
    if not source.strip():
        raise ValueError("expected a Jinja chat template, got nothing")
    try:
        return sandbox.compile_template(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno} is no valid Jinja: {error.message}") from error
    except (RecursionError, MemoryError, SyntaxError) as error:  # Jinja's parser, or Python's of what Jinja makes of it
        raise ValueError(f"it is nested too deeply ({type(error).__name__})") from error


def render(
    template: jinja2.Template, messages: Sequence[Mapping[str, str]], bos: str, eos: str, add_generation_prompt: bool
) -> str:
    """The text of ``messages``, from the names that transformers gives to a template.

    Its clock is none: a template that has a date of its own to fall back on takes that. Nor are there thoughts: one
    that can leave them out does.

    Args:
        template: of `compile_template`.
        messages: each with its role and content.
        bos: the text of BOS, empty without one.
        eos: the text of EOS.
        add_generation_prompt: True for a prompt, up to where the answer begins.

    Raises:
        ValueError: with the line, the template's code fails, takes too long or makes too much; as RefusalError, it
            refuses the messages.
    """
    names = {
        "messages": messages, "bos_token": bos, "eos_token": eos, "add_generation_prompt": add_generation_prompt,
        "tools": None, "documents": None, "strftime_now": sandbox.Missing(NO_CLOCK),
        "enable_thinking": False,
    }  # fmt: skip
    try:
        return sandbox.render(template, names, sum(len(text) for message in messages for text in message.values()))
    except Exception as error:  # any error of a template's code
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == "<template>"), 1)
        kind = RefusalError if type(error) is jinja2.TemplateError else ValueError
        raise kind(f"line {line} can't be rendered: {' '.join(str(error).split())}") from error


def digest(source: str) -> str:
    """The sha256 of a template."""
    return hashlib.sha256(source.encode()).hexdigest()
