"""The search: what costs nothing before what changes the result, the least of each, and only what fits."""

from dataclasses import replace

import pytest

from lit_qlora.data.batching import BatchPlan
from lit_qlora.forecast.advice import Settings, changes, quickest, smallest_change
from lit_qlora.forecast.cards import DEFAULT, find_card
from lit_qlora.forecast.foresee import Largest, guanaco_lengths
from lit_qlora.forecast.memory import GIB, RESERVE
from lit_qlora.model.load import Lora
from lit_qlora.model.shape import LLAMA_2, Shape


def seven(size="7b", **changed):
    lora = Lora(changed.pop("rank", 16), 16, 0.0, "all-linear", False, False)
    card = find_card(changed.pop("card", "t4"))
    card = replace(card, memory_gib=changed.pop("gib", card.memory_gib))
    settings = Settings(
        Shape.of(LLAMA_2[size]), card, "16-mixed", tuple(guanaco_lengths(400)), 0.86, 256, lora, "adamw",
        "full", BatchPlan(rows=4), 1024, 4, 0, 128, 42,
    )  # fmt: skip
    return replace(settings, **changed)


def test_lengths_are_cut_for_the_micro_batches():
    epoch, largest = seven().epoch()
    assert largest == Largest(4 * 1024, 4 * 1024, 29)
    assert epoch.tokens == sum(min(length, 1024) for length in seven().lengths)
    assert epoch.num_micro_batches == 100


def test_what_fits_is_left_alone():
    assert seven().fits()
    assert not seven(gib=5).fits()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"checkpointing": "none"}, "--model.checkpointing auto"),
        ({"checkpointing": "selective"}, "--model.checkpointing auto"),
        ({"gib": 8, "plan": BatchPlan(rows=8)}, "--data.batch_size 4 --trainer.accumulate_grad_batches 8"),
        ({"gib": 7.8, "plan": BatchPlan(tokens=8192)}, "--data.batch_tokens 4096 --trainer.accumulate_grad_batches 8"),
        ({"gib": 7.5, "num_samples": 8, "new_tokens": 512, "plan": BatchPlan(rows=1)}, "--samples.count 2"),
        ({"gib": 10.3, "rank": 128, "plan": BatchPlan(rows=1)}, "--model.optimizer paged_adamw_8bit"),
        ({"gib": 8, "card": "h100", "cuda_graphs": True, "num_samples": 8}, "--model.cuda_graphs false"),
        # 8-bit state that stays on the card takes more than a paged one in 32 bits.
        ({"gib": 9, "optimizer": "paged_adamw", "rank": 256, "max_length": 256}, "--model.rank 96"),
    ],
)
def test_one_option_where_one_will_do(settings, expected):
    before = seven(**settings)
    assert not before.fits()
    words, after = smallest_change(before)
    assert words == expected
    assert after.fits()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"gib": 9.1, "checkpointing": "none", "rank": 64},
         "--model.checkpointing auto --data.batch_size 1 --trainer.accumulate_grad_batches 16"),
        ({"gib": 11.1, "max_length": 4096, "rank": 64}, "--data.batch_size 1 --trainer.accumulate_grad_batches 16"),
        ({"gib": 11.1, "plan": BatchPlan(tokens=16384)},
         "--data.batch_tokens 8192 --trainer.accumulate_grad_batches 8"),
        ({"size": "13b", "gib": 16.2, "rank": 64, "num_samples": 8},
         "--data.batch_size 2 --trainer.accumulate_grad_batches 8 --samples.count 4"),
        ({"size": "13b", "card": "l4", "rank": 64, "max_length": 4096},
         "--data.batch_size 2 --trainer.accumulate_grad_batches 8"),
        ({"size": "70b", "card": "a100-80", "rank": 80, "max_length": 4096},
         "--data.batch_size 2 --trainer.accumulate_grad_batches 8"),
    ],
)  # fmt: skip
def test_what_costs_nothing_is_enough(settings, expected):
    words, after = smallest_change(seven(**settings))
    assert words == expected
    assert after.fits()


def test_a_rank_is_lowered_only_as_far_as_it_must_and_before_rows_are_cut():
    words, after = smallest_change(seven("13b", gib=11.1, rank=64, num_samples=8))
    assert words == (
        "--data.batch_size 1 --trainer.accumulate_grad_batches 16 --samples.count 2 "
        "--model.optimizer paged_adamw_8bit --model.rank 32"
    )
    assert after.max_length == 1024 and after.fits()


def test_rows_are_cut_last_and_as_little_as_will_do():
    words, after = smallest_change(seven("13b", gib=11.1, max_length=4096))
    assert words.endswith("--model.rank 4 --data.max_length 2752")
    assert after.fits() and not replace(after, max_length=2752 + 64).fits(1 - RESERVE)


def test_a_70b_is_too_large_for_a_t4():
    assert smallest_change(seven("70b")) is None


def test_a_smaller_batch_may_take_more():
    # The steps of several micro-batches have a second set of gradients, and a rank of 256 makes it large.
    before = seven(gib=10, rank=256, accumulate=1, optimizer="paged_adamw_8bit", max_length=256)
    smaller = replace(before, plan=BatchPlan(rows=1), accumulate=4)
    assert smaller.peak().on_card > before.peak().on_card + 2 * GIB
    assert smallest_change(before)[0] == "--model.rank 128"


def test_the_reserve_is_left_free_where_it_can_be():
    _, after = smallest_change(seven(gib=6.9))
    assert after.fits(1 - RESERVE)
    _, after = smallest_change(seven(gib=5))
    assert after.fits() and not after.fits(1 - RESERVE)


def test_where_nothing_fits():
    assert smallest_change(seven(gib=3.5)) is None


def test_every_change_takes_less_or_as_much():
    before = seven(num_samples=8, checkpointing="none", rank=64, cuda_graphs=True)
    for kind in changes(before):
        assert kind
        sizes = [changed.peak().on_card for _, changed in kind]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] <= before.peak().on_card


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


def test_kernels_are_left_unrecorded_where_that_is_quicker():
    many = tuple(guanaco_lengths(400)) * 20
    before = seven(card="h100", gib=28, plan=BatchPlan(rows=16), cuda_graphs=True, lengths=many, checkpointing="auto")
    words, after = quickest(before)
    assert words == (
        "--data.batch_tokens 6144 --trainer.accumulate_grad_batches 5 --model.checkpointing none "
        "--model.cuda_graphs false"
    )
    assert after.hours() < before.hours()


def test_a_card_that_waits_for_its_host_goes_on_with_recorded_kernels():
    many = tuple(guanaco_lengths(400)) * 20
    before = seven(card="h100", gib=12, plan=BatchPlan(rows=1), cuda_graphs=True, lengths=many, max_length=256)
    words, after = quickest(before) or ("", before)
    assert after.cuda_graphs is True, words


def test_transformers_own_layers_keep_none_by_auto_and_have_no_quickest():
    dora = Lora(16, 16, 0.0, "all-linear", False, True)
    for slow in (seven(checkpointing="auto", own_layers=False), seven(checkpointing="auto", lora=dora)):
        assert slow.step().kept_layers == 0
        assert quickest(slow) is None
    assert seven(checkpointing="none", own_layers=False).step().kept_layers == 32


@pytest.mark.parametrize(
    ("limit", "num_micro_batches", "num_rows"), [(1.0, 100, 400), (1, 1, 4), (10, 10, 40), (0.25, 25, 100)]
)
def test_an_epoch_may_be_cut_short(limit, num_micro_batches, num_rows):
    whole, cut = seven(), seven(limit=limit)
    epoch, largest = cut.epoch()
    assert (epoch.num_micro_batches, cut.num_rows()) == (num_micro_batches, num_rows)
    assert largest.tokens == whole.epoch()[1].tokens
    assert epoch.tokens <= num_rows * 1024 and cut.hours() <= whole.hours()
