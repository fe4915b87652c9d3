"""Owns which conversations are held out from training, and which are for `test`.

Held out are those of a source of their own, or else of the source's validation split, or else of its test split, or
else a seeded share. After a run's start, its record names them. Knows no form of row and no tokens.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from lit_qlora.data.records import ANY_FORM, UNANSWERED, Reading, Records, count_unanswered, load_records
from lit_qlora.data.run_rows import RunRows, digest
from lit_qlora.data.sources import Splits, find_splits
from lit_qlora.errors import UserError

PART = {"validation": "held-out", "test": "test"}


@dataclass(frozen=True)
class Parts:
    """The rows of a source by purpose.

    Args:
        source: what is trained on: its train split, or all of a file.
        validation_source: held-out rows from elsewhere; its validation split, or else its test split, if it has one.
        share: of the different conversations, held out where there is neither such a source nor such a split.
        seed: of the share.
        reading: how rows are read, as in `load_records`.
    """

    source: str
    validation_source: str | None = None
    share: float = 0.05
    seed: int = 42
    reading: Reading = ANY_FORM

    @cached_property
    def splits(self) -> Splits:
        """Those of the source. Raises UserError when it isn't found."""
        return find_splits(self.source)

    def unread(self) -> list[str]:
        """Files or splits of the source that are neither learned nor scored."""
        other = [] if self._is_own() or "validation" not in self.splits.names else [self.splits.names["validation"]]
        held_out = None if self.validation_source is None else _place(self.validation_source)
        beside = [path.name for path in self.splits.beside if path.resolve() != held_out]
        return [*other, *self.splits.unread, *beside]

    def draws(self) -> bool:
        """True if a share of the training rows is held out, since there are no other rows to validate on."""
        return self._is_own() and self.splits.first("validation", "test") is None

    def train_and_held_out(self) -> tuple[Records, Records]:
        """Load the rows to train on and the rows to validate on, which never mix.

        A share is drawn by the seed only, and no conversation is on both sides. Of other held-out rows, those that are
        also in training are counted.

        Raises:
            UserError: as `load_records`, when there is nothing to hold out, and when all of it is in training, too.
        """
        splits = self.splits
        train = self._load(self.source, splits.training())
        if self._is_own():
            own = splits.first("validation", "test")
            if own:
                return train, _apart(self._load(self.source, own), train, "data.source")
            if self.validation_source is not None:
                raise UserError(
                    f"{self.source} is the training data itself",
                    option="data.validation_source",
                    remedy="leave it out to hold out a share",
                )
            return _split(train, self.share, self.seed)
        assert self.validation_source is not None
        elsewhere = find_splits(self.validation_source)
        name = elsewhere.first("validation", "test") or elsewhere.training()
        return train, _apart(self._load(self.validation_source, name), train, "data.validation_source")

    def test(self, rows: RunRows | None = None) -> Records | None:
        """Loads the source's own test split; None where there is none, or where it is what is held out.

        Those of its conversations that are in training, too, are counted, unless ``rows`` is there to tell it.

        Raises:
            UserError: as `train_and_held_out`.
        """
        splits = self.splits
        is_held_out = self._is_own() and "validation" not in splits.names
        if "test" not in splits.names or is_held_out:
            return None
        records = self._load(self.source, splits.names["test"])
        return records if rows else _apart(records, self._load(self.source, splits.training()), "data.source", "test")

    def test_of(self, source: str) -> Records:
        """Loads the rows of ``source`` that are there for a test: of its test split, or else what it has.

        Raises:
            UserError: as `load_records`, or when it is the training data itself.
        """
        splits = find_splits(source)
        name = splits.first("test", "validation")
        if name is None and _place(source) == _place(self.source):
            raise UserError(
                f"{source} is the training data itself",
                option="data.test_source",
                remedy="leave it out, or give others",
            )
        return self._load(source, name or splits.training())

    def held_out(self, rows: RunRows | None) -> tuple[Records, int]:
        """Loads the rows to score: those that the run of the record ``rows`` held out, as `recall` does.

        Without a record, or with another validation source than the run's, they are found as at the start of a run.

        Raises:
            UserError: as `recall` and `train_and_held_out`.
        """
        is_other = rows is not None and self.validation_source not in (None, rows.validation_source)
        if rows is None or is_other:
            return self.train_and_held_out()[1], 0
        return self.recall(rows)

    def recall(self, rows: RunRows) -> tuple[Records, int]:
        """Find the conversations that a run held out, in their order then, and the number missing since.

        They are searched for in the validation source and in every split of the source, wherever they were moved.

        Raises:
            UserError: as `load_records`, and when none is there any more.
        """
        wanted = {*rows.held_out}
        found: dict[str, tuple[Records, int]] = {}
        places: list[Records] = []
        num_new = 0
        for records in self._places(rows):
            digests = [*map(digest, records.conversations)]
            num_new += len({*digests} - wanted - rows.train)
            first = {one: place for place, one in reversed([*enumerate(digests)]) if one in wanted - found.keys()}
            places += [records] if first else []
            found |= {one: (records, place) for one, place in first.items()}
            if len(found) == len(wanted):
                break
        kept = [found[one] for one in rows.held_out if one in found]
        if not kept:
            raise UserError(
                f"none of the {len(rows.held_out):,} conversations that the run held out is in {self.source} any more",
                option="data.source",
                remedy="give the rows that the run began with, or others with --data.validation_source",
            )
        name = " and ".join(records.name for records in places)
        unanswered = frozenset(new for new, (records, place) in enumerate(kept) if place in records.unanswered)
        dropped = count_unanswered(unanswered)
        learned = sum(one in rows.train for one in rows.held_out if one in found)
        if learned:
            dropped[f"of {len(kept):,} held-out conversations are in training too"] = learned
        if num_new:
            dropped["conversations there are new since the run began, and not scored"] = num_new
        conversations = [records.conversations[place] for records, place in kept]
        where = [records.where[place] for records, place in kept]
        return Records(name, conversations, dropped, unanswered, where), len(rows.held_out) - len(kept)

    def _places(self, rows: RunRows) -> Iterator[Records]:
        sources = [self.validation_source or rows.validation_source, self.source]
        for source in dict.fromkeys(filter(None, sources)):
            splits = self.splits if source == self.source else find_splits(source)
            for kind in ("validation", "test", "train"):
                if kind in splits.names:
                    records = self._load(source, splits.names[kind])
                    is_share = source == self.source and kind == "train"
                    yield replace(records, name=f"{records.name}, held out") if is_share else records

    def _is_own(self) -> bool:
        """True if the held-out rows come from the source itself."""
        given = self.validation_source
        return given is None or given == self.source or _place(given) == _place(self.source)

    def _load(self, source: str, split: str) -> Records:
        return load_records(source, split, self.reading)


def _place(source: str) -> Path:
    return Path(source).expanduser().resolve()


def _apart(
    records: Records, train: Records, option: str, part: Literal["validation", "test"] = "validation"
) -> Records:
    """``records``, with the number of its conversations that are in ``train``.

    Raises UserError when all are, of the ``option`` that they came by.
    """
    learned = set(train.conversations)
    count, number = sum(conversation in learned for conversation in records.conversations), len(records.conversations)
    if count == number:
        raise UserError(
            f"all {number:,} conversations of {records.name} are training data, "
            f"too ({train.name}), so scoring them shows nothing about new ones",
            option=option,
            remedy=f"give others with data.{part}_source, or put others there",
        )
    told = {f"of {number:,} {PART[part]} conversations are in training too": count} if count else {}
    return replace(records, dropped=told | records.dropped)


def _split(records: Records, share: float, seed: int) -> tuple[Records, Records]:
    if not 0 < share < 1:
        raise UserError(
            f"is {share}, expected between 0 and 1, such as 0.05, because {records.name} has no test split",
            option="data.validation_share",
            remedy="or give data.validation_source",
        )
    unique = list(dict.fromkeys(records.conversations))
    if len(unique) < 2:
        raise UserError(
            "has one conversation only, so none can be held out",
            place=records.name,
            remedy="add rows, or give data.validation_source",
        )
    count = min(max(1, round(share * len(unique))), len(unique) - 1)
    chosen = set(random.Random(seed).sample(unique, count))
    held_out = [number for number, conversation in enumerate(records.conversations) if conversation in chosen]
    kept = sorted({*range(len(records.conversations))} - {*held_out})
    return (
        replace(_part(records, records.name, kept, records.dropped), left_out=records.left_out),
        _part(records, f"{records.name}, held out", held_out, {}),
    )


def _part(records: Records, name: str, places: list[int], dropped: dict[str, int]) -> Records:
    unanswered = frozenset(new for new, place in enumerate(places) if place in records.unanswered)
    conversations = [records.conversations[place] for place in places]
    where = [records.where[place] for place in places]
    counted = {what: number for what, number in dropped.items() if what != UNANSWERED}
    return Records(name, conversations, count_unanswered(unanswered) | counted, unanswered, where)
