"""Owns the names of other programs' options here: Hugging Face's, TRL's, peft's, Axolotl's and similar.

The table of words is `elsewhere.yaml`. Knows no parser.
"""

from collections.abc import Collection
from functools import cache
from pathlib import Path

import yaml

from lit_qlora.errors import nearest
from lit_qlora.place import COMMAND


@cache
def answers(part: str) -> dict[str, str]:
    """This project's counterparts, by the names that other programs have for them.

    Args:
        part: of the table: ``fit``, ``tools`` for the verbs that train nothing, or ``verbs`` for verbs themselves.
    """
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8").replace("COMMAND", COMMAND)
    return {name: answer for answer, names in yaml.safe_load(text)[part].items() for name in names.split()}


def here(name: str, options: Collection[str], cutoff: float = 1.0) -> str | None:
    """The remedy for an option of another program; None if it is unknown.

    Args:
        name: of that option.
        options: the accepted ones.
        cutoff: least similarity to a known name, as for `nearest`.
    """
    last = name.rpartition(".")[2].replace("-", "_").lower()
    table = answers("fit" if "model.base" in options else "tools")
    found = table.get(last) or next((table[one] for one in table if one[-1] == "_" and last.startswith(one)), None)
    found = found or table.get(nearest(last, table, cutoff) or "")
    if found is None:
        return None
    option, comma, remark = found.partition(",")
    if " " in option:
        return found
    return f"here it is {option!r}{comma}{remark}" if option in options else None
