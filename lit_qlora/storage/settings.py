"""Owns which settings may change between two starts of a run; changing any other makes it another run.

Knows the names of options and why changing them is harmless, and nothing of what they do.
"""

from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from typing import Any, NamedTuple

from lit_qlora.storage.config_file import flat

BY_CHECKPOINT: Mapping[str, str] = {
    "trainer.max_epochs": "longer is allowed, shorter is not",
    "trainer.max_steps": "longer is allowed, shorter is not",
    "trainer.precision": "auto and its choice are the same",
    "model.base": "a copy elsewhere is the same base, and has the same tokenizer",
    "model.adapter": "a copy elsewhere is the same adapter",
}
"""Settings whose change matters or not by the run's newest checkpoint, which is compared with what they come to."""
MAY_CHANGE: Mapping[str, str] = {
    # Saving and logging: no number of the training depends on them.
    "save_every_steps": "saving changes no number",
    "save_every_minutes": "saving changes no number",
    "keep_checkpoints": "saving changes no number",
    "mirror": "copying changes no number",
    "max_nonfinite_losses": "when the run gives up",
    "early_stopping": "when the run ends",
    "samples": "shown, never learned from",
    "trainer.logger": "only observing",
    "trainer.log_every_n_steps": "only observing",
    "trainer.enable_progress_bar": "only observing",
    "trainer.detect_anomaly": "only observing",
    "trainer.callbacks": "only observing",
    "trainer.val_check_interval": "when the held-out rows are scored; they stay the same",
    "trainer.limit_test_batches": "no part of training",
    "data.test_source": "no part of training",
    "data.strict": "ends at a bad row, or changes nothing",
    # How the same numbers come about.
    "data.num_workers": "the order of the rows does not depend on it",
    "model.checkpointing": "keeps the same results, or recomputes them",
    "model.offload": "keeps the same results elsewhere",
    "model.cuda_graphs": "the same kernels, started together",
    "model.loss_rows": "the same sums, in parts of another size",
    "model.own_layers": "the same up to rounding, without dropout",
    "model.shard": "where the base is, not what it computes",
    "model.shard_to": "where the base is, not what it computes",
    "model.quantized_cache": "a copy holds the same bits",
    "trainer.accelerator": "another machine: the same run, not the same bits",
    "trainer.devices": "how fast, not what is learned",
    "trainer.num_nodes": "how fast, not what is learned",
    "trainer.deterministic": "which of a GPU's kernels",
    "trainer.benchmark": "which of a GPU's kernels",
    **BY_CHECKPOINT,
}
ROW_SETTINGS = ("data.source", "data.validation_source")
"""Settings that say where rows are; they may change if the rows are the same, which shows once they are read."""
TRAINS_ONLY = (
    "save_every_steps", "save_every_minutes", "keep_checkpoints", "mirror", "max_time", "max_nonfinite_losses",
    "early_stopping", "samples", "model.rank", "model.alpha", "model.dropout", "model.target_modules", "model.rslora",
    "model.dora", "model.learning_rate", "model.warmup_ratio", "model.schedule", "model.optimizer",
    "model.weight_decay", "model.checkpointing", "model.offload", "trainer.max_epochs", "trainer.max_steps",
    "trainer.accumulate_grad_batches", "trainer.gradient_clip_val", "trainer.gradient_clip_algorithm",
    "trainer.limit_train_batches", "trainer.log_every_n_steps", "trainer.logger", "trainer.val_check_interval",
)  # fmt: skip
"""Options without effect on a score, in which an adapter has its own."""
LONGEST_SHOWN = 200
"""Longest setting, in characters, that a message shows in full."""


class ChangedSetting(NamedTuple):
    """A changed setting; ``name: old -> new`` as text.

    Args:
        name: the option's dotted name.
        old: its value as the run began, in words.
        new: its value now, in words.
    """

    name: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.name}: {self.old} -> {self.new}"


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[ChangedSetting]:
    """The changed settings, by name.

    Args:
        was: a configuration, in sections or by dotted names.
        now: the one that it is compared with.
    """
    before, after = flat(was), flat(now)
    return [
        ChangedSetting(name, _in_one_line(before.get(name)), _in_one_line(after.get(name)))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def refused(
    was: Mapping[str, Any], now: Mapping[str, Any], are_same_rows: Callable[[], bool] = lambda: False
) -> list[ChangedSetting]:
    """The changes that would make it another run; with all others it may resume.

    Args:
        was: as in `differences`.
        now: as in `differences`.
        are_same_rows: asked where only `ROW_SETTINGS` changed: True if the rows there are those of the run.
    """
    others = [change for change in differences(was, now) if not _is_of(change.name, MAY_CHANGE)]
    is_moved = all(_is_of(change.name, ROW_SETTINGS) for change in others)
    return [] if is_moved and others and are_same_rows() else others


def without_effect(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[ChangedSetting]:
    """The changes that a score of the run leaves out of account.

    Args:
        was: as in `differences`.
        now: as in `differences`.
    """
    return [change for change in differences(was, now) if _is_of(change.name, TRAINS_ONLY)]


def _is_of(name: str, options: Iterable[str]) -> bool:
    return any(name == known or name.startswith(f"{known}.") for known in options)


def _in_one_line(value: Any) -> str:
    """A setting in one line; a long text, such as a template, as its beginning, length and hash."""
    text = str(value)
    if len(text) <= LONGEST_SHOWN and "\n" not in text:
        return text
    return f"{' '.join(text.split())[:40]}… ({len(text)} characters, sha256 {sha256(text.encode()).hexdigest()[:12]})"
