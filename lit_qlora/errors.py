"""Owns the exceptions that stand for what the user can mend.

The command line prints them as one line and exits with status 2; anything else that escapes is a fault
of ours and keeps its traceback. Knows nothing of what raises it.
"""


class UserError(Exception):
    """Something the user can fix, said in one line: what was expected, what came, what to do.

    A mistake in a file of rows names it first, as ``rows.jsonl:17: …``.
    """


class OutOfRoomError(UserError):
    """Memory ran out in training, after all that could be done about it in a run.

    Args:
        what: happened, in a few words.
        rows: conversations in the micro-batch.
    """

    def __init__(self, what: str, rows: int) -> None:
        super().__init__(what)
        self.rows = rows


def require(holds: bool, option: str, expected: str, got: object) -> None:
    """Raises UserError naming ``option``, what was expected and what came, unless ``holds``."""
    if not holds:
        raise UserError(f"{option}: expected {expected}, got {got!r}")
