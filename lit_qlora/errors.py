"""Owns the exceptions that stand for what the user can mend.

The command line prints them as one line and exits with status 2; anything else that escapes is a fault
of ours and keeps its traceback. Knows nothing of what raises it.
"""

from os import PathLike
from typing import Any

from lit_qlora.secrecy import redact

SHOWN = 160
"""Characters of a value that an error shows, at most."""
LONGEST_SECRET = 500
"""Characters behind those that are shown that are looked through, too: all of a long text would take minutes."""


class UserError(Exception):
    """Something the user can fix, said in one line: ``place: option: problem; remedy``, of which all but the problem
    may be missing.

    Whoever handles one reads its fields, or makes another of them by `replace`; the sentence is for people alone. No
    secret stands in any of them, wherever the error ends: on the terminal, in a notebook, in a program of the user's.

    Args:
        problem: what was expected and what came.
        option: the option that is wrong, by the name the user knows: ``data.max_length``.
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
        return f"{self._said()}; {self.remedy}" if self.remedy else self._said()

    def replace(self, **fields: Any) -> "UserError":
        """The same mistake with other ``fields``, as where another command calls the option by another name."""
        kept = {name: getattr(self, name) for name in ("problem", "option", "place", "remedy")}
        return UserError(**kept | fields)

    def within(self, option: str) -> "UserError":
        """The same mistake as one of what ``option`` names, whose sentence begins with that option."""
        return UserError(self._said(), option=option, remedy=self.remedy)

    def advise(self, remedy: str) -> "UserError":
        """The same mistake with ``remedy`` behind its own."""
        return self.replace(remedy=f"{self.remedy}; {remedy}" if self.remedy else remedy)

    def _said(self) -> str:
        return ": ".join(part for part in (self.place, self.option, self.problem) if part)


class SecretError(UserError):
    """An option is given a secret: options are kept in the run's files, so none takes one.

    Args:
        option: that one.
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
    """Memory ran out in training, after all that could be done about it in a run.

    Args:
        what: happened, in a few words.
        rows: conversations in the micro-batch.
    """

    def __init__(self, what: str, rows: int) -> None:
        super().__init__(what)
        self.rows = rows


def require(holds: bool, option: str, expected: str, got: object, *, place: str | PathLike[str] | None = None) -> None:
    """Raises UserError naming ``option``, what was expected and what came, unless ``holds``."""
    if not holds:
        raise UserError(f"expected {expected}, got {excerpt(got)}", option=option, place=place)


def excerpt(value: object) -> str:
    """Shows a value in at most `SHOWN` printable characters on one line."""
    try:
        return cut(repr(value))
    except (ValueError, RecursionError):  # a number of over 4,300 digits, or what is nested too deep
        return f"{type(value).__name__} …"


def cut(text: str, most: int = SHOWN) -> str:
    """``text`` in at most ``most`` characters, without its middle: the end of a path is what names a file.

    A secret is replaced before, for half of one is not known as such.
    """
    if len(text) > 2 * (most + LONGEST_SECRET):
        text = f"{text[: most + LONGEST_SECRET]} {text[-most - LONGEST_SECRET :]}"
    text = redact(text)
    if len(text) <= most:
        return text
    tail = (most - 1) // 3
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def one_line(error: object, most: int = 200) -> str:
    """What an error of others says, in one line of at most ``most`` characters."""
    return redact(" ".join(str(error).split())[: most + LONGEST_SECRET])[:most]
