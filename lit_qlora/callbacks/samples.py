"""Owns sample answers: those of the model to fixed prompts at each validation, beside those of the base.

Counts how each of them ended: whether a cut one would have ended is unknown. Knows the encoder of the DataModule and
the module's `answer`; no files.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_qlora.arguments import checked_arguments
from lit_qlora.callbacks.record import record, record_of
from lit_qlora.console import passing_bar
from lit_qlora.errors import UserError, require
from lit_qlora.figures.samples import CUT, CUT_BY_CONTEXT, SampleAnswer, counts_of_ends, samples_line, table
from lit_qlora.forecast.foresee import Needs
from lit_qlora.forecast.memory import Samples
from lit_qlora.model.generate import PROMPTS_AT_ONCE, Sampling
from lit_qlora.text.conversation import Conversation, Turn


class SampleAnswers(Callback, Needs):
    """A callback that answers prompts at each validation, and records how many ended by themselves or were cut.

    Args:
        count: number of held-out prompts to answer; 0 for none.
        prompts: your own prompts instead.
        max_new_tokens: most tokens of one answer.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that make up this share.
        top_k: sample from this many likeliest tokens; 0: from all.
        min_p: sample from tokens at least this share as likely as the likeliest.
        repetition_penalty: lowers the odds of tokens already in the prompt or answer, such as 1.1; 1: none.
        stop: a text that ends an answer and is not part of it, or a list of them.

    Raises:
        UserError: for what can't be drawn from.
    """

    @checked_arguments("samples")
    def __init__(
        self,
        count: int = 8,
        prompts: list[str] | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | list[str] = "",
    ) -> None:
        try:
            self.sampling = Sampling(max_new_tokens, temperature, top_p, 0, top_k, min_p, repetition_penalty, stop)
        except UserError as error:
            raise error.replace(option=f"samples.{error.option}") from error
        self.count, self.prompts, self.max_new_tokens = count, prompts, max_new_tokens
        self._conversations: list[Conversation] = []
        self._base_answers: list[SampleAnswer] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises UserError for a user's own prompt that the prompt format can't hold."""
        for text in self.prompts or () if stage == "fit" else ():
            tags = trainer.datamodule.encoder.prompt_format.tags_in(text)  # type: ignore[attr-defined]
            require(not tags, "samples.prompts", f"texts without {', '.join(tags)}", text)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer, record and print."""
        if trainer.state.fn != "fit":
            return
        module: Any = pl_module
        with module.by_first_alone() as is_first:
            if is_first:
                self._record(trainer, module)

    def _record(self, trainer: Trainer, module: Any) -> None:
        if not self._conversations:
            self._conversations = self.choose(trainer.datamodule)  # type: ignore[attr-defined]
            with module.peft_model.disable_adapter():
                self._base_answers = self._answer(trainer, module)
        if not self._conversations:
            return
        is_base = trainer.global_step == 0 and module.adapter is None
        answers = self._base_answers if is_base else self._answer(trainer, module)
        record(trainer, counts_of_ends(answers, self.max_new_tokens))
        prompts = [conversation.turns[-1].content for conversation in self._conversations]
        shown = samples_line(prompts, self._base_answers, None if is_base else answers, self.max_new_tokens)
        kept, text = record_of(trainer), table(shown)
        if kept:
            kept.log_samples(shown, trainer.global_step)
        for logger in trainer.loggers if text else ():
            if isinstance(logger, TensorBoardLogger):  # one of the user's own
                logger.experiment.add_text("samples", text, trainer.global_step)

    def choose(self, data: Any) -> list[Conversation]:
        """The prompts, in the order of answers; without any of the user, held-out ones of ``data``, the DataModule."""
        if self.prompts:
            return [Conversation((Turn("user", text),)) for text in self.prompts]
        return [prompt for prompt, _ in data.held_out_prompts(self.count)]

    def samples(self, data: Any) -> Samples:
        """The sample answers for the forecast: all prompts, by the longest of them."""
        lengths = [len(data.encoder.prompt(prompt)) for prompt in self.choose(data)]
        return Samples(len(lengths), max(lengths, default=0), self.max_new_tokens, are_own=bool(self.prompts))

    def _answer(self, trainer: Trainer, module: Any) -> list[SampleAnswer]:
        """An answer to each prompt, within the limit and the base's context."""
        encoder = trainer.datamodule.encoder  # type: ignore[attr-defined]
        stop = self.sampling.stop
        prompts = [encoder.prompt(conversation) for conversation in self._conversations]
        answers = list[list[int]]()
        room = [max(module.base.context_tokens - len(prompt), 0) for prompt in prompts]
        starts = range(0, len(prompts), PROMPTS_AT_ONCE)
        ends = encoder.is_over(stop)
        with passing_bar("answers", len(starts) * self.max_new_tokens, " tokens") as move:
            for number, start in enumerate(starts):
                some = prompts[start : start + PROMPTS_AT_ONCE]
                most = max(1, *room[start : start + PROMPTS_AT_ONCE])
                sampling = replace(self.sampling, max_new_tokens=min(self.max_new_tokens, most))

                def is_over(ids: Sequence[int], before: int = number * self.max_new_tokens) -> bool:
                    move(before + len(ids))  # to the longest answer's end
                    return ends is not None and ends(ids)

                answers += module.answer(some, encoder.stop_ids, sampling, is_over)
        samples = []
        for answer, tokens in zip(answers, room, strict=True):
            text, has_ended = encoder.answer(answer[:tokens], stop)
            cut_by = CUT if len(answer[:tokens]) >= self.max_new_tokens else CUT_BY_CONTEXT
            samples.append(SampleAnswer(text, None if has_ended else cut_by))
        return samples
