"""Owns one conversation with an adapter, wherever it is held: its memory, what fits, and notices beside it.

Knows neither terminal nor page: notices are returned.
"""

from dataclasses import replace

from lit_qlora.model.generate import Sampling
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.tools.answering.answerer import Answer, Answerer, check_prompt
from lit_qlora.wording import number_of


def cut_note(sampling: Sampling, limit: str = "--max_new_tokens") -> str:
    """The notice for a cut answer.

    Args:
        sampling: sampling options, with the limit of an answer.
        limit: what sets it, in words.
    """
    return f"(cut at {number_of(sampling.max_new_tokens, 'tokens')}; {limit} sets the limit)"


class Dialog:
    """One conversation.

    Args:
        answerer: answers.
        sampling: how to sample; each question has its own seed, counted up from this one's.
        system: the system text; None for that of training, empty for none.
    """

    def __init__(self, answerer: Answerer, sampling: Sampling, system: str | None) -> None:
        self.answerer, self.sampling, self.system = answerer, sampling, system
        self.turns: list[Turn] = []
        self._num_left_out = 0

    def fitting(self, turns: list[Turn]) -> tuple[Conversation, str]:
        """The conversation to ask, without first turns that no longer fit into the context.

        Args:
            turns: all turns, the new question last.

        Returns:
            The conversation, and a notice if more turns than before were dropped, else an empty text.

        Raises:
            UserError: for a question that can't be asked.
        """
        whole = Conversation(tuple(turns), self.system)
        check_prompt(whole, self.answerer.encoder.prompt_format)
        fitting, num_left_out = self.answerer.trim(whole, self.sampling)
        self.answerer.prompt(fitting, self.sampling)  # raises where even the question alone has no room
        grew, self._num_left_out = num_left_out > self._num_left_out, num_left_out
        room = self.answerer.base.context_tokens
        return fitting, f"(the first {num_left_out} turns no longer fit into {room} tokens: left out)" if grew else ""

    def remember(self, question: str, answer: Answer) -> str:
        """Keep question and answer for the next question, which has another seed.

        Args:
            question: what was asked.
            answer: what was answered.

        Returns:
            A notice if the next prompt could not hold the answer, so that both are forgotten; else an empty text.
        """
        self.sampling = replace(self.sampling, seed=(self.sampling.seed + 1) % 2**64)
        tags = self.answerer.encoder.prompt_format.tags_in(answer.text)
        if not answer.text or tags:
            return f"(the answer {f'holds {tags[0]}' if tags else 'is empty'}: question and answer are forgotten)"
        self.turns += [Turn("user", question), Turn("assistant", answer.text)]
        return ""

    def forget(self) -> None:
        """Start over; system text and seed are kept."""
        self.turns, self._num_left_out = [], 0

    def set_system(self, system: str) -> None:
        """Set another system text.

        Args:
            system: the text; empty for none.

        Raises:
            UserError: for a text that no prompt can hold.
        """
        check_prompt(Conversation((Turn("user", "hello"),), system), self.answerer.encoder.prompt_format)
        self.system = system

    @property
    def effective_system(self) -> str | None:
        """The system text that questions go with."""
        return self.answerer.encoder.prompt_format.system if self.system is None else self.system
