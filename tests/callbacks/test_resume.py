"""The real thing, 4-bit base, LoRA dropout, recomputed activations: a resume ends the same to the last bit."""

import json

import pytest
import torch

from lit_qlora.model.module import QLoRAModule
from lit_qlora.storage.state import load_state


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama of 2 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


OPTIONS = {
    "save_every_steps": 3,
    "accumulate_grad_batches": 2,
    "val_check_interval": 5,
    "max_epochs": 2,
    "log_every_n_steps": 2,
}


def fit(full_run, rows, base, folder, checkpoint=None):
    torch.manual_seed(7)  # of the new adapter
    parts = full_run(folder, **OPTIONS)
    module = QLoRAModule(base, rank=4, dropout=0.2, learning_rate=1e-2)
    parts.trainer.fit(module, datamodule=rows(15), ckpt_path=checkpoint)
    return parts.run


def lines(run, until=10**6):
    found = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith("speed/")}
        for line in found
        if line["step"] < until
    ]


def state(run, step):
    found = load_state(run.checkpoint(step))
    return found["state_dict"], found["optimizer_states"], found["lr_schedulers"]


def test_a_resume_from_every_checkpoint_ends_the_same_to_the_last_bit(full_run, rows, base, tmp_path):
    whole = fit(full_run, rows, base, tmp_path / "whole")
    *steps, last = whole.saved_steps()
    assert [*steps, last] == [3, 6, 9, 12, 15, 16]
    for step in steps:
        folder = tmp_path / f"from-{step}"
        folder.mkdir()
        kept = "".join(f"{json.dumps(line)}\n" for line in lines(whole, until=step))
        (folder / "metrics.jsonl").write_text(kept, encoding="utf-8")
        resumed = fit(full_run, rows, base, folder, whole.checkpoint(step))
        torch.testing.assert_close(state(resumed, last), state(whole, last), rtol=0, atol=0)
        assert lines(resumed) == lines(whole)
        for name in ("adapter_model.safetensors", "result.json"):
            assert (resumed.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(full_run, rows, base, tmp_path):
    run = fit(full_run, rows, base, tmp_path / "run")
    weights, *_ = state(run, 3)
    assert all("lora_" in name for name in weights)
    adapter_bytes = sum(weight.numel() * 4 for weight in weights.values())
    found = sum(file.stat().st_size for file in run.checkpoint(3).iterdir())
    assert found < 3 * adapter_bytes + 48 * 1024  # weights, AdamW's two, names and numbers
