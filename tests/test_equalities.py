"""The training of this project against the plainest loop there is, and accumulation against one large batch.

Two runs are compared per optimizer step, each from the same weights. AdamW's first steps are a sign of the gradient
times the rate: left to themselves, two loops that differ in the last bit part by more from step to step, and by how
much is a matter of the processor's kernels. A loss and a gradient from the same weights differ by rounding alone.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lit_qlora import demo
from lit_qlora.batch import Batch
from lit_qlora.cli import main
from lit_qlora.data.batching import BatchPlan
from lit_qlora.data.encode import Encoder
from lit_qlora.data.records import load_records
from lit_qlora.data.tokenizer import load_tokenizer
from lit_qlora.figures.lines import read_lines
from lit_qlora.model import graphs
from lit_qlora.model.module import QLoRAModule
from lit_qlora.quiet import quieten

STEPS = 4
SAME = ["--trainer.max_steps", str(STEPS), "--trainer.log_every_n_steps", "1", "--samples.count", "0",
        "--trainer.limit_val_batches", "1", "--model.schedule", "constant", "--model.warmup_ratio", "0",
        "--model.learning_rate", "0.003", "--model.adapter", "start", "--model.rank", "8",
        "--data.max_length", "128", "--trainer.gradient_clip_val", "1.0"]  # fmt: skip


LOSS_ROUNDING = 1e-5
"""Relative bound of an fp32 loss summed in another order; 1.2e-6 is the most that any kernels here show."""
GRADIENT_ROUNDING = 1e-4
"""Bound of a tensor's gradient, relative to its norm: parts of it cancel; 2e-7 is usual, and 5.4e-6 the most."""


@dataclass
class Steps:
    """What the optimizer steps of a run learned from, and where they led: LoRA's tensors, in order."""

    gradients: list[list[torch.Tensor]] = field(default_factory=list)
    weights: list[list[torch.Tensor]] = field(default_factory=list)


@contextmanager
def steps_of(other: Steps | None = None) -> Iterator[Steps]:
    """Collects the steps of what runs inside; after each, the weights become those of ``other``."""
    found = Steps()

    def after(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        found.gradients.append([parameter.grad.clone() for parameter in parameters])
        found.weights.append([parameter.detach().clone() for parameter in parameters])
        if other:
            for parameter, value in zip(parameters, other.weights[len(found.weights) - 1], strict=True):
                parameter.data.copy_(value)

    hook = register_optimizer_step_post_hook(after)
    try:
        yield found
    finally:
        hook.remove()


Found = tuple[Steps, list[dict[str, float]]]


def fit(run: str, *options: str, other: Steps | None = None) -> Found:
    """A run of the command line; returns its steps, and its figures without those of before the first."""
    shutil.rmtree(Path("runs", run), ignore_errors=True)
    with steps_of(other) as steps:
        assert main(["fit", "--run", run, *SAME, *options]) == 0
    return steps, [*read_lines(Path("runs", run, "metrics.jsonl"))][1:]


def assert_same(one: Found, other: Found, names: str) -> None:
    """The figures called ``names``, and every gradient, are equal but for rounding."""
    assert len(one[0].gradients) == len(other[0].gradients) == sum("train/loss" in line for line in one[1]) == STEPS
    for line, found in zip(one[1], other[1], strict=True):
        for name in {*names.split()} & {*line}:
            assert found[name] == pytest.approx(line[name], rel=LOSS_ROUNDING), (line["step"], name)
    for step, (wanted, got) in enumerate(zip(one[0].gradients, other[0].gradients, strict=True)):
        for index, (gradient, found) in enumerate(zip(wanted, got, strict=True)):
            assert (found - gradient).norm() < GRADIENT_ROUNDING * gradient.norm(), (step, index)


def _plain_base() -> LlamaForCausalLM:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    return LlamaForCausalLM.from_pretrained(demo.BASE, quantization_config=quantization, dtype=torch.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter to start from, made by plain peft, whose second matrix is not zero."""
    place = tmp_path_factory.mktemp("place")
    quieten()  # peft calls an old name of transformers
    torch.manual_seed(7)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(_plain_base(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(place / "start", save_embedding_layers=False)
    return place


@pytest.fixture
def start(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@cache
def whole(*options: str) -> Found:
    """A run in which nothing happens, made once for all that are held against it."""
    return fit(f"whole-{'-'.join(options)}".replace("--", ""), *options)


def test_losses_equal_a_plain_loop(start: None) -> None:
    """Against transformers + peft with full logits, no Lightning and no chunks: losses, gradients and AdamW's steps."""
    steps, figures = whole()

    model = PeftModel.from_pretrained(_plain_base(), "start", is_trainable=True).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.003, weight_decay=0.0)
    encoder = Encoder(load_tokenizer("demo"), max_length=128)
    examples = list(encoder.examples(load_records("demo", "train").conversations))
    lengths = [len(example.input_ids) for example in examples if example]
    plain, losses = Steps(), []
    for step, rows in enumerate(BatchPlan(rows=4).epoch(lengths, seed=42, epoch=0)[:STEPS]):
        width = max(lengths[row] for row in rows)
        ids = torch.full((len(rows), width), 0)
        labels = torch.full((len(rows), width), -100)
        for index, row in enumerate(rows):
            ids[index, : lengths[row]] = torch.tensor(examples[row].input_ids)
            labels[index, : lengths[row]] = torch.tensor(examples[row].labels)
        mask = (torch.arange(width) < torch.tensor([[lengths[row]] for row in rows])).long()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        plain.gradients.append([parameter.grad.clone() for parameter in parameters])
        losses.append({"step": step + 1, "train/loss": loss.item()})
        for parameter, gradient in zip(parameters, steps.gradients[step], strict=True):
            parameter.grad.copy_(gradient)  # so that the next step is from the same weights
        optimizer.step()
        optimizer.zero_grad()
        for parameter, weight in zip(parameters, steps.weights[step], strict=True):
            torch.testing.assert_close(parameter.data, weight, rtol=1e-6, atol=1e-8)
    assert_same((plain, losses), (steps, [line for line in figures if "train/loss" in line]), "train/loss")


def test_four_times_one_equals_one_times_four(start: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of unequal length, so that a mean of means would show."""

    def in_order(plan: BatchPlan, lengths: list[int], seed: int, epoch: int) -> list[list[int]]:
        rows = sorted(range(len(lengths)), key=lambda row: (row * 7919) % len(lengths))
        return [rows[at : at + plan.rows] for at in range(0, len(rows), plan.rows)]

    monkeypatch.setattr(BatchPlan, "epoch", in_order)
    one = fit("one", "--data.batch_size", "4")
    four = fit("four", "--data.batch_size", "1", "--trainer.accumulate_grad_batches", "4", other=one[0])
    assert_same(one, four, "train/loss train/gradient_norm")


@pytest.mark.parametrize(("accumulate", "in_backward"), [(1, False), (2, True)])
def test_halved_after_running_out_of_memory_equals_not_halved(
    start: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], accumulate: int, in_backward: bool
) -> None:
    """Through the Trainer, which zeroes gradients between forward and backward: losses, norms and the adapter."""
    same = ["--trainer.accumulate_grad_batches", str(accumulate), "--model.checkpointing", "full"]
    expected = whole(*same)
    real = QLoRAModule.summed_loss

    def short(self: QLoRAModule, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int]:
        is_short = len(batch.rows) > 2 and torch.is_grad_enabled()
        if is_short and not in_backward:
            raise torch.OutOfMemoryError
        found = real(self, batch)
        if is_short:
            found[0].register_hook(lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        return found

    monkeypatch.setattr(QLoRAModule, "summed_loss", short)
    capsys.readouterr()
    halved = fit("halved", *same, other=expected[0])
    assert capsys.readouterr().out.count("each micro-batch is split into halves from now on") == 1
    assert_same(expected, halved, "train/loss train/gradient_norm val/loss")


@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize("uses_cuda_graphs", [False, True])
def test_memory_that_runs_out_in_backward_loses_no_gradient_of_the_step(
    start: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], uses_cuda_graphs: bool, at: int
) -> None:
    """Memory runs out at the first or second micro-batch of a step; a recording stands for itself on the CPU."""
    accumulated = ("--trainer.accumulate_grad_batches", "2")
    expected = whole(*accumulated)
    monkeypatch.setattr(graphs, "_record", lambda run, pool: SimpleNamespace(replay=torch.enable_grad()(run)))
    real, real_configure, seen = QLoRAModule.summed_loss, QLoRAModule.configure_model, [0]

    def configure(self: QLoRAModule) -> None:
        real_configure(self)
        self.uses_cuda_graphs = uses_cuda_graphs

    def short_once(self: QLoRAModule, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int]:
        found = real(self, batch)
        seen[0] += torch.is_grad_enabled()
        if torch.is_grad_enabled() and seen[0] == at:
            found[0].register_hook(lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        return found

    monkeypatch.setattr(QLoRAModule, "configure_model", configure)
    monkeypatch.setattr(QLoRAModule, "summed_loss", short_once)
    capsys.readouterr()
    again = fit("again", *accumulated, other=expected[0])
    done = (
        "kernels are no longer recorded" if uses_cuda_graphs else "every layer recomputes its activations from now on"
    )
    assert capsys.readouterr().out.count(f": {done}") == 1
    assert_same(expected, again, "train/loss train/gradient_norm val/loss")


def test_our_layers_learn_what_transformers_own_learn_and_rows_of_logits_change_nothing(
    start: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One option each: the losses and gradients of a fit are the same but for rounding."""
    real, calls = LlamaDecoderLayer.forward, []

    def forward(self: LlamaDecoderLayer, *args: object, **options: object) -> object:
        calls.append(self)
        return real(self, *args, **options)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    ours = whole()
    names = "train/loss train/gradient_norm val/loss"
    assert_same(ours, fit("rows", "--model.loss_rows", "7", other=ours[0]), names)
    assert not calls
    assert_same(ours, fit("theirs", "--model.own_layers", "false", other=ours[0]), names)
    assert calls
