"""Owns the verdict on one row: what is wrong with the ids and labels that a batch of training holds of it.

Holds what stands in the batch against the pieces that the encoder writes, and those against the text. Knows no batch.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from typing import NamedTuple

from lit_qlora.batch import IGNORE_INDEX
from lit_qlora.columns import printable
from lit_qlora.data.encode import Encoder, Example, Written, joined_rows
from lit_qlora.data.tokenizer import special_tokens
from lit_qlora.text.conversation import first_difference

_SHORTEN = "a larger data.max_length keeps them whole; else shorten or divide them"
FAULT_REMEDIES = {
    "unread": "mend or delete them; fit refuses a source of which more than one row in ten can't be read",
    "nothing": f"where nothing is answered, mend or delete them; where a prompt is long, {_SHORTEN}",
    "end": f"what is cut teaches no end; {_SHORTEN}",
    "bos": "write {{ bos_token }} once into data.template, where a text begins",
    "special": "write these texts otherwise, or take a base whose tokenizer calls that token special",
    "lost": "write these characters otherwise, as others see them",
    "question": "a fault of the encoder: please report it",
    "batch": "clear the cache of encoded rows (lit_qlora in HF_DATASETS_CACHE)",
}
"""Remedies by kind of fault."""

ROWS_PER_CALL = 512
"""Rows whose texts are decoded in one call."""
AROUND = 10
"""Characters that are shown before and behind what is lost."""


class Fault(NamedTuple):
    """A fault of a row: its ``kind``, one of `KINDS`, and ``words``, its place in the row or its reason."""

    kind: str
    words: str


class Batched(NamedTuple):
    """A row as it stands in a batch: ``ids`` without padding; ``learned`` is True where the loss counts one."""

    ids: list[int]
    learned: list[bool]


@dataclass(frozen=True)
class Judge:
    """Finds the faults of rows that ``encoder`` made."""

    encoder: Encoder

    @cached_property
    def special(self) -> frozenset[int]:
        """The ids that no text may make, without that of an unknown character, which is a loss."""
        encoder = self.encoder
        ids = {*special_tokens(encoder.tokenizer), encoder.eos_id}
        unknown = encoder.tokenizer.unk_token_id
        return frozenset(ids if unknown in (encoder.bos_id, encoder.eos_id) else ids - {unknown})

    def read_back(self, rows: Iterable[Sequence[Written]]) -> Iterator[tuple[Sequence[Written], list[str]]]:
        """Yield each of ``rows``, as written, with its texts as decoded from their ids."""
        backend, remaining = self.encoder.tokenizer.backend_tokenizer, iter(rows)
        while some := list(islice(remaining, ROWS_PER_CALL)):
            ids = [ids for written in some for _, ids in _texts(written)]
            texts = iter(backend.decode_batch(ids, skip_special_tokens=False))
            yield from ((written, [*islice(texts, len(_texts(written)))]) for written in some)

    def faults(
        self, written: Sequence[Written], came_back: Sequence[str], examples: Sequence[Example], row: Batched | None
    ) -> Iterator[Fault]:
        """The faults of a row.

        Args:
            written: its pieces, before any cut.
            came_back: its texts as `read_back` has them.
            examples: the encoder's examples of them: several of a long text, none if nothing learned is left.
            row: the row as batches hold it; None if it is in none.
        """
        yield from self._in_text(written, came_back)
        if not examples:
            place = next((start for start, _ in _spans(written, answers=True)), 0)
            yield Fault("nothing", f"its prompt takes {place:,} tokens of {self.encoder.max_length:,}")
        elif row is None or row != _as_batched(examples):
            yield Fault("batch", "its tokens or labels differ from what the encoder gives")
        if row is None:
            return
        if examples and not any(row.learned):
            yield Fault("nothing", "no label is left in its batch")
        yield from self._ends(written, row)
        yield from self._bos(row)
        for start, end in _spans(written, answers=False) if self.encoder.train_on == "answers" else ():
            if any(row.learned[start:end]):
                yield Fault("question", f"token {start + row.learned[start:end].index(True) + 1:,}")

    def _ends(self, written: Sequence[Written], row: Batched) -> Iterator[Fault]:
        """Answers that are learned without their end."""
        length, size = len(row.ids), sum(len(one.ids) for one in written)
        for number, (start, end) in enumerate(_spans(written, answers=True), 1):
            if not any(row.learned[start:end]):
                continue
            if end > length:
                yield Fault("end", f"answer {number} is cut: the row has {size:,} tokens")
            elif row.ids[end - 1] not in self.encoder.stop_ids or not row.learned[end - 1]:
                yield Fault("end", f"answer {number}")

    def _bos(self, row: Batched) -> Iterator[Fault]:
        """More or less than one BOS at the start, and another one elsewhere than after the end of a turn.

        None at all is right for a base whose own texts begin with none.
        """
        bos, ids = self.encoder.bos_id, row.ids
        if bos is None or bos == self.encoder.eos_id:  # which nobody could tell apart
            return
        if ids[:1] != [bos] and (self.encoder.begins_with_bos or bos in ids):
            yield Fault("bos", "it begins with none")
        for place in (place for place, id_ in enumerate(ids) if id_ == bos and place):
            before = place - 1
            while before and self._is_blank(ids[before]):
                before -= 1
            if ids[before] == bos or ids[before] not in self.special:
                yield Fault("bos", f"another one is token {place + 1:,}")
                return

    def _is_blank(self, id_: int) -> bool:
        return id_ not in self.special and not self.encoder.decode([id_])

    def _in_text(self, written: Sequence[Written], came_back: Sequence[str]) -> Iterator[Fault]:
        """Texts that make a special token, or lose something on their way to ids and back."""
        texts = _texts(written)
        for text, ids in texts:
            for id_ in self.special.intersection(ids):
                token = str(self.encoder.tokenizer.convert_ids_to_tokens(id_))
                yield Fault("special", f"{token!r}, id {id_}, in {_around(text, max(0, text.find(token)))}")
        for (text, _), back in zip(texts, came_back, strict=True):
            if text == back:
                continue
            # Of a text's first word, a tokenizer may put a space before, or take one off; and a letter with its accent
            # is the same in one character and in two.
            expected, came = (unicodedata.normalize("NFC", one).lstrip(" ") for one in (text, back))
            if came != expected:
                place = first_difference(expected, came)
                yield Fault("lost", f"{_around(expected, place)} comes back as {_around(came, place)}")


def _texts(written: Sequence[Written]) -> list[tuple[str, list[int]]]:
    """The pieces that are text, and their ids."""
    return [(piece.text, ids) for piece, ids, _ in written if piece.kind != "token"]


def _as_batched(examples: Sequence[Example]) -> Batched:
    """Examples as batches must hold them. Nothing predicts a first token, so it is never learned."""
    learned = [[label != IGNORE_INDEX for label in example.labels] for example in examples]
    return Batched(joined_rows([example.input_ids for example in examples]), [False, *joined_rows(learned)[1:]])


def _spans(written: Sequence[Written], answers: bool) -> Iterator[tuple[int, int]]:
    """Beginning and end of each answer, or of each prompt."""
    start = 0
    for is_answer, run in groupby(written, lambda one: one.piece.is_answer):
        end = start + sum(len(one.ids) for one in run)
        if is_answer == answers:
            yield start, end
        start = end


def _around(text: str, place: int) -> str:
    """The text around a place, in quotes."""
    start = max(0, place - AROUND)
    return f"'{printable(text[start : place + AROUND])}'"
