"""Owns what --help prints of a verb: an example or three, and its options; of fit's those that matter, or all.

Within 80 columns, and without importing what the options are of. Knows those of fit and its kin by `signatures` alone.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from lit_qlora.console import WIDTH
from lit_qlora.errors import UserError, excerpt, meant
from lit_qlora.place import COMMAND
from lit_qlora.signatures import OF_LIGHTNING, UNKNOWN, Option, arguments_of, is_of_lightning, offered, options_of

TITLES = {
    "fit": "Train an adapter; the same command, given again, resumes.",
    "validate": "Score a run's adapter on its held-out rows; the newest run's, unless --run says which.",
    "test": "Score a run's adapter on test rows; the newest run's, unless --run says which.",
    "plan": "Report what a fit needs, of memory, time and disk; takes fit's options, and needs no GPU.",
    "inspect": "Show what a fit learns, row by row; takes fit's options, and needs no GPU.",
}
EXAMPLES = {
    "fit": (
        ("", "the demo, in half a minute on a laptop"),
        (" --config colab_t4", "Llama 2 7B on a free Colab T4"),
        (" --config colab_t4 --data.source my.jsonl", "the same on conversations of yours"),
    ),
    "validate": (("", "the newest run"), (" --run demo --ckpt_path base", "its base, without the adapter")),
    "test": (("", "the newest run"), (" --run demo --data.test_source my.jsonl", "on rows of yours")),
    "plan": (
        (" --config colab_t4", "on a T4, or on the GPU that is here"),
        (" --config colab_t4 --gpu L4", "on an L4"),
    ),
    "inspect": ((" --config colab_t4 --data.source my.jsonl", "before hours go into it"),),
    "chat": (
        ("", "talk with the newest run"),
        (' --prompt "Who are you?"', "one answer"),
        (" --run demo --web", "in a browser"),
    ),
    "predict": ((" --prompts questions.txt --output answers.jsonl", "a question per line"),),
    "merge": ((" --output merged", "the newest run's best adapter"), (" --run demo --output merged", "a run's")),
    "export": ((" --output model.gguf", "the newest run's best adapter"), (" --model merged --output model.gguf", "")),
    "evaluate": (
        ("", "on the run's held-out rows"),
        (" --source my.jsonl", "on rows of yours"),
        (" --mmlu questions.csv", "on questions"),
    ),
    "push": ((" --to NAME/REPO", "the newest run's best adapter"), (" --folder merged --to NAME/REPO", "")),
    "report": (("", "the newest run's"), (" --run demo", "a run's")),
}
MATTER = (
    "model.base", "data.source", "run", "model.rank", "model.learning_rate", "model.target_modules", "model.optimizer",
    "trainer.max_epochs", "trainer.max_steps", "trainer.val_check_interval", "trainer.accumulate_grad_batches",
    "trainer.precision", "data.max_length", "data.batch_size", "data.batch_tokens", "data.template", "data.system",
    "samples.count", "mirror", "max_time",
)  # fmt: skip
"""The twenty options that matter."""

FOR_SCORES = ("run", "data.source", "data.test_source", "data.max_length", "data.batch_size", "trainer.precision")
"""Options that matter for the verbs that score."""

WITHOUT_VALUE = object()
"""Stands for the type of an option that needs no value."""

SECTIONS = {"": "The run", "model": "Model", "data": "Data", "trainer": "Training", "samples": "Sample answers"}


def help_asked(args: Sequence[str]) -> str | None:
    """Find whether a command line asks for help.

    Args:
        args: the command line, behind its verb.

    Returns:
        ``short`` or ``all``; None where it does not.
    """
    for arg, value in zip(args, [*args[1:], ""], strict=False):
        if arg in ("-h", "--help", "--help.all", "--help-all") or arg.startswith("--help="):
            return "all" if "all" in arg or value == "all" else "short"
    return None


def help_of_class(args: Sequence[str]) -> str | None:
    """The help that a command line asks for as ``--OPTION.help [CLASS]``: of Lightning's class, or which there are.

    Args:
        args: the command line, behind its verb.

    Returns:
        The text; None where it asks for none.

    Raises:
        UserError: the option takes no class, or the class is none of Lightning's for it.
    """
    for arg, behind in zip(args, [*args[1:], ""], strict=False):
        name, equals, value = arg.partition("=")
        option = name.removeprefix("--").removesuffix(".help")
        if not name.startswith("--") or not name.endswith(".help"):
            continue
        if option not in OF_LIGHTNING:
            raise UserError(f"unknown option {f'{option}.help'!r}", remedy="--help=all lists all options")
        known, value = offered(option), value if equals else "" if behind.startswith("-") else behind
        of_class = value.rpartition(".")[2]
        if not value:
            words = f"--{option} takes Lightning's {', '.join(known)}, and yours as MODULE.CLASS."
            return "\n".join([*textwrap.wrap(words, WIDTH), f"The arguments of one: --{option}.help CLASS"]) + "\n"
        if of_class not in known or not is_of_lightning(option, value):
            problem = f"expected one of {', '.join(known)}, got {excerpt(value)}"
            remedy = meant(value, known) or "a class of your own takes what its __init__ takes"
            raise UserError(problem, option=f"{option}.help", remedy=remedy)
        found, needed, takes_more = arguments_of(option, of_class) or ([], [], False)
        lines = [f"usage: --{option} {of_class}{f' [--{option}.NAME VALUE ...]' if found else ''}", ""]
        lines += [*_lines([_of_class(option, one, needed) for one in found])] or ["It has no arguments."]
        if takes_more:
            lines += ["", "It passes others on: see its own documentation."]
        return "\n".join(lines) + "\n"
    return None


def _of_class(option: str, one: Option, needed: Sequence[str]) -> Option:
    """An argument of a class as an option, in the first sentence that is said of it; a logger's folder is the run's."""
    words = re.split(r"(?<=\w\w)\.(?=\s|$)", one.help)[0]
    if one.name == "save_dir":
        one, words = one._replace(default=None), "folder; default: the run's"
    elif one.name in needed:
        words = f"{words} (required)".strip()
    return one._replace(name=f"{option}.{one.name}", help=words)


CONFIG_OPTION = Option("config", str, None,
                "YAML with options, which replace the defaults shown here: a file, or the name of one that comes with "
                "lit-qlora, as in configs/; fit's default: demo")  # fmt: skip


def help_of(verb: str, asked: str) -> str:
    """The help of fit or of one of its kin.

    Args:
        verb: its name.
        asked: ``short`` for what is needed first, ``all`` for all of its options.
    """
    options = {option.name: option for option in options_of(verb)}
    lines = _head(verb, " [--config NAME|FILE]", TITLES[verb])
    if asked == "all":
        for section, title in SECTIONS.items():
            found = [option for option in options.values() if option.name.rpartition(".")[0] == section]
            lines += ["", f"{title}:", *_lines([CONFIG_OPTION, *found] if not section else found)]
        words = "A class, such as a logger, is given by name, and its arguments as --trainer.logger.NAME VALUE."
        lines += ["", *textwrap.wrap(words, WIDTH)]
    else:
        shown = _options_shown(verb, options)
        lines += ["", f"options ({len(shown) + 1} of {len(options) + 1}; --help=all lists them all):"]
        lines += _lines([CONFIG_OPTION, *(options[name] for name in shown)])
    return "\n".join(lines) + "\n"


def help_of_tool(verb: str, title: str, actions: Sequence[Any]) -> str:
    """The help of a verb that is a plain function.

    Args:
        verb: its name.
        title: what it does, in a sentence.
        actions: its options, as argparse has them.
    """
    from lit_qlora.options import type_of  # with jsonargparse, which has parsed these

    needed = "".join(f" --{action.dest} VALUE" for action in actions if action.required)
    options = []
    for action in actions:
        hint = type_of(action)
        is_flag = hint is bool and action.default is False
        words = f"{_doc_words(action.help)} (required)" if action.required else action.help
        options.append(Option(action.dest, WITHOUT_VALUE if is_flag else hint, action.default, words))
    return "\n".join([*_head(verb, needed, title), "", "options:", *_lines(options)]) + "\n"


def _head(verb: str, needed: str, title: str) -> list[str]:
    """The lines before the options: how it is called, what it does, examples."""
    usage = f"usage: {COMMAND} {verb}{needed} [--OPTION\0VALUE\0...]"
    lines = [line.replace("\0", " ") for line in textwrap.wrap(usage, WIDTH, subsequent_indent=" " * 7)]
    lines += ["", *textwrap.wrap(title, WIDTH), "", "examples:"]
    commands = [(f"  {COMMAND} {verb}{args}", words) for args, words in EXAMPLES[verb]]
    width = max(len(command) for command, _ in commands) + 2
    fit = all(width + len(words) <= WIDTH for _, words in commands)
    for command, words in commands:
        beside, below = (f"{command:{width}}{words}", []) if fit else (command, [f"      {words}"] if words else [])
        lines += [beside.rstrip(), *below]
    return lines


def _options_shown(verb: str, options: dict[str, Option]) -> list[str]:
    """The options that matter for ``verb``: its own first."""
    own = [name for name in options if "." not in name and name not in {one.name for one in options_of("fit")}]
    of_all = FOR_SCORES if verb in ("validate", "test") else MATTER
    return [*own, *(name for name in of_all if name in options)]


def _lines(options: list[Option]) -> Iterator[str]:
    """A line or more each: name and value at the left, words and default beside or below."""
    for option in options:
        left = f"  --{option.name} {_value_kind(option)}".rstrip()
        default = (
            ""
            if option.type is WITHOUT_VALUE or option.default in (None, UNKNOWN, "", ()) or option.name == "config"
            else f" ({_plain(option.default)})"
        )
        words = textwrap.wrap(_doc_words(option.help) + default, WIDTH - 36)
        if len(left) > 34:
            yield left
            left = ""
        if left or words:
            yield f"{left:36}{words[0] if words else ''}".rstrip()
        yield from (f"{'':36}{line}" for line in words[1:])


def _doc_words(text: str) -> str:
    """A docstring's words without its markup, and of Lightning's the first sentence."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?([^`]+)`", r"\1", text).replace("``", "").replace("`", "")
    text = re.split(r"\.?\s+Default:", text)[0]
    return text.rstrip(".")


def _value_kind(option: Option) -> str:
    """The kind of value to give, in a word."""
    if option.type is WITHOUT_VALUE:
        return ""
    kinds = [option.type, *get_args(option.type)]
    choices = [one for kind in kinds if get_origin(kind) is Literal for one in get_args(kind)]
    if option.name == "config":
        return "NAME|FILE"
    if choices:
        words = "|".join([*(["true", "false"] if bool in kinds else []), *map(str, choices)])
        return words if len(words) <= 40 else "NAME"
    names = {bool: "true|false", int: "N", float: "X"}
    return next((names[kind] for kind in names if kind in kinds and (kind is not int or float not in kinds)), "VALUE")


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
