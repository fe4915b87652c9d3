"""Owns the training of one adapter by several processes, as a Lightning strategy: each has the whole base.

Gradients of the adapter are summed once per optimizer step, behind its last micro-batch. Lightning's own DDPStrategy is
not used: it averages what autograd gathers in one backward, and gradients here are gathered in other ways as well, by a
recording or in parts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, distributed

from lit_qlora.devices.world import barrier, by_first, from_first, gathered, peers, world
from lit_qlora.errors import UserError

SAME = 1e-3
"""Largest relative difference of the norms of the processes' adapters: cards of one kind give the same bits."""


class OneOfSeveral(TorchElasticEnvironment):
    """Reports to Lightning which process this is, by torchrun's names, whoever started it (`starting.take_place`)."""

    def node_rank(self) -> int:
        """The number of this machine."""
        return world().rank // world().local_size


class Replicas(ParallelStrategy):
    """Each process has the base and the adapter on its one device; what is learned is what one process would learn."""

    def __init__(self) -> None:
        super().__init__(cluster_environment=OneOfSeveral())

    @property
    def root_device(self) -> torch.device:
        """The device of this process."""
        assert self.parallel_devices is not None
        return self.parallel_devices[0]

    def set_world_ranks(self) -> None:
        """Have Lightning's messages come from the first process alone."""
        rank_zero_only.rank = world().rank  # type: ignore[attr-defined]

    def model_to_device(self) -> None:
        """Move the module."""
        assert self.model is not None
        self.model.to(self.root_device)

    def setup(self, trainer: Trainer) -> None:
        """Set up as Lightning does, then start every process with the adapter of the first."""
        super().setup(trainer)
        weights = [value.detach() for value in self._trained()]
        self._through_one_buffer(weights, lambda buffer: distributed.broadcast(buffer, 0))

    def post_backward(self, closure_loss: Tensor) -> None:
        """Sum the gradients of all processes, behind the last micro-batch of an optimizer step."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if not ends_step(trainer, trainer.fit_loop.batch_idx):
            return
        for parameter in self._trained():
            if parameter.grad is None:  # no micro-batch of this step was dealt to this process
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._trained() if parameter.grad is not None]
        self._through_one_buffer(gradients, distributed.all_reduce)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint in the first process; if that fails, it fails in all.

        Args:
            checkpoint: the same in all processes.
            filepath: as the Trainer's checkpoint plugin takes it.
            storage_options: not used.

        Raises:
            UserError: the processes' adapters are not the same.
        """
        weights = torch.stack([value.detach().double().norm() for value in self._trained()])
        norm = float(weights.norm())
        norms = gathered(norm)
        if max(norms) - min(norms) > SAME * max(norms):
            raise UserError(
                f"the processes' adapters differ (norms {norms}): a fault of this project, nothing is saved"
            )
        by_first(lambda: self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint in the first process, for all: other machines need not have it."""
        torch.cuda.empty_cache()
        return by_first(lambda: self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only))

    def barrier(self, name: str | None = None) -> None:
        """Return once every process has come here."""
        barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object of the first process, or of number ``src``."""
        return from_first(obj) if src == 0 else gathered(obj)[src]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """A tensor reduced over all processes.

        Args:
            tensor: the same shape in all; what is no tensor stays as it is.
            group: not used.
            reduce_op: mean, avg, sum, or an operator of torch.distributed.
        """
        if not isinstance(tensor, Tensor):
            return tensor
        is_mean = str(reduce_op).lower() in ("mean", "avg")
        found = tensor.double() if is_mean else tensor.clone()
        with peers():
            distributed.all_reduce(found, distributed.ReduceOp.SUM if is_mean or reduce_op == "sum" else reduce_op)
        return (found / world().size).to(tensor.dtype) if is_mean else found

    def _trained(self) -> list[torch.nn.Parameter]:
        assert self.lightning_module is not None
        return [parameter for parameter in self.lightning_module.parameters() if parameter.requires_grad]

    @staticmethod
    def _through_one_buffer(values: list[Tensor], exchange: Callable[[Tensor], Any]) -> None:
        """Put ``values`` through ``exchange`` in one go, in place."""
        if not values:
            return
        buffer = torch.cat([value.flatten() for value in values])
        with peers():
            exchange(buffer)
        parts = buffer.split([value.numel() for value in values])
        torch._foreach_copy_(values, [part.view_as(value) for part, value in zip(parts, values, strict=True)])


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """True if a micro-batch is the last of its optimizer step, as Lightning decides it.

    Args:
        trainer: In a fit.
        batch_idx: The number of the current micro-batch in the epoch, over all devices; `fit_loop.batch_idx`.
    """
    number = batch_idx + 1
    is_last = trainer.is_last_batch or number >= trainer.num_training_batches
    return bool(is_last) or number % trainer.accumulate_grad_batches == 0
