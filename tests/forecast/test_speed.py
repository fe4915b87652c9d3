"""The forecast of time: the published model's figures again, and what each setting does to it."""

from dataclasses import replace

import pytest

from lit_qlora.forecast.cards import DEFAULT, Card, find_card
from lit_qlora.forecast.memory import Step
from lit_qlora.forecast.speed import Epoch, epoch_hours
from lit_qlora.model.shape import LLAMA_2_SIZES, Shape

STEP = Step(Shape.of(LLAMA_2_SIZES["7b"]), tokens=2048, scored_tokens=2048)
EPOCH = Epoch(tokens=2_048_000, padded_tokens=2_048_000, num_micro_batches=1000, row_tokens=900)


def tokens_per_second(step=STEP, card=DEFAULT, epoch=EPOCH):
    return epoch.tokens / epoch_hours(step, epoch, card) / 3600


def test_a_t4_by_hand():
    # 37.9 GFLOP at 24 TFLOP/s, 57.3 MB at 250 GB/s per token, and 32.6 GB and 32 x 0.7 ms per micro-batch of 2,048
    each = (32.6e9 / 250e9 + 0.0224) / 2048
    assert tokens_per_second() == pytest.approx(1 / (37.87e9 / 24e12 + 57.3e6 / 250e9 + each), rel=0.002)
    kept = replace(STEP, kept_layers=32)  # 27.5 GFLOP, 41.0 MB
    assert tokens_per_second(kept) == pytest.approx(1 / (27.49e9 / 24e12 + 41.0e6 / 250e9 + each), rel=0.002)


def test_what_is_kept_is_not_computed_again():
    full, half, kept = (tokens_per_second(replace(STEP, kept_layers=kept)) for kept in (0, 16, 32))
    assert full < half < kept


def test_small_micro_batches_are_slow():
    many = replace(EPOCH, num_micro_batches=8000)
    assert tokens_per_second(epoch=many) / tokens_per_second() == pytest.approx(0.783, abs=0.002)


def test_larger_micro_batches_gain_on_a_large_card_what_was_measured():
    """Micro-batches are of 1,024 to 8,192 tokens; the rates alone are those of a card that nothing delays."""
    found = []
    for tokens in (1024, 2048, 4096, 8192):
        step = replace(STEP, tokens=tokens, scored_tokens=tokens)
        found.append(tokens_per_second(step, find_card("h100"), Epoch(tokens, tokens, 1, 1024)))
    measured = [6445, 7675, 8325, 8802]  # docs/memory-and-speed.md
    assert [one / found[-1] for one in found] == pytest.approx([one / 8802 for one in measured], rel=0.02)


def test_padding_is_paid_for():
    assert epoch_hours(STEP, replace(EPOCH, padded_tokens=4_096_000), DEFAULT) > 1.9 * epoch_hours(STEP, EPOCH, DEFAULT)


def test_nothing_is_said_of_unknown_rates_or_of_fp32():
    assert epoch_hours(STEP, EPOCH, Card("another", 16, (8, 0))) is None
    assert epoch_hours(replace(STEP, element=4), EPOCH, DEFAULT) is None
