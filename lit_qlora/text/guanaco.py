"""Owns the Guanaco text form: ``### Human: …### Assistant: …`` to messages.

A form of rows; no model is prompted in it. Knows no file, no tokens.
"""

import re

# In the published rows a marker follows the text without a space; by hand it's written after a space
# or on a line of its own. All three are markers, what opens with a quotation mark is not.
MARKER = re.compile(r"""(?<!\s["'`“„«])### (Human|Assistant):""")

SYSTEM_MARKER = re.compile(r"^((?:\s*<[^<>\s]+>)*)\s*### System:")
"""A marker that some rows have before the system text, behind BOS at most; the published ones have none."""


def parse(text: str) -> list[dict[str, str | None]]:
    """Read the messages of a row of any number of turns.

    The last one may be the human's, still unanswered, with the marker of its answer or without.

    The rule for markers: ``### Human:`` and ``### Assistant:``, spelled exactly so, open a turn
    wherever they stand, except right behind an opening quotation mark (white space, then a quote or
    a backtick), where they are being talked about. Text before the first marker is the system's,
    with or without ``### System:`` before it.
    White space around a turn goes.

    Args:
        text: all of the row.

    Returns:
        Messages of a role and a content, in order; the system text comes first, and is empty without one.

    Raises:
        ValueError: when there is no marker, or another one such as ``### User:`` stands before the assistant's.
    """
    system, *parts = MARKER.split(text)
    system = SYSTEM_MARKER.sub(r"\1", system)
    if not parts or (parts[0] == "Assistant" and "###" in system):
        raise ValueError("no '### Human:' in the text" + (" before '### Assistant:'" if parts else ""))
    rows: list[dict[str, str | None]] = [{"role": "system", "content": system.strip()}]
    for name, content in zip(parts[::2], parts[1::2], strict=True):
        rows.append({"role": "user" if name == "Human" else "assistant", "content": content.strip()})
    if rows[-1] == {"role": "assistant", "content": ""}:  # the marker is there for the answer to follow
        rows.pop()
    if rows[-1] == {"role": "user", "content": ""} and len(rows) > 2:  # the marker is there as an end
        rows[-1] = {"role": "user", "content": None}
    return rows
