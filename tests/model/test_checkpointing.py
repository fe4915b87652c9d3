"""What recomputation promises: it really happens, in train mode with gradients, and changes no bit of them."""

import pytest
import torch

from lit_qlora.model import checkpointing
from lit_qlora.model.checkpointing import checkpoint_layers, choose_checkpointing


@pytest.fixture
def calls(monkeypatch):
    """One entry for each layer that is run under torch's checkpoint."""
    seen = []

    def counted(forward, *args, **kwargs):
        seen.append(forward)
        return torch.utils.checkpoint.checkpoint(forward, *args, **kwargs)

    monkeypatch.setattr(checkpointing, "checkpoint", counted)
    return seen


def test_gradients_are_bit_equal_under_dropout(make_model, gradients):
    full = gradients(make_model(checkpointing="full", dropout=0.1))
    none = gradients(make_model(checkpointing="none", dropout=0.1))
    assert full.keys() == none.keys()
    assert all(gradient.abs().sum() > 0 for gradient in none.values())
    assert all(torch.equal(full[name], none[name]) for name in none)


def test_dropout_is_really_on_in_the_test_above(make_model, gradients):
    with_dropout, without = gradients(make_model(dropout=0.1)), gradients(make_model(dropout=0.0))
    assert not any(torch.equal(with_dropout[name], without[name]) for name in without)


def test_every_layer_is_checkpointed_once_per_step(make_model, gradients, calls):
    model = make_model(checkpointing="full")
    gradients(model)
    assert len(calls) == 2
    gradients(model)
    assert len(calls) == 4


def test_eval_mode_with_gradients_is_checkpointed_too(make_model, gradients, calls):
    model = make_model(checkpointing="full")
    in_train_mode = gradients(model)
    in_eval_mode = gradients(model.eval())
    assert len(calls) == 4
    assert all(torch.equal(in_train_mode[name], in_eval_mode[name]) for name in in_train_mode)


def test_none_checkpoints_nothing(make_model, gradients, calls):
    gradients(make_model(checkpointing="none"))
    assert calls == []


@pytest.mark.parametrize("training", [True, False])
def test_without_grad_nothing_is_checkpointed(make_model, calls, training):
    model, plain = make_model(checkpointing="full"), make_model(checkpointing="none")
    model.train(training)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert calls == []


def test_a_layer_keeps_its_input_only():
    """Counts what autograd keeps of a layer: with recomputation, the input; without, the inner results too."""

    def num_kept(mode):
        layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh())
        checkpoint_layers(torch.nn.ModuleList([layer]), mode)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            layer(torch.ones(3, 8, requires_grad=True))
        return sum(tensor.numel() > 0 for tensor in kept)  # torch 2.11 keeps an empty one, too

    assert num_kept("full") == 1
    assert num_kept("none") > 2


def test_selective_multiplies_nothing_twice_and_changes_no_bit(make_model, gradients):
    """Counts by the dequantisations that go with 4-bit products, over forward and backward."""
    found, counts = {}, {}
    for mode in ("none", "selective", "full"):
        model = make_model(checkpointing=mode, dropout=0.1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            found[mode] = gradients(model)
        dequantised = [event.count for event in profile.key_averages() if event.key == "bitsandbytes::dequantize_4bit"]
        counts[mode] = sum(dequantised)
    assert counts["none"] > 0
    assert counts["selective"] == counts["none"]
    assert counts["full"] == counts["none"] + 14
    assert all(torch.equal(found[mode][name], found["none"][name]) for mode in found for name in found["none"])


@pytest.mark.parametrize(
    ("wanted", "on_gpu", "own_layers", "expected"),
    [
        ("auto", False, True, "none"), ("auto", True, True, "auto"), ("auto", False, False, "auto"),
        ("full", False, True, "full"), ("selective", False, True, "selective"),
    ],
)  # fmt: skip
def test_what_auto_is_on_a_cpu(wanted, on_gpu, own_layers, expected):
    assert choose_checkpointing(wanted, on_gpu, own_layers) == expected
