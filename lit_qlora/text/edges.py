"""Owns the removal of special tokens written out as text at the edges of what is said.

Such as ``</s>`` after an answer: the encoder inserts the real ones. Inside a text they stay text, and so does what only
looks similar: ``[/s]`` is a forum's markup, ``&lt;/s&gt;`` speaks of one. Knows no tokenizer.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from lit_qlora.text.conversation import Conversation

_ROLES = (
    "system", "developer", "user", "human", "prompter", "assistant", "model", "gpt", "bot", "chatbot", "tool",
    "function", "ipython", "observation", "final",
)  # fmt: skip
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A piece for one byte of a character outside of the vocabulary. The decoder combines neighbours: until the last one
has arrived, the character is unknown."""


def _spelled(*names: str) -> tuple[str, ...]:
    """Tokens by their names, as models spell such: ``<|end_of_text|>``, ``<|endoftext|>``, ``[|endoftext|]``, …"""
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("[|", "|]"))  # noqa: RUF001  # of most; DeepSeek; EXAONE
    joined = dict.fromkeys(name.replace("_", joint) for name in names for joint in ("_", "▁", ""))
    return tuple(f"{begin}{name}{end}" for name in joined for begin, end in brackets)


OPENERS = (
    # ChatML, Llama 3 and 4, Granite, gpt-oss
    *_spelled("im_start", "start_header_id", "header_start", "start_of_role", "start", "channel", "start_of_turn"),
    "<start_of_turn>",  # Gemma
    "<|START_OF_TURN_TOKEN|>",  # Command R
)  # fmt: skip
"""Tokens that the name of a role follows."""
TURN_OPENERS = (
    "[INST]", "[SYSTEM_PROMPT]",  # Llama 2, Mistral
    *_spelled(*_ROLES, "ai", "moss"),  # Phi, Zephyr, DeepSeek and others
    "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",  # Command R
)  # fmt: skip
"""Tokens that open a turn, and say whose."""
_CLOSERS = ("[/INST]", "[/SYSTEM_PROMPT]")
"""Tokens that close what one of `TURN_OPENERS` opens."""
_BEHIND_ROLES = _spelled("end_header_id", "header_end", "end_of_role", "im_sep", "message")
WRITTEN_OUT = (
    *OPENERS, *TURN_OPENERS, *_CLOSERS, *_BEHIND_ROLES,
    *_spelled(
        "im_end", "begin_of_text", "start_of_text", "end_of_text", "begin_of_sentence", "end_of_sentence",
        "end_of_turn", "end_of_prompt", "end", "return", "bos", "eos", "eot", "eot_id", "eom", "eom_id", "eod",
        "eod_id", "pad",
    ),
    "<s>", "</s>", "<bos>", "<eos>", "<end_of_turn>",  # Llama 2, Gemma
    "<BOS_TOKEN>", "<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>",  # Command R
    "<eot>", "<eod>", "<eoh>", "<eoa>", "<eom>", "[gMASK]", "<sop>", "<eop>",  # InternLM, MOSS, GLM and others
    "<unk>", "<pad>", "[PAD]", "[BOS]", "[EOS]",  # behind the end of a row that was decoded with its padding
)  # fmt: skip
"""Tokens with which common models start and end texts and turns."""


_COLON = r"(?::(?=[\s\w]|\Z))?"
"""The colon that InternLM and MOSS put behind a role's token."""
ZERO_WIDTH = "\u200b\u2060\ufeff"
"""Characters that take no room, and say nothing at an edge: what copying from a page or a file leaves there."""
DIRECTIONS = "\u00ad\u061c\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Invisible characters that may set a text's direction: they are removed together with a mark only."""
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
        WrittenOutError: a turn is opened at an edge, and another inside, or behind a mark that is at an edge, too.
    """
    known = tuple(marks)
    found: dict[str, None] = {}
    rest = text.strip(_BLANK)
    head, tail, _, longest, folded = _patterns(known)
    begins = rest[:longest].lower().startswith(folded)
    ends = rest[-longest:].lower().removesuffix(":").endswith((*folded, *_ROLES))
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
    if inside := _opened_inside((*found,), known).search(rest):
        raise WrittenOutError(f"a text opens turns inside, with {inside[1]!r}: it is a whole conversation")
    start = text.find(rest)
    if any(one in text[:start] + text[start + len(rest) :] for one in ZERO_WIDTH):
        found["zero-width characters"] = None
    return (rest, [*found]) if found else (text, [])


def clean(conversation: Conversation, marks: Sequence[str]) -> tuple[Conversation, list[str]]:
    """A conversation without special tokens at the edges of its turns and of its system text.

    Args:
        conversation: conversation as its row has it.
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
    return mark.lower() not in map(str.lower, marks) or mark.upper() in map(str.upper, TURN_OPENERS)


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
def _opened_inside(found: tuple[str, ...], marks: tuple[str, ...]) -> re.Pattern[str]:
    """The pattern whose group is a turn opened inside of a text that had the marks ``found`` at its edges."""
    opener = _patterns(marks)[2]
    is_opened = any(_opens(one, marks) or one in OPENERS for one in found)
    before = "" if is_opened else rf"{_any_of(found)}(?:\s|{_any_of(marks)})*"
    return re.compile(f"{before}({opener})")


@lru_cache
def _patterns(marks: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str], str, int, tuple[str, ...]]:
    """Patterns of a mark with its role at a text's beginning, at its end, and of one that opens a turn anywhere; the
    length of the longest such; and the marks in lower case.
    """
    known = [mark for mark in marks if mark.strip()]
    role, behind = _any_of(_ROLES), _any_of([mark for mark in known if mark in _BEHIND_ROLES])
    opened = rf"{_any_of([mark for mark in known if mark in OPENERS])}\s?{role}\b(?:\s?{behind})?"
    named = _any_of([mark for mark in known if mark in TURN_OPENERS])
    whole = rf"(?:(?:{opened}|{named}){_COLON}|{_any_of(known)}(?:{role}(?=\s*(?:\n|\Z|{_any_of(known)})))?)"
    longest = 2 * max(map(len, (*known, *_ROLES))) + len("developer  :")
    opener = rf"{opened}|{named}|{_any_of([mark for mark in known if mark in _CLOSERS])}"
    folded = tuple(mark.lower() for mark in known)
    # A role alone between marks is what is said.
    alone = rf"(?:(?!{opened}|{named}){_any_of(known)})(?={role}(?:\s|{_any_of(known)})*\Z)"
    return re.compile(f"{alone}|{whole}"), re.compile(rf"{whole}\Z"), opener, longest, folded


def _any_of(marks: Sequence[str]) -> str:
    """The pattern of any of ``marks``, the longest first; without any, one that matches nothing."""
    by_bracket: dict[str, list[str]] = {begin: [] for begin in ("<|", "<", "[", "")}  # so most characters are passed
    for mark in sorted(marks, key=len, reverse=True):
        bracket = next(begin for begin in by_bracket if mark.startswith(begin))
        by_bracket[bracket].append(_pattern(mark, bracket))
    found = (f"{re.escape(begin)}(?:{'|'.join(rest)})" for begin, rest in by_bracket.items() if rest)
    return f"(?:{'|'.join(found) or '(?!)'})"


def _pattern(mark: str, bracket: str) -> str:
    """The pattern of a mark or role after its ``bracket``; case counts for words without one, such as ``### End``."""
    rest = re.escape(mark.removeprefix(bracket))
    return f"(?i:{rest})" if mark in _ROLES or (bracket and mark[-1] in ">]") else rest
