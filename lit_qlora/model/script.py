"""Owns what a script's own Trainer and loaders may be, and what its checkpoints are: settings that are supported,
figures that its callbacks may monitor, and the base, scaling and prompt format that a file of Lightning's
ModelCheckpoint records.

A run of the command line has its own: `trainer.py`, and folders for checkpoints. Knows the module by its base, its
LoRA and its prompt format only.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import unwrap
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Checkpoint,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_qlora.batch import Batch
from lit_qlora.devices.strategy import Replicas
from lit_qlora.errors import UserError, excerpt, require
from lit_qlora.metrics import held_out, logged
from lit_qlora.model.base import Base
from lit_qlora.model.device import check_kernels, choose_precision, compute_dtype, current_device, dtype_name
from lit_qlora.model.fingerprint import fingerprint, short
from lit_qlora.model.lora import Lora
from lit_qlora.place import COMMAND
from lit_qlora.text.formats import PromptFormat, from_record

_AVERAGED = "none that averages weights (the adapter saved is the one that was scored; model.schedule lets rates fall)"
CHANGING: Mapping[type, str] = {
    GradientAccumulationScheduler: "none that changes the steps (trainer.accumulate_grad_batches says what each has)",
    StochasticWeightAveraging: _AVERAGED,
    WeightAveraging: _AVERAGED,
    LearningRateFinder: "none that sets the learning rate (model.learning_rate does; try several, each with its --run)",
    BatchSizeFinder: f"none that sets the batch (data.batch_size does; {COMMAND} plan shows what fits)",
    BaseFinetuning: "none that freezes layers (model.target_modules says which ones are trained)",
    ModelPruning: "none that prunes weights (model.rank and model.target_modules say how many are trained)",
    SpikeDetection: "none that leaves out rows (max_nonfinite_losses says when a run is given up)",
}
"""Lightning's callbacks that change weights, steps, rates or data; and what is there instead."""

OF = "lit_qlora"
"""The part of a Lightning checkpoint that records its base, scaling and prompt format."""
SCALING = ("alpha", "rslora")
"""The options of LoRA that no weight shows: with others, the same weights are another model."""


def check_trainer(trainer: Trainer) -> None:
    """Raises UserError for unsupported settings of ``trainer``, a script's."""
    strategy = trainer.strategy
    known = isinstance(strategy, SingleDeviceStrategy | Replicas)
    expected = f"auto with devices=1 (on several devices, {COMMAND} fit trains)"
    require(known, "trainer.strategy", expected, type(strategy).__name__)
    device = strategy.root_device.type
    require(device in ("cpu", "cuda"), "trainer.accelerator", "cpu, or gpu with a CUDA GPU", device)
    precision: Any = str(trainer.precision)
    compute_dtype(precision)
    if device == "cuda":
        card = current_device()
        check_kernels(card)
        choose_precision(precision, card)
    ends = trainer.state.fn != "fit" or (trainer.max_epochs, trainer.max_steps) != (-1, -1)
    expected = "a number of epochs, or of steps in trainer.max_steps, for the learning rate's schedule"
    require(ends, "trainer.max_epochs", expected, trainer.max_epochs)
    if {"forward", "training_step"} <= {*vars(trainer.lightning_module)}:  # Lightning puts compiled ones in their place
        raise UserError("torch.compile can't be used on it", option="model", remedy="leave it out: see model.compile")


NEEDED_HOOKS = (
    "setup", "configure_model", "configure_callbacks", "on_train_start", "on_train_batch_start", "on_after_backward",
    "on_before_optimizer_step", "backward", "on_validation_start", "on_validation_epoch_end", "on_test_epoch_end",
    "on_save_checkpoint", "on_load_checkpoint",
)  # fmt: skip
"""Hooks with a part in each fit; Lightning's own are empty, and a subclass may well forget them."""


def check_hooks(subclass: type, base: type) -> None:
    """Check that hooks of a subclass call those that they replace.

    Args:
        subclass: of the module.
        base: the module's class, with the hooks of `NEEDED_HOOKS`.

    Raises:
        UserError: for the first that does not.
    """
    for name in NEEDED_HOOKS:
        hook = getattr(subclass, name)
        code = getattr(unwrap(hook), "__code__", None)  # none of what is no function, such as a stand-in in a test
        if code and hook is not getattr(base, name) and name not in code.co_names:
            raise UserError(
                f"{subclass.__name__}.{name} does not call the one that it replaces, which has a part in each fit",
                remedy=f"call super().{name}(…) in it",
            )


def check_trained(module: LightningModule, adapter: Mapping[str, torch.Tensor]) -> None:
    """Check that the adapter's weights are trained, in fp32, and no others, which no checkpoint would hold.

    Args:
        module: module with its model.
        adapter: the adapter's weights, by name.

    Raises:
        UserError: they are not.
    """
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    if not trained:
        raise UserError("no weight is trained, for the module was frozen", option="model", remedy="make it anew")
    for name, value in trained.items():
        if name not in adapter:
            problem = f"{name} would be trained beside the adapter, and never saved"
            raise UserError(problem, option="model", remedy="freeze it (requires_grad=False), or train it elsewhere")
        if value.dtype != torch.float32:
            problem = f"expected an adapter in fp32, got {dtype_name(value.dtype)}"
            raise UserError(problem, option="model", remedy="leave .half() and its kin out: trainer.precision says it")


def refuse_kinds(given: Sequence[Any], option: str, taken: Mapping[Any, str]) -> None:
    """Check that none of some callbacks or plugins is of a kind that may not be given.

    Args:
        given: callbacks or plugins.
        option: option that they were given to, for messages.
        taken: the kinds, with what is expected instead of each.

    Raises:
        UserError: for the first that is.
    """
    for made in (one if isinstance(one, type) else type(one) for one in given):
        for kind, expected in taken.items():
            if issubclass(made, kind):
                raise UserError(f"expected {expected}, got {made.__name__}", option=option, remedy="leave it out")


def check_monitors(trainer: Trainer) -> None:
    """Raises UserError if a callback of ``trainer``, a script's, monitors a figure that a fit does not log.

    Lightning would fail only at the first validation. With user callbacks, which could log figures, it is left to
    Lightning.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    rooms = ("lightning.", "lit_qlora.")
    if any(isinstance(one, LambdaCallback) or not type(one).__module__.startswith(rooms) for one in callbacks):
        return
    rates = any(isinstance(one, LearningRateMonitor) for one in callbacks)
    for callback in callbacks:
        monitored, is_strict = getattr(callback, "monitor", None), getattr(callback, "strict", True)
        own = ("epoch", "step") if isinstance(callback, Checkpoint) else ()
        if is_strict and monitored not in own and not (rates and str(monitored).startswith("lr-")):
            check_monitored(
                callback, [name for name in logged() if trainer.limit_val_batches or name not in held_out()]
            )


def check_monitored(callback: Callback, figures: Sequence[str]) -> None:
    """Check that a callback monitors a figure that there is.

    Args:
        callback: callback that may have a ``monitor``.
        figures: names that there are.

    Raises:
        UserError: it monitors another one.
    """
    monitored = getattr(callback, "monitor", None)
    if isinstance(monitored, str) and monitored not in figures:
        known = [f"one of {', '.join(figures)}"] if figures else ["none"]
        known += ["where trainer.limit_val_batches is 0"] if not {*held_out()} & {*figures} else []
        raise UserError(
            f"{type(callback).__name__} monitors {excerpt(monitored)}, expected {' '.join(known)}",
            option="trainer.callbacks",
        )


def check_batch(batch: Any, num_ids: int) -> None:
    """Check what a DataLoader gives.

    Args:
        batch: expected to be a `Batch` as `collate` makes it.
        num_ids: size of the base's vocabulary.

    Raises:
        UserError: it is none, or has ids that the base lacks.
    """
    remedy = "lit_qlora.data.batching.collate makes one of examples, and DataLoader(…, batch_size=None) leaves it alone"
    if not isinstance(batch, Batch):
        raise UserError(
            f"expected batches of the type lit_qlora.batch.Batch, got {type(batch).__name__}",
            option="dataloaders",
            remedy=f"give a ChatDataModule, or make them: {remedy}",
        )
    if batch.input_ids.dim() != 2 or batch.positions.dim() != 1:
        shape = tuple(batch.input_ids.shape)
        raise UserError(
            f"expected input_ids of [rows, tokens], got {shape}: collated twice", option="dataloaders", remedy=remedy
        )
    if batch.highest_id >= num_ids:
        problem = f"a batch has the id {batch.highest_id:,}, expected ids below {num_ids:,}, the base's vocab_size"
        raise UserError(problem, option="dataloaders", remedy="make its rows with the tokenizer of the base")


def to_record(base: Base, lora: Lora, prompt_format: PromptFormat) -> dict[str, Any]:
    """The record of a checkpoint under `OF`.

    Args:
        base: base that is trained.
        lora: its adapter's options.
        prompt_format: prompt format that it is trained with.
    """
    scaling = {name: getattr(lora, name) for name in SCALING}
    return {"base_fingerprint": fingerprint(base), **scaling, "prompts": prompt_format.record()}


def recorded_format(of: Mapping[str, Any], base: Base, lora: Lora, given: PromptFormat | None) -> PromptFormat:
    """The prompt format of a checkpoint.

    Args:
        of: what it holds under `OF`.
        base: base that is loaded.
        lora: the module's options.
        given: the format of the Trainer's data, if there is a `ChatDataModule`.

    Raises:
        UserError: the checkpoint has another base, scaling or format.
    """
    for name in SCALING:
        now, was = getattr(lora, name), of.get(name)
        if was not in (None, now):
            raise UserError(f"{now}, and the checkpoint has {was}", option=f"model.{name}", remedy=f"give it {was}")
    if not isinstance(of.get("base_fingerprint"), str) or not isinstance(of.get("prompts"), dict):
        raise UserError(f"the checkpoint was altered: its part {OF} is not whole", option="ckpt_path")
    if of["base_fingerprint"] != fingerprint(base):
        raise UserError(
            f"the checkpoint was trained on another base ({short(of['base_fingerprint'])}) than "
            f"{base.name} ({short(fingerprint(base))})",
            option="ckpt_path",
            remedy="give its own as base",
        )
    recorded = from_record(of["prompts"], "the checkpoint", OF)
    for name, value in recorded.options.items():
        if given and value != given.options[name]:
            raise UserError(
                f"{excerpt(given.options[name])}, and the checkpoint was trained with {excerpt(value)}",
                option=f"data.{name}",
                remedy="give the ChatDataModule the same",
            )
    return recorded


def check_resume(checkpoint: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a fit can take optimizer, rates and place in the rows from a checkpoint.

    Args:
        checkpoint: of Lightning's ModelCheckpoint, with its part `OF`.
        now: values of the options that a fit has from there, by name.

    Raises:
        UserError: one of them was changed, or the checkpoint has weights only.
    """
    anew = "or begin anew from its weights: QLoRAModule.load_from_checkpoint(FILE, …)"
    if "optimizer_states" not in checkpoint:
        raise UserError("the checkpoint has weights only", option="ckpt_path", remedy=f"give a whole one, {anew}")
    for name, was in checkpoint[OF].get("kept", {}).items():
        if now.get(name, was) != was:
            is_rows = name == "data.source"
            expected, got = ("the checkpoint's rows", "others") if is_rows else (f"the checkpoint's {was}", now[name])
            problem = f"expected {expected}, with which a fit resumes, got {got}"
            raise UserError(problem, option=name, remedy=f"give it the same, {anew}")


class Files(TorchCheckpointIO):
    """Reads checkpoints as Lightning's, with errors in one line."""

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> Any:
        """Load a checkpoint as Lightning does. Raises UserError as `reading`."""
        with reading(path):
            return super().load_checkpoint(path, *args, **options)


@contextmanager
def reading(checkpoint_path: Any) -> Iterator[None]:
    """A context that reads ``checkpoint_path``. Raises UserError for a run's folder, and for what is no checkpoint."""
    if isinstance(checkpoint_path, str | Path) and Path(checkpoint_path).is_dir():
        raise UserError(
            f"{checkpoint_path} is a folder, and no checkpoint of Lightning's ModelCheckpoint",
            option="ckpt_path",
            remedy=(
                f"a run's adapter is loaded by QLoRAModule(base, adapter=FOLDER), its checkpoints by {COMMAND} fit"
            ),
        )
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        elif isinstance(checkpoint_path, str | Path) and not _is_whole(Path(checkpoint_path)):
            reason = "it is cut short, damaged or of another kind"
        elif isinstance(error, KeyError) and error.args == ("pytorch-lightning_version",):
            reason = f"it has no {error}"
        elif type(error).__name__ == "UnpicklingError":
            reason = "it holds other things than tensors and plain values, which could run code"
        else:
            raise
        problem = f"{checkpoint_path} can't be read as a checkpoint of Lightning's ({reason})"
        raise UserError(problem, option="ckpt_path", remedy="give another one") from error


def _is_whole(file: Path) -> bool:
    """True if ``file`` is a whole zip archive, as torch writes one; for what is no file, such as a URL, unknown."""
    try:
        with ZipFile(file) as archive:
            return archive.testzip() is None
    except (BadZipFile, EOFError):
        return False
    except OSError:
        return True
