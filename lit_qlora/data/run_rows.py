"""Owns the record of a run's rows: the conversations that it learns and holds out, as digests, in a small file.

A source may change after a run. By this record the held-out conversations are found again, and the learned ones are
known. Knows no source and no split.
"""

import json
from collections.abc import Iterable, Set
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from lit_qlora.errors import UserError
from lit_qlora.storage.files import parse_json, unreadable, write_file
from lit_qlora.storage.foreign import shown
from lit_qlora.text.conversation import Conversation
from lit_qlora.wording import number_of

ROWS_VERSION = 1


@dataclass(frozen=True)
class RunRows:
    """Digests of a run's conversations, in their order.

    Args:
        held_out: of the conversations that are scored, repeated ones as often as they are there.
        train: of the conversations that are learned, each once.
        validation_source: the option that says where the held-out ones are from.
    """

    held_out: tuple[str, ...]
    train: frozenset[str]
    validation_source: str | None = None

    @classmethod
    def of(
        cls, train: Iterable[Conversation], held_out: Iterable[Conversation], validation_source: str | None
    ) -> "RunRows":
        """The record of a run's conversations.

        Args:
            train: conversations that are learned.
            held_out: conversations that are scored, in order.
            validation_source: the option that says where the latter are from.
        """
        return cls(tuple(map(turns_digest, held_out)), frozenset(map(turns_digest, train)), validation_source)

    def changes(self, now: "RunRows") -> dict[str, str]:
        """What became of the learned and of the held-out conversations, in words.

        Args:
            now: a later record.
        """
        was, then = self._parts(), now._parts()
        here, there = frozenset().union(*was.values()), frozenset().union(*then.values())
        return {part: _in_words(was[part], then[part], here, there) for part in was}

    def _parts(self) -> dict[str, frozenset[str]]:
        return {"train_rows": self.train, "held_out_rows": frozenset(self.held_out)}

    def differences(self, now: "RunRows") -> list[str]:
        """The parts with other conversations, in words; their order and number do not count.

        Args:
            now: a later record.
        """
        was, then, words = self._parts(), now._parts(), self.changes(now)
        names = {"train_rows": "to learn", "held_out_rows": "to hold out"}
        return [f"{names[part]}: {words[part]}" for part in was if was[part] != then[part]]

    @classmethod
    def read(cls, file: Path) -> "RunRows | None":
        """The record in ``file``; None without one.

        Raises:
            UserError: it is damaged.
        """
        try:
            values = parse_json(file.read_bytes())
            if values["version"] != ROWS_VERSION:
                raise ValueError(f"its version is {shown(values['version'])}, expected {ROWS_VERSION}")
            source = values["validation_source"]
            digests = [[*map(_checked, values[name])] for name in ("held_out", "train")]
            if not (digests[0] and isinstance(source, str | None)):
                raise ValueError("it has no held-out row, or a source that is no text")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"{file} is damaged ({unreadable(error)}): it records which rows the run held out"
            remedy = "put a copy of it back, or remove it, to draw them again from the source as it is now"
            raise UserError(problem, remedy=remedy) from error
        return cls(tuple(digests[0]), frozenset(digests[1]), source)

    def write(self, file: Path) -> None:
        """Write the record to ``file`` atomically; equal conversations give equal bytes.

        Raises:
            SaveError: it could not be written.
        """
        values = asdict(self) | {"train": sorted(self.train)}
        text = json.dumps({"version": ROWS_VERSION} | values, indent=0) + "\n"
        if not file.is_file() or file.read_bytes() != text.encode():
            write_file(file, text)


def turns_digest(conversation: Conversation) -> str:
    """Digest of a ``conversation``: 64 bits of a sha256 of its system text and its turns, in hexadecimal."""
    turns = [conversation.system, *((turn.role, turn.content) for turn in conversation.turns)]
    return sha256(json.dumps(turns).encode()).hexdigest()[:16]


def _in_words(was: Set[str], now: Set[str], all_was: Set[str], all_now: Set[str]) -> str:
    """What became of the digests of a part; those of both parts say which have only changed sides."""
    gone, new, moved = len(was - all_now), len(now - all_was), len((was ^ now) & all_was & all_now)
    found = [f"{gone:,} of {number_of(len(was), 'conversations')} gone"] if gone else []
    found += [number_of(new, "new conversations")] if new else []
    found += [number_of(moved, "conversations drawn to the other part, training or held out")] if moved else []
    return " and ".join(found) or "the same conversations, in another order or number, or learned otherwise"


def _checked(value: object) -> str:
    if not isinstance(value, str) or len(value) != 16:
        raise ValueError(f"{shown(value)} is no digest of a row")
    return value
