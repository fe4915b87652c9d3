"""Owns a row as the model sees it: the text of each token, whether it is learned, and the short example of a fit.

Knows no batch, no file and no page.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from lit_qlora.batch import IGNORE_INDEX
from lit_qlora.columns import columns, printable, shortened
from lit_qlora.data.tokenizer import special_tokens
from lit_qlora.text.edges import BYTE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "⏹"
"""The sign for a learned end: the model stops there."""

SHORT_AMONG = 100
"""Rows of which the shortest is the example."""


class Token(NamedTuple):
    """One token of a row.

    Args:
        id: its number in the vocabulary.
        text: its characters, escaped where a terminal would obey them.
        learned: True if the loss counts it.
        special: True if the tokenizer calls it special.
    """

    id: int
    text: str
    learned: bool
    special: bool


def tokens(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], learned: Iterable[bool]) -> list[Token]:
    """The tokens of a row of ``ids``.

    Args:
        tokenizer: of the row.
        ids: the row's, of length T.
        learned: True for each of them that is learned, of length T.
    """
    special = special_tokens(tokenizer)
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        Token(id_, printable(name if id_ in special else _spelling(tokenizer, name)), bool(is_learned), id_ in special)
        for id_, name, is_learned in zip(ids, names, learned, strict=True)
    ]


def example_lines(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], labels: Sequence[int], width: int, most: int
) -> list[str]:
    """The first answer of a row that is learned with its end, behind its prompt: ``prompt **answer** ⏹``.

    Where no end is learned, the first that is; with prompts learned, too, a stretch of both.

    Args:
        tokenizer: of the row.
        ids: the row's, of length T.
        labels: ids of the learned tokens, `IGNORE_INDEX` for others, of length T.
        width: columns of a line.
        most: lines, 1 or 2.
    """
    runs = [
        (learned, [token for token, _ in run])
        for learned, run in groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORE_INDEX)
    ]
    special = special_tokens(tokenizer)
    learned = [place for place, (is_learned, _) in enumerate(runs) if is_learned]
    place = next((place for place in learned if runs[place][1][-1] in special), learned[0])
    answer, prompt = runs[place][1], runs[place - 1][1] if place else []
    has_end = answer[-1] in special
    said = printable(_decoded(tokenizer, answer[: len(answer) - has_end]))
    asked, end = printable(_decoded(tokenizer, prompt)), f" {END}" if has_end else ""
    whole = f"{asked} **{said}**{end}".lstrip()
    if most == 1 or not asked or columns(whole) <= width:
        room = width - len("  ****") - len(end)
        asked = shortened(asked, max(room // 2, room - columns(said)))
        return [f"{asked} **{shortened(said, room - columns(asked))}**{end}".lstrip()]
    return [shortened(asked, width), f"**{shortened(said, width - len('****') - len(end))}**{end}"]


def _decoded(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


def _spelling(tokenizer: "PreTrainedTokenizerBase", name: str) -> str:
    """The text of a token with the space that it may begin with; of a part of a character, the token's ``name``."""
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return name
    # Of the first word in a text, a decoder may take the space off.
    text = decoder.decode([name, name])[len(decoder.decode([name])) :]
    return _bytes(name) if "�" in text else text


def _bytes(name: str) -> str:
    """A part of a character as ``<0xE6 0xBC>``; byte-level vocabularies spell each byte as a letter of its own."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if BYTE.fullmatch(name):
        return name
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return f"<{' '.join(f'0x{byte_of[letter]:02X}' for letter in name)}>"


def stretches(row: Sequence[Token]) -> Iterator[tuple[bool, list[Token]]]:
    """The tokens of a ``row``, in runs that are learned or not."""
    for learned, run in groupby(row, lambda token: token.learned):
        yield learned, [*run]
