"""Owns how options are read off a command line, and how jsonargparse's errors are reported: in one line.

jsonargparse does the parsing. Does not know what any option means.
"""

import re
from argparse import ArgumentError
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace

from lit_qlora.arguments import TYPE_WORDS, choices_of, words_of
from lit_qlora.elsewhere import here
from lit_qlora.errors import UserError, cut, excerpt, likely_meant, meant, nearest, one_line

CONFIG = ("--config", "-c")
"""Spellings of the option for config files."""
SEE_HELP = "the accepted ones are listed by --help"
BARE = {
    "data.source": "give a file of rows as --data.source FILE; ",
    "prompt": "give a question as --prompt 'QUESTION'; ",
}
"""Remedies for a word without an option, by an option that the command has."""
LINKED = {"data.tokenizer": "model.base", "data.seed": "seed_everything"}
"""Options that always equal another one, which can be given instead."""


_NOTHING_ELSE = re.compile(r"Unexpected config: ([\w.]+):\s*")
_REQUIRED = re.compile(r"the following arguments are required: ([\w, ]+)")
_UNKNOWN = re.compile(
    r"not accept option '([^']+)'|[Uu]nrecognized arguments?: (\S+)|^Option '([^']+)' is not accepted"
)
_SECTION = re.compile(r"key \"(\w+)\":\s*Unable to load config '([^']*)'")
_NO_CLASS = re.compile(r"dot import path string: (\S+)|given class_path '([^']+)':\s*(.*)")
"""The parts of jsonargparse's messages that are parsed, here alone: its errors have no fields."""

_raised: list[UserError] = []
"""The errors of the values that are being checked: jsonargparse raises another one in place of those about a class."""


def quoted(error: UserError) -> UserError:
    """``error``, about a class or an argument of one, kept for the check of the value that names the class."""
    _raised.append(error)
    return error


def actions_of(parser: Any) -> list[Any]:
    """The options of a ``parser`` as argparse has them, which has no public name for them."""
    return parser._actions  # type: ignore[no-any-return]


def type_of(action: Any) -> Any:
    """The type of an ``action`` of `actions_of`; None if it stands for no argument of a function."""
    return getattr(action, "_typehint", None)


def typed_actions(parser: Any) -> list[Any]:
    """The `actions_of` a ``parser`` that stand for an argument of a function."""
    return [action for action in actions_of(parser) if type_of(action) is not None]


class OneLineErrors:
    """A mixin for jsonargparse parsers: errors are one line with the nearest accepted name, not a page of ``usage``.

    Names can't be abbreviated.
    """

    usage: str | None
    made = "the class"
    """The name of the class whose arguments these are; see `RunParser`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, *given: Any, **more: Any) -> Any:
        """Parse as jsonargparse does, with values checked by `_as_typed`."""
        self._check_as_typed()
        args = (self._with_dashes(args) if args else args for args in given[:1])
        return super().parse_args(*args, *given[1:], **more)  # type: ignore[misc]

    def parse_object(self, *given: Any, **more: Any) -> Any:
        """Parse a class's arguments as jsonargparse does, with values checked by `_as_typed`."""
        self._check_as_typed()
        return super().parse_object(*given, **more)  # type: ignore[misc]

    def _check_as_typed(self) -> None:
        for action in typed_actions(self):
            check = action._check_type_
            if not isinstance(check, partial):
                classes = self.classes_for(action.dest)
                action._check_type_ = partial(_as_typed, action.dest, type_of(action), classes, check)

    def classes_for(self, option: str) -> Collection[str]:
        """The names of the classes that may be meant where ``option`` is given one that is not there."""
        return ()

    def _with_dashes(self, args: Sequence[str]) -> list[str]:
        """``args``, where a text that begins with ``-`` is put to its option: by itself it would be another one."""
        known = {name for action in actions_of(self) for name in action.option_strings}
        texts = {f"--{name}" for name, hint in self.types().items() if _is_text(hint)}
        found = list[str]()
        for arg in args:
            if found and found[-1] in texts and re.match(r"-(?!-\w)", arg) and arg not in known:
                found[-1] += f"={arg}"
            else:
                found.append(arg)
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit by a UserError with the cause only.

        Args:
            message: of jsonargparse, of one line or several.
            ex: the error that the message was made from.

        Raises:
            UserError: always.
        """
        parser = getattr(ex, "subcommand_parser", None) or self
        only = _NOTHING_ELSE.fullmatch(str(message))
        if only:  # jsonargparse takes a file of nothing but "name:" for a text
            self.check_values({only[1]: None})
            raise UserError(f"has no value for {only[1]} and says nothing else", option="config", remedy="give one")
        if isinstance(ex, ArgumentError) and ex.message == "expected one argument" and ex.argument_name:
            name = ex.argument_name.partition("/")[0].lstrip("-")
            raise quoted(UserError("has no value", option=name, remedy=f"give one: --{name} VALUE"))
        required = _REQUIRED.fullmatch(str(message))
        if required and self.usage:
            first, *others = required[1].split(", ")
            problem = f"is required{''.join(f', and so is {one}' for one in others)}"
            raise UserError(problem, option=first, remedy=f"give it as in: {self.usage}")
        if required:
            raise quoted(_LackingError(self.made, required[1].split(", ")))
        raise quoted(_mistake(str(message), [action.dest for action in actions_of(parser)]))

    def types(self) -> dict[str, Any]:
        """The type of each option, by its dotted name."""
        hints = {action.dest: type_of(action) for action in typed_actions(self)}
        return {name: hint for name, hint in hints.items() if not name.endswith(".help")}

    def check_values(self, values: Mapping[str, Any]) -> None:
        """Check parsed options for what jsonargparse accepts.

        Args:
            values: of the options, by their dotted names.

        Raises:
            UserError: for a missing value where null is not allowed, and for a number too large for a file.
        """
        types = self.types()
        for name, value in values.items():
            if isinstance(value, int) and abs(value) >= 2**64:  # too large for a file
                raise UserError("expected a number of at most 19 digits, and it has far more", option=name)
            hint = types.get(name)
            if value is None and hint is not None and NoneType not in get_args(hint):
                raise UserError(
                    f"has no value, expected {words_of(hint)}", option=name, remedy="give one, or leave the line out"
                )


class Parser(OneLineErrors, ArgumentParser):
    """jsonargparse's own parser with such errors."""


FREE_TEXTS = ("prompt", "prompts", "system", "opening", "stop")
"""Options of what is said to a model or by it: no paths, and ``null`` is a text as any other; elsewhere it is none."""


class _Typed(str):
    """A text that jsonargparse takes as it is: it reads anything that is a ``str`` itself as YAML."""


def _as_typed(
    option: str,
    hint: Any,
    classes: Collection[str],
    check: Callable[..., Any],
    value: Any,
    append: bool = False,
    **more: Any,
) -> Any:
    """jsonargparse's ``check`` of an option's value, from the command line or a file, but that a text stays a text.

    By itself it reads texts as YAML, where ``# x`` is a comment, and so nothing.
    """
    if isinstance(value, str):
        if _is_text(hint):
            is_none = value == "null" and hint is not str and option.rpartition(".")[2] not in FREE_TEXTS
            return None if is_none else value
        if value.lower() == "none" and {NoneType} < {*get_args(hint)} and str not in get_args(hint):
            return None  # as messages and help call it
        if _is_comment(value):
            if not append and str not in get_args(hint):
                raise quoted(_misfit(option, hint, classes, excerpt(value)))
            value = _Typed(value)
    elif dict[str, str] in (hint, *get_args(hint)) and isinstance(getattr(value, "val", None), str):
        value = value._replace(val=_Typed(value.val))
    elif isinstance(value, Namespace) and any(dict in (one, get_origin(one)) for one in (hint, *get_args(hint))):
        value = value.as_dict()  # of a dotted name in a file
    others = len(_raised)
    try:
        checked = _untyped(check(value, append=append, **more))
    except TypeError as error:
        inner = _raised[-1] if len(_raised) > others else None
        del _raised[others:]
        raise quoted(_about(inner, option) if inner else _misfit(option, hint, classes, value, str(error))) from error
    del _raised[others:]  # of readings of the value that this one replaced
    return checked


def _untyped(value: Any) -> Any:
    """``value`` with plain texts in place of `_Typed` ones."""
    if isinstance(value, list):
        return [_untyped(one) for one in value]
    if type(value) is dict:
        return {name: _untyped(one) for name, one in value.items()}
    return str(value) if isinstance(value, _Typed) else value


def _is_text(hint: Any) -> bool:
    """True if a type is that of a text, or of a text or none."""
    return hint is str or {*get_args(hint)} == {str, NoneType}


def _is_comment(text: str) -> bool:
    """True if a text is nothing to YAML, and nobody wrote that it is to be nothing."""
    if not text.strip() or text.strip().lower() in ("null", "~"):
        return False
    try:
        return yaml.safe_load(text) is None
    except (yaml.YAMLError, ValueError):
        return False


def _about(inner: UserError, option: str) -> UserError:
    """The error for ``option``, whose value names a class, by the one about that class or an argument of it."""
    if isinstance(inner, _LackingError):
        return lacks(inner.name, option, inner.arguments)
    return inner.replace(option=option if inner.option in (None, option) else f"{option}.{inner.option}")


def _misfit(option: str, hint: Any, classes: Collection[str], value: Any, reasons: str = "") -> UserError:
    """The error for ``value`` that ``option`` of type ``hint`` can't have, by jsonargparse's ``reasons``.

    Of a class, of which ``classes`` may be meant, there is a reason per type of the option, one of them about that.
    """
    unknown = _NO_CLASS.search(reasons)
    if unknown:
        return no_class(unknown[1] or unknown[2], option, classes, unknown[3] or "")
    if isinstance(value, tuple) and hasattr(value, "key"):  # jsonargparse's NestedArg
        problem = f"{excerpt(value.key)} is an argument of a class, and none is named"
        return UserError(problem, option=option, remedy=f"give --{option} CLASS first")
    expected, got = words_of(hint), " ".join(str(value).split())
    remedy = _point(expected, got) or meant(got, choices_of(hint))
    return UserError(f"expected {expected}, got {cut(got) or excerpt(value)}", option=option, remedy=remedy)


class _LackingError(UserError):
    """An error for ``arguments`` that the class ``name`` needs, before its option is known; see `lacks`."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        super().__init__(f"{name} needs {', '.join(arguments)}")
        self.name, self.arguments = name, arguments


def no_class(name: str, option: str, known: Iterable[str], why: str = "") -> UserError:
    """The error for a class that is not there.

    Args:
        name: of the class, as it was given.
        option: option that it was given to.
        known: names of the classes that may be meant.
        why: Python's reason; empty for none.
    """
    names = [*known]
    by_bare = {_bare(name): name for name in names} | {re.sub("logger$", "", _bare(name)): name for name in names}
    near = nearest(_bare(name.rpartition(".")[2]), by_bare)
    remedy = likely_meant(near and by_bare[near]) or "give one of Lightning's, or your own as MODULE.CLASS"
    return UserError(f"no class {excerpt(name)}{f' ({one_line(why)})' if why else ''}", option=option, remedy=remedy)


def lacks(name: str, option: str, arguments: Sequence[str]) -> UserError:
    """The error for a class that was given without arguments that it needs.

    Args:
        name: of the class.
        option: dotted name, which it was given to.
        arguments: names of those that are missing, at least one.
    """
    return UserError(
        f"has no value, and {name} needs {' and '.join(arguments)}",
        option=f"{option}.{arguments[0]}",
        remedy=f"give --{option}.{arguments[0]} VALUE behind the class, or its init_args in a file",
    )


def _bare(name: str) -> str:
    return name.lower().replace("_", "")


def _mistake(message: str, names: list[str]) -> UserError:
    """The error about the options ``names`` in jsonargparse's ``message``, which may have several lines."""
    unknown = _UNKNOWN.search(message)
    if unknown:
        name = (unknown[1] or unknown[2] or unknown[3]).lstrip("-").split("=")[0]
        remedy = did_you_mean(name, names)
        if not remedy and unknown[2] and not unknown[2].startswith("-"):
            one_value = "an option takes one value, such as '[a.jsonl, b.jsonl]' or a pattern in quotes"
            bare = next((remedy for option, remedy in BARE.items() if option in names), "")
            return UserError(f"{excerpt(name)} is the value of no option", remedy=f"{bare}{one_value}")
        return UserError(f"unknown option {excerpt(name)}", remedy=remedy or SEE_HELP)
    section = _SECTION.search(message)
    return no_option(section[1], section[2], names) if section else UserError(one_line(message))


def no_option(section: str, value: str, names: Sequence[str]) -> UserError:
    """The error for a value given to a section of options.

    Args:
        section: dotted name, such as ``trainer``.
        value: as it was typed.
        names: dotted names of all options.
    """
    what = f"is no option but a section of them, got {excerpt(value)}"
    return UserError(what, option=section, remedy=here(section, [*names]) or SEE_HELP)


def _point(expected: str, value: str) -> str | None:
    """The number to write instead of one with a decimal comma."""
    found = re.fullmatch(r"(-?\d+),(\d+)", value) if TYPE_WORDS[float] in expected else None
    return f"write {found[1]}.{found[2]}" if found else None


def known_as(name: str, names: Iterable[str]) -> str | None:
    """The one of ``names`` that a config file gives as ``name``, with ``.key`` or ``+`` behind it or not; or None."""
    return next((one for one in names if name == one or name.startswith((f"{one}.", f"{one}+"))), None)


def did_you_mean(name: str, names: list[str]) -> str | None:
    """The remedy for an unknown option: its name here if another program has it, else the nearest name; None for none.

    Args:
        name: as it was written.
        names: those of the options that there are.
    """
    if name in names:  # without its dashes
        return f"write --{name}"
    name = name.replace("-", "_").lower()
    last = name.rpartition(".")[2]
    known = here(name, names)
    if known and name not in names and name.removesuffix("s") not in names:
        return known
    by_last = {one.rpartition(".")[2]: one for one in reversed(names)}
    near = by_last.get(last) or nearest(name, names) or by_last.get(nearest(last, by_last, 0.85) or "")
    return likely_meant(near) or here(name, names, cutoff=0.8)


def plain(value: Any) -> Any:
    """A copy of ``value``, parsed options, without enums: jsonargparse can't write one that is a text's default."""
    if isinstance(value, Namespace):
        return Namespace(**{name: plain(one) for name, one in vars(value).items()})
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return value.value if isinstance(value, Enum) else value


def option(args: Sequence[str], *names: str) -> str | None:
    """The last value that a command line gives to an option; see `take_option`.

    Args:
        args: the command line.
        *names: spellings of the option, such as ``--config``.
    """
    return ([None, *take_option(args, *names)[0]])[-1]


def take_option(args: Sequence[str], *names: str) -> tuple[list[str | None], list[str]]:
    """Take an option, ``--name value`` or ``--name=value``, out of a command line.

    Args:
        args: the command line.
        *names: spellings of the option, such as ``--config``.

    Returns:
        Its values, None for a missing one; and all other arguments.
    """
    values, others, rest = list[str | None](), list[str](), iter(args)
    for arg in rest:
        name, equals, given = arg.partition("=")
        if name in names:
            values.append(given if equals else next(rest, None))
        else:
            others.append(arg)
    return values, others


def check_once(args: Sequence[str], types: Mapping[str, Any]) -> None:
    """Check that no option of a command line takes the place of another that was meant to count, too.

    Of an option with a single value, the last counts, as everywhere. ``--name+`` adds to a list, and options below it
    are of what was added last.

    Args:
        args: the command line.
        types: of options, by name.

    Raises:
        UserError: an option that takes a list is given twice, not to take it back by ``null``, or one behind another
                that is below it.
    """
    seen: dict[str, str] = {}
    for arg, behind in zip(args, [*args[1:], ""], strict=False):
        name, equals, value = arg.partition("=")
        if name in CONFIG or not re.match(r"--\w", name):
            continue
        name, is_added = name[2:].removesuffix("+"), name.endswith("+")
        value = value if equals or behind.startswith("--") else behind
        lost = [one for one in seen if one == name or one.startswith(f"{name}.")]
        if lost and not is_added:
            pair = [seen[lost[0]], value]
            hints = (types.get(name), *get_args(types.get(name)))  # a list of devices takes a number's place
            is_list = any(get_origin(hint) is list and int not in get_args(hint) for hint in hints)
            if (is_list and value != "null") or lost != [name]:
                can_join = lost == [name] and all(re.fullmatch(r"[\w./*-]+", one) for one in pair)
                raise UserError(
                    f"{excerpt(value)} would take the place of --{lost[0]} {excerpt(pair[0])}, given before",
                    option=name,
                    remedy=f"give both as --{name} '[{', '.join(pair)}]'" if can_join else "give one of the two",
                )
        seen = {one: value for one, value in seen.items() if one not in lost or one == name} | {name: value}


def configs_first(args: Sequence[str], changed: Callable[[str], str] = str) -> list[str]:
    """A command line with its config files in front: other options count anywhere.

    Args:
        args: the command line, without the verb.
        changed: function from a config file to the one to put in its place.
    """
    configs, others = take_option(args, *CONFIG)
    return [arg for one in configs for arg in (CONFIG[0], *(() if one is None else [changed(one)]))] + others
