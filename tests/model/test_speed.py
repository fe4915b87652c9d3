"""The predicted time: the published model's figures again, and what each setting does to it."""

from dataclasses import replace

import pytest

from lit_qlora.model.cards import DEFAULT, Card, find_card
from lit_qlora.model.memory import Step
from lit_qlora.model.shape import LLAMA_2, Shape
from lit_qlora.model.speed import Epoch, epoch_hours

STEP = Step(Shape.of(LLAMA_2["7b"]), tokens=2048, scored_tokens=2048, row_tokens=900)
EPOCH = Epoch(tokens=2_048_000, padded_tokens=2_048_000, num_micro_batches=1000, row_tokens=900)


def tokens_per_second(step=STEP, card=DEFAULT, epoch=EPOCH):
    return epoch.tokens / epoch_hours(step, epoch, card) / 3600


def test_a_t4_by_hand():
    # 40.8 GFLOP at 24 TFLOP/s, 132 MB at 250 GB/s a token, and 48.9 GB a micro-batch of 2,048
    assert tokens_per_second() == pytest.approx(
        1 / (40.8e9 / 24e12 + 131.6e6 / 250e9 + 48.9e9 / 250e9 / 2048), rel=0.01
    )
    assert tokens_per_second() == pytest.approx(431, rel=0.01)


def test_an_h200():
    assert tokens_per_second(card=find_card("h200")) == pytest.approx(11_400, rel=0.01)


def test_what_is_kept_is_not_computed_again():
    full, half, kept, none = (tokens_per_second(replace(STEP, kept_layers=kept)) for kept in (0, 16, 32, None))
    assert full < half < kept < none
    assert kept / full == pytest.approx(1.334, abs=0.005)


def test_small_micro_batches_are_slow():
    many = replace(EPOCH, num_micro_batches=8000)
    assert tokens_per_second(epoch=many) / tokens_per_second() == pytest.approx(0.77, abs=0.01)


def test_padding_is_paid_for():
    assert epoch_hours(STEP, replace(EPOCH, padded_tokens=4_096_000), DEFAULT) > 1.9 * epoch_hours(STEP, EPOCH, DEFAULT)


def test_nothing_is_said_of_unknown_rates_or_of_fp32():
    assert epoch_hours(STEP, EPOCH, Card("another", 16, (8, 0))) is None
    assert epoch_hours(replace(STEP, element=4), EPOCH, DEFAULT) is None
