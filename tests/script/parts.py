"""Owns what a script is tried with: Lightning's Trainer, the module and the data, each short and small."""

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_qlora import ChatDataModule, QLoRAModule

CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def trainer(**options):
    """Lightning's own, short and silent."""
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_steps": 2}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in options.get("callbacks", []))
    return Trainer(**{"accelerator": "cpu", "limit_val_batches": 1, "enable_checkpointing": saves, **silent, **options})


def module(**options):
    seed_everything(42, verbose=False)
    return QLoRAModule(**{"rank": 2, "alpha": 2.0, **options})


def data(**options):
    return ChatDataModule(**{"max_length": 96, **options})
