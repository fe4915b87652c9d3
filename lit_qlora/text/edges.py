"""Owns the removal of special tokens written out as text at the edges of what is said.

Such as ``</s>`` after an answer: the encoder inserts the real ones. Inside a text they stay text, and so does what only
looks similar: ``[/s]`` is a forum's markup, ``&lt;/s&gt;`` speaks of one. Knows no tokenizer.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from lit_qlora.text.conversation import Conversation

OPENERS = (
    "<|im_start|>",  # ChatML
    "<|start_header_id|>", "<|header_start|>",  # Llama 3 and 4
    "<start_of_turn>",  # Gemma
    "<|start_of_role|>",  # Granite
    "<|start|>", "<|channel|>",  # gpt-oss
)  # fmt: skip
"""Tokens that the name of a role follows."""
NAMED = (
    "[INST]", "[SYSTEM_PROMPT]",  # Llama 2, Mistral
    "<|system|>", "<|user|>", "<|assistant|>",  # Phi, Zephyr
    "<｜User｜>", "<｜Assistant｜>",  # noqa: RUF001  # DeepSeek
)  # fmt: skip
"""Tokens that open a turn, and say whose."""
WRITTEN_OUT = (
    *OPENERS, *NAMED,
    "<s>", "</s>", "[/INST]", "[/SYSTEM_PROMPT]",  # Llama 2, Mistral
    "<|im_end|>", "<|im_sep|>",  # ChatML
    "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end_header_id|>",  # Llama 3
    "<|endoftext|>", "<|end|>",  # GPT-2, Phi
    "<bos>", "<eos>", "<end_of_turn>",  # Gemma
    "<|end_of_turn|>",  # OpenChat
    "<BOS_TOKEN>", "<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>",  # Command R
    "<|eot|>", "<|eom|>", "<|header_end|>", "<|return|>", "<|message|>",  # Llama 4, gpt-oss
    "<|end_of_role|>",  # Granite
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",  # noqa: RUF001  # DeepSeek
    "<|startoftext|>", "<|bos|>", "<|eos|>", "<eot>",  # Yi and others
    "<eoh>", "<eoa>", "[gMASK]", "<sop>", "<eop>", "<|endofprompt|>",  # InternLM, GLM, OpenAI's
    "<unk>", "<pad>", "[PAD]", "<|pad|>", "[BOS]", "[EOS]",  # behind the end of a row that was decoded with its padding
)  # fmt: skip
"""Tokens with which common models start and end texts and turns."""

_CLOSERS = ("<|end_header_id|>", "<|header_end|>", "<|end_of_role|>", "<|im_sep|>", "<|message|>")
_ROLES = (
    "system", "developer", "user", "human", "assistant", "model", "gpt", "bot", "tool", "function", "ipython",
    "observation", "final",
)  # fmt: skip


ZERO_WIDTH = "\u200b\u2060\ufeff"
"""Characters that take no room, and say nothing at an edge: what copying from a page or a file leaves there."""
DIRECTIONS = "\u00ad\u061c\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Others that are not seen either, but may say how a text is written: they go with a mark only."""
_BLANK = "".join(filter(str.isspace, map(chr, range(0x3001)))) + ZERO_WIDTH + DIRECTIONS


class WrittenOutError(ValueError):
    """A text that is a whole conversation in a prompt format."""


def take_off(text: str, marks: Sequence[str]) -> tuple[str, list[str]]:
    """Remove any number of special tokens from both ends of a text, with the white space around them.

    A mark that opens a turn goes with its role, such as ``<|im_start|>assistant``: after one of `OPENERS`, wherever
    a role's name follows; after any other mark, where that name is alone on its line or between marks. At the end of a
    text, what opens a turn stays if a blank is between it and words of the same line: it is what they speak of.

    Args:
        text: what is said.
        marks: the tokens, as they are spelled.

    Returns:
        The text, unchanged if there was no mark; and each removed mark, once.

    Raises:
        WrittenOutError: a turn is opened at an edge, and another inside.
    """
    known = tuple(marks)
    found: dict[str, None] = {}
    rest = text.strip(_BLANK)
    head, tail, opener, longest, folded = _patterns(known)
    begins, ends = rest[:longest].lower().startswith(folded), rest[-longest:].lower().endswith((*folded, *_ROLES))
    if not begins and not ends and len(rest) == len(text.strip()):  # most texts: the patterns are slow
        return text, []
    while mark := head.match(rest):
        found[mark[0]] = None
        while rest.startswith(mark[0]):  # a row may be padded by thousands
            rest = rest.removeprefix(mark[0]).lstrip(_BLANK)
    while (mark := tail.search(rest, max(0, len(rest) - longest))) and not _is_spoken_of(rest, mark, known):
        found[mark[0]] = None
        while rest.endswith(mark[0]):
            rest = rest.removesuffix(mark[0]).rstrip(_BLANK)
    if any(_opens(one, known) for one in found) and (inside := opener.search(rest)):
        raise WrittenOutError(f"a text opens turns inside, with {inside[0]!r}: it is a whole conversation")
    start = text.find(rest)
    if any(one in text[:start] + text[start + len(rest) :] for one in ZERO_WIDTH):
        found["zero-width characters"] = None
    return (rest, [*found]) if found else (text, [])


def clean(conversation: Conversation, marks: Sequence[str]) -> tuple[Conversation, list[str]]:
    """A conversation without special tokens at the edges of its turns and of its system text.

    Args:
        conversation: to be cleaned.
        marks: the tokens, as they are spelled.

    Returns:
        The conversation, and each removed mark, once.

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


def _opens(mark: str, marks: Sequence[str]) -> bool:
    """True if ``mark``, as matched, opens a turn: with its role, or as a name of one."""
    return mark.lower() not in map(str.lower, marks) or mark.upper() in map(str.upper, NAMED)


def _is_spoken_of(text: str, mark: re.Match[str], marks: Sequence[str]) -> bool:
    """True if ``mark``, at the end of ``text``, opens a turn behind words and a blank on its line."""
    before = text[: mark.start()]
    return (
        _opens(mark[0], marks)
        and before.endswith((" ", "\t"))
        and not before.rstrip().lower().endswith(tuple(map(str.lower, marks)))
        and (before.rstrip(" \t")[-1:] not in ("", "\n"))
    )


@lru_cache
def _patterns(
    marks: tuple[str, ...],
) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str], int, tuple[str, ...]]:
    """What matches a mark with its role at a text's beginning, at its end, and one that opens a turn anywhere; the
    length of the longest such; and the marks in lower case.
    """
    known = [mark for mark in marks if mark.strip()]
    closers = _any_of([mark for mark in known if mark in _CLOSERS])

    role = _any_of(_ROLES)

    opened = rf"{_any_of([mark for mark in known if mark in OPENERS])}\s?{role}\b(?:\s?{closers})?"

    def whole(these: Sequence[str]) -> str:
        return rf"(?:{opened}|{_any_of(these)}(?:{role}(?=\s*(?:\n|\Z|{_any_of(known)})))?)"

    longest = 2 * max(map(len, (*known, *_ROLES))) + len("developer  ")
    opener = rf"{opened}|{_any_of([mark for mark in known if mark in NAMED])}"
    folded = tuple(mark.lower() for mark in known)
    return re.compile(whole(known)), re.compile(rf"{whole(known)}\Z"), re.compile(opener), longest, folded


def _any_of(marks: Sequence[str]) -> str:
    """The pattern of any of ``marks``, the longest first; without any, one that matches nothing."""
    return f"(?:{'|'.join(map(_pattern, sorted(marks, key=len, reverse=True))) or '(?!)'})"


def _pattern(mark: str) -> str:
    """That of one mark or role: in any case, unless it is words without brackets, such as ``### End``."""
    is_any_case = mark in _ROLES or (mark[0] in "<[" and mark[-1] in ">]")
    return f"(?i:{re.escape(mark)})" if is_any_case else re.escape(mark)
