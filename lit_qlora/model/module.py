"""Owns the training of a 4-bit base with LoRA: a LightningModule, its options and its hooks.

Driven by the command line's Trainer or Lightning's own; precision is the Trainer's, batches are the DataModule's;
`hidden.py` computes the sums, `learning.py` the gradients. Knows no text.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import SumMetric

from lit_qlora.arguments import checked_arguments
from lit_qlora.batch import Batch
from lit_qlora.devices.asked import check_shard
from lit_qlora.devices.strategy import ends_step
from lit_qlora.devices.world import is_first, local_first
from lit_qlora.errors import UserError, require
from lit_qlora.metrics import figures_of, logged
from lit_qlora.model import load, lora, script
from lit_qlora.model.architectures import LINEARS
from lit_qlora.model.base import Base, check_context, check_lora, find_base, split_names
from lit_qlora.model.checkpointing import Checkpointing, checkpoint_layers
from lit_qlora.model.copies import Copies
from lit_qlora.model.decoder import why_not, why_not_by_settings
from lit_qlora.model.device import (
    Attention,
    check_attention,
    check_compile,
    check_kernels,
    choose_precision,
    compute_dtype,
    current_device,
    seed_by_position,
)
from lit_qlora.model.generate import Sampling, generate
from lit_qlora.model.learning import LearnsInParts
from lit_qlora.model.lora_names import parse_name
from lit_qlora.model.loss import CHUNK_ROWS
from lit_qlora.model.optimizer import OPTIMIZERS, OptimizerName, Schedule, check_optimizer, make_schedule
from lit_qlora.model.sharded_base import check_host, load_sharded
from lit_qlora.model.shards import Shards
from lit_qlora.model.sums import AnswerSums
from lit_qlora.place import COMMAND
from lit_qlora.text.formats import PromptFormat, make_format


class QLoRAModule(LearnsInParts):
    """A 4-bit base (Llama, Mistral, Qwen) with LoRA on its linear layers.

    In a script, ``Trainer(…).fit(QLoRAModule(…), ChatDataModule(…))`` trains as the command line does, to the same
    losses at the same seed (``seed_everything`` before the module is created). It logs ``train/loss``,
    ``train/accuracy`` and ``train/gradient_norm`` for each optimizer step, over all since the step that the loggers got
    last, and ``val/loss``, ``val/perplexity`` and ``val/accuracy`` (``test/…``) over all held-out answer tokens.

    The command line adds callbacks, which a script can add, too: `UpdateGuard`, which stops at a loss that is not
    finite; `WarmupStep`, without which every layer on a GPU is recomputed in backward.

    Args:
        base: ``demo``, a hub id or a local folder with safetensors weights: any Llama, Mistral, Qwen2, Qwen2.5 or Qwen3
            without experts (docs/bases.md).
        adapter: an adapter folder to start from; rank, alpha and targets must be its own.
        rank: rank of LoRA's two matrices.
        alpha: LoRA's output is scaled by alpha / rank (by alpha / sqrt(rank) with rslora).
        dropout: dropout rate of LoRA's inputs in training.
        target_modules: linear layers that get LoRA: all-linear, or names such as q_proj,v_proj.
        rslora: rank-stabilised scaling.
        dora: weight-decomposed LoRA.
        learning_rate: peak learning rate, after the warm-up.
        warmup_ratio: share of the optimizer steps in which the learning rate rises.
        schedule: learning rate schedule after the warm-up.
        optimizer: those with _8bit keep their state in 8 bits instead of fp32; the state of those with paged_ moves to
            host memory when the GPU runs short.
        weight_decay: decoupled weight decay, as AdamW has it.
        checkpointing: full keeps only each layer's input and recomputes the rest in backward; selective keeps the
            results of matrix products and attention; none keeps everything, which is the same unless DoRA is on; auto
            keeps the results of as many layers as fit in memory, and then dequantised weights if they fit, too.
        offload: with checkpointing auto, copy a part of the results that don't fit on the card to the host's memory,
            instead of recomputing them.
        own_layers: use this project's decoder layers, which compute in 16 bits and include LoRA; false: those of
            transformers and peft, slower and with more memory; results are the same up to rounding, but with dropout
            other values are dropped.
        loss_rows: number of tokens whose logits are computed at a time; has no effect on the result.
        compile: one GPU kernel per norm, activation and rotation; auto: on a GPU.
        cuda_graphs: record a step's kernels once per shape of a micro-batch and start them together, for a GPU that is
            faster than its host; not with dropout or packing. auto: if it pays off by the forecast.
        attention: implementation of attention in transformers' layers.
        shard: true: each device keeps a share of the base's layers and gets the others' as they are used: slower, for a
            base that is too large for one device. auto: if the forecast says that a whole base does not fit.
        shard_to: where the shares are kept: gpu, or host for the host's memory (with one device, the whole base).
        quantized_cache: where a 4-bit copy of the base is kept for the next start: auto (next to the hub's cache, for
            bases of at least half a billion weights), none, or a folder. Copies in use and the three most recently used
            are kept.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raises UserError for a hook that leaves out this project's."""
        super().__init_subclass__(**kwargs)
        script.check_hooks(cls, QLoRAModule)

    @checked_arguments("model", paths=("base", "adapter", "quantized_cache"))
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
        offload: bool = True,
        own_layers: bool = True,
        loss_rows: int = CHUNK_ROWS,
        compile: bool | Literal["auto"] = "auto",  # noqa: A002  # the option is called by the field's own word
        cuda_graphs: bool | Literal["auto"] = "auto",
        attention: Attention = "sdpa",
        shard: bool | Literal["auto"] = "auto",
        shard_to: Literal["gpu", "host"] = "gpu",
        quantized_cache: str = "auto",
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        device = current_device()
        check_attention(attention, device)
        super().__init__(loss_rows, compile, check_compile(compile, device), checkpointing)
        self.options = options
        """The constructor's arguments, for a checkpoint."""
        self.standalone = True
        """True if figures are logged by Lightning's own logging and a checkpoint's identity is saved here; otherwise
        the command line's callbacks do both."""
        self.base: Base = find_base(base, weights=device.is_here)
        self._given_base = self.base
        target_modules = split_names(target_modules)
        check_lora(self.base, rank, target_modules)
        self.adapter = Path(adapter) if adapter else None
        self.lora = lora.Lora(rank, alpha, dropout, target_modules, rslora, dora)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_ratio, self.schedule, self.optimizer_name = warmup_ratio, schedule, optimizer
        self.attention, self.cuda_graphs, self.own_layers = attention, cuda_graphs, own_layers
        self.offload, self.quantized_cache = offload, quantized_cache
        self.shard, self.shard_to = shard, shard_to
        self.copy_line: str | None = None
        self._of_adapter = lora.read_format(self.adapter) if self.adapter else None
        self.slow_because = why_not_by_settings(self.base.config, own_layers, dora, lora.has_bias(self.adapter))
        self._refuse_if_slow()
        self.prompt_format = self._of_adapter or lora.DEFAULT_FORMAT
        """The prompt format it is trained with, as recorded in each saved adapter."""
        self._recorded: PromptFormat | None = None
        """The prompt format in the Lightning checkpoint that the module was loaded from."""
        self._reported = set[str]()
        """Lines about a script's data that have been printed."""
        self._loaded_for: tuple[torch.dtype, str] | None = None
        """The dtype and the device type that the model was loaded for."""
        self._num_waiting: Counter[int] = Counter()
        """Micro-batches of the current step that wait for others, by the device that computes them."""
        self.gradient_norm: Tensor = torch.tensor(0.0)
        """Gradient norm of the last optimizer step, before clipping."""
        self._sums = AnswerSums()
        # Only adapters are saved, so a checkpoint never has all the keys of the module.
        self.strict_loading = False
        self.held_out_loss, self.held_out_correct, self.held_out_tokens = (
            # torchmetrics', as a Lightning project has them: subclasses and users' callbacks find what they know. Its
            # default ignores values that are not finite, and a broken model would be the best.
            SumMetric(nan_strategy="disable").set_dtype(torch.float64)
            for _ in range(3)
        )

    # Loading

    def configure_callbacks(self) -> list[Callback]:
        """Add none; refuse those that change what is trained, before they set themselves up. Raises UserError."""
        script.refuse_kinds(self.trainer.callbacks, "trainer.callbacks", script.CHANGING)  # type: ignore[attr-defined]
        return []

    def setup(self, stage: str) -> None:
        """Refuse unsupported settings of the Trainer, before a weight is loaded; take over the data's prompt format."""
        script.check_trainer(self.trainer)
        check_shard(self.shard, self.shard_to, self.trainer.world_size)
        if self.shard is True and self.shard_to == "host":
            check_host(self.base.shape)
        if stage == "fit" and self.standalone and type(self) is QLoRAModule:  # a subclass may log others
            script.check_monitors(self.trainer)
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = script.Files()
        if stage == "predict" and type(self).predict_step is QLoRAModule.predict_step:
            self.predict_step()
        self._take_over()
        if stage == "fit":
            check_optimizer(self.optimizer_name, self.trainer.strategy.root_device.type == "cuda")
            if self.adapter:
                lora.check_settings(self.adapter, self.lora)
        self._forget_layers()

    @cached_property
    def adapter_digest(self) -> str | None:
        """The `lora.weights_digest` of the adapter to start from; None without one."""
        return lora.weights_digest(self.adapter) if self.adapter else None

    @property
    def _data(self) -> Any:
        """The Trainer's `ChatDataModule`, or the one that made the loaders that it was given; None without."""
        if not self._attached:
            return None
        trainer: Any = self.trainer
        if hasattr(trainer.datamodule, "prompt_format"):
            return trainer.datamodule
        return getattr(trainer.train_dataloader, "made_by", None)

    def _take_over(self) -> None:
        """Take over the prompt format of the data, if it is known yet."""
        data = self._data
        if data is None:
            return
        check_context(self.base, data.max_length)
        self.prompt_format = data.prompt_format
        for line in data.describe() if self.standalone else ():  # in a run, callbacks print it
            if line not in self._reported:
                rank_zero_info(line)
            self._reported.add(line)

    def configure_model(self) -> None:
        """Load base and adapter onto the Trainer's device, in the Trainer's precision; again if these changed.

        Without a Trainer, as with precision ``auto``.
        """
        dtype, device = self._place()
        if self.model is not None and self._loaded_for in (None, (dtype, device.type)):
            if self._attached and self.trainer.state.fn == "fit":
                self.train()  # a validation that was interrupted leaves no dropout, and nothing recomputed
            return
        if self._attached and self.trainer.state.fn == "fit" and device.type != "cuda":
            require(self.cuda_graphs is not True, "model.cuda_graphs", "auto or false without a GPU", True)
        trained = self.state_dict() if self.model is not None else None
        self.model = self.shards = None
        self._forget_layers()
        self._load(dtype, device)
        self._loaded_for = dtype, device.type
        if trained is not None:
            self.load_state_dict(trained)

    @property
    def _attached(self) -> bool:
        """True with a Trainer; without one, `trainer` raises."""
        try:
            return self.trainer is not None
        except RuntimeError:
            return False

    def _place(self) -> tuple[torch.dtype, torch.device]:
        if self._attached:
            return compute_dtype(str(self.trainer.precision)), self.trainer.strategy.root_device
        device = current_device()
        check_kernels(device)
        precision, _ = choose_precision("auto", device, self.base.shape.num_parameters)
        return compute_dtype(precision), torch.device("cuda" if device.is_gpu else "cpu")

    def _load(self, dtype: torch.dtype, device: torch.device) -> None:
        given, copies = self._given_base, Copies(self.quantized_cache)
        with local_first():  # the others find its download, and its copy in 4-bit
            copy = copies.find(given, dtype, device.type)
            self.copy_line = None if copy else copies.keep(given, dtype, device)
            self.base = copy or copies.find(given, dtype, device.type) or given
        if self.shard is True:  # each reads its own share
            on_host = self.shard_to == "host"
            base_model, self.shards = load_sharded(self.base, dtype, device, self.attention, on_host)
        else:
            base_model = load.load_base(self.base, dtype, device, self.attention)
        if self.adapter:
            self.model = lora.load_adapter(base_model, self.base, self.adapter, True, self.lora.dropout)
        else:
            self.model = lora.add_lora(base_model, self.lora)
        if self.own_layers:
            self.slow_because = why_not(self.model)
        self._refuse_if_slow()
        if self.shards:
            self.shards.lowest = min(lora.adapted_layers(self.model))
        self.keeps_pace = self.shards is not None and self.shards.size > 1
        self.uses_cuda_graphs = self.cuda_graphs is True
        self._choose_kept(dtype)
        if self.slow_because:
            checkpoint_layers(base_model.model.layers, self.checkpointing)
        # from_pretrained returns every module in eval mode, and Lightning leaves it so: no dropout.
        self.model.train()

    def _refuse_if_slow(self) -> None:
        """Raises UserError for what only our own layers do, if transformers' are to compute."""
        if self.slow_because and self.shard is True:
            raise UserError(f"expected false with {self.slow_because}, got true", option="model.shard")
        if self.slow_because and self.cuda_graphs is True:
            raise UserError(f"expected auto or false with {self.slow_because}, got true", option="model.cuda_graphs")

    def to(self, *args: Any, **kwargs: Any) -> "QLoRAModule":
        """Move the module as torch does; the layers of a shared base stay where they are."""
        with self.shards.aside() if self.shards else nullcontext():
            return super().to(*args, **kwargs)

    def cpu(self) -> "QLoRAModule":
        """Move the module to the CPU, as a Trainer does at its end; the layers of a shared base stay."""
        with self.shards.aside() if self.shards else nullcontext():
            return super().cpu()

    def format_for(self, template: str | None, system: str | None) -> PromptFormat:
        """The prompt format for its data: as given, else that of the checkpoint or the adapter to start from.

        A fit that starts from an adapter has the system text of its own data.

        Args:
            template: the text of a chat template; None where none is given.
            system: the system text; None where none is given.

        Raises:
            UserError: the template is another than that of checkpoint or adapter.
        """
        was, name = self._recorded or self._of_adapter, "the checkpoint" if self._recorded else str(self.adapter)
        if was is None:
            return make_format(template, system)
        is_another_fit = self._recorded is None and self.trainer.state.fn == "fit"
        return make_format(was.kept(template, name), was.system if system is None and not is_another_fit else system)

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapter to ``folder`` as PEFT does, made if missing, with the tokenizer of its Trainer's
        DataModule.

        Raises UserError before the model is loaded and for a file in its place, OSError if a file can't be written.
        """
        model = self.peft_model
        file = next((one for one in (Path(folder), *Path(folder).parents) if one.is_file()), None)
        require(file is None, "folder", "a folder to write to", f"{file}, a file")
        Path(folder).mkdir(parents=True, exist_ok=True)
        lora.save_adapter(model, self.base, Path(folder), self.prompt_format)
        if self._data is not None:
            self._data.write_tokenizer(Path(folder), self.base.context_tokens)

    def load_adapter_weights(self, folder: Path) -> None:
        """Load the weights of an adapter ``folder`` that was saved from this module."""
        lora.load_adapter_weights(self.peft_model, folder)

    def describe(self) -> list[str]:
        """Base and adapter in words, for the terminal."""
        shape = self.base.shape
        trained = sum(value.numel() for value in lora.adapter_parameters(self).values())
        named = ((parse_name(key), value) for key, value in lora.adapter_parameters(self.peft_model).items())
        matrices = [(name["linear"], len(value)) for name, value in named if name and name["part"] == "A"]
        targets, ranks = {name for name, _ in matrices}, sorted({rank for _, rank in matrices})
        names = "all linear layers" if targets == {*LINEARS} else ", ".join(sorted(targets))
        rank = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
        lines = [f"{self.base.name}: {_count(shape.num_parameters)} weights, linear layers in 4-bit NF4"]
        lines += [self.copy_line] if self.copy_line else []
        if self.eager_because:
            lines.append(f"kernels are not compiled: {self.eager_because} missing (install gcc and python3-dev)")
        if self.shards:
            lines.append(self.shards.describe())
        lines.append(f"LoRA of rank {rank} on {names}: {_count(trained)} weights are trained")
        if self.slow_because:
            lines.append(f"decoder layers are those of transformers and peft, which take longer: {self.slow_because}")
        return lines

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The adapter's weights, fp32. The base is never saved."""
        return {name: value.detach() for name, value in lora.adapter_parameters(self).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> Any:
        """Load an adapter's weights; loads base and adapter first, if no Trainer has.

        Args:
            state_dict: fp32 tensors by name, as `state_dict` gives them.

        Raises:
            UserError: it has not exactly the keys and shapes of this one, or is not finite.
        """
        self.configure_model()
        own = lora.adapter_parameters(self)
        given, shapes = ({name: [*value.shape] for name, value in state.items()} for state in (state_dict, own))
        remedy = "give it the same base, rank and target modules"
        lora.check_shapes(given, shapes, "the checkpoint is of another adapter", remedy=remedy)
        folder = self.trainer.ckpt_path if self._attached else None
        remedy = "remove that checkpoint's folder, to resume from the one before"
        lora.check_finite(state_dict, place=folder or "the checkpoint", remedy=remedy)
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state_dict[name])
        return torch.nn.Module().load_state_dict({})  # no key missing, none unexpected

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the constructor's arguments, for `load_from_checkpoint`, and the identity; a run's folder has its own."""
        if self.standalone:
            key = self.CHECKPOINT_HYPER_PARAMS_KEY  # a subclass's save_hyperparameters may have put its own there
            checkpoint[key] = {**self.options, **checkpoint.get(key, {})}
            checkpoint[script.OF] = script.to_record(self.base, self.lora, self.prompt_format) | {"kept": self._kept()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the prompt format.

        Raises UserError for a checkpoint of another base or scaling, for a Trainer's data in another format, and if a
        fit can't resume from it.
        """
        if script.OF in checkpoint:
            given = getattr(self._data, "prompt_format", None)
            self._recorded = script.recorded_format(checkpoint[script.OF], self.base, self.lora, given)
            self.prompt_format = self._recorded
            if self._attached and self.trainer.state.fn == "fit":
                script.check_resume(checkpoint, self._kept())

    def _kept(self) -> dict[str, Any]:
        """Options, by their names, that a resumed fit has from its checkpoint."""
        kept = {"trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches}
        if type(self).configure_optimizers is QLoRAModule.configure_optimizers:
            kept |= {f"model.{name}": self.options[name] for name in ("optimizer", "learning_rate", "weight_decay")}
        return kept | (self._data.order_of_rows() if self._data else {})

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **options: Any) -> "QLoRAModule":  # type: ignore[override]
        """Load the module, and its model, from a checkpoint of Lightning's ModelCheckpoint.

        Args:
            checkpoint_path: the file.
            *args: as Lightning's.
            **options: replacements for the module's arguments, such as a ``base`` that was moved.

        Raises:
            UserError: it is none, a folder, as a run's checkpoints are, or of another base or rank.
        """
        with script.reading(checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, *args, **options)  # type: ignore[no-any-return]

    # Steps

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits after each token.

        Args:
            input_ids: ``[B, T]`` int64, padded on the right if at all.

        Returns:
            ``[B, T, V]``, in the dtype of the head.

        Raises:
            UserError: the model is not loaded yet.
        """
        return self.peft_model(input_ids=input_ids).logits  # type: ignore[no-any-return]

    def on_train_start(self) -> None:
        """Reset the sums of the figures. Raises UserError if other weights than the adapter's would be trained."""
        script.check_trained(self, lora.adapter_parameters(self))
        self._take_over()
        if self._data is None:
            name = self.prompt_format.record()["prompt_format"]
            rank_zero_info(f"a saved adapter records the prompt format {name}: no ChatDataModule says of another")
        loader: Any = self.trainer.train_dataloader
        if hasattr(loader, "begin") and self.trainer.ckpt_path is None:  # else where the checkpoint has it
            loader.begin(self.trainer.current_epoch)
        self._sums.reset()
        self._num_waiting.clear()
        self._accumulated = self.trainer.accumulate_grad_batches

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Check the batch, and seed torch by its position in the fit.

        So LoRA's dropout is a function of seed, epoch and batch: no evaluation, sample or interruption can change it,
        and there is no random state to save.

        Each holds the number of answer tokens of its step. So a callback that changes the accumulation is noticed.

        Raises UserError for a batch of another DataLoader or tokenizer, or made for another accumulation.
        """
        script.check_batch(batch, self.base.shape.vocabulary)
        if self.shards:
            self._count_passes(self.shards, batch.device, batch_idx)
        expected, now = self._accumulated, self.trainer.accumulate_grad_batches
        require(now == expected, "trainer.accumulate_grad_batches", f"{expected}, as at the start of the fit", now)
        self.check_step(batch, batch_idx)
        if self._data:
            seed_by_position(self._data.seed, self.trainer.current_epoch, batch_idx, self.device)

    def _count_passes(self, shards: Shards, device: int, batch_idx: int) -> None:
        """Note which processes go through the layers at a micro-batch of ``device``: those that don't wait for more."""
        self._num_waiting[device] += 1
        for other, number in [*self._num_waiting.items()]:
            if number >= self._most_together or ends_step(self.trainer, batch_idx):
                shards.count(other)
                del self._num_waiting[other]

    def on_after_backward(self) -> None:
        """Where the base is shared, take part in the rest of the step, before gradients are summed."""
        if self.shards and ends_step(self.trainer, self.trainer.fit_loop.batch_idx):
            self.shards.keep_pace(backward=True)

    def on_validation_start(self) -> None:
        """Where the base is shared, take part in the rest of the step, if a validation falls inside of it."""
        if self.shards:
            self.shards.keep_pace(backward=True)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Run `LearnsInParts.training_step`, and keep its sums for the log."""
        outputs = super().training_step(batch, batch_idx)
        if self.standalone:
            self._sums.add(outputs)
        return outputs

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the step, whose micro-batches are all done, without waiting for the device.

        Here, and not at the batch's end, since callbacks that monitor a figure are asked before that; nor in
        ``optimizer_step``, which Lightning calls in automatic optimization only.
        """
        if not self._sums:  # a run's callbacks have them, or a subclass has a training step of its own
            return
        figures = figures_of("train", self._sums.to_divide(), torch.exp)
        self._log({name: value for name, value in figures.items() if name in logged()})
        step, interval = self.trainer.global_step + 1, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and step % interval == 0:
            self._sums.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the sums over the held-out rows. Raises UserError as `on_train_batch_start`."""
        script.check_batch(batch, self.base.shape.vocabulary)
        if self.shards:
            self.shards.count(batch.device)
        loss_sum, num_correct, num_answers = self.summed_loss(batch) if batch.is_here else self.nothing()
        if batch_idx == 0:  # of what a validation left that was interrupted, or was in inference mode
            for metric in (self.held_out_loss, self.held_out_correct, self.held_out_tokens):
                metric.reset()
        self.held_out_loss.update(loss_sum.double())
        self.held_out_correct.update(num_correct)
        self.held_out_tokens.update(num_answers)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity and token accuracy over all held-out answer tokens."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Log the same for the test rows."""
        self._log_held_out("test")

    def _log_held_out(self, part: str) -> None:
        if self.shards:
            self.shards.keep_pace(backward=False)
        if not self.held_out_tokens.update_called:  # a subclass may score in a way of its own
            return
        found = (one.compute() for one in (self.held_out_loss, self.held_out_correct, self.held_out_tokens))
        self._log(figures_of(part, dict(zip(AnswerSums.NAMES, found, strict=True)), torch.exp))

    def _log(self, figures: Mapping[str, Tensor]) -> None:
        """Log by Lightning's own logging. In a run, callbacks log all figures of a step at once."""
        if not self.trainer.barebones:
            self.log_dict(figures, logger=None if self.standalone else False)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Raises UserError."""
        raise UserError(
            "a batch holds answers, and nothing that is to be answered",
            option="trainer.predict",
            remedy=f"save the adapter (module.save_adapter) and give it to `{COMMAND} predict` or `chat`",
        )

    # Optimization

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """The optimizer on the adapter, with a schedule over the optimizer steps of the DataModule's batches."""
        parameters = lora.adapter_parameters(self).values()
        how = OPTIMIZERS[self.optimizer_name]
        optimizer = how.make(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = make_schedule(self.schedule, optimizer, self._num_steps(), self.warmup_ratio)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _num_steps(self) -> int:
        # Counted by the DataModule, if it can: the Trainer would fetch the data for it, and a resumed loader with a
        # state of its own would start over.
        counted = getattr(self.trainer.datamodule, "num_optimizer_steps", None)  # type: ignore[attr-defined]
        steps = counted() if counted else self.trainer.estimated_stepping_batches
        expected = "a number of optimizer steps with a loader that has no length, for the learning rate's schedule"
        require(0 <= steps < float("inf"), "trainer.max_steps", expected, self.trainer.max_steps)
        return int(steps)

    def configure_gradient_clipping(  # type: ignore[override]
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the Trainer's settings, and keep the norm before clipping, which is computed once."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self.gradient_norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self.standalone:
            self._log({"train/gradient_norm": self.gradient_norm})

    # Answers

    def by_first_alone(self) -> AbstractContextManager[bool]:
        """A context for what the first process alone computes; yields True there; see `Shards.by_first_alone`."""
        if self.shards is None or not self.keeps_pace:
            return nullcontext(is_first())
        return self.shards.by_first_alone(self._llama.model)

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        stop_ids: Sequence[int],
        sampling: Sampling,
        is_over: Callable[[Sequence[int]], bool] | None = None,
    ) -> list[list[int]]:
        """The answer's ids for each prompt's ids, in the Trainer's precision.

        Args:
            prompts: ids of each, of any lengths.
            stop_ids: each of them ends an answer.
            sampling: how tokens are drawn.
            is_over: called with the ids of each answer so far; says whether it ends there.

        Returns:
            The ids of each answer, that which ended it included.
        """
        with self.trainer.precision_plugin.forward_context():
            return generate(self.peft_model, prompts, stop_ids, sampling, is_over=is_over)


def _count(number: int) -> str:
    """A number of weights to three digits."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
