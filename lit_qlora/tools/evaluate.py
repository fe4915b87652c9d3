"""Owns the verb evaluate: base against adapter, on held-out rows and multiple-choice questions, with intervals.

Knows the options and the tables; scores are in `scoring.rows`, intervals in `scoring.intervals`.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lit_qlora.chosen import ResolvedAdapter, choose_adapter
from lit_qlora.console import WIDTH
from lit_qlora.data.held_out import check_early_to_score
from lit_qlora.data.records import Reading
from lit_qlora.data.sources import check_sources
from lit_qlora.devices.asked import Precision
from lit_qlora.errors import UserError, recorded_in
from lit_qlora.figures.lines import json_number
from lit_qlora.metrics import figures_of, held_out
from lit_qlora.options import LINKED
from lit_qlora.quiet import quieten
from lit_qlora.ranges import check_ranges
from lit_qlora.storage.files import output_path, require_folder, require_new, saved_by, write_file
from lit_qlora.tools.scoring.questions import LETTERS, Prompts, Style, Subject, examples_for, read_subjects
from lit_qlora.wording import number_of

if TYPE_CHECKING:
    from lit_qlora.data.datamodule import ChatDataModule
    from lit_qlora.tools.scoring.intervals import Compared, Figure
    from lit_qlora.tools.scoring.rows import Scoring

QUESTION_BATCH_TOKENS = 4096
NO_LIMIT = 2**40
"""Token limit of prompts, high enough for all: a prompt that is too long is an error, never cut."""

CALLED_HERE = {"data.test_source": "source", "data.max_length": "max_length"}
"""This verb's names of fit's options."""


class Asked(NamedTuple):
    """Questions to be answered by one letter each.

    Args:
        names: of the subjects.
        prompts: ids of each question, by subject.
        letters: the ids of A, B, C and D.
        answers: index into ``letters`` of each right answer, by subject.
        shots: answered questions in front of each.
        style: how they are asked, as an option's value.
    """

    names: list[str]
    prompts: list[list[list[int]]]
    letters: list[int]
    answers: list[list[int]]
    shots: int
    style: str


def evaluate(
    run: str | None = None,
    adapter: str | None = None,
    base: str | None = None,
    source: str | None = None,
    max_length: int | None = None,
    mmlu: str | None = None,
    shots: Literal[0, 5] = 0,
    examples: str | None = None,
    style: Style = "plain",
    precision: Precision | None = None,
    batch_tokens: int | None = None,
    draws: int = 1000,
    seed: int = 0,
    output: str | None = None,
) -> None:
    """Compare an adapter with its base on held-out conversations or MMLU's questions, with 95 % intervals.

    Args:
        run: run folder, for its best adapter; default: the run that was started last.
        adapter: an adapter folder instead of a run.
        base: the base of the adapter; default: the one that run or folder names.
        source: conversations to score: a file, or a folder or hub id (its test split, or else its validation split);
            default, unless mmlu is given: the run's held-out ones.
        max_length: tokens of one conversation; default: the run's, or 1024.
        mmlu: questions to answer: a .csv (question, A, B, C, D, letter of the answer) or a folder of them.
        shots: number of examples before each question.
        examples: the .csv with the examples, or a folder with one for each of mmlu's; MMLU calls it dev.
        style: style of the questions: plain text as in published figures, or chat, the format of training.
        precision: precision; default: the run's.
        batch_tokens: tokens per batch with padding; default: the run's batches, and 4096 for questions.
        draws: number of bootstrap samples.
        seed: seed of the bootstrap.
        output: a .json to write the figures to; it must not exist.

    Raises:
        UserError: for a wrong option, row or question, no adapter, and an output that can't be written.
    """
    check_ranges({"max_length": max_length, "batch_tokens": batch_tokens, "draws": draws, "seed": seed})
    if output is not None:
        require_new(Path(output))
        require_folder(output_path(output))
    subjects = _read_questions(mmlu, shots, examples)
    chosen = choose_adapter(run, adapter, base)
    if source is None and not subjects and chosen.run is None:
        raise UserError(
            "an adapter folder names no held-out rows", option="source", remedy="give --source FILE, or --mmlu FILE"
        )
    if source:
        check_early_to_score(source, "source", Reading.of(chosen.options["data"]))
    elif chosen.run and not subjects:
        with recorded_in(chosen.run.path, "give --source for other rows"):
            check_sources({name: chosen.options["data"][name] for name in ("source", "validation_source")})

    from lit_qlora.tools.scoring.rows import Scoring

    quieten()
    # Errors in rows or questions are reported before a large base is loaded.
    scoring = Scoring(chosen, precision, batch_tokens)
    data = _held_out(chosen, source, max_length) if source or not subjects else None
    asked = _encode_questions(chosen, subjects, style) if subjects else None
    found: dict[str, Any] = {"base": chosen.base.public_name, "adapter": str(chosen.adapter)}
    print(f"model  {chosen.base.public_name}, and with {chosen.adapter}; precision {scoring.trainer.precision}")
    if data:
        found["held_out"] = _score_held_out(scoring, data, "test" if source else "validate", draws, seed)
    if asked:
        found["mmlu"] = _score_questions(scoring, asked, batch_tokens or QUESTION_BATCH_TOKENS, draws, seed)
    if output:
        text = json.dumps(_as_json(found | {"draws": draws, "seed": seed}), indent=2) + "\n"
        with saved_by("output"):
            write_file(Path(output), text)


# Held-out conversations


def _held_out(chosen: ResolvedAdapter, source: str | None, max_length: int | None) -> "ChatDataModule":
    from lit_qlora.data.datamodule import ChatDataModule
    from lit_qlora.model.base import check_context
    from lit_qlora.model.lora import read_format

    options = chosen.options["data"] | ({"max_length": max_length} if max_length else {})
    if max_length and options["batch_tokens"]:
        options["batch_tokens"] = max(options["batch_tokens"], max_length)
    options |= {"test_source": source, "tokenizer": chosen.base.name, "seed": chosen.options["seed_everything"]}
    options |= read_format(chosen.adapter).options
    data = ChatDataModule(**options)
    data.tokenizer_option = LINKED["data.tokenizer"]
    if chosen.run:
        data.recall(chosen.run.rows)
    try:
        check_context(chosen.base, data.max_length)
        data.setup("test" if source else "validate")
    except UserError as error:
        raise error.replace(option=CALLED_HERE.get(error.option or "", error.option)) from error
    return data


def _score_held_out(scoring: "Scoring", data: "ChatDataModule", part: str, draws: int, seed: int) -> dict[str, Any]:
    import numpy as np

    from lit_qlora.model.sums import AnswerSums
    from lit_qlora.tools.scoring.intervals import bootstrap

    def figures(sums: Any) -> Any:
        with np.errstate(over="ignore"):  # of a broken model, infinite
            return np.array([*figures_of("val", dict(zip(AnswerSums.NAMES, sums, strict=True)), np.exp).values()])

    base, adapter = scoring.held_out(data, part)
    compared = bootstrap(base, adapter, figures, draws, seed)
    names = [name.removeprefix("val/") for name, metric in held_out().items() if metric.formula]
    rows = dict(zip(names, compared, strict=True))
    for line in data.describe():
        print(f" data  {line}")
    _print_note(f"drawn from {number_of(len(base), 'conversations')}", draws, rows, "conversations")
    _table("", rows, "#.6g", "#.5g")
    counts = {"conversations": len(base), "tokens": int(base[:, 2].sum())}
    return counts | {name: row._asdict() for name, row in rows.items()}


# Questions


def _read_questions(mmlu: str | None, shots: int, examples: str | None) -> list[tuple[Subject, Any]]:
    """The subjects with their examples."""
    if mmlu is None:
        for name, given in (("shots", shots), ("examples", examples)):
            if given:
                raise UserError(f"{given} is given, and no questions", option=name, remedy="give --mmlu FILE")
        return []
    if shots and not examples:
        raise UserError(
            f"{shots} needs examples", option="shots", remedy="give --examples FILE, MMLU's dev file of the subject"
        )
    if examples and not shots:
        raise UserError(f"{examples} is given, and shots is 0", option="examples", remedy="give --shots 5")
    if examples and Path(examples).resolve() == Path(mmlu).resolve():
        raise UserError(f"{examples} holds the questions themselves", option="examples", remedy="give MMLU's dev file")
    subjects = read_subjects("mmlu", mmlu)
    known = read_subjects("examples", examples) if examples else []
    return [(subject, examples_for(subject, known, shots)) for subject in subjects]


def _encode_questions(chosen: ResolvedAdapter, subjects: Sequence[tuple[Subject, Any]], style: Style) -> Asked:
    """Raises UserError naming the place of a question that does not fit into the base's context."""
    prompts, context = Prompts(chosen.encoder(NO_LIMIT), style), chosen.base.context_tokens
    encoded: list[list[list[int]]] = []
    for subject, examples in subjects:
        encoded.append([])
        for question in subject.questions:
            ids = prompts.ids(subject, question, examples)
            if len(ids) > context:
                remedy = "give --shots 0, or delete it" if examples else "shorten or delete it"
                raise UserError(
                    f"a prompt of {len(ids):,} tokens is more than the {context:,} of {chosen.base.name}",
                    place=question.where,
                    remedy=remedy,
                )
            encoded[-1].append(ids)
    answers = [[LETTERS.index(question.answer) for question in subject.questions] for subject, _ in subjects]
    names = [subject.name for subject, _ in subjects]
    return Asked(names, encoded, prompts.letters, answers, len(subjects[0][1]), style)


def _score_questions(scoring: "Scoring", asked: Asked, batch_tokens: int, draws: int, seed: int) -> dict[str, Any]:
    import numpy as np

    from lit_qlora.tools.scoring.intervals import Compared, bootstrap, wilson

    prompts = [ids for subject in asked.prompts for ids in subject]
    right = np.array([place for subject in asked.answers for place in subject])
    base, adapter = (scores.argmax(1) == right for scores in scoring.choices(prompts, asked.letters, batch_tokens))
    ends = np.cumsum([len(subject) for subject in asked.prompts])
    spans = [
        (name, slice(end - len(ids), end)) for name, ids, end in zip(asked.names, asked.prompts, ends, strict=True)
    ]
    rows: dict[str, Compared] = {}
    for name, span in [*spans, ("all", slice(None))] if len(spans) > 1 else spans:
        of_base, of_adapter = (1.0 * hits[span, None] for hits in (base, adapter))
        count = len(of_base)
        ((_, _, difference),) = bootstrap(of_base, of_adapter, lambda sums, count=count: sums / count, draws, seed)  # type: ignore[misc]
        share, share_after = (wilson(int(hits.sum()), count) for hits in (of_base, of_adapter))
        rows[f"{name.replace('_', ' ')} ({count:,})"] = Compared(share, share_after, difference)
    print(f" data  {number_of(len(prompts), 'questions')}, {asked.shots}-shot, {asked.style}")
    _print_note("Wilson's, of the difference drawn from questions", draws, rows, "questions")
    _table("accuracy (questions)", rows, ".4f", ".4f")
    accuracy = {name: row._asdict() for name, row in zip([*asked.names, "all"], rows.values(), strict=False)}
    return {"questions": len(prompts), "shots": asked.shots, "style": asked.style, "accuracy": accuracy}


# Tables


def _print_note(how: str, draws: int, rows: Mapping[str, "Compared"], drawn: str) -> None:
    from lit_qlora.tools.scoring.intervals import FEWEST

    has_interval = {row.base.low is not None for row in rows.values()}
    if True in has_interval:
        print(f"       in brackets: 95 % intervals, {how} {draws:,} times")
    if False in has_interval:
        print(f"       without brackets: fewer than {FEWEST} {drawn} are too few for an interval")
    print()


def _table(title: str, rows: Mapping[str, "Compared"], form: str, ends: str) -> None:
    """A line per figure; ``form`` and ``ends`` are the formats of a value and of the ends of its interval."""

    def cell(figure: "Figure") -> list[str]:
        interval = [] if figure.low is None else [f"[{figure.low:{ends}}, {figure.high:{ends}}]"]
        return [f"{figure.value:{form}}", *interval]

    cells = {title: [["base"], ["adapter"], ["adapter - base"]]}
    cells |= {name: [*map(cell, row)] for name, row in rows.items()}
    lines: list[tuple[str, ...]] = [(name, *map(" ".join, row)) for name, row in cells.items()]
    if sys.stdout.isatty() and sum(_widths(lines)) + 6 > WIDTH:
        lines = _stacked(cells)
    widths = _widths(lines)
    for line in lines:
        print("  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)).rstrip())


def _widths(lines: Sequence[tuple[str, ...]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _stacked(cells: Mapping[str, Sequence[Sequence[str]]]) -> list[tuple[str, ...]]:
    """Lines of a table with each interval below its value, and names in what `WIDTH` leaves them."""
    stacked = [part for row in cells.values() for part in zip_longest(*row, fillvalue="")]
    room = max(WIDTH - sum(_widths(stacked)) - 6, 12)
    return [part for name, row in cells.items() for part in zip_longest(wrap(name, room), *row, fillvalue="")]


def _as_json(value: Any) -> Any:
    """``value`` as JSON: a figure by its parts."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: _as_json(inner) for name, inner in value.items()}
    return json_number(value) if isinstance(value, float) else value
