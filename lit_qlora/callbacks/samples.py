"""Owns sample answers: what the model says to fixed prompts at each validation, beside what the base says.

How each of them ended is counted: of one that was cut, nobody knows whether it would have ended. Knows the encoder of
the DataModule and the module's `answer`; no files.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_qlora.callbacks.metrics import record
from lit_qlora.callbacks.tensorboard import RunTensorBoard
from lit_qlora.errors import require
from lit_qlora.model.generate import PROMPTS_AT_ONCE, Sampling
from lit_qlora.text.conversation import Conversation, Turn

SHOWN = 16
"""Answers written out in TensorBoard; how they ended is counted of them all."""


ENDED, LIMIT, CONTEXT = "samples/ended", "samples/cut", "samples/cut_by_context"
"""Figures: answers that ended by themselves, that the limit cut, and that would have left the base's context."""
TOKENS = "samples/max_new_tokens"
"""The limit that these hold for: a run that is resumed may have another."""


class SampleAnswer(NamedTuple):
    """An answer's text, and what cut it off; nothing did where it ended by itself, with EOS."""

    text: str
    cut_by: str | None


class SampleAnswers(Callback):
    """Answers prompts at each validation, greedily; records how many ended by themselves, and how many were cut.

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
        self._base_answers: list[SampleAnswer] = []

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
                self._base_answers = self._answer(trainer, module)
            if self._conversations and trainer.global_step == 0 and module.adapter is None:
                record(trainer, self._figures(self._base_answers))
                return
        if not self._conversations:
            return
        answers = self._answer(trainer, module)
        record(trainer, self._figures(answers))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                board = logger if isinstance(logger, RunTensorBoard) else logger.experiment
                board.add_text("samples", self._table(answers), trainer.global_step)

    def choose(self, data: Any) -> list[Conversation]:
        """The prompts, in the order in which they are answered."""
        if self.prompts:
            return [Conversation((Turn("user", text),)) for text in self.prompts]
        return [prompt for prompt, _ in data.held_out_prompts(self.count)]

    def _answer(self, trainer: Trainer, module: Any) -> list[SampleAnswer]:
        """An answer to each prompt, as far as the limit and the base's context allow."""
        encoder = trainer.datamodule.encoder  # type: ignore[attr-defined]
        sampling = Sampling(self.max_new_tokens)
        prompts = [encoder.prompt(conversation) for conversation in self._conversations]
        answers: list[list[int]] = []
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            answers += module.answer(prompts[start : start + PROMPTS_AT_ONCE], encoder.eos_id, sampling)
        room = [max(module.base.context_tokens - len(prompt), 0) for prompt in prompts]
        within = [answer[:tokens] for answer, tokens in zip(answers, room, strict=True)]
        return [SampleAnswer(encoder.decode(answer), self._cut_by(answer, encoder.eos_id)) for answer in within]

    def _cut_by(self, answer: list[int], eos_id: int) -> str | None:
        if answer[-1:] == [eos_id]:
            return None
        return LIMIT if len(answer) >= self.max_new_tokens else CONTEXT

    def _figures(self, answers: Sequence[SampleAnswer]) -> dict[str, float]:
        """Counts of ends, the limit that they hold for, and the share that ended by themselves."""
        ends = [answer.cut_by for answer in answers]
        figures = {ENDED: ends.count(None), LIMIT: ends.count(LIMIT), TOKENS: self.max_new_tokens}
        if CONTEXT in ends:
            figures[CONTEXT] = ends.count(CONTEXT)
        return {**figures, "samples/stopped_share": ends.count(None) / max(len(ends), 1)}

    def _table(self, answers: list[SampleAnswer]) -> str:
        rows = [
            "| prompt | base | adapter |\n|---|---|---|",
            *(
                f"| {_cell(conversation.turns[-1].content)} | {self._shown(base)} | {self._shown(answer)} |"
                for conversation, base, answer in zip(
                    self._conversations[:SHOWN], self._base_answers[:SHOWN], answers[:SHOWN], strict=True
                )
            ),
        ]
        return "\n".join(rows)

    def _shown(self, answer: SampleAnswer) -> str:
        cut_by = {LIMIT: f"at {self.max_new_tokens:,} tokens", CONTEXT: "by the base's context"}
        return _cell(answer.text) + (f" *(cut {cut_by[answer.cut_by]})*" if answer.cut_by else "")


def ends_in_words(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str | None, str]]:
    """How sample answers ended, by the figures of two steps: a title, and how many of how many, before and after.

    None stands for what was not measured before; nothing is returned where it was not after.
    """
    if ENDED not in after:
        return []
    limits = {f"{int(line[TOKENS]):,}" for line in (before, after) if TOKENS in line}
    titles = {ENDED: "answers that ended by themselves", LIMIT: f"answers cut at {' or '.join(sorted(limits))} tokens"}
    if CONTEXT in before or CONTEXT in after:
        titles[CONTEXT] = "answers cut by the base's context"
    return [(title, _of_all(before, name), str(_of_all(after, name))) for name, title in titles.items()]


def _of_all(line: Mapping[str, Any], name: str) -> str | None:
    if ENDED not in line:
        return None
    counts = {end: int(line.get(end, 0)) for end in (ENDED, LIMIT, CONTEXT)}
    return f"{counts[name]} of {sum(counts.values())}"


def _cell(text: str) -> str:
    """Text as one cell of a Markdown table."""
    return "<br>".join(text.replace("\\", "\\\\").replace("|", "\\|").splitlines())
