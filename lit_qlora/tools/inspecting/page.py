"""Owns the page of an inspection: one file that loads nothing, light and dark, in which rows are text and never markup.

Knows a look and the words for it.
"""

from collections.abc import Collection

from lit_qlora.columns import printable
from lit_qlora.data.faults import KINDS
from lit_qlora.data.view import stretches
from lit_qlora.figures.render import filled
from lit_qlora.tools.inspecting import words
from lit_qlora.tools.inspecting.look import Look
from lit_qlora.wording import of_number

PAGE_MARK = "<!-- lit-qlora inspect -->"
"""Begins each page: a file without it is not replaced by one."""
NAMED_ON_PAGE = 1000
"""Rows that are named for each fault, and doubles of each kind."""


def inspection_page(seen: Look, accepted: Collection[str]) -> str:
    """The page as HTML.

    Args:
        seen: look at a fit's rows.
        accepted: kinds of faults that are meant to be so.
    """
    bins = words.bins(seen)
    faults = words.by_kind(seen.found, accepted)
    body = filled(
        "lit_qlora.tools.inspecting",
        "inspect.html.jinja",
        is_fine=not faults,
        verdict=words.verdict_in_words(seen, accepted),
        kinds=[
            (kind, of_number(rows, KINDS[kind]), rows, found[:NAMED_ON_PAGE], len(found[NAMED_ON_PAGE:]))
            for kind, found in faults.items()
            if (rows := words.num_rows(found))
        ],
        accepted=words.accepted_in(seen, accepted),
        parts=[
            (part.name, printable(part.source), [*words.source_lines(part), *map(printable, part.notes)])
            for part in seen.parts
        ],
        counts=words.part_figures(seen.parts),
        losses=[(part.name, *loss) for part in seen.parts for loss in words.losses(part, seen.max_length)],
        notes=seen.notes,
        lengths=f"{words.lengths_in_words(seen)}: {words.longest(seen)}",
        bins=bins,
        most=max(one.size for one in bins),
        cap=words.cap_in_words(seen),
        batchings=[(words.batching_name(one), one) for one in seen.batchings],
        run=words.run_in_words(seen),
        doubles=[
            (title, len(words.doubles_of(seen, kind)), words.doubles_of(seen, kind)[:NAMED_ON_PAGE])
            for kind, title in words.DOUBLES.items()
        ],
        rows=[(" ".join(words.title_of(row)), [*stretches(row.tokens)]) for row in seen.shown],
    )
    return f"{PAGE_MARK}\n{body}"
