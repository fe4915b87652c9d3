"""Owns the rows of a plan: their lengths, counted if rows and tokenizer are local, else assumed.

Downloads nothing. Knows no card.
"""

from typing import Any

from lit_qlora.callbacks.samples import SampleAnswers
from lit_qlora.data.datamodule import ChatDataModule
from lit_qlora.data.sources import sources_of
from lit_qlora.errors import UserError
from lit_qlora.forecast.foresee import Rows, guanaco_lengths
from lit_qlora.forecast.memory import Samples
from lit_qlora.model.base import Base
from lit_qlora.options import LINKED
from lit_qlora.storage.reach import stored_file
from lit_qlora.text.formats import make_format

CHARACTERS_PER_TOKEN, TOKENS_PER_TURN = 3.3, 6
"""Measured on Guanaco's conversations with Llama 2's tokenizer: characters per token, and tokens added by the
format."""
PROMPT_TOKENS = 256
"""Tokens of the longest of eight prompts if unknown: measured there, 153 on average."""
PUBLISHED = {"timdettmers/openassistant-guanaco": 9846, "mlabonne/guanaco-llama2-1k": 950}
"""Training rows of data sets with lengths like Guanaco's."""


def find_rows(trainer: Any, data: ChatDataModule, base: Base, answers: SampleAnswers) -> tuple[Rows, Samples]:
    """Find the training rows and the sample answers of a fit, as far as they are local.

    Args:
        trainer: of that fit.
        data: its rows and tokenizer.
        base: its base.
        answers: the callback that makes its sample answers.

    Raises:
        UserError: for rows, prompts or a tokenizer that fit refuses.
    """
    data.tokenizer_option = LINKED["data.tokenizer"]
    has_tokenizer = _has_tokenizer(data, base)
    if has_tokenizer:
        data.encoder.check_vocabulary(base.shape.vocabulary, base.name)
    rows = _rows(data, has_tokenizer)
    if has_tokenizer:
        answers.setup(trainer, trainer.lightning_module, "fit")
        if answers.prompts or rows.known_by is None:
            return rows, answers.samples(data)
    own = len(answers.prompts or ())
    limit = answers.max_new_tokens
    return rows, Samples(own or answers.count, PROMPT_TOKENS, limit, are_own=own > 0, are_assumed=True)


def _has_tokenizer(data: ChatDataModule, base: Base) -> bool:
    try:
        _ = data.tokenizer
    except UserError:
        if any(stored_file(base.location, name) for name in ("tokenizer.json", "tokenizer.model")):
            raise
        return False
    return True


def _rows(data: ChatDataModule, has_tokenizer: bool) -> Rows:
    reading = data.reading if has_tokenizer else data.reading_for(make_format())
    try:
        train, _ = data.parts(reading).train_and_held_out()
    except UserError:
        sources = sources_of(data.source)
        if not any(source.is_on_hub for source in sources):
            raise
        paths = [source.path for source in sources]
        num_rows = sum(PUBLISHED.get(path, 1000) for path in paths)
        what = f"{num_rows:,} rows" if {*paths} <= {*PUBLISHED} else f"lengths unknown: {num_rows:,} rows"
        return Rows(guanaco_lengths(num_rows), known_by=f"assumed: {what}, their lengths as Guanaco's")
    if not has_tokenizer:
        lengths = tuple(
            TOKENS_PER_TURN * len(conversation.turns)
            + round(sum(len(turn.content) for turn in conversation.turns) / CHARACTERS_PER_TOKEN)
            for conversation in train.conversations
        )
        how = f"estimated from {CHARACTERS_PER_TOKEN} characters per token: the tokenizer is not here"
        return Rows(lengths, known_by=how)
    data.setup("fit")
    return Rows.of(data)
