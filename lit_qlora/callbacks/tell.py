"""Owns the lines that trouble in mid-run brings to the terminal: on standard error, above the progress bar."""

import sys

from tqdm import tqdm


def tell(line: str) -> None:
    """Prints ``line``; training goes on."""
    tqdm.write(line, file=sys.stderr)
