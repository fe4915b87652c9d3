"""Owns the training of a 4-bit Llama with LoRA: a LightningModule, its options and its hooks.

The Trainer drives it; precision is the Trainer's, batches are the DataModule's; `learning.py` makes gradients of
them. Knows no text.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torchmetrics import SumMetric

from lit_qlora.batch import Batch
from lit_qlora.errors import UserError, require
from lit_qlora.model import load
from lit_qlora.model.attention import find_places
from lit_qlora.model.base import Base, find_base
from lit_qlora.model.checkpointing import Checkpointing, checkpoint_layers
from lit_qlora.model.copies import Copies
from lit_qlora.model.decoder import Layer, run_layers, take_apart, why_not
from lit_qlora.model.device import (
    Attention,
    check_attention,
    check_compile,
    compute_dtype,
    current_device,
)
from lit_qlora.model.generate import Sampling, generate
from lit_qlora.model.graphs import Graphs
from lit_qlora.model.learning import LearnsInParts
from lit_qlora.model.loss import CHUNK_ROWS, summed_cross_entropy
from lit_qlora.model.optimizer import OptimizerName, Schedule, make_optimizer, make_schedule
from lit_qlora.model.pointwise import EAGER, compiled
from lit_qlora.model.shape import Shape

if TYPE_CHECKING:
    from peft import PeftModel


class QLoRAModule(LearnsInParts):
    """A Llama in 4-bit with LoRA on its linear layers.

    Args:
        base: ``demo``, a hub id or a local folder of a Llama with safetensors weights.
        adapter: an adapter folder to start from; rank, alpha and targets must be its own.
        rank: of LoRA's two matrices.
        alpha: LoRA's output is scaled by alpha / rank (by alpha / sqrt(rank) with rslora).
        dropout: share of LoRA's inputs dropped in training.
        target_modules: linear layers that get LoRA: all-linear, or names such as q_proj, v_proj.
        rslora: rank-stabilised scaling.
        dora: weight-decomposed LoRA.
        learning_rate: at its highest, after the warm-up.
        warmup_ratio: share of the optimizer steps in which the learning rate rises.
        schedule: of the learning rate after the warm-up.
        optimizer: AdamW in fp32, or with its state in 8 bits, or paged to host memory when the GPU's is short.
        weight_decay: of AdamW.
        checkpointing: full keeps only each layer's input and computes the rest again in backward; selective keeps
            what matrix products and attention gave; none keeps whatever there is, which is the same unless DoRA is
            on; auto keeps on as many layers as the memory allows.
        own_layers: decoder layers written for this, in 16 bits with LoRA in their products; false: transformers' and
            peft's own, which give the same but for rounding, in more time and memory.
        loss_rows: scored tokens whose logits exist at a time; what is computed does not hang on it.
        compile: one GPU kernel for each norm, activation and rotation; auto: on a GPU.
        cuda_graphs: a step's kernels recorded once for each shape of a micro-batch, and started together: for a GPU
            that is faster than its host; without dropout and packing. auto: where the forecast says that it pays.
        attention: implementation of attention in transformers.
        quantized_cache: where a 4-bit copy of the base is kept for the next start: auto, beside the hub's cache, for
            bases from half a billion weights on; none; or a folder.
    """

    def __init__(
        self,
        base: str = "demo",
        adapter: str | None = None,
        rank: int = 16,
        alpha: float = 16.0,
        dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        rslora: bool = False,
        dora: bool = False,
        learning_rate: float = 2e-4,
        warmup_ratio: float = 0.03,
        schedule: Schedule = "cosine",
        optimizer: OptimizerName = "adamw",
        weight_decay: float = 0.0,
        checkpointing: Checkpointing = "auto",
        own_layers: bool = True,
        loss_rows: int = CHUNK_ROWS,
        compile: bool | Literal["auto"] = "auto",  # noqa: A002  # the option is called by the field's own word
        cuda_graphs: bool | Literal["auto"] = "auto",
        attention: Attention = "sdpa",
        quantized_cache: str = "auto",
    ) -> None:
        super().__init__()
        require(rank >= 1, "model.rank", "a whole number from 1", rank)
        require(alpha > 0, "model.alpha", "a number above 0", alpha)
        require(0 <= dropout < 1, "model.dropout", "a share from 0 to below 1", dropout)
        require(0 < learning_rate <= 1, "model.learning_rate", "a number above 0, at most 1", learning_rate)
        require(0 <= warmup_ratio < 1, "model.warmup_ratio", "a share from 0 to below 1", warmup_ratio)
        require(loss_rows >= 1, "model.loss_rows", "a whole number from 1", loss_rows)
        require(weight_decay >= 0, "model.weight_decay", "0 or more", weight_decay)
        check_attention(attention, current_device())
        self.eager_because = check_compile(compile, current_device())
        """What is missing for compiled kernels, where they were to be; None otherwise."""
        require(
            cuda_graphs is not True or (own_layers and not (dropout or dora)),
            "model.cuda_graphs",
            "auto or false with dropout or dora, or without own_layers",
            True,
        )
        self.base: Base = find_base(base)
        load.check_targets(self.base, target_modules)
        self.adapter = Path(adapter) if adapter else None
        if self.adapter:
            load.read_record(self.adapter)
        self.lora = load.Lora(rank, alpha, dropout, target_modules, rslora, dora)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_ratio, self.schedule, self.optimizer_name = warmup_ratio, schedule, optimizer
        self.checkpointing, self.compiles, self.attention = checkpointing, compile, attention
        self.cuda_graphs, self.own_layers, self.loss_rows = cuda_graphs, own_layers, loss_rows
        self.quantized_cache = quantized_cache
        self.copy_line: str | None = None
        self.prompts: Mapping[str, Any] = {"prompt_format": load.PROMPT_FORMAT}
        """What each saved adapter is to say of the prompts that it was trained with."""
        self.model: PeftModel | None = None
        self.slow_because: str | None = None
        """Why the layers are transformers' and peft's own in training; None where they are ours."""
        self._layers: dict[bool, list[Layer]] = {}
        """In train mode and out of it, where nothing is dropped."""
        self._graphs: Graphs | None = None
        self.gradient_norm: Tensor = torch.tensor(0.0)
        """Of the last optimizer step, before clipping."""
        # Only adapters are saved, so a checkpoint never has all the keys of the module.
        self.strict_loading = False
        self.held_out_loss, self.held_out_correct, self.held_out_tokens = (
            # Its default drops what is not finite, and a broken model would be the best.
            SumMetric(nan_strategy="disable").set_dtype(torch.float64)
            for _ in range(3)
        )

    # Loading

    def configure_model(self) -> None:
        """Loads base and adapter onto the Trainer's device, in the Trainer's precision; once."""
        if self.model is not None:
            return
        dtype = compute_dtype(str(self.trainer.precision))
        device = self.trainer.strategy.root_device
        if self.trainer.state.fn == "fit":
            gpu = device.type == "cuda"
            require(gpu or self.cuda_graphs is not True, "model.cuda_graphs", "auto or false without a GPU", True)
        copies = Copies(self.quantized_cache)
        copy = copies.find(self.base, dtype, device.type)
        base_model = load.load_base(copy or self.base, dtype, device, self.attention)
        self.copy_line = None if copy else copies.keep(base_model, self.base, dtype, device.type)
        self.base = copy or self.base
        if self.adapter:
            self.model = load.load_adapter(base_model, self.base, self.adapter, True, self.lora.dropout)
        else:
            self.model = load.add_lora(base_model, self.lora)
        self.slow_because = why_not(self.model) if self.own_layers else "model.own_layers is false"
        self.kept_layers, self.replays = self._choose_kept_layers(), self.cuda_graphs is True
        if self.slow_because:
            checkpoint_layers(base_model.model.layers, self.checkpointing)
        # from_pretrained hands out every module in eval mode, and Lightning leaves it so: no dropout.
        self.model.train()

    @property
    def peft_model(self) -> "PeftModel":
        """The loaded model."""
        assert self.model is not None, "the model is loaded by configure_model, which the Trainer calls"
        return self.model

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter as a plain PEFT folder into the existing ``folder``."""
        load.save_adapter(self.peft_model, self.base, folder, self.prompts)

    def load_adapter_weights(self, folder: Path) -> None:
        """Takes over the weights of an adapter folder that was saved from this module."""
        load.load_adapter_weights(self.peft_model, folder)

    def describe(self) -> list[str]:
        """Base and adapter in words, for the terminal."""
        shape = self.base.shape
        trained = sum(value.numel() for value in load.adapter_parameters(self).values())
        config: Any = self.peft_model.peft_config["default"]
        targets = set(config.target_modules)
        names = "all linear layers" if targets == {*Shape.LINEARS} else ", ".join(sorted(targets))
        lines = [f"{self.base.name}: {_count(shape.num_parameters)} weights, linear layers in 4-bit NF4"]
        lines += [self.copy_line] if self.copy_line else []
        if self.eager_because:
            lines.append(f"kernels are not compiled: {self.eager_because} missing (install gcc and python3-dev)")
        return [
            *lines,
            f"LoRA of rank {config.r} on {names}: {_count(trained)} weights are trained",
        ]

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The adapter's weights, fp32. The base is never saved."""
        return {name: value.detach() for name, value in load.adapter_parameters(self).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Takes over an adapter's weights.

        Raises UserError unless it has just the keys and shapes of this one, and is finite.
        """
        own = load.adapter_parameters(self)
        shapes = {name: tuple(value.shape) for name, value in own.items()}
        given = {name: tuple(value.shape) for name, value in state_dict.items()}
        if shapes != given:
            name = next(name for name in sorted({*shapes, *given}) if shapes.get(name) != given.get(name))
            raise UserError(
                f"the checkpoint is of another adapter: {name} is {given.get(name, 'missing')} there, "
                f"{shapes.get(name, 'missing')} here; give it the same base, rank and target modules"
            )
        broken = [name for name in own if not state_dict[name].isfinite().all()]
        if broken:
            folder = self._trainer.ckpt_path if self._trainer else None
            raise UserError(
                f"{folder or 'the checkpoint'}: {broken[0]} holds values that are not finite: it was altered; remove "
                "that checkpoint's folder, and the one before is taken"
            )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state_dict[name])

    # Steps

    def summed_loss(self, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """Sum of the losses over a batch's answer tokens in nats, how many were the likeliest, how many there are."""
        llama: Any = self.peft_model.get_base_model()
        scored = self._hidden(batch).flatten(0, 1)[batch.positions]
        loss, num_correct = summed_cross_entropy(scored, llama.lm_head.weight, batch.targets, self.loss_rows)
        return loss, num_correct, len(batch.targets)

    def _recompute(self) -> None:
        super()._recompute()
        if self.slow_because:
            llama: Any = self.peft_model.get_base_model()
            checkpoint_layers(llama.model.layers, "full")

    def _release(self) -> None:
        self._graphs = None

    def _choose_kept_layers(self) -> int:
        if self.checkpointing == "full":
            return 0
        if self.checkpointing == "auto" and (self.slow_because or self.device.type != "cpu"):
            return 0  # on a GPU, `callbacks.trial` knows the batches, and so how many fit
        return self.base.shape.num_layers

    def _hidden(self, batch: Batch) -> Tensor:
        """``[B, T, h]`` behind the last norm."""
        decoder: Any = self.peft_model.get_base_model().model
        # No attention mask: rows are padded on the right, where causal attention never looks. No cache:
        # with one, transformers would not be told apart from generation.
        if self.slow_because:
            # Positions that begin again tell transformers where a conversation ends, if there is no mask and no cache.
            within = [torch.arange(length, device=self.device) for length in batch.lengths]
            output = decoder(
                input_ids=batch.input_ids,
                position_ids=torch.cat(within)[None] if within else None,
                use_cache=False,
            )
            return output.last_hidden_state  # type: ignore[no-any-return]
        if self.training not in self._layers:
            compiles = self.device.type == "cuda" if self.compiles == "auto" else self.compiles
            compiles = compiles and self.eager_because is None
            self._layers[self.training] = take_apart(self.peft_model, compiled() if compiles else EAGER)
        hidden = decoder.embed_tokens(batch.input_ids)
        layers = self._layers[self.training]
        if self.replays and self.training and torch.is_grad_enabled() and not batch.lengths:
            if self._graphs is None or self._graphs.kept_layers != self.kept_layers:
                self._graphs = Graphs(layers, self.kept_layers, decoder.rotary_emb)
            return decoder.norm(self._graphs(hidden))  # type: ignore[no-any-return]
        places = find_places(decoder.rotary_emb, hidden, batch.lengths)
        return decoder.norm(run_layers(layers, hidden, places, self.kept_layers))  # type: ignore[no-any-return]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the sums over the held-out rows."""
        loss_sum, num_correct, num_answers = self.summed_loss(batch)
        self.held_out_loss.update(loss_sum.double())
        self.held_out_correct.update(num_correct)
        self.held_out_tokens.update(num_answers)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Logs loss, perplexity and token accuracy over all held-out answer tokens."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Logs the same for the test rows."""
        self._log_held_out("test")

    def _log_held_out(self, prefix: str) -> None:
        tokens = self.held_out_tokens.compute()
        loss = self.held_out_loss.compute() / tokens
        metrics = {
            f"{prefix}/loss": loss,
            f"{prefix}/perplexity": loss.exp(),  # the mean comes first: a mean of exponentials is another figure
            f"{prefix}/accuracy": self.held_out_correct.compute() / tokens,
        }
        # Not to the loggers: they get all that belongs to a step at once, under the optimizer's step count.
        self.log_dict(metrics, logger=False)
        for metric in (self.held_out_loss, self.held_out_correct, self.held_out_tokens):
            metric.reset()

    # Optimization

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """AdamW on the adapter, with a schedule over the steps that the DataModule's batches make."""
        parameters = load.adapter_parameters(self).values()
        optimizer = make_optimizer(self.optimizer_name, parameters, self.learning_rate, self.weight_decay)
        # Counted by the DataModule: asking the Trainer would make it fetch the data, and a resumed
        # loader would start anew.
        num_steps = self.trainer.datamodule.num_optimizer_steps()  # type: ignore[attr-defined]
        schedule = make_schedule(self.schedule, optimizer, num_steps, self.warmup_ratio)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(  # type: ignore[override]
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as the Trainer is told to, and keeps the norm that the gradients had."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.gradient_norm = torch.nn.utils.get_total_norm(gradients)
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # Answers

    def answer(self, prompts: Sequence[Sequence[int]], eos_id: int, sampling: Sampling) -> list[list[int]]:
        """An answer's ids for each prompt's ids; see `lit_qlora.model.generate`."""
        with self.trainer.precision_plugin.forward_context():
            return generate(self.peft_model, prompts, eos_id, sampling)


def _count(number: int) -> str:
    """A number of weights in three digits."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
