"""Owns which conversations are held out: those of a source of their own, of the source's split, or a seeded share.

Knows no form of row and no tokens.
"""

import random
from dataclasses import replace

from lit_qlora.data.records import UNANSWERED, Fits, Form, Records, count_unanswered, load_records
from lit_qlora.data.sources import has_split
from lit_qlora.errors import UserError
from lit_qlora.text import llama2


def load_train_and_held_out(
    source: str,
    validation_source: str | None,
    validation_share: float,
    seed: int,
    form: Form = "auto",
    fits: Fits = llama2.segments,
) -> tuple[Records, Records]:
    """Loads the rows to train on and the rows to validate on; no source mixes with the other's.

    Held out are the rows of ``validation_source`` (its test split, if it has one), or else the test
    split of ``source``, or else ``validation_share`` of its different conversations, drawn by
    ``seed`` alone, so that no conversation stands on both sides. Of the others, those that are in training, too,
    are counted.

    Raises:
        UserError: as `load_records`, when there is nothing to hold out, and when all of it is in training, too.
    """
    train = load_records(source, "train", form, fits)
    held_out_source = source if validation_source is None else validation_source
    if has_split(held_out_source, "test"):
        return train, _apart(load_records(held_out_source, "test", form, fits), train)
    if validation_source == source:
        raise UserError(
            f"data.validation_source: {source} is the training data itself; leave it out to hold out a share"
        )
    if validation_source is not None:
        return train, _apart(load_records(validation_source, "train", form, fits), train)
    return _split(train, validation_share, seed)


def _apart(held_out: Records, train: Records) -> Records:
    """``held_out``, with the number of its conversations that are in ``train``. Raises UserError when all are."""
    learned = set(train.conversations)
    count, number = sum(conversation in learned for conversation in held_out.conversations), len(held_out.conversations)
    if count == number:
        raise UserError(
            f"data.validation_source: all {number:,} conversations of {held_out.name} are training data, too "
            f"({train.name}), and say nothing of new ones; give others, or hold out a share of the source"
        )
    told = {f"of {number:,} held-out conversations are in training too": count} if count else {}
    return replace(held_out, dropped=told | held_out.dropped)


def _split(records: Records, share: float, seed: int) -> tuple[Records, Records]:
    if not 0 < share < 1:
        raise UserError(
            f"data.validation_share: is {share}, expected between 0 and 1, such as 0.05, because"
            f" {records.name} has no test split; or give data.validation_source"
        )
    unique = list(dict.fromkeys(records.conversations))
    if len(unique) < 2:
        raise UserError(
            f"{records.name}: has one conversation only, so none can be held out; add rows, or give"
            " data.validation_source"
        )
    count = min(max(1, round(share * len(unique))), len(unique) - 1)
    chosen = set(random.Random(seed).sample(unique, count))
    held_out = [number for number, conversation in enumerate(records.conversations) if conversation in chosen]
    kept = sorted({*range(len(records.conversations))} - {*held_out})
    return (
        _part(records, records.name, kept, records.dropped),
        _part(records, f"{records.name}, held out", held_out, {}),
    )


def _part(records: Records, name: str, places: list[int], dropped: dict[str, int]) -> Records:
    unanswered = frozenset(new for new, place in enumerate(places) if place in records.unanswered)
    conversations = [records.conversations[place] for place in places]
    counted = {what: number for what, number in dropped.items() if what != UNANSWERED}
    return Records(name, conversations, count_unanswered(unanswered) | counted, unanswered)
