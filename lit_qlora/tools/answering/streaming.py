"""Owns the text of an answer while its ids arrive: no partial character, no lost space, nothing retracted.

Knows the encoder and no model.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lit_qlora.text.edges import BYTE

if TYPE_CHECKING:
    from lit_qlora.data.encode import Encoder


class TextStream:
    """The text of one answer; the results of `add` and `close`, joined, are all of it.

    Args:
        encoder: decodes the ids.
        stop: texts that end the answer and are no part of it.
    """

    def __init__(self, encoder: "Encoder", stop: Sequence[str] = ()) -> None:
        self._encoder, self._stop = encoder, stop
        self._ids: list[int] = []
        self._shown = 0

    def add(self, token: int) -> str:
        """Take one more id of the answer.

        Args:
            token: the id.

        Returns:
            The text that has become certain; empty while a character or a space is open.
        """
        self._ids.append(token)
        tokenizer = self._encoder.tokenizer
        if token in tokenizer.all_special_ids or BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(token))):
            return ""
        return self._not_shown(self._encoder.certain(self._ids, self._stop))

    def close(self) -> str:
        """The rest of the text."""
        return self._not_shown(self._encoder.answer(self._ids, self._stop)[0])

    def _not_shown(self, text: str) -> str:
        # The whole answer is decoded again for each token (0.3 ms for a thousand): pieces decoded one by one lose the
        # space before a word.
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new
