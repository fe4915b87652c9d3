"""Owns how micro-batches become gradients: some of a step together, each at once or, after memory has run out, in less.

The base class of `QLoRAModule`, above `hidden.py`, which computes the loss. Knows no model.
"""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_qlora.batch import Batch, split_batch
from lit_qlora.devices.strategy import ends_step
from lit_qlora.devices.world import note_at_agreement
from lit_qlora.errors import OutOfRoomError, UserError
from lit_qlora.model.device import chance
from lit_qlora.model.hidden import ComputesSums, Sums, Waiting
from lit_qlora.model.sums import AnswerSums
from lit_qlora.wording import number_of


def loss_scale(trainer: Any) -> float | None:
    """The factor on the loss of a ``trainer`` in fp16; None in other precisions."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler else None


class LearnsInParts(ComputesSums):
    """A module that retries a micro-batch in less memory when it runs out, with the same loss and gradients."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.together = 1
        """Number of micro-batches of a step, at most, that go through the layers together, to the same gradients."""
        self.keeps_pace = False
        """True if devices fetch the base from each other, layer by layer, and so must all do the same."""
        self.parts = 1
        """Number of parts of a micro-batch; 2 after memory has run out."""
        self._waiting: list[Waiting] = []
        """Micro-batches of the current step that will be learned together with a later one."""
        self._learning: list[Waiting] = []
        """Micro-batches that are learned together with the current one, itself included."""
        self._loss: tuple[list[Tensor], Tensor] | None = None
        """Losses of the micro-batches of `_learning`, and the detached stand-in for them, which holds no graph."""
        self._learned: tuple[list[tuple[torch.nn.Parameter, Tensor]], Tensor] | None = None
        """Gradients, if made in `training_step`, and the gradient of the stand-in that they were made for."""
        self._chance: Callable[[], None] = lambda: None
        """A function that makes the current micro-batch draw the same random numbers again."""
        self._num_answers: int | None = None
        """Answer tokens of the current step so far; None where its first micro-batch was not seen."""
        self._earlier: dict[int, Tensor] = {}
        """Gradients that were set aside, by the `id` of their weight, while micro-batches are learned together."""

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The sum of the token losses over the answer tokens of the whole optimizer step.

        Args:
            batch: a micro-batch, padded or packed.
            batch_idx: its number in the epoch, over all devices.

        Returns:
            ``loss``, a scalar to go backward from; and ``loss_sum`` in nats, ``num_correct`` and ``num_answers``, over
            the micro-batches that were learned with this one, and of ``each``.
        """
        self._loss, self._learned, is_short = None, None, False
        is_first, most = batch_idx % self.trainer.accumulate_grad_batches == 0, self._most_together
        if is_first:
            self._waiting.clear()
        if batch.is_here:
            self._chance = chance(self.device)
            self._waiting.append(Waiting(batch, self.draw() if most > 1 else None))
        else:
            self._prepare(batch)
        if len(self._waiting) < most and not ends_step(self.trainer, batch_idx):
            return self._figures([])
        self._learning, self._waiting = self._waiting, []
        found: list[Sums] | None = None
        if self.parts == 1:
            try:
                found = self._sums_of(self._learning, self._earlier)
            except torch.OutOfMemoryError:
                is_short = True  # see `backward`
        if is_short:
            self._make_room()
        if found is None:
            found = self._learn_ahead(is_first)
        losses = [self._loss_of(loss_sum, batch) for loss_sum, _, _ in found]
        figures = self._figures(found)
        if losses:
            figures["loss"] = sum(loss.detach() for loss in losses)
            self._loss = losses, figures["loss"].requires_grad_()
        return figures

    def check_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the answer tokens of a step, and check them at its end.

        Args:
            batch: its next micro-batch.
            batch_idx: the number of that in the epoch, over all devices.

        Raises:
            UserError: the step has another number than its micro-batches were made for.
        """
        accumulate = self.trainer.accumulate_grad_batches
        if batch_idx % accumulate == 0:
            self._num_answers = 0
        if self._num_answers is None or batch.device >= 0:  # resumed within a step, or some are on other devices
            return
        self._num_answers += len(batch.targets)
        if ends_step(self.trainer, batch_idx) and self._num_answers != batch.step_answer_tokens:
            raise UserError(
                f"made for optimizer steps of {number_of(batch.step_answer_tokens, 'answer tokens')}, and with "
                f"trainer.accumulate_grad_batches {accumulate} this one has {self._num_answers:,}",
                option="dataloaders",
                remedy="give the Trainer the ChatDataModule itself, or make them with the number of the whole step",
            )

    def _prepare(self, batch: Batch) -> None:
        is_short = False
        try:
            self.prepare(batch)
        except torch.OutOfMemoryError:
            is_short = True  # see `backward`
        if is_short:
            self._learning = [Waiting(batch, None)]
            self._make_room()

    @property
    def _most_together(self) -> int:
        return self.together if self.parts == 1 and self.can_learn_together else 1

    def _sums_of(self, waiting: Sequence[Waiting], earlier: dict[int, Tensor]) -> list[Sums]:
        """The results of `summed_losses` for micro-batches whose seeds were not drawn one by one."""
        if not waiting or waiting[0].drawn is None:
            return [self.summed_loss(one.batch) for one in waiting]
        return self.summed_losses(waiting, earlier)

    def _loss_of(self, loss_sum: Tensor, batch: Batch) -> Tensor:
        """A micro-batch's part of the loss of its step, from the sum over its own answer tokens.

        Lightning divides by the micro-batches of a step: undone here, for the one right denominator is already in the
        batch. Over devices, gradients are summed.
        """
        return loss_sum * (self.trainer.accumulate_grad_batches / max(batch.step_answer_tokens, 1))

    def _figures(self, found: Sequence[Sums]) -> dict[str, Any]:
        """The result of a training step: sums over its micro-batches, and of ``each``, so that these add up exactly."""
        names = AnswerSums.NAMES
        each: list[dict[str, Any]] = [dict(zip(names, (loss.detach(), *rest), strict=True)) for loss, *rest in found]
        nothing = dict(zip(names, self.nothing(), strict=True))
        total = {name: sum(one[name] for one in each) if each else nothing[name] for name in names}
        return {"loss": nothing["loss_sum"], **total, "each": each}

    def nothing(self) -> Sums:
        """The sums over no token: of a micro-batch that waits, or that another device computes."""
        return torch.zeros((), device=self.device), torch.zeros((), device=self.device), 0

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients of micro-batches; in parts if memory runs out.

        Args:
            loss: of `training_step`, a scalar, which a subclass may have scaled, added to, or replaced.
            *args: as torch's ``Tensor.backward``.
            **kwargs: as torch's ``Tensor.backward``.

        Raises:
            OutOfRoomError: memory runs out, and nothing is left to do.
        """
        if not loss.requires_grad:  # nothing to be learned yet
            return
        (whole, stand_in), self._loss = self._loss or ([], loss.detach()), None
        learned, self._learned = self._learned, None
        loss.backward(*args, **kwargs)
        gradient = stand_in.grad
        if gradient is None:
            return
        if learned:
            gradients, expected = learned
            for _, own in gradients:
                own.mul_(gradient / expected)
            self._take_back(gradients, adds=True)
            return
        earlier, is_short = self._set_aside(), False
        are_together = self._most_together > 1
        if are_together:
            self._earlier.update((id(parameter), value) for parameter, value in earlier)
        try:
            torch.autograd.backward(whole, [gradient] * len(whole))
        except torch.OutOfMemoryError:
            is_short = True  # outside of the handler, whose frames hold what the failed attempt has kept
        del whole
        self._earlier.clear()
        if is_short or not are_together:  # else the new ones hold the earlier ones
            self._take_back(earlier, adds=self.uses_cuda_graphs or not is_short)
        if is_short:
            self._make_room()
            self._learn_in_parts(gradient)

    def _learn_ahead(self, is_first: bool) -> list[Sums]:
        """Compute gradients as `_learn_in_parts`, for the coming `backward`, which knows the loss's and adds them."""
        self.uses_cuda_graphs = False  # asked for again by a second fit: recorded gradients can't be set aside
        earlier = self._set_aside()
        if is_first:  # of the last step: they are about to be zeroed, and until then take memory
            earlier.clear()
        scale = loss_scale(self.trainer)
        whole = torch.full((), 1.0 if scale is None else scale, device=self.device)
        expected = whole / self.trainer.accumulate_grad_batches
        found = self._learn_in_parts(expected)
        self._learned = self._set_aside(), expected
        self._take_back(earlier, adds=False)
        return found

    def _learn_in_parts(self, gradient: Tensor) -> list[Sums]:
        """Add the gradients of each micro-batch part by part, in less memory, with the same result; return its sums.

        ``gradient`` is that of the loss that `training_step` returns.
        """
        found: list[Sums] = []
        while len(found) < len(self._learning):
            earlier = self._set_aside()
            sums = self._try_in_parts(self._learning[len(found)], gradient)
            self._take_back(earlier, adds=sums is not None)
            if sums is None:
                self._make_room()
            else:
                found.append(sums)
        return found

    def _try_in_parts(self, one: Waiting, gradient: Tensor) -> Sums | None:
        """The sums of a micro-batch, whose gradients are added; None if memory runs out."""
        parts, found = [one], []
        if self.parts > 1:
            parts = [Waiting(part, one.drawn) for part in split_batch(one.batch)]
        try:
            for number, part in enumerate(parts):
                if number == 0 or not self.slow_because:  # our layers drop of a part what they drop of it in the whole
                    self._chance()
                with self.trainer.precision_plugin.forward_context():
                    ((loss_sum, num_correct, num_answers),) = self._sums_of([part], {})
                self._loss_of(loss_sum, one.batch).backward(gradient)
                found.append((loss_sum.detach(), num_correct, num_answers))
                del loss_sum  # and what it has kept, before the next part goes forward
        except torch.OutOfMemoryError:
            return None
        sums: Any = [sum(values) for values in zip(*found, strict=True)]
        return sums[0], sums[1], sums[2]

    def _make_room(self) -> None:
        """Take less memory: without recordings; then with one micro-batch at a time; then with recomputation in all
        layers, and weights that are dequantised for each; then with micro-batches in halves.

        Raises OutOfRoomError if nothing is left to do, or other devices would wait for what this one leaves out.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # what was coming from the host must not arrive in memory that is used anew
        batch = max((one.batch for one in self._learning), key=lambda batch: batch.input_ids.numel())
        rows, tokens = len(batch.rows), batch.input_ids.numel()
        what = f"out of memory at a micro-batch of {number_of(rows, 'conversations')}, {tokens:,} tokens with padding"
        if self.keeps_pace:
            raise OutOfRoomError(f"{what}, and with model.shard no device can take another way than the others", rows)
        if self.uses_cuda_graphs:
            self.uses_cuda_graphs = False
            self.release()
            done = "kernels are no longer recorded"
        elif self._most_together > 1:
            self.together = 1
            done = "each micro-batch is learned by itself from now on"
        elif self.kept_layers or self.dequantised_layers:
            self._recompute()
            done = "every layer recomputes its activations from now on"
        elif self.parts == 1 and rows > 1:
            self.parts = 2
            # transformers' layers draw new dropout masks for each half
            same = "up to its dropout, " if self.slow_because else ""
            done = f"each micro-batch is split into halves from now on; {same}the loss of a step is the same"
        else:
            raise OutOfRoomError(f"{what}, after all that could be done in a run", rows)
        note_at_agreement(f"{what}: {done}")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _set_aside(self) -> list[tuple[torch.nn.Parameter, Tensor]]:
        """Set aside the gradients of earlier micro-batches of a step, so that this one's can be computed twice.

        Not needed with recordings: they add gradients last in a backward, without memory, so that a failed one has
        changed none.
        """
        parameters = [] if self.uses_cuda_graphs else self.parameters()
        earlier = [(value, value.grad) for value in parameters if value.grad is not None]
        for parameter, _ in earlier:
            parameter.grad = None
        return earlier

    def _take_back(self, earlier: list[tuple[torch.nn.Parameter, Tensor]], adds: bool) -> None:
        """Restore the gradients that were set aside; plus those made meanwhile, if ``adds``."""
        for parameter in () if adds else self.parameters():
            parameter.grad = None
        for parameter, gradient in earlier:
            if parameter.grad is not None:
                gradient.add_(parameter.grad)
            parameter.grad = gradient
