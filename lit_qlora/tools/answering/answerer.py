"""Owns a loaded model that answers without a Trainer: a base with a run's best adapter, or with any adapter folder.

Knows no files of prompts, no terminal.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_qlora.chosen import ResolvedAdapter
from lit_qlora.errors import UserError
from lit_qlora.model.generate import Sampling, generate
from lit_qlora.text.conversation import Conversation, TextError
from lit_qlora.text.formats import PromptFormat
from lit_qlora.tools.answering.streaming import TextStream

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


class Answer(NamedTuple):
    """An answer: its ``text`` without what ended it; ``stopped`` is True if the model ended it, False if it was cut."""

    text: str
    stopped: bool


def check_prompt(
    conversation: Conversation, prompt_format: PromptFormat, *, numbered: bool = False, **source: Any
) -> None:
    """Check that ``conversation`` ends with the user's turn, and that ``prompt_format`` can write it.

    Args:
        conversation: the open prompt.
        prompt_format: writes it.
        numbered: True to call the last turn by its number, as for rows of a file; else it is the question just asked.
        source: fields of the error, such as ``place``.

    Raises:
        UserError: for any other conversation.
    """
    if conversation.is_answered:
        raise UserError("the last turn is the assistant's, expected the user's", **source)
    try:
        prompt_format.pieces(conversation)
    except ValueError as error:
        is_question = not numbered and isinstance(error, TextError) and error.turn == len(conversation.turns)
        problem = f"it {error.problem}" if is_question else str(error)  # type: ignore[attr-defined]
        raise UserError(problem, **source) from error


class Answerer:
    """Answers conversations that end on the user's turn, with the prompts and the precision of training.

    The tokenizer is loaded at once, base and adapter on first use.

    Args:
        chosen: base and adapter; `model` raises UserError if they do not fit together.
    """

    def __init__(self, chosen: ResolvedAdapter) -> None:
        self.base, self.adapter, self.run, self.options = chosen
        self.encoder = chosen.encoder()

    @cached_property
    def dtype(self) -> "torch.dtype":
        """The dtype to compute in: training's choice for this base and device."""
        from lit_qlora.model.device import choose_precision, compute_dtype, current_device

        return compute_dtype(choose_precision("auto", current_device(), self.base.shape.num_parameters)[0])

    @cached_property
    def model(self) -> "PeftModel":
        """Base and adapter.

        Raises:
            UserError: if they can't be loaded, or do not fit together.
        """
        import torch

        from lit_qlora.model import load, lora
        from lit_qlora.model.copies import Copies

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        copies = Copies(self.options["model"]["quantized_cache"])
        base = copies.find(self.base, self.dtype, device.type) or self.base
        model = load.load_base(base, self.dtype, device, "sdpa")
        return lora.load_adapter(model, base, self.adapter, trainable=False)

    def answer_ids(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        """Answer prompts, as `prompt` encodes them, in one batch.

        Args:
            prompts: ids of each prompt, of any lengths.
            sampling: how tokens are drawn.

        Returns:
            An answer to each of them, in their order.
        """
        return [Answer(*self.encoder.answer(ids, sampling.stop)) for ids in self._generate(prompts, sampling)]

    def stream(self, conversation: Conversation, sampling: Sampling, show: Callable[[str], bool]) -> Answer:
        """Generate one answer and show it meanwhile.

        Args:
            conversation: ends on the user's turn.
            sampling: how tokens are drawn.
            show: called after each token with the new text, which may be empty; False stops the answer.

        Returns:
            The whole answer.

        Raises:
            UserError: for a prompt that leaves no room in the base's context.
        """
        stream = TextStream(self.encoder, sampling.stop)
        (ids,) = self._generate([self.prompt(conversation, sampling)], sampling, lambda token: show(stream.add(token)))
        show(stream.close())
        return Answer(*self.encoder.answer(ids, sampling.stop))

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, show: Callable[[int], bool] | None = None
    ) -> list[list[int]]:
        import torch

        model, encoder, mixed = self.model, self.encoder, self.dtype != torch.float32
        with torch.autocast(model.device.type, self.dtype) if mixed else nullcontext():
            return generate(model, prompts, encoder.stop_ids, sampling, show, encoder.is_over(sampling.stop))

    def without_adapter(self) -> AbstractContextManager[None]:
        """A context in which the base alone answers."""
        return self.model.disable_adapter()  # type: ignore[no-any-return]

    def prompt(self, conversation: Conversation, sampling: Sampling) -> list[int]:
        """Encode an open prompt.

        Args:
            conversation: one that `check_prompt` takes.
            sampling: its ``max_new_tokens`` are the room that an answer needs.

        Raises:
            UserError: if prompt and answer are more than the base's context.
        """
        ids = self.encoder.prompt(conversation)
        if len(ids) + sampling.max_new_tokens > self.base.context_tokens:
            raise UserError(
                f"a prompt of {len(ids)} tokens and max_new_tokens={sampling.max_new_tokens} are "
                f"more than the {self.base.context_tokens} tokens of {self.base.public_name}",
                remedy="shorten it or lower --max_new_tokens",
            )
        return ids

    def trim(self, conversation: Conversation, sampling: Sampling) -> tuple[Conversation, int]:
        """Drop the first turns that do not fit into the base's context.

        Turns are dropped in pairs of question and answer; the system text and the last question are kept.

        Args:
            conversation: an open prompt.
            sampling: its ``max_new_tokens`` are the room that an answer needs.

        Returns:
            The rest of the conversation, and the number of turns dropped.
        """
        for start in range(0, len(conversation.turns), 2):
            kept = replace(conversation, turns=conversation.turns[start:])
            if len(self.encoder.prompt(kept)) + sampling.max_new_tokens <= self.base.context_tokens:
                break
        return kept, start
