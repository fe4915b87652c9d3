"""Owns the exceptions for errors that the user can fix, and how values, nearest names and foreign errors stand in them.

The command line prints them as one line and exits with status 2; any other exception is a bug of ours and keeps its
traceback. Knows nothing of what raises them.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import PurePath
from typing import Any

from lit_qlora.secrecy import redact

SHOWN = 160
"""Most characters of a value that an error shows."""
LONGEST_SECRET = 500
"""Characters beyond the shown ones that are searched for secrets, too: all of a long text would take minutes."""


class UserError(Exception):
    """An error that the user can fix, in one line: ``place: option: problem; remedy``, of which all but the problem
    may be missing.

    Handlers read its fields, or derive another error by `replace`; the sentence is for people only. Secrets are
    replaced in all of them, since an error may end up on a terminal, in a notebook or in a user's program.

    Args:
        problem: what was expected, and what was found.
        option: name of the wrong option, as the user knows it: ``data.max_length``.
        place: the file, or ``file:line``, that holds the mistake: ``rows.jsonl:17``.
        remedy: what to do about it.
    """

    def __init__(
        self,
        problem: str,
        *,
        option: str | None = None,
        place: str | PathLike[str] | None = None,
        remedy: str | None = None,
    ) -> None:
        self.problem = redact(problem)
        self.option = None if option is None else redact(option)
        self.place = None if place is None else redact(str(place))
        self.remedy = None if remedy is None else redact(remedy)
        super().__init__(self.problem)

    def __str__(self) -> str:
        return f"{self.said}; {self.remedy}" if self.remedy else self.said

    def replace(self, **fields: Any) -> "UserError":
        """The same error with other ``fields``, as for another command's name of the option."""
        return UserError(**self.fields | fields)

    def within(self, option: str) -> "UserError":
        """The same error about the value of ``option``, whose sentence starts with that option."""
        return UserError(self.said, option=option, remedy=self.remedy)

    def advise(self, remedy: str) -> "UserError":
        """The same error with ``remedy`` appended to its own."""
        return self.replace(remedy=f"{self.remedy}; {remedy}" if self.remedy else remedy)

    @property
    def fields(self) -> dict[str, Any]:
        """The arguments that make this error again, plain texts: in another process, too."""
        return {name: getattr(self, name) for name in ("problem", "option", "place", "remedy")}

    @property
    def said(self) -> str:
        """The sentence without its remedy."""
        return ": ".join(part for part in (self.place, self.option, self.problem) if part)


class SecretError(UserError):
    """An error for a secret in an option: options are saved in the run's files, so none may hold one.

    Args:
        option: as of `UserError`.
        place: as of `UserError`.
    """

    def __init__(self, option: str, place: str | None = None) -> None:
        super().__init__(
            "it holds a password or a token, and options are kept in the run's files",
            option=option,
            place=place,
            remedy="put a token for the hub into the environment as HF_TOKEN, and fetch by hand what else needs one",
        )


class OutOfRoomError(UserError):
    """An error for memory that ran out in training, after all measures within a run.

    Args:
        what: what happened, in a few words.
        rows: number of conversations in the micro-batch.
    """

    def __init__(self, what: str, rows: int) -> None:
        super().__init__(what)
        self.rows = rows


def require(holds: bool, option: str, expected: str, got: object, *, place: str | PathLike[str] | None = None) -> None:
    """Raises UserError unless ``holds``.

    Args:
        holds: the requirement.
        option: option that the requirement is about.
        expected: the requirement in words.
        got: the value that was found.
        place: the file that holds it, as of `UserError`.
    """
    if not holds:
        raise UserError(f"expected {expected}, got {excerpt(got)}", option=option, place=place)


@contextmanager
def recorded_in(place: PathLike[str], advice: str) -> Iterator[None]:
    """Append, to a UserError about a path that is not there, where the path comes from and what to do.

    Args:
        place: the run or the adapter that records it.
        advice: the option to give instead, in words.

    Raises:
        UserError: in place of the one without.
    """
    try:
        yield
    except UserError as error:
        raise error.advise(f"{place} has this path: {advice}") from error


def nearest(name: str, known: Iterable[str], cutoff: float = 0.75) -> str | None:
    """The known name that was probably meant; None if none is near.

    Args:
        name: as it was written.
        known: what it may be.
        cutoff: least similarity, of 1, that counts as near.
    """
    return next(iter(difflib.get_close_matches(name, list(known), 1, cutoff)), None)


def likely_meant(near: object) -> str | None:
    """The remedy that names what was probably meant: a name, a path as it is; None for nothing.

    Args:
        near: what is near, or None or an empty text.
    """
    return f"did you mean {near if isinstance(near, PurePath) else repr(near)}?" if near else None


def meant(value: object, known: Iterable[str]) -> str | None:
    """The remedy for a value that is none of the ``known``: the one that was probably meant; None if none is near.

    Args:
        value: as it was given.
        known: the names that it may be.
    """
    by_lower = {one.lower(): one for one in known}
    return likely_meant(by_lower.get(nearest(str(value).lower(), by_lower, 0.6) or ""))


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that names what was probably meant.

    Args:
        name: as it was written.
        known: what it may be.

    Returns:
        The one that is `nearest`, behind a comma; empty if none is near.
    """
    near = nearest(name, known, 0.7)
    return f", {likely_meant(near)}" if near else ""


def excerpt(value: object) -> str:
    """A value as an error shows it.

    Args:
        value: of any kind.

    Returns:
        Its repr in at most `SHOWN` printable characters, on one line.
    """
    try:
        return cut(repr(value))
    except (ValueError, RecursionError):  # a number of over 4,300 digits, or too deep nesting
        return f"{type(value).__name__} …"


def cut(text: str) -> str:
    """A text of at most `SHOWN` characters, without its middle: the end of a path names the file.

    Secrets are replaced before, since half of one is not recognised.

    Args:
        text: text of any length.
    """
    searched = SHOWN + LONGEST_SECRET
    text = redact(text if len(text) <= 2 * searched else f"{text[:searched]} {text[-searched:]}")
    tail = (SHOWN - 1) // 3
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1 - tail]}…{text[-tail:]}"


def one_line(error: object, most: int = 200) -> str:
    """The message of another project's error in one line, without secrets.

    Args:
        error: the error, or its message.
        most: characters of the line.
    """
    return redact(" ".join(str(error).split())[: most + LONGEST_SECRET])[:most]


def first_line(error: Exception) -> str:
    """The first line of another project's ``error``, cut to 200 characters; else the name of its class."""
    words = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip()
    return words if len(words) <= 200 else f"{words[:200]}…"
