"""Owns a run's copy elsewhere, such as on Google Drive: made in the background, restored on a fresh machine.

The copy is laid out as the run folder itself. Each folder is copied under a temporary name, verified by its
manifest and renamed, its figures and adapter before the checkpoint that goes with them, so that an interrupted copy can
always be resumed from. Needs neither links nor locks nor modes. Knows no Trainer.
"""

import errno
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_qlora.console import complain
from lit_qlora.errors import UserError
from lit_qlora.storage.files import SaveError, write_file
from lit_qlora.storage.folders import (
    DamagedFolderError,
    clear_leftovers,
    copy_folder,
    read_seal,
    recover,
    remove_folder,
    verify_folder,
)
from lit_qlora.storage.run import EVENTS, RunFolder
from lit_qlora.storage.settings import refused

MIRRORED_CHECKPOINTS = 2
"""Checkpoints in a copy."""
MIRROR_MARK = ".mirror"
"""A file by which the opened folder differs from one of its name on the disk below an unmounted drive."""
COLAB_DRIVE, FSTAB = Path("/content/drive"), Path("/etc/fstab")
"""Colab's mount point of Google Drive, and Linux's list of mount points."""
COPY_TRIES = 3
"""Attempts at one copy while the run keeps saving."""


class Mirror:
    """The copy of ``run`` in ``parent``, under the run's own name.

    Args:
        run: the run folder on this machine.
        parent: holds the copies of several runs; the folder that it stands in must be there.
        note: prints a line during training.
        check: raises DamagedFolderError for a damaged checkpoint, there as here; default: by its manifest.
    """

    def __init__(
        self, run: RunFolder, parent: Path, note: Callable[[str], None], check: Callable[[Path], object] = verify_folder
    ) -> None:
        self.run, self.parent, self.note, self.check = run, parent, note, check
        self.copy = RunFolder(parent / run.path.resolve().name)
        self._mark, self._token = self.copy.path / MIRROR_MARK, secrets.token_hex(8)
        self._copied: dict[Path, tuple[int, int]] = {}
        self._num_changes = 0
        self._wanted, self._is_closing = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._failed = False

    def open(self, config: Mapping[str, Any], are_same_rows: Callable[[Path], bool] = lambda file: False) -> None:
        """Create the folder, repair what a kill left in it, and restore the run from it if the copy is ahead.

        A new copy that can't be started is an error: nothing is trained yet, and the user can make room. Later
        failures, and those of an existing copy, are reported and retried.

        Args:
            config: options of this start by dotted name, compared with the copy's.
            are_same_rows: True for a record of rows, the copy's, that names the conversations of this start.

        Raises:
            UserError: it can't be written, belongs to another run, or holds only damaged checkpoints while this machine
                has none either.
        """
        check_no_file(self.parent)
        _check_mounted(self.parent)
        if self.run.path.resolve() in (self.copy.path.resolve(), *self.copy.path.resolve().parents):
            raise _mirror_error(f"{self.copy.path} is in the run's own folder", "give a folder elsewhere")
        self._begin()
        if self.copy.has_begun() and self.copy.config.is_file():
            others = refused(self.copy.read_config(), config, lambda: are_same_rows(self.copy.rows))
            if others:
                problem = f"{self.copy.path} belongs to another run: {'; '.join(map(str, others))}"
                raise _mirror_error(problem, "give another --mirror, or another --run NAME")
        checkpoint = self._ahead()
        if checkpoint:
            try:
                self._restore(checkpoint)
            except OSError as error:
                raise _mirror_error(f"{self.copy.path} can't be restored: {error}") from error

    def _begin(self) -> None:
        """Create the folder and its mark. Raises UserError where that fails, unless the copy was started before."""
        known = ""
        try:
            known = self._mark.read_text(encoding="utf-8") if self._mark.is_file() else ""
            self._token = known or self._token
            self.copy.prepare("mirror")
            if not known:
                write_file(self._mark, self._token)
        except (OSError, UserError) as error:
            if known:
                self.note(f"warning: {error}; tried again with each save")
                return
            with suppress(OSError):
                self.copy.discard_unless_begun()
            if isinstance(error, UserError):
                raise
            problem = f"{self.copy.path} can't be written: {error}"
            raise _mirror_error(problem, "give another folder with --mirror, or none") from error

    def start(self) -> None:
        """Start the background thread that waits for `push`."""
        self._thread.start()

    def push(self) -> None:
        """Request a copy of the newest state; returns at once."""
        self._wanted.set()

    def close(self, limit_s: float = 300) -> None:
        """Copy the last state, and wait for it at most ``limit_s`` seconds."""
        if not self.run.has_begun():  # a start that failed leaves nothing here either
            self._mark.unlink(missing_ok=True)
            self.copy.discard_unless_begun()
            return
        self._is_closing = True
        self.push()
        self._thread.join(1)
        if self._thread.is_alive():
            self.note(f"copying to {self.copy.path}; Ctrl-C leaves without it")
            self._thread.join(limit_s)
        if self._thread.is_alive():
            late = f"was not done after {limit_s:.0f} s; the last state is not there"
            self.note(f"warning: mirror: {self.copy.path} {late}")
        elif self._failed:
            self.note(f"warning: mirror: {self.copy.path} lacks the last state; it is in {self.run.path}")

    def complete(self) -> None:
        """Copy and report what the copy of a finished run lacks; called in place of `start`.

        Raises SaveError where it can't.
        """
        try:
            self._copy_newest()
        except SaveError:
            raise
        except OSError as error:
            raise SaveError(self.copy.path, error) from error
        if self._num_changes:
            print(f"   run  copied to {self.copy.path}: the mirror was incomplete", flush=True)

    # Restoring

    def _ahead(self) -> Path | None:
        """The newest intact checkpoint of the copy, if newer than this machine's."""
        own, _ = self.run.last_checkpoint(self.check)
        above = int(own.name.rpartition("-")[2]) if own else -1
        return self.copy.checkpoint_to_resume(self.check, above, is_needed=own is None, option="mirror")

    def _restore(self, checkpoint: Path) -> None:
        # The checkpoint comes last: an interrupted restore starts over.
        for file in _files(self.copy):
            own = self.run.path / file.relative_to(self.copy.path)
            if not own.is_file() or own.stat().st_size < file.stat().st_size or file == self.copy.finished_mark:
                own.parent.mkdir(exist_ok=True)
                write_file(own, file.read_bytes())
        if self.copy.adapter.is_dir():
            try:
                copy_folder(self.copy.adapter, self.run.adapter, replace=True)
            except DamagedFolderError as error:
                complain(f"warning: mirror: {error}; continuing without the best adapter so far")
        copy_folder(checkpoint, self.run.checkpoints / checkpoint.name, replace=True)
        print(f"   run  restored from {checkpoint}", flush=True)

    # Copying

    def _work(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            is_last = self._is_closing
            try:
                self._copy_newest()
                self._failed = False
            except Exception as error:  # whatever a mounted drive may raise: it must not harm the training
                self._failed = True
                problem = error if isinstance(error, SaveError | DamagedFolderError) else f"{self.copy.path}: {error}"
                self.note(f"warning: mirror: {problem}; tried again with the next save")
            if is_last:
                return

    def _copy_newest(self) -> None:
        """Copy the newest state; starts over if the run meanwhile replaced it."""
        for number in range(1, COPY_TRIES + 1):
            before = self._newest()
            try:
                self._copy_once(before[0])
            except (OSError, DamagedFolderError):
                if number == COPY_TRIES or self._newest() == before:
                    raise
            else:
                return

    def _newest(self) -> tuple[int | None, bytes | None]:
        steps = self.run.saved_steps()
        return (steps[-1] if steps else None), read_seal(self.run.adapter)

    def _copy_once(self, step: int | None) -> None:
        """Copy figures and adapter first: they must not be older than their checkpoint."""
        if self._failed:  # the last copy may have left a part there, with a drive that went away
            self._before_change()
            clear_leftovers(self.copy.checkpoints)
            recover(self.copy.adapter)
        files = list(_files(self.run))
        if self.run.finished_mark not in files and self.copy.finished_mark.exists():  # the run was made longer
            self._before_change()
            self.copy.finished_mark.unlink()
        for file in files:
            if file != self.run.finished_mark:
                self._copy_file(file)
        for old in {*self.copy.path.glob(EVENTS)} - {*map(self._there, files)}:
            self._before_change()
            old.unlink()  # each start writes its own
        if read_seal(self.run.adapter) not in (None, read_seal(self.copy.adapter)):
            self._before_change()
            copy_folder(self.run.adapter, self.copy.adapter, replace=True)
        if step is not None and not self._holds(step):
            self._before_change()
            copy_folder(self.run.checkpoint(step), self.copy.checkpoint(step), replace=True)
            self.copy.whole.add(step)
        if self.run.finished_mark in files:
            self._copy_file(self.run.finished_mark)
        if step is not None:
            for older in self.copy.outdated_steps(MIRRORED_CHECKPOINTS, step, self.check):
                if older < step:  # what is above may be the beginning of a copy by another tool
                    self._before_change()
                    remove_folder(self.copy.checkpoint(older))

    def _before_change(self) -> None:
        """Count a change about to be made. Raises SaveError if the drive was unmounted: it would be made elsewhere."""
        if not self._mark.is_file() or self._mark.read_text(encoding="utf-8") != self._token:
            gone = FileNotFoundError(errno.ENOENT, "the folder that was opened is gone; is the drive still mounted?")
            raise SaveError(self.copy.path, gone)
        self._num_changes += 1

    def _holds(self, step: int) -> bool:
        """True if the copy of ``step`` is intact and equals the one here."""
        here, there = (read_seal(run.checkpoint(step)) for run in (self.run, self.copy))
        return here == there and self.copy.is_whole(step, self.check)

    def _copy_file(self, file: Path) -> None:
        state = file.stat()
        now = (state.st_size, state.st_mtime_ns)
        if self._copied.get(file) != now:
            there, content = self._there(file), file.read_bytes()
            if file in self._copied or not there.is_file() or there.read_bytes() != content:
                self._before_change()
                there.parent.mkdir(exist_ok=True)
                write_file(there, content)
            self._copied[file] = now

    def _there(self, file: Path) -> Path:
        """The path in the copy of a ``path`` in the run."""
        return self.copy.path / file.relative_to(self.run.path)


def _mirror_error(problem: str, remedy: str | None = None) -> UserError:
    return UserError(problem, option="mirror", remedy=remedy)


def check_no_file(folder: Path) -> None:
    """Raises UserError if the ``folder`` of copies, which need not exist yet, is a file."""
    if folder.exists() and not folder.is_dir():
        raise _mirror_error(f"{folder} is a file", "give a folder, which need not exist yet")


def _check_mounted(folder: Path) -> None:
    """Raises UserError if ``folder`` seems to be on an unmounted drive: it must not be created on this disk.

    That is assumed below a known mount point with nothing mounted, if more than the last folder is missing, and if the
    parent is empty, as an unmounted mount point is.
    """
    place = folder.resolve()
    for point in _mount_points():
        if point in (place, *place.parents) and not os.path.ismount(point):
            raise _mirror_error(f"nothing is mounted at {point}", "mount the drive, or give another folder")
    above = place.parent
    if not above.is_dir():
        raise _mirror_error(f"there is no folder {folder.parent}", "mount the drive, or give another one")
    # Colab's is mounted by now, and a new account's MyDrive is empty.
    is_drive = COLAB_DRIVE in place.parents or os.path.ismount(above)
    if not place.exists() and not any(above.iterdir()) and not is_drive:
        remedy = f"mount the drive that belongs there, or, if there is none, create {folder}"
        raise _mirror_error(f"{folder.parent} is empty", remedy)


def _mount_points() -> Iterator[Path]:
    """Mount points: Colab's, and those listed by this system."""
    yield COLAB_DRIVE
    lines = FSTAB.read_text(encoding="utf-8", errors="replace").splitlines() if FSTAB.is_file() else []
    for fields in (line.split() for line in lines if not line.lstrip().startswith("#")):
        point = fields[1].replace("\\040", " ") if len(fields) > 1 else ""
        if point.startswith("/") and point != "/":
            yield Path(point)


def _files(run: RunFolder) -> Iterator[Path]:
    """The files of a run folder beside adapter and checkpoints."""
    figures = [file.name for file in (run.metrics, run.samples, run.others)]
    shown = (run.decisions.name, run.report.name, EVENTS)
    for pattern in ("config*.yaml", run.rows.name, *figures, *shown, run.finished_mark.name):
        yield from sorted(run.path.glob(pattern))
