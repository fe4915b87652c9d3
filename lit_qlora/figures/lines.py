"""Owns a file of JSON lines, one per step in order: appended to, and cut back when a run resumes.

A line that can't be written is kept in memory, and in the checkpoint, until it can. Knows no figure.
"""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_qlora.console import complain, note
from lit_qlora.storage.files import SaveError, parse_json, sync_file, write_file
from lit_qlora.wording import number_of


class StepLines:
    """One file of lines; each is a JSON object whose first key is its ``step``.

    Nothing is read or changed before `go_back`, so that a refused start leaves the file unchanged.

    Args:
        path: The file, created with its first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None
        """Why the newest lines are not in the file; None if they are."""
        self._last_step = -1
        """Step of the newest line in the file."""
        self._unwritten: dict[int, str] = {}
        self._sound_bytes: int | None = None
        """Length of the file before a failed write, which may have left a partial line."""
        self._is_synced = True

    def add(self, step: int, content: Mapping[str, Any]) -> None:
        """Append a line; one that can't be written is kept, reported once, and retried.

        Args:
            step: optimizer step, above that of the line before.
            content: the rest of the line.
        """
        self._unwritten[step] = json.dumps({"step": step, **content}) + "\n"
        self.write()

    def write(self) -> None:
        """Append the lines that are not in the file yet."""
        try:
            while self._unwritten:
                step = next(iter(self._unwritten))
                self._append(self._unwritten[step].encode())
                self._last_step = step
                del self._unwritten[step]
            self.problem = None
        except OSError as error:
            self._report(error)

    def sync(self) -> None:
        """Sync the written lines to the disk, before a checkpoint that relies on them."""
        if self._is_synced:
            return
        try:
            sync_file(self.path)
            self._is_synced = True
        except OSError as error:
            self._report(error)

    def read(self) -> Iterator[dict[str, Any]]:
        """The lines by step: those in the file, and those not written yet."""
        yield from read_lines(self.path)
        yield from map(parse_json, self._unwritten.values())

    def state_dict(self) -> dict[str, Any]:
        """The last step that a resume can rely on in the file, and the lines that it has to add."""
        return {"counted_on": self._last_step, "unwritten": dict(self._unwritten)}

    def go_back(self, state: Mapping[str, Any] | None) -> None:
        """Cut the file back to the state that a checkpoint relies on, and restore the lines that it held.

        Reports damaged lines, and those missing from the file.

        Args:
            state: `state_dict` of the checkpoint; None empties the file.

        Raises:
            SaveError: The file could not be changed, and is as before.
        """
        counted_on = state["counted_on"] if state else -1
        content = self.path.read_bytes() if self.path.is_file() else b""
        kept, last, num_behind, damaged, last_line = list[bytes](), -1, 0, list[int](), 0
        for number, text in enumerate(content.splitlines(keepends=True), 1):
            step = (_line(text) or {"step": -1})["step"]
            if step > counted_on:
                num_behind += 1
            elif step > last:
                kept.append(text)
                last, last_line = step, number
            else:
                damaged.append(number)
        damaged = [number for number in damaged if number < last_line]  # those at the end are recognised by their steps
        if damaged:
            complain(f"warning: {damage_words(self.path, damaged)}")
        if last < counted_on:
            lost = f"its lines of the steps {last + 1} to {counted_on}, which the checkpoint relies on, are lost"
            complain(f"warning: {self.path}: {lost}")
        if num_behind:
            print(
                f"   run  {self.path}: {number_of(num_behind, 'lines')} after step {max(counted_on, 0)} replaced",
                flush=True,
            )
        self._put(content, b"".join(kept))
        self._last_step, self._unwritten = last, dict(state["unwritten"]) if state else {}
        self.write()

    def _put(self, old: bytes, new: bytes) -> None:
        if new == old:
            return
        self._is_synced = False
        if not old.startswith(new):
            write_file(self.path, new)
            return
        try:
            os.truncate(self.path, len(new))  # which needs no disk space
        except OSError as error:
            raise SaveError(self.path, error) from error

    def _append(self, content: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._sound_bytes is not None and self.path.is_file():
            os.truncate(self.path, self._sound_bytes)
        self._sound_bytes = self.path.stat().st_size if self.path.is_file() else 0
        self._is_synced = False
        with self.path.open("ab", buffering=0) as file:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._sound_bytes = None

    def _report(self, error: OSError) -> None:
        if self.problem is None:
            self.problem = f"{self.path} can't be written: {error.strerror or error}"
            note(f"error: {self.problem}; training continues, its lines are kept for later")


def json_number(value: float) -> float | str:
    """``value`` as JSON has it: as a text if it is not finite."""
    return value if math.isfinite(value) else str(value)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of the file at ``path`` one by one, without damaged or partly written ones."""
    if path.is_file():
        with path.open("rb") as file:
            yield from filter(None, map(_line, file))


def damage_words(path: Path, numbers: list[int]) -> str:
    """Words for the ``numbers`` of damaged lines in the file at ``path``."""
    return f"{path}: damaged lines ({len(numbers)}, from line {numbers[0]} on) are left out"


def damaged_lines(path: Path) -> list[int]:
    """The numbers of the lines at ``path`` that `read_lines` leaves out, from 1 on."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [number for number, text in enumerate(file, 1) if _line(text) is None]


def _line(text: bytes) -> dict[str, Any] | None:
    if not text.endswith(b"\n"):
        return None
    try:
        line = parse_json(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None
