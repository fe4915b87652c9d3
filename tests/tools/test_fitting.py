"""The search: one option before two, the mild before the strong, and only what fits."""

from dataclasses import replace

import pytest

from lit_qlora.callbacks.outlook import guanaco_lengths
from lit_qlora.data.batching import BatchPlan
from lit_qlora.model.cards import DEFAULT
from lit_qlora.model.load import Lora
from lit_qlora.model.memory import GIB
from lit_qlora.model.shape import LLAMA_2, Shape
from lit_qlora.tools.fitting import Settings, changes, quickest, smallest_change


def seven(**changed):
    lora = Lora(changed.pop("rank", 16), 16, 0.0, "all-linear", False, False)
    card = replace(DEFAULT, memory_gib=changed.pop("gib", DEFAULT.memory_gib))
    settings = Settings(
        Shape.of(LLAMA_2["7b"]), card, "16-mixed", tuple(guanaco_lengths(400)), 0.86, 256, lora, "adamw",
        "full", BatchPlan(rows=4), 1024, 4, 0, 128, 42,
    )  # fmt: skip
    return replace(settings, **changed)


def test_lengths_are_cut_for_the_micro_batches():
    epoch, largest = seven().epoch()
    assert largest == 4 * 1024
    assert epoch.tokens == sum(min(length, 1024) for length in seven().lengths)
    assert epoch.num_micro_batches == 100


def test_what_fits_is_left_alone():
    assert seven().fits()
    assert not seven(gib=5).fits()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"checkpointing": "none"}, "--model.checkpointing auto"),
        ({"gib": 6.6}, "--data.batch_size 2 --trainer.accumulate_grad_batches 8"),
        ({"gib": 6.9, "plan": BatchPlan(tokens=4096)}, "--data.batch_tokens 3072 --trainer.accumulate_grad_batches 8"),
        ({"gib": 6.6, "num_samples": 8, "plan": BatchPlan(rows=1)}, "--samples.count 4"),
        ({"gib": 9.0, "rank": 128, "plan": BatchPlan(rows=1)}, "--model.optimizer adamw_8bit"),
    ],
)
def test_one_option_where_one_will_do(settings, expected):
    before = seven(**settings)
    assert not before.fits()
    words, after = smallest_change(before)
    assert words == expected
    assert after.fits()


def test_two_options_where_one_will_not_do():
    words, after = smallest_change(seven(gib=8.0, checkpointing="none", rank=64))
    assert words == "--model.checkpointing full --data.batch_size 1 --trainer.accumulate_grad_batches 16"
    assert after.fits()


def test_where_nothing_fits():
    assert smallest_change(seven(gib=3.5)) is None


def test_every_change_takes_less_or_as_much():
    before = seven(num_samples=8, checkpointing="none", rank=64)
    for kind in changes(before):
        assert kind
        sizes = [changed.peak().total for _, changed in kind]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] <= before.peak().total


def test_the_quickest_fits_with_room_and_keeps_the_step():
    before = seven()
    words, after = quickest(before)
    assert after.hours() < 0.8 * before.hours()
    assert after.peak().on_card <= 0.875 * DEFAULT.memory_gib * GIB
    step = [s.epoch()[0].padded_tokens / s.epoch()[0].num_micro_batches * s.accumulate for s in (before, after)]
    assert 0.7 < step[1] / step[0] < 1.4
    assert "--data.batch_tokens" in words


def test_the_quickest_is_left_alone():
    _, after = quickest(seven())
    assert quickest(after) is None
