"""Owns sample answers: what the model says to fixed prompts at each validation, beside what the base says.

Knows the encoder of the DataModule and the module's `answer`; no files.
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_qlora.callbacks.metrics import record
from lit_qlora.callbacks.tensorboard import RunTensorBoard
from lit_qlora.errors import require
from lit_qlora.model.generate import Sampling
from lit_qlora.text.conversation import Conversation, Turn

PROMPTS_AT_ONCE = 8
SHOWN = 16
"""Answers written out in TensorBoard; the share of stops is of them all."""


class SampleAnswers(Callback):
    """Answers prompts at each validation, greedily; records the share that ended by themselves, with EOS.

    Args:
        count: held-out prompts to answer; 0 for none.
        prompts: prompts of your own instead.
        max_new_tokens: tokens of an answer, at most.
    """

    def __init__(self, count: int = 8, prompts: list[str] | None = None, max_new_tokens: int = 128) -> None:
        require(count >= 0, "samples.count", "0 or more", count)
        require(max_new_tokens >= 1, "samples.max_new_tokens", "at least 1", max_new_tokens)
        require(not prompts or all(text.strip() for text in prompts), "samples.prompts", "no empty ones", prompts)
        self.count, self.prompts, self.max_new_tokens = count, prompts, max_new_tokens
        self._conversations: list[Conversation] = []
        self._base_answers: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises UserError for a prompt of the user's own that the prompt format can't hold."""
        for text in self.prompts or () if stage == "fit" else ():
            tags = trainer.datamodule.encoder.tags_in(text)  # type: ignore[attr-defined]
            require(not tags, "samples.prompts", f"texts without {', '.join(tags)}", text)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answers, records and shows."""
        if trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        module: Any = pl_module
        if not self._conversations:
            self._conversations = self.choose(trainer.datamodule)  # type: ignore[attr-defined]
            with module.peft_model.disable_adapter():
                self._base_answers, base_share = self._answer(trainer, module)
            if self._conversations and trainer.global_step == 0 and module.adapter is None:
                record(trainer, {"samples/stopped_share": base_share})
                return
        if not self._conversations:
            return
        answers, share = self._answer(trainer, module)
        record(trainer, {"samples/stopped_share": share})
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                board = logger if isinstance(logger, RunTensorBoard) else logger.experiment
                board.add_text("samples", self._table(answers), trainer.global_step)

    def choose(self, data: Any) -> list[Conversation]:
        """The prompts, in the order in which they are answered."""
        if self.prompts:
            return [Conversation((Turn("user", text),)) for text in self.prompts]
        return [prompt for prompt, _ in data.held_out_prompts(self.count)]

    def _answer(self, trainer: Trainer, module: Any) -> tuple[list[str], float]:
        """The answers' texts, and the share of them that ended with EOS."""
        encoder = trainer.datamodule.encoder  # type: ignore[attr-defined]
        sampling = Sampling(self.max_new_tokens)
        prompts = [encoder.prompt(conversation) for conversation in self._conversations]
        answers: list[list[int]] = []
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            answers += module.answer(prompts[start : start + PROMPTS_AT_ONCE], encoder.eos_id, sampling)
        stopped = sum(answer[-1:] == [encoder.eos_id] for answer in answers)
        return [encoder.decode(answer) for answer in answers], stopped / max(len(answers), 1)

    def _table(self, answers: list[str]) -> str:
        rows = [
            "| prompt | base | adapter |\n|---|---|---|",
            *(
                f"| {_cell(conversation.turns[-1].content)} | {_cell(base)} | {_cell(answer)} |"
                for conversation, base, answer in zip(
                    self._conversations[:SHOWN], self._base_answers[:SHOWN], answers[:SHOWN], strict=True
                )
            ),
        ]
        return "\n".join(rows)


def _cell(text: str) -> str:
    """Text as one cell of a Markdown table."""
    return "<br>".join(text.replace("\\", "\\\\").replace("|", "\\|").splitlines())
