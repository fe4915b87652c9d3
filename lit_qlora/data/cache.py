"""Owns the encoded rows: made once, cached on disk under a key of their inputs, with a checksum.

`datasets` memory-maps them, so host memory does not grow with their number. When an entry is added, the least recently
used are removed down to `KEPT_BYTES`, but not the new one, those used within the hour and those that a process has
open. Knows no source and no batch.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lit_qlora.batch import IGNORE_INDEX
from lit_qlora.console import complain, counted
from lit_qlora.data.encode import SPACE, Encoder
from lit_qlora.errors import UserError
from lit_qlora.storage.files import SaveError
from lit_qlora.storage.folders import DamagedFolderError, clear_leftovers, verify_folder
from lit_qlora.storage.foreign import object_in, shown
from lit_qlora.storage.in_use import Held, prune, write_once
from lit_qlora.text.conversation import Conversation, Turn

ROWS_PER_WRITE = 512
KEPT_BYTES = 2 * 10**9
"""Bytes of all entries together: about half a million conversations of Guanaco's length."""
COUNTS_FILE, COUNTED = "counts.json", ("cut", "left_out", "divided")
"""The file that counts what became of the conversations, and what it counts."""
RECENT_S = 3600
"""Seconds after its last use in which an entry is kept."""

LAYOUT = 1
"""Version of the rows on disk, raised when the same conversations and settings give others."""


@dataclass(frozen=True)
class EncodedRows:
    """Rows of ids and labels, on disk, and counts of what became of their conversations.

    Args:
        examples: one `Example` per row, read from disk as it is used.
        lengths: tokens of each row.
        answer_tokens: learned tokens of each row.
        num_cut: conversations cut at the largest length.
        num_left_out: conversations of which no learned token would be left.
    """

    examples: Any
    lengths: list[int]
    answer_tokens: list[int]
    num_cut: int
    num_left_out: int
    num_divided: int = 0
    """Plain texts that take several rows each."""
    fingerprint: str = ""
    """Hash of the conversations and of everything that decides their ids."""
    held: Held | None = field(default=None, repr=False, compare=False)
    """A hold that keeps other processes from removing the rows."""

    def __len__(self) -> int:
        return len(self.lengths)


def encode_records(conversations: Sequence[Conversation], encoder: Encoder) -> EncodedRows:
    """The rows of ``conversations`` in order, from the cache if encoded before and intact.

    Args:
        conversations: answered ones, or plain texts.
        encoder: makes their ids; with the conversations, its fingerprint is the key of the cache.

    Returns:
        The rows, mapped from the disk; at least as many as are learned from, none for a conversation without an answer
        within the encoder's limit.

    Raises:
        UserError: they can't be written.
    """
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lit_qlora" / _key(conversations, encoder)
    try:
        held = _hold(folder)
        if held is None:
            while held is None:  # again if another process, such as a second GPU's, made room for its own meanwhile
                write_once(folder, lambda staging: _write_rows(staging, conversations, encoder))
                held = _hold(folder)
            clear_leftovers(folder.parent, several_write=True)
            entries = (entry for entry in folder.parent.iterdir() if not entry.name.startswith("."))
            prune(entries, most_bytes=KEPT_BYTES, unused_s=RECENT_S)
    except OSError as error:
        reason = error.reason if isinstance(error, SaveError) else error.strerror
        remedy = "free some room there, or set HF_DATASETS_CACHE to a folder that can be written"
        raise UserError(f"the encoded rows can't be kept in {folder.parent} ({reason})", remedy=remedy) from error
    counts = _read_counts(folder)
    examples = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    return EncodedRows(
        examples.select_columns(["input_ids", "labels"]),
        examples["length"][:],
        examples["answer_tokens"][:],
        counts["cut"],
        counts["left_out"],
        counts["divided"],
        # A run whose texts were cut is another one.
        hashlib.sha256(f"{folder.name} divided".encode()).hexdigest()[:32] if counts["divided"] else folder.name,
        held,
    )


def _read_counts(folder: Path) -> dict[str, int]:
    """What became of the conversations, by `COUNTED`. Raises DamagedFolderError where it is not known."""
    found = object_in(folder / COUNTS_FILE)
    if found.keys() != {*COUNTED} or {*map(type, found.values())} != {int}:
        raise DamagedFolderError(folder, COUNTS_FILE, f"the numbers {', '.join(COUNTED)}", shown(found))
    return found


def _hold(folder: Path) -> Held | None:
    """Hold an entry with the bytes that were written; one with others goes: it would silently change the training."""
    held = Held(folder)
    if held.found:
        try:
            verify_folder(folder)
            _read_counts(folder)
            return held
        except DamagedFolderError as problem:
            complain(f"warning: {problem}; the rows are encoded again")
    held.discard()
    return None


def _key(conversations: Sequence[Conversation], encoder: Encoder) -> str:
    content = hashlib.sha256(f"{LAYOUT} {encoder.fingerprint()}".encode())
    for conversation in conversations:
        turns = [(turn.role, turn.content, *_otherwise(turn)) for turn in conversation.turns]
        content.update(json.dumps([conversation.system, *turns]).encode())
    return content.hexdigest()[:32]


def _otherwise(turn: Turn) -> list[str]:
    """Properties of a turn, for the key, that change its ids or labels since `LAYOUT` 1; empty for most turns."""
    return ["context only"] * (not turn.learned) + ["a space of its own"] * turn.content.lstrip().startswith(SPACE)


def _write_rows(folder: Path, conversations: Sequence[Conversation], encoder: Encoder) -> None:
    """Stream the rows to disk, so that host memory holds a few hundred of them at a time."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    schema = pa.schema([("input_ids", ids), ("labels", ids), ("length", pa.int32()), ("answer_tokens", pa.int32())])
    counts = dict.fromkeys(COUNTED, 0)
    divided = counted("encode", map(encoder.rows, encoder.written(conversations)), len(conversations))
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while some := list(islice(divided, ROWS_PER_WRITE)):
            kept = [example for examples in some for example in examples]
            counts["left_out"] += some.count([])
            counts["divided"] += sum(len(examples) > 1 for examples in some)
            counts["cut"] += sum(example.was_cut for example in kept)
            columns = {
                "input_ids": [example.input_ids for example in kept],
                "labels": [example.labels for example in kept],
                "length": [len(example.input_ids) for example in kept],
                # Nothing predicts the first label.
                "answer_tokens": [len(one.labels) - 1 - one.labels[1:].count(IGNORE_INDEX) for one in kept],
            }
            writer.write_table(pa.Table.from_pydict(columns, schema=schema))
    (folder / COUNTS_FILE).write_text(json.dumps(counts), encoding="utf-8")
