"""The forecast: real settings in the formulas' terms, lengths like the measured ones, a few lines that add up."""

import re
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lit_qlora.callbacks.checkpoints import RunCheckpoints
from lit_qlora.callbacks.samples import SampleAnswers
from lit_qlora.data.batching import BatchPlan
from lit_qlora.data.datamodule import ChatDataModule
from lit_qlora.devices.world import World
from lit_qlora.errors import UserError
from lit_qlora.forecast import foresee, memory, words
from lit_qlora.forecast.cards import CARDS, DEFAULT, Card, find_card
from lit_qlora.forecast.memory import GIB, HOPPER_WORKSPACE, NO_SAMPLES, WORKSPACE, Samples
from lit_qlora.forecast.speed import epoch_hours
from lit_qlora.model.architectures import LINEARS
from lit_qlora.model.device import Device
from lit_qlora.model.lora import Lora
from lit_qlora.model.module import QLoRAModule
from lit_qlora.model.shape import LLAMA_2_SIZES, Shape
from lit_qlora.storage.run import RunFolder
from lit_qlora.text.conversation import Conversation, Turn

SEVEN = Shape.of(LLAMA_2_SIZES["7b"])


def forecast(tokens=4096, **changed):
    """A forecast of a run whose largest micro-batch is one row of ``tokens``."""
    lora = Lora(16, 16, changed.pop("dropout", 0.0), changed.pop("targets", "all-linear"), False, False)
    made = foresee.Forecast(
        shape=SEVEN, card=DEFAULT, rows=foresee.Rows((tokens,), 0.5), lora=lora, precision="16-mixed",
        plan=BatchPlan(1), max_length=tokens, checkpointing="full",
    )  # fmt: skip
    return replace(made, **changed)


def step(**changed):
    return forecast(**changed).step


def test_settings_in_the_formulas_terms():
    made = step(dropout=0.05, accumulate=4)
    assert (made.tokens, made.scored_tokens, made.kept_layers, made.element) == (4096, 2048, 0, 2)
    assert made.accumulates and made.targets == LINEARS
    assert made.workspace == WORKSPACE
    assert step(card=find_card("h100")).workspace == HOPPER_WORKSPACE
    assert step(checkpointing="none").kept_layers == 32
    assert step(checkpointing="selective").kept_layers == 32
    assert step(precision="32-true").element == 4
    assert step(targets="q_proj").targets == ("q_proj",)
    assert step(targets=["q_proj", "v_proj", "q_proj"]).targets == ("q_proj", "v_proj")


def test_auto_keeps_as_many_layers_as_fit():
    kept = step(checkpointing="auto").kept_layers
    assert 0 < kept < 32
    assert step(checkpointing="auto", card=find_card("h200")).kept_layers == 32


@pytest.mark.parametrize(
    ("card", "tokens", "wanted", "uses_cuda_graphs"),
    [
        ("h100", 4096, "auto", True),
        ("h100", 16384, "auto", False),  # the card is busy for longer than its host
        ("a100-80", 4096, "auto", False),
        ("a100-80", 1024, "auto", True),
        ("t4", 512, "auto", False),
        ("t4", 512, True, True),
        ("h100", 4096, False, False),
    ],
)
def test_kernels_are_recorded_where_the_card_would_wait_for_its_host(card, tokens, wanted, uses_cuda_graphs):
    made = forecast(
        tokens=tokens, card=find_card(card), checkpointing="auto", precision="bf16-mixed", cuda_graphs=wanted
    )
    assert made.step.uses_cuda_graphs is uses_cuda_graphs
    assert not replace(made, plan=BatchPlan(1, tokens, packed=True)).step.uses_cuda_graphs
    if wanted == "auto":
        assert not replace(made, lora=replace(made.lora, dropout=0.1)).step.uses_cuda_graphs
        assert not replace(made, slow_because="DoRA").step.uses_cuda_graphs
        torch.use_deterministic_algorithms(True)
        try:
            assert not replace(made).step.uses_cuda_graphs
        finally:
            torch.use_deterministic_algorithms(False)


def test_a_card_of_unknown_rates_is_not_waited_for():
    card = Card("another", 80.0, (9, 0))
    assert not step(
        tokens=64, card=card, checkpointing="auto", precision="bf16-mixed", cuda_graphs="auto"
    ).uses_cuda_graphs


def test_recorded_kernels_leave_room_for_fewer_layers_and_say_so():
    card = replace(find_card("h100"), memory_gib=14.56)
    rows = foresee.Rows((1024,) * 3 + (1000, *range(100, 700, 3)), 0.86)
    plain, recorded = (
        forecast(card=card, rows=rows, plan=BatchPlan(4), max_length=1024, checkpointing="auto", cuda_graphs=wanted)
        for wanted in (False, True)
    )
    assert recorded.step.kept_layers < plain.step.kept_layers
    assert recorded.step.tokens == recorded.batches.largest_recorded
    number = recorded.step.num_recordings
    assert number == recorded.batches.num_recordings > 5
    lines = list(words.forecast_lines(recorded))
    assert any("CUDA graphs" in line for line in lines)
    assert any("held beside: recorded kernels have their own pool" in line for line in lines)
    assert f"  CUDA's own of {number} recordings".ljust(52) + f"{number * 32 * 0.47 / 1024:8.2f}" in lines


def test_sample_answers_leave_room_for_fewer_layers_where_recordings_hold_theirs():
    card = replace(find_card("h100"), memory_gib=14.56)
    for wanted, fewer in ((True, True), (False, False)):
        kept = [
            step(tokens=2048, card=card, checkpointing="auto", cuda_graphs=wanted, samples=samples).kept_layers
            for samples in (NO_SAMPLES, Samples(8, 1024, 128))
        ]
        assert (kept[1] < kept[0]) is fewer


def test_a_limited_epoch_is_shorter_and_its_largest_batch_is_that_of_all_epochs():
    rows = foresee.Rows((*range(10, 410),))
    whole, cut = (forecast(rows=rows, plan=BatchPlan(4), max_length=400, limit=limit) for limit in (1.0, 0.25))
    assert (whole.epoch.num_micro_batches, cut.epoch.num_micro_batches) == (100, 25)
    assert (whole.batches.num_rows, cut.batches.num_rows) == (400, 100)
    assert cut.epoch.tokens < whole.epoch.tokens == sum(min(length, 400) for length in rows.lengths)
    assert cut.batches[3:] == whole.batches[3:]


def test_two_cards_take_half_of_the_time_but_for_waiting():
    rows = foresee.Rows((512, 512, 512, 256) * 5)
    options = {"rows": rows, "max_length": 512, "accumulate": 4, "tokens": 512}
    one, two, four = (forecast(num_devices=count, **options) for count in (1, 2, 4))
    assert (one.efficiency, two.needed_gib) == (1, pytest.approx(one.needed_gib + 0.5))
    assert two.hours == pytest.approx(one.hours / 2 / two.efficiency)
    assert two.hours > four.hours > one.hours / 4
    assert not any("cards" in line for line in words.time_lines(one))
    line = next(line for line in words.time_lines(two) if "cards" in line)
    assert line.startswith(f"  on 2 such cards, each of which works {two.efficiency:.0%} of the time")
    assert "they exchange 160 MB of gradients per step" in line


class FixedPlan(NamedTuple):
    """A plan that has these batches in each epoch."""

    batches: tuple[tuple[int, ...], ...]
    packed: bool = False

    def epoch(self, lengths, seed, epoch):
        return self.batches


def test_an_epoch_by_hand():
    epoch, *found = foresee.batches_of((10, 20, 30, 40), FixedPlan(((0, 1), (2, 3))), 99, 0, 1.0)
    assert (epoch.tokens, epoch.padded_tokens, epoch.num_micro_batches) == (100, 40 + 80, 2)
    assert epoch.row_tokens == (100 + 400 + 900 + 1600) / 100
    assert found == [4, [40, 80], 80, {(2, 32): 1, (2, 64): 1}]
    # Short rows in great number are padded more by a recording than the few long ones.
    plan = FixedPlan(((0,), (*range(1, 12),)))
    batches = foresee.batches_of((100, *[9] * 11), plan, 100, 0, 1.0)
    assert (batches.largest, batches.largest_recorded, batches.num_recordings) == (100, 11 * 16, 2)


def test_lengths_have_the_measured_means():
    lengths = foresee.guanaco_lengths(1000)
    means = [sum(min(length, cap) for length in lengths) / 1000 for cap in (512, 1024, 2048)]
    assert means == pytest.approx([345, 421, 450], rel=0.015)  # of guanaco-llama2-1k
    assert sorted(lengths)[500] == pytest.approx(373, abs=2)


@pytest.fixture
def parts(tmp_path):
    """The demo's module, data and Trainer, as fit has them once the data is read."""
    data = ChatDataModule(max_length=160, tokenizer="demo")
    callbacks = [SampleAnswers(max_new_tokens=5), RunCheckpoints(RunFolder(tmp_path), 10, 3)]
    trainer = Trainer(
        logger=False, enable_checkpointing=False, accelerator="cpu", max_epochs=1, precision="bf16-mixed",
        callbacks=callbacks,
    )  # fmt: skip
    data.trainer = trainer
    data.setup("fit")
    return QLoRAModule(checkpointing="none"), data, trainer


def test_callbacks_say_what_they_need_themselves(parts):
    class Looks(Callback):
        """Has what a callback that draws samples has, and draws none."""

        max_new_tokens, keep_checkpoints, samples = 5000, 100, Samples(9, 9, 9)

    module, data, trainer = parts
    trainer.callbacks.insert(0, Looks())
    made = foresee.foresee(module, data, trainer, DEFAULT)
    assert (made.samples.num_prompts, made.samples.new_tokens, made.keep_checkpoints) == (8, 5, 3)
    assert not made.samples.are_own
    trainer.callbacks[:] = [SampleAnswers(prompts=["a", "b and c"]), Looks()]
    made = foresee.foresee(module, data, trainer, DEFAULT)
    longest = max(len(data.encoder.prompt(Conversation((Turn("user", text),)))) for text in ("a", "b and c"))
    assert (made.samples, made.keep_checkpoints) == (Samples(2, longest, 128, are_own=True), 0)
    trainer.callbacks[:] = []
    assert foresee.foresee(module, data, trainer, DEFAULT).samples == NO_SAMPLES


def test_on_a_cpu_nothing_is_said(parts, monkeypatch):
    monkeypatch.setattr(foresee, "current_card", lambda: None)
    assert foresee.foresee(*parts) is None


def test_on_a_card_memory_parts_host_and_time(parts, monkeypatch):
    monkeypatch.setattr(foresee, "current_card", lambda: DEFAULT)
    made = foresee.foresee(*parts)
    lines = list(words.forecast_lines(made))
    assert lines[0].startswith("forecast for T4: 0.4") and lines[0].endswith("; fits")
    assert "of 14.56 GiB (3%), of which torch reserves 0.0" in lines[0]
    assert lines[1].startswith("memory at its highest: ")
    held = next(index for index, line in enumerate(lines) if "no layer recomputes its activations" in line)
    assert lines[held - 1].startswith("  allocated at other moments: ")
    assert ", sample answers " in lines[held - 1]
    assert re.fullmatch(r"  sample answers: 8 prompts of \d+ tokens, 5 new ones each", lines[held + 1])
    assert lines[held + 2].split() == ["host", "and", "disk", "GiB"]
    assert lines[held + 3].startswith("  run folder, with 3 checkpoints ")
    assert lines[-2].startswith("  an epoch takes ")
    slow = list(words.forecast_lines(replace(made, slow_because="DoRA")))
    line = "  transformers' own layers take more time and memory than these figures: DoRA"
    assert slow[0].endswith("; may fit") and line in slow and line not in lines


def test_a_card_of_unknown_rates_and_one_too_small():
    lines = list(words.forecast_lines(forecast(card=Card("small", 5.0, (7, 5)))))
    assert not any("an epoch takes" in line for line in lines)
    assert not any("sample answers" in line for line in lines)
    assert lines[0].endswith("does not fit: python main.py plan shows what would")


@pytest.mark.parametrize(
    ("name", "rates"),
    [("Tesla T4", 24), ("NVIDIA A100-SXM4-80GB", 230), ("NVIDIA GeForce RTX 3090", 53), ("NVIDIA H100 80GB HBM3", 740)]
    + [(f"NVIDIA {name}", None) for name in ("GeForce GTX 1080", "GeForce RTX 3080", "L40S", "RTX A6000", "A800 80GB")]
    + [(f"NVIDIA {name}", None) for name in ("GeForce RTX 5090", "Quadro RTX 6000", "GH200 480GB")],
)
def test_this_machines_card(monkeypatch, name, rates):
    monkeypatch.setattr(foresee, "current_device", lambda: Device(name, (7, 5), 12 * 1024**3))
    card = foresee.current_card()
    rates = {one.name: one.tflops for one in CARDS}.get(re.sub("^NVIDIA (GeForce )?", "", name), rates)
    assert (card.memory_gib, card.tflops, card.capability) == (pytest.approx(12.35), rates, (7, 5))
    monkeypatch.setattr(foresee, "current_device", lambda: Device("CPU", None))
    assert foresee.current_card() is None


def test_nccl_is_counted_where_cards_are_several(monkeypatch):
    one, two = forecast(), forecast(num_devices=2, accumulate=2)
    alone = forecast(accumulate=2)
    assert two.peak.on_card - alone.peak.on_card == memory.EXCHANGE == 512 * 1024**2
    assert two.peak.reserved == alone.peak.reserved
    assert [line for line in words.memory_lines(two) if line.startswith("  NCCL's own, of 2 cards")]
    assert not [line for line in words.memory_lines(one) if "NCCL" in line]
    # Of this machine's card, NCCL has its part already as the forecast is made.
    monkeypatch.setattr(foresee, "current_device", lambda: Device("Tesla T4", (7, 5), 12 * 1024**3))
    monkeypatch.setattr(foresee, "world", lambda: World(1, 2, 1, 2))
    assert foresee.current_card().memory_gib == pytest.approx(12.85)


@pytest.mark.parametrize(
    ("accumulate", "devices", "said"), [(4, 2, ""), (3, 2, "batches 4 shares"), (3, 8, "batches 8 shares"), (1, 1, "")]
)
def test_a_step_that_cannot_be_shared_out_evenly(accumulate, devices, said):
    assert words.uneven(accumulate, devices).removeprefix(" (--trainer.accumulate_grad_").startswith(said)
    assert bool(words.uneven(accumulate, devices)) is bool(said)


def test_kept_layers_in_words():
    said = [words.kept_words(replace(step(), kept_layers=kept)) for kept in (32, 0, 12)]
    assert said == [
        "no layer recomputes its activations",
        "all 32 layers recompute their activations",
        "12 of 32 layers keep their products' results",
    ]


def test_layers_are_sent_to_the_host_where_it_has_room_and_the_bus_time():
    made = forecast(checkpointing="auto", host=foresee.Host(8 * GIB, 6.0))
    assert (made.step.kept_layers, made.step.hosted_layers) == (32, 18)
    assert any("18 send some to the host" in line for line in words.forecast_lines(made))
    assert any("activations on the host" in line for line in words.forecast_lines(made))
    little = replace(made, host=foresee.Host(2 * GIB, 6.0)).step
    assert little.kept_layers < 32 and little.hosted_layers == 10 == int(2 * GIB // (4096 * 2 * (4096 + 2 * 11008)))
    assert 0 < replace(made, host=foresee.Host(8 * GIB, 0.5)).step.hosted_layers < 10  # a slow bus
    for without in ({"host": None}, {"checkpointing": "full"}, {"cuda_graphs": True}, {"slow_because": "DoRA"}):
        assert replace(made, **without).step.hosted_layers == 0


@pytest.mark.parametrize(("processes", "room_gib"), [(1, 4), (2, 2)])
def test_the_processes_of_a_machine_share_what_its_host_has_free(monkeypatch, processes, room_gib):
    monkeypatch.setattr(foresee.host, "memory_bytes", lambda: (12 * GIB, 8 * GIB))
    monkeypatch.setattr(foresee.offload, "copy_gb_per_s", lambda: 6.0)
    monkeypatch.setattr(foresee, "current_device", lambda: Device("T4", (7, 5), 15 * GIB))
    monkeypatch.setattr(foresee.host, "world", lambda: World(0, processes, 0, processes))
    assert foresee.current_host.__wrapped__() == foresee.Host(room_gib * GIB, 6.0)

    def locks_nothing():
        raise UserError("67.1 MB can't be page-locked")

    monkeypatch.setattr(foresee.offload, "copy_gb_per_s", locks_nothing)
    assert foresee.current_host.__wrapped__() is None


def test_weights_stay_dequantised_where_a_card_has_room_left():
    """A 7B's take 12.1 GiB: on an H100 all of them; on a T4, whose layers give way first, none."""
    big = step(tokens=2048, card=find_card("h100"), checkpointing="auto")
    assert (big.kept_layers, big.dequantised_layers, big.together) == (32, 32, 1)
    assert step(tokens=2048, checkpointing="auto").dequantised_layers == 0
    cards = [replace(find_card("l4"), memory_gib=gib) for gib in (20.0, 24.0)]
    small, large = (step(tokens=1024, card=card, checkpointing="auto") for card in cards)
    assert (small.kept_layers, small.dequantised_layers) == (32, 0)  # some would fill it up
    assert (large.kept_layers, large.dequantised_layers) == (32, 32)
    assert memory.step_memory(replace(large, together=1)).on_card <= 24.0 * GIB * (1 - memory.RESERVE)
    for other in ({"checkpointing": "none"}, {"checkpointing": "full"}, {"slow_because": "DoRA"}):
        assert (
            step(**{"tokens": 2048, "card": find_card("h100"), "checkpointing": "auto"} | other).dequantised_layers == 0
        )


def test_kept_weights_are_counted_and_named_and_save_time():
    made = forecast(tokens=2048, card=find_card("a100-80"), checkpointing="auto", precision="bf16-mixed")
    assert any(line.startswith("  weights that stay dequantised") for line in words.forecast_lines(made))
    assert "weights stay dequantised" in words.kept_words(made.step)
    assert made.peak.dequantised == 2 * SEVEN.num_quantized
    assert made.peak.dequantisation == 0
    without = replace(made.step, dequantised_layers=0)
    assert epoch_hours(made.step, made.epoch, made.card) < epoch_hours(without, made.epoch, made.card)


def test_a_shared_base_comes_once_for_micro_batches_that_go_together():
    """A card takes its micro-batches of a step at once; the bus decides the time, and no weight stays dequantised."""
    slow = {"num_devices": 2, "shard": True, "bus_gb_per_s": 1.0}
    made = forecast(tokens=256, checkpointing="auto", accumulate=8, **slow)
    assert (made.step.together, made.step.sharers, made.step.dequantised_layers) == (4, 2, 0)
    alone = replace(made, checkpointing="full")
    assert alone.step.together == 1 and alone.hours == pytest.approx(4 * made.hours, rel=0.01)
    assert made.peak.dequantisation == alone.peak.dequantisation < SEVEN.layer_bytes
    assert any("GB per 4 micro-batches" in line for line in words.shared_lines(made))
    coming = memory.fetched_bytes(made.step) / 1e9
    assert any(f"{coming:,.1f} GB per step" in line for line in words.shared_lines(made))
    assert any(f"{4 * coming:,.1f} GB per step" in line for line in words.shared_lines(alone))


def test_small_micro_batches_of_a_step_go_together_on_a_t4():
    """Dequantisation is a large part of a short micro-batch's time, and several have room for their activations."""
    short = step(tokens=256, checkpointing="auto", accumulate=8)
    assert 2 <= short.together <= 8 and short.kept_layers == 32
    assert step(tokens=256, checkpointing="auto", accumulate=2).together == 2
    assert step(tokens=4096, checkpointing="auto", accumulate=8).together == 1  # fills the card by itself
    assert "micro-batches of a step go through a layer together" in words.kept_words(short)
    room = DEFAULT.memory_gib * GIB * (1 - memory.RESERVE)
    assert memory.step_memory(short).on_card <= room
    for other in ({"accumulate": 1}, {"checkpointing": "full"}, {"slow_because": "DoRA"}, {"cuda_graphs": True}):
        assert step(**{"tokens": 256, "checkpointing": "auto", "accumulate": 8} | other).together == 1
    assert step(tokens=256, checkpointing="auto", accumulate=8, num_devices=8).together == 1
