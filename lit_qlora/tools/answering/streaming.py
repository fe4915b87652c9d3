"""Owns the text of an answer while its ids arrive: no partial character, no lost space, nothing retracted.

Knows the encoder's `decode` and no model.
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_qlora.data.encode import Encoder

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A piece for one byte of a character outside of the vocabulary. The decoder combines neighbours: until the last one
has arrived, the character is unknown."""

UNFINISHED = "\ufffd"
"""The decoder's output for an incomplete character."""


class TextStream:
    """One answer. The results of `add` and `close`, joined, are `text_of` all its ids."""

    def __init__(self, encoder: "Encoder") -> None:
        self._encoder = encoder
        self._ids: list[int] = []
        self._shown = 0

    def add(self, token: int) -> str:
        """The text that has become certain; empty while a character or a space is open."""
        self._ids.append(token)
        tokenizer = self._encoder.tokenizer
        if token in tokenizer.all_special_ids or BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(token))):
            return ""
        text = self._encoder.decode(self._ids)
        return "" if text.endswith(UNFINISHED) else self._not_shown(text)

    def close(self) -> str:
        """The rest of the text."""
        return self._not_shown(text_of(self._ids, self._encoder))

    def _not_shown(self, text: str) -> str:
        # The whole answer is decoded again for each token (0.3 ms for a thousand): pieces decoded one by one lose the
        # space before a word.
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new


def text_of(ids: list[int], encoder: "Encoder") -> str:
    """An answer's text, without a last partial character."""
    text = encoder.decode(ids)
    return text if ids[-1:] == [encoder.eos_id] else text.rstrip(UNFINISHED).rstrip()
