"""Owns the guard of updates: losses that are not finite, and steps that a gradient scaler skips.

Stops a run that no longer learns, before it harms the adapter. Knows no data.
"""

import math

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_qlora.arguments import checked_arguments
from lit_qlora.batch import Batch
from lit_qlora.callbacks.record import record
from lit_qlora.callbacks.steps import StepCallback, is_log_step
from lit_qlora.devices.world import any_of
from lit_qlora.errors import UserError
from lit_qlora.model.learning import loss_scale
from lit_qlora.model.optimizer import num_applied

MAX_SCALER_SKIPS = 20
"""Number of skips after which the scale, halved each time from 65,536, is below 1 and not to blame."""


class UpdateGuard(StepCallback):
    """A callback that drops updates whose loss is not finite, and stops the run after too many in a row.

    In fp16 a loss may overflow until the gradient scaler has found its scale: the scaler's skips are counted instead.

    Args:
        max_nonfinite_losses: consecutive steps with such a loss before the run stops; earlier ones are dropped.
    """

    COUNTS = ("nonfinite_in_a_row", "skips_in_a_row", "num_applied")

    @checked_arguments()
    def __init__(self, max_nonfinite_losses: int = 1) -> None:
        self.max_nonfinite_losses = max_nonfinite_losses
        self.nonfinite_in_a_row = 0
        self.skips_in_a_row = 0
        self.num_applied = 0
        self._is_finite: _Flag | None = None
        self._is_here = True
        self._base_is_broken = False
        self._rows: list[int] = []
        self._step_rows: list[int] = []
        """Rows of the last optimizer step."""

    def state_dict(self) -> dict[str, int]:
        """The counts, so that they continue after an interruption."""
        return {name: getattr(self, name) for name in self.COUNTS}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue the counts of the interrupted run."""
        for name in self.COUNTS:
            setattr(self, name, state_dict[name])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record whether the base itself has a finite loss: until an update is applied, the adapter changes nothing."""
        if trainer.state.fn == "fit" and not self.num_applied:
            self._base_is_broken = not math.isfinite(float(trainer.callback_metrics["val/loss"]))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Record the rows, for the message."""
        self._rows += batch.rows
        self._is_here = batch.is_here

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss of each micro-batch that is computed here, without waiting for the device.

        The loss of another device would be known only after the backward that is still running.
        """
        if not self._is_here:
            return
        finite = torch.isfinite(loss.detach())
        self._is_finite = _Flag(finite if self._is_finite is None else self._is_finite.on_device & finite)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Drop the gradients of a step whose loss is not finite.

        Raises UserError after too many consecutive ones.
        """
        self._step_rows, self._rows = self._rows, []
        is_finite, self._is_finite = self._is_finite, None
        if not any_of(is_finite is not None and not is_finite):
            self.nonfinite_in_a_row = 0
            return
        self.nonfinite_in_a_row += 1
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        if self.nonfinite_in_a_row >= self.max_nonfinite_losses and loss_scale(trainer) is None:
            raise UserError(
                f"the loss of step {trainer.global_step + 1} is not finite ({self.nonfinite_in_a_row} "
                f"in a row), with training rows {self._step_rows} ({trainer.precision})",
                remedy=self._remedy(str(trainer.precision)),
            )

    def _remedy(self, precision: str) -> str:
        if self._base_is_broken and not self.num_applied:
            reasons, ways = ["the base is broken"], ["give another copy with --model.base"]
            if precision != "32-true":
                reasons.append("overflows in this precision")
                ways.append("--trainer.precision 32-true")
            return (
                f"nor was the held-out loss, before any update: {', or '.join(reasons)}; "
                f"in a new run (--run NAME), {', or '.join(ways)}"
            )
        return (
            "the update was not applied, and what is saved is sound; look at these rows, leave such steps out, a few "
            f"in a row, with --max_nonfinite_losses {max(4, 2 * self.max_nonfinite_losses)}, with which this run "
            "resumes, or try a lower --model.learning_rate or a longer --model.warmup_ratio in a new run: --run NAME"
        )

    def on_step_end(self, trainer: Trainer, module: object) -> None:
        """Count applied and skipped updates.

        Raises UserError if a gradient scaler keeps skipping.
        """
        applied = num_applied(trainer.optimizers[0])
        self.skips_in_a_row = 0 if applied > self.num_applied else self.skips_in_a_row + 1
        self.num_applied = applied
        if is_log_step(trainer):
            record(trainer, {"updates/applied": applied, "updates/skipped": trainer.global_step - applied})
        if self.skips_in_a_row < MAX_SCALER_SKIPS:
            return
        scale = loss_scale(trainer)  # waits for the device, so not in each step
        if scale is not None:
            raise UserError(
                f"{self.skips_in_a_row} updates in a row were skipped for losses or gradients that "
                f"overflow in fp16, up to step {trainer.global_step} with training rows "
                f"{self._step_rows}, at a scale of {scale:g}",
                remedy="what is saved is sound; try a lower --model.learning_rate or --trainer.precision 32-true, in a "
                "new run: --run NAME",
            )


class _Flag:
    """A boolean of a device, copied to the host as soon as it is computed.

    So a step's update and the next step are started while the backward still runs: waiting for it would leave the
    device idle between two steps.
    """

    def __init__(self, on_device: Tensor) -> None:
        self.on_device = on_device
        self._on_host = on_device.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if on_device.is_cuda else None
        if self._copied:
            self._copied.record()

    def __bool__(self) -> bool:
        """Wait for the copy, but not for later work of the device."""
        if self._copied:
            self._copied.synchronize()
        return bool(self._on_host)
