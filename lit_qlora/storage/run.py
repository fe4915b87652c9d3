"""Owns the layout of a run folder: the paths of its config, adapter, checkpoints and figures, and which is newest.

The contents of checkpoints and adapters are written by others. Knows no torch.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from datetime import datetime
from hashlib import sha256
from itertools import chain, count, islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lit_qlora.console import complain
from lit_qlora.errors import UserError, cut, nearest, one_line, require
from lit_qlora.place import COMMAND
from lit_qlora.ranges import check_ranges
from lit_qlora.storage.files import NO_VALUE, parse_json, unreadable, write_file
from lit_qlora.storage.folders import (
    DamagedFolderError,
    checkpoint_folder,
    clear_leftovers,
    copy_folder,
    is_whole,
    recover,
    remove_folder,
    verify_folder,
)
from lit_qlora.storage.lock import RunLock

RUNS = Path("runs")
STEP = "step-"
EVENTS = "*/events.out.tfevents.*"
"""TensorBoard's files in a run folder: in a folder for each line of a chart."""
RECORD = "lit_qlora.json"
"""The file in an adapter or a merged model that records its base, its origin and its prompt format."""
CARD = "README.md"
"""The model card in an adapter folder; editing it does not alter the model."""

FOR_ONE_START = ("config", "run", "max_time")
"""Options of one start only, which are no part of the run's configuration."""

LONGEST_SHOWN = 200
"""Longest setting, in characters, that a message shows in full."""
_STARTED = "# started "


def run_path(name: str) -> Path:
    """The folder of the run called ``name``: a bare name lies in `RUNS`, and anything with a slash is a path.

    A run of that name in the current folder is used if `RUNS` has none.
    """
    path = Path(name).expanduser()
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
        base: of which it has the name then.
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
        """Which rows are learned and which are held out."""
        self.decisions = path / "decisions.json"
        """What the newest start decided, and by which versions."""
        self.report = path / "report.html"
        self.finished_mark = path / "finished.json"
        self._seen_whole: dict[int, bool] = {}
        """By step, whether `outdated_steps` found its checkpoint intact."""

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
        if self.path.exists() and not self.path.is_dir():
            problem, remedy = f"{self.path} is a file, expected a folder", "give another one with --run"
            raise UserError(problem, option="run", remedy=remedy)
        if not (self.has_begun() or self.is_empty()):
            problem, remedy = f"{self.path} holds other files and no run", "give a folder of its own with --run"
            raise UserError(problem, option="run", remedy=remedy)
        for file in (self.metrics, self.samples, self.others):
            if file.is_symlink():  # what is cut and added to in place would be a file elsewhere
                problem = f"{file} is a link, and a run's figures are files of its own"
                raise UserError(problem, option="run", remedy="put the file itself there")

    def prepare(self, option: str = "run", take: Callable[[], None] = lambda: None) -> None:
        """Create the folder, lock it, and repair what a kill left behind.

        Args:
            option: that named the folder, for messages.
            take: locks it, before any repair.

        Raises:
            UserError: it can't be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            take()  # before any repair: it could be what another process is writing
            clear_leftovers(self.checkpoints)
            recover(self.adapter)
            recover(self.adapter_copy)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            problem, remedy = f"{self.path} can't be written ({error.strerror})", f"give another folder with --{option}"
            raise UserError(problem, option=option, remedy=remedy) from error

    def numbered(self) -> Iterator["RunFolder"]:
        """The runs of the same name with -2, -3 and so on behind it."""
        return (RunFolder(self.path.with_name(f"{self.path.name}-{number}")) for number in count(2))

    def has_begun(self) -> bool:
        """True if anything was recorded or saved; until then there is nothing to resume, or to lose."""
        return self.metrics.is_file() or bool(self.saved_steps()) or self.adapter.is_dir()

    def is_empty(self) -> bool:
        """True if the folder is missing, or holds only what an interrupted start leaves behind."""
        if not self.path.is_dir():
            return True
        return (self.path / ".lock").is_file() or not any(self.path.iterdir())

    def discard_unless_begun(self) -> None:
        """Remove what a failed start leaves behind, and the folder if nothing else is in it."""
        if self.has_begun():
            return
        with suppress(OSError):  # a folder that can't be written keeps what little is in it
            events = [*self.path.glob(EVENTS)]
            for file in (self.config, self.rows, self.decisions, self.path / ".lock", *events):
                file.unlink(missing_ok=True)
            _remove_empty([self.checkpoints, *{file.parent for file in events}, self.path])

    def checkpoint(self, step: int) -> Path:
        """The checkpoint folder of an optimizer step."""
        return self.checkpoints / f"{STEP}{step:08d}"

    def saved_steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first, by their number and never by their date."""
        if not self.checkpoints.is_dir():
            return []
        names = (path.name.removeprefix(STEP) for path in self.checkpoints.iterdir() if path.name.startswith(STEP))
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

    def outdated_steps(self, keep: int, newest: int, check: Callable[[Path], object] = verify_folder) -> list[int]:
        """Steps whose checkpoints may be removed now that one is written: all but the newest intact ones.

        Empty while there are fewer intact ones. Damaged ones don't count, and intact ones above the newest stay. Each
        is checked once.

        Args:
            keep: number of intact checkpoints that stay.
            newest: step of the one that was just written.
            check: as in `last_checkpoint`.
        """
        self._seen_whole[newest] = True

        def seen_whole(step: int) -> bool:
            if step not in self._seen_whole:
                self._seen_whole[step] = is_whole(self.checkpoint(step), check)
            return self._seen_whole[step]

        saved = self.saved_steps()
        kept = [*islice((step for step in reversed(saved) if step <= newest and seen_whole(step)), keep)]
        if len(kept) < keep:
            return []
        return [step for step in saved if step not in kept and (step < newest or not seen_whole(step))]

    def finished(self) -> dict[str, Any] | None:
        """The record of the run's end; None before that, and if it is damaged."""
        if not self.finished_mark.is_file():
            return None
        try:
            mark = dict(parse_json(self.finished_mark.read_bytes()))
            return mark | {name: int(mark[name]) for name in ("step", "steps")}
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
        """The remedy for a damaged configuration."""
        again = f"remove it and give fit all options (--config FILE --run {self.path})"
        return f"put a copy of it back, or {again}: the run resumes, for its checkpoints hold what identifies it"

    def write_config(self, text: str) -> Path:
        """Keep a start's configuration: the first as config.yaml, later ones that differ beside it, numbered."""
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


def mend_adapter(run: RunFolder, mirrored: Path | None = None, *, is_needed: bool = False) -> None:
    """Move a damaged or foreign adapter aside and restore an intact copy in its place, with a warning.

    It must be neither the best so far nor the one in use. A run without one may have saved none yet. For a finished
    run, only a copy of its best is accepted.

    Args:
        run: whose.
        mirrored: another place that may hold a copy.
        is_needed: True to raise UserError, and move nothing, if no intact copy is left.
    """
    try:
        _verify_adapter(run.adapter)
        return
    except DamagedFolderError as error:
        problem = str(error)
    best_step = (run.finished() or {}).get("best_step") if is_needed else None
    whole = _copy(run, mirrored, lambda step: best_step in (None, step))
    if whole is None and is_needed:
        remedy = "the run is finished, and no intact copy of its adapter is left; train it with another --run"
        raise UserError(problem, remedy=remedy)
    if run.adapter.is_dir():
        problem += f"; put aside as {_put_aside(run.adapter, 'adapter.damaged')}"
    elif whole is None:
        return
    if whole:
        copy_folder(whole, run.adapter, may_differ=[CARD])
    complain(f"warning: {problem}, and {f'restored from {whole}' if whole else 'the search for the best starts over'}")


def put_adapter_back(run: RunFolder, step: int, mirrored: Path | None = None, *, must_stay: bool = False) -> None:
    """Move a best adapter aside that is of a later step than ``step``, where a start resumes: that step comes again.

    The best as of ``step`` takes its place.

    Args:
        run: The run folder, whose adapter is intact.
        step: Optimizer steps done at the checkpoint; 0 without one.
        mirrored: Another place that may hold a copy.
        must_stay: True if the checkpoint had a best: without a copy of that, the later one stays, which was better.
    """
    if not run.adapter.is_dir():
        return
    found = _verify_adapter(run.adapter)
    whole = _copy(run, mirrored, lambda other: other <= step) if found > step else None
    if found <= step or (must_stay and whole is None):
        return
    aside = _put_aside(run.adapter, run.adapter_before.name)
    if whole:
        copy_folder(whole, run.adapter, may_differ=[CARD])
    then = f", {whole} takes its place" if whole else ""
    print(f"   run  {run.adapter} is of step {found}, after step {step}: put aside as {aside}{then}", flush=True)


def _copy(run: RunFolder, mirrored: Path | None, fits: Callable[[int], bool]) -> Path | None:
    """An intact copy of the adapter, of a step that ``fits``."""
    for copy in filter(None, (run.adapter_copy, mirrored)):
        with suppress(DamagedFolderError):
            if fits(_verify_adapter(copy)):
                return copy
    return None


def _put_aside(adapter: Path, name: str) -> Path:
    aside = adapter.with_name(name)
    if aside.exists():
        remove_folder(aside)
    adapter.rename(aside)
    return aside


def _verify_adapter(folder: Path) -> int:
    """Verify an adapter's files and figures; return its step. Raises DamagedFolderError."""
    verify_folder(folder, may_differ=[CARD])
    file = folder / "result.json"
    try:
        step = parse_json(file.read_bytes())["step"] if file.is_file() else 0
        found = "no step"
    except (ValueError, TypeError, KeyError) as error:
        step, found = None, unreadable(error)
    if type(step) is not int:
        raise DamagedFolderError(folder, file.name, "a step and its figures", found)
    return step


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # somebody else's files are in it, or it was never made
            folder.rmdir()


def newest_run(root: Path = RUNS) -> RunFolder:
    """The most recently started run below ``root``.

    Raises UserError if there is none.
    """
    configs = list(root.glob("*/config.yaml"))
    if not configs:
        raise UserError(f"no run in {root}/: train one first with '{COMMAND} fit', or name one with --run")
    return RunFolder(max(configs, key=_started).parent)


def _started(config: Path) -> datetime:
    """When a run was first started, by the first line of its config: copies and backups change the file's date."""
    line = config.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    try:
        return datetime.fromisoformat(line.removeprefix(_STARTED).strip()).astimezone()
    except ValueError:  # a config that somebody else wrote
        return datetime.fromtimestamp(0).astimezone()


def open_run(path: Path) -> RunFolder:
    """The run in ``path``. Raises UserError if there is none."""
    run = RunFolder(path)
    if not run.config.is_file():
        others = sorted(one.parent.name for one in path.parent.glob("*/config.yaml"))
        near = nearest(path.name, others, 0.6)
        meant = f"did you mean {path.with_name(near)}?" if near else f"the runs there: {cut(', '.join(others))}"
        problem = f"{path} is no run folder: it has no config.yaml"
        raise UserError(problem, option="run", remedy=meant if others else None)
    return run


class _Readable(yaml.SafeDumper):
    """A dumper that writes multi-line texts, such as templates, line by line, and nothing by reference."""

    def ignore_aliases(self, _: Any) -> bool:
        return True


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_number = re.fullmatch(r"[-+]?\d[\d_]*\.?[\d_]*[eE][-+]?\d+", text)  # to jsonargparse, and not to PyYAML
    style = "|" if "\n" in text else "'" if is_number else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Readable.add_representer(str, _write_text)


class NoReferences(yaml.SafeLoader):
    """A loader without references, by which a few lines of a folder from elsewhere could stand for billions."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As the base class's; raises ComposerError at a reference."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "a value given by reference (& and *); write it out", mark)
        return super().compose_node(parent, index)


def read_options(config: Path) -> dict[str, Any]:
    """The options of a run's configuration file by their dotted names, nested in the file or not.

    Raises ValueError for a damaged file.
    """
    try:
        found = yaml.load(config.read_text(encoding="utf-8-sig"), Loader=NoReferences)
    except yaml.YAMLError as error:
        raise ValueError(one_line(getattr(error, "problem", None) or str(error).partition(": special")[0])) from error
    except (RecursionError, UnicodeDecodeError, OSError) as error:
        raise ValueError(unreadable(error)) from error
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        raise ValueError(NO_VALUE) from error
    if not isinstance(found, Mapping):
        raise ValueError("no 'option: value' lines")
    options = flat(found)
    as_sections(options)
    return options


def as_yaml(config: Mapping[str, Any]) -> str:
    """A configuration as YAML text, in its own order."""
    return yaml.dump(config, Dumper=_Readable, sort_keys=False, allow_unicode=True)


class Change(NamedTuple):
    """A changed setting, by its dotted name; ``name: old -> new`` as text."""

    name: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.name}: {self.old} -> {self.new}"


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The changed settings, by name.

    Args:
        was: a configuration, in sections or by dotted names.
        now: the one that it is compared with.
    """
    before, after = flat(was), flat(now)
    return [
        Change(name, _in_one_line(before.get(name)), _in_one_line(after.get(name)))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def _in_one_line(value: Any) -> str:
    """A setting in one line; a long text, such as a template, as its beginning, length and hash."""
    text = str(value)
    if len(text) <= LONGEST_SHOWN and "\n" not in text:
        return text
    return f"{' '.join(text.split())[:40]}… ({len(text)} characters, sha256 {sha256(text.encode()).hexdigest()[:12]})"


def flat(config: Mapping[Any, Any], section: str = "") -> dict[str, Any]:
    """Options by their dotted names.

    Args:
        config: in sections, or not.
        section: stands before their names, with a dot behind it.

    Raises:
        ValueError: one is given both nested and dotted.
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{section}{key}"
        for leaf, held in (flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}).items():
            if leaf in found:
                raise ValueError(f"{leaf} is given twice")
            found[leaf] = held
    return found


def as_sections(options: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`. Raises ValueError for a name that is both a section and an option."""
    config: dict[str, Any] = {}
    for name, value in options.items():
        *sections, last = name.split(".")
        within = config
        for section in sections:
            within = within.setdefault(section, {})
            if not isinstance(within, dict):
                raise ValueError(f"{section} is both a section and an option")
        if last in within:
            raise ValueError(f"{name} is both a section and an option")
        within[last] = value
    return config


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
