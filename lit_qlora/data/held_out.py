"""Owns which conversations are held out from training, and which are for `test`.

Held out are those of a source of their own, or else of the source's validation split, or else of its test split, or
else a seeded share. After a run's start, its record names them. `Parts` is its interface. Knows no form of row and no
tokens.
"""

import random
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from lit_qlora.data.records import (
    ANY_FORM,
    Kept,
    Lost,
    Reading,
    Records,
    check_early,
    count_unanswered,
    is_at,
    joined_name,
    joined_sources,
    load_records,
    no_row,
    places_early,
)
from lit_qlora.data.row_files import SourceError
from lit_qlora.data.run_rows import RunRows, turns_digest
from lit_qlora.data.sources import Source, as_text, find_splits, sources_of
from lit_qlora.data.splits import Splits
from lit_qlora.errors import UserError
from lit_qlora.text.conversation import Conversation
from lit_qlora.wording import number_of


@dataclass(frozen=True)
class Parts:
    """The rows of sources by purpose.

    Args:
        source: what is trained on, as in ``data.source``: the train split of each source, or all of a file.
        validation_source: held-out rows from elsewhere; its validation split, or else its test split, if it has one.
        share: of the different conversations, held out where there is neither such a source nor such a split.
        seed: of the share, and of the share of a source that is used.
        reading: how rows are read, as in `load_records`.
    """

    source: Any
    validation_source: Any = None
    share: float = 0.05
    seed: int = 42
    reading: Reading = ANY_FORM

    @cached_property
    def splits(self) -> dict[Source, Splits]:
        """The splits of each source, but those that another source trains on. Raises UserError if one isn't found."""
        found = {source: find_splits(source) for source in sources_of(self.source)}
        learned = [_split_of(source, splits.names.get("train", "")) for source, splits in found.items()]
        return {
            source: splits.without({one.split for one in learned if one == _split_of(source, str(one.split))})
            for source, splits in found.items()
        }

    def unread(self) -> dict[str, list[str]]:
        """Files or splits that are neither learned nor scored, by the source that has them."""
        found = {}
        given = {source.here.resolve() for source in (*self.splits, *self._elsewhere())}
        for source, splits in self.splits.items():
            other = [] if self._is_own() or "validation" not in splits.names else [splits.names["validation"]]
            beside = [
                path.name for path in splits.beside if not any(one.is_relative_to(path.resolve()) for one in given)
            ]
            found[str(source)] = [*other, *splits.unread, *beside]
        return {name: unread for name, unread in found.items() if unread}

    def draws(self) -> bool:
        """True if a share of the training rows is held out, since there are no other rows to validate on."""
        own = [splits.first("validation", "test") for splits in self.splits.values()]
        return self._is_own() and None in own and (self.share > 0 or not any(own))

    def check_early(self) -> None:
        """Look at the rows on this machine for what `train_and_held_out` would refuse; see `records.check_early`.

        Raises:
            UserError: as it does.
        """
        local = {source: find_splits(source) for source in sources_of(self.source) if not source.is_on_hub}
        for source, splits in local.items():
            check_early(source, splits.training(), self.reading, self.seed)
        held_out = {source: splits.first("validation", "test") for source, splits in local.items()}
        for source, split in held_out.items() if self._is_own() else ():
            if split:
                check_early(source, split, self.reading)
        if not self._is_own():
            check_early_to_score(self.validation_source, "data.validation_source", self.reading)
        if len(local) == len(sources_of(self.source)) and self.draws():
            undivided = [source.called(splits.training()) for source, splits in local.items() if not held_out[source]]
            self._check_draw(joined_name(undivided))

    def check_row(self, row: str) -> None:
        """Raises UserError for a ``row`` that no part has, as `train_and_held_out` reads them; see `records.is_at`.

        Passes what can't be judged before rows are loaded: the hub's, and large files.
        """
        if any(source.is_on_hub for source in (*sources_of(self.source), *self._elsewhere())):
            return
        trains = [(source, splits.training()) for source, splits in self.splits.items()]
        held_out = [(source, split) for source, split in self._held_out_splits() if split]
        found = [places_early(source, split, self.reading) for source, split in (*trains, *held_out)]
        if None not in found and not any(is_at(where, row) for places in found for where in places or ()):
            raise no_row(joined_name([source.called(split) for source, split in trains]), row)

    def train_and_held_out(self) -> tuple[Records, Records]:
        """Load the rows to train on and the rows to validate on, which never mix.

        A share is drawn by the seed only, of all sources that have no other held-out rows, and no conversation is on
        both sides. Of other held-out rows, those that are also in training are counted.

        Returns:
            Those to train on, and those to validate on.

        Raises:
            UserError: as `load_records`, when there is nothing to hold out, and when all of it is in training, too.
        """
        trains, splits = self._training(), self._held_out_splits()
        fixed = self._load_each((source, name) for source, name in splits if name)
        if not self._is_own():
            train = joined_sources(trains)
            return train, _apart(joined_sources(fixed), {*train.conversations}, train.name, "data.validation_source")
        held_out = []
        if fixed:
            train = joined_sources(trains)
            held_out = [_apart(joined_sources(fixed), {*train.conversations}, train.name, "data.source")]
        if self.draws():
            undivided = joined_sources([records for records, (_, name) in zip(trains, splits, strict=True) if not name])
            self._check_draw(undivided.name)
            drawn = _draw(undivided, self.share, self.seed)
            divided = [_divide(records, drawn) for records in trains]
            trains = [train for train, _ in divided]
            held_out += [rest for (_, rest), (_, name) in zip(divided, splits, strict=True) if not name]
        return joined_sources(trains), joined_sources(held_out)

    def test(self, rows: RunRows | None = None) -> Records | None:
        """The rows of the sources' own test splits; None where there is none, or where it is what is held out.

        Conversations of it that are in training, too, are counted, unless ``rows``, the record of a run, shows it.

        Raises:
            UserError: as `train_and_held_out`.
        """
        found = [
            (source, splits.names["test"])
            for source, splits in self.splits.items()
            if "test" in splits.names and not (self._is_own() and "validation" not in splits.names)
        ]
        if not found:
            return None
        records = joined_sources(self._load_each(found))
        if rows:
            return records
        train = joined_sources(self._training())
        return _apart(records, {*train.conversations}, train.name, "data.source", "test")

    def test_of(self, source: Any) -> Records:
        """The rows of ``source`` to test on: those of its test split, or else what it has.

        Raises:
            UserError: as `load_records`, or when it is the training data itself.
        """
        learned = {one.place for one in sources_of(self.source)}
        found = [(one, find_splits(one)) for one in sources_of(source, "data.test_source")]
        for one, splits in found:
            if splits.first("test", "validation") is None and one.place in learned:
                remedy = "leave it out, or give others"
                raise UserError(f"{one} is the training data itself", option="data.test_source", remedy=remedy)
        return joined_sources([self._load(one, splits.for_scoring("test", "validation")) for one, splits in found])

    def held_out(self, rows: RunRows | None) -> tuple[Records, int]:
        """Load the rows to score: those that the run of the record ``rows`` held out, as `recall` does.

        Without a record they are found as at the start of a run; of another validation source than the run's, all are,
        and those that the run learned are counted.

        Args:
            rows: the run's record; None without one.

        Returns:
            Those rows, and the number of recorded ones that are missing.

        Raises:
            UserError: as `recall` and `train_and_held_out`.
        """
        is_other = rows is not None and as_text(self.validation_source) not in (None, rows.validation_source)
        if rows is None or (is_other and self._is_own()):
            return self.train_and_held_out()[1], 0
        if not is_other:
            return self.recall(rows)
        records = joined_sources(self._load_each((one, name) for one, name in self._held_out_splits() if name))
        learned = {one for one in records.conversations if turns_digest(one) in rows.train}
        return _apart(records, learned, "as its run recorded", "data.validation_source"), 0

    def recall(self, rows: RunRows) -> tuple[Records, int]:
        """Find the conversations that a run held out, in their order then, and the number missing since.

        They are searched for in the validation source and in every split of the source, wherever they were moved.

        Args:
            rows: the run's record of them.

        Raises:
            UserError: as `load_records`, and when none is there any more.
        """
        wanted = {*rows.held_out}
        found: dict[str, Kept] = {}
        places: list[str] = []
        num_new = 0
        for records, is_whole in self._places(rows):
            digests = [*map(turns_digest, records.conversations)]
            num_new += len({*digests} - wanted - rows.train) if is_whole else 0
            missing = wanted - found.keys()
            first = {one: kept for one, kept in reversed([*zip(digests, records.kept, strict=True)]) if one in missing}
            places += [records.name] if first else []
            found |= first
            if len(found) == len(wanted):
                break
        kept = [found[one] for one in rows.held_out if one in found]
        if not kept:
            none_of = f"none of the {number_of(len(rows.held_out), 'conversations')} that the run held out"
            remedy = "give the rows that the run began with, or others with --data.validation_source"
            raise UserError(f"{none_of} is in {self._names()} any more", option="data.source", remedy=remedy)
        dropped = count_unanswered(kept)
        learned = sum(one in rows.train for one in rows.held_out if one in found)
        if learned:
            dropped[f"held-out conversations, of {len(kept):,}, in training too"] = learned
        if num_new:
            dropped["new conversations there since the run began, not scored"] = num_new
        return Records(" and ".join(places), kept, dropped), len(rows.held_out) - len(kept)

    def _places(self, rows: RunRows) -> Iterator[tuple[Records, bool]]:
        """Rows to look in for those of a run, and whether the run used all of them."""
        given = self.validation_source or rows.validation_source
        sources = [*(sources_of(given, "data.validation_source") if given else ()), *self.splits]
        for source in dict.fromkeys(sources):
            splits = self.splits[source] if source in self.splits else find_splits(source)
            for kind in ("validation", "test", "train"):
                if kind in splits.names:
                    records = self._load(source, splits.names[kind])
                    is_training = source in self.splits and kind == "train"
                    name = f"{records.name}, held out" if is_training else records.name
                    yield replace(records, name=name), not is_training or source.share == 1

    def _is_own(self) -> bool:
        """True if the held-out rows come from the sources themselves."""
        given = self._elsewhere()
        return not given or [one.place for one in given] == [one.place for one in sources_of(self.source)]

    def _held_out_splits(self) -> list[tuple[Source, str | None]]:
        """Each source that rows are held out of, and its split; without one, a share of its training rows is drawn."""
        if self._is_own():
            return [(source, splits.first("validation", "test")) for source, splits in self.splits.items()]
        return [(source, find_splits(source).for_scoring("validation", "test")) for source in self._elsewhere()]

    def _elsewhere(self) -> tuple[Source, ...]:
        given = self.validation_source
        return () if given is None else sources_of(given, "data.validation_source")

    def _check_draw(self, name: str) -> None:
        """Raises UserError where no share of the rows called ``name`` is to be held out."""
        if self.validation_source is not None:
            problem, remedy = f"{self._names()} is the training data itself", "leave it out to hold out a share"
            raise UserError(problem, option="data.validation_source", remedy=remedy)
        if not 0 < self.share < 1:
            problem = f"is {self.share}, expected between 0 and 1, such as 0.05: there is no test split in {name}"
            remedy = "held-out rows choose the adapter; 0.0001 holds out one, or give data.validation_source"
            raise UserError(problem, option="data.validation_share", remedy=remedy)

    def _names(self) -> str:
        return " and ".join(map(str, self.splits))

    def _training(self) -> list[Records]:
        """The rows to train on, of each source."""
        return [self._load(source, splits.training(), self.seed) for source, splits in self.splits.items()]

    def _load_each(self, parts: Iterable[tuple[Source, str]]) -> list[Records]:
        """The rows of splits, of each once, though several sources may have it."""
        distinct: dict[Source, tuple[Source, str]] = {}
        for part in parts:
            distinct.setdefault(_split_of(*part), part)
        return [self._load(*part) for part in distinct.values()]

    def _load(self, source: Source, split: str, seed: int | None = None) -> Records:
        return load_records(source, split, self.reading, seed)


def _split_of(source: Source, name: str) -> Source:
    """The split called ``name`` of a source: equal for two that are one."""
    return replace(source.place, split=name)


def check_early_to_score(given: Any, option: str, reading: Reading) -> None:
    """Look at rows for scoring that are on this machine; see `records.check_early`.

    Args:
        given: the value of ``option``.
        option: data.validation_source, or one that names rows for a test.
        reading: how rows are read.

    Raises:
        UserError: as `Parts.held_out` and `Parts.test_of` for rows that can't be read.
    """
    kinds = ("validation", "test") if option == "data.validation_source" else ("test", "validation")
    for source in sources_of(given, option):
        if not source.is_on_hub:
            check_early(source, find_splits(source).for_scoring(*kinds), reading)


def _apart(
    records: Records,
    learned: Set[Conversation],
    where: str,
    option: str,
    part: Literal["validation", "test"] = "validation",
) -> Records:
    """``records``, with the number of its conversations that are ``learned``, as is known from ``where``.

    Raises UserError when all are, of the ``option`` that they came by.
    """
    count, number = sum(conversation in learned for conversation in records.conversations), len(records.conversations)
    if count == number:
        what, are = ("the one conversation", "is") if number == 1 else (f"all {number:,} conversations", "are")
        problem = f"{what} of {records.name} {are} training data, too ({where}), so a score shows nothing"
        remedy = f"give others with data.{part}_source, or put others there"
        raise UserError(f"{problem} about new ones", option=option, remedy=remedy)
    which = "test" if part == "test" else "held-out"
    doubled = {f"{which} conversations, of {number:,}, in training too": count} if count else {}
    return replace(records, dropped=doubled | records.dropped)


def _draw(records: Records, share: float, seed: int) -> set[Conversation]:
    """The conversations to hold out, a ``share`` of the different ones; at least one, and never all of them."""
    unique = list(dict.fromkeys(records.conversations))
    if len(unique) < 2:
        problem = "has one conversation only, or the same one again and again, so none can be held out"
        raise SourceError(records.name, problem, "add rows, or give data.validation_source")
    count = min(max(1, round(share * len(unique))), len(unique) - 1)
    return set(random.Random(seed).sample(unique, count))


def _divide(records: Records, drawn: set[Conversation]) -> tuple[Records, Records]:
    """``records`` without the conversations ``drawn``, and those alone."""
    held_out, kept = (
        [one for one in records.kept if (one.conversation in drawn) is is_out] for is_out in (True, False)
    )
    dropped = records.dropped | {Lost.UNANSWERED.value: 0} | count_unanswered(kept)
    return (
        replace(records, kept=kept, dropped={what: number for what, number in dropped.items() if number}),
        Records(f"{records.name}, held out", held_out, count_unanswered(held_out)),
    )
