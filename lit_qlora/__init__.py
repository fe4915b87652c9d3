"""lit-qlora: fine-tune Llama 2 in 4-bit with LoRA, as a PyTorch Lightning project.

`QLoRAModule` and `ChatDataModule` are a script's way in: ``Trainer(…).fit(QLoRAModule(…), ChatDataModule(…))``, with
Lightning's own Trainer; `examples/train.py` is one.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_qlora.data.datamodule import ChatDataModule
    from lit_qlora.model.module import QLoRAModule

__all__ = ["ChatDataModule", "QLoRAModule", "__version__"]

__version__ = "0.1.0"

_PLACES = {"ChatDataModule": "lit_qlora.data.datamodule", "QLoRAModule": "lit_qlora.model.module"}


def __getattr__(name: str) -> Any:
    """Import the module or class on first use: the command line, which starts here too, answers --help at once."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
