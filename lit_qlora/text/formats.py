"""Owns prompt formats: how a conversation is written to a model, in training and for answers.

Users of one hold a `PromptFormat`, and never ask which: `make_format` creates it from options, `from_record` from an
adapter's record. Its kinds are `llama2.Llama2` and `own_template.Template`; a template that comes along under a name is
a file in ``templates/``, and nothing else. Knows no token ids.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

from lit_qlora.errors import UserError, excerpt, require
from lit_qlora.text import edges
from lit_qlora.text.conversation import HALF, Conversation, TextError, Turn, is_encodable

TEMPLATES = Path(__file__).parent / "templates"
LLAMA_2, OF_BASE = "llama2", "base"
"""Values of ``data.template``: the Llama 2 format, which is the default, and the base's own chat template."""


class Piece(NamedTuple):
    """A piece of text that is encoded by itself.

    A ``stretch`` opens the text, or follows a token; a ``rest`` continues in mid-text, and gets no space before its
    first word; a ``token`` is a special token's spelling, and becomes its id.

    Args:
        text: its characters, or the spelling of a special token.
        is_answer: True for what the model writes in use, its EOS included.
        kind: as above.
    """

    text: str
    is_answer: bool
    kind: Literal["stretch", "rest", "token"]


SHORTEST_MARK = 3
"""Fewest characters of a special token for which a text that ends in it counts as having it written out."""


class SpecialTokens(NamedTuple):
    """How a tokenizer spells BOS, which is empty where it has none, EOS, and all of its special tokens.

    Args:
        bos: spelling of BOS; empty without one.
        eos: spelling of EOS.
        all: spellings of all special tokens, BOS and EOS among them.
    """

    bos: str = "<s>"
    eos: str = "</s>"
    all: tuple[str, ...] = ("<unk>", "<s>", "</s>")

    @property
    def ends(self) -> list[str]:
        """BOS, if there is one, and EOS."""
        return [token for token in (self.bos, self.eos) if token]


@dataclass(frozen=True, kw_only=True)
class PromptFormat(ABC):
    """A way to write conversations to a model.

    Args:
        source: the chat template that it is given by, as in ``data.template``; None where it is built in.
        system: the system text of conversations that bring none.
        tokens: of the tokenizer, once it is known; until then a format can be named and recorded, and little else.
        place: the record that it comes from, for messages; None: ``data.template`` and ``data.system``.
        is_assumed: True if no record says that it is the one of training: another may be given instead.
    """

    source: str | None = None
    system: str | None = None
    tokens: SpecialTokens | None = None
    place: str | None = None
    is_assumed: bool = False

    name: ClassVar[str]
    """Name in an adapter's record."""
    opens_in_space: ClassVar[bool] = True
    """True if its text after a special token may start with a space."""

    def of(self, tokens: SpecialTokens) -> Self:
        """This format with the special ``tokens`` of a tokenizer."""
        return replace(self, tokens=tokens)

    @property
    def spelled(self) -> SpecialTokens:
        """The special tokens; Llama's until others are known."""
        return self.tokens or SpecialTokens()

    def pieces(self, conversation: Conversation) -> list[Piece]:
        """An open conversation up to where its answer begins, an answered one up to the end of its last answer.

        Args:
            conversation: an open or an answered one; a plain text is written between BOS and EOS.

        Raises:
            ValueError: the format can't hold it, as where a turn holds one of `tags`.
        """
        if not conversation.is_text:
            whole = self.completed(conversation)
            for number, text in enumerate([whole.system or "", *(turn.content for turn in whole.turns)]):
                for tag in self.tags_in(text.strip()):  # templates write texts stripped
                    raise TextError(number, f"holds {tag!r}, which could forge a turn or a system text")
            return self._written(whole)
        said = Piece(conversation.turns[0].content, True, "stretch")
        return [*self._begin, said, Piece(self.spelled.eos, True, "token")]

    @property
    def _begin(self) -> list[Piece]:
        """BOS, if there is one."""
        return [Piece(self.spelled.bos, False, "token")] if self.spelled.bos else []

    @abstractmethod
    def _written(self, conversation: Conversation) -> list[Piece]:
        """The `pieces` of a conversation that has its system text, and is no plain text."""

    def completed(self, conversation: Conversation) -> Conversation:
        """``conversation`` with the format's system text, if it has none.

        Raises ValueError for half a character, which no token stands for.
        """
        conversation.check_characters()
        if self.system is None or conversation.system is not None:
            return conversation
        return Conversation(conversation.turns, self.system)

    def learns_last_only(self, conversation: Conversation) -> bool:
        """True if earlier answers of ``conversation`` are written otherwise than where chat asks for them."""
        return False

    @property
    @abstractmethod
    def tags(self) -> list[str]:
        """The texts that it writes around turns: in an outside text, they could forge a turn."""

    def tags_in(self, text: str) -> list[str]:
        """The `tags` that ``text`` contains."""
        return [tag for tag in self.tags if tag in text]

    @property
    def own_marks(self) -> list[str]:
        """The special tokens that it writes, and any other text that closes a turn."""
        return self.spelled.ends

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens that rows, made for this model or another, may have written out at the edges of turns; the
        longest first.

        Includes all special tokens of the tokenizer: rows decoded with their padding have those.
        """
        special = (token for token in self.spelled.all if len(token) >= SHORTEST_MARK)
        return tuple(sorted({*edges.WRITTEN_OUT, *self.own_marks, *special}, key=lambda mark: (-len(mark), mark)))

    def writes(self, token: str) -> bool:
        """True if it may write a special ``token``, so that the model has to know it."""
        return token in self.spelled.ends

    def wrong(self, name: str, problem: object) -> UserError:
        """An error in one of its options, which came from the command line or a record.

        Args:
            name: ``template`` or ``system``.
            problem: the problem in words.
        """
        return UserError(str(problem), option=name if self.place else f"data.{name}", place=self.place)

    @property
    def options(self) -> dict[str, str | None]:
        """The options of ``data`` that give it again, by name."""
        return {"template": self.source, "system": self.system}

    def is_given_by(self, template: str | None) -> bool:
        """True if ``template`` is the chat template that it was made from."""
        return self.source == template

    def kept(self, given: str | None, name: str) -> str | None:
        """The ``data.template`` that gives it again, for the data of the adapter or checkpoint ``name``, trained with
        it.

        Raises UserError if the text of another template is ``given``.
        """
        if given is not None and self.is_assumed:
            return given
        if given is not None and not self.is_given_by(given):
            raise UserError(
                f"{name} was trained with {self.version}, and is given {make_format(given).version}",
                option="data.template",
                remedy="leave it out, and the adapter's own is taken",
            )
        return self.source

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
        """The format's name in messages."""

    @property
    @abstractmethod
    def version(self) -> str:
        """Words that distinguish the format from another in a message."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """The format's name and a sha256 that identifies it, for a checkpoint's record of its run."""

    @property
    @abstractmethod
    def cache_key(self) -> tuple[Any, ...]:
        """Everything that decides its pieces, beside the system text."""

    @abstractmethod
    def described(self, file: str) -> str:
        """The format's description for a model card; ``file`` holds its template, if it has one."""

    @property
    def end_of_turn(self) -> str:
        """The special token that ends an answer, and is learned."""
        return self.spelled.eos

    @property
    @abstractmethod
    def assumption(self) -> str:
        """Words on the format of an adapter that does not record its own; see `is_assumed`."""

    @abstractmethod
    def notes(self, of_base: str | None = None) -> list[str]:
        """Notes on it, in lines for the terminal; ``of_base`` is the base's own chat template."""

    @abstractmethod
    def left_out(self, where: str, why: Exception) -> str:
        """The message about rows that it can't hold.

        Args:
            where: the first of them stands.
            why: it can't be held.
        """

    def record(self) -> dict[str, str]:
        """The record of the prompt format in an adapter; `from_record` reads it."""
        return {"prompt_format": self.name} | ({"system": self.system} if self.system else {})

    @classmethod
    def from_record(cls, record: Mapping[str, Any], place: str) -> Self:
        """The format of a record.

        Args:
            record: the record; its values are texts.
            place: where it is, for messages.

        Raises:
            UserError: it is incomplete.
        """
        return cls(system=record.get("system"), place=place)

    @abstractmethod
    def chat_template(self) -> str:
        """The ``chat_template`` of a tokenizer; where usable, it gives the very ids of training."""

    @property
    def tokenizer_remedy(self) -> str:
        """The remedy for a tokenizer whose ids through `chat_template` differ from training's."""
        return "take a base with Llama 2's tokenizer"

    @abstractmethod
    def go_template(self) -> str:
        """The prompts as a Go template, which Ollama takes; without the first BOS, which llama.cpp adds.

        Go can't trim: white space around a message stays, which training removed. Raises ValueError if there can be
        none.
        """

    def modelfile(self, weights: Path, stops: Sequence[str] = (), adds_bos: bool = True) -> str:
        """Ollama's ``Modelfile``.

        Args:
            weights: The GGUF file beside it, which names EOS.
            stops: All special tokens that end an answer.
            adds_bos: Whether llama.cpp puts a BOS before each text, as it does not for SmolLM2's tokenizer.

        Raises:
            ValueError: There can be none.
        """
        template = self.go_template()
        if not adds_bos and self.pieces(Conversation((Turn("user", "x"),)))[0].text.startswith(self.spelled.bos):
            template = self.spelled.bos + template
        if '"""' in template + (self.system or ""):
            raise ValueError("its prompts or the system text hold three quotes, which a Modelfile can't hold")
        lines = [f"FROM ./{weights.name}", f'TEMPLATE """{template}"""']
        lines += [f'SYSTEM """{self.system}"""'] if self.system else []
        lines += [f'PARAMETER stop "{stop}"' for stop in stops] if {*stops} - {self.spelled.eos} else []
        return "\n".join(lines) + "\n"


def built_in() -> dict[str, str]:
    """The built-in chat templates, by their names in ``data.template``."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*.jinja"))}


def names() -> list[str]:
    """The values of ``data.template``, beside a file and a template's text."""
    return [LLAMA_2, *built_in(), OF_BASE]


def make_format(template: str | None = None, system: str | None = None) -> PromptFormat:
    """The format that ``data.template`` and ``data.system`` stand for.

    Args:
        template: a template's text; None for the Llama 2 format.
        system: the system text of conversations that bring none.

    Raises:
        UserError: one of them is invalid.
    """
    for option, text in (("data.template", template), ("data.system", system)):
        _require_text(text, option)
    if template is None:
        from lit_qlora.text import llama2

        return llama2.Llama2(system=system)
    from lit_qlora.text import own_template  # with Jinja, which most commands don't need

    return own_template.Template(source=template, system=system)


def from_record(record: Mapping[str, Any], folder: str | Path, file: str) -> PromptFormat:
    """The format by a `PromptFormat.record`; Llama 2's where it names none.

    Args:
        record: the record of an adapter.
        folder: its folder, for messages.
        file: name of the file in it that holds the record.

    Raises:
        UserError: this version does not know it, or it was altered.
    """
    from lit_qlora.text import llama2, own_template

    place = f"{folder}: {file}"
    for key in ("prompt_format", "system", "template", "template_sha256"):
        _require_text(record.get(key), key, place)
    kinds = {kind.name: kind for kind in (llama2.Llama2, own_template.Template)}
    name = record.get("prompt_format") or llama2.Llama2.name
    if name not in kinds:
        known = " and ".join(map(repr, kinds))
        raise UserError(f"its prompt format is {excerpt(name)}, this version knows {known} only", place=folder)
    return kinds[name].from_record(record, place)


def _require_text(value: object, option: str, place: str | None = None) -> None:
    require(isinstance(value, str | None), option, "a text", value, place=place)
    if not is_encodable(str(value)):
        raise UserError(f"it {HALF}", option=option, place=place)
