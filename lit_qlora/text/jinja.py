"""Owns the compiling and rendering of Jinja chat templates, in the sandbox of transformers and with the names it gives.

What a template loops, calls and makes is counted, so that none takes forever or fills memory, and the same template is
refused on every machine, fast or slow. Knows nothing of what a template says.
"""

import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache, wraps
from string import Formatter
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_WORK = 3 * 10**8
"""Passes through loops and calls of one rendering, times the characters of the template: about a second. One more for
each character that it is given."""
MAX_SIZE = 10**6
"""Characters and items that a template makes, all that is within them counted, beyond four times what it is given."""
MAX_INDENT = 64
MAX_BITS = 20_000
"""Most bits of a number: some 6,000 digits, more than Python reads or writes."""

FILTERS = frozenset((
    "abs", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "format",
    "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "title",
    "tojson", "trim", "unique", "upper"
))  # fmt: skip
METHODS = frozenset((
    "capitalize", "casefold", "center", "count", "endswith", "find", "format", "format_map", "get", "index",
    "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle",
    "isupper", "items", "join", "keys", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
    "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith",
    "strip", "swapcase", "title", "upper", "values"
))  # fmt: skip
GLOBALS = frozenset(("dict", "namespace", "raise_exception", "range", "strftime_now"))
"""Functions that a template may call: those of chat templates, whose results are in proportion to what goes in."""

_COUNTED, _SIZED, _JOINED, _READ = (f"lit_qlora_{name}" for name in ("counted", "sized", "joined", "read"))
"""Filters around what a template loops over, its lists and tables, what it joins with ``~``, and what it compares or
cuts."""
_CHARS = "lit_qlora_chars"
"""A template's own length, among its globals."""
_WIDE = re.compile(r"\d{5}|[*{]")
"""A width of five digits in a format's field, or one given by an argument."""


class RefusalError(ValueError):
    """Messages that a template refuses in words of its own, by ``raise_exception``."""


class ClockError(jinja2.UndefinedError, ValueError):
    """A template that can't do without today's date."""


class Missing(jinja2.Undefined):
    """An undefined name: it may be tested, as in ``if tools`` or ``if 'x' in tools``, and never rendered as empty."""

    def __contains__(self, _: object) -> bool:
        return False

    def __str__(self) -> str:  # noqa: PLE0307  # it never returns
        self._fail_with_undefined_error()

    def __iter__(self) -> Any:
        self._fail_with_undefined_error()


class _Room:
    """The room that one rendering still has.

    Args:
        template_chars: Length of the template.
        given_chars: Length of all messages.
    """

    def __init__(self, template_chars: int, given_chars: int) -> None:
        self._passes = MAX_WORK // max(template_chars, 1000) + given_chars
        self._size = MAX_SIZE + 4 * given_chars
        self._written = self._passed_on = 0

    def work(self, amount: int = 1) -> None:
        """Count passes through loops, calls, or as much. Raises OverflowError where there were too many."""
        self._passes -= amount
        if self._passes < 0:
            raise OverflowError("it loops or calls too often")

    def check(self, size: int) -> None:
        """Raises OverflowError for something of that many characters or items."""
        if size > self._size:
            raise OverflowError(f"it makes something of more than {self._size:,} characters")

    def measure(self, value: Any) -> int:
        """The characters and items of ``value``, all that is within it included. Raises OverflowError for too many."""
        size, steps, rest = 0, 0, [value]
        while rest:
            one = rest.pop()
            steps += 1
            if isinstance(one, str):
                size += len(one)
            elif isinstance(one, Mapping):
                size += len(one)
                rest += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple | range):
                size += len(one)
                rest += () if isinstance(one, range) else one
            elif isinstance(one, jinja2.utils.Namespace):
                raise OverflowError("it writes a namespace")
            self.check(size)
        self.work(steps // 5 + size // 1000)
        return size

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
    """The bounds of the current rendering; new ones while a template is compiled, when Jinja computes constants."""
    return _room.get() or _Room(0, 0)


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
            refuses the messages; as ClockError, it asks for the date.
    """
    no_clock = "strftime_now gives different prompts each day; write a date, or none"
    names = {
        "messages": messages, "bos_token": bos, "eos_token": eos, "add_generation_prompt": add_generation_prompt,
        "tools": None, "documents": None, "strftime_now": Missing(no_clock, exc=ClockError),
        "enable_thinking": False,
    }  # fmt: skip
    room = _Room(int(template.globals[_CHARS]), sum(len(text) for message in messages for text in message.values()))
    token = _room.set(room)
    try:
        return "".join(map(room.pass_on, template.generate(names)))
    except Exception as error:  # any error of a template's code
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == "<template>"), 1)
        kind: type[ValueError] = RefusalError if type(error) is jinja2.TemplateError else ValueError
        if isinstance(error, ClockError):
            kind = ClockError
        raise kind(f"line {line} can't be rendered: {' '.join(str(error).split())}") from error
    finally:
        _room.reset(token)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox with bounds: a size is checked before something is made where it could be any, else after."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Raises OverflowError where the result would be too large."""
        room = _left()
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers:
            _check_bits(left.bit_length() * abs(right))
        elif operator == "*" and not numbers:
            times = next((one for one in (left, right) if isinstance(one, int)), 0)
            room.check(times * max(len(one) for one in (left, right, "") if hasattr(one, "__len__")))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right, by_braces=False)
        return _sized(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # named as Jinja's
        """Count the call. Raises OverflowError where one of a text would make too large a text."""
        _left().work()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | int | float | bytes | list | tuple | dict | range):
            if __obj.__name__ not in METHODS:
                raise OverflowError(f"it calls {__obj.__name__}, which chat templates have no need of")
            if isinstance(owner, str):
                _check_text(__obj.__name__, owner, *args, *kwargs.values())
        return _sized(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        """The method ``format`` of a text with bounds; None for another value."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> Any:
            _check_format(value.__self__, *args, *kwargs.values())
            return wrapped(*args, **kwargs)

        return checked


def _sized(value: Any) -> Any:
    if isinstance(value, int):
        _check_bits(value.bit_length())
    elif isinstance(value, str | list | tuple | dict):
        _left().measure(value)
    return value


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise OverflowError(f"it computes a number of more than {MAX_BITS:,} bits")


def _joined(parts: list[Any]) -> str:
    """The text that ``~`` makes of ``parts``."""
    _left().measure(parts)
    return "".join(map(str, parts))


def _read_through(value: Any) -> Any:
    """``value``, which is compared or cut, once counted: it is read from one end to the other."""
    if hasattr(value, "__len__"):
        _left().work(len(value) // 1000)
    return value


def _check_format(text: str, *arguments: Any, by_braces: bool = True) -> None:
    """Refuse ``text`` as a format by what it would make of ``arguments``; with ``{}``, or with ``%``."""
    specs = [spec for *_, spec, _ in Formatter().parse(text) if spec] if by_braces else [text.replace("{", "")]
    if any(map(_WIDE.search, specs)):
        raise OverflowError("it writes a format with a field of five digits or more")
    room, fields = _left(), text.count("%") + text.count("{")
    if fields > 1:
        room.check(len(text) + fields * room.measure(arguments))


def _check_text(name: str, text: str, *arguments: Any) -> None:
    """Refuse a method or a filter of a text by what it would make: as wide as a number says, or text by text."""
    room = _left()
    room.work(len(text) // 100)
    for argument in arguments:
        if isinstance(argument, int):
            room.check(abs(argument))
    if name == "replace" and len(arguments) > 1 and isinstance(arguments[1], str):
        room.check((len(text) // max(len(str(arguments[0])), 1) + 1) * len(arguments[1]))
    if name == "join" and arguments and isinstance(arguments[0], list | tuple):
        room.check(room.measure(arguments[0]) + len(arguments[0]) * len(text))
    if name == "format":  # the filter; the method has its own way, by `wrap_str_format`
        _check_format(text, *arguments, by_braces=False)
    if name == "indent":
        room.check((text.count("\n") + 1) * max([4, *map(_width, arguments)]))


def _width(value: Any) -> int:
    return len(value) if isinstance(value, str) else abs(value) if isinstance(value, int) else len(str(value))


def _counted_passes(items: Iterable[Any]) -> Iterator[Any]:
    """``items``, of which each is a pass through a loop."""
    room = _left()
    for item in items:
        room.work()
        yield item


IN_WHOLE = frozenset((
    "capitalize", "e", "escape", "format", "indent", "lower", "replace", "string", "title", "tojson", "trim",
    "upper"
))  # fmt: skip
"""Filters that write what they are given as a text, whatever it is."""


def _check_filter(name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    """The filter ``apply`` with bounds, which Jinja calls as before; one that is not among `FILTERS` is refused."""

    @wraps(apply)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = list(args[1:] if hasattr(apply, "jinja_pass_arg") else args)
        _left().work()
        if name not in FILTERS:
            raise OverflowError(f"it uses the filter {name}, which chat templates have no need of")
        if name in IN_WHOLE and given:
            _left().measure(given[0])
        if name == "tojson" and max(map(_width, (*given[1:], *kwargs.values())), default=0) > MAX_INDENT:
            raise OverflowError(f"it writes JSON with an indent or a separator of more than {MAX_INDENT}")
        if name == "join" and not isinstance(given[0], str):
            given[0] = list(given[0])
            args = (*args[: len(args) - len(given)], *given)
            _check_text(name, str((*given[1:], *kwargs.values(), "")[0]), given[0])
        elif given and isinstance(given[0], str):
            _check_text(name, *given, *kwargs.values())
        return _sized(apply(*args, **kwargs))

    return checked


@cache
def _environment() -> jinja2.Environment:
    """The sandbox in which transformers renders chat templates, but for `Missing` and the bounds."""
    from transformers.utils import chat_template_utils

    made = chat_template_utils._compile_jinja_template("").environment.overlay(undefined=Missing, finalize=_written_out)
    made.__class__ = _Sandbox
    made.filters = {name: _check_filter(name, apply) for name, apply in made.filters.items()}
    made.filters |= {_COUNTED: _counted_passes, _SIZED: _sized, _JOINED: _joined, _READ: _read_through}
    made.globals = {name: value for name, value in made.globals.items() if name in GLOBALS}
    return made  # type: ignore[no-any-return]


def _written_out(value: Any) -> Any:
    if not isinstance(value, str):
        _left().measure(value)
    return _left().write(value)


def compile_template(source: str) -> jinja2.Template:
    """A template in which each loop counts its passes, and what it makes is as large as it may be.

    Args:
        source: its text.

    Raises:
        ValueError: with the line, for invalid Jinja, or an unsupported template.
    """
    if not source.strip():
        raise ValueError("expected a Jinja chat template, got nothing")
    environment = _environment()
    try:
        code = environment.compile(_bound(environment.parse(source)))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno} is no valid Jinja: {error.message}") from error
    except (RecursionError, MemoryError, SyntaxError) as error:  # Jinja's parser, or Python's of what Jinja makes of it
        raise ValueError(f"it is nested too deeply ({type(error).__name__})") from error
    return jinja2.Template.from_code(environment, code, environment.make_globals({_CHARS: len(source)}))


def _bound(node: nodes.Node) -> Any:
    """``node`` and all below it, with the filters that count."""
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, name, _bound(value))
        elif isinstance(value, list):
            value[:] = [_bound(one) if isinstance(one, nodes.Node) else one for one in value]
    match node:
        case nodes.For():
            node.iter = _filtered(node.iter, _COUNTED)
        case nodes.Concat():
            return _filtered(nodes.List(node.nodes, lineno=node.lineno), _JOINED)
        case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load"):
            return _filtered(node, _SIZED)
        case nodes.Getitem(arg=nodes.Slice()):
            return _filtered(node, _READ)
        case nodes.Compare():
            node.expr = _filtered(node.expr, _READ)
        case nodes.Operand():
            node.expr = _filtered(node.expr, _READ)
    return node


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno).set_environment(_environment())  # type: ignore[return-value]
