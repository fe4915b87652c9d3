"""Fine-tune from a script of one's own, with Lightning's plain Trainer.

    python examples/train.py
    python main.py chat --adapter my-run/adapter

The settings are those of configs/demo.yaml, and so are the losses, to the last bit on a CPU. For Llama 2, give
``QLoRAModule`` a base and ``ChatDataModule`` a source. What `python main.py fit` has beside it, such as a run folder
that is resumed exactly after a kill, is made of callbacks; without them, Lightning's own checkpoints resume this.
"""

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone that this lies in; it is not installed

from lit_qlora import ChatDataModule, QLoRAModule
from lit_qlora.errors import UserError
from lit_qlora.model.device import choose_precision, current_device
from lit_qlora.quiet import quieten


def train(folder: Path, **options: Any) -> Trainer:
    """Train, and leave the adapter with the lowest held-out loss in ``folder``.

    Args:
        folder: for figures, checkpoints and the adapter.
        **options: of the Trainer, in place of those below.

    Returns:
        The Trainer, whose ``callback_metrics`` are the best adapter's.
    """
    quieten()  # what the libraries say to each other
    seed_everything(42)  # LoRA begins at random
    module = QLoRAModule(base="demo", learning_rate=0.003, schedule="linear", warmup_ratio=0.05)
    data = ChatDataModule(source="demo", max_length=160)
    best = ModelCheckpoint(folder / "checkpoints", monitor="val/loss")
    settings: dict[str, Any] = {
        "precision": choose_precision("auto", current_device())[0],  # 16-mixed on a T4, bf16-mixed on newer cards
        "devices": 1,
        "max_epochs": 1,
        "val_check_interval": 100,
        "check_val_every_n_epoch": None,  # the interval counts on over epochs
        "log_every_n_steps": 25,
        "gradient_clip_val": 1.0,
        "callbacks": [best, EarlyStopping("val/loss", patience=3)],
        "logger": CSVLogger(folder),
        "enable_model_summary": False,  # it counts two 4-bit weights as one
    }
    trainer = Trainer(**settings | options)
    trainer.fit(module, data)
    trainer.validate(module, data, ckpt_path="best")
    module.save_adapter(folder / "adapter")
    return trainer


if __name__ == "__main__":
    try:
        train(Path("my-run"))
    except UserError as error:  # a mistake in a setting or in the data: one line says what to do
        sys.exit(f"error: {error}")
