"""Owns run folders: which one a name means, the paths in it, whether it may be used, and which checkpoint is newest.

The contents of checkpoints and adapters are written by others. Knows no torch.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import datetime
from itertools import chain, count, islice, pairwise, takewhile
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from lit_qlora.console import complain
from lit_qlora.errors import UserError, cut, likely_meant, nearest, require
from lit_qlora.place import COMMAND
from lit_qlora.ranges import check_ranges
from lit_qlora.storage.config_file import as_sections, flat, read_options
from lit_qlora.storage.files import listing, parse_json, write_file
from lit_qlora.storage.folders import (
    DamagedFolderError,
    checkpoint_folder,
    clear_leftovers,
    is_whole,
    recover,
    verify_folder,
)
from lit_qlora.storage.lock import LOCK, RunLock

RUNS = Path("runs")
STEP = "step-"
EVENTS_START = "events.out.tfevents."
EVENTS = f"*/{EVENTS_START}*"
"""TensorBoard's files in a run folder: in a folder for each line of a chart."""
RECORD = "lit_qlora.json"
"""The file in an adapter or a merged model that records its base, its origin and its prompt format."""

FOR_ONE_START = ("config", "run", "max_time")
"""Options of one start only, which are no part of the run's configuration."""

_STARTED = "# started "


def run_path(name: str) -> Path:
    """The folder of the run called ``name``: a bare name lies in `RUNS`, and anything with a slash is a path.

    A run of that name in the current folder is used if `RUNS` has none.
    """
    path = Path(name).expanduser()
    if any(after == ".." != one for one, after in pairwise(path.parts)):  # mkdir would make ``one``, and leave it
        return path.resolve()
    is_bare = path.name == name and name != ".." and not path.drive
    if not is_bare:
        return path
    return path if RunFolder(path).config.is_file() and not (RUNS / name).exists() else RUNS / name


def named_folder(run: str | None) -> Path | None:
    """The run folder that ``run`` names. Raises UserError if it is not one."""
    if run is None:
        return None
    check_ranges({"run": run})
    require(run != "null", "run", "a name or a folder (null is none: leave it out)", "null")
    if "://" in run:
        raise UserError(f"{run} is a URL, and runs are only kept on this machine: give a folder", option="run")
    return run_path(run)


def unnamed_run(config: str | None, base: str) -> Path:
    """The folder of a run that is given no name.

    Args:
        config: the last config file, whose name it has; None for none.
        base: the base, which gives the name where there is no config file.
    """
    return RUNS / (Path(config).stem if config else Path(base).name or "run")


def lies_in_run(file: Path) -> bool:
    """True if ``file`` lies in a run's folder, or anywhere below `RUNS`, by itself or as what a link leads to.

    A folder is a run's by its config.yaml and what was recorded or saved: one's own may hold an ``adapter``.
    """
    parents = {*file.absolute().parents, *file.resolve().parents}
    runs = (run for run in map(RunFolder, parents) if run.config.is_file())
    return RUNS.resolve() in parents or any(run.has_begun() for run in runs)


class RunFolder:
    """The folder of one run.

    Args:
        path: where it is; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.adapter_copy = path / "adapter.copy"
        """A copy of the adapter as of the last checkpoint, which does not hold it."""
        self.adapter_before = path / "adapter.before"
        """An adapter of a later step than the checkpoint that a start resumed from."""
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.others = path / "others.jsonl"
        """Figures that a user's own callbacks log under their own step counts."""
        self.config = path / "config.yaml"
        self.rows = path / "rows.json"
        """The record of which rows are learned and which are held out."""
        self.decisions = path / "decisions.json"
        """The record of the newest start's decisions and package versions."""
        self.report = path / "report.html"
        self.finished_mark = path / "finished.json"
        self.whole = set[int]()
        """Steps whose checkpoint was found intact, or was just written."""

    def open(self, stack: ExitStack) -> None:
        """Lock the folder for this process, to start or resume a run, until ``stack`` closes.

        Raises UserError if it is in use, holds something else, or can't be written.
        """
        self.check_place()
        made = [*takewhile(lambda folder: not folder.exists(), self.path.parents)]
        stack.callback(_remove_empty, made)  # a started run is never empty

        def take() -> None:
            stack.enter_context(RunLock(self.path))
            stack.callback(self.discard_unless_begun)

        try:
            self.prepare(take=take)
        except UserError as error:
            if isinstance(error.__cause__, OSError):  # a full disk, and no other process that has it
                self.discard_unless_begun()
            raise

    def check_place(self) -> None:
        """Raises UserError if it holds something else."""
        if self.path.is_file():
            problem, remedy = f"{self.path} is a file, expected a folder", "give another one with --run"
            raise UserError(problem, option="run", remedy=remedy)
        place = self.path.resolve()
        if not self.has_begun() and any(place in (one, *one.parents) for one in (Path.cwd(), Path.home())):
            problem = f"{place} is the current folder or the home, or has it in it"
            raise UserError(problem, option="run", remedy="give a folder of its own, as --run NAME")
        if not (self.has_begun() or self.is_empty()):
            problem, remedy = f"{self.path} holds other files and no run", "give a folder of its own with --run"
            raise UserError(problem, option="run", remedy=remedy)
        for file in listing(self.path):
            if file.is_symlink():  # what is cut, added to or emptied in place would be a file elsewhere
                problem = f"{file} is a link, and a run's files are its own"
                raise UserError(problem, option="run", remedy="put there what it leads to, or remove it")

    def check_writable(self) -> None:
        """Raises UserError where a folder that is not there yet can't be made: below the first that is."""
        if self.path.exists():
            return
        try:
            with TemporaryDirectory(prefix=".", dir=next(one for one in self.path.absolute().parents if one.exists())):
                pass
        except OSError as error:
            raise self._not_writable(error) from error

    def _not_writable(self, error: OSError, option: str = "run") -> UserError:
        problem, remedy = f"{self.path} can't be written ({error.strerror})", f"give another folder with --{option}"
        return UserError(problem, option=option, remedy=remedy)

    def prepare(self, option: str = "run", take: Callable[[], None] = lambda: None) -> None:
        """Create the folder, lock it, and repair what a kill left behind.

        Args:
            option: option that named the folder, for messages.
            take: locks it, before any repair.

        Raises:
            UserError: it can't be written.
        """
        try:
            take()  # before anything else: it could be what another process is writing, or removing
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.checkpoints)
            recover(self.adapter)
            recover(self.adapter_copy)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise self._not_writable(error, option) from error

    def first_meant(self, is_meant: Callable[["RunFolder"], bool]) -> "RunFolder":
        """The run of a fit that names none: this one, or else the first with -2, -3 and so on behind its name.

        Args:
            is_meant: True for a run that the fit may begin or resume.
        """
        others = (RunFolder(self.path.with_name(f"{self.path.name}-{number}")) for number in count(2))
        return next(run for run in chain([self], others) if is_meant(run))

    def has_begun(self) -> bool:
        """True if anything was recorded or saved; until then there is nothing to resume, or to lose."""
        return self.metrics.is_file() or bool(self.saved_steps()) or self.adapter.is_dir()

    def is_empty(self) -> bool:
        """True if the folder is missing, or holds only what an interrupted start leaves behind."""
        names = [one.name for one in listing(self.path)]  # at one moment: another start may make or remove it
        return LOCK in names or not names

    def discard_unless_begun(self) -> None:
        """Remove what a failed start leaves behind, and the folder if nothing else is in it.

        A folder with the files of a user's own logger keeps the mark by which the next start may use it.
        """
        if self.has_begun():
            return
        with suppress(OSError):  # a folder that can't be written keeps what little is in it
            events = [*self.path.glob(EVENTS)]
            for file in (self.config, self.rows, self.decisions, *events):
                file.unlink(missing_ok=True)
            _remove_empty([self.checkpoints, *{file.parent for file in events}])
            if [one.name for one in self.path.iterdir()] in ([], [LOCK]):
                (self.path / LOCK).unlink(missing_ok=True)
                self.path.rmdir()

    def checkpoint(self, step: int) -> Path:
        """The checkpoint folder of the optimizer ``step``, counted from 1."""
        return self.checkpoints / f"{STEP}{step:08d}"

    def saved_steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first, by their number and never by their date."""
        names = (path.name.removeprefix(STEP) for path in listing(self.checkpoints) if path.name.startswith(STEP))
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def last_checkpoint(
        self, check: Callable[[Path], object] = verify_folder, above: int = -1
    ) -> tuple[Path | None, list[str]]:
        """The newest intact checkpoint, and the problems of newer ones.

        Args:
            check: raises DamagedFolderError for a damaged one; default: by its manifest.
            above: step, up to which none counts.
        """
        problems = list[str]()
        for step in reversed(self.saved_steps()):
            if step > above:
                try:
                    check(self.checkpoint(step))
                    return self.checkpoint(step), problems
                except DamagedFolderError as error:
                    problems.append(str(error))
        return None, problems

    def checkpoint_to_resume(
        self, check: Callable[[Path], object], above: int = -1, *, is_needed: bool = True, option: str = "run"
    ) -> Path | None:
        """The newest intact checkpoint, with a warning of each newer damaged one; None if there are no checkpoints.

        Args:
            check: as in `last_checkpoint`, and ``above`` too.
            above: step, up to which none counts.
            is_needed: False if there is another place to resume from.
            option: option that named the folder, for messages.

        Raises:
            UserError: there are some, none is intact, and one is needed.
        """
        found, problems = self.last_checkpoint(check, above)
        for problem in problems:
            place = "" if option == "run" else f"{option}: "
            complain(f"warning: {place}{problem}; falling back to the previous checkpoint")
        if problems and found is None and is_needed:
            problem = f"no checkpoint in {self.checkpoints} is whole"
            raise UserError(problem, option=option, remedy=f"give another --{option} to start over")
        return found

    def outdated_steps(self, keep: int, newest: int, check: Callable[[Path], object] = verify_folder) -> list[int]:
        """Steps whose checkpoints may be removed now that one is written: all but the newest intact ones.

        Empty while there are fewer intact ones. Damaged ones don't count, and intact ones above the newest stay.

        Args:
            keep: number of intact checkpoints that stay.
            newest: step of the one that was just written.
            check: as in `last_checkpoint`.
        """
        self.whole.add(newest)
        saved = self.saved_steps()
        kept = [*islice((step for step in reversed(saved) if step <= newest and self.is_whole(step, check)), keep)]
        if len(kept) < keep:
            return []
        return [step for step in saved if step not in kept and (step < newest or not self.is_whole(step, check))]

    def is_whole(self, step: int, check: Callable[[Path], object] = verify_folder) -> bool:
        """True if the checkpoint of a step is intact; an intact one is read once.

        Args:
            step: of the checkpoint.
            check: as in `last_checkpoint`.
        """
        if step not in self.whole and is_whole(self.checkpoint(step), check):
            self.whole.add(step)
        return step in self.whole

    def finished(self) -> dict[str, Any] | None:
        """The record of the run's end; None before that, and if it is damaged."""
        if not self.finished_mark.is_file():
            return None
        try:
            mark = dict(parse_json(self.finished_mark.read_bytes()))
            was = mark["lengths"]
            lengths = {name: int(was[name]) for name in ("max_steps", "max_epochs")}
            lengths["early_stopping"] = was["early_stopping"]
            return mark | {name: int(mark[name]) for name in ("step", "steps")} | {"lengths": lengths}
        except (ValueError, TypeError, KeyError, OverflowError):
            complain(f"warning: {self.finished_mark} is damaged: the run is completed once more")
            return None

    def read_options(self) -> dict[str, Any]:
        """The options of the run's first start by their dotted names. Raises UserError if the file is damaged."""
        try:
            options = read_options(self.config)
        except ValueError as error:
            raise UserError(f"{self.config} is damaged ({error})", remedy=self.config_remedy()) from error
        return {name: value for name, value in options.items() if name not in FOR_ONE_START}

    def read_config(self) -> dict[str, Any]:
        """The configuration of the run's first start. Raises UserError if the file is damaged."""
        return as_sections(self.read_options())

    def config_remedy(self) -> str:
        """The remedy for a damaged or missing configuration."""
        first = "remove it and " if self.config.exists() else ""
        again = f"{first}give fit all options (--config FILE --run {quote(str(self.path))})"
        return f"put a copy of it back, or {again}: the run resumes, for its checkpoints hold what identifies it"

    def write_config(self, text: str) -> Path:
        """Keep a start's configuration, the YAML ``text``: first as config.yaml, later ones that differ numbered beside
        it.

        Returns:
            The file that holds it, new or as it was.
        """
        for path in chain([self.config], (self.path / f"config.{number}.yaml" for number in count(2))):
            if not path.exists():
                break
            # By value: a default of 15 that is a float is read back from the file as 15.0.
            with suppress(ValueError):  # a damaged one is another one
                if read_options(path) == flat(yaml.safe_load(text)):
                    return path
        now = datetime.now().astimezone().isoformat(timespec="microseconds")
        write_file(path, f"{_STARTED}{now}\n{text}")
        return path


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # somebody else's files are in it, or it was never made
            folder.rmdir()


def newest_run() -> RunFolder:
    """The most recently started run in `RUNS`. Raises UserError if there is none."""
    started = {}
    for config in RUNS.glob("*/config.yaml"):
        with suppress(FileNotFoundError):  # of another process's start that failed meanwhile
            started[config] = _started(config)
    if not started:
        raise UserError(f"no run in {RUNS}/: train one first with '{COMMAND} fit', or name one with --run")
    return RunFolder(max(started, key=started.__getitem__).parent)


def _started(config: Path) -> datetime:
    """When a run was first started, by the first line of its config: copies and backups change the file's date."""
    line = config.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    try:
        return datetime.fromisoformat(line.removeprefix(_STARTED).strip()).astimezone()
    except ValueError:  # a config that somebody else wrote
        return datetime.fromtimestamp(0).astimezone()


def open_run(name: str | None) -> RunFolder:
    """The run that ``name`` names, by `named_folder`; None: the newest. Raises UserError if there is none."""
    path = named_folder(name)
    if path is None:
        return newest_run()
    run = RunFolder(path)
    if not run.config.is_file():
        others = sorted(one.parent.name for one in path.parent.glob("*/config.yaml"))
        near = nearest(path.name, others, 0.6)
        likely = [RUNS / path.name, *path.parents, *([path.with_name(near)] if near else [])]
        found = next((one for one in likely if RunFolder(one).config.is_file()), None)
        meant = likely_meant(found) or f"the runs there: {cut(', '.join(others))}"
        problem = f"{path} is no run folder: it has no config.yaml"
        remedy = run.config_remedy() if run.saved_steps() else meant if found or others else None
        raise UserError(problem, option="run", remedy=remedy)
    return run


def folder_to_score(what: str, check: Callable[[Path], Any]) -> Path:
    """The checkpoint folder that is to be scored.

    Args:
        what: its path.
        check: raises DamagedFolderError if it is not intact.

    Raises:
        UserError: it is not, or the path is no folder's.
    """
    folder = checkpoint_folder(what)
    try:
        check(folder)
    except DamagedFolderError as error:
        raise error.within("ckpt_path").advise("give best, last, base, or a folder that is whole") from error
    return folder
