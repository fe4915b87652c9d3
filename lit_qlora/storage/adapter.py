"""Owns the best adapter of a run on disk: a damaged one is restored, one of a later step put aside.

What is in it is written by others.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from shlex import quote

from lit_qlora.console import complain
from lit_qlora.errors import UserError
from lit_qlora.place import COMMAND
from lit_qlora.storage.folders import (
    ADAPTER_CONFIG,
    RESULT,
    DamagedFolderError,
    copy_folder,
    remove_folder,
    verify_folder,
)
from lit_qlora.storage.foreign import object_in
from lit_qlora.storage.run import RunFolder


def is_adapter(folder: Path) -> bool:
    """True if ``folder`` holds an adapter, as peft saves one."""
    return (folder / ADAPTER_CONFIG).is_file()


def remedy_of_damage(adapter: Path) -> str:
    """What to do about a damaged ``adapter``: a run's best is restored from its intact copy by its next fit."""
    folder = adapter if adapter.name else adapter.resolve()
    run = RunFolder(folder.parent)
    is_restored = folder == run.adapter and _copy(run, None, lambda step: True) is not None
    return f"'{COMMAND} fit --run {quote(str(run.path))}' restores it" if is_restored else "take another"


def require_trained(run: RunFolder, option: str, names_one: str, remedy: str) -> None:
    """Check that a run has an adapter.

    Args:
        run: the run.
        option: option that names the run, for the message.
        names_one: the option that takes the folder of another adapter.
        remedy: what to do where the run has none yet.

    Raises:
        UserError: it has none; where a copy of it is left, the message says so.
    """
    if is_adapter(run.adapter):
        return
    if is_adapter(run.adapter_copy):
        remedy = f"fit again, which restores it, or give --{names_one} {run.adapter_copy}, its copy"
        raise UserError(f"{run.adapter} is not there", option=option, remedy=remedy)
    raise UserError(f"{run.path} has no adapter yet", option=option, remedy=remedy)


def mend_adapter(run: RunFolder, mirrored: Path | None = None, *, is_needed: bool = False) -> None:
    """Move a damaged or foreign adapter aside and restore an intact copy in its place, with a warning.

    It must be neither the best so far nor the one in use. A run without one may have saved none yet. For a finished
    run, only a copy of its best is accepted.

    Args:
        run: the run, which has an adapter.
        mirrored: another place that may hold a copy.
        is_needed: True to raise UserError, and move nothing, if no intact copy is left.

    Raises:
        UserError: if ``is_needed``, and no intact copy is left.
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
        copy_folder(whole, run.adapter)
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
        copy_folder(whole, run.adapter)
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
    verify_folder(folder)
    file = folder / RESULT
    step = object_in(file).get("step") if file.is_file() else 0
    if type(step) is not int:
        raise DamagedFolderError(folder, file.name, "a step and its figures", "no step")
    return step
