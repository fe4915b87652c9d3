"""Owns a loaded model that answers: a base with a run's best adapter, any adapter folder, or none.

What `predict` and whoever else answers without a Trainer stands on. Knows no files of prompts.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from lit_qlora.errors import UserError
from lit_qlora.model.base import Base, find_base
from lit_qlora.model.generate import Sampling
from lit_qlora.quiet import quieten
from lit_qlora.storage.run import newest_run, open_run
from lit_qlora.text.conversation import Conversation


class Answer(NamedTuple):
    """An answer's text, and whether the model ended it by itself."""

    text: str
    stopped: bool


class Chosen(NamedTuple):
    """An adapter, its base, and of a run also what it was trained with."""

    base: Base
    adapter: Path
    settings: dict[str, Any] | None

    @property
    def system(self) -> str | None:
        """The system text for conversations that bring none."""
        return self.settings["data"].get("system") if self.settings else None


def choose_adapter(run: str | None = None, adapter: str | None = None, base: str | None = None) -> Chosen:
    """The adapter that is meant by ``run`` (default: the newest) or ``adapter``, and its base unless that is given.

    Raises UserError when there is no such run, adapter or base.
    """
    if adapter is None:
        folder = open_run(Path(run)) if run else newest_run()
        settings = folder.read_config()
        if not (folder.adapter / "adapter_config.json").is_file():
            raise UserError(f"run: {folder.path} has no adapter yet; train it first, or give --adapter")
        return Chosen(find_base(base or settings["model"]["base"]), folder.adapter, settings)
    from lit_qlora.model.load import read_record

    base = base or read_record(Path(adapter))["base"]
    if base is None:
        raise UserError(f"adapter: {adapter} does not say which base it is for; give --base")
    return Chosen(find_base(base), Path(adapter), None)


class Answerer:
    """Answers conversations that end on the user's turn, with the prompts and the precision of training.

    Args:
        run: a run folder, for its best adapter; default: the newest run.
        adapter: an adapter folder instead.
        base: the base of ``adapter``; default: the one that the folder names.

    Raises UserError when there is no such run or adapter, or they do not fit together.
    """

    def __init__(self, run: str | None = None, adapter: str | None = None, base: str | None = None) -> None:
        chosen = choose_adapter(run, adapter, base)
        self.base, self.adapter = chosen.base, chosen.adapter
        self._load(chosen.system)

    def _load(self, system: str | None) -> None:
        import torch

        from lit_qlora.data.encode import Encoder, load_tokenizer
        from lit_qlora.model import load
        from lit_qlora.model.device import choose_precision, compute_dtype, current_device

        quieten()
        precision, _ = choose_precision("auto", current_device())
        dtype = compute_dtype(precision)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.max_length = int(self.base.config["max_position_embeddings"])
        self.encoder = Encoder(load_tokenizer(self.base.location), self.max_length, system=system)
        model = load.load_base(self.base, dtype, device, "sdpa")
        self.model = load.load_adapter(model, self.base, self.adapter, trainable=False)
        mixed = dtype != torch.float32
        self._context = torch.autocast(device.type, dtype) if mixed else nullcontext()

    def answer(self, conversations: Sequence[Conversation], sampling: Sampling) -> list[Answer]:
        """An answer to each conversation, as one batch.

        Raises UserError for a prompt that leaves no room in the base's context.
        """
        from lit_qlora.model.generate import generate

        prompts = [self.encoder.prompt(conversation) for conversation in conversations]
        longest = max(len(prompt) for prompt in prompts)
        if longest + sampling.max_new_tokens > self.max_length:
            raise UserError(
                f"a prompt of {longest} tokens and max_new_tokens={sampling.max_new_tokens} are more than the "
                f"{self.max_length} tokens of {self.base.name}; shorten it or lower --max_new_tokens"
            )
        with self._context:
            answers = generate(self.model, prompts, self.encoder.eos_id, sampling)
        return [Answer(self.encoder.decode(ids), ids[-1:] == [self.encoder.eos_id]) for ids in answers]
