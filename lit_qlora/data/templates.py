"""Owns what ``data.template`` names: a built-in format, a file with a Jinja chat template, a base's own, or a template.

Knows no ids. Light: a wrong name is found before anything is loaded.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from lit_qlora import demo
from lit_qlora.data.tokenizer import load_tokenizer, template_beside
from lit_qlora.errors import UserError, excerpt, meant
from lit_qlora.storage.files import names_around
from lit_qlora.storage.foreign import chat_template_in
from lit_qlora.text import edges
from lit_qlora.text.formats import LLAMA_2, OF_BASE, built_in, make_format, names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST_TEMPLATE = 1_000_000
"""Most bytes of a template's file; the longest known has 30,000."""


def is_template(value: str) -> bool:
    """True if ``value`` is a template itself, not a file name."""
    return "{{" in value or "{%" in value


def is_of_base(value: str | None) -> bool:
    """True if ``value`` of ``data.template`` stands for the template that the base itself has."""
    return value == OF_BASE


def read_template(value: str | None, base: str | None = None) -> str | None:
    """The chat template that ``value`` is, or that it names; None stands for the Llama 2 format.

    Args:
        value: As ``data.template``.
        base: The hub id or folder whose own template may be meant; None leaves ``base`` as it is.

    Raises:
        UserError: There is no such file, it holds no Jinja, or the base has no template.
    """
    if value is None or value == LLAMA_2:
        return None
    if is_of_base(value):
        if base is None:
            return value
        text = template_of_base(load_tokenizer(base))
    else:
        text = value if is_template(value) else built_in().get(value) or _read_template_file(value)
    try:
        make_format(text)
    except UserError as error:
        raise error.replace(problem=f"{'' if text == value else f'{value}: '}{error.problem}") from error
    return text


def template_of_base(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The chat template of a base by its ``tokenizer``. Raises UserError where it has none."""
    text = template_beside(tokenizer)
    if not text:
        raise _no_template(tokenizer.name_or_path)
    return text


def check_template_of_base(value: str | None, base: str) -> None:
    """Check that a folder has a chat template, if that is to be taken; passes a base on the hub.

    Args:
        value: as ``data.template``.
        base: the hub id or folder.

    Raises:
        UserError: it has none.
    """
    folder = Path(base).expanduser()
    if is_of_base(value) and folder.is_dir() and chat_template_in(folder) is None:
        raise _no_template(base)


def _no_template(base: str) -> UserError:
    return UserError(
        f"base: {excerpt('demo' if base == str(demo.BASE) else base)} has no chat template of its own",
        option="data.template",
        remedy=f"take one of {', '.join([LLAMA_2, *built_in()])}, or a file with one",
    )


def instead_of(template: str) -> str:
    """The remedy for a base's own ``template`` that can't be learned, as where it thinks and has no switch for that."""
    known = {LLAMA_2: make_format().chat_template()} | built_in()
    openers = [mark for mark in (*edges.OPENERS, *edges.TURN_OPENERS) if mark in template]
    alike = [name for name, source in known.items() if any(mark in source for mark in openers)]
    if not alike:
        return f"or take another: {', '.join(known)}"
    return f"or give --data.template {' or '.join(alike)}, which writes such turns, too"


def _read_template_file(name: str) -> str:
    path = Path(name).expanduser()
    try:
        # A pipe or a device may never end.
        if path.exists() and not (path.is_file() and path.stat().st_size <= LARGEST_TEMPLATE):
            expected = f"expected a file of at most {LARGEST_TEMPLATE:,} bytes with a Jinja template"
            raise UserError(f"{name}: {expected}", option="data.template")
        text = path.read_text(encoding="utf-8-sig")
        if text.strip() and not is_template(text):
            what = f"{name} holds no Jinja, expected a chat template, with {{{{ or {{% in it"
            raise UserError(what, option="data.template", remedy="rows are given as --data.source")
        return text
    except UnicodeDecodeError as error:
        what = f"{name} is not UTF-8 (byte {error.start})"
        raise UserError(what, option="data.template", remedy="save it as UTF-8") from error
    except OSError as error:
        what = f"{name}: expected {', '.join(names())}, or a file with a Jinja chat template ({error.strerror})"
        beside = [str(path.with_name(one)) for one in names_around(path)]
        raise UserError(what, option="data.template", remedy=meant(name, [*names(), *beside])) from error
