"""Owns the way from a conversation to token ids, and the only decision about what is learned.

Training, validation, samples and answering all build their ids here, so prompts cannot drift apart.
BOS and EOS are put in as ids; text from outside can never make one. Knows nothing of batches, models
or files.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple

from lit_qlora import demo
from lit_qlora.batch import IGNORE_INDEX
from lit_qlora.errors import UserError
from lit_qlora.text import llama2
from lit_qlora.text.conversation import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["answers", "all"]

CONVERSATIONS_A_CALL = 512
"""Conversations for one call of the tokenizer, which works through a list on all cores."""


class Example(NamedTuple):
    """Ids and labels of one conversation, of one length; see `lit_qlora.batch`."""

    input_ids: list[int]
    labels: list[int]
    was_cut: bool


def load_tokenizer(base: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of ``base``, a hub id or a local folder.

    Raises UserError when there is none, when it comes as code, or when it lacks a BOS or an EOS.
    """
    from transformers import AutoTokenizer

    try:
        # Left unsaid, whoever sits at a terminal is asked, and a "y" runs the code.
        tokenizer = AutoTokenizer.from_pretrained(demo.BASE if base == "demo" else base, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model.base: the tokenizer of {base!r} is code of its own, and code that comes with a base is never "
                "run; take a copy with a Llama tokenizer"
            ) from error
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.base: no tokenizer could be loaded from {base!r}: {reason}") from error
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"model.base: the tokenizer of {base!r} has no BOS or no EOS token; a Llama tokenizer has both")
    return tokenizer


class Encoder:
    """Turns conversations into ids with one tokenizer.

    Args:
        tokenizer: a fast Llama tokenizer.
        max_length: tokens that one example may have.
        train_on: ``answers`` learns the answers and their EOS; ``all`` learns the prompts too.
        system: a system text for conversations that bring none.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        train_on: TrainOn = "answers",
        system: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.bos_id = int(tokenizer.bos_token_id)
        self.eos_id = int(tokenizer.eos_token_id)
        self.max_length = max_length
        self.train_on = train_on
        self.system = system

    def fingerprint(self) -> str:
        """A sha256 over all that decides which ids come out: tokenizer, length, labels, system text."""
        settings = (self.rules_fingerprint(), self.max_length, self.train_on, self.system)
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def rules_fingerprint(self) -> str:
        """A sha256 over the tokenizer alone: whatever folder it came from, the same text gives the same ids."""
        rules = json.loads(self.tokenizer._tokenizer.to_str())
        for switch in ("padding", "truncation"):  # set and reset by calls; here, neither is ever used
            rules.pop(switch, None)
        settings = (json.dumps(rules, sort_keys=True), self.bos_id, self.eos_id)
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def examples(self, conversations: Iterable[Conversation]) -> Iterator[Example | None]:
        """An `Example` for each conversation in its order, or None where no answer token would stay."""
        remaining = iter(conversations)
        while some := list(islice(remaining, CONVERSATIONS_A_CALL)):
            segmented = [llama2.segments(self._with_system(conversation)) for conversation in some]
            ids = iter(self._encode([segment.text for segments in segmented for segment in segments]))
            for segments in segmented:
                yield self._example([(next(ids), segment.is_answer) for segment in segments])

    def prompt(self, conversation: Conversation) -> list[int]:
        """The ids of an open prompt: the answer starts right after the last one."""
        segments = llama2.segments(self._with_system(conversation))
        encoded = self._encode([segment.text for segment in segments])
        return self._join([(ids, s.is_answer) for ids, s in zip(encoded, segments, strict=True)])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, without BOS, EOS and the format's outer spaces."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _with_system(self, conversation: Conversation) -> Conversation:
        if self.system is None or conversation.system is not None:
            return conversation
        return Conversation(conversation.turns, self.system)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # split_special_tokens: "</s>" in a text becomes its characters, never the id that ends a turn.
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _join(self, segments: list[tuple[list[int], bool]]) -> tuple[list[int], list[bool]]:
        """Ids with BOS before every prompt and EOS after every answer, and which belong to an answer."""
        input_ids: list[int] = []
        is_answer: list[bool] = []
        for ids, answers in segments:
            whole = [*ids, self.eos_id] if answers else [self.bos_id, *ids]
            input_ids += whole
            is_answer += [answers] * len(whole)
        return input_ids, is_answer

    def _example(self, segments: list[tuple[list[int], bool]]) -> Example | None:
        input_ids, is_answer = self._join(segments)
        # A cut falls on a token's edge inside an answer, else on the edge of the turn before it: a
        # question whose answer fell off teaches nothing. The first token has nothing that predicts it.
        end = min(len(input_ids), self.max_length)
        while end > 1 and not is_answer[end - 1]:
            end -= 1
        if end <= 1:
            return None
        everything = self.train_on == "all"
        labels = [
            token if answer or (everything and token != self.bos_id) else IGNORE_INDEX
            for token, answer in zip(input_ids[:end], is_answer[:end], strict=True)
        ]
        return Example(input_ids[:end], labels, was_cut=end < len(input_ids))
