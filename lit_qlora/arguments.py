"""Owns the check of a constructor's arguments against its annotations and `ranges`, for callers in a program.

Those of the command line are checked before. Does not know what any argument means.
"""

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import wraps
from inspect import Parameter, signature
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, Union, get_args, get_origin

from lit_qlora.errors import UserError, excerpt, meant
from lit_qlora.ranges import check_ranges

P = ParamSpec("P")

TYPE_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "none"}
_LISTS = {str: "texts", int: "whole numbers", float: "numbers"}


def checked_arguments(
    section: str = "", paths: Collection[str] = (), remedies: Mapping[str, str] | None = None
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Check the arguments of an ``__init__`` against its annotations, and the rules of `ranges`.

    Equivalents are converted: a path to a text, NumPy's numbers to Python's, a tuple to a list. Annotations of texts,
    numbers, booleans, choices and lists of these are checked, and no others.

    Args:
        section: section of the options, such as ``model``; empty for none.
        paths: arguments that may be given as a path.
        remedies: what to do about an argument of another type, by its name, where the type alone does not say it.

    Returns:
        A decorator; the decorated constructor raises UserError for an argument of another type or out of range, naming
        its option.
    """

    def decorate(init: Callable[P, None]) -> Callable[P, None]:
        parameters = signature(init).parameters
        before = f"{section}." if section else ""

        @wraps(init)
        def checked(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                bound = signature(init).bind(*args, **kwargs)
            except TypeError:
                return init(*args, **kwargs)  # which names the argument too many, or too few, as Python does
            for name, value in bound.arguments.items():
                parameter = parameters[name]
                if parameter.kind is Parameter.VAR_KEYWORD or parameter.annotation is Parameter.empty:
                    continue
                try:
                    bound.arguments[name] = _as(parameter.annotation, value, name in paths)
                except TypeError:
                    expected = words_of(parameter.annotation, name in paths)
                    raise UserError(
                        f"expected {expected}, got {_shown(value)}",
                        option=before + name,
                        remedy=meant(value, choices_of(parameter.annotation)) or (remedies or {}).get(name),
                    ) from None
            defaults = {name: one.default for name, one in parameters.items() if one.default is not Parameter.empty}
            check_ranges({before + name: value for name, value in (defaults | bound.arguments).items()})
            return init(*bound.args, **bound.kwargs)

        return checked

    return decorate


def _as(hint: Any, value: Any, is_path: bool) -> Any:
    """``value`` converted to type ``hint``. Raises TypeError if it is not one."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        for part in parts:
            with suppress(TypeError):
                return _as(part, value, is_path)
    elif kind is Literal:
        if any(isinstance(value, type(one)) and value == one for one in parts):
            return value
    elif kind is list:
        if isinstance(value, list | tuple):
            return [_as(parts[0], one, is_path) for one in value]
    elif hint in (int, float):
        if isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool):
            return value if isinstance(value, int | float) else hint(value)
    elif hint is str and is_path and isinstance(value, os.PathLike):
        return os.fsdecode(value)
    elif isinstance(value, dict) if kind is dict else hint not in TYPE_WORDS or isinstance(value, hint):
        return value
    raise TypeError


def words_of(hint: Any, is_path: bool = False) -> str:
    """A type in words.

    Args:
        hint: an annotation: a plain type, or a choice, a union, a list or a table of such.
        is_path: True for a text that may be given as a path, too.
    """
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(words_of(part, is_path) for part in parts)
    if kind is Literal:
        return f"one of {', '.join(map(str, parts))}" if len(parts) > 1 else str(parts[0])
    if kind is list:
        return f"a list of {_LISTS.get(parts[0], 'values')}"
    if kind is dict:
        return "a table"
    return "a text or a path" if hint is str and is_path else TYPE_WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def choices_of(hint: Any) -> list[str]:
    """The texts among which a value of type ``hint`` is chosen; empty for one that has no such list."""
    if get_origin(hint) is Literal:
        return [one for one in get_args(hint) if isinstance(one, str)]
    if hint is bool:
        return ["true", "false"]
    return [one for part in get_args(hint) for one in choices_of(part)]


def _shown(value: Any) -> str:
    """A plain value as written; the type of anything else, whose repr may be a page."""
    if isinstance(value, str | int | float | os.PathLike | None):
        return excerpt(value)
    if isinstance(value, list | tuple | set) and all(isinstance(one, str | int | float | None) for one in value):
        return excerpt(value)
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
