"""Owns the one exception that stands for a mistake the user can mend.

The command line prints it as one line and exits with status 2; anything else that escapes is a fault
of ours and keeps its traceback. Knows nothing of what raises it.
"""


class UserError(Exception):
    """Something the user can fix, said in one line: what was expected, what came, what to do.

    A mistake in a file of rows names it first, as ``rows.jsonl:17: …``.
    """


def require(holds: bool, option: str, expected: str, got: object) -> None:
    """Raises UserError naming ``option``, what was expected and what came, unless ``holds``."""
    if not holds:
        raise UserError(f"{option}: expected {expected}, got {got!r}")
