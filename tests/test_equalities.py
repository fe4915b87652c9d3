"""The training of this project against the plainest loop there is, and accumulation against one large batch."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from lit_qlora import demo
from lit_qlora.batch import Batch
from lit_qlora.callbacks.metrics import read_metrics
from lit_qlora.cli import main
from lit_qlora.data.batching import BatchPlan
from lit_qlora.data.encode import Encoder
from lit_qlora.data.records import load_records
from lit_qlora.data.tokenizer import load_tokenizer
from lit_qlora.model import graphs
from lit_qlora.model.module import QLoRAModule
from lit_qlora.quiet import quieten

STEPS = 6
SAME = ["--trainer.max_steps", str(STEPS), "--trainer.log_every_n_steps", "1", "--samples.count", "0",
        "--trainer.limit_val_batches", "1", "--model.schedule", "constant", "--model.warmup_ratio", "0",
        "--model.learning_rate", "0.003", "--model.adapter", "start", "--model.rank", "8",
        "--data.max_length", "128", "--trainer.gradient_clip_val", "1.0"]  # fmt: skip


def _plain_base() -> LlamaForCausalLM:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    return LlamaForCausalLM.from_pretrained(demo.BASE, quantization_config=quantization, dtype=torch.float32)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter to start from, made by plain peft, whose second matrix is not zero."""
    monkeypatch.chdir(tmp_path)
    quieten()  # peft calls an old name of transformers
    torch.manual_seed(7)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(_plain_base(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained("start", save_embedding_layers=False)
    return tmp_path


def test_losses_equal_a_plain_loop(start: Path) -> None:
    """Per optimizer step, against transformers + peft with full logits, no Lightning and no chunks, to 1e-5."""
    assert main(["fit", "--run", "ours", *SAME]) == 0
    ours = [line["train/loss"] for line in read_metrics(Path("ours/metrics.jsonl"))[1:]]

    model = PeftModel.from_pretrained(_plain_base(), "start", is_trainable=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.003, weight_decay=0.0)
    encoder = Encoder(load_tokenizer("demo"), max_length=128)
    examples = list(encoder.examples(load_records("demo", "train").conversations))
    lengths = [len(example.input_ids) for example in examples if example]
    losses = []
    for rows in BatchPlan(rows=4).epoch(lengths, seed=42, epoch=0)[:STEPS]:
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
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert ours == pytest.approx(losses, abs=1e-5)
    assert len(ours) == STEPS


def test_four_times_one_equals_one_times_four(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of unequal length, so that a mean of means would show."""

    def in_order(plan: BatchPlan, lengths: list[int], seed: int, epoch: int) -> list[list[int]]:
        rows = sorted(range(len(lengths)), key=lambda row: (row * 7919) % len(lengths))
        return [rows[at : at + plan.rows] for at in range(0, len(rows), plan.rows)]

    monkeypatch.setattr(BatchPlan, "epoch", in_order)
    assert main(["fit", "--run", "one", *SAME, "--data.batch_size", "4"]) == 0
    four = ["--data.batch_size", "1", "--trainer.accumulate_grad_batches", "4"]
    assert main(["fit", "--run", "four", *SAME, *four]) == 0
    one_loss, four_loss = (
        [line["train/loss"] for line in read_metrics(Path(run, "metrics.jsonl"))[1:]] for run in ("one", "four")
    )
    assert four_loss == pytest.approx(one_loss, abs=1e-5)
    one_weights, four_weights = (load_file(f"{run}/adapter/adapter_model.safetensors") for run in ("one", "four"))
    for name, value in one_weights.items():
        torch.testing.assert_close(four_weights[name], value, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("in_backward", [False, True])
def test_halved_after_running_out_of_memory_equals_not_halved(
    start: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], accumulate: int, in_backward: bool
) -> None:
    """Through the Trainer, which zeroes gradients between forward and backward: losses, norms and the adapter."""
    same = [*SAME, "--trainer.accumulate_grad_batches", str(accumulate), "--model.checkpointing", "full"]
    assert main(["fit", "--run", "whole", *same]) == 0
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
    assert main(["fit", "--run", "halved", *same]) == 0
    assert capsys.readouterr().out.count("each micro-batch goes in two halves from now on") == 1
    figures = [read_metrics(Path(run, "metrics.jsonl")) for run in ("whole", "halved")]
    for one, other in zip(*figures, strict=True):
        for name in {"train/loss", "train/gradient_norm", "val/loss"} & {*one}:
            assert other[name] == pytest.approx(one[name], rel=1e-4), (one["step"], name)
            assert other[name] > 0
    whole, halved = (load_file(f"{run}/adapter/adapter_model.safetensors") for run in ("whole", "halved"))
    for name, weight in whole.items():
        assert (halved[name] - weight).norm() < 1e-3 * weight.norm(), name


@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize("replays", [False, True])
def test_memory_that_runs_out_in_backward_loses_no_gradient_of_the_step(
    start: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], replays: bool, at: int
) -> None:
    """At the first or the second micro-batch of an optimizer step; a recording stands for itself on the CPU."""
    monkeypatch.setattr(graphs, "_record", lambda run, pool: SimpleNamespace(replay=torch.enable_grad()(run)))
    real, real_configure, seen = QLoRAModule.summed_loss, QLoRAModule.configure_model, [0]

    def configure(self: QLoRAModule) -> None:
        real_configure(self)
        self.replays = replays

    def short_once(self: QLoRAModule, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int]:
        found = real(self, batch)
        seen[0] += torch.is_grad_enabled()
        if torch.is_grad_enabled() and seen[0] == at:
            found[0].register_hook(lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        return found

    monkeypatch.setattr(QLoRAModule, "configure_model", configure)
    same = [*SAME, "--trainer.accumulate_grad_batches", "2"]
    assert main(["fit", "--run", "whole", *same]) == 0
    monkeypatch.setattr(QLoRAModule, "summed_loss", short_once)
    capsys.readouterr()
    assert main(["fit", "--run", "again", *same]) == 0
    done = "kernels are no longer recorded" if replays else "every layer computes its inside again from now on"
    assert capsys.readouterr().out.count(f": {done}") == 1
    figures = [read_metrics(Path(run, "metrics.jsonl")) for run in ("whole", "again")]
    for one, other in zip(*figures, strict=True):
        for name in {"train/loss", "train/gradient_norm", "val/loss"} & {*one}:
            assert other[name] == pytest.approx(one[name], rel=1e-4), (one["step"], name)


def test_our_layers_learn_what_transformers_own_learn_and_rows_of_logits_change_nothing(tmp_path, monkeypatch):
    """One option each: the losses of a whole fit, and its adapter, are the same but for rounding."""
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--trainer.max_steps", "4", "--samples.count", "0", "--trainer.limit_val_batches", "1",
            "--trainer.log_every_n_steps", "1", "--data.max_length", "96"]  # fmt: skip
    losses = {}
    for name, given in {
        "ours": [],
        "theirs": ["--model.own_layers", "false"],
        "rows": ["--model.loss_rows", "7"],
    }.items():
        assert main([*args, "--run", name, *given]) == 0
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        losses[name] = [line["train/loss"] for line in lines if line["step"]]
    assert losses["theirs"] == pytest.approx(losses["ours"], rel=1e-5)
    assert losses["rows"] == pytest.approx(losses["ours"], rel=1e-5)
    assert losses["theirs"] != losses["ours"]  # other kernels: it was they that ran
