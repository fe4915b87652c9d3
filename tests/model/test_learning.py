"""Running out of memory, in forward or in backward: the step is done again, with the same loss and gradients."""

import gc
import weakref

import pytest
import torch

from lit_qlora.data.batching import collate
from lit_qlora.errors import OutOfRoomError
from lit_qlora.model import graphs, learning
from lit_qlora.model.dequantised import Weights
from lit_qlora.model.lora import adapter_parameters
from lit_qlora.model.module import QLoRAModule
from lit_qlora.model.sums import AnswerSums
from tests.expect import check_line

EXAMPLES = [
    (row, {"input_ids": list(range(5, 5 + length)), "labels": [-100] * 3 + list(range(8, 5 + length))})
    for row, length in enumerate((12, 7, 15, 9))
]
PADDED, PACKED = collate(EXAMPLES, 31), collate(EXAMPLES, 31, packed=True)


class Plugin:
    """What `learning` asks of the Trainer's precision."""

    scaler = None

    def forward_context(self):
        return torch.enable_grad()


class Trainer:
    precision_plugin = Plugin()
    accumulate_grad_batches = 2
    num_training_batches, is_last_batch = 100, False

    def __init__(self):
        self.reported = []


@pytest.fixture
def built(make_model, tiny, monkeypatch):
    """A module with its model, its Trainer, and memory for so many conversations at a time."""

    def build(fits, in_backward=False, kept_layers=0, until_kept=None, dropout=0.0):
        module, trainer = QLoRAModule(tiny.location, rank=4, alpha=8.0), Trainer()
        module.model, module.kept_layers = make_model(dropout=dropout).train(), kept_layers
        monkeypatch.setattr(QLoRAModule, "trainer", trainer)
        monkeypatch.setattr(learning, "note_at_agreement", trainer.reported.append)
        real = module.summed_loss

        def limited(batch):
            short = len(batch.rows) > fits and (until_kept is None or module.kept_layers > until_kept)
            if short and not in_backward:
                raise torch.OutOfMemoryError
            found = real(batch)
            if short:
                found[0].register_hook(_fail_late(module))
            return found

        monkeypatch.setattr(module, "summed_loss", limited)
        return module, trainer

    return build


def _fail_late(module):
    """After some of the gradients were added already."""

    def fail(_):
        with torch.no_grad():
            for value in list(adapter_parameters(module).values())[:5]:
                value.grad = torch.ones_like(value) if value.grad is None else value.grad + 1
        raise torch.OutOfMemoryError

    return fail


def learn(module, *batches, factor=1.0):
    """Learn in Lightning's order: gradients are zeroed between a step's first forward and its backward.

    ``factor`` is what a subclass multiplies the loss by.
    """
    losses, optimizer = [], torch.optim.SGD(adapter_parameters(module).values())
    for value in adapter_parameters(module).values():
        value.grad = torch.ones_like(value)  # of the step before
    for index, batch in enumerate(batches):
        output = module.training_step(batch, index)
        if index % module.trainer.accumulate_grad_batches == 0:
            module.optimizer_zero_grad(0, index, optimizer)
        scaler = module.trainer.precision_plugin.scaler
        scaled = factor * output["loss"] * (scaler.get_scale() if scaler else 1.0)
        module.backward(scaled / module.trainer.accumulate_grad_batches)
        losses.append((float(output["loss_sum"]), int(output["num_correct"]), output["num_answers"]))
    return losses, {name: value.grad.clone() for name, value in adapter_parameters(module).items()}


@pytest.mark.parametrize("batch", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_halved_equals_whole_and_a_window_under_way_is_kept(built, batch, in_backward, dropout):
    module, _ = built(99, dropout=dropout)
    torch.manual_seed(5)
    whole, gradients = learn(module, batch, batch)
    module, trainer = built(2, in_backward, dropout=dropout)
    torch.manual_seed(5)
    halved, halved_gradients = learn(module, batch, batch)
    assert module.parts == 2
    (line,) = trainer.reported
    check_line(line, "4 conversations", f"{batch.input_ids.numel()} tokens", "halves", begins="out of memory")
    for (loss, correct, answers), (own_loss, own_correct, own_answers) in zip(whole, halved, strict=True):
        assert own_loss == pytest.approx(loss, rel=1e-6)
        assert (own_correct, own_answers) == (correct, answers) == (correct, 31)
    for name, gradient in gradients.items():
        assert (halved_gradients[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_halves_through_the_layers_of_transformers_promise_no_masks(built):
    module, trainer = built(2)
    module.slow_because = "a test"
    learn(module, PADDED, PADDED)
    assert trainer.reported[0].endswith("; up to its dropout, the loss of a step is the same")


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("own_layers", [True, False])
def test_layers_that_keep_give_way_first_and_change_no_bit(built, in_backward, own_layers):
    """Nor does dropout draw other numbers."""
    module, _ = built(99, kept_layers=2, dropout=0.3)
    module.slow_because = None if own_layers else "a test"
    torch.manual_seed(5)
    whole, gradients = learn(module, PADDED, PADDED)
    module, trainer = built(2, in_backward, kept_layers=2, until_kept=0, dropout=0.3)
    module.slow_because = None if own_layers else "a test"
    torch.manual_seed(5)
    again, again_gradients = learn(module, PADDED, PADDED)
    assert (module.kept_layers, module.parts) == (0, 1)
    assert [line.partition(": ")[2] for line in trainer.reported] == [
        "every layer recomputes its activations from now on"
    ]
    assert again == whole
    assert all(torch.equal(gradients[name], again_gradients[name]) for name in gradients)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_gradient_scaler_has_its_say_in_parts_too(built, monkeypatch, in_backward):
    class Scaler:
        def get_scale(self):
            return 512.0

    whole, gradients = learn(built(99)[0], PADDED, PADDED)
    monkeypatch.setattr(Plugin, "scaler", Scaler())
    halved, scaled = learn(built(2, in_backward)[0], PADDED, PADDED)
    assert [answers for *_, answers in halved] == [answers for *_, answers in whole]
    for name, gradient in gradients.items():
        assert (scaled[name] / 512 - gradient).norm() < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_subclass_has_its_say_in_parts_too(built, in_backward):
    """The subclass multiplies the loss; another replaces it by one that none of our gradients are a part of."""
    _, gradients = learn(built(99)[0], PADDED, PADDED)
    module, _ = built(2, in_backward)
    _, tripled = learn(module, PADDED, PADDED, factor=3.0)
    for name, gradient in gradients.items():
        assert (tripled[name] / 3 - gradient).norm() < 1e-5 * gradient.norm(), name
    module.zero_grad()
    module.training_step(PADDED, 0)
    module.backward(sum(value.sum() for value in adapter_parameters(module).values()))
    assert all(torch.equal(value.grad, torch.ones_like(value)) for value in adapter_parameters(module).values())


KEPT = []


class Keeps(torch.autograd.Function):
    """Keeps something for its backward, as layers do."""

    @staticmethod
    def forward(ctx, loss):
        ctx.kept = torch.zeros(1000)
        KEPT.append(weakref.ref(ctx.kept))
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + ctx.kept[0])


@pytest.mark.parametrize("in_backward", [False, True])
def test_nothing_of_the_failed_try_is_kept_for_the_next(built, monkeypatch, in_backward):
    """The loss is held by others, too: by Lightning, and by the warm-up step."""
    module, _ = built(2, in_backward)
    KEPT.clear()
    limited, alive = module.summed_loss, []

    def watched(batch):
        gc.collect()
        alive.append(sum(reference() is not None for reference in KEPT))
        loss, *rest = limited(batch)
        return Keeps.apply(loss), *rest

    monkeypatch.setattr(module, "summed_loss", watched)
    learn(module, PADDED)
    assert module.parts == 2
    assert alive == [0, 0, 0]  # whole, and its two halves


def test_recordings_give_way_first_and_are_gone_by_then(built, monkeypatch):
    monkeypatch.setattr(graphs, "_record", lambda run, pool: type("Rerun", (), {"replay": torch.enable_grad()(run)}))
    whole, gradients = learn(built(99, kept_layers=2)[0], PADDED, PADDED)
    module, trainer = built(99, kept_layers=2)
    module.model.train()
    module.train()
    module.uses_cuda_graphs, real, seen = True, module.summed_loss, []

    def limited(batch):
        seen.append((module.uses_cuda_graphs, module._graphs is not None))
        found = real(batch)
        if len(seen) == 2:  # recorded once, then short
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(module, "summed_loss", limited)
    again, again_gradients = learn(module, PADDED, PADDED)
    assert [line.partition(": ")[2] for line in trainer.reported] == ["kernels are no longer recorded"]
    assert seen == [(True, False), (True, True), (False, False)]
    assert (module.kept_layers, module.parts) == (2, 1)
    assert [answers for *_, answers in again] == [answers for *_, answers in whole]
    for name, gradient in gradients.items():
        assert (again_gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def test_halves_are_never_recorded(built, monkeypatch):
    """A second fit of a module that learns in halves asks for recordings again."""
    monkeypatch.setattr(graphs, "_record", lambda run, pool: type("Rerun", (), {"replay": torch.enable_grad()(run)}))
    _, gradients = learn(built(99)[0], PADDED, PADDED)
    module, _ = built(99)
    module.train()
    module.parts, module.uses_cuda_graphs = 2, True
    _, halved = learn(module, PADDED, PADDED)
    for name, gradient in gradients.items():
        assert (halved[name] - gradient).norm() < 1e-5 * gradient.norm(), name


SHARED = [collate(EXAMPLES[:2], 31), collate(EXAMPLES, 31), collate(EXAMPLES[1:3], 31), collate(EXAMPLES[3:], 31)]


def test_devices_record_each_others_lengths_at_the_same_time(built, monkeypatch):
    """None waits while another records; each micro-batch's gradients come from where it is computed."""
    monkeypatch.setattr(graphs, "padded", lambda rows, tokens: tokens)
    monkeypatch.setattr(graphs, "_record", lambda run, pool: type("Rerun", (), {"replay": torch.enable_grad()(run)}))
    recorded, computed = [], []
    for here in (range(4), (0, 3), (1, 2)):
        module, trainer = built(99)
        trainer.accumulate_grad_batches = 4
        module.train()
        module.uses_cuda_graphs, own, num_answers = True, [], 0
        for index, batch in enumerate(SHARED):
            output = module.training_step(batch._replace(is_here=index in here), index)
            module.backward(output["loss"])
            own.append([*module._graphs._recordings])
            num_answers += output["num_answers"]
        recorded.append(own)
        computed.append(num_answers)
    assert recorded[0] == recorded[1] == recorded[2]
    assert recorded[0][-1] == [(2, 12), (4, 15), (2, 15), (1, 9)]
    assert computed[0] == computed[1] + computed[2] == 66


def test_memory_that_runs_out_for_anothers_recording_ends_the_recordings(built, monkeypatch):
    def short(self, shape, like):
        raise torch.OutOfMemoryError

    module, trainer = built(99)
    module.train()
    module.uses_cuda_graphs = True
    monkeypatch.setattr(graphs.Graphs, "_record", short)
    assert module.training_step(PADDED._replace(is_here=False), 0)["num_answers"] == 0
    assert not module.uses_cuda_graphs
    assert module._graphs is None
    assert [line.partition(": ")[2] for line in trainer.reported] == ["kernels are no longer recorded"]
    found, _ = learn(module, PADDED)
    assert found[0][2] == len(PADDED.targets)


def test_layers_that_keep_no_more_are_recorded_anew(built, monkeypatch):
    monkeypatch.setattr(graphs, "_record", lambda run, pool: type("Rerun", (), {"replay": torch.enable_grad()(run)}))
    module, _ = built(99, kept_layers=2)
    module.train()
    module.uses_cuda_graphs, found = True, []
    for module.kept_layers in (2, 2, 0):
        learn(module, PADDED)
        found.append(module._graphs)
    assert found[0] is found[1] is not found[2]
    assert [run.kept_layers for run in found] == [2, 2, 0]


def test_when_nothing_more_can_be_done_it_says_so(built):
    module, _ = built(1)
    with pytest.raises(OutOfRoomError) as error:
        learn(module, PADDED)
    assert error.value.rows == 4
    assert "4 conversations, 60 tokens" in str(error.value)
    with pytest.raises(OutOfRoomError, match="a micro-batch of 1 conversation,"):
        learn(built(0)[0], collate(EXAMPLES[:1], 9))


MICRO_BATCHES = [
    collate(EXAMPLES[:2], 62), collate(EXAMPLES[1:], 62, packed=True), collate(EXAMPLES[2:], 62), collate(EXAMPLES, 62),
    collate(EXAMPLES[::2], 62),
]  # fmt: skip


@pytest.fixture
def in_an_epoch(built, make_model, monkeypatch):
    """A module that learns an epoch of `MICRO_BATCHES` in steps of some, so many at a time."""

    def make(together, accumulate, dropout=0.1, elsewhere=(), on_gpu=None, **memory):
        module, trainer = built(99)
        device = "cpu"
        if on_gpu is not None:
            device, module.model = "cuda", make_model(on_gpu)
            module.to(device)
            monkeypatch.setattr(Plugin, "forward_context", lambda _: torch.autocast("cuda", on_gpu))
        module.model.train()
        module.train()
        for name, part in module.model.named_modules():
            if name.endswith("lora_dropout.default"):
                part.p = dropout
        for name, value in {"together": together, "kept_layers": 1, **memory}.items():
            setattr(module, name, value)
        module._layers.clear()
        trainer.accumulate_grad_batches, trainer.is_last_batch = accumulate, False
        trainer.num_training_batches = len(MICRO_BATCHES)
        optimizer, steps, figures = torch.optim.SGD(adapter_parameters(module).values()), [], AnswerSums()
        for index, batch in enumerate(MICRO_BATCHES):
            torch.manual_seed(index)  # as `seed_by_position` does
            tensors = {name: getattr(batch, name).to(device) for name in ("input_ids", "positions", "targets")}
            output = module.training_step(batch._replace(is_here=index not in elsewhere, **tensors), index)
            if index % accumulate == 0:
                module.optimizer_zero_grad(0, index, optimizer)
            module.backward(output["loss"] / accumulate)
            figures.add(output)
            if (index + 1) % accumulate == 0 or index + 1 == len(MICRO_BATCHES):
                steps.append([value.grad.clone() for value in adapter_parameters(module).values()])
                steps.append([torch.tensor(value) for value in figures.state_dict().values()])
        return module, steps

    return make


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    for some, others in zip(found, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("accumulate", [2, 3, 5])
@pytest.mark.parametrize("memory", [{}, {"kept_layers": 0}, {"kept_layers": 2, "hosted_layers": 2}], ids=str)
def test_micro_batches_learned_together_change_no_bit(in_an_epoch, accumulate, memory):
    """However many at a time, padded or packed, with dropout, the epoch's short last step included."""
    _, expected = in_an_epoch(1, accumulate)
    assert all(gradient.any() for gradient in expected[0])
    for together in range(2, accumulate + 1):
        assert_same_bits(in_an_epoch(together, accumulate, **memory)[1], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [{}, {"kept_layers": 0}, {"kept_layers": 2, "hosted_layers": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu_micro_batches_learned_together_give_the_same(in_an_epoch, dtype, memory):
    """Equal but for the order in which kernels sum over tokens, which is not fixed."""
    _, expected = in_an_epoch(1, 3, on_gpu=dtype)
    _, found = in_an_epoch(3, 3, on_gpu=dtype, **memory)
    assert len(found) == len(expected) == 4
    for some, others in zip(found, expected, strict=True):
        for one, other in zip(some, others, strict=True):
            assert other.isfinite().all()
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3 * other.abs().max().item())


def test_another_devices_micro_batches_are_not_waited_for(in_an_epoch):
    _, expected = in_an_epoch(1, 3, elsewhere=(1, 4))
    assert_same_bits(in_an_epoch(2, 3, elsewhere=(1, 4))[1], expected)
    _, expected = in_an_epoch(1, 3, elsewhere=(2, 3))
    assert_same_bits(in_an_epoch(3, 3, elsewhere=(2, 3))[1], expected)


def test_each_weight_is_dequantised_once_for_micro_batches_together(in_an_epoch, monkeypatch):
    made, counts, real = [], [], Weights.get
    monkeypatch.setattr(Weights, "get", lambda self, *which: made.append(which) or real(self, *which))
    for together in (1, 5):
        made.clear()
        in_an_epoch(together, 5, kept_layers=2)
        counts.append(len(made))
    assert counts == [5 * (14 + 11), 14 + 11]  # forward and backward; the first layer's q, k and v pass nothing on


@pytest.mark.parametrize("in_backward", [False, True])
def test_when_memory_runs_out_they_are_learned_one_by_one(in_an_epoch, monkeypatch, in_backward):
    _, expected = in_an_epoch(1, 5)
    real, seen = QLoRAModule.summed_losses, []

    def short(module, waiting, earlier):
        seen.append(len(waiting))
        if len(waiting) > 1 and not in_backward:
            raise torch.OutOfMemoryError
        found = real(module, waiting, earlier)
        if len(waiting) > 1:
            found[0][0].register_hook(_fail_late(module))
        return found

    monkeypatch.setattr(QLoRAModule, "summed_losses", short)
    module, steps = in_an_epoch(2, 5)
    assert seen == [2, 1, 1]
    assert (module.together, module.kept_layers) == (1, 1)
    assert [line.partition(": ")[2] for line in module.trainer.reported] == [
        "each micro-batch is learned by itself from now on"
    ]
    assert_same_bits(steps, expected)


def test_a_loss_of_ones_own_is_not_left_out(tiny, make_model):
    class Weighted(QLoRAModule):
        def summed_loss(self, batch):
            loss, *rest = super().summed_loss(batch)
            return 2 * loss, *rest

    own, plain = Weighted(tiny.location), QLoRAModule(tiny.location)
    assert not own.can_learn_together
    assert plain.can_learn_together
    plain.uses_cuda_graphs = True
    assert not plain.can_learn_together
