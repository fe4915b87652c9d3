"""Owns how a batch becomes sums of losses: through our decoder layers, their recordings, or those of transformers.

The lowest base class of `QLoRAModule`: `learning.py` asks it for sums. Knows no options, no Trainer.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_qlora.batch import Batch
from lit_qlora.errors import UserError
from lit_qlora.model import host
from lit_qlora.model.attention import find_places
from lit_qlora.model.base import Base
from lit_qlora.model.checkpointing import Checkpointing, checkpoint_layers, choose_checkpointing
from lit_qlora.model.decoder import Layer, MicroBatch, draw_seeds, extract_layers, run_together, weights_of
from lit_qlora.model.dequantised import Weights
from lit_qlora.model.device import compiles_kernels
from lit_qlora.model.graphs import Graphs
from lit_qlora.model.loss import summed_cross_entropy
from lit_qlora.model.offload import HostStore
from lit_qlora.model.pointwise import EAGER, compiled
from lit_qlora.model.shards import Shards

if TYPE_CHECKING:
    from peft import PeftModel


Sums = tuple[Tensor, Tensor, int]
"""Summed loss of answer tokens in nats, count of those that were the likeliest, and their number."""


class Waiting(NamedTuple):
    """A micro-batch, ``batch``, that is to be learned, with a seed of dropout per layer, ``drawn`` by
    `ComputesSums.draw`; None if nothing was drawn."""

    batch: Batch
    drawn: Any


class ComputesSums(LightningModule):
    """A module that computes the sums over answer tokens with a 4-bit base and its adapter.

    Args:
        loss_rows: number of tokens whose logits are computed at a time.
        compiles: True for compiled kernels between products; auto: on a GPU.
        eager_because: what is missing for these; None if nothing is.
        checkpointing: what layers keep for backward.
    """

    base: Base
    """The loaded base, or its 4-bit copy."""
    shards: Shards | None = None
    """The base's layers, where no device holds them whole: not with shard auto, until `callbacks.shard` decides so."""

    def __init__(
        self,
        loss_rows: int,
        compiles: bool | Literal["auto"],
        eager_because: str | None,
        checkpointing: Checkpointing,
    ) -> None:
        super().__init__()
        self.loss_rows, self.compiles, self.checkpointing = loss_rows, compiles, checkpointing
        self.eager_because = eager_because
        self.kept_layers = 0
        """Number of layers that keep the results of their matrix products for backward."""
        self.hosted_layers = 0
        """Number of these, the first ones, that send a part of them to the host in between."""
        self.dequantised_layers = 0
        """Number of layers, the first ones, whose weights stay dequantised."""
        self.uses_cuda_graphs = False
        """True if the layers' kernels are replayed from recordings, which take memory of their own."""
        self.uses: dict[tuple[int, int], float] = {}
        """Number of micro-batches of the run with each shape of a recording; empty if it is not known."""
        self.model: PeftModel | None = None
        self.slow_because: str | None = None
        """Why training uses the layers of transformers and peft; None if it uses ours."""
        self._layers: dict[bool, list[Layer]] = {}
        """The layers for train mode and for eval mode, which has no dropout."""
        self._weights: list[Weights] = []
        """Dequantised weights of each layer, shared by both modes."""
        self._graphs: Graphs | None = None
        self._host_store = HostStore()

    @property
    def device(self) -> torch.device:
        """The device of the loaded base. Lightning's is the CPU until it moves the module, once that is loaded."""
        return super().device if self.model is None else self._llama.model.embed_tokens.weight.device

    @property
    def peft_model(self) -> "PeftModel":
        """The loaded model. Raises UserError before it is loaded."""
        if self.model is None:
            raise UserError(
                "base and adapter are loaded once training begins",
                option="model",
                remedy="give the module to a Trainer first, or call module.configure_model()",
            )
        return self.model

    @property
    def _llama(self) -> Any:
        """transformers' model, with its decoder and head."""
        return self.peft_model.get_base_model()

    def summed_loss(self, batch: Batch) -> Sums:
        """Summed loss of a batch's answer tokens in nats, count of those that were the likeliest, and their number.

        Args:
            batch: of `data.batching.collate`, padded or packed, on the module's device.

        Returns:
            A scalar in nats, fp32 and differentiable in the adapter; an int64 scalar; and a number.
        """
        return self._summed_loss(self._hidden(batch), batch)

    def _summed_loss(self, hidden: Tensor, batch: Batch) -> Sums:
        scored = hidden.flatten(0, 1)[batch.positions]
        loss, num_correct = summed_cross_entropy(scored, self._llama.lm_head.weight, batch.targets, self.loss_rows)
        return loss, num_correct, len(batch.targets)

    @property
    def can_learn_together(self) -> bool:
        """True with our layers, unless kernels are recorded or a subclass has a loss of its own."""
        is_own = type(self).summed_loss is ComputesSums.summed_loss
        return is_own and not (self.slow_because or self.uses_cuda_graphs)

    def draw(self) -> tuple[int, ...]:
        """The seeds of dropout of a micro-batch that waits for others, drawn when it comes."""
        return draw_seeds(self._extracted())

    def summed_losses(self, waiting: Sequence[Waiting], earlier: dict[int, Tensor]) -> list[Sums]:
        """`summed_loss` of each of some micro-batches, which go through the layers together.

        Args:
            waiting: at least one, with what `draw` gave for it.
            earlier: gradients by the `id` of their weight, to which those of each micro-batch are added in backward.
        """
        pairs = zip(self._through(waiting, earlier), waiting, strict=True)
        return [self._summed_loss(hidden, one.batch) for hidden, one in pairs]

    def _through(self, waiting: Sequence[Waiting], earlier: Mapping[int, Tensor] | None = None) -> Iterator[Tensor]:
        """Hidden states ``[B, T, h]`` after layers and last norm, of each of ``waiting`` as it is asked for."""
        decoder, micro_batches = self._llama.model, []
        for batch, seeds in waiting:
            hidden = self._embedded(batch)
            places = find_places(decoder.rotary_emb, hidden, batch.lengths)
            micro_batches.append(MicroBatch(hidden, places, seeds, batch.part))
        self._keep_weights(micro_batches[0].hidden.dtype)
        store = self._host_store if self.hosted_layers and self.training and torch.is_grad_enabled() else None
        layers, hosted = self._extracted(), self.hosted_layers
        return map(decoder.norm, run_together(layers, micro_batches, self.kept_layers, store, hosted, earlier))

    def _recompute(self) -> None:
        """Make each layer keep its input only, and no dequantised weight."""
        self.kept_layers = self.hosted_layers = self.dequantised_layers = 0
        if self.slow_because:
            checkpoint_layers(self._llama.model.layers, "full")
        self._forget_layers()

    def release(self) -> None:
        """Free the recordings, and the memory of the host that tensors waited in."""
        self._graphs = None
        self._host_store.close()

    def _forget_layers(self) -> None:
        """Discard extracted layers and recordings, which are of one setting and of a model that stays in place."""
        self._layers.clear()
        self._weights.clear()
        self.release()

    def _choose_kept(self, dtype: torch.dtype) -> None:
        """Choose what layers keep. On a GPU, ``auto`` waits for `callbacks.warmup`, which knows the batches."""
        shape, on_gpu = self.base.shape, self.device.type != "cpu"
        chosen = choose_checkpointing(self.checkpointing, on_gpu, not self.slow_because)
        is_open = chosen != self.checkpointing
        self.kept_layers = shape.num_layers if chosen in ("selective", "none") else 0
        self.dequantised_layers = 0
        if is_open and not self.shards:  # what is shared has no room whole
            layer_bytes = shape.num_quantized // shape.num_layers * dtype.itemsize
            self.dequantised_layers = min(shape.num_layers, host.room_bytes() // layer_bytes)

    def _hidden(self, batch: Batch) -> Tensor:
        """Hidden states ``[B, T, h]`` after the last norm."""
        decoder = self._llama.model
        # No attention mask: rows are padded on the right, where causal attention never looks. No cache:
        # with one, transformers would take it for generation.
        if self.slow_because:
            # Restarted positions mark the conversations for transformers, if there is no mask and no cache.
            within = [torch.arange(length, device=batch.input_ids.device) for length in batch.lengths]
            places = torch.cat(within)[None] if within else None
            output = decoder(input_ids=batch.input_ids, position_ids=places, use_cache=False)
            return output.last_hidden_state  # type: ignore[no-any-return]
        if self._replays(batch):
            hidden = self._embedded(batch)
            return decoder.norm(self._recordings(hidden)(hidden))  # type: ignore[no-any-return]
        return next(self._through([Waiting(batch, self.draw())]))

    def _replays(self, batch: Batch) -> bool:
        return self.uses_cuda_graphs and self.training and torch.is_grad_enabled() and not batch.lengths

    def _recordings(self, like: Tensor) -> Graphs:
        """The recordings of the layers, for hidden states ``like`` these."""
        layers = self._extracted()
        self._keep_weights(like.dtype)  # before a recording, whose memory is used again
        if self._graphs is None or self._graphs.kept_layers != self.kept_layers:
            self._graphs = Graphs(layers, self.kept_layers, self._llama.model.rotary_emb, self.uses)
        return self._graphs

    def prepare(self, batch: Batch) -> None:
        """Record the kernels of ``batch``, which another device computes, when that device does."""
        if self._replays(batch):
            like = self._llama.model.embed_tokens.weight
            rows, tokens = batch.input_ids.shape
            self._recordings(like).prepare((rows, tokens), like)

    def _extracted(self) -> list[Layer]:
        """The layers for the current mode."""
        if self.training not in self._layers:
            is_compiled = compiles_kernels(self.compiles, self.device.type == "cuda", self.eager_because)
            self._weights = self._weights or weights_of(self.peft_model, self.shards, is_compiled)
            pointwise = compiled() if is_compiled else EAGER
            self._layers[self.training] = extract_layers(self.peft_model, pointwise, self._weights)
        return self._layers[self.training]

    def _keep_weights(self, dtype: torch.dtype) -> None:
        for weights in self._weights[: self.dequantised_layers]:
            weights.keep(dtype)

    def _embedded(self, batch: Batch) -> Tensor:
        """Hidden states ``[B, T, h]`` before the layers. Raises UserError for a row beyond their sliding window."""
        longest = max(batch.lengths, default=batch.input_ids.shape[1])
        if self.base.window and longest > self.base.window:
            raise UserError(
                f"a row has {longest:,} tokens, and from {self.base.window:,} on the layers of {self.base.name} forget "
                "the first, by its sliding_window",
                option="dataloaders",
                remedy="give shorter rows, or --model.own_layers false, which is slower and computes the window",
            )
        return self._llama.model.embed_tokens(batch.input_ids)  # type: ignore[no-any-return]
