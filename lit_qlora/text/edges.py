"""Owns the removal of special tokens written out as text at the edges of turns.

Such as ``</s>`` after an answer: the encoder inserts the real ones. Inside a text they stay text. Knows no tokenizer.
"""

from collections.abc import Sequence
from dataclasses import replace

from lit_qlora.text.conversation import Conversation

WRITTEN_OUT = (
    "<s>", "</s>",  # Llama 2, Mistral
    "<|im_end|>",  # ChatML
    "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>",  # Llama 3
    "<|endoftext|>", "<|end|>",  # GPT-2, Phi
    "<bos>", "<eos>", "<end_of_turn>",  # Gemma
    "<|end_of_turn|>",  # OpenChat
    "<|eot|>", "<|return|>",  # Llama 4, gpt-oss
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",  # noqa: RUF001  # DeepSeek
    "<unk>", "<pad>", "[PAD]", "<|pad|>", "[BOS]", "[EOS]",  # behind the end of a row that was decoded with its padding
)  # fmt: skip
"""Tokens with which common models start and end texts and turns."""


def take_off(text: str, marks: Sequence[str]) -> tuple[str, list[str]]:
    """Remove any number of ``marks`` from both ends of ``text``, with the white space around them.

    Returns:
        The text, unchanged if there was no mark; and each removed mark, once.
    """
    found: dict[str, None] = {}
    rest, some = text.strip(), tuple(marks)
    if not rest.startswith(some) and not rest.endswith(some):
        return text, []
    while mark := next((mark for mark in marks if rest.startswith(mark) or rest.endswith(mark)), ""):
        found[mark] = None
        rest = rest.removeprefix(mark).removesuffix(mark).strip()
    return (rest, [*found]) if found else (text, [])


def clean(conversation: Conversation, marks: Sequence[str]) -> tuple[Conversation, list[str]]:
    """``conversation`` without ``marks`` at the edges of its turns and of its system text; and the removed ones.

    Raises:
        ValueError: naming the turn that holds nothing else.
    """
    taken: dict[str, None] = {}
    turns = []
    for number, turn in enumerate(conversation.turns, start=1):
        content, found = take_off(turn.content, marks)
        if not content:
            raise ValueError(f"turn {number}: the {turn.role} holds nothing but {' '.join(found)}")
        turns.append(replace(turn, content=content) if found else turn)
        taken |= dict.fromkeys(found)
    system, found = take_off(conversation.system or "", marks)
    if taken or found:
        conversation = Conversation(tuple(turns), system or None if found else conversation.system)
    return conversation, [*taken | dict.fromkeys(found)]
