"""Owns how sample answers are recorded and shown: counts, a line of ``samples.jsonl``, the table, the words.

A line: ``{"step", "max_new_tokens", "answers": [{"prompt", "base", "adapter"}]}``, where an answer is ``{"text",
"cut_by"}``. Before training there is no answer of an adapter. Knows no model.
"""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import combining, east_asian_width

from lit_qlora.figures.lines import iter_lines

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


def side_by_side(line: Mapping[str, Any], count: int = 3, width: int = 80, lines: int = 3) -> list[str]:
    """The first ``count`` questions of a `line`, below each the base's answer and the adapter's in two columns.

    Args:
        line: Of ``samples.jsonl``.
        count: Number of questions.
        width: Columns in all; characters of double width count twice.
        lines: The most of an answer.

    Returns:
        Lines for a terminal; none where no adapter has answered.
    """
    rows = [row for row in line.get("answers", ()) if "adapter" in row][:count]
    column = (width - 6) // 2
    shown = [_in_columns("  base alone", "with the adapter", column)] if rows else []
    for row in rows:
        shown += _wrapped(row["prompt"], width, 1)
        answers = [_wrapped(row[whose]["text"] or "(nothing)", column, lines) for whose in ("base", "adapter")]
        shown += [_in_columns(f"  {left}", right, column) for left, right in zip_longest(*answers, fillvalue="")]
    return shown


def short_prompts(file: Path, count: int, most: int = 100) -> list[str]:
    """The first ``count`` prompts of one line and at most ``most`` characters that a run's samples hold.

    Of any content: a run folder may come from a stranger.
    """
    found: list[str] = []
    for line in iter_lines(file):
        rows = line.get("answers")
        prompts = [row.get("prompt") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        texts = (text.strip() for text in prompts if isinstance(text, str))
        found = [text for text in texts if 0 < len(text) <= most and text.isprintable()]
        if found:
            break
    return [*dict.fromkeys(found)][:count]


def _in_columns(left: str, right: str, column: int) -> str:
    return f"{left}{' ' * (column + 4 - _columns(left))}{right}".rstrip()


def _columns(text: str) -> int:
    """How many columns of a terminal ``text`` takes."""
    return sum(0 if combining(one) else 2 if east_asian_width(one) in "WF" else 1 for one in text)


def _wrapped(text: str, width: int, lines: int) -> list[str]:
    """``text`` in at most ``lines`` of ``width`` columns, without characters that would steer a terminal."""
    text = "".join(one if one.isprintable() else " " for one in text)
    found, line = list[str](), ""
    words = text.split()[::-1]
    while words:
        word, gap = words.pop(), " " if line else ""
        if _columns(line + gap + word) <= width:
            line += gap + word
            continue
        if line and _columns(word) > width // 2:  # a word longer than a line, or text without spaces
            gap_and_word = gap + word
            room = max(
                (at for at in range(len(gap_and_word)) if _columns(line + gap_and_word[:at]) <= width), default=0
            )
            line, word = line + gap_and_word[:room], gap_and_word[room:].lstrip()
        elif not line:
            room = max(at for at in range(1, len(word)) if at == 1 or _columns(word[:at]) <= width)
            line, word = word[:room], word[room:]
        found, line = [*found, line], ""
        words.append(word)
    found += [line] if line else []
    if len(found) > lines:
        last = found[lines - 1]
        while _columns(last) > width - 2:
            last = last[:-1]
        found = [*found[: lines - 1], f"{last} …"]
    return found


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
