"""Owns how sample answers are recorded and shown: counts, a line of ``samples.jsonl``, the table, the words.

A line: ``{"step", "max_new_tokens", "answers": [{"prompt", "base", "adapter"}]}``, where an answer is ``{"text",
"cut_by"}``. Before training there is no answer of an adapter. Knows no model.
"""

from collections.abc import Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from lit_qlora.columns import first_columns, in_column, lines_of
from lit_qlora.console import WIDTH
from lit_qlora.figures.lines import read_lines

ROWS_SHOWN = 16
"""Number of answers in the table and in the report; ends are counted over all answers, which are all in the file."""

NUM_EXAMPLES = 3
"""Example questions that the chat page takes from a run."""
COMPARED, COLUMN = 3, (WIDTH - 6) // 2
"""Answers of base and adapter that are shown side by side, and how wide each is."""

ENDED, CUT, CUT_BY_CONTEXT = "samples/ended", "samples/cut", "samples/cut_by_context"
"""Names of the counts: answers that ended by themselves, were cut by the limit, and were cut by the base's context."""
MAX_NEW_TOKENS = "samples/max_new_tokens"
"""The limit of these counts: a resumed run may have another."""


class SampleAnswer(NamedTuple):
    """An answer's ``text``, and ``cut_by``, what cut it off: `CUT` or `CUT_BY_CONTEXT`; None if it ended with EOS."""

    text: str
    cut_by: str | None


def counts_of_ends(answers: Sequence[SampleAnswer], max_new_tokens: int) -> dict[str, float]:
    """Figures of how sample answers ended.

    Args:
        answers: all of one validation.
        max_new_tokens: the limit of an answer.

    Returns:
        Counts of ends, their limit, and the share that ended by themselves.
    """
    ends = [answer.cut_by for answer in answers]
    figures = {ENDED: ends.count(None), CUT: ends.count(CUT), MAX_NEW_TOKENS: max_new_tokens}
    if CUT_BY_CONTEXT in ends:
        figures[CUT_BY_CONTEXT] = ends.count(CUT_BY_CONTEXT)
    return {**figures, "samples/stopped_share": ends.count(None) / max(len(ends), 1)}


def samples_line(
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
    """A `samples_line`, ``line``, in Markdown, base beside adapter; None without answers of an adapter."""
    rows = [row for row in line.get("answers", ())[:ROWS_SHOWN] if "adapter" in row]
    if not rows:
        return None
    limit = line["max_new_tokens"]
    cells = (
        f"| {_cell(row['prompt'])} | {_reply(row['base'], limit)} | {_reply(row['adapter'], limit)} |" for row in rows
    )
    return "\n".join(["| prompt | base | adapter |\n|---|---|---|", *cells])


def answered(file: Path, step: int | None) -> list[dict[str, Any]]:
    """The questions and answers of one line of ``samples.jsonl``: that of ``step``, else the last of an adapter.

    Before training only the base has answered, which is the first line. Of any content: a run folder may come from a
    stranger.

    Args:
        file: The run's.
        step: Of the best adapter; 0 or None where that is unknown.
    """
    found: list[dict[str, Any]] = []
    for line in read_lines(file):
        rows = _sample_rows(line)
        if any("adapter" in row for row in rows) or not found:
            found = rows
            if step and line["step"] == step:
                break
    return found


def side_by_side(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first questions, below each the base's answer and the adapter's in two columns of 3 lines.

    Args:
        answers: those of a `samples_line`.

    Returns:
        Lines for a terminal; none where no adapter has answered.
    """
    rows = [row for row in answers if "adapter" in row][:COMPARED]
    shown = [in_column("  base alone", COLUMN + 4) + "with the adapter"] if rows else []
    for row in rows:
        shown += _wrapped_text(row["prompt"], WIDTH, 1)
        texts = [_wrapped_text(row[whose]["text"] or "(nothing)", COLUMN, 3) for whose in ("base", "adapter")]
        pairs = zip_longest(*texts, fillvalue="")
        shown += [(in_column(f"  {left}", COLUMN + 4) + right).rstrip() for left, right in pairs]
    return shown


def short_prompts(file: Path) -> list[str]:
    """The first prompts of up to 100 characters in one line in the ``file`` of a run's samples: example questions.

    Of any content: a run folder may come from a stranger.
    """
    found: list[str] = []
    for line in read_lines(file):
        prompts = (row.get("prompt") for row in _sample_rows(line))
        texts = (text.strip() for text in prompts if isinstance(text, str))
        found = [text for text in texts if 0 < len(text) <= 100 and text.isprintable()]
        if found:
            break
    return [*dict.fromkeys(found)][:NUM_EXAMPLES]


def _sample_rows(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = line.get("answers")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _wrapped_text(text: str, width: int, lines: int) -> list[str]:
    """``text`` in at most ``lines`` of ``width`` columns, without characters that would steer a terminal."""
    words = "".join(one if one.isprintable() else " " for one in text).split()
    found = [*islice(lines_of(" ".join(words), width), lines + 1)]
    return found if len(found) <= lines else [*found[: lines - 1], f"{first_columns(found[lines - 1], width - 2)} …"]


def ends_in_words(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str | None, str]]:
    """Counts of how sample answers ended, at two steps.

    Args:
        before: figures of the first step.
        after: figures of the second.

    Returns:
        A title, and how many of how many, before and after. Before is None if it was not measured then; empty if it was
        not measured after.
    """
    if ENDED not in after:
        return []
    limits = {f"{int(figures[MAX_NEW_TOKENS]):,}" for figures in (before, after) if MAX_NEW_TOKENS in figures}
    titles = {ENDED: "answers that ended by themselves", CUT: f"answers cut at {' or '.join(sorted(limits))} tokens"}
    if CUT_BY_CONTEXT in before or CUT_BY_CONTEXT in after:
        titles[CUT_BY_CONTEXT] = "answers cut by the base's context"
    return [(title, _of_all(before, name), str(_of_all(after, name))) for name, title in titles.items()]


def _of_all(figures: Mapping[str, Any], name: str) -> str | None:
    if ENDED not in figures:
        return None
    found = {end: int(figures.get(end, 0)) for end in (ENDED, CUT, CUT_BY_CONTEXT)}
    return f"{found[name]} of {sum(found.values())}"


def _reply(answer: Mapping[str, Any], limit: int) -> str:
    reason = {CUT: f"at {limit:,} tokens", CUT_BY_CONTEXT: "by the base's context"}.get(answer["cut_by"])
    return _cell(answer["text"]) + (f" *(cut {reason})*" if reason else "")


def _cell(text: str) -> str:
    """Text as one cell of a Markdown table."""
    return "<br>".join(text.replace("\\", "\\\\").replace("|", "\\|").splitlines())
