"""Owns the verb predict: prompts in, a jsonl of answers out, in the same order. Knows no model.

Prompts of similar length are answered together. Batches and samples are a function of the file and the options only: a
process that resumes after a kill gives the same output.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from lit_qlora.chosen import choose_adapter
from lit_qlora.console import complain, note, progress_bar
from lit_qlora.data.forms import check_columns
from lit_qlora.data.records import Counts
from lit_qlora.data.row import read_row
from lit_qlora.data.row_files import ARROW, COMPRESSED, ENDINGS, TABLES, Row
from lit_qlora.data.sources import Source, SourceOption, find_splits, matching, read_source, sources_of
from lit_qlora.data.splits import FILES
from lit_qlora.errors import UserError, require
from lit_qlora.model.generate import Sampling
from lit_qlora.ranges import check_ranges
from lit_qlora.storage.files import decoded, output_path, require_folder, saved_by
from lit_qlora.storage.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lit_qlora.text.conversation import Conversation
from lit_qlora.text.formats import PromptFormat
from lit_qlora.text.messages import LAST_UNSEEN
from lit_qlora.tools.answering.answerer import Answerer, check_prompt
from lit_qlora.tools.answering.unfinished import Unfinished
from lit_qlora.wording import number_of

ANSWERED = "last answers left out, for each question is answered here"
SECONDS_BETWEEN_LINES = 10
"""Seconds between lines of progress without a terminal on standard error."""


def predict(
    prompts: SourceOption,
    output: str,
    columns: dict[str, str] | None = None,
    run: str | None = None,
    adapter: str | None = None,
    base: str | None = None,
    batch_size: int = 8,
    **drawn: Any,
) -> None:
    """Answer a file of prompts with a run's best adapter; given again after an interruption, resume.

    Args:
        prompts: a .txt file with one prompt per line, or any rows that data.source of fit takes: the question of each
            is asked, and its answer is not used.
        output: the .jsonl to write: prompt, answer, and whether the answer ended by itself.
        columns: names of your table's columns for user (also system, context, history), messages or text.
        run: run folder; default: the run that was started last.
        adapter: an adapter folder instead of a run.
        base: the base of that adapter; default: the one that the folder names.
        batch_size: prompts per batch.
        drawn: the arguments of `Sampling`.

    Raises:
        UserError: for a wrong option, prompt or output, and for what the memory or the disk can't hold.
    """
    sampling = Sampling(**drawn)
    check_ranges({"batch_size": batch_size})
    target = output_path(output)
    is_otherwise = target.name.lower().endswith((*TABLES, *COMPRESSED))
    require(not is_otherwise, "output", "a name for JSON lines, such as answers.jsonl", output)
    unfinished = Unfinished(target)
    unfinished.check_free()
    require_folder(target)
    if columns is not None:
        check_columns(columns, option="columns", use="prompts")
    rows = read_prompts(prompts, columns)  # a wrong one is reported first
    answerer = Answerer(choose_adapter(run, adapter, base))
    questions = open_prompts(rows, answerer.encoder.prompt_format, columns)
    ids = [_prompt_ids(answerer, where, conversation, sampling) for where, conversation in questions]
    belongs_to = _belongs_to(answerer, ids, sampling, batch_size)
    if unfinished.is_whole(belongs_to):
        these = "this answer" if len(ids) == 1 else f"these {len(ids):,} answers"
        print(f"finished: {target} holds {these}; nothing to do")
        return
    with unfinished.open(belongs_to) as done:
        answers = _answer_all(answerer, ids, sampling, belongs_to, unfinished, done)
        lines = [
            {"prompt": conversation.turns[-1].content, "answer": text, "stopped": stopped}
            for (_, conversation), (text, stopped) in zip(questions, answers, strict=True)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with saved_by("output", "given again, the same command resumes"):
            unfinished.finish(belongs_to, text.encode())
    print(f"{number_of(len(lines), 'answers')} by {answerer.adapter} in {target}")


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Sort prompts into batches: similar lengths together, the longest first.

    Too large a batch then fails at once, and the remaining time is rather over- than underestimated.

    Args:
        lengths: tokens of each prompt.
        batch_size: prompts per batch.

    Returns:
        Batches of indices into ``lengths``.
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _answer_all(
    answerer: Answerer,
    ids: list[list[int]],
    sampling: Sampling,
    belongs_to: Mapping[str, Any],
    unfinished: Unfinished,
    done: dict[int, Any],
) -> list[tuple[str, bool]]:
    """Text and whether it ended by itself, for each prompt in order; saves each batch as it is finished."""
    batches = batches_by_length([len(prompt) for prompt in ids], belongs_to["batch_size"])
    before, said_at = sum(len(batches[number]) for number in done), time.monotonic()
    answered = before
    if before:
        note(f"{before} of {len(ids)} were answered before: resuming")
    with progress_bar("answers", total=len(ids), initial=before) as bar:
        for number, places in enumerate(batches):
            if number in done:
                continue
            answers = _answer_batch(answerer, [ids[place] for place in places], sampling, number)
            if answered == before and _adapter_digest(answerer.adapter) != belongs_to["adapter"]:  # by now it is loaded
                raise UserError(
                    f"predict: {answerer.adapter} was replaced meanwhile, as by its run's training, and "
                    + (f"{before} answers are of the one before" if before else "no answer is kept"),
                    remedy="give another name for the answers of this one" if before else "give the command again",
                )
            done[number] = [[answer.text, answer.stopped] for answer in answers]
            unfinished.add(number, done[number])
            bar.update(len(places))
            answered += len(places)
            if bar.disable and time.monotonic() - said_at >= SECONDS_BETWEEN_LINES:  # no terminal: a line now and then
                complain(f"{answered} of {len(ids)} answered")
                said_at = time.monotonic()
    by_place = dict(zip(chain(*batches), chain(*(done[number] for number in range(len(batches)))), strict=True))
    return [by_place[place] for place in range(len(ids))]


def _answer_batch(answerer: Answerer, ids: list[list[int]], sampling: Sampling, number: int) -> Sequence[Any]:
    import torch

    from lit_qlora.model.device import seed_of

    try:
        # By the batch's number: samples must not depend on what this process sampled before.
        return answerer.answer_ids(ids, replace(sampling, seed=seed_of(sampling.seed, number)))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"too much for the memory: {number_of(len(ids), 'prompts')} of up to {max(map(len, ids))} tokens",
            option="batch_size",
            remedy="lower it",
        ) from error


def _adapter_digest(folder: Path) -> str:
    """A hash of the files of the adapter in ``folder``."""
    adapter = hashlib.sha256()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        with (folder / name).open("rb") as file:
            adapter.update(hashlib.file_digest(file, "sha256").digest())
    return adapter.hexdigest()[:12]


def _belongs_to(answerer: Answerer, ids: list[list[int]], sampling: Sampling, batch_size: int) -> dict[str, Any]:
    """Everything that decides the answers, by the names of the options."""
    from lit_qlora.model.device import dtype_name

    return {
        "prompts": hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12],
        "adapter": _adapter_digest(answerer.adapter),
        "base": answerer.base.public_name,
        "computed in": dtype_name(answerer.dtype),
        **asdict(sampling),
        "stop": [*sampling.stop],  # as JSON has it, with which it is compared
        "batch_size": batch_size,
    }


def _prompt_ids(answerer: Answerer, where: str, conversation: Conversation, sampling: Sampling) -> list[int]:
    try:
        return answerer.prompt(conversation, sampling)
    except UserError as error:
        raise error.replace(place=where) from error


def open_prompts(
    rows: Sequence[Row], prompt_format: PromptFormat, columns: Mapping[str, str] | None = None
) -> list[tuple[str, Conversation]]:
    """The open prompts in the rows of `read_prompts`, each with its place; prints what of the rows is not used.

    Args:
        rows: columns by name, with their place.
        prompt_format: writes the prompts.
        columns: what the columns of a form are called in the rows; None: as in `forms.FORMS`.

    Raises:
        UserError: naming file and line, for a row that is no prompt.
    """
    counts, prompts = Counts(), []
    for row in rows:
        try:
            read = read_row(row.value, marks=prompt_format.marks, use="prompts", columns=columns)
        except ValueError as error:
            raise UserError(str(error), place=row.where, remedy=getattr(error, "remedy", None)) from error
        asked = read.conversation
        if asked is None or LAST_UNSEEN in read.changed:  # an earlier one would be answered again
            raise UserError(
                f"its question holds no text ({', '.join(read.changed)})",
                place=row.where,
                remedy="mend or delete this row",
            )
        if asked.is_answered:
            asked = replace(asked, turns=asked.turns[:-1])
            counts.dropped[ANSWERED] += 1
        check_prompt(asked, prompt_format, numbered=True, place=row.where)
        counts.add(read)
        prompts.append((row.where, asked))
    for what, number in counts.in_words().items():
        complain(f"prompts: {number_of(number, what)}")
    return prompts


def read_prompts(prompts: SourceOption, columns: Mapping[str, str] | None = None) -> list[Row]:
    """The rows of a file of prompts, or of a source; of splits, those for scoring are read.

    Args:
        prompts: a .txt with a prompt per line, or what `sources_of` takes.
        columns: names of columns that the first line of a .csv may have, by what they hold.

    Raises:
        UserError: there is nothing, or a row can't be read: each prompt has its answer, so none is left out.
    """
    rows = list[Row]()
    for source in sources_of(prompts, "prompts"):
        require(source.share == 1, "prompts.share", "none: it is of rows to train on", source.share)
        require(source.columns is None, "prompts.columns", "none: --columns names them", source.columns)
        rows += _prompt_rows(source, [*(columns or {}).values()])
    for row in rows:
        if row.fault:
            raise row.fault
    if not rows:
        raise UserError("no prompt in it", place=str(prompts))
    return rows


def _prompt_rows(source: Source, columns: Sequence[str]) -> list[Row]:
    path = Path(source.path).expanduser()
    if path.suffix.lower() == ".txt" and not source.is_on_hub:
        files = [] if path.exists() else matching(path)
        return [line for file in files or [path] for line in _lines_of(file)]
    if path.is_file() and not path.name.lower().endswith((*FILES, *COMPRESSED, ARROW)):
        raise UserError(f"the ending is {path.suffix!r}, expected one of .txt, {', '.join(ENDINGS)}", place=path)
    splits = find_splits(source)
    name = splits.for_scoring("test", "validation")
    if others := [*(one for one in splits.names.values() if one != name), *splits.unread]:
        complain(f"prompts: {name} of {source}; not read: {', '.join(others)}")
    return read_source(source, name, columns)


def _lines_of(path: Path) -> Iterator[Row]:
    try:
        text = decoded(path.read_bytes(), place=path)
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror})", place=path) from error
    for number, line in enumerate(re.split(r"\r\n?|\n", text), 1):
        if line.strip():
            yield Row(f"{path}:{number}", {"prompt": line.strip()})
