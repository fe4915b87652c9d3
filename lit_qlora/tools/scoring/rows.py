"""Owns the scores of given tokens, row by row: of base + adapter, and of the base alone.

Layers, batches and precision are those of `validate`, so that the sums are equal to its own. Knows no statistics.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from lit_qlora.batch import Batch
from lit_qlora.chosen import ResolvedAdapter
from lit_qlora.console import progress_bar
from lit_qlora.data.batching import BatchPlan
from lit_qlora.data.datamodule import ChatDataModule
from lit_qlora.devices.asked import Precision
from lit_qlora.errors import UserError
from lit_qlora.model.loss import token_cross_entropies
from lit_qlora.model.module import QLoRAModule
from lit_qlora.tools.scoring.intervals import Array
from lit_qlora.trainer import QLoRATrainer


class Scorer(QLoRAModule):
    """The module of training, whose predictions are ``read``'s results for a batch: ``[rows, k]``."""

    read: Callable[[Batch], torch.Tensor]

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[tuple[int, ...], torch.Tensor]:
        """Score a batch; Lightning calls it.

        Args:
            batch: padded or packed.
            batch_idx: its number, which is not used.

        Returns:
            The batch's rows by their numbers, and their scores, ``[rows, k]`` in fp64.
        """
        return batch.rows, self.read(batch).double().cpu()

    def sums(self, batch: Batch) -> torch.Tensor:
        """Sums over the learned tokens of each row.

        Args:
            batch: padded or packed.

        Returns:
            ``[rows, 3]`` in fp64: nats, count of the likeliest tokens, and tokens.
        """
        nats, is_likeliest = token_cross_entropies(self._scored(batch), self._head, batch.targets)
        each = torch.stack([nats.double(), is_likeliest.double(), torch.ones_like(nats.double())], 1).cpu()
        if batch.lengths:  # one row behind the other
            ends = torch.tensor(batch.lengths).cumsum(0)
            owner = torch.bucketize(batch.positions.cpu(), ends, right=True)
        else:
            owner = batch.positions.cpu() // batch.input_ids.shape[1]
        return torch.zeros(len(batch.rows), 3, dtype=torch.float64).index_add_(0, owner, each)

    def scores(self, batch: Batch, ids: Sequence[int]) -> torch.Tensor:
        """Logits of some ids after each row's last token; only their rows of the head are multiplied.

        Args:
            batch: ``positions`` are those of the last tokens.
            ids: the ids.

        Returns:
            ``[rows, ids]``, fp32.
        """
        hidden = self._scored(batch)
        # In fp32: rounded to bf16, close letters would often be equal.
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self._head[list(ids)].float().T

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """A context in which the base alone computes."""
        self._layers.clear()  # extracted layers do not see it
        with self.peft_model.disable_adapter():
            yield
        self._layers.clear()

    @property
    def _head(self) -> torch.Tensor:
        llama: Any = self.peft_model.get_base_model()
        return llama.lm_head.weight  # type: ignore[no-any-return]

    def _scored(self, batch: Batch) -> torch.Tensor:
        return self._hidden(batch).flatten(0, 1)[batch.positions]


class Scoring:
    """Base and adapter, loaded on first use.

    Args:
        chosen: base and adapter, and the settings of a run, which apply here, too.
        precision: replaces that in the settings.
        batch_tokens: tokens per batch with padding, replaces the settings' batches.

    Raises:
        UserError: for settings that this device can't compute.
    """

    def __init__(self, chosen: ResolvedAdapter, precision: Precision | None, batch_tokens: int | None) -> None:
        model, trainer = chosen.options["model"], chosen.options["trainer"]
        kept = {name: model[name] for name in ("attention", "compile", "quantized_cache")}
        self.batch_tokens = batch_tokens
        self.module = Scorer(chosen.base.name, str(chosen.adapter), **kept)
        try:
            self.trainer = QLoRATrainer(
                precision=precision or trainer["precision"],
                accelerator="cpu" if trainer["accelerator"] == "cpu" else "auto",
                num_weights=chosen.base.shape.num_parameters,
                logger=False,
                enable_progress_bar=False,
            )
        except UserError as error:
            raise error.replace(option="precision") from error

    def held_out(self, data: ChatDataModule, part: str) -> tuple[Array, Array]:
        """Score held-out rows.

        Args:
            data: DataModule that has set up ``part``.
            part: ``validate`` or ``test``.

        Returns:
            `Scorer.sums` of the base and of the adapter, each ``[rows, 3]``.
        """
        data.trainer = self.trainer
        if self.batch_tokens:
            data.plan = BatchPlan(tokens=max(self.batch_tokens, data.max_length))
        loader = data.val_dataloader() if part == "validate" else data.test_dataloader()
        return self._both(loader, self.module.sums, "held-out rows")

    def choices(self, prompts: Sequence[Sequence[int]], ids: Sequence[int], batch_tokens: int) -> tuple[Array, Array]:
        """Score what may follow each of some prompts.

        Args:
            prompts: ids of each.
            ids: ids that may follow.
            batch_tokens: tokens per batch with padding.

        Returns:
            Logits of the base and of the adapter, each ``[prompts, ids]``.
        """
        plan = BatchPlan(tokens=batch_tokens).epoch([len(prompt) for prompt in prompts], 0, 0)
        batches = [_last_tokens(rows, [prompts[row] for row in rows]) for rows in plan]
        return self._both(batches, lambda batch: self.module.scores(batch, ids), "questions")

    def _both(self, batches: Iterable[Batch], read: Callable[[Batch], torch.Tensor], what: str) -> tuple[Array, Array]:
        self.module.read = read
        self.module.trainer = self.trainer
        self.module.configure_model()
        with self.module.without_adapter():
            base = self._read(batches, f"{what}, base")
        return base, self._read(batches, f"{what}, adapter")

    def _read(self, batches: Iterable[Batch], what: str) -> Array:
        shown = progress_bar(what, iterable=batches, leave=False)
        try:
            parts: Any = self.trainer.predict(self.module, dataloaders=shown)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory at the {what}",
                option="batch_tokens",
                remedy="give a smaller one, such as --batch_tokens 1024",
            ) from error
        rows = [row for rows, _ in parts for row in rows]
        return torch.cat([values for _, values in parts]).numpy()[np.argsort(rows)]  # type: ignore[no-any-return]


def _last_tokens(rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Batch:
    """Prompts padded on the right, each to be followed by a prediction."""
    input_ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    width = input_ids.shape[1]
    ends = torch.tensor([index * width + len(prompt) - 1 for index, prompt in enumerate(prompts)])
    tokens = sum(map(len, prompts))
    return Batch(input_ids, ends, torch.zeros_like(ends), tuple(rows), tokens, len(prompts))
