"""Owns the kinds of faults that a row of training can have, by name, and which names say that they are meant to be so.

Knows neither rows nor batches, so that a command line is checked before PyTorch is imported.
"""

from lit_qlora.errors import UserError, excerpt, meant

KINDS = {
    "unread": "rows that can't be learned from",
    "nothing": "rows without a token to learn",
    "end": "rows with an answer whose end is not learned",
    "bos": "rows with more or less than one BOS where a prompt begins",
    "special": "rows whose text makes the id of a special token",
    "lost": "rows of which tokens lose something",
    "question": "rows with a token of a prompt that is learned",
    "batch": "rows with other tokens or labels in their batch than encoded",
}
"""What can be wrong with a row, by the names that ``--accept`` takes."""


def accepted_kinds(names: str | None) -> list[str]:
    """The kinds in ``names``, a list with commas. Raises UserError for an unknown one."""
    found = [name.strip() for name in (names or "").split(",") if name.strip()]
    for kind in found:
        if kind not in KINDS:
            problem = f"expected some of {', '.join(KINDS)}, got {excerpt(kind)}"
            raise UserError(problem, option="accept", remedy=meant(kind, KINDS))
    return found
