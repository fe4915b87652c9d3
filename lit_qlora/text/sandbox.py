"""Owns the sandbox in which chat templates render: that of transformers, in which none takes forever or fills memory.

What a template loops, calls and makes is counted, so that the same template is refused on every machine, fast or slow.
Knows nothing of what a template says.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_WORK = 3 * 10**8
"""Passes through loops and calls of one rendering, times the characters of the template: about a second."""
MAX_SIZE = 10**7
"""Characters, or items of a list, that a template makes beyond four times what it is given."""

_COUNTED, _SIZED = "lit_qlora_counted", "lit_qlora_sized"
"""Filters around what a template loops over, and around what it joins with ``~``."""
_CHARS = "lit_qlora_chars"
"""A template's own length, among its globals."""
_WIDE = re.compile(r"\d{5}|\*")
"""A width of five digits in a format, or one that an argument gives."""


class Missing(jinja2.Undefined):
    """An undefined name: it may be tested, as in ``if tools``, and is never rendered as empty."""

    def __str__(self) -> str:  # noqa: PLE0307  # it never returns
        self._fail_with_undefined_error()

    def __iter__(self) -> Any:
        self._fail_with_undefined_error()


class _Room:
    """What one rendering may still do.

    Args:
        template_chars: Length of the template.
        given_chars: Length of all messages.
    """

    def __init__(self, template_chars: int, given_chars: int) -> None:
        self._passes = MAX_WORK // max(template_chars, 1000)
        self._size = MAX_SIZE + 4 * given_chars
        self._written = self._passed_on = 0

    def work(self) -> None:
        """Count a pass through a loop, or a call. Raises OverflowError where there were too many."""
        self._passes -= 1
        if self._passes < 0:
            raise OverflowError("it loops or calls too often")

    def check(self, size: int) -> None:
        """Raises OverflowError for something of that many characters or items."""
        if size > self._size:
            raise OverflowError(f"it makes something of more than {self._size:,} characters")

    def write(self, value: Any) -> Any:
        """Count what is written. Raises OverflowError where it is too much."""
        self._written += len(value) if isinstance(value, str) else 0
        self.check(self._written)
        return value

    def pass_on(self, part: str) -> str:
        """Count a part of the text. Raises OverflowError where all of it is too much."""
        self._passed_on += len(part)
        self.check(self._passed_on)
        return part


_room: ContextVar[_Room | None] = ContextVar("_room", default=None)


def _left() -> _Room:
    """Of the rendering under way; a template that is compiled, some of which Jinja computes there, has its own."""
    return _room.get() or _Room(0, 0)


def render(template: jinja2.Template, names: Mapping[str, Any], given_chars: int) -> str:
    """The text of a template of `compile_template`.

    Args:
        template: The template.
        names: What it sees.
        given_chars: Length of the texts among them.

    Raises:
        OverflowError: It exceeds its `_Room`.
    """
    room = _Room(int(template.globals[_CHARS]), given_chars)
    token = _room.set(room)
    try:
        return "".join(map(room.pass_on, template.generate(names)))
    finally:
        _room.reset(token)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox with bounds: a size is checked before something is made where it could be any, else after."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Raises OverflowError where the result would be too large."""
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers:
            _left().check(left.bit_length() * abs(right))
        elif operator == "*" and not numbers:
            times = next((one for one in (left, right) if isinstance(one, int)), 0)
            _left().check(times * max(len(one) for one in (left, right, "") if hasattr(one, "__len__")))
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        return _sized(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # named as Jinja's
        """Count the call. Raises OverflowError where one of a text would make too large a text."""
        _left().work()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_method(__obj.__name__, owner, *args, *kwargs.values())
        return _sized(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        """Raises OverflowError for a format with a wide field."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped


def _sized(value: Any) -> Any:
    if isinstance(value, str | list | tuple):
        _left().check(len(value))
    return value


def _check_format(text: str) -> None:
    if _WIDE.search(text):
        raise OverflowError("it writes a format with a field of five digits or more")


def _check_method(name: str, text: str, *arguments: Any) -> None:
    """Refuse a method or a filter of a text by what it would make: as wide as a number says, or text by text."""
    room = _left()
    for argument in arguments:
        if isinstance(argument, int):
            room.check(abs(argument))
    if name == "replace" and len(arguments) > 1 and isinstance(arguments[1], str):
        room.check((len(text) // max(len(str(arguments[0])), 1) + 1) * len(arguments[1]))
    if name == "join" and arguments and isinstance(arguments[0], list | tuple):
        room.check(sum(len(str(part)) + len(text) for part in arguments[0]))
    if name == "format":
        _check_format(text)


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    """``items``, of which each is a pass through a loop."""
    room = _left()
    for item in items:
        room.work()
        yield item


def _check_filter(name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    """The filter ``apply`` with bounds, which Jinja calls as before."""

    @wraps(apply)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = list(args[1:] if hasattr(apply, "jinja_pass_arg") else args)
        if name == "join" and not isinstance(given[0], str):
            given[0] = list(given[0])
            args = (*args[: len(args) - len(given)], *given)
            _check_method(name, str((*given[1:], *kwargs.values(), "")[0]), given[0])
        elif given and isinstance(given[0], str):
            _check_method(name, *given, *kwargs.values())
        return _sized(apply(*args, **kwargs))

    return checked


@cache
def _environment() -> jinja2.Environment:
    """The sandbox in which transformers renders chat templates, but for `Missing` and the bounds."""
    from transformers.utils import chat_template_utils

    made = chat_template_utils._compile_jinja_template("").environment.overlay(undefined=Missing, finalize=_write)
    made.__class__ = _Sandbox
    made.filters = {name: _check_filter(name, apply) for name, apply in made.filters.items()}
    made.filters |= {_COUNTED: _counted, _SIZED: _sized}
    return made  # type: ignore[no-any-return]


def _write(value: Any) -> Any:
    return _left().write(value)


def compile_template(source: str) -> jinja2.Template:
    """A template in which each loop counts its passes, and each ``~`` is as long as it may be."""
    tree = _environment().parse(source)
    for loop in tree.find_all(nodes.For):
        loop.iter = _filtered(loop.iter, _COUNTED)
    for node in [tree, *tree.find_all(nodes.Node)]:
        for name, value in node.iter_fields():
            if isinstance(value, nodes.Concat):
                setattr(node, name, _filtered(value, _SIZED))
            elif isinstance(value, list):
                value[:] = [_filtered(one, _SIZED) if isinstance(one, nodes.Concat) else one for one in value]
    code = _environment().compile(tree)
    return jinja2.Template.from_code(_environment(), code, _environment().make_globals({_CHARS: len(source)}))


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno).set_environment(_environment())  # type: ignore[return-value]
