"""Owns what ``data.template`` names: a built-in format, a file with a Jinja chat template, a base's own, or a template.

Knows no ids. Light: a wrong name is found before anything is loaded.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from lit_qlora import demo
from lit_qlora.data.tokenizer import load_tokenizer, template_beside
from lit_qlora.errors import UserError, excerpt, meant
from lit_qlora.text.formats import LLAMA_2, OF_BASE, built_in, chosen, names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST_TEMPLATE = 1_000_000
"""Most bytes of a template's file; the longest known has 30,000."""

BUILT_IN_BY_MARK = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3", "<|user|>": "zephyr", "[INST]": LLAMA_2}
"""The built-in format that writes turns as a base's own template with such a mark does."""


def is_template(value: str) -> bool:
    """True if ``value`` is a template itself, not a file name."""
    return "{{" in value or "{%" in value


def read_template(value: str | None, base: str | None = None) -> str | None:
    """The chat template that ``value`` is, or that it names; None stands for the Llama 2 format.

    Args:
        value: As ``data.template``.
        base: The hub id or folder whose own template may be meant.

    Raises:
        UserError: There is no such file, it holds no Jinja, or the base has no template.
    """
    if value is None or value == LLAMA_2:
        return None
    where, text = ("", value) if is_template(value) else (f"{value}: ", built_in().get(value))
    if value == OF_BASE and base is not None:
        text = template_of_base(load_tokenizer(base))
    if text is None:
        text = _read_template_file(value)
    try:
        return chosen(text).options["template"]
    except UserError as error:
        raise error.replace(problem=f"{where}{error.problem}") from error


def template_of_base(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The chat template of a base by its tokenizer. Raises UserError where it has none."""
    text = template_beside(tokenizer)
    if not text:
        raise _no_template(tokenizer.name_or_path)
    return text


def check_template_of_base(base: str) -> None:
    """Raises UserError for a folder without a chat template; passes a base on the hub."""
    folder = Path(base).expanduser()
    config = folder / "tokenizer_config.json"
    has_one = any(folder.glob("*chat_template*")) or (config.is_file() and b'"chat_template"' in config.read_bytes())
    if folder.is_dir() and not has_one:
        raise _no_template(base)


def _no_template(base: str) -> UserError:
    return UserError(
        f"base: {excerpt('demo' if base == str(demo.BASE) else base)} has no chat template of its own",
        option="data.template",
        remedy=f"take one of {', '.join([LLAMA_2, *built_in()])}, or a file with one",
    )


def instead_of(template: str) -> str:
    """The remedy for a base's own template that can't be learned, as where it thinks and can't be told not to."""
    name = next((name for mark, name in BUILT_IN_BY_MARK.items() if mark in template), None)
    if name is None:
        return f"or take another: {', '.join([LLAMA_2, *built_in()])}"
    return f"or give --data.template {name}, which writes such turns, too"


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
        beside = [str(one) for one in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(what, option="data.template", remedy=meant(name, [*names(), *beside])) from error
