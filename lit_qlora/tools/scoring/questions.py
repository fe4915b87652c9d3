"""Owns multiple-choice questions in MMLU's layout: their files, and their prompts.

A .csv has six columns: question, A, B, C, D and the letter of the answer, under a header or none. Knows no model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lit_qlora.data.row_files import SourceError, read_cells
from lit_qlora.errors import UserError, excerpt
from lit_qlora.text.conversation import Conversation, Turn

if TYPE_CHECKING:
    from lit_qlora.data.encode import Encoder

LETTERS = ("A", "B", "C", "D")
QUESTION_COLUMNS = ("question", *LETTERS, "answer")
SPLIT = re.compile(r"_(test|val|dev)$")
"""MMLU's suffixes of a subject in a file's name."""

Style = Literal["plain", "chat"]


@dataclass(frozen=True)
class Question:
    """A question with its four choices.

    Args:
        where: its file and line.
        text: of the question.
        choices: four, in the order of A to D.
        answer: the letter of the right one.
    """

    where: str
    text: str
    choices: tuple[str, ...]
    answer: str

    def __str__(self) -> str:
        """The question as written by every harness, up to the letter of the answer."""
        choices = (f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, self.choices, strict=True))
        return f"{self.text.strip()}\n{''.join(choices)}Answer:"


@dataclass(frozen=True)
class Subject:
    """The questions of one file.

    Args:
        name: from the file's name, without MMLU's suffix.
        questions: the questions, in the order of the file.
        is_named: True if the file is named as MMLU's are, by the subject of its questions.
    """

    name: str
    questions: tuple[Question, ...]
    is_named: bool


def read_subjects(option: str, place: str) -> list[Subject]:
    """The questions of a .csv file, or of every one in a folder, by name.

    Args:
        option: option that names the file or folder, for messages.
        place: the file or folder.

    Raises:
        UserError: nothing is found; or, naming file and line, for what is no question.
    """
    path = Path(place).expanduser()
    if not path.is_dir() and not path.is_file():
        raise UserError(f"no file or folder {place}", option=option)
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        remedy = "give MMLU's folder test (for examples, dev) or a file"
        raise UserError(f"no .csv file in {place}", option=option, remedy=remedy)
    return [Subject(SPLIT.sub("", file.stem), _questions_in(file), bool(SPLIT.search(file.stem))) for file in files]


def _questions_in(path: Path) -> tuple[Question, ...]:
    if path.suffix.lower() != ".csv":
        raise SourceError(path, f"the ending is {path.suffix!r}, expected .csv", "convert the file")
    rows = read_cells(path)
    place, header = rows[0]
    heads = [cell.strip().lower() for cell in header]
    if "question" in heads and "answer" in heads:
        missing = [name for name in QUESTION_COLUMNS if name.lower() not in heads]
        if missing:
            problem = f"no column {missing[0]!r}, columns found: {excerpt(header)}"
            raise SourceError(place, problem, f"expected {', '.join(QUESTION_COLUMNS)}")
        rows = rows[1:]
        if not rows:
            raise SourceError(path, "holds a header and no question", "check how it was made")
    else:
        heads = [name.lower() for name in QUESTION_COLUMNS]
    return tuple(_question(where, cells, heads) for where, cells in rows)


def _question(where: str, cells: list[str], heads: list[str]) -> Question:
    if len(cells) != len(heads):
        problem = f"{len(cells)} columns, expected {len(heads)} ({', '.join(QUESTION_COLUMNS)}), got {excerpt(cells)}"
        raise SourceError(where, problem, "put quotes around texts that hold commas")
    text, *choices, answer = (cells[heads.index(name.lower())] for name in QUESTION_COLUMNS)
    if answer.strip() not in LETTERS:
        raise UserError(f"the answer is {excerpt(answer)}, expected A, B, C or D", place=where)
    if not text.strip():
        raise SourceError(where, "the question is empty", "delete the row")
    return Question(where, text, tuple(choices), answer.strip())


def examples_for(subject: Subject, given: Sequence[Subject], shots: int) -> tuple[Question, ...]:
    """The first examples of a subject.

    Args:
        subject: name of the questions' subject.
        given: examples by their subjects; those of a single file serve every subject.
        shots: how many.

    Raises:
        UserError: there are none of the subject, or too few.
    """
    if shots == 0:
        return ()
    found = given[0] if len(given) == 1 else next((one for one in given if one.name == subject.name), None)
    if found is None:
        remedy = f"expected a file {subject.name}_dev.csv among them"
        raise UserError(f"none for {subject.name}", option="examples", remedy=remedy)
    if len(found.questions) < shots:
        problem = f"ends after {len(found.questions)} examples, expected {shots}"
        raise SourceError(found.questions[-1].where, problem, "add some, or give --shots 0")
    return found.questions[:shots]


class Prompts:
    """The ids of questions, each up to where the letter of its answer comes, and the ids of the four letters there.

    ``plain`` is what harnesses and published figures use: what it is about, the examples with their letters, the
    question, ``Answer:``. ``chat`` puts each question into a user's turn and each letter into an answer of the format
    that the adapter was trained in. The encoder must cut nothing.

    Args:
        encoder: of the adapter's prompt format.
        style: ``plain`` or ``chat``.

    Raises:
        UserError: the letters do not differ by one token.
    """

    def __init__(self, encoder: "Encoder", style: Style) -> None:
        self.encoder, self.style = encoder, style
        written = [self._answered([("?\nAnswer:", letter)]) for letter in LETTERS]
        self._place = next(
            (place for place, ids in enumerate(zip(*written, strict=False)) if len({*ids}) > 1), len(written[0])
        )
        self.letters = [ids[self._place] for ids in written if len(ids) > self._place]
        if len({*self.letters}) != len(LETTERS) or len({len(ids) for ids in written}) > 1:
            problem = "the base's tokenizer has no single token for each of A, B, C and D"
            raise UserError(problem, option="mmlu", remedy="choose another base")
        self._behind = len(written[0]) - self._place

    def ids(self, subject: Subject, question: Question, examples: Sequence[Question]) -> list[int]:
        """The ids of a question's prompt, up to where the letter of its answer comes.

        Args:
            subject: of the question.
            question: the one to answer.
            examples: answered questions in front of it, each with its letter.

        Raises:
            UserError: naming the question's place, when it can't be written.
        """
        pairs = [(str(example), example.answer) for example in examples] + [(str(question), LETTERS[0])]
        about = f" about {subject.name.replace('_', ' ')}" if subject.is_named else ""
        opening = f"The following are multiple choice questions (with answers){about}.\n\n"
        pairs[0] = (opening + pairs[0][0], pairs[0][1])
        try:
            return self._answered(pairs)[: -self._behind]
        except ValueError as error:
            raise SourceError(question.where, str(error), "with --style plain it is only text") from error

    def _answered(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        """The ids of questions with their letters; where the last letter stands, behind it all is the same."""
        if self.style == "plain":
            return self.encoder.plain("\n\n".join(f"{question} {letter}" for question, letter in pairs))
        turns = [(Turn("user", question), Turn("assistant", letter)) for question, letter in pairs]
        conversation = Conversation(tuple(turn for pair in turns for turn in pair))
        (example,) = self.encoder.examples([conversation])
        assert example is not None and not example.was_cut, "an encoder without a limit is expected"
        return example.input_ids
