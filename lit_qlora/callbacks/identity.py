"""Owns the identity of a run in its checkpoints, and the refusal to resume from another run's.

Base, adapter to start from, tokenizer, prompt format, rows and precision are compared by content, not by name: a copy
of a base elsewhere is the same base. All but the base, whose weights may not be downloaded yet, is compared before
anything is loaded. Knows no file format.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_qlora.data.run_rows import RunRows
from lit_qlora.devices.world import by_first, check_same, is_first
from lit_qlora.errors import UserError
from lit_qlora.model import fingerprint
from lit_qlora.storage.checkpoint_io import LENGTH, RUN, run_record
from lit_qlora.storage.state import load_state
from lit_qlora.wording import number_of

IDENTITY_REMEDIES = {
    "base": "give that base with --model.base",
    "adapter": "give with --model.adapter the one that the run began with, or a copy of it",
    "tokenizer": "give a base with that tokenizer",
    "prompt_format": "give the data.template that the run began with, in the version of this project that began it",
    "train_rows": "give the rows that the run began with",
    "held_out_rows": "give the held-out rows that the run began with",
    "precision": "give --trainer.precision, on a device that has it",
}
"""The compared parts, by their names in the record, with the remedy if one differs."""


class SamePrompts(Callback):
    """A callback that compares a checkpoint to be scored with the prompt format of this start."""

    @property
    def state_key(self) -> str:
        """A key other than `RunIdentity`'s, which saved the record."""
        return "SamePrompts"

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raises UserError if the formats differ."""
        record = run_record(checkpoint, trainer.ckpt_path)
        was, now = record["prompt_format"], trainer.datamodule.prompt_format.identity  # type: ignore[attr-defined]
        if was != now:
            raise UserError(
                f"the checkpoint was trained with {_part_in_words('prompt_format', record)}, and is to be "
                f"scored with {_part_in_words('prompt_format', {'prompt_format': now})}",
                option="data.template",
                remedy="give that of its run, or none",
            )


class RunIdentity(Callback):
    """A callback that records the identity of a run in its checkpoints, and compares it on a resume.

    Args:
        resume_from: the checkpoint folder that this start resumes from, if any.
        settings: the full configuration, for a later start without a config.yaml.
        rows: the file that records which rows are learned and which are held out.
    """

    def __init__(
        self, resume_from: Path | None = None, settings: Mapping[str, Any] | None = None, rows: Path | None = None
    ) -> None:
        self.resume_from, self.settings, self.rows = resume_from, dict(settings or {}), rows
        self._old_steps: int | None = None
        """Length of the run in optimizer steps, as recorded in the checkpoint that is resumed from."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare all but the base, and record the rows, which are encoded by now; no weight is loaded.

        Raises UserError with was -> is for the first part that differs, and if the run would become shorter.
        """
        check_same(_describe_data(trainer))
        self._compare_data(trainer)
        if self.rows is not None and is_first():
            trainer.datamodule.recorded().write(self.rows)  # type: ignore[attr-defined]

    def _compare_data(self, trainer: Trainer) -> None:
        if self.resume_from is None:
            return
        folder = self.resume_from
        was = by_first(lambda: run_record(load_state(folder, with_tensors=False), folder))
        now = _describe_data(trainer)
        _compare(was, now, lambda: self._changes(trainer))
        if now["steps"] < was["steps"]:
            before, given = (one.get("trainer", {}) for one in (was["settings"], self.settings))
            changes = [name for name in LENGTH if before.get(name) != given.get(name)]
            length = " ".join(f"--trainer.{name} {before.get(name, -1)}" for name in changes) or "its length"
            raise UserError(
                f"it has {was['steps']} optimizer steps, and is asked for {now['steps']}",
                option="run",
                remedy=(
                    f"a run can be made longer, not shorter: give {length}, as its last start had, and "
                    "end it with Ctrl-C or --max_time, or give --run NAME to start another run"
                ),
            )
        self._old_steps = was["steps"]

    def _changes(self, trainer: Trainer) -> dict[str, str]:
        """Changes of the rows since the run's last start, in words by part; empty without its record."""
        with suppress(UserError):  # a damaged one
            if self.rows is not None and (recorded := RunRows.read(self.rows)):
                return recorded.changes(trainer.datamodule.recorded())  # type: ignore[attr-defined]
        return {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the record."""
        checkpoint[RUN] = _describe_base(pl_module) | _describe_data(trainer) | {"settings": self.settings}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the base. Raises UserError with was -> is if it differs."""
        _compare(run_record(checkpoint, trainer.ckpt_path), _describe_base(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """If the run was made longer, use and report the learning rate of the longer schedule from here on."""
        steps = trainer.datamodule.num_optimizer_steps()  # type: ignore[attr-defined]
        if self._old_steps in (None, steps):
            return
        for config in trainer.lr_scheduler_configs:
            # The restored rate is that of the shorter schedule.
            scheduler: Any = config.scheduler
            pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            rates = [highest * factor(scheduler.last_epoch) for highest, factor in pairs]
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        print(
            f"   run  {number_of(self._old_steps, 'steps')} became {steps:,}: from step {trainer.global_step} on, the "
            "learning rate is that of the longer run",
            flush=True,
        )


def _describe_base(module: Any) -> dict[str, Any]:
    base = fingerprint.identity(module.base)
    return {"base": base["fingerprint"], "base_name": " ".join(filter(None, (base["name"], base["commit"])))}


def _describe_data(trainer: Trainer) -> dict[str, Any]:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return {
        "adapter": trainer.lightning_module.adapter_digest,
        "tokenizer": data.encoder.rules_fingerprint(),
        "prompt_format": data.prompt_format.identity,
        **data.fingerprints(),
        "precision": str(trainer.precision),
        "steps": data.num_optimizer_steps(),
    }


def _compare(was: dict[str, Any], now: dict[str, Any], changes: Callable[[], Mapping[str, str]] = dict) -> None:
    """Raises UserError for the first part of ``now`` that differs from ``was``; ``changes`` has words for some."""
    for part, remedy in IDENTITY_REMEDIES.items():
        if part in now and was[part] != now[part]:
            raise UserError(
                f"its {part.replace('_', ' ')} changed: "
                + (changes().get(part) or f"{_part_in_words(part, was)} -> {_part_in_words(part, now)}"),
                option="run",
                remedy=f"{remedy}, or --run NAME to start another run",
            )


def _part_in_words(part: str, record: dict[str, Any]) -> str:
    value = str(record[part])
    if part == "base":
        return f"{record['base_name']} ({fingerprint.short(value)})"
    *words, digits = value.split()
    return " ".join([*words, digits[: fingerprint.SHOWN_DIGITS]]) if len(digits) == 64 else value
