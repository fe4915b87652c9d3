"""Owns the Llama 2 text form: ``<s>[INST] … [/INST] … </s>`` to messages, and a system text written into a prompt.

A form of rows; `llama2` writes the format that a model is prompted in. Knows no file, no tokens.
"""

import re
from dataclasses import replace

from lit_qlora.text import edges
from lit_qlora.text.conversation import Conversation

# A common slip closes the system block with its opening tag.
_BLOCK = re.compile(r"<<SYS>>(.*?)<</?SYS>>(.*)", re.DOTALL)
_FIRST_MARK = re.compile(r"\s*(?:<s>)?\s*(\[INST\])?\s*")


def without_block(conversation: Conversation) -> Conversation:
    """A conversation with the system text that Llama 2's format writes into the first prompt in its own place.

    Args:
        conversation: of rows of any form; with a system text of its own, one in the prompt stays.
    """
    first, system = conversation.turns[0], conversation.system or ""
    block = _BLOCK.fullmatch((system or first.content).strip())
    if block is None or conversation.is_text or (system and block[2].strip()):
        return conversation
    turns = conversation.turns if system else (replace(first, content=block[2].strip()), *conversation.turns[1:])
    return replace(conversation, turns=turns, system=block[1].strip() or None)


def parse(text: str) -> list[dict[str, str]]:
    """Read the messages of a row ``<s>[INST] … [/INST] … </s><s>[INST] …`` of any number of turns.

    ``<s>`` and ``</s>`` may be missing, the system block too; the last prompt may be unanswered.
    White space around a turn goes.

    Args:
        text: all of the row.

    Returns:
        Messages of a role and a content, in order.

    Raises:
        ValueError: when there is no prompt, text stands before the first one, or a tag is unpaired.
    """
    head, *rounds = text.split("[INST]")
    if not rounds:
        raise ValueError("no [INST] in the text")
    if edges.take_off(head, edges.WRITTEN_OUT)[0].strip():
        raise ValueError("text stands before the first [INST]")
    rows = list[dict[str, str]]()
    for index, written in enumerate(rounds):
        system, pair = _split_system(written)
        rows.append({"role": "system", "content": system})
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
    return rows


def rounds_in(prompt: str) -> list[dict[str, str]] | None:
    """The messages of a prompt that has a system text or rounds before it in this form; None for any other.

    Args:
        prompt: a question of a row in another form.

    Raises:
        ValueError: as `parse`.
    """
    opening = _FIRST_MARK.match(prompt)
    rest = prompt[opening.end() :].rstrip() if opening else ""
    if not (rest.startswith("<<SYS>>") or (opening and opening[1] and "[INST]" in rest)):
        return None
    return parse(f"[INST]{rest}{'' if rest.endswith('[/INST]') else '[/INST]'}")


def _split_system(prompt: str) -> tuple[str, str]:
    if not prompt.lstrip().startswith("<<SYS>>"):
        return "", prompt
    match = _BLOCK.fullmatch(prompt.lstrip())
    if match is None:
        raise ValueError("the system text opens with <<SYS>> and is never closed by <</SYS>>")
    return match[1].strip(), match[2]
