"""Owns the warm-up step before training: a whole step of the largest micro-batch, so that memory runs out at once or
never.

With ``auto``, the forecast decides how many layers keep their activations, how many their weights dequantised, and how
many micro-batches go together. Weights and optimizer are restored after the step.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_qlora.devices.world import lowest
from lit_qlora.forecast.foresee import foresee, together_on_host
from lit_qlora.model.graphs import padded
from lit_qlora.model.optimizer import forget

ON_CPU = False
"""True in tests: on a CPU, running out of memory would end the process before it could take less."""


class WarmupStep(Callback):
    """A callback that runs forward, backward, update and evaluation of the largest micro-batch before the first one."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the step. If memory runs out, the module takes less, as it would later."""
        module: Any = pl_module
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if module.device.type == "cpu":
            module.together = lowest(together_on_host(module, data, trainer))
            if module.together > 1:
                trainer.print(f"{module.together} micro-batches of a step go through a layer together")
            if not ON_CPU:
                return
        forecast = foresee(module, data, trainer)
        if forecast:
            # Of several devices, the one with the least room decides.
            module.uses_cuda_graphs = bool(lowest(forecast.step.uses_cuda_graphs))
            kept = ("kept_layers", "hosted_layers", "dequantised_layers", "together")
            for name in kept if module.checkpointing == "auto" else ():
                setattr(module, name, lowest(getattr(forecast.step, name)))
        if forecast and module.uses_cuda_graphs:
            shapes = forecast.batches.shapes
            left = (data.num_optimizer_steps() - trainer.global_step) * trainer.accumulate_grad_batches
            module.uses = {shape: count * left / shapes.total() for shape, count in shapes.items()}
        largest = data.largest_batch(padded) if module.uses_cuda_graphs else data.largest_batch()
        batch = module.transfer_batch_to_device(largest, module.device, 0)
        # On the host: beside a resumed run's optimizer they would be more than any step of training takes.
        weights = {name: value.to("cpu", copy=True) for name, value in module.state_dict().items()}
        for index in range(module.together):
            with trainer.precision_plugin.forward_context():
                output = module.training_step(batch, index)
            module.backward(output["loss"])
            del output
        for optimizer in trainer.optimizers:
            if not optimizer.state:  # else the run resumes, and the state is in memory already
                optimizer.step()
                forget(optimizer)
            optimizer.zero_grad(set_to_none=True)
        module.load_state_dict(weights)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            module.summed_loss(batch)
