"""Owns the encoding of a conversation to token ids, and the only decision about what is learned.

Training, validation, samples and answering all build their ids here, so prompts cannot differ, and read answers' ids
here. BOS and EOS are inserted as ids; outside text can never become one. Knows nothing of batches, models or files.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from lit_qlora.batch import IGNORE_INDEX
from lit_qlora.data.tokenizer import special_tokens, stop_ids, tokenizer_rules
from lit_qlora.errors import UserError, excerpt
from lit_qlora.text.conversation import Conversation
from lit_qlora.text.formats import Piece, PromptFormat, SpecialTokens, make_format

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"
"""U+2581, sentencepiece's space; a text may hold it, too."""

T = TypeVar("T")

TrainOn = Literal["answers", "all"]

UNFINISHED = "\ufffd"
"""What a decoder shows for bytes that are no character yet."""

CONVERSATIONS_PER_CALL = 512
"""Number of conversations per call of the tokenizer, which processes a list on all cores."""


class Example(NamedTuple):
    """Ids and labels of one conversation, of one length; see `lit_qlora.batch`.

    Args:
        input_ids: ids of the tokens, BOS first where there is one.
        labels: the same ids where a token is learned, else `IGNORE_INDEX`.
        was_cut: True if the conversation is longer than this.
    """

    input_ids: list[int]
    labels: list[int]
    was_cut: bool


class Written(NamedTuple):
    """A piece of a conversation, its ids, and whether its turn may be learned.

    Args:
        piece: its text, and whether it is an answer's.
        ids: its token ids.
        learned: True if the loss may count its turn.
    """

    piece: Piece
    ids: list[int]
    learned: bool


def is_text(written: Sequence[Written]) -> bool:
    """True if ``written`` is a plain text, which has no prompt."""
    return all(one.piece.is_answer or one.piece.kind == "token" for one in written)


def joined_rows(rows: Sequence[Sequence[T]]) -> list[T]:
    """The ``rows`` of one conversation joined, without the token that each further row repeats."""
    return [value for number, row in enumerate(rows) for value in (row[1:] if number else row)]


class Encoder:
    """Encode conversations with one tokenizer.

    Args:
        tokenizer: a fast tokenizer with an EOS; not every one has a BOS.
        max_length: most tokens of one example.
        train_on: ``answers`` learns the answers and their EOS; ``all`` learns the prompts too.
        prompt_format: how conversations are written; default: the Llama 2 format.

    Raises UserError if the format would lose text, an answer's EOS or its mask; see `PromptFormat.check`.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        train_on: TrainOn = "answers",
        prompt_format: PromptFormat | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id  # None: texts begin without one, as Qwen's do
        self.eos_id = int(tokenizer.eos_token_id)
        self.max_length = max_length
        self.train_on = train_on
        special = special_tokens(tokenizer).values()
        tokens = SpecialTokens(tokenizer.bos_token or "", str(tokenizer.eos_token), tuple(special))
        self.prompt_format = (prompt_format or make_format()).of(tokens)
        self.prompt_format.check()

    @cached_property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer: the one that is learned after each, EOS, and others that the base's files name.

        Raises UserError where those can't be read.
        """
        learned: Any = self.tokenizer.convert_tokens_to_ids(self.prompt_format.end_of_turn)
        return [*dict.fromkeys([int(learned), self.eos_id, *stop_ids(self.tokenizer)])]

    def check_vocabulary(self, size: int, base: str) -> None:
        """Check that a base has an embedding for each id that a text may become.

        A special token that no prompt has is allowed beyond: copies of Llama 2 have such a pad.

        Args:
            size: embeddings of the base, its ``vocab_size``.
            base: its name, for messages.

        Raises:
            UserError: an id is ``size`` or more.
        """
        prompt_format = self.prompt_format
        unused = {token for token in prompt_format.spelled.all if not prompt_format.writes(token)}
        highest = max(number for token, number in self.tokenizer.get_vocab().items() if token not in unused)
        if highest >= size:
            ids = f"the tokenizer of {excerpt(base)} has ids up to {highest:,}"
            remedy = "take another copy, whose tokenizer and weights belong together"
            raise UserError(f"{ids}, and its config.json a vocab_size of {size:,}", option="model.base", remedy=remedy)

    @cached_property
    def begins_with_bos(self) -> bool:
        """True if the base's tokenizer puts a BOS before a plain text, as Yi's and SmolLM2's don't."""
        return self.bos_id is not None and self.tokenizer("x")["input_ids"][:1] == [self.bos_id]

    def fingerprint(self) -> str:
        """A sha256 over everything that decides the ids: tokenizer, length, labels, system text, prompt format."""
        format_key = (self.prompt_format.system, *self.prompt_format.cache_key)
        settings = (self.rules_fingerprint(), self.max_length, self.train_on, *format_key)
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def rules_fingerprint(self) -> str:
        """A sha256 over the tokenizer alone: whatever folder it came from, the same text gives the same ids."""
        rules = tokenizer_rules(self.tokenizer)
        for switch in ("padding", "truncation"):  # set and reset by calls; here, neither is ever used
            rules.pop(switch, None)
        settings = (json.dumps(rules, sort_keys=True), self.bos_id, self.eos_id)
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def rows(self, written: Sequence[Written]) -> list[Example]:
        """The rows of a conversation, ``written`` in pieces: one, or none; of a plain text, as many as it takes.

        A text that is longer than `max_length` is divided at tokens. Each further row begins with the last token of
        the one before it, which predicts the next, so that every token is learned once; see `joined_rows`.
        """
        example = self.example(written)
        if example is None:
            return []
        if not (example.was_cut and is_text(written)):
            return [example]
        ids, step = [token for one in written for token in one.ids], self.max_length - 1
        further = [ids[start : start + self.max_length] for start in range(step, len(ids) - 1, step)]
        return [example._replace(was_cut=False), *(Example(some, some, was_cut=False) for some in further)]

    def examples(self, conversations: Iterable[Conversation]) -> Iterator[Example | None]:
        """An `Example` for each conversation in order, or None if no answer token would be left.

        Args:
            conversations: answered ones; of a plain text, as much as one row takes.
        """
        return map(self.example, self.written(conversations))

    def written(self, conversations: Iterable[Conversation]) -> Iterator[list[Written]]:
        """Yield all pieces of each conversation, in order, before any cut.

        Args:
            conversations: any number of them; some hundred are encoded in one call.
        """
        remaining = iter(conversations)
        while some := list(islice(remaining, CONVERSATIONS_PER_CALL)):
            cut = [self.prompt_format.pieces(conversation) for conversation in some]
            ids = iter(self._ids([piece for pieces in cut for piece in pieces]))
            for conversation, pieces in zip(some, cut, strict=True):
                learned = self._may_be_learned(conversation, pieces)
                yield [Written(piece, next(ids), may) for piece, may in zip(pieces, learned, strict=True)]

    def example(self, written: Sequence[Written]) -> Example | None:
        """The ids and labels of a conversation by its ``written`` pieces; None if no answer token would be left."""
        # A cut is between tokens inside a learned answer, else at the end of the turn before it: a question without its
        # answer teaches nothing. Nothing predicts the first token.
        size = end = 0
        for piece, ids, learned in written:
            if piece.is_answer and learned and size < self.max_length:
                end = min(size + len(ids), self.max_length)
            size += len(ids)
        if end <= 1:
            return None
        input_ids, labels = list[int](), list[int]()
        for piece, ids, learned in written:
            input_ids += ids
            if learned and piece.is_answer:
                labels += ids
            elif learned and self.train_on == "all":
                labels += [IGNORE_INDEX if token == self.bos_id else token for token in ids]
            else:
                labels += [IGNORE_INDEX] * len(ids)
        return Example(input_ids[:end], labels[:end], was_cut=end < size)

    def context_only(self, conversations: Sequence[Conversation]) -> tuple[int, str]:
        """Number of answers of ``conversations`` that the format rewrites once others follow, and what they are."""
        rewritten = (one for one in conversations if not one.is_text and self.prompt_format.learns_last_only(one))
        words = "earlier answers as context only: the template writes them otherwise than where it asks for one"
        return sum(turn.learned for one in rewritten for turn in one.turns[1:-1:2]), words

    def _may_be_learned(self, conversation: Conversation, pieces: Sequence[Piece]) -> Iterator[bool]:
        """True for each piece whose turn may be learned. Prompts and answers are the turns in order, one each."""
        if conversation.is_text:
            yield from (True for _ in pieces)
            return
        last = len(conversation.turns) - 1 if self.prompt_format.learns_last_only(conversation) else None
        runs = groupby(pieces, lambda piece: piece.is_answer)
        for (number, turn), (is_answer, run) in zip(enumerate(conversation.turns), runs, strict=True):
            may = turn.learned and not (last is not None and is_answer and number < last)
            yield from (may for _ in run)

    def prompt(self, conversation: Conversation) -> list[int]:
        """The ids of an open prompt: the answer starts right after the last one.

        Args:
            conversation: ends on the user's turn.

        Returns:
            Ids, BOS included where the format has one.

        Raises:
            ValueError: as `PromptFormat.pieces`.
        """
        return [token for ids in self._ids(self.prompt_format.pieces(conversation)) for token in ids]

    def plain(self, text: str) -> list[int]:
        """BOS, if there is one, and the ids of a ``text`` that stands in no chat format."""
        return [*([] if self.bos_id is None else [self.bos_id]), *self._encode([text])[0]]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, without BOS, EOS and the format's outer spaces.

        Args:
            ids: of an answer.
        """
        return self._decode(ids).strip()

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def answer(self, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[str, bool]:
        """The text of an answer's ids, and whether it came to its end.

        Args:
            ids: All of the answer, with the one that ended it.
            stop: Texts that end an answer, and are no part of it.
        """
        tokens = self._special(stop)
        place = next((place for place, token in enumerate(ids) if token in tokens), None)
        text = self._decode(ids[:place])
        if (end := _stop_at(text, stop)) is not None:
            return text[:end].strip(), True
        if place is not None or (ids and ids[-1] in self.stop_ids):
            return text.strip(), True
        return text.strip().rstrip(UNFINISHED).strip(), False

    def certain(self, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
        """The text of an unfinished answer that later ids can't change, nor turn into a text of ``stop``.

        Args:
            ids: of the answer so far.
            stop: texts that end an answer.
        """
        text = self._decode(ids)
        begun = (size for one in stop for size in range(1, len(one)) if text.endswith(one[:size]))
        end = _stop_at(text, stop)
        text = text[: len(text) - max(begun, default=0) if end is None else end].strip()
        return "" if text.endswith(UNFINISHED) else text

    def is_over(self, stop: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
        """The test for one of ``stop`` in an answer's ids, for `lit_qlora.model.generate`; None without ``stop``."""
        if not stop:
            return None
        tokens = self._special(stop)
        return lambda ids: ids[-1] in tokens or _stop_at(self._decode(ids), stop) is not None

    def _special(self, stop: Sequence[str]) -> set[int]:
        """The ids of those of ``stop`` that are special tokens, which no text has."""
        return {token for token, text in special_tokens(self.tokenizer).items() if text in stop}

    def _ids(self, pieces: list[Piece]) -> list[list[int]]:
        """The ids of each piece."""
        stretches, rests = ([one.text for one in pieces if one.kind == kind] for kind in ("stretch", "rest"))
        # By itself, a text's first word gets a space, which behind a line's end no other program would put there.
        without_space = self._without_space.encode_batch(rests, add_special_tokens=False) if rests else []
        found = {"stretch": iter(self._encode(stretches)), "rest": (one.ids for one in without_space)}
        id_of: Any = self.tokenizer.convert_tokens_to_ids
        return [[id_of(piece.text)] if piece.kind == "token" else next(found[piece.kind]) for piece in pieces]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # Such a tokenizer takes a space of the text's own for the one that it puts before a first word.
        if self._takes_space_for_its_own:
            texts = [f"{SPACE}{text}" if text.startswith(SPACE) else text for text in texts]
        # Not by a call of the tokenizer, which makes much beside the ids, and takes twice the time.
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # "</s>" in a text becomes its characters, never the id that ends a turn
        found = backend.encode_batch_fast(texts, add_special_tokens=False)
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return [one.ids for one in found]

    @cached_property
    def _takes_space_for_its_own(self) -> bool:
        """True if the tokenizer drops a `SPACE` that a text begins with, which Meta's code keeps."""
        one, other = self.tokenizer(["x", f"{SPACE}x"], add_special_tokens=False)["input_ids"]
        return bool(one == other)

    @cached_property
    def _without_space(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        rules = tokenizer_rules(self.tokenizer)
        for name in ("normalizer", "pre_tokenizer"):
            rules[name] = _take_out_space(rules[name])
        tokenizer = Tokenizer.from_str(json.dumps(rules | {"padding": None, "truncation": None}))
        tokenizer.encode_special_tokens = True  # the backend's word for split_special_tokens
        return tokenizer


def _take_out_space(rule: dict[str, Any] | None) -> dict[str, Any] | None:
    """A tokenizer's ``rule`` without the part that puts a space before a text's first word."""
    if rule is None or rule["type"] == "Prepend":
        return None
    if rule["type"] == "Metaspace":
        return rule | {"prepend_scheme": "never"}
    if rule["type"] == "Sequence":
        (name,) = (name for name, value in rule.items() if isinstance(value, list))
        return rule | {name: list(filter(None, map(_take_out_space, rule[name])))}
    return rule


def _stop_at(text: str, stop: Sequence[str]) -> int | None:
    """Index in ``text`` where the first of the texts ``stop`` begins; None if it holds none."""
    return min((found for one in stop if (found := text.find(one)) >= 0), default=None)
