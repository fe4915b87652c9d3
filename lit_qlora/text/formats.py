"""Owns what a prompt format is: how a conversation is written to a model, in training and wherever it answers.

Whoever needs one holds a `PromptFormat`, and never asks which: `chosen` makes it from options, `from_record` from what
an adapter says of its prompts. Its kinds are `llama2.Llama2` and `own_template.Template`; a template that comes along
under a name is a file in ``templates/``, and nothing else. Knows no token ids.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

from lit_qlora.errors import UserError, excerpt, require
from lit_qlora.text import edges
from lit_qlora.text.conversation import HALF, Conversation, is_whole

TEMPLATES = Path(__file__).parent / "templates"


class Piece(NamedTuple):
    """What is encoded by itself.

    A ``stretch`` opens the text, or follows a token; a ``rest`` continues in mid-text, and gets no space before its
    first word; a ``token`` is a special token's spelling, and becomes its id.
    """

    text: str
    is_answer: bool
    kind: Literal["stretch", "rest", "token"]


SHORTEST_MARK = 3
"""Characters of a special token from which on a text that ends in it is taken to have it written out."""


class SpecialTokens(NamedTuple):
    """How a tokenizer spells BOS, which is empty where it has none, EOS, and all of its special tokens."""

    bos: str = "<s>"
    eos: str = "</s>"
    all: tuple[str, ...] = ("<unk>", "<s>", "</s>")

    @property
    def ends(self) -> list[str]:
        """BOS, if there is one, and EOS."""
        return [token for token in (self.bos, self.eos) if token]


@dataclass(frozen=True, kw_only=True)
class PromptFormat(ABC):
    """How conversations are written to a model.

    Args:
        source: the chat template that it is given by, as in ``data.template``; None where it is built in.
        system: the system text of conversations that bring none.
        tokens: of the tokenizer, once it is known; until then a format can be named and recorded, and little else.
        place: the record that it comes from, for messages; None: ``data.template`` and ``data.system``.
    """

    source: str | None = None
    system: str | None = None
    tokens: SpecialTokens | None = None
    place: str | None = None

    name: ClassVar[str]
    """In an adapter's record."""
    opens_in_space: ClassVar[bool] = True
    """Whether what it writes behind a special token may begin with a space of its own."""

    def of(self, tokens: SpecialTokens) -> Self:
        """The same with the special tokens of a tokenizer."""
        return replace(self, tokens=tokens)

    @property
    def spelled(self) -> SpecialTokens:
        """The special tokens; Llama's until others are known."""
        return self.tokens or SpecialTokens()

    @abstractmethod
    def pieces(self, conversation: Conversation) -> list[Piece]:
        """An open conversation up to where its answer begins, an answered one up to the end of its last answer.

        Raises ValueError for a conversation that the format can't hold, as where a turn holds one of `tags`.
        """

    def completed(self, conversation: Conversation) -> Conversation:
        """``conversation`` with the format's system text, if it brings none.

        Raises ValueError for half a character, which no token stands for.
        """
        conversation.check_characters()
        if self.system is None or conversation.system is not None:
            return conversation
        return Conversation(conversation.turns, self.system)

    @property
    @abstractmethod
    def tags(self) -> list[str]:
        """The texts that it writes around what is said: in a text from outside, they could forge a turn."""

    def tags_in(self, text: str) -> list[str]:
        """Those of `tags` that stand in ``text``."""
        return [tag for tag in self.tags if tag in text]

    @property
    def own_marks(self) -> list[str]:
        """The special tokens that it writes, and whatever else it closes a turn with."""
        return self.spelled.ends

    @property
    def marks(self) -> tuple[str, ...]:
        """What rows may have written out at the edges of turns, made for this model or another; the longest first.

        All special tokens of the tokenizer are among it: rows decoded with their padding have those.
        """
        special = (token for token in self.spelled.all if len(token) >= SHORTEST_MARK)
        return tuple(sorted({*edges.WRITTEN_OUT, *self.own_marks, *special}, key=lambda mark: (-len(mark), mark)))

    def writes(self, token: str) -> bool:
        """Whether it may write a special token, so that the model has to know it."""
        return token in self.spelled.ends

    def wrong(self, name: str, problem: object) -> UserError:
        """An error in its ``template`` or ``system``, whether an option or a record says it."""
        return UserError(str(problem), option=name if self.place else f"data.{name}", place=self.place)

    def check(self) -> None:
        """Raises UserError for a format or a system text that can't be used with its tokens."""
        self.check_system()

    def check_system(self) -> None:
        """Raises UserError for a system text that holds one of `tags`, as far as they are known."""
        if tags := self.tags_in(self.system or ""):
            raise self.wrong("system", f"expected a text without {tags[0]!r}, which {self.title} writes itself")

    @property
    @abstractmethod
    def title(self) -> str:
        """What it is called in a message."""

    @property
    @abstractmethod
    def version(self) -> str:
        """What tells it from others in a message about two of them."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Its name and a sha256 that tells it from every other, for a checkpoint's record of its run."""

    @property
    def cache_key(self) -> tuple[Any, ...]:
        """What decides its pieces, beside the system text."""
        return (self.name,)

    @abstractmethod
    def described(self, file: str) -> str:
        """What it is, for a model card; ``file`` is the one that holds its template where it has one."""

    def notes(self) -> list[str]:
        """What is worth knowing of it, in lines for the terminal."""
        return []

    @abstractmethod
    def left_out(self, where: str, why: Exception) -> str:
        """What is said of rows that it can't hold, the first of them at ``where``."""

    def record(self) -> dict[str, str]:
        """What an adapter says of its prompts, so that whoever uses it writes the same; `from_record` reads it."""
        return {"prompt_format": self.name} | ({"system": self.system} if self.system else {})

    @classmethod
    def recorded(cls, record: Mapping[str, Any], place: str) -> Self:
        """The one of a record, whose values are texts. Raises UserError where it does not say all of this kind."""
        return cls(system=record.get("system"), place=place)

    @abstractmethod
    def chat_template(self) -> str:
        """The ``chat_template`` of a tokenizer; where it can be used, it gives the very ids of training."""

    @property
    def tokenizer_remedy(self) -> str:
        """What to do where a tokenizer gives other ids through `chat_template` than training had."""
        return "take a base with Llama 2's tokenizer"

    @abstractmethod
    def modelfile(self, weights: Path) -> str:
        """Ollama's ``Modelfile`` beside the GGUF file ``weights``. Raises ValueError where there can be none."""

    @abstractmethod
    def ask(self) -> str:
        """Python code of a model card that asks ``model`` a question through ``tokenizer``, and sets ``answer``."""


def built_in() -> dict[str, str]:
    """The chat templates that come along, by the names that ``data.template`` takes."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*.jinja"))}


def chosen(template: str | None = None, system: str | None = None) -> PromptFormat:
    """The format that ``data.template`` and ``data.system`` stand for; ``template`` is a template's text.

    Raises UserError for what is none.
    """
    from lit_qlora.text import llama2, own_template

    for option, text in (("data.template", template), ("data.system", system)):
        _check_text(text, option)
    if template is None:
        return llama2.Llama2(system=system)
    return own_template.Template(source=template, system=system)


def from_record(record: Mapping[str, Any], folder: str | Path, file: str) -> PromptFormat:
    """The format by the `PromptFormat.record` in a ``file`` of ``folder``; Llama 2's where it names none.

    Raises UserError where this version does not know it, or it is not as it was recorded.
    """
    from lit_qlora.text import llama2, own_template

    place = f"{folder}: {file}"
    for key in ("prompt_format", "system", "template", "template_sha256"):
        _check_text(record.get(key), key, place)
    kinds = {kind.name: kind for kind in (llama2.Llama2, own_template.Template)}
    name = record.get("prompt_format") or llama2.Llama2.name
    if name not in kinds:
        known = " and ".join(map(repr, kinds))
        raise UserError(f"its prompt format is {excerpt(name)}, this version knows {known} only", place=folder)
    return kinds[name].recorded(record, place)


def _check_text(value: object, option: str, place: str | None = None) -> None:
    require(isinstance(value, str | None), option, "a text", value, place=place)
    if not is_whole(str(value)):
        raise UserError(f"it {HALF}", option=option, place=place)
