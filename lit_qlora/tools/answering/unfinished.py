"""Owns the answers of an unfinished output, in a file beside it that survives a kill.

The first line of ``.NAME.part`` records what the answers belong to; a line per batch follows. A process may be killed
at any moment: a partial line is ignored. Once the output is complete, ``.NAME.made`` beside it holds the same record.
Knows the lines as JSON only.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lit_qlora.errors import UserError
from lit_qlora.storage.files import parse_json, require_new, write_file
from lit_qlora.storage.foreign import object_in
from lit_qlora.storage.lock import flock


class Unfinished:
    """The finished batches of an output, locked for this process until closed.

    Args:
        target: the output, which is written once it is complete.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f".{target.name}.part")
        self.made = target.with_name(f".{target.name}.made")
        self._file: IO[bytes]

    def check_free(self) -> None:
        """Check that no other program wrote the output.

        Raises:
            UserError: if it exists without a record of its origin.
        """
        if not self.made.is_file():
            require_new(self.target)

    def is_whole(self, belongs_to: Mapping[str, Any]) -> bool:
        """True if the output exists and was made of just this.

        Args:
            belongs_to: everything that decides the output, by the names of the options.

        Raises:
            UserError: if it exists and was made of anything else.
        """
        if not self.target.exists():
            return False
        self.check_free()
        was, digest = object_in(self.made), ""
        with contextlib.suppress(OSError):
            digest = _digest(self.target.read_bytes())
        if was != {**belongs_to, "sha256": digest}:
            other = "was changed since" if was.get("sha256") != digest else _differences(was, {**was, **belongs_to})
            require_new(self.target, f" ({other})")
        self.path.unlink(missing_ok=True)  # killed right before `finish` could
        return True

    @contextlib.contextmanager
    def open(self, belongs_to: Mapping[str, Any]) -> Iterator[dict[int, Any]]:
        """Open an unfinished output, or begin one.

        Args:
            belongs_to: everything that decides the output, by the names of the options.

        Yields:
            The finished batches by number.

        Raises:
            UserError: if another process is writing it, it belongs to other things, or it can't be opened.
        """
        try:
            self._file = self.path.open("a+b")
        except OSError as error:
            raise UserError(f"{self.path} can't be written ({error.strerror})", option="output") from error
        try:
            with contextlib.suppress(OSError):  # Windows, or a file system without locks
                if not flock(self._file.fileno()):
                    what = f"another process is writing {self.target}"
                    raise UserError(what, option="output", remedy="wait for it, or give another name")
            yield self._read(belongs_to)
        finally:
            with contextlib.suppress(OSError):  # what a full disk did not take is tried again, and is reported already
                self._file.close()

    def add(self, number: int, batch: Any) -> None:
        """Save a batch.

        Args:
            number: its number.
            batch: its answers, as JSON.

        Raises:
            UserError: if it can't be written; earlier ones are kept.
        """
        self._write([number, batch])

    def finish(self, belongs_to: Mapping[str, Any], output: bytes) -> None:
        """Write the whole output, and first the record of its origin.

        Args:
            belongs_to: as for `open`.
            output: its content.

        Raises:
            SaveError: if it can't be written; the saved batches are kept.
        """
        write_file(self.made, json.dumps({**belongs_to, "sha256": _digest(output)}))
        write_file(self.target, output)
        self.path.unlink(missing_ok=True)

    def _read(self, belongs_to: Mapping[str, Any]) -> dict[int, Any]:
        self._file.seek(0)
        header, *lines = [*self._file] or [b""]
        was = _parsed_line(header)
        # Nothing was begun, or ended within its first line or before the first answers: for want of memory, say.
        if not header.endswith(b"\n") or (isinstance(was, dict) and not any(line.endswith(b"\n") for line in lines)):
            self._file.truncate(0)
            self._write(belongs_to)
            return {}
        if was != belongs_to:
            raise UserError(
                f"{self.target} was begun with other settings ({_differences(was, belongs_to)})",
                option="output",
                remedy=f"give those again, or another name, or delete {self.path}",
            )
        batches, whole_bytes = {}, len(header)
        for line in lines:
            row = _parsed_line(line)
            if row is None or not line.endswith(b"\n"):
                break
            batches[row[0]] = row[1]
            whole_bytes += len(line)
        self._file.truncate(whole_bytes)
        return batches

    def _write(self, row: Any) -> None:
        try:
            self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path} can't be written ({error.strerror})",
                option="output",
                remedy="the same command resumes from there",
            ) from error


def _digest(output: bytes) -> str:
    return hashlib.sha256(output).hexdigest()[:12]


def _parsed_line(line: bytes) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        return None


def _differences(was: Any, now: Mapping[str, Any]) -> str:
    if not isinstance(was, dict):
        return "its first line does not name them"
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return "; ".join(f"{name}: {was.get(name)} -> {now.get(name)}" for name in names)
