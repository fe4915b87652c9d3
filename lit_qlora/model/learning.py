"""Owns how a micro-batch becomes gradients: at once or, after memory has run out, in less memory.

The base class of `QLoRAModule`, which computes the loss. Knows no model.
"""

import gc
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_qlora.batch import Batch, split_batch
from lit_qlora.errors import OutOfRoomError, UserError


class LearnsInParts(LightningModule):
    """A module that retries a micro-batch twice when memory runs out, with the same loss and gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.kept_layers = 0
        """Number of layers that keep the results of their matrix products for backward."""
        self.hosted_layers = 0
        """Number of these, the first ones, that send a part of them to the host in between."""
        self.uses_cuda_graphs = False
        """True if the layers' kernels are replayed from recordings, which take memory of their own."""
        self.parts = 1
        """Number of parts of a micro-batch; 2 after memory has run out."""
        self._batch: Batch
        self._loss: tuple[Tensor, Tensor] | None = None
        """The loss of the current micro-batch, and its detached stand-in for others, which holds no graph."""
        self._is_learned = False

    def summed_loss(self, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """Summed loss of a batch's answer tokens in nats, count of those that were the likeliest, and their number."""
        raise AssertionError("the subclass computes it")

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The sum of the token losses over the answer tokens of the whole optimizer step.

        Raises UserError for a batch that is no `Batch`, from another DataLoader.
        """
        check_batch(batch)
        self._batch, self._loss, found, is_short = batch, None, None, False
        if self.parts == 1 and batch.is_here:
            try:
                found = self.summed_loss(batch)
            except torch.OutOfMemoryError:
                is_short = True
        if is_short:
            self._make_room(batch)
        self._is_learned = found is None
        if found is None:
            if batch_idx % self.trainer.accumulate_grad_batches == 0:  # the first of a step
                for parameter in self.parameters():
                    parameter.grad = None
            found = self._learn_in_parts(batch) if batch.is_here else self.nothing()
        loss_sum, num_correct, num_answers = found
        # Lightning divides by the micro-batches of a step: undone here, for the one right denominator is already in
        # the batch. Over devices, gradients are summed.
        shares = self.trainer.accumulate_grad_batches
        loss = loss_sum * (shares / max(batch.step_answer_tokens, 1))
        stand_in = loss.detach()
        if not self._is_learned:
            self._loss = loss, stand_in.requires_grad_()
        return {
            "loss": stand_in,
            "loss_sum": loss_sum.detach(),
            "num_correct": num_correct,
            "num_answers": num_answers,
        }

    def nothing(self) -> tuple[Tensor, Tensor, int]:
        """The sums over a batch that another device computes."""
        return torch.zeros((), device=self.device), torch.zeros((), device=self.device), 0

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """As Lightning's, which follows `training_step`: gradients that were made there stay."""
        if not self._is_learned:
            optimizer.zero_grad()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients of a micro-batch; in parts if memory runs out."""
        if self._is_learned:
            return
        assert self._loss is not None, "each backward belongs to the training step before it"
        (whole, stand_in), self._loss = self._loss, None
        (gradient,) = torch.autograd.grad(loss, stand_in)
        earlier, is_short = self._set_aside(), False
        try:
            whole.backward(gradient)  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError:
            is_short = True  # outside of the handler, whose frames hold what the failed attempt has kept
        del whole
        self._take_back(earlier, adds=self.uses_cuda_graphs or not is_short)
        if is_short:
            self._make_room(self._batch)
            self._learn_in_parts(self._batch)

    def _learn_in_parts(self, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """Add a micro-batch's gradients part by part, in less memory, with the same result; return its sums."""
        while True:
            earlier = self._set_aside()
            sums = self._try_in_parts(batch)
            self._take_back(earlier, adds=sums is not None)
            if sums is not None:
                return sums
            self._make_room(batch)

    def _try_in_parts(self, batch: Batch) -> tuple[Tensor, Tensor, int] | None:
        """As `_learn_in_parts`; None if memory runs out."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        factor = 1 / max(batch.step_answer_tokens, 1) * (scaler.get_scale() if scaler else 1.0)
        found = []
        try:
            for part in split_batch(batch) if self.parts > 1 else [batch]:
                with self.trainer.precision_plugin.forward_context():
                    loss_sum, num_correct, num_answers = self.summed_loss(part)
                (loss_sum * factor).backward()
                found.append((loss_sum.detach(), num_correct, num_answers))
                del loss_sum  # and what it has kept, before the next part goes forward
        except torch.OutOfMemoryError:
            return None
        sums: Any = [sum(values) for values in zip(*found, strict=True)]
        return sums[0], sums[1], sums[2]

    def _make_room(self, batch: Batch) -> None:
        """Take less memory: without recordings; then with recomputation in all layers; then with micro-batches in
        halves.

        Raises OutOfRoomError if nothing is left to do.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # what was coming from the host must not arrive in memory that is used anew
        rows, tokens = len(batch.rows), batch.input_ids.numel()
        what = f"out of memory at a micro-batch of {rows} conversations, {tokens:,} tokens with padding"
        if self.uses_cuda_graphs:
            self.uses_cuda_graphs = False
            self._release()
            done = "kernels are no longer recorded"
        elif self.kept_layers:
            self._recompute()
            done = "every layer recomputes its activations from now on"
        elif self.parts == 1 and rows > 1:
            self.parts = 2
            done = "each micro-batch is split into halves from now on; the loss of a step is the same"
        else:
            raise OutOfRoomError(f"{what}, after all that could be done in a run", rows)
        self.trainer.print(f"{what}: {done}")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _recompute(self) -> None:
        """Make each layer keep its input only."""
        self.kept_layers = self.hosted_layers = 0

    def _release(self) -> None:
        """Free the recordings, which the subclass has."""

    def _set_aside(self) -> list[tuple[torch.nn.Parameter, Tensor]]:
        """Set aside the gradients of earlier micro-batches of a step, so that this one's can be computed twice.

        Not needed with recordings: they add gradients last in a backward, without memory, so that a failed one has
        changed none.
        """
        earlier = (
            []
            if self.uses_cuda_graphs
            else [(value, value.grad) for value in self.parameters() if value.grad is not None]
        )
        for parameter, _ in earlier:
            parameter.grad = None
        return earlier

    def _take_back(self, earlier: list[tuple[torch.nn.Parameter, Tensor]], adds: bool) -> None:
        """Restore them; plus those made meanwhile if it ``adds``."""
        for parameter in () if adds else self.parameters():
            parameter.grad = None
        for parameter, gradient in earlier:
            if parameter.grad is not None:
                gradient.add_(parameter.grad)
            parameter.grad = gradient


def check_batch(batch: Any) -> None:
    """Raises UserError unless ``batch`` is a `Batch` as `collate` makes it."""
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
