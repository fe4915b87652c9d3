"""Owns the checks of a start before a weight is loaded: which run is meant, whether it may resume or be scored, from
which checkpoint or adapter, and whether the disks have room.

Called by `training.py`. Knows the run's files and settings; loads no model.
"""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lit_qlora.command import another_run, check_same_run
from lit_qlora.data.datamodule import ChatDataModule
from lit_qlora.data.sources import check_sources
from lit_qlora.errors import UserError
from lit_qlora.forecast.host import run_folder_bytes
from lit_qlora.model.base import Base, missing_bytes
from lit_qlora.model.copies import Copies
from lit_qlora.model.device import choose_precision, current_device
from lit_qlora.model.fingerprint import fingerprint
from lit_qlora.model.lora import Lora, read_weights, weights_digest
from lit_qlora.model.lora_config import require_adapter
from lit_qlora.model.module import QLoRAModule
from lit_qlora.model.optimizer import OPTIMIZERS
from lit_qlora.storage import settings
from lit_qlora.storage.adapter import is_adapter, mend_adapter, require_trained
from lit_qlora.storage.checkpoint_io import check_checkpoint, run_record
from lit_qlora.storage.config_file import as_yaml
from lit_qlora.storage.files import require_room
from lit_qlora.storage.run import RunFolder, folder_to_score
from lit_qlora.storage.state import load_state
from lit_qlora.wording import number_of


def choose_run(
    default: RunFolder, mirror: Path | None, config: Mapping[str, Any], base: Base, data: ChatDataModule
) -> RunFolder:
    """The run of a fit without a name: the first that has not begun, or was begun with these settings and, if it is
    finished, these rows.

    Tries ``default``, then the same with -2, -3 and so on appended, each here and in the mirror; other runs are not
    changed.

    Args:
        default: the run of that config's or base's name.
        mirror: the folder of copies, if there is one.
        config: the full configuration of this start.
        base: its base.
        data: its rows.

    Raises:
        UserError: another run is due, and its sources are missing.
    """

    @cache
    def differences(run: RunFolder) -> list[str]:
        return _another(run, mirror, config, base, data)

    if differences(default):
        check_sources(config.get("data", {}))
    run = default.first_meant(lambda run: not differences(run))
    if run is not default:
        print(f"   run  {default.path} differs: {'; '.join(differences(default))}; this one is {run.path}", flush=True)
    return run


def _another(
    run: RunFolder, mirror: Path | None, config: Mapping[str, Any], base: Base, data: ChatDataModule
) -> list[str]:
    """The differences that make this start another run than that in the folder, or only in the mirror."""
    if not run.has_begun() and mirror:
        run = RunFolder(mirror / run.path.name)
    first = _first_settings(run)
    if first is None:
        return []
    others = settings.refused(first, config, lambda: data.changed_since(run.rows) == [])
    others += _unlike_checkpoint(run, first, config, base)
    return [*map(str, others)] or (data.changed_since(run.rows) if run.finished() else None) or []


def _unlike_checkpoint(
    run: RunFolder, first: Mapping[str, Any], config: Mapping[str, Any], base: Base
) -> list[settings.ChangedSetting]:
    """The changes of settings with which the run's newest checkpoint can't resume."""
    changes = [change for change in settings.differences(first, config) if change.name in settings.BY_CHECKPOINT]
    record = _newest_record(run) if changes else {}
    return [change for change in changes if _matters(change.name, run, record, config, base)]


def _matters(name: str, run: RunFolder, record: Mapping[str, Any], config: Mapping[str, Any], base: Base) -> bool:
    """True if the run's newest checkpoint can't resume with the change of setting ``name``."""
    if name == "model.base":
        return not record or record["base"] != fingerprint(base)
    if name == "model.adapter":
        adapter = config["model"]["adapter"]
        return not record or record["adapter"] != (weights_digest(Path(adapter)) if adapter else None)
    if not record:
        return False
    if name == "trainer.precision":
        device = current_device(config["trainer"]["accelerator"])
        return (
            record["precision"]
            != choose_precision(config["trainer"]["precision"], device, base.shape.num_parameters)[0]
        )
    if run.finished():
        return False
    # Whether it is shorter, by its options alone: no row is read yet that would tell the steps of an epoch, by which
    # `RunIdentity` refuses it.
    was, now = lengths(record["settings"]), lengths(config)
    return 0 < now["max_steps"] < record["steps"] or (
        now["max_steps"] == was["max_steps"] and 0 < now["max_epochs"] < was["max_epochs"]
    )


def check_against_first(run: RunFolder, config: dict[str, Any], base: Base, data: ChatDataModule) -> None:
    """Compare a start's configuration with that of the run's first start, and report changes of settings that may
    change.

    Args:
        run: the run folder, locked.
        config: the full configuration of this start.
        base: its base.
        data: its rows.

    Raises:
        UserError: a setting differs that may not change, or sources are missing.
        SystemExit: the run is finished and stays so, on the same conversations.
    """
    if not run.has_begun():
        run.config.unlink(missing_ok=True)
        return
    first = _first_settings(run)
    if first is None:
        return
    if not run.config.is_file():
        run.write_config(as_yaml(first))
    check_same_run(run, first, config, lambda: data.changed_since(run.rows) == [])
    finished = run.finished()
    if finished and _stays_finished(finished, finished["lengths"], lengths(config)):
        if others := _unlike_checkpoint(run, first, config, base):
            raise another_run(run, others)
        if changes := data.changed_since(run.rows):
            raise UserError(
                f"{run.path} is finished, and its conversations changed since ({'; '.join(changes)})",
                option="data.source",
                remedy="give --run NAME to train another run on them",
            )
        print(
            f"{run.path} is finished ({finished['step']} of {number_of(finished['steps'], 'steps')}): nothing to do.\n"
            f"Its adapter: {run.adapter}. To start another run, give it a name: --run NAME"
        )
        raise SystemExit(0)
    if changed := settings.differences(first, config):
        print(f"   run  changed: {'; '.join(map(str, changed))}", flush=True)


def _first_settings(run: RunFolder) -> dict[str, Any] | None:
    """The configuration of a run's first start, by its config.yaml, else by its newest checkpoint.

    None for a run that has not begun, or that has neither.
    """
    if not run.has_begun():
        return None
    return run.read_config() if run.config.is_file() else _newest_record(run).get("settings")


def _newest_record(run: RunFolder) -> dict[str, Any]:
    """The record of the run in its newest intact checkpoint; empty without one."""
    folder, _ = run.last_checkpoint(check_checkpoint)
    return run_record(load_state(folder, with_tensors=False), folder) if folder else {}


def lengths(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that set a run's length.

    Args:
        config: a full configuration, by section.

    Returns:
        ``max_steps`` and ``max_epochs``, -1 for no limit, and ``early_stopping``.
    """
    steps, epochs = (config.get("trainer", {}).get(name) or -1 for name in ("max_steps", "max_epochs"))
    return {"max_steps": steps, "max_epochs": epochs, "early_stopping": config.get("early_stopping")}


def _stays_finished(finished: Mapping[str, Any], was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """True if a run that finished with the lengths ``was`` has nothing to do for the lengths ``now``."""
    if 0 < now["max_steps"] <= finished["step"]:
        return True
    if finished["step"] < finished["steps"] and now["early_stopping"] != was["early_stopping"]:  # which ended it
        return False
    was_epochs, now_epochs = (math.inf if one["max_epochs"] == -1 else one["max_epochs"] for one in (was, now))
    return bool(now_epochs <= was_epochs and now["max_steps"] == was["max_steps"])


def check_room(run: RunFolder, module: QLoRAModule, keep_checkpoints: int) -> None:
    """Check that the disks have room for a run.

    Args:
        run: the run folder, in which the checkpoints kept, and one being written, must have room.
        module: module whose base may have to be downloaded.
        keep_checkpoints: number of checkpoints kept.

    Raises:
        UserError: one lacks it.
    """
    num_trained = module.base.shape.num_lora(module.lora.rank, module.lora.target_modules)
    here = (file for folder in (run.adapter, run.checkpoints) for file in folder.rglob("*") if file.is_file())
    needed_bytes = run_folder_bytes(num_trained, keep_checkpoints, OPTIMIZERS[module.optimizer_name].states)
    needed_bytes -= sum(file.stat().st_size for file in here)
    remedy = "lower model.rank, or give another folder with --run"
    require_room(run.path, needed_bytes, f"{run.path}, with its checkpoints,", option="run", remedy=remedy)
    copies = Copies(module.quantized_cache)
    download = missing_bytes(module.base)
    if download and copies.find(module.base, None, "*"):
        download = 0
    from huggingface_hub.constants import HF_HUB_CACHE

    what = f"the download of {module.base.name}"
    require_room(Path(HF_HUB_CACHE), download, what, option="model.base", remedy="set HF_HOME to a larger disk")


def check_adapter(run: RunFolder, lora: Lora, mirrored: Path | None, *, is_needed: bool = False) -> None:
    """Check a run's adapter, and restore an intact copy of a damaged one; see `mend_adapter`.

    Args:
        run: the run folder.
        lora: the run's options of LoRA, by which the adapter must go.
        mirrored: another place that may hold a copy.
        is_needed: True if it has to be there.

    Raises:
        UserError: as `mend_adapter`; also for one that was altered and sealed again.
    """
    mend_adapter(run, mirrored, is_needed=is_needed)
    if run.adapter.is_dir():
        try:
            read_weights(run.adapter, vars(lora))
        except UserError as error:
            raise error.advise(f"move {run.adapter} away, and a copy or a new best takes its place") from error


def check_score_settings(run: RunFolder, config: Mapping[str, Any]) -> None:
    """Compare the configuration of a score with that of its run: which adapter is scored is said by one option, and
    what has no effect is reported.

    Args:
        run: the run folder.
        config: the full configuration of this start.

    Raises:
        UserError: another adapter to start from is given.
    """
    first = _first_settings(run)
    if first is None:
        return
    was, adapter = (one.get("model", {}).get("adapter") for one in (first, config))
    if adapter != was:
        raise UserError(
            f"expected that of the run's training ({was}), got {adapter}",
            option="model.adapter",
            remedy=f"give --ckpt_path {adapter} to score it",
        )
    if changed := settings.without_effect(first, config):
        print(f"   run  without effect on a score: {'; '.join(map(str, changed))}", flush=True)


def what_to_score(run: RunFolder, what: str) -> tuple[Path | None, Path | None]:
    """The adapter or the checkpoint that is to be scored: one or none of the two.

    Args:
        run: the run folder.
        what: ``best``, ``last``, ``base`` or a path.

    Raises:
        UserError: it is missing.
    """
    if what == "base":
        return None, None
    if what == "best":
        others = "last or base" if run.saved_steps() else "base"
        require_trained(run, "ckpt_path", "ckpt_path", f"--ckpt_path {others} may be scored")
        return run.adapter, None
    if what == "last":
        checkpoint, _ = run.last_checkpoint(check_checkpoint)
        if checkpoint is None:
            raise UserError(
                f"{run.path} has no whole checkpoint", option="ckpt_path", remedy="best or base may be scored"
            )
        return None, checkpoint
    if is_adapter(Path(what)):
        return Path(what), None
    if Path(what).is_dir() and not any(Path(what).glob("state*")):  # a run or a whole model, not a damaged checkpoint
        try:
            require_adapter(Path(what))
        except UserError as error:
            raise error.within("ckpt_path") from error
    return None, folder_to_score(what, check_checkpoint)
