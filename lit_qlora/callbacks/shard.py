"""Owns the decision whether the base is shared, where that is left to the forecast: before a weight is loaded."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_qlora.devices.world import any_of, world
from lit_qlora.forecast.foresee import current_card, fits_to_score, foresee


class ShardChoice(Callback):
    """A callback that turns model.shard auto into true where a whole base does not fit on the smallest card and a share
    does; into false elsewhere, and on a CPU."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Decide, in all processes alike; the rows are encoded by now."""
        module: Any = pl_module
        if module.shard == "auto":
            module.shard = any_of(_is_shared(trainer, module, stage))


def _is_shared(trainer: Trainer, module: Any, stage: str) -> bool:
    card = current_card()
    if card is None:
        return False
    if stage == "fit":
        forecast = foresee(module, trainer.datamodule, trainer)  # type: ignore[attr-defined]
        return forecast is not None and forecast.is_shared
    can_share = not module.slow_because and (world().size > 1 or module.shard_to == "host")
    return can_share and not fits_to_score(module, trainer.datamodule, trainer, card)  # type: ignore[attr-defined]
