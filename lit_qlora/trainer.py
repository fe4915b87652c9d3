"""Owns the Trainer and its options: Lightning's own, with this project's defaults and automatic choices.

Knows the device, and nothing of a run.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Checkpoint, ProgressBar, ThroughputMonitor, Timer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO, LayerSync, MixedPrecision
from lightning.pytorch.plugins import Precision as PrecisionPlugin
from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment

from lit_qlora.arguments import checked_arguments
from lit_qlora.devices.asked import (
    GPUS,
    MOST_ON_CPU,
    Precision,
    check_on_cpu,
    check_started,
    check_there,
    check_world,
    no_gpu,
)
from lit_qlora.devices.strategy import Replicas
from lit_qlora.devices.world import world
from lit_qlora.errors import UserError, one_line
from lit_qlora.metrics import held_out
from lit_qlora.model.device import (
    by_bf16,
    capability_words,
    check_kernels,
    choose_precision,
    current_device,
    decides_for_another,
)
from lit_qlora.model.script import CHANGING, check_monitored, refuse_kinds
from lit_qlora.options import OneLineErrors, quoted
from lit_qlora.place import COMMAND
from lit_qlora.ranges import check_ranges
from lit_qlora.signatures import OF_LIGHTNING, classes_for

NOT_OFFERED = {
    "barebones", "check_val_every_n_epoch", "default_root_dir", "enable_autolog_hparams", "enable_checkpointing",
    "enable_model_summary", "fast_dev_run", "limit_predict_batches", "max_time", "min_epochs", "min_steps",
    "model_registry", "num_weights", "num_sanity_val_steps", "overfit_batches", "profiler",
    "reload_dataloaders_every_n_epochs", "strategy", "sync_batchnorm", "use_distributed_sampler",
}  # fmt: skip
"""Options of Lightning's Trainer that this project sets by itself, or that would have no effect."""


NO_CALLBACKS: Mapping[type, str] = {
    Checkpoint: "none that writes checkpoints (save_every_steps and save_every_minutes say when one is written)",
    ProgressBar: "no other progress bar (trainer.enable_progress_bar says whether there is one)",
    **CHANGING,
    ThroughputMonitor: "none that measures speed (speed/tokens_per_second is recorded, and padding is not counted)",
    BasePredictionWriter: f"none that writes predictions ({COMMAND} predict does)",
}
"""Lightning's callbacks that change the training, or duplicate this project's; and their replacements."""

NO_PLUGINS: Mapping[type, str] = {
    CheckpointIO: "none that writes checkpoints (a run resumes only from this project's own)",
    PrecisionPlugin: "none for the precision (trainer.precision says it)",
    LayerSync: "none that changes layers (the base has none that several devices keep in step)",
    SLURMEnvironment: "none of SLURM's (one process trains, and SIGUSR1 saves and requeues)",
}


OPTION_OF_CLASS: Mapping[type, str] = {
    Callback: "trainer.callbacks",
    Logger: "trainer.logger",
    ClusterEnvironment: "trainer.plugins",
}
"""The kinds of classes that the user may give, and the option for each."""

IN_RUN = "the run's folder"
"""The ``save_dir`` of a logger that is given none; which folder it is may be chosen after the options are read."""


class RunParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser, with errors in one line, and without options that have no effect."""

    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> list[str]:
        """Add arguments as LightningCLI does, without the Trainer's options that are not offered."""
        if not issubclass(lightning_class, Trainer):
            return super().add_lightning_class_args(lightning_class, nested_key, subclass_mode, required)
        return self.add_class_arguments(
            lightning_class, nested_key, fail_untyped=False, instantiate=False, sub_configs=True, skip=NOT_OFFERED
        )

    def add_class_arguments(self, class_type: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Add arguments as jsonargparse does; Lightning's file loggers need no ``save_dir``, see `IN_RUN`.

        Raises UserError for a callback or a plugin that may not be given, before it asks for its arguments.
        """
        try:
            refuse_kinds([class_type], "trainer.callbacks", NO_CALLBACKS)
            if class_type not in NO_PLUGINS:  # the option's own types, made for whichever class is given
                refuse_kinds([class_type], "trainer.plugins", NO_PLUGINS)
        except UserError as error:
            raise quoted(error) from error
        self.made = class_type.__name__
        added: list[str] = super().add_class_arguments(class_type, *args, **kwargs)
        writes = isinstance(class_type, type) and issubclass(class_type, CSVLogger | TensorBoardLogger)
        if writes and "save_dir" in added:  # a subclass may choose its own
            self.set_defaults({"save_dir": IN_RUN})
        return added

    def classes_for(self, option: str) -> Collection[str]:
        """Lightning's own."""
        return classes_for(option) if option in OF_LIGHTNING else ()

    def instantiate_classes(self, cfg: Any, **kwargs: Any) -> Any:
        """Create classes as jsonargparse does. Raises UserError if one of the user's own, such as a logger, fails."""
        failed: list[UserError] = []

        def make(kind: type, *given: Any, option: str, **more: Any) -> Any:
            try:
                return kind(*given, **more)
            except Exception as error:
                failed.append(UserError(f"{kind.__name__} can't be made: {one_line(error)}", option=option))
                raise

        makers = [(partial(make, option=option), kind, True) for kind, option in OPTION_OF_CLASS.items()]
        try:
            return super().instantiate_classes(cfg, instantiators=makers, **kwargs)
        except ValueError as error:  # of all types that the option may have
            if failed:
                raise failed[0] from error
            raise


class QLoRATrainer(Trainer):
    """Lightning's Trainer with the precision chosen by the device, and evaluation counted over epochs.

    Args:
        precision: auto uses bf16 from compute capability 8.0 on, fp16 below; on a CPU bf16 if it pays off, else fp32.
        max_epochs: number of epochs, unless max_steps ends the run earlier.
        val_check_interval: micro-batches between validations, counted over epochs; or a share of an epoch.
        devices: GPUs of this machine, with one process each: a number, auto for all, or a list of their numbers; on a
            CPU, a number of processes, to try it out. Changes how fast is learned, not what.
        num_nodes: number of machines, on each of which torchrun or srun starts the command.
        gradient_clip_val: highest norm of the gradients.
        gradient_clip_algorithm: what is limited to gradient_clip_val: norm (the default) or value.
        log_every_n_steps: optimizer steps between records of the figures.
        accumulate_grad_batches: micro-batches per optimizer step, over all devices.
        max_steps: optimizer steps after which the run ends; -1: by epochs alone.
        limit_train_batches: micro-batches per epoch, or a share of them.
        limit_val_batches: the same per validation; 0: none.
        limit_test_batches: the same per test.
        accelerator: auto (a GPU if there is one), cpu, gpu or cuda.
        logger: one or more loggers, Lightning's or your own, besides the run's record; false: no TensorBoard.
        callbacks: callbacks of your own, which may observe everything and change nothing.
        enable_progress_bar: false: neither a progress bar nor lines in its place.
        deterministic: true: a GPU's results are the same to the last bit each time; slower.
        benchmark: whether cuDNN tries several algorithms.
        inference_mode: false: validations under no_grad.
        detect_anomaly: true: name the operation whose gradient is not finite; much slower.
        plugins: Lightning plugins of your own.
        num_weights: number of weights of the base, on which the precision on a CPU depends.

    Raises:
        UserError: for devices that are not there, or can't compute in the precision.
    """

    @checked_arguments("trainer")
    def __init__(
        self,
        *,
        precision: Precision = "auto",
        max_epochs: int = 3,
        val_check_interval: int | float = 500,
        devices: int | str | list[int] = 1,
        num_nodes: int = 1,
        gradient_clip_val: float | None = 1.0,
        gradient_clip_algorithm: Literal["norm", "value"] | None = None,
        log_every_n_steps: int = 25,
        accumulate_grad_batches: int = 1,
        max_steps: int = -1,
        accelerator: Literal["auto", "cpu", "gpu", "cuda"] = "auto",
        # Not Lightning's Optional[Union[int, float]]: typing may hand out an equal one that says float first.
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        deterministic: bool | Literal["warn"] | None = None,
        num_weights: int = 0,
        **kwargs: Any,
    ) -> None:
        ours = ("self", "num_nodes", "num_weights", "kwargs", "__class__")
        kwargs |= {name: value for name, value in locals().items() if name not in (*ours, "ours")}
        device = current_device(accelerator)
        if accelerator in GPUS and not device.is_gpu:
            raise no_gpu(accelerator)
        check_kernels(device)
        gpus, here = find_gpus(devices, num_nodes, accelerator), world()
        self.num_processes = count_processes(devices, num_nodes, accelerator)
        """Number of processes that share the micro-batches of a step."""
        if device.is_here and here.size == 1:
            check_started(devices, len(gpus), num_nodes)
        chosen, self.precision_reason = choose_precision(precision, device, num_weights)
        kwargs |= {
            # None counts on from epoch to epoch; a share is one of an epoch.
            "check_val_every_n_epoch": 1 if isinstance(val_check_interval, float) else None,
            "num_sanity_val_steps": 0,  # the whole held-out set is scored before the first step
            "enable_checkpointing": False,  # ours falls on the edge between steps, and needs no pickle
            "enable_model_summary": False,  # it counts two 4-bit weights as one
            "precision": chosen,
        }
        if here.size > 1:  # to Lightning, one process has one device
            gpu = gpus[here.local_rank]
            kwargs |= {"devices": 1 if gpu is None else [gpu], "strategy": Replicas(), "use_distributed_sampler": False}
        if not device.is_here:  # Lightning's part is made for this machine, and never runs
            kwargs |= {"accelerator": "auto", "devices": 1}
            if chosen == "16-mixed":  # in whose place Lightning would take bf16 on a CPU
                plugin = MixedPrecision("16-mixed", "cpu")
                kwargs |= {"precision": None, "plugins": [*(kwargs.get("plugins") or []), plugin]}
        super().__init__(**kwargs)

    def plan(self) -> None:
        """Report what a fit with these options needs: memory, time, disk. Needs no GPU."""

    def inspect(self) -> None:
        """Report what a fit with these options learns: rows, tokens, faults. Needs no GPU and no weights."""


def find_gpus(devices: int | str | list[int], num_nodes: int, accelerator: str) -> list[int | None]:
    """The GPU of each process of this machine, by its number; None for one on a CPU, or a GPU of another machine.

    Args:
        devices: number of processes per machine, auto, or the GPUs' numbers.
        num_nodes: number of machines.
        accelerator: cpu takes no GPU.

    Raises:
        UserError: they are not there, or other processes were started.
    """
    check_ranges({"trainer.num_nodes": num_nodes, "trainer.devices": devices})
    if isinstance(devices, str) and devices != "auto":
        devices = int(devices)
    here, is_here = world(), not decides_for_another()
    num_gpus = 0 if accelerator == "cpu" or not is_here else torch.cuda.device_count()
    if here.size > 1 and devices == 1 and num_nodes == 1:  # by torchrun or srun, which were given how many
        devices, num_nodes = here.local_size, here.size // here.local_size
    if isinstance(devices, list) and is_here and not num_gpus:
        check_on_cpu(devices, accelerator)
    if devices == "auto":
        devices = max(num_gpus, 1)
    numbers = [*range(devices)] if isinstance(devices, int) else [*devices]  # type: ignore[misc]
    check_world(len(numbers), num_nodes)
    if not is_here:
        return [None] * len(numbers)
    if not num_gpus:
        check_on_cpu(len(numbers), accelerator, max(MOST_ON_CPU, here.local_size))
        return [None] * len(numbers)
    check_there(numbers, num_gpus)
    return [*numbers] if num_gpus > 1 or here.size == 1 else [0] * len(numbers)  # srun shows each its own alone


def check_kinds(gpus: Sequence[int | None], precision: str) -> None:
    """Check that the GPUs of one machine compute in the same precision.

    Args:
        gpus: their numbers; None for a process without one.
        precision: as ``trainer.precision``.

    Raises:
        UserError: some of them have bf16, and others have not.
    """
    with_bf16, others = by_bf16(gpu for gpu in gpus if gpu is not None)
    if not with_bf16 or not others or precision in ("16-mixed", "32-true"):
        return
    low, high = ((gpu, capability_words(torch.cuda.get_device_capability(gpu))) for gpu in (others[0], with_bf16[0]))
    like = max(with_bf16, others, key=len)
    raise UserError(
        f"GPU {low[0]} is of {low[1]}, GPU {high[0]} of {high[1]}: bf16 on one alone",
        option="trainer.devices",
        remedy=f"give --trainer.precision 16-mixed, or --trainer.devices {like if len(like) > 1 else 1}",
    )


def count_processes(devices: int | str | list[int], num_nodes: int, accelerator: str) -> int:
    """The processes that a run has, or is to have.

    Args:
        devices: as for `find_gpus`.
        num_nodes: as for `find_gpus`.
        accelerator: as for `find_gpus`.

    Raises:
        UserError: as `find_gpus`.
    """
    gpus = find_gpus(devices, num_nodes, accelerator)
    return len(gpus) * num_nodes if world().size == 1 else world().size


def own_callbacks(given: Callback | list[Callback] | None, validates: bool = True) -> list[Callback]:
    """The user's own callbacks, one or several, which may only observe.

    Args:
        given: value of trainer.callbacks.
        validates: True if the run has validations, whose figures a callback may monitor.

    Raises:
        UserError: one changes weights, steps, rates or data, duplicates this project, or monitors an unknown figure.
    """
    callbacks = as_list(given)
    refuse_kinds(callbacks, "trainer.callbacks", NO_CALLBACKS)
    for callback in callbacks:
        if isinstance(callback, Timer) and callback.time_remaining() is not None:
            raise UserError(
                f"{type(callback).__name__} would end the run unsaved",
                option="trainer.callbacks",
                remedy="leave it out, and give --max_time",
            )
        check_monitored(callback, [*held_out()] if validates else ())
    return callbacks


def own_plugins(given: Any) -> list[Any]:
    """The user's own plugins, and that of a single process.

    Args:
        given: value of trainer.plugins: one, a list, or None.

    Raises:
        UserError: one duplicates this project.
    """
    plugins = [*as_list(given)]
    refuse_kinds(plugins, "trainer.plugins", NO_PLUGINS)
    if world().size > 1:  # its strategy says which process this is
        return plugins
    if not any(isinstance(one, ClusterEnvironment) for one in plugins):
        plugins.append(LightningEnvironment())  # where Lightning finds SLURM, it would save and requeue by itself
    return plugins


def as_list(given: Any) -> list[Any]:
    """The value ``given`` to an option of one or several, as a list, empty for None."""
    return given if isinstance(given, list) else [] if given is None else [given]
