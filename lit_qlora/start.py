"""Owns the start before anything is built: which config and run folder are meant, and whether the run may resume.

Called by `training.py`. Knows the run's files and settings; loads no model and no data.
"""

import math
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lit_qlora.console import complain
from lit_qlora.data.datamodule import ChatDataModule
from lit_qlora.data.sources import check_here
from lit_qlora.data.templates import is_template
from lit_qlora.errors import UserError, excerpt
from lit_qlora.forecast.memory import run_folder_bytes
from lit_qlora.model.base import Base, missing_bytes
from lit_qlora.model.copies import Copies
from lit_qlora.model.device import choose_precision, current_device
from lit_qlora.model.fingerprint import fingerprint
from lit_qlora.model.load import Lora, read_weights
from lit_qlora.model.module import QLoRAModule
from lit_qlora.options import (
    OneLineErrors,
    all_values,
    check_config_file,
    check_config_of,
    did_you_mean,
    is_plain,
    is_plain_type,
    option,
    takes_names,
    with_values,
)
from lit_qlora.place import CONFIGS, find_config
from lit_qlora.signatures import LEARNING
from lit_qlora.storage import settings
from lit_qlora.storage.checkpoint_io import RUN, check_checkpoint
from lit_qlora.storage.files import require_room
from lit_qlora.storage.run import (
    Change,
    RunFolder,
    as_sections,
    as_yaml,
    folder_to_score,
    lies_in_run,
    mend_adapter,
    named_folder,
    newest_run,
    open_run,
    read_options,
)
from lit_qlora.storage.state import load_state
from lit_qlora.wording import number_of

DEMO_CONFIG = CONFIGS / "demo.yaml"

REMEDY = "put that line right, or take it out"
"""The remedy for a run's own config.yaml."""


class Command(NamedTuple):
    """A command line from its verb on, and the run that gives the other options."""

    args: list[str]
    kept: RunFolder | None = None


def complete(args: list[str]) -> Command:
    """Add the default config to the command, and the folder of the run that it names.

    Checks the config files. Without a named run, that of a fit is found once its full configuration is known.
    """
    verb, rest = args[0], args[1:]
    if {"-h", "--help"} & {*rest} or any(arg.startswith("--help") for arg in rest):
        return Command(args)
    rest = with_values(rest, find_config, "--config", "-c")
    config, name, kept = option(rest, "--config", "-c"), option(rest, "--run"), None
    run = named_folder(name)
    base = option(rest, "--model.base")
    if config is None:
        if verb not in LEARNING:
            kept = open_run(run) if run else newest_run()
            if run is None:
                print(f"   run  {kept.path}, the newest", flush=True)
            run = kept.path
        elif run and RunFolder(run).config.is_file():
            kept = RunFolder(run)
        if kept:
            check_config_of(kept)
        elif base in (None, "demo"):  # a base of one's own is not for the demo's learning rate
            rest = ["--config", str(DEMO_CONFIG), *rest]
    for file in filter(None, all_values(rest, "--config", "-c")):
        check_config_file(Path(file))
        if name is None and kept is None:
            found = yaml.safe_load(Path(file).read_text(encoding="utf-8-sig")).get("run")
            run = run if found is None else named_folder(str(found))
    return Command([verb, *rest, *(["--run", str(run)] if run else [])], kept)


def with_kept(command: Command, parser: OneLineErrors) -> list[str]:
    """The command line of ``command`` with its run's options in front: those of ``parser``, with plain values.

    A config file that lies in a run folder is read as a run's own: either may come from a stranger.
    """
    verb, *rest = command.args

    def read(file: str) -> str:
        path = Path(file)
        if not lies_in_run(path):
            return file
        try:
            return _as_plain(read_options(path), path, parser, rest)
        except ValueError as error:
            raise UserError(f"damaged ({error})", place=path, remedy="put a copy of it back") from error

    rest = with_values(rest, read, "--config", "-c")
    if command.kept:
        kept = command.kept.read_options()
        rest = [*(["--config", _as_plain(kept, command.kept.config, parser, rest)] if kept else []), *rest]
    return [verb, *rest]


def _as_plain(options: Mapping[str, Any], place: Path, parser: OneLineErrors, rest: list[str]) -> str:
    """``options`` of ``parser`` as YAML text, from a file in a run folder.

    Options that could name code are left out, with a warning unless the command line gives them itself; unknown names
    are refused.
    """
    types, kept, left_out = parser.types(), dict[str, Any](), list[str]()
    for name, value in options.items():
        known = next((one for one in types if name == one or name.startswith((f"{one}.", f"{one}+"))), None)
        if known is None:
            near = did_you_mean(name, [*types])
            raise UserError(f"unknown option {excerpt(name)}", place=place, remedy=f"{near}; {REMEDY}")
        if not is_plain_type(types[known]):
            if name == known and (value is None or isinstance(value, bool)):
                kept[name] = value
            elif known not in left_out and not any(arg.startswith(f"--{known}") for arg in rest):
                left_out.append(known)
        elif name == "data.template" and isinstance(value, str) and not is_template(value):
            raise UserError(
                f"expected the text of a template, got {excerpt(value)}", option=name, place=place, remedy=REMEDY
            )
        elif (name == known or takes_names(types[known])) and is_plain(value, types[known]):
            kept[name] = value
        else:
            raise UserError(
                f"expected a plain value, got {name} with {excerpt(value)}", option=known, place=place, remedy=REMEDY
            )
    if left_out:
        complain(
            f"warning: {', '.join(left_out)} of {place} left out: it can name code, and none is taken from a run "
            "folder; give it on the command line to have it"
        )
    return as_yaml(as_sections(kept))


def choose_run(
    default: RunFolder, mirror: Path | None, config: Mapping[str, Any], base: Base, data: ChatDataModule
) -> RunFolder:
    """The run of a fit without a name: the first that has not begun, or was begun with these settings.

    Tries ``default``, then the same with -2, -3 and so on appended, each here and in the mirror; other runs are not
    changed.

    Args:
        default: the run of that config's or base's name.
        mirror: the folder of copies, if there is one.
        config: the full configuration of this start.
        base: found already.
        data: asked whether its sources exist.

    Raises:
        UserError: another run is due, and the data are missing.
    """
    others = _another(default, mirror, config, base)
    if not others:
        return default
    _check_sources(data)
    numbered = (RunFolder(default.path.with_name(f"{default.path.name}-{number}")) for number in count(2))
    run = next(run for run in numbered if not _another(run, mirror, config, base))
    print(
        f"   run  {default.path} has other settings: {'; '.join(map(str, others))}; this one is {run.path}", flush=True
    )
    return run


def _another(run: RunFolder, mirror: Path | None, config: Mapping[str, Any], base: Base) -> list[Change]:
    """The settings that make ``config`` another run than that in the folder, or in the mirror if only that exists."""
    if not run.has_begun() and mirror:
        run = RunFolder(mirror / run.path.name)
    first = _first_settings(run)
    if first is None:
        return []
    names = ("model.base", "trainer.precision", "trainer.max_steps", "trainer.max_epochs")
    changes = [change for change in settings.differences(first, config) if change.name in names]
    record = _record(run) if changes else {}
    return settings.refused(first, config) + [
        change for change in changes if _matters(change.name, run, record, config, base)
    ]


def _matters(name: str, run: RunFolder, record: Mapping[str, Any], config: Mapping[str, Any], base: Base) -> bool:
    """True if the run's newest checkpoint can't resume with the change of setting ``name``."""
    if name == "model.base":
        return not record or record["base"] != fingerprint(base)
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
    was, now = lengths(record["settings"]), lengths(config)
    return 0 < now["max_steps"] < record["steps"] or (
        now["max_steps"] == was["max_steps"] and 0 < now["max_epochs"] < was["max_epochs"]
    )


def _check_sources(data: ChatDataModule) -> None:
    """Raises UserError for a missing file or folder of rows."""
    for given in filter(None, (data.source, data.validation_source, data.test_source)):
        check_here(given)


def check_against_first(run: RunFolder, config: dict[str, Any], data: ChatDataModule) -> None:
    """Compare ``config`` with that of the run's first start.

    Reports changes of settings that may change. Raises UserError if another one differs, or if ``data`` are missing and
    would be another's, and SystemExit if the run is finished and stays so.
    """
    if not run.has_begun():
        run.config.unlink(missing_ok=True)
        return
    first = _first_settings(run)
    if first is None:
        return
    if not run.config.is_file():
        run.write_config(as_yaml(first))
    others = settings.refused(first, config)
    if others:
        _check_sources(data)
        raise settings.other_run(run.path, others)
    finished = run.finished()
    if finished and _stays_finished(finished, finished.get("lengths", lengths(first)), lengths(config)):
        print(
            f"{run.path} is finished ({finished['step']} of {number_of(finished['steps'], 'steps')}): nothing to do.\n"
            f"Its adapter: {run.adapter}. To start another run, give it a name: --run NAME"
        )
        raise SystemExit(0)
    changed = settings.allowed(first, config)
    if changed:
        print(f"   run  changed: {'; '.join(map(str, changed))}", flush=True)


def _first_settings(run: RunFolder) -> dict[str, Any] | None:
    """The configuration of a run's first start, by its config.yaml, else by its newest checkpoint.

    None for a run that has not begun, or whose checkpoint is an earlier version's.
    """
    if not run.has_begun():
        return None
    return run.read_config() if run.config.is_file() else _record(run).get("settings")


def _record(run: RunFolder) -> dict[str, Any]:
    """The record of the run in its newest intact checkpoint; empty without one."""
    folder, _ = run.last_checkpoint(check_checkpoint)
    return dict(load_state(folder, with_tensors=False)[RUN]) if folder else {}


def lengths(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a configuration that set a run's length; -1: no limit."""
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
    """Raises UserError if a disk lacks the room for the checkpoints kept, one being written, or a base to download."""
    num_trained = module.base.shape.num_lora(module.lora.rank, module.lora.target_modules)
    here = (file for folder in (run.adapter, run.checkpoints) for file in folder.rglob("*") if file.is_file())
    needed_bytes = run_folder_bytes(num_trained, keep_checkpoints) - sum(file.stat().st_size for file in here)
    remedy = "lower model.rank, or give another folder with --run"
    require_room(run.path, needed_bytes, f"{run.path}, with its checkpoints,", option="run", remedy=remedy)
    copies = Copies(module.quantized_cache)
    download = missing_bytes(module.base)
    if download and copies.find(module.base, None, "*"):
        download = 0
    from huggingface_hub.constants import HF_HUB_CACHE

    what = f"the download of {module.base.name}"
    require_room(Path(HF_HUB_CACHE), download, what, option="model.base", remedy="set HF_HOME to a larger disk")


def checkpoint_to_resume(run: RunFolder) -> Path | None:
    """The newest intact checkpoint, with a warning for each newer damaged one; None for a run without any.

    Raises UserError if there are some and none is intact.
    """
    whole, problems = run.last_checkpoint(check_checkpoint)
    for problem in problems:
        complain(f"warning: {problem}; falling back to the previous checkpoint")
    if problems and whole is None:
        raise UserError(
            f"no checkpoint in {run.checkpoints} is whole", option="run", remedy="start anew with another --run"
        )
    return whole


def check_adapter(run: RunFolder, lora: Lora, mirrored: Path | None, *, is_needed: bool = False) -> None:
    """`mend_adapter`, by whose arguments it goes. Raises UserError for one altered and sealed again, too."""
    mend_adapter(run, mirrored, is_needed=is_needed)
    if run.adapter.is_dir():
        try:
            read_weights(run.adapter, lora.rank, lora.alpha, rslora=lora.rslora, dora=lora.dora)
        except UserError as error:
            raise error.advise(f"move {run.adapter} away, and a copy or a new best takes its place") from error


def what_to_score(run: RunFolder, what: str) -> tuple[Path | None, Path | None]:
    """The adapter and the checkpoint named by ``best``, ``last``, ``base`` or a path: one or none of the two.

    Raises UserError if it is missing.
    """
    if what == "base":
        return None, None
    if what == "best":
        if not (run.adapter / "adapter_config.json").is_file():
            raise UserError(
                f"{run.path} has no adapter yet", option="ckpt_path", remedy="--ckpt_path last or base may be scored"
            )
        return run.adapter, None
    if what == "last":
        checkpoint, _ = run.last_checkpoint(check_checkpoint)
        if checkpoint is None:
            raise UserError(
                f"{run.path} has no whole checkpoint", option="ckpt_path", remedy="best or base may be scored"
            )
        return None, checkpoint
    if (Path(what) / "adapter_config.json").is_file():
        return Path(what), None
    return None, folder_to_score(what, check_checkpoint)
