"""Owns what happens before anything is built: which config and run folder are meant, and whether it may go on.

`training.py` asks. Knows the run's files and settings; loads no model and no data.
"""

import math
import os
import shutil
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lit_qlora.errors import UserError, require
from lit_qlora.model.base import missing_bytes
from lit_qlora.model.copies import Copies
from lit_qlora.model.load import Lora, read_record, read_weights
from lit_qlora.model.module import QLoRAModule
from lit_qlora.options import OneLineErrors, check_config_file, did_you_mean, is_plain, is_plain_type, option
from lit_qlora.storage import settings
from lit_qlora.storage.checkpoint_io import RECORD, check_checkpoint, checkpoint_folder
from lit_qlora.storage.files import size
from lit_qlora.storage.folders import DamagedFolderError
from lit_qlora.storage.run import (
    RUNS,
    NoReferences,
    RunFolder,
    as_sections,
    as_yaml,
    mend_adapter,
    newest_run,
    open_run,
    read_options,
)
from lit_qlora.storage.state import load_state
from lit_qlora.text import jinja

DEMO_CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"

REMEDY = "put that line right, or take it out"
"""Of a run's own config.yaml."""


class Command(NamedTuple):
    """A command line from its verb on, and the run whose options hold where it gives no others."""

    args: list[str]
    kept: RunFolder | None = None


def complete(args: list[str]) -> Command:
    """Puts in the config and the run folder that the command leaves unsaid; checks the config files."""
    verb, rest = args[0], args[1:]
    if {"-h", "--help"} & {*rest} or any(arg.startswith("--help") for arg in rest):
        return Command(args)
    config, run, kept = option(rest, "--config", "-c"), option(rest, "--run"), None
    _check_run(run)
    base = option(rest, "--model.base")
    if config is None:
        if verb != "fit":
            kept = open_run(Path(run)) if run else newest_run()
            run = str(kept.path)
        elif run and RunFolder(Path(run)).config.is_file():
            kept = RunFolder(Path(run))
        if kept:
            _check_kept(kept)
        elif base in (None, "demo"):  # a base of one's own is not for the demo's learning rate
            rest = ["--config", str(DEMO_CONFIG), *rest]
        config = option(rest, "--config", "-c")
    for index, arg in enumerate(rest):
        if arg in ("--config", "-c") and index + 1 < len(rest):
            check_config_file(Path(rest[index + 1]))
        elif arg.startswith("--config="):
            check_config_file(Path(arg.partition("=")[2]))
    for file in (value for name, value in pairwise(rest) if name in ("--config", "-c")):
        run = run or yaml.safe_load(Path(file).read_text(encoding="utf-8-sig")).get("run")
    if run is None:
        run = str(RUNS / (Path(config).stem if config else Path(str(base)).name or "run"))
        rest += ["--run", run]
    elif option(rest, "--run") is None:
        rest += ["--run", run]
    return Command([verb, *rest], kept)


def _check_run(run: str | None) -> None:
    if run and "://" in run:
        raise UserError(f"run: {run} is a URL, and runs are only kept on this machine: give a folder")


def _check_kept(run: RunFolder) -> None:
    try:
        check_config_file(run.config, NoReferences)
    except UserError as error:
        raise UserError(f"{error}; {run.config_remedy()}") from error


def with_kept(command: Command, parser: OneLineErrors) -> list[str]:
    """The command line of ``command`` with its run's options in front: those that ``parser`` has, with plain values.

    A run folder may come from a stranger. What could name code is left out, with a warning unless the command line
    says it itself; any other name than an option's is refused.
    """
    verb, *rest = command.args
    if command.kept is None:
        return command.args
    types, kept, left_out = parser.types(), dict[str, Any](), list[str]()
    place = command.kept.config
    for name, value in command.kept.read_options().items():
        known = next((one for one in types if name == one or name.startswith((f"{one}.", f"{one}+"))), None)
        if known is None:
            raise UserError(f"{place}: unknown option {name!r}{did_you_mean(name, [*types])}; {REMEDY}")
        if not is_plain_type(types[known]):
            if name == known and (value is None or isinstance(value, bool)):
                kept[name] = value
            elif known not in left_out and not any(arg.startswith(f"--{known}") for arg in rest):
                left_out.append(known)
        elif name == known and is_plain(value):
            kept[name] = value
        else:
            raise UserError(f"{place}: {known}: expected a plain value, got {name} with {value!r}; {REMEDY}")
    if left_out:
        print(
            f"warning: {', '.join(left_out)} of {place} left out: it can name code, and none is taken from a run "
            "folder; give it on the command line to have it",
            file=sys.stderr,
        )
    return [verb, *(["--config", as_yaml(as_sections(kept))] if kept else []), *rest]


def check_against_first(run: RunFolder, config: dict[str, Any]) -> None:
    """Compares ``config`` with that of the run's first start.

    Says which of the settings that may change did. Raises UserError where another one differs, and SystemExit
    where the run is finished and stays so.
    """
    if not run.has_begun():
        run.config.unlink(missing_ok=True)
        return
    if not run.config.is_file():
        recorded = _recorded_settings(run)
        if recorded is None:
            return
        run.write_config(as_yaml(recorded))
    first = run.read_config()
    others = settings.refused(first, config)
    if others:
        raise UserError(
            f"run: {run.path} was started with other settings: {'; '.join(others)}; "
            "give --run NAME to start another run"
        )
    finished = run.finished()
    if finished and _stays_finished(finished, finished.get("lengths", lengths(first)), lengths(config)):
        print(
            f"{run.path} is finished ({finished['step']} of {finished['steps']} steps): nothing to do.\n"
            f"Its adapter: {run.adapter}. To start another run, give it a name: --run NAME"
        )
        raise SystemExit(0)
    changed = settings.allowed(first, config)
    if changed:
        print(f"   run  changed: {'; '.join(changed)}", flush=True)


def _recorded_settings(run: RunFolder) -> dict[str, Any] | None:
    """The configuration by the newest checkpoint; None without one, or in one of an earlier version."""
    folder, _ = run.last_checkpoint(check_checkpoint)
    return load_state(folder, with_tensors=False)[RECORD].get("settings") if folder else None


def check_graphs(cuda_graphs: bool | str, packing: bool) -> None:
    """Raises UserError where kernels are to be recorded of micro-batches that all differ in shape."""
    require(not (cuda_graphs is True and packing), "model.cuda_graphs", "auto or false with data.packing", cuda_graphs)


def lengths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a configuration, what says how long a run is; -1: as long as the others let it."""
    steps, epochs = (config.get("trainer", {}).get(name) or -1 for name in ("max_steps", "max_epochs"))
    return {"max_steps": steps, "max_epochs": epochs, "early_stopping": config.get("early_stopping")}


def _stays_finished(finished: Mapping[str, Any], was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a run that came to its end with the lengths ``was`` has nothing to do for the lengths ``now``."""
    if 0 < now["max_steps"] <= finished["step"]:
        return True
    if finished["step"] < finished["steps"] and now["early_stopping"] != was["early_stopping"]:  # which ended it
        return False
    was_epochs, now_epochs = (math.inf if one["max_epochs"] == -1 else one["max_epochs"] for one in (was, now))
    return bool(now_epochs <= was_epochs and now["max_steps"] == was["max_steps"])


def check_room(run: RunFolder, module: QLoRAModule, keep_checkpoints: int) -> None:
    """Room for the checkpoints that are kept, one more while it is written, and a base still to be downloaded.

    Raises UserError where a disk has less.
    """
    num_trained = module.base.shape.num_lora(module.lora.rank, module.lora.target_modules)
    adapters = 3 * 4 * num_trained  # the best, its copy, and one more while it is written
    states = 12 * num_trained * (keep_checkpoints + 1)
    here = (file for folder in (run.adapter, run.checkpoints) for file in folder.rglob("*") if file.is_file())
    run.check_room(adapters + states - sum(file.stat().st_size for file in here))
    copies = Copies(module.quantized_cache)
    download = missing_bytes(module.base)
    if download and copies.find(module.base, None, "*"):
        download = 0
    cache = Path(os.environ.get("HF_HOME", Path.home())).expanduser()
    free = shutil.disk_usage(cache if cache.exists() else Path.home()).free
    if free < download:
        raise UserError(
            f"model.base: {module.base.name} is a download of {size(download)}, and the disk of the "
            f"hub's cache has {size(free)} left; free some, or set HF_HOME to a larger disk"
        )


def checkpoint_to_resume(run: RunFolder) -> Path | None:
    """The newest whole checkpoint, with a warning for each newer one that is not; None for a run without any.

    Raises UserError where there are some and none is whole.
    """
    whole, problems = run.last_checkpoint(check_checkpoint)
    for problem in problems:
        print(f"warning: {problem}; going back to the checkpoint before", file=sys.stderr)
    if problems and whole is None:
        raise UserError(f"run: no checkpoint in {run.checkpoints} is whole; start anew with another --run")
    return whole


def comes_otherwise(run: RunFolder, config: Mapping[str, Any]) -> bool:
    """Whether an earlier start may have done, behind the newest checkpoint, what this one will do otherwise."""
    for path in run.configs():
        try:
            was = as_sections(read_options(path))
        except ValueError:
            return True
        if settings.comes_otherwise(was, config):
            return True
    return False


def check_adapter(run: RunFolder, lora: Lora, mirrored: Path | None, *, is_needed: bool = False) -> None:
    """See `mend_adapter`. Raises UserError for an adapter that was altered and sealed again, too."""
    mend_adapter(run, mirrored, is_needed=is_needed)
    if run.adapter.is_dir():
        try:
            read_weights(run.adapter, lora.rank, lora.alpha, rslora=lora.rslora, dora=lora.dora)
        except UserError as error:
            raise UserError(f"{error}; move {run.adapter} away, and a copy or a new best takes its place") from error


def template_of(adapter: Path, given: str | None) -> str | None:
    """The prompt template that ``adapter`` was trained with, by its record; None for the Llama 2 format.

    Raises UserError when another one is given.
    """
    recorded = read_record(adapter).get("template")
    if given not in (None, recorded):
        was = f"sha256 {jinja.digest(recorded)[:12]}" if recorded else "the Llama 2 format"
        raise UserError(
            f"data.template: {adapter} was trained with {was}, and is given sha256 {jinja.digest(given)[:12]}; leave "
            "it out, and the adapter's own is taken"
        )
    return recorded


def what_to_score(run: RunFolder, what: str) -> tuple[Path | None, Path | None]:
    """The adapter and the checkpoint that ``best``, ``last``, ``base`` or a path stands for: one or none of the two.

    Raises UserError when it is not there.
    """
    if what == "base":
        return None, None
    if what == "best":
        if not (run.adapter / "adapter_config.json").is_file():
            raise UserError(f"ckpt_path: {run.path} has no adapter yet; --ckpt_path last or base may be scored")
        return run.adapter, None
    if what == "last":
        checkpoint, _ = run.last_checkpoint(check_checkpoint)
        if checkpoint is None:
            raise UserError(f"ckpt_path: {run.path} has no whole checkpoint; best or base may be scored")
        return None, checkpoint
    if (Path(what) / "adapter_config.json").is_file():
        return Path(what), None
    folder = checkpoint_folder(what)
    try:
        check_checkpoint(folder)
    except DamagedFolderError as error:
        raise UserError(f"ckpt_path: {error}; give best, last, base, or a folder that is whole") from error
    return None, folder
