"""Owns the Llama 2 chat format: what a conversation looks like to the model, and rows that show it.

`segments` is the one road to training and to chat; the encoder puts BOS before each prompt and EOS
after each answer, as ids. `parse` and `render` deal with rows in which both are written out.
Knows no file, no tokens.
"""

import re
from typing import NamedTuple

from lit_qlora.text import edges, messages
from lit_qlora.text.conversation import Conversation

FORMAT = "llama2-chat"
"""The name of this format in an adapter's record."""

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

# A common slip closes the system block with its opening tag.
SYSTEM_BLOCK = re.compile(r"<<SYS>>(.*?)<</?SYS>>(.*)", re.DOTALL)


class Segment(NamedTuple):
    """A stretch of text that is either a prompt or an answer, to be encoded by itself."""

    text: str
    is_answer: bool


def tags_in(text: str) -> list[str]:
    """The tags of the format that stand in ``text``, where they could forge a turn or a system text."""
    return [tag for tag in TAGS if tag in text]


def segments(conversation: Conversation) -> list[Segment]:
    """Writes a conversation as Meta's code does, prompt and answer by turns, without BOS and EOS.

    ``[INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n{user} [/INST]`` then ``{answer} ``, and so on: the
    system text stands in the first prompt only. An open prompt ends on a prompt.

    Raises:
        ValueError: naming the tag and the turn, when the text holds one of `TAGS`: it could forge a
            turn or a system text.
    """
    _refuse_tags("the system text", conversation.system or "")
    written = []
    for index, turn in enumerate(conversation.turns):
        _refuse_tags(f"turn {index + 1}", turn.content)
        content = turn.content
        if index == 0 and conversation.system:
            content = f"<<SYS>>\n{conversation.system}\n<</SYS>>\n\n{content}"
        content = content.strip()
        is_answer = turn.role == "assistant"
        written.append(Segment(f"{content} " if is_answer else f"[INST] {content} [/INST]", is_answer))
    return written


def _refuse_tags(where: str, text: str) -> None:
    for tag in TAGS:
        if tag in text:
            raise ValueError(f"{where} holds the tag {tag}, which could forge a turn or a system text")


def parse(text: str) -> Conversation:
    """Reads a row ``<s>[INST] … [/INST] … </s><s>[INST] …`` of any number of turns.

    ``<s>`` and ``</s>`` may be missing, the system block too; the last prompt may be unanswered.
    White space around a turn goes.

    Raises:
        ValueError: when there is no prompt, text stands before the first one, a tag is unpaired, or
            a turn is blank (an answer, too, if ``</s>`` or another prompt follows).
    """
    head, *rounds = text.split("[INST]")
    if not rounds:
        raise ValueError("no [INST] in the text")
    if edges.take_off(head, edges.WRITTEN_OUT)[0].strip():
        raise ValueError("text stands before the first [INST]")
    system, rounds[0] = _split_system(rounds[0])
    rows = [{"role": "system", "content": system}]
    for index, pair in enumerate(rounds):
        number = 2 * index + 1
        prompt, closing, rest = pair.partition("[/INST]")
        if not closing:
            raise ValueError(f"turn {number}: [INST] without its [/INST]")
        if "[/INST]" in rest:
            raise ValueError(f"turn {number + 1}: [/INST] without its [INST]")
        rows.append({"role": "user", "content": prompt.strip()})
        rest = rest.strip().removesuffix("<s>").rstrip()
        answer = rest.removesuffix("</s>").rstrip()
        if rest or index + 1 < len(rounds):
            rows.append({"role": "assistant", "content": answer})
    return messages.parse(rows)


def _split_system(prompt: str) -> tuple[str, str]:
    if not prompt.lstrip().startswith("<<SYS>>"):
        return "", prompt
    match = SYSTEM_BLOCK.fullmatch(prompt.lstrip())
    if match is None:
        raise ValueError("the system text opens with <<SYS>> and is never closed by <</SYS>>")
    return match[1].strip(), match[2]


def render(conversation: Conversation) -> str:
    """Writes the row that `parse` reads, BOS and EOS spelled out: to be looked at, never trained on.

    Raises:
        ValueError: as `segments` does.
    """
    return "".join(f" {text}</s>" if is_answer else f"<s>{text}" for text, is_answer in segments(conversation))
