"""Owns the verb plan: a fit that stops before weights are loaded, and reports what it would need.

Takes fit's own options, and needs neither GPU nor weights nor network. Knows which card is meant.
"""

from dataclasses import replace
from typing import Any

from lit_qlora.command import Command
from lit_qlora.console import fitted
from lit_qlora.data.datamodule import ChatDataModule, check_limit
from lit_qlora.forecast.cards import DEFAULT, Card, find_card
from lit_qlora.forecast.foresee import current_card, foresee
from lit_qlora.model.base import missing_bytes
from lit_qlora.model.device import AMPERE, NEED_AMPERE, Device, capability_words
from lit_qlora.model.module import QLoRAModule
from lit_qlora.ranges import check_ranges
from lit_qlora.storage.reach import offline
from lit_qlora.tools.planning.lengths import find_rows
from lit_qlora.tools.planning.words import Plan, plan_lines
from lit_qlora.training import DryCLI


class PlanCLI(DryCLI):
    """fit's command for another card, of which neither rows nor tokenizer need be here."""

    found: Plan
    """The forecast and other results to report."""

    def device(self) -> Device:
        """The card, for which everything is decided from here on."""
        options = self.config[self.verb]
        check_ranges({"gpu-gib": options.gpu_gib, "gpu-capability": options.gpu_capability})
        needs_ampere = {options.trainer.precision, options.model.attention} & {*NEED_AMPERE}
        assumed = AMPERE if needs_ampere else DEFAULT.capability
        self.card = _card(options.gpu, options.gpu_gib, options.gpu_capability, assumed)
        self.is_assumed = (options.gpu, options.gpu_gib, current_card()) == (None, None, None)
        return Device(self.card.name, self.card.capability, is_here=False)

    def check_vocabulary(self) -> None:
        """Do nothing: the tokenizer may not be downloaded, see `find_rows`."""

    def plan(self, model: QLoRAModule, datamodule: ChatDataModule) -> None:
        """Make the forecast of ``model`` and ``datamodule``; LightningCLI calls it as it would the Trainer's method."""
        options = self.config_init[self.verb]
        trainer: Any = self.trainer
        trainer.datamodule, datamodule.trainer = datamodule, trainer
        with offline():
            rows, samples = find_rows(trainer, datamodule, model.base, options.samples)
            download = missing_bytes(model.base)
        forecast = foresee(model, datamodule, trainer, self.card, rows, samples)
        assert forecast is not None, "there is a card"
        whole = replace(forecast, limit=1.0)
        check_limit("limit_train_batches", forecast.limit, whole.epoch.num_micro_batches)
        reason = trainer.precision_reason
        if not (options.gpu or options.gpu_gib is None or options.gpu_capability):
            shown = capability_words(self.card.capability)
            reason = f"compute capability {shown} is assumed; --gpu-capability gives another"
        length = options.trainer.max_epochs, options.trainer.max_steps
        self.found = Plan(model.base, forecast, reason, download, *length, self.is_assumed)


def main(command: Command) -> int:
    """Print the plan of a fit.

    Args:
        command: of fit's options, and a card.

    Returns:
        The exit status.

    Raises:
        UserError: for options that fit would refuse.
    """
    print("\n".join(map(fitted, plan_lines(PlanCLI.of(command).found))))
    return 0


def _card(name: str | None, gib: float | None, capability: str | None, assumed: tuple[int, int]) -> Card:
    """The given card; one of which only the memory is known has the ``assumed`` compute capability."""
    if name is None and gib is not None:
        card = Card(f"card of {gib:g} GiB", gib, assumed)
    else:
        card = find_card(name) if name else current_card() or DEFAULT
    card = replace(card, memory_gib=gib) if gib is not None else card
    if capability is None:
        return card
    major, minor = map(int, capability.split("."))
    return replace(card, capability=(major, minor))
