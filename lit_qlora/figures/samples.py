"""Owns how sample answers are recorded and shown: counts, a line of ``samples.jsonl``, the table, the words.

A line: ``{"step", "max_new_tokens", "answers": [{"prompt", "base", "adapter"}]}``, where an answer is ``{"text",
"cut_by"}``. Before training there is no answer of an adapter. Knows no model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ROWS_SHOWN = 16
"""Number of answers in the table; ends are counted over all answers, which are all in the file."""

ENDED, LIMIT, CONTEXT = "samples/ended", "samples/cut", "samples/cut_by_context"
"""Names of the counts: answers that ended by themselves, were cut by the limit, and were cut by the base's context."""
TOKENS = "samples/max_new_tokens"
"""The limit of these counts: a resumed run may have another."""


class SampleAnswer(NamedTuple):
    """An answer's text, and what cut it off: `LIMIT` or `CONTEXT`; None if it ended with EOS."""

    text: str
    cut_by: str | None


def counts(answers: Sequence[SampleAnswer], max_new_tokens: int) -> dict[str, float]:
    """Counts of ends, their limit, and the share that ended by themselves."""
    ends = [answer.cut_by for answer in answers]
    figures = {ENDED: ends.count(None), LIMIT: ends.count(LIMIT), TOKENS: max_new_tokens}
    if CONTEXT in ends:
        figures[CONTEXT] = ends.count(CONTEXT)
    return {**figures, "samples/stopped_share": ends.count(None) / max(len(ends), 1)}


def line(
    prompts: Sequence[str], base: Sequence[SampleAnswer], adapter: Sequence[SampleAnswer] | None, max_new_tokens: int
) -> dict[str, Any]:
    """The record of one validation.

    Args:
        prompts: The last turn of each.
        base: The base's answers, in the same order.
        adapter: The adapter's; None before training, when they are the base's.
        max_new_tokens: The limit of an answer.
    """
    rows = [{"prompt": text, "base": answer._asdict()} for text, answer in zip(prompts, base, strict=True)]
    for row, answer in zip(rows, adapter or (), strict=False):
        row["adapter"] = answer._asdict()
    return {"max_new_tokens": max_new_tokens, "answers": rows}


def table(line: Mapping[str, Any]) -> str | None:
    """A `line` in Markdown, base beside adapter; None without answers of an adapter."""
    rows = [row for row in line.get("answers", ())[:ROWS_SHOWN] if "adapter" in row]
    if not rows:
        return None
    limit = line["max_new_tokens"]
    cells = (
        f"| {_cell(row['prompt'])} | {_shown(row['base'], limit)} | {_shown(row['adapter'], limit)} |" for row in rows
    )
    return "\n".join(["| prompt | base | adapter |\n|---|---|---|", *cells])


def ends_in_words(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str | None, str]]:
    """Counts of how sample answers ended, at two steps: a title, and how many of how many, before and after.

    Before is None if it was not measured then; empty if it was not measured after.
    """
    if ENDED not in after:
        return []
    limits = {f"{int(figures[TOKENS]):,}" for figures in (before, after) if TOKENS in figures}
    titles = {ENDED: "answers that ended by themselves", LIMIT: f"answers cut at {' or '.join(sorted(limits))} tokens"}
    if CONTEXT in before or CONTEXT in after:
        titles[CONTEXT] = "answers cut by the base's context"
    return [(title, _of_all(before, name), str(_of_all(after, name))) for name, title in titles.items()]


def _of_all(figures: Mapping[str, Any], name: str) -> str | None:
    if ENDED not in figures:
        return None
    found = {end: int(figures.get(end, 0)) for end in (ENDED, LIMIT, CONTEXT)}
    return f"{found[name]} of {sum(found.values())}"


def _shown(answer: Mapping[str, Any], limit: int) -> str:
    reason = {LIMIT: f"at {limit:,} tokens", CONTEXT: "by the base's context"}.get(answer["cut_by"])
    return _cell(answer["text"]) + (f" *(cut {reason})*" if reason else "")


def _cell(text: str) -> str:
    """Text as one cell of a Markdown table."""
    return "<br>".join(text.replace("\\", "\\\\").replace("|", "\\|").splitlines())
