"""Owns the prompt format of a Jinja chat template, as used by Hugging Face, split into pieces to encode.

It is rendered twice: with a mark in place of each turn's text, which shows the template's own text, and unchanged. Only
if both agree does the template leave the turns unchanged, so that no outside text can become a special token, or lie
outside of its answer; otherwise the conversation is refused. Knows no token ids.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import product
from typing import Any, Literal, Self

import jinja2

from lit_qlora.errors import UserError
from lit_qlora.text import jinja
from lit_qlora.text.conversation import Conversation, first_difference, turn_name
from lit_qlora.text.formats import Piece, PromptFormat, built_in, names

SHORTEST_TAG = 3
"""Characters of a text of the template's own from which on a turn may not hold it: ``:`` alone stands everywhere."""

RULES = 4
"""Version of the pieces, raised when the same template and conversation give others."""

LONGEST_PART = 30
"""Most characters of a text in a message."""

_MARK = re.compile("\ue000(\\d+)\ue001")
"""A mark for a turn's text, as `_mark` makes it."""

_EDGE = "\ue002"
"""The mark between a prompt and an answer."""

_CLOSING = re.compile(rf"{_MARK.pattern}(?P<closing><[^<>\s]+>|\[[^\[\]\s]+\]|\S+)")
"""A turn's text, and what closes the turn right after it."""

# Stands before a template of the user's own, which sees the messages that this makes: as training had them.
_OPENING = """\
{%- set lit_qlora = namespace(said=[]) %}
{%- for message in messages %}
{%- for mark in FORBIDDEN %}
{%- if mark in message['content'] %}{{ raise_exception('a message holds ' ~ mark ~ ', which could forge a turn') }}\
{%- endif %}
{%- endfor %}
{%- if message['role'] != 'system' or (message['content'] | trim) %}
{%- set lit_qlora.said = lit_qlora.said + [{'role': message['role'], 'content': message['content'] | trim}] %}
{%- endif %}
{%- endfor %}
{%- if DEFAULT_SYSTEM and not (messages and messages[0]['role'] == 'system') %}
{%- set lit_qlora.said = [{'role': 'system', 'content': DEFAULT_SYSTEM}] + lit_qlora.said %}
{%- endif %}
{%- set messages = lit_qlora.said %}
"""

DATE = date(2026, 1, 1)
"""Today's date for a template that can't do without one; another one needs other `RULES`."""

_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(?P<format>[^"'\\]*)\1\s*\)""")
"""A call of the clock, whose format is written out."""

_OPENED = re.compile(r"<(?P<name>[\w:]*think\w*|thought|reasoning)>\s*\Z")
"""Thoughts that a prompt opens at its end."""

# What training gave to a template that asks for it: no clock, so that one with a date of its own to fall back on took
# that; and no thoughts, of which rows have none.
_GIVEN = {
    "strftime_now": "{%- set strftime_now = lit_qlora.no_clock %}\n",
    "enable_thinking": "{%- set enable_thinking = false %}\n",
}


@dataclass(frozen=True, kw_only=True)
class Template(PromptFormat):
    """A chat template, the Jinja text ``source``.

    It sees messages, bos_token, eos_token, add_generation_prompt and raise_exception.

    Raises UserError for what is no Jinja.
    """

    source: str

    name = "jinja"

    def __post_init__(self) -> None:
        """Raises UserError for what is no Jinja."""
        try:
            _ = self._compiled
        except ValueError as error:
            raise self.wrong("template", error) from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return jinja.compile_template(self._dated)

    @cached_property
    def _dated(self) -> str:
        """The template, with `DATE` for the clock if it can't do without: else each day would ask in other words."""
        undated = jinja.compile_template(self.source)
        asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
        for messages in (asked[1:], asked) if _CLOCK.search(self.source) else ():
            try:
                jinja.render(undated, messages, *self.spelled[:2], True)
            except jinja.ClockError:
                return _CLOCK.sub(lambda call: f'"{DATE.strftime(call["format"])}"', self.source)
            except ValueError:  # which is said where it is tried
                pass
        return self.source

    @cached_property
    def _closing(self) -> str:
        """The text that closes a prompt's open thoughts, if the template writes answers without them; else empty."""
        marks = ["", _mark(1), _mark(2)]
        try:
            prompt, whole = self._as_written(marks[:2], True), self._as_written(marks, False)
        except ValueError:  # which is said where it is tried
            return ""
        opened = _OPENED.search(prompt)
        if opened is None or (whole.startswith(prompt) and whole[len(prompt) :].lstrip().startswith(marks[2])):
            return ""
        return f"{'' if opened[0].endswith(chr(10)) else chr(10)}\n</{opened['name']}>\n\n"

    @cached_property
    def _built_in_as(self) -> str:
        """The template's name if it is built in; else empty."""
        return next((name for name, source in built_in().items() if source == self.source), "")

    @cached_property
    def specials(self) -> list[str]:
        """All special tokens, the longest first; where the template writes one, that becomes its id."""
        return sorted({*self.spelled.all, *self.spelled.ends}, key=lambda token: (-len(token), token))

    @cached_property
    def _token(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(map(re.escape, self.specials))})")

    @cached_property
    def _known(self) -> dict[tuple[int, bool], list[Piece] | ValueError]:
        """Results of `_cut`, or its error, by number of rounds and whether there is a system text."""
        return {}

    def _written(self, conversation: Conversation) -> list[Piece]:
        """The pieces as the template writes them, without white space around turns and the system text.

        An answer runs from the end of its prompt to `end_of_turn`.

        Raises ValueError when the template changes or loses what is said or an answer's end, or writes another
        prompt than the one that training had.
        """
        said = [(conversation.system or "").strip(), *(turn.content.strip() for turn in conversation.turns)]
        return self._fill(said)

    @cached_property
    def tags(self) -> list[str]:
        """The texts that the template puts around what is said; none as long as the tokenizer is not known.

        A bare word behind a special token, such as the role in ``<|im_start|>user``, is none: without that token, which
        no text from outside can become, it opens nothing, and it stands in many a text.
        """
        own: list[str] = []
        for with_system in (False, True) if self.tokens else ():
            try:
                pieces = self._structure(3, with_system)
            except ValueError:  # such a conversation is refused as a whole
                continue
            for before, piece in zip(["", *(piece.kind for piece in pieces)], pieces, strict=False):
                first, *others = (text.strip() for text in _MARK.split(piece.text)[::2])
                is_role = before == "token" and first.isalpha()
                own += [] if piece.kind == "token" else others if is_role else [first, *others]
        return list(dict.fromkeys(text for text in own if len(text) >= SHORTEST_TAG))

    @property
    def own_marks(self) -> list[str]:
        """The special tokens that it writes, and what it closes a turn with: written out by hand, those are no text."""
        found = [*self.spelled.ends, *(token for token in self.specials if token in self.source)]
        try:
            pieces = self._structure(2, False)
        except ValueError:
            pieces = []
        found += (closing["closing"] for piece in pieces for closing in _CLOSING.finditer(piece.text))
        return [mark for mark in dict.fromkeys(found) if len(mark) >= SHORTEST_TAG]

    @property
    def end_of_turn(self) -> str:
        """EOS, or another special token that the template writes right behind an answer."""
        return next(piece.text for piece in self._structure(1, False) if piece.is_answer and piece.kind == "token")

    def writes(self, token: str) -> bool:
        """True if it is BOS, EOS, or stands in the template."""
        return super().writes(token) or token in self.source

    def check(self) -> None:
        """Try the template on conversations of all kinds; with a system text only where there is one.

        Raises UserError where `pieces` would raise ValueError.
        """
        try:
            self._try()
        except ValueError as error:
            if not self._built_in_as:
                raise self.wrong("template", error) from error
            problem = f"{self._built_in_as} ends answers in a special token that the base's tokenizer does not have"
            remedy = f"take another: {', '.join(name for name in names() if name != self._built_in_as)}"
            raise UserError(problem, option="data.template", place=self.place, remedy=remedy) from error
        self.check_system()

    def _try(self) -> None:
        probes = (
            "Hello",
            "漢字 und Größe 🙂",
            f"{self.spelled.eos}{self.spelled.bos}[INST] <|x|> {{{{ x }}}} \\n &amp; '\"",
            "a\n\n  b\tc" * 99,
        )
        system = (self.system or "").strip()
        systems = ["", system, probes[2]] if system else [""]
        for probe, rounds, text in product(probes, (1, 3), systems):
            for num_turns in (2 * rounds, 2 * rounds - 1):
                try:
                    self._fill([text, *[probe] * num_turns])
                except jinja.RefusalError:
                    if probes[2] not in (probe, text):  # what could forge a turn, a template may well refuse
                        raise

    @property
    def title(self) -> str:
        """The option or the record that it came from."""
        return f"{self.place}: template" if self.place else "data.template"

    @property
    def version(self) -> str:
        """The beginning of the template's sha256."""
        return f"sha256 {_sha256(self.source)[:12]}"

    @property
    def identity(self) -> str:
        """The format's name, and the sha256 of the template."""
        return f"{self.name} {_sha256(self.source)}"

    @property
    def cache_key(self) -> tuple[Any, ...]:
        """The template, and the rules by which it is cut."""
        return (RULES, self.source)

    def described(self, file: str) -> str:
        """The description, with the file that holds the template."""
        return f"a format of its own: the Jinja template in `{file}`"

    @property
    def assumption(self) -> str:
        """The words for a template that came with the adapter's tokenizer."""
        return "its tokenizer's chat template is used"

    def notes(self, of_base: str | None = None) -> list[str]:
        """Lines on which template it is, and what it does without."""
        lines = [f"prompts by {' '.join(filter(None, (self.title, self._built_in_as)))} ({self.version})"]
        if self.spelled.bos and self._structure(1, False)[0].text != self.spelled.bos:
            lines.append(f"{self.title} writes no BOS, with which this base's texts begin; {{{{ bos_token }}}} would")
        try:
            self._structure(1, True)
        except ValueError as error:
            lines.append(f"{self.title} can't write a system text: {error}")
        if self._dated != self.source:
            lines.append(f"{self.title} asks for today's date, which is always {DATE:%d %B %Y} here, as it was learned")
        if self._closing:
            lines.append(
                f"{self.title} opens thoughts before an answer: they are closed at once, in training and in chat, for "
                "answers are learned without"
            )
        if self._last_only[False]:
            lines.append(
                f"{self.title} writes an answer otherwise once others follow it, as where thoughts stand before the "
                "last one alone: only the last answer of each conversation is learned"
            )
        return lines

    def learns_last_only(self, conversation: Conversation) -> bool:
        """True if the template writes an answer otherwise once others follow: earlier ones are not what chat asks."""
        return self._last_only[bool((self.completed(conversation).system or "").strip())]

    @cached_property
    def _last_only(self) -> tuple[bool, bool]:
        """True if, of two rounds, only the second prompt begins the whole text; without and with a system text."""
        found = []
        for system in ("", _mark(0)):
            marks = [system, *map(_mark, range(1, 5))]
            try:
                whole = self._render(marks, False)
                first, last = (whole.startswith(self._render(marks[:turn], True)) for turn in (2, 4))
            except ValueError:
                first = last = False
            found.append(last and not first)
        return found[0], found[1]

    def left_out(self, where: str, why: Exception) -> str:
        """The message with the first such row, since there are many reasons."""
        return f"rows left out: {self.title} can't hold them, such as {where}: {why}"

    def record(self) -> dict[str, str]:
        """All of the template, so that no other can be taken by mistake."""
        named, *rest = super().record().items()
        return dict([named, ("template", self.source), ("template_sha256", _sha256(self.source)), *rest])

    @classmethod
    def from_record(cls, record: Mapping[str, Any], place: str) -> Self:
        """Raises UserError unless the template in a record is the one that was recorded."""
        source, expected = record.get("template"), record.get("template_sha256")
        if source is None or expected is None:
            raise UserError("its prompt format is a Jinja template, and there is none", place=place)
        if _sha256(source) != expected:
            raise UserError(
                f"its prompt template was altered: expected sha256 {expected[:12]}, found {_sha256(source)[:12]}",
                place=place,
                remedy="take an adapter that is as it was saved",
            )
        return cls(source=source, system=record.get("system"), place=place)

    def chat_template(self) -> str:
        """The template behind a guard, so that the prompts are training's whatever messages it is given.

        White space around a message goes, and one that holds a special token or a text of the template's own is
        refused.
        """
        forbidden = json.dumps([*self.tags, *self.specials], ensure_ascii=False)
        default = json.dumps((self.system or "").strip(), ensure_ascii=False)
        opening = _OPENING.replace("FORBIDDEN", forbidden).replace("DEFAULT_SYSTEM", default)
        given = "".join(given for name, given in _GIVEN.items() if name in self._dated)
        if not self._closing:
            return opening + given + self._dated
        close = f"{{% if add_generation_prompt %}}{{{{ {json.dumps(self._closing)} }}}}{{% endif %}}"
        return opening + given + self._dated.removesuffix("\n") + close  # Jinja drops a last line's end

    @property
    def tokenizer_remedy(self) -> str:
        """The remedy of every format, and one for templates."""
        return f"{super().tokenizer_remedy}, or end the prompts of {self.title} in a line's end"

    def go_template(self) -> str:
        """The Go template. Raises ValueError unless the text around what is said is the same from turn to turn."""
        head, *turns = self._around(False)
        prompts, ends = turns[0::2], turns[1:-1:2]
        try:
            opening, after, *turns_then = self._around(True)
        except ValueError:  # it takes no system text
            opening, after, turns_then = None, "", turns
        if (
            len({*prompts}) > 1
            or len({*ends}) > 1
            or turns_then != turns
            or "{{" in "".join([opening or "", after, head, *turns])
        ):
            raise ValueError("its prompts differ from turn to turn, or hold {{, which Ollama's templates can't have")
        (prompt, lead), (end, following) = (text.split(_EDGE) for text in (prompts[0], ends[0]))
        first = f"{{{{ if .System }}}}{opening}{{{{ .System }}}}{after}{{{{ else }}}}{head}{{{{ end }}}}"
        first = head if opening is None else first
        asked = f"{{{{ if $later }}}}{following}{{{{ end }}}}{{{{ $later = true }}}}{{{{ .Content }}}}{prompt}"
        answered = f'{{{{ else if eq .Role "assistant" }}}}{lead}{{{{ .Content }}}}{end}{{{{ end }}}}'
        turn = f'{{{{ if eq .Role "user" }}}}{asked}{answered}'
        return f"{{{{ $later := false }}}}{first}{{{{ range .Messages }}}}{turn}{{{{ end }}}}"

    def _around(self, has_system: bool) -> list[str]:
        """The text before, between and behind what is said in three rounds, with `_EDGE` at answers' edges."""
        written, was_answer = "", False
        for piece in self._structure(3, has_system):
            written += _EDGE * (piece.is_answer != was_answer) + piece.text
            was_answer = piece.is_answer
        return _MARK.split(written.removeprefix(self.spelled.bos))[::2]

    def _fill(self, said: Sequence[str]) -> list[Piece]:
        """The pieces of a conversation of a system text, which may be empty, and of turns."""
        num_turns = len(said) - 1
        is_open, has_system = num_turns % 2 == 1, bool(said[0])
        marked = self._structure((num_turns + 1) // 2, has_system)
        end = max(index for index, piece in enumerate(marked) if piece.is_answer) + 1
        if is_open:
            while marked[end - 1].is_answer:
                end -= 1
            marked = marked[:end]
        pieces = [piece._replace(text=_MARK.sub(lambda mark: said[int(mark[1])], piece.text)) for piece in marked]
        expected, came = "".join(piece.text for piece in pieces), self._render(said, is_open)
        if came != expected:
            raise ValueError(
                f"it changes messages, or depends on their text: {_difference(expected, came)}; write each message's "
                "content as it is (| trim does no harm)"
            )
        return pieces[:end]  # text after the last answer is not learned

    def _structure(self, rounds: int, has_system: bool) -> list[Piece]:
        """The pieces of a conversation of ``rounds`` questions and answers, with marks for what is said."""
        shape = (rounds, has_system)
        if shape not in self._known:
            try:
                self._known[shape] = self._cut(rounds, has_system)
            except ValueError as error:
                where = f"with a conversation of {2 * rounds} turns{' and a system text' if has_system else ''}"
                self._known[shape] = ValueError(f"{where}: {error}")
        known = self._known[shape]
        if isinstance(known, ValueError):
            raise known
        return known

    def _cut(self, rounds: int, has_system: bool) -> list[Piece]:
        marks = [*map(_mark, range(2 * rounds + 1))]
        if has_system and self._alone("system") == self._alone("assistant"):
            problem = "the system text is written just as an answer is, and nobody asked"
            raise ValueError(f"{problem}; give the role system a branch of its own")
        if not has_system:
            marks[0] = ""
        whole = self._render(marks, False)
        found = [int(mark) for mark in _MARK.findall(whole)]
        for index in range(0 if has_system else 1, len(marks)):
            if found.count(index) != 1:
                problem = f"{turn_name(index)} is to be written once, and is written {found.count(index)} times"
                raise ValueError(f"{problem}; write the content of each message")
        if found != sorted(found):
            raise ValueError(f"the turns are written in another order: {', '.join(map(turn_name, found))}")
        pieces, before = list[Piece](), 0
        for turn in range(2, 2 * rounds + 1, 2):
            is_context = turn < 2 * rounds and self._last_only[has_system]
            start, end = self._answer(whole, marks, turn, is_context)
            for text, is_answer in ((whole[before:start], False), (whole[start:end], True)):
                pieces += self._split(text, is_answer, bool(pieces) and pieces[-1].kind != "token")
            before = end
        ends = {piece.text for piece in pieces if piece.is_answer and piece.kind == "token"}
        if len(ends) > 1:
            raise ValueError(f"answers end in {' and in '.join(sorted(ends))}; write the same behind each of them")
        return pieces + self._split(whole[before:], False, False)

    def _answer(self, whole: str, marks: Sequence[str], turn: int, is_context: bool) -> tuple[int, int]:
        """Where in ``whole`` the answer that is ``turn`` begins and ends, the special token behind it counted in.

        One that ``is_context`` for the last is not learned, so that no prompt need lead to it.
        """
        prompt = whole[: whole.index(marks[turn])].rstrip(" ") if is_context else self._render(marks[:turn], True)
        if not whole.startswith(prompt):
            raise ValueError(
                f"the prompt for turn {turn}, with add_generation_prompt, is to be the beginning of what is trained: "
                f"{_difference(whole, prompt)}; write nothing that depends on later messages"
            )
        start = len(prompt)
        lead, mark, rest = whole[start:].partition(marks[turn])
        if lead.strip():
            raise ValueError(
                f"the prompt for turn {turn} is to go up to the answer, and lacks {_readable(lead)}; write that where "
                "add_generation_prompt is set, too"
            )
        if not prompt or prompt[-1] in " \t":
            raise ValueError(
                f"the prompt for turn {turn} is to end in no space, for a word's token brings its own, and ends in "
                f"{_readable(prompt, at_end=True)}; write the space before the assistant's content instead"
            )
        end = self._token.search(rest)
        if end is None or end[0] == self.spelled.bos != self.spelled.eos:
            raise ValueError(
                f"the answer that is turn {turn} is to end in EOS, or the model never learns to stop: after it comes "
                f"{_readable(rest)}; write {{{{ eos_token }}}} right after the assistant's content"
            )
        if (tail := rest[: end.start()]).strip():
            raise ValueError(
                f"between the answer that is turn {turn} and its EOS may stand nothing, for it would be shown as part "
                f"of each answer, and {_readable(tail)} does; write {{{{ eos_token }}}} in its place"
            )
        return start, start + len(lead) + len(mark) + end.end()

    def _split(self, text: str, is_answer: bool, continues: bool) -> list[Piece]:
        pieces = []
        for index, part in enumerate(self._token.split(text)):
            if part:
                kind: Literal["stretch", "rest"] = "rest" if continues and not index else "stretch"
                pieces.append(Piece(part, is_answer, "token" if index % 2 else kind))
        return pieces

    def _alone(self, role: str) -> str:
        """A conversation of a single mark by ``role``; the role's name where the template takes none such."""
        try:
            return jinja.render(self._compiled, [{"role": role, "content": _mark(0)}], *self.spelled[:2], False)
        except ValueError:
            return role

    def _render(self, said: Sequence[str], add_generation_prompt: bool) -> str:
        """The text of a conversation of a system text, which may be empty, and of turns.

        Thoughts that a prompt opens are closed, and its last answer stands behind them.
        """
        text = self._as_written(said, add_generation_prompt)
        if not self._closing or (not add_generation_prompt and len(said) % 2 == 0):
            return text
        if add_generation_prompt:
            return text + self._closing
        prompt = self._as_written(said[:-1], True)
        before = _OPENED.sub("", prompt)
        if text.startswith(prompt + self._closing) or not text.startswith(before):
            return text
        return prompt + self._closing + text[len(before) :]

    def _as_written(self, said: Sequence[str], add_generation_prompt: bool) -> str:
        """The text of `_render`, as the template writes it."""
        roles = ("system", *(("assistant", "user")[number % 2] for number in range(1, len(said))))
        messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True) if text]
        return jinja.render(self._compiled, messages, *self.spelled[:2], add_generation_prompt)


def _sha256(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


def _mark(turn: int) -> str:
    """The mark for a turn's text by its number; 0 is the system text."""
    return f"\ue000{turn}\ue001"


def _readable(text: str, at_end: bool = False) -> str:
    readable = _MARK.sub(lambda mark: f"({turn_name(int(mark[1]))})", text)
    if len(readable) <= LONGEST_PART:
        return repr(readable)
    return repr("…" + readable[-LONGEST_PART:] if at_end else readable[:LONGEST_PART] + "…")


def _difference(expected: str, came: str) -> str:
    """The places where two texts part, a few characters of each."""
    start = max(0, first_difference(expected, came) - LONGEST_PART // 3)
    return f"expected {_readable(expected[start:])}, got {_readable(came[start:])}"
