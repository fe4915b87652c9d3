"""Owns the conversation: roles and texts of turns, checked when created; or a plain text in its place.

Stages before it create one; stages after it read one. Knows no format, no tokens.
"""

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["user", "assistant", "text"]
"""Who speaks; ``text`` stands for nobody, in a plain text that is learned whole."""


HALF = r"holds bytes that are no UTF-8, or half a character (a lone surrogate such as '\ud800'): no token stands for it"


class TextError(ValueError):
    """An error for a text of a conversation that no prompt can hold.

    Args:
        turn: its number, from 1 on; 0 is the system text.
        problem: the reason in words.
    """

    def __init__(self, turn: int, problem: str) -> None:
        super().__init__(f"{turn_name(turn)} {problem}")
        self.turn, self.problem = turn, problem


def turn_name(turn: int) -> str:
    """The name of the turn of number ``turn``, from 1 on; 0 is the system text."""
    return f"turn {turn}" if turn else "the system text"


def is_encodable(text: str) -> bool:
    """True if ``text`` holds no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of the user or of the assistant, or a plain text; never blank.

    Args:
        role: ``user`` or ``assistant``.
        content: the text.
        learned: False for a turn that is context only, whatever else is learned. Turns of the same words are equal.
    """

    role: Role
    content: str
    learned: bool = field(default=True, compare=False)

    def __post_init__(self) -> None:
        """Raises ValueError for a blank content."""
        if not self.content.strip():
            raise ValueError(f"a turn of the {self.role} is empty")


@dataclass(frozen=True, slots=True)
class Conversation:
    """``turns`` that alternate, the user first; an optional ``system`` text that stands above them all.

    A conversation that ends on the user's turn is an open prompt; one that ends on the
    assistant's is answered, and can be trained on. So can a plain text, which is a single turn of the role ``text``.
    """

    turns: tuple[Turn, ...]
    system: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError without a turn, or if the roles do not alternate, the user first."""
        if not self.turns:
            raise ValueError("a conversation needs at least one turn")
        if self.is_text:
            return
        for index, turn in enumerate(self.turns):
            if turn.role != (expected := "assistant" if index % 2 else "user"):
                raise ValueError(f"turn {index + 1} is the {turn.role}'s, expected the {expected}'s")

    def check_characters(self) -> None:
        """Raises TextError for a text with a lone surrogate."""
        for number, text in enumerate([self.system or "", *(turn.content for turn in self.turns)]):
            if not is_encodable(text):
                raise TextError(number, HALF)

    @property
    def is_answered(self) -> bool:
        """True if the last turn is not the user's."""
        return self.turns[-1].role != "user"

    @property
    def is_text(self) -> bool:
        """True for a plain text, which no prompt format writes."""
        return len(self.turns) == 1 and self.turns[0].role == "text" and self.system is None


def first_difference(expected: str, came: str) -> int:
    """Index of the first character in which ``came`` differs from ``expected``; the shorter length if one begins the
    other.
    """
    pairs = enumerate(zip(expected, came, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(expected), len(came)))
