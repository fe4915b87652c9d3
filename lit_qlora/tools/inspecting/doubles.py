"""Owns doubles: held-out conversations that training has, too, word for word, nearly so, or with another answer.

Words are compared in small letters, without punctuation, each letter by itself in scripts without spaces; system texts,
which many rows share, are left out. Two conversations are nearly the same if their sets of `WORDS` words in a row share
`ALIKE` of their union (Jaccard's index, exact). Knows no tokens.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

from lit_qlora.text.conversation import Conversation

WORDS, ALIKE = 3, 0.7
"""Words in a run, and the least share of them, from 0 to 1. One word changed among some twenty counts as nearly the
same; the demo's sentences, which are made from patterns, don't."""

_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")

DoubleKind = Literal["same", "near", "question"]


class Double(NamedTuple):
    """A held-out conversation that is like one in training.

    Args:
        held_out: its number among the held-out conversations, from 0.
        train: number of the training conversation that it is like.
        kind: same, word for word; near, nearly so; question, the same with another answer.
    """

    held_out: int
    train: int
    kind: DoubleKind


def find_doubles(train: Sequence[Conversation], held_out: Sequence[Conversation]) -> list[Double]:
    """The held-out conversations with a double in training, each with the first one of the closest kind.

    Args:
        train: conversations that are learned.
        held_out: conversations that are scored.

    Returns:
        At most one for each held-out conversation, in their order.
    """
    texts = [_words(" ".join(turn.content for turn in conversation.turns)) for conversation in held_out]
    same, asked = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    for number, (words, conversation) in enumerate(zip(texts, held_out, strict=True)):
        same[" ".join(words)].append(number)
        asked[" ".join(_words(conversation.turns[0].content))].append(number)
    near = _Near(texts)
    found: dict[DoubleKind, dict[int, int]] = {"same": {}, "near": {}, "question": {}}
    for number, conversation in enumerate(train):
        words = _words(" ".join(turn.content for turn in conversation.turns))
        found["same"] |= dict.fromkeys(same.pop(" ".join(words), ()), number)
        found["near"] |= dict.fromkeys(near.pop(words), number)
        found["question"] |= dict.fromkeys(asked.pop(" ".join(_words(conversation.turns[0].content)), ()), number)
    closest = {one: Double(one, number, kind) for kind in reversed(found) for one, number in found[kind].items()}
    return [closest[one] for one in sorted(closest)]


class _Near:
    """Texts, each until another one is found that is nearly the same.

    Two sets so much alike share one of their rarest members (by these texts), if as many of each are looked at as the
    other may lack, and one more. So most pairs need not be compared.
    """

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        self._sets = [_in_a_row(words) for words in texts]
        self._counts = Counter(one for members in self._sets for one in members)
        self._by_member = defaultdict[str, set[int]](set)
        for number, members in enumerate(self._sets):
            for one in self._rarest(members):
                self._by_member[one].add(number)

    def pop(self, words: Sequence[str]) -> list[int]:
        """Take out the numbers of those texts that are nearly the same as ``words``."""
        members = _in_a_row(words)
        if sum(map(self._counts.__contains__, members)) < ALIKE * len(members):
            return []
        candidates = {number for one in self._rarest(members) for number in self._by_member.get(one, ())}
        found = [number for number in sorted(candidates) if self._are_alike(members, self._sets[number])]
        for number in found:
            for one in self._rarest(self._sets[number]):
                self._by_member[one].discard(number)
        return found

    def _rarest(self, members: set[str]) -> list[str]:
        count = len(members) - math.ceil(ALIKE * len(members)) + 1
        return sorted(members, key=lambda one: (self._counts[one], one))[:count]

    def _are_alike(self, members: set[str], others: set[str]) -> bool:
        common = len(members & others)
        return common >= ALIKE * (len(members) + len(others) - common)


def _words(text: str) -> list[str]:
    """The words of a text; where it has none, what stands between its spaces."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold()) or text.split()


def _in_a_row(words: Sequence[str]) -> set[str]:
    """Each `WORDS` words in a row; all of a text that has fewer."""
    return {" ".join(words[start : start + WORDS]) for start in range(max(1, len(words) - WORDS + 1))}
