"""The search: what costs nothing before what changes the result, the least of each, and only what fits."""

import random
from dataclasses import replace

import pytest

from lit_qlora.data.batching import BatchPlan
from lit_qlora.forecast import advice
from lit_qlora.forecast.advice import LADDER, quickest, smallest_change
from lit_qlora.forecast.cards import DEFAULT, find_card
from lit_qlora.forecast.foresee import Forecast, Rows, guanaco_lengths
from lit_qlora.forecast.memory import RESERVE, Samples
from lit_qlora.model.lora import Lora
from lit_qlora.model.optimizer import OPTIMIZERS
from lit_qlora.model.shape import LLAMA_2_SIZES, Shape
from lit_qlora.storage.files import GIB


def seven(size="7b", **changed):
    card = find_card(changed.pop("card", "t4"))
    samples = Samples(changed.pop("num_samples", 0), 256, changed.pop("new_tokens", 128))
    forecast = Forecast(
        shape=Shape.of(LLAMA_2_SIZES[size]),
        card=replace(card, memory_gib=changed.pop("gib", card.memory_gib)),
        rows=Rows(changed.pop("lengths", guanaco_lengths(400))),
        lora=Lora(changed.pop("rank", 16), 16, 0.0, "all-linear", False, False),
        precision="16-mixed",
        checkpointing="full",
        plan=BatchPlan(rows=4),
        max_length=1024,
        accumulate=4,
        samples=samples,
    )
    return replace(forecast, **changed)


def test_lengths_are_cut_for_the_micro_batches():
    epoch = seven().epoch
    batches = seven().batches
    assert (batches.largest, batches.largest_recorded, batches.num_recordings) == (4 * 1024, 4 * 1024, 29)
    assert epoch.tokens == sum(min(length, 1024) for length in guanaco_lengths(400))
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


def test_a_70b_on_a_t4_comes_from_the_hosts_memory():
    """The base's weights alone take more than twice the card."""
    options, after = smallest_change(seven("70b"))
    assert options.endswith("--model.shard true --model.shard_to host")
    assert after.step.shares_on_host and after.fits()
    assert smallest_change(seven("70b", gib=3)) is None
    assert smallest_change(seven("70b", slow_because="DoRA")) is None


def test_cards_share_a_base_that_no_one_holds_before_anything_else_changes():
    two = seven("70b", card="4090", gib=26, rank=8, num_devices=2, accumulate=2, lengths=(512,) * 8, shard=False,
                plan=BatchPlan(rows=1))  # fmt: skip
    assert smallest_change(replace(two, shard="auto", num_devices=1))[0].endswith("--model.shard_to host")
    options, after = smallest_change(two)
    assert options == "--model.shard true" and after.step.sharers == 2 and not after.step.shares_on_host
    alike = replace(two, shard="auto")
    assert alike.is_shared and alike.fits() and alike.peak == after.peak
    assert not replace(seven("7b", num_devices=2, accumulate=2), shard="auto").is_shared  # it fits whole


def test_a_smaller_batch_may_take_more():
    # The steps of several micro-batches have a second set of gradients, and a rank of 256 makes it large.
    before = seven(gib=8.5, rank=256, accumulate=1, optimizer="paged_adamw_8bit", max_length=256)
    smaller = replace(before, plan=BatchPlan(rows=1), accumulate=4)
    assert smaller.peak.on_card > before.peak.on_card + 2 * GIB
    assert smallest_change(before)[0] == "--model.rank 128"


@pytest.mark.parametrize(
    ("plan", "rows", "expected"),
    [
        (BatchPlan(rows=8), 8, "--data.batch_size 2 --trainer.accumulate_grad_batches 12"),
        (BatchPlan(rows=9), 9, "--data.batch_size 1 --trainer.accumulate_grad_batches 27"),  # a step of 27, as before
        (BatchPlan(rows=2), 2, "--data.batch_size 1 --trainer.accumulate_grad_batches 6"),
        (BatchPlan(rows=8), 2, "--data.batch_size 1 --trainer.accumulate_grad_batches 24"),  # an epoch's last
        (BatchPlan(rows=8), 1, "--data.max_length 512"),
        (BatchPlan(tokens=8192), 9, "--data.batch_tokens 2048 --trainer.accumulate_grad_batches 12"),
        (BatchPlan(tokens=3000), 5, "--data.batch_tokens 1024 --trainer.accumulate_grad_batches 9"),
        (BatchPlan(tokens=1024), 5, "--data.max_length 512"),
    ],
)
def test_once_there_is_no_room_the_step_keeps_its_size(plan, rows, expected):
    assert advice.once_out_of_room(plan, 1024, 3, rows) == expected


def test_the_reserve_is_left_free_where_it_can_be():
    _, after = smallest_change(seven(gib=6.9))
    assert after.fits(1 - RESERVE)
    _, after = smallest_change(seven(gib=5))
    assert after.fits() and not after.fits(1 - RESERVE)


def test_where_nothing_fits():
    assert smallest_change(seven(gib=1)) is None


def test_every_change_takes_less_or_as_much():
    before = seven(num_samples=8, checkpointing="none", rank=64, cuda_graphs=True, num_devices=2)
    for rung in LADDER:
        sizes = [before.peak.on_card, *(changed.peak.on_card for changed in rung.steps(before))]
        assert sizes == sorted(sizes, reverse=True)


def any_settings(draw):
    """Settings that do not fit, with some of everything that decides memory."""
    length = draw.choice((256, 1024, 2048))
    by_tokens = BatchPlan(4, length * draw.choice((1, 2, 4)), draw.random() < 0.2)
    forecast = seven(
        card=draw.choice(("t4", "a100", "h100")), gib=draw.uniform(4, 13), lengths=guanaco_lengths(40),
        rank=draw.choice((4, 16, 64, 256)), num_samples=draw.choice((0, 8)), new_tokens=draw.choice((48, 512)),
        plan=draw.choice((BatchPlan(1), BatchPlan(4), BatchPlan(8), by_tokens)), max_length=length,
        accumulate=draw.choice((1, 4)), checkpointing=draw.choice(("none", "selective", "auto", "full")),
        cuda_graphs=draw.choice((False, True, "auto")), slow_because=None if draw.random() > 0.05 else "DoRA",
        optimizer=draw.choice([*OPTIMIZERS]),
    )  # fmt: skip
    return any_settings(draw) if forecast.fits(1 - RESERVE) else forecast


def least_of_all(forecast, ladder=LADDER):
    """The first that fits of all there are, those with less of an expensive kind first."""
    if not ladder:
        return forecast if forecast.fits(1 - RESERVE) else None
    tried = (least_of_all(changed, ladder[1:]) for changed in (forecast, *ladder[0].steps(forecast)))
    return next(filter(None, tried), None)


@pytest.mark.parametrize("number", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_one_walk_finds_what_all_combinations_have(monkeypatch, number):
    monkeypatch.setattr(advice, "LORA_RANKS", (64, 8, 4))
    monkeypatch.setattr(advice, "LENGTH_STEP", 512)
    draw = random.Random(number)
    for _ in range(number):
        forecast = any_settings(draw)
        least = least_of_all(forecast)
        if least is None:
            found = smallest_change(forecast)
            assert found is None or found.forecast.step.shares_on_host or not found.forecast.fits(1 - RESERVE)
        else:
            assert smallest_change(forecast).forecast == least, forecast


def test_the_quickest_fits_with_room_and_keeps_the_step():
    before = seven()
    words, after = quickest(before)
    assert after.hours < 0.8 * before.hours
    assert after.peak.on_card <= 0.875 * DEFAULT.memory_gib * GIB
    step = [s.epoch.padded_tokens / s.epoch.num_micro_batches * s.accumulate for s in (before, after)]
    assert 0.7 < step[1] / step[0] < 1.4
    assert "--data.batch_tokens" in words


def test_the_quickest_is_left_alone():
    _, after = quickest(seven())
    assert quickest(after) is None


def test_a_large_card_is_advised_to_learn_a_step_in_few_micro_batches():
    common = {"card": "h100", "lengths": guanaco_lengths(400) * 20, "checkpointing": "auto", "max_length": 512}
    _, after = quickest(seven(plan=BatchPlan(rows=16, tokens=1024), accumulate=8, **common))
    assert (after.plan.tokens, after.accumulate) == (8192, 1)
    assert quickest(seven(plan=BatchPlan(rows=16, tokens=8192), accumulate=1, **common)) is None


def test_kernels_are_left_unrecorded_where_that_is_quicker():
    many = guanaco_lengths(400) * 20
    before = seven(card="l4", gib=16, plan=BatchPlan(rows=16), cuda_graphs=True, lengths=many, checkpointing="auto")
    words, after = quickest(before)
    assert words == (
        "--model.cuda_graphs false --model.checkpointing none --data.batch_tokens 3072 "
        "--trainer.accumulate_grad_batches 10"
    )
    assert after.hours < before.hours


def test_a_card_that_waits_for_its_host_keeps_recorded_kernels():
    many = guanaco_lengths(400) * 20
    before = seven(card="h100", gib=12, plan=BatchPlan(rows=1), cuda_graphs=True, lengths=many, max_length=256)
    words, after = quickest(before) or ("", before)
    assert after.cuda_graphs is True, words


def test_the_quickest_leaves_each_device_a_micro_batch():
    """A step with fewer is refused."""
    words, after = quickest(seven(num_devices=32, accumulate=32, lengths=guanaco_lengths(4000)))
    assert after.accumulate == 32 and words == "--model.checkpointing none --data.batch_tokens 2048"


def test_transformers_own_layers_keep_none_by_auto_and_have_no_quickest():
    slow = seven(checkpointing="auto", slow_because="DoRA")
    assert slow.step.kept_layers == 0
    assert quickest(slow) is None
    assert seven(checkpointing="none", slow_because="DoRA").step.kept_layers == 32


@pytest.mark.parametrize(
    ("limit", "num_micro_batches", "num_rows"), [(1.0, 100, 400), (1, 1, 4), (10, 10, 40), (0.25, 25, 100)]
)
def test_an_epoch_may_be_cut_short(limit, num_micro_batches, num_rows):
    whole, cut = seven(), seven(limit=limit)
    epoch = cut.epoch
    assert (epoch.num_micro_batches, cut.batches.num_rows) == (num_micro_batches, num_rows)
    assert cut.batches[3:] == whole.batches[3:]
    assert epoch.tokens <= num_rows * 1024 and cut.hours <= whole.hours
