"""Decoder layers replayed: gradients gathered, rows padded, memory shared. On a CPU a recording runs its code again."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from lit_qlora.cli import main
from lit_qlora.model import graphs
from lit_qlora.model.architectures import LINEARS
from lit_qlora.model.attention import find_places
from lit_qlora.model.base import find_base
from lit_qlora.model.decoder import extract_layers
from lit_qlora.model.graphs import Graphs
from lit_qlora.model.load import load_base
from lit_qlora.model.lora import Lora, adapter_parameters, add_lora
from lit_qlora.model.module import QLoRAModule
from lit_qlora.model.pointwise import EAGER, compiled
from tests.tiny_llama import run_layers

NOT_WITH = "error: model.cuda_graphs: expected auto or false with dropout or dora, or without own_layers, got True"


class Rerun:
    """What stands for a CUDA graph without a GPU."""

    def __init__(self, run, pool):
        self.replay = torch.enable_grad()(run)  # as it is while a step is recorded


@pytest.fixture
def replayed(monkeypatch, make_model):
    """A model, and its layers replayed with one of two layers kept."""
    monkeypatch.setattr(graphs, "_record", Rerun)
    model = make_model()
    inner = model.get_base_model().model
    return model, Graphs(extract_layers(model), 1, inner.rotary_emb)


def embedded(model, *shape):
    torch.manual_seed(sum(shape))
    device = model.get_base_model().device
    return model.get_base_model().model.embed_tokens(torch.randint(3, 512, shape).to(device)).detach()


def gradients(model):
    return torch.cat([value.grad.flatten() for value in adapter_parameters(model).values()])


def assert_rounded(found, expected):
    """Equal but for rounding: an element that sums to little is as far off as its terms are large."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def learned(run, model, hidden):
    out = run(hidden)
    (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
    return out.detach()


def plain(model):
    inner = model.get_base_model().model
    return lambda hidden: run_layers(extract_layers(model), hidden, find_places(inner.rotary_emb, hidden, ()), 1)


@given(st.integers(1, 512), st.integers(1, 4096))
def test_rows_are_padded_to_few_lengths_and_by_little(rows, tokens):
    length = graphs.padded(rows, tokens)
    assert length >= tokens and length % 8 == 0 and (rows > 8 or length % 32 == 0)
    assert rows * (length - tokens) < max(256, 7 * rows + 1)
    assert graphs.padded(rows, length) == length


@pytest.mark.parametrize(("tokens", "exact"), [(32, True), (12, False)])
def test_replayed_layers_give_what_the_layers_give(replayed, tokens, exact):
    model, run = replayed
    found = []
    for way in (plain(model), run, run):
        model.zero_grad()
        found.append((learned(way, model, embedded(model, 2, tokens)), gradients(model).clone()))
    for out, gradient in found[1:]:
        torch.testing.assert_close(out, found[0][0], rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=0 if exact else 1e-4, atol=0 if exact else 1e-4)


def test_layers_whose_lora_differs_or_is_none(monkeypatch, make_model):
    """Adapters made elsewhere are so: no LoRA in the first layer, and in each module a rank and scaling of its own."""
    monkeypatch.setattr(graphs, "_record", Rerun)
    model = make_model(
        layers_to_transform=[1], rank_pattern={"q_proj": 1, "down_proj": 8}, alpha_pattern={"v_proj": 32, "up_proj": 1}
    )
    run = Graphs(extract_layers(model), 1, model.get_base_model().model.rotary_emb)
    found = []
    for way in (plain(model), run):
        model.zero_grad()
        found.append((learned(way, model, embedded(model, 2, 32)), gradients(model).clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_micro_batches_add_up_and_a_new_step_begins_at_zero(replayed):
    model, run = replayed
    sums = []
    for way in (plain(model), run):
        model.zero_grad()
        for tokens in (32, 64):
            learned(way, model, embedded(model, 2, tokens))
        sums.append(gradients(model).clone())
        model.zero_grad()
        learned(way, model, embedded(model, 1, 32))
        sums.append(gradients(model).clone())
    torch.testing.assert_close(sums[2], sums[0])
    torch.testing.assert_close(sums[3], sums[1])
    assert all(value.grad is buffer for value, buffer in zip(run.weights, run.gradients, strict=True))


def test_gradients_that_another_way_gathered_are_taken_over(replayed, monkeypatch):
    monkeypatch.setattr(graphs, "RECORDING_COST", 0)  # each length has a recording of its own
    model, run = replayed
    found = []
    for ways in (
        (plain(model), plain(model), plain(model)),
        (run, plain(model), run),
        (plain(model), run, plain(model)),
    ):
        model.zero_grad()
        for way, tokens in zip(ways, (32, 64, 96), strict=True):
            learned(way, model, embedded(model, 2, tokens))
            for value in adapter_parameters(model).values():  # as after memory ran out: they are put back as copies
                value.grad = value.grad.clone()
        found.append(gradients(model).clone())
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_nothing_of_a_longer_row_stays_for_a_shorter_one(replayed):
    model, run = replayed
    learned(run, model, embedded(model, 2, 32))
    model.zero_grad()
    learned(run, model, embedded(model, 2, 5))
    after = gradients(model).clone()
    fresh = Graphs(run.layers, 1, run.rotary)
    model.zero_grad()
    learned(fresh, model, embedded(model, 2, 5))
    assert torch.equal(after, gradients(model))


def test_a_backward_belongs_to_the_last_forward(replayed):
    model, run = replayed
    first = run(embedded(model, 2, 8))
    run(embedded(model, 2, 8))
    with pytest.raises(AssertionError, match="another forward ran before"):
        first.sum().backward()


def test_recordings_used_longest_ago_go(replayed, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    model, run = replayed
    for tokens in (8, 40, 30, 70):  # 32, 64, 32 again, 96
        run(embedded(model, 2, tokens))
    assert list(run._recordings) == [(2, 32), (2, 96)]


def test_a_length_is_recorded_once_its_padding_has_cost_as_much_as_a_recording(replayed):
    model, run = replayed
    longest, short, rare = (embedded(model, 2, tokens) for tokens in (60, 30, 50))
    learned(run, model, longest)
    recorded = []
    for _ in range(8):  # each time, half of 64 places are lost to padding
        model.zero_grad()
        out = learned(run, model, short)
        found = gradients(model).clone()
        model.zero_grad()
        torch.testing.assert_close(out, learned(plain(model), model, short))
        assert_rounded(found, gradients(model))
        recorded.append((2, 32) in run._recordings)
    assert recorded == [False] * 6 + [True] * 2
    for _ in range(50):
        run(rare)  # as long as the recording, but for what `padded` adds to both
    assert [*run._recordings] == [(2, 32), (2, 64)]
    run(embedded(model, 3, 30))  # other rows have no longer one
    assert (3, 32) in run._recordings


def test_a_length_whose_uses_are_known_is_recorded_at_once_or_never(replayed):
    model, unknown = replayed
    run = Graphs(unknown.layers, 1, unknown.rotary, {(2, 64): 40, (2, 32): 7, (2, 16): 2, (1, 32): 1})
    for tokens in (60, 30, 40):  # padded to 64 as the longest, twice as long for 7 times, and of no known use
        run(embedded(model, 2, tokens))
    assert [*run._recordings] == [(2, 32), (2, 64)]
    run.uses[2, 32] = 6
    fresh = Graphs(unknown.layers, 1, unknown.rotary, run.uses)
    for tokens in (60, 30, 30):
        fresh(embedded(model, 2, tokens))
    assert [*fresh._recordings] == [(2, 64)]


def test_dropout_is_refused(make_model):
    model = make_model(dropout=0.1).train()
    with pytest.raises(AssertionError):
        Graphs(extract_layers(model), 1, model.get_base_model().model.rotary_emb)


def test_a_fit_learns_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "_record", Rerun)
    shapes = []
    real_call, real_configure = Graphs.__call__, QLoRAModule.configure_model
    monkeypatch.setattr(Graphs, "__call__", lambda self, hidden: shapes.append(hidden.shape) or real_call(self, hidden))
    losses = []
    for uses_cuda_graphs in (False, True):

        def configure(self, uses_cuda_graphs=uses_cuda_graphs):
            real_configure(self)
            self.uses_cuda_graphs = uses_cuda_graphs

        monkeypatch.setattr(QLoRAModule, "configure_model", configure)
        run = tmp_path / str(uses_cuda_graphs)
        assert main([
            "fit", "--run", str(run), "--trainer.max_steps", "4", "--trainer.limit_val_batches", "1",
            "--trainer.accumulate_grad_batches", "2", "--trainer.log_every_n_steps", "1", "--samples.count", "0",
        ]) == 0  # fmt: skip
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["train/loss"] for line in lines if "train/loss" in line])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(shapes) == 8  # none of them a validation's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.dropout", "0.1"], NOT_WITH),
        (["--model.own_layers", "false"], NOT_WITH),
        (["--data.packing", "true", "--data.batch_tokens", "256"],
         "error: model.cuda_graphs: expected auto or false with data.packing, got True"),
        ([], "error: model.cuda_graphs: expected auto or false without a GPU, got True"),
    ],
)  # fmt: skip
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_what_cannot_be_recorded_is_refused(tmp_path, capsys, options, message):
    assert main(["fit", "--run", str(tmp_path / "run"), "--model.cuda_graphs", "true", *options]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(message)


# On a GPU: recorded indeed.


@pytest.mark.gpu
@pytest.mark.parametrize("others", [{}, {"rank_pattern": {"v_proj": 1}, "alpha_pattern": {"layers.1.mlp.up_proj": 2}}])
@pytest.mark.parametrize(
    ("dtype", "pointwise"), [(torch.float16, EAGER), (torch.bfloat16, EAGER), (torch.float16, None)]
)
def test_on_a_gpu_recorded_kernels_give_the_same(wide_folder, dtype, pointwise, others):
    torch.compiler.reset()  # after eight other shapes and dtypes, in earlier tests, nothing is compiled any more
    model = load_base(find_base(str(wide_folder)), dtype, torch.device("cuda"), "sdpa")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(LINEARS), task_type="CAUSAL_LM", **others)
    model = get_peft_model(model, config).train()
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    inner = model.get_base_model().model
    for kept_layers in (0, 1, 2):
        layers = extract_layers(model, pointwise or compiled())
        run = Graphs(layers, kept_layers, inner.rotary_emb)

        def plain(hidden, layers=layers, kept_layers=kept_layers):
            places = find_places(inner.rotary_emb, hidden, (), is_recurrent=True)  # by the same kernel
            return run_layers(layers, hidden, places, kept_layers)

        for shape in ((4, 64), (2, 32), (4, 64), (4, 128)):
            found, alive = [], []
            for way in (plain, run):
                model.zero_grad()
                alive.append(run(embedded(model, 2, 32).to(dtype)))  # as a loss that somebody still holds
                hidden = embedded(model, *shape).to(dtype)
                with torch.autocast("cuda", dtype):
                    found.append((learned(way, model, hidden), gradients(model).clone()))
            assert torch.equal(found[1][0], found[0][0])
            # The kernels that add up over tokens do so in no fixed order.
            torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-2, atol=1e-3 * found[0][1].abs().max().item())
    before = torch.cuda.memory_reserved()
    for tokens in (128, 96, 64, 32):
        learned(run, model, embedded(model, 4, tokens).to(dtype))
    assert torch.cuda.memory_reserved() - before < 16 * 1024**2  # they share what the largest needs


@pytest.mark.gpu
def test_on_a_gpu_memory_that_runs_out_while_recording_leaves_the_card_usable(wide_folder):
    model = load_base(find_base(str(wide_folder)), torch.float16, torch.device("cuda"), "sdpa")
    model = add_lora(model, Lora(4, 8.0, 0.0, "all-linear", False, False)).train()
    run = Graphs(extract_layers(model), 2, model.get_base_model().model.rotary_emb)
    hidden = embedded(model, 64, 1024).half()
    for _ in range(2):  # what comes before the recording has its memory already; the recording needs its own
        run._warm_up(torch.zeros_like(hidden))
    run._states = [hidden.new_empty(hidden.numel()) for _ in range(2)]
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 1024**2) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            learned(run, model, hidden)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    names = [entry.name for entry in caught.traceback]
    assert names.count("_record") == 2 and "_warm_up" not in names
    del caught
    del run
    model.zero_grad()
    learned(plain(model), model, embedded(model, 2, 32).half())
    assert gradients(model).isfinite().all()
