"""Answers to whole conversations, as one batch."""

from collections.abc import Sequence

from lit_qlora.model.generate import Sampling
from lit_qlora.text.conversation import Conversation
from lit_qlora.tools.answering.answerer import Answer, Answerer


def answers(answerer: Answerer, conversations: Sequence[Conversation], sampling: Sampling) -> list[Answer]:
    return answerer.answer_ids([answerer.prompt(one, sampling) for one in conversations], sampling)
