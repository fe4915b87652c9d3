"""The verb plan, as a user gives it: the table adds up, mistakes are one line, the last line is the verdict."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import csv_logs
from safetensors.torch import load_file, save_file

from lit_qlora import demo
from lit_qlora.cli import main
from lit_qlora.data.held_out import Parts
from lit_qlora.model.shape import LLAMA_2_SIZES
from lit_qlora.tools import plan as plan_verb

T4 = str(Path(__file__).parents[2] / "configs" / "colab_t4.yaml")


@pytest.fixture
def plan(capsys, monkeypatch, tmp_path):
    """Runs the verb in an empty folder and without a GPU; returns its lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_verb, "current_card", lambda: None)

    def plan(*args, status=0, verb="plan"):
        assert main([verb, *args]) == status
        shown = capsys.readouterr()
        assert (shown.err == "") == (status == 0)
        return (shown.err or shown.out).rstrip("\n").split("\n")

    return plan


def figures(lines):
    return {line[:52].strip(): float(line[52:60]) for line in lines if re.match(r"  .{50} *\d+\.\d\d", line)}


def test_the_full_guanaco_on_a_t4(plan):
    lines = plan("--config", T4)
    assert lines[0].startswith("NousResearch/Llama-2-7b-hf in 4-bit, card: T4, assumed: give --gpu NAME for another;")
    assert lines[-1] == "fits: 12.92 of 14.56 GiB"
    found = figures(lines)
    assert found["base: linear layers in 4 bits, the rest in 16"] == 3.60
    assert found["download of the base"] == 12.55
    assert any("(assumed: 9,846 rows, their lengths as Guanaco's)" in line for line in lines)
    assert any("precision 16-mixed (compute capability 7.5 has no bf16)" in line for line in lines)


@pytest.mark.parametrize(
    "args", [["--config", T4], ["--config", T4, "--model.checkpointing", "none"], ["--config", T4, "--gpu", "h200"], []]
)
def test_the_parts_add_up(plan, args):
    found = figures(plan(*args))
    names = list(found)
    allocated = names.index("allocated (torch.cuda.max_memory_allocated)")
    parts = [found[name] for name in names[:allocated]]
    assert sum(parts) == pytest.approx(found[names[allocated]], abs=0.005 * (len(parts) + 1))
    whole = next(index for index, name in enumerate(names) if name.startswith("in all"))
    assert sum(found[name] for name in names[allocated:whole]) == pytest.approx(found[names[whole]], abs=0.02)


@pytest.mark.parametrize(
    "more", [["--trainer.devices", "2"], ["--trainer.num_nodes", "2"], ["--trainer.devices", "[0, 1]"]]
)
def test_a_plan_for_two_cards(plan, more):
    accumulated = ["--config", T4, "--trainer.accumulate_grad_batches", "4"]
    one, two = plan(*accumulated), plan(*accumulated, *more)
    needed = [float(re.search(r"fits: ([\d.]+)", lines[-1])[1]) for lines in (one, two)]
    assert max(needed) <= 0.9 * 14.56  # which auto fills, with NCCL's memory or without
    full = ("--model.checkpointing", "full")
    parts = [figures(plan(*accumulated, *full, *cards)) for cards in ((), more)]
    whole = [found.pop(next(name for name in found if name.startswith("in all"))) for found in parts]
    nccl = parts[1].pop("NCCL's own, of 2 cards: published, not measured")
    assert (nccl, parts[0]) == (0.5, parts[1]) and whole[1] - whole[0] == pytest.approx(nccl, abs=0.011)
    (line,) = (line for line in two if "such cards" in line)
    assert re.match(r"  on 2 such cards, each of which works 9\d% of the time, by the rows' lengths; they exch", line)
    speeds = [re.search(r"an epoch takes .*: ([\d,]+) to", " ".join(lines))[1] for lines in (one, two)]
    slow, fast = (int(speed.replace(",", "")) for speed in speeds)
    assert 1.7 < fast / slow < 2


def test_what_does_not_fit_says_what_would(plan):
    lines = plan("--config", T4, "--model.rank", "64", "--model.checkpointing", "none")
    assert re.fullmatch(r"does not fit: 18\.\d\d of 14\.56 GiB; 12\.\d\d with --model\.checkpointing auto", lines[-1])


@pytest.mark.parametrize(
    ("base", "longest"), [("demo", 1024), ("meta-llama/Llama-2-7b-hf", 4096), ("NousResearch/Llama-2-13b-hf", 4096)]
)
def test_rows_longer_than_the_context_are_refused(plan, base, longest, expect_error):
    options = ["--model.base", base, "--data.source", "demo", "--gpu", "h200", "--data.max_length"]
    assert plan(*options, str(longest))[-1].startswith("fits")
    words = f"{longest:,} tokens", f"max_position_embeddings of {base}", longest + 1
    expect_error(["plan", *options, str(longest + 1)], *words, option="data.max_length")


def test_what_a_fit_refuses_is_refused(expect_error):
    args = ["plan", "--model.cuda_graphs", "true", "--data.packing", "true", "--data.batch_tokens", "512"]
    expect_error(args, "auto or false", "data.packing", option="model.cuda_graphs")


@pytest.mark.parametrize(
    ("trainer", "named"),
    [
        ("callbacks: [{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 2}}}]", "Accumulation"),
        ("callbacks: {class_path: WeightAveraging}", "WeightAveraging"),
        ("callbacks: [{class_path: EarlyStopping, init_args: {monitor: nope}}]", "'nope'"),
        (
            "{limit_val_batches: 0, callbacks: {class_path: EarlyStopping, init_args: {monitor: val/loss}}}",
            "'val/loss'",
        ),
        ("plugins: lightning.pytorch.plugins.environments.SLURMEnvironment", "SLURMEnvironment"),
    ],
    ids=range(5),
)
def test_a_class_of_ones_own_that_a_fit_refuses_is_refused_in_the_same_words(trainer, named, capsys, plan):
    Path("my.yaml").write_text(f"trainer:\n  {trainer}\n" if trainer[0] != "{" else f"trainer: {trainer}\n")
    said = []
    for verb in ("fit", "plan"):
        assert main([verb, "--config", "my.yaml"]) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    assert said[1].startswith("error: trainer.") and named in said[1] and said[1].count("\n") == 1


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (
            "config.json",
            {"quantization_config": {"load_in_4bit": True}},
            "the weights are in 16 bits; take that key out",
        ),
        ("config.json", {"num_hidden_layers": "3"}, "config.json: num_hidden_layers: expected a whole number"),
        ("tokenizer_config.json", {"eos_token": ""}, "has an empty eos_token"),
    ],
)
def test_a_base_that_a_fit_refuses_is_refused(capsys, tmp_path, name, changes, expected):
    base = shutil.copytree(demo.BASE, tmp_path / "base")
    (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | changes))
    assert main(["plan", "--model.base", str(base)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_recorded_kernels_are_the_first_to_go(plan):
    line = plan("--config", T4, "--gpu", "h100", "--gpu-gib", "8")[-1]
    assert line == "does not fit: 9.66 of 8.00 GiB; 7.12 with --model.cuda_graphs false"


def test_what_the_change_gives_fits_when_plan_runs_again(plan):
    line = plan("--config", T4, "--gpu-gib", "6.5")[-1]
    words = re.fullmatch(r"does not fit: 6\.97 of 6\.50 GiB; 5\.\d\d with (.*)", line)[1]
    assert plan("--config", T4, "--gpu-gib", "6.5", *words.split())[-1].startswith("fits: 5.")


def test_a_change_that_takes_all_of_the_card_may_fit(plan):
    line = plan("--config", T4, "--gpu-gib", "5.2")[-1]
    assert line.startswith("does not fit: 6.97 of 5.20 GiB; may fit, within 10% of the card: 5.1")


@pytest.fixture
def with_biases(tmp_path):
    """An adapter as peft makes it with lora_bias."""
    folder = tmp_path / "with-biases"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "lora_bias": True}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    layers = range(32)
    names = [*(f"self_attn.{name}" for name in "qkvo"), *(f"mlp.{name}" for name in ("gate", "up", "down"))]
    keys = [f"base_model.model.model.layers.{layer}.{name}_proj.lora_A.weight" for layer in layers for name in names]
    save_file({key: torch.zeros(16, 8) for key in keys}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def with_gelu(tmp_path):
    """The config.json of a base of Llama 2's sizes with another activation."""
    config = LLAMA_2_SIZES["7b"] | {"architectures": ["LlamaForCausalLM"], "hidden_act": "gelu"}
    (tmp_path / "with-gelu").mkdir()
    (tmp_path / "with-gelu" / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("slow", "why"),
    [
        (["--model.dora", "true"], "DoRA"),
        (["--model.own_layers", "false"], "model.own_layers is false"),
        (["--model.adapter", "with-biases"], "LoRA with a bias (lora_bias)"),
        (["--model.base", "with-gelu"], "an activation or a dropout that is not Llama's"),
    ],
)
def test_transformers_own_layers_are_not_promised_to_fit(plan, with_biases, with_gelu, slow, why):
    lines = plan("--config", T4, *slow)
    assert f"  transformers' own layers take more time and memory than these figures: {why}" in lines
    assert lines[-1].startswith("may fit, what transformers' own layers take beside not counted: ")
    assert any(line.endswith("; all 32 layers recompute their activations") for line in lines)
    assert not any(line.startswith(("quicker", "micro-batch and checkpointing")) for line in lines)
    assert not any("CUDA graphs" in line for line in plan("--config", T4, "--gpu", "h200", *slow))


def test_a_change_of_transformers_own_layers_may_fit(plan):
    line = plan("--config", T4, "--model.own_layers", "false", "--model.checkpointing", "none")[-1]
    own = "may fit, what transformers' own layers take beside not counted"
    assert line == f"does not fit: 16.71 of 14.56 GiB; {own}: 6.97 with --model.checkpointing auto"


def test_an_adapters_own_ranks_count_and_no_other_rank_is_advised(plan, with_biases):
    config = json.loads((with_biases / "adapter_config.json").read_text()) | {"lora_bias": False}
    (with_biases / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    start = ["--config", T4, "--model.adapter", "with-biases"]
    uniform = figures(plan(*start))["adapter, fp32"]
    assert uniform == figures(plan("--config", T4))["adapter, fp32"] == 0.15
    assert "--model.rank" not in plan(*start, "--gpu-gib", "5.2")[-1]
    assert "--model.rank" in plan("--config", T4, "--gpu-gib", "5.2")[-1]
    weights = load_file(with_biases / "adapter_model.safetensors")
    weights |= {name: torch.zeros(256, 8) for name in weights if ".down_proj." in name}
    save_file(weights, with_biases / "adapter_model.safetensors")
    (with_biases / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {"down_proj": 256}}))
    larger = 32 * (256 - 16) * (4096 + 11008) * 4 / 1024**3
    assert figures(plan(*start))["adapter, fp32"] == pytest.approx(uniform + larger, abs=0.01)


def test_prompts_of_ones_own_are_left_out_by_an_option_that_does_it(plan):
    prompts = ["--samples.prompts", json.dumps(["a"] * 16), "--samples.max_new_tokens", "1024"]
    start = ["--config", T4, *prompts, "--data.batch_size", "1", "--gpu-gib", "6.4"]
    advised = re.search(r"with (--samples.prompts null --samples.count 0.*)", plan(*start)[-1])
    assert advised, plan(*start)[-1]
    assert "fits" in plan(*start, *advised[1].split())[-1]


def test_more_rows_of_logits_take_more_memory(plan):
    logits = [
        figures(plan("--config", T4, "--model.loss_rows", rows, "--model.checkpointing", "none"))[
            "loss: some rows' logits, hidden states"]
        for rows in ("1024", "4096")
    ]  # fmt: skip
    assert logits[1] - logits[0] == pytest.approx((3522 - 1024) * (32_000 * 6 + 2 * 4096) / 1024**3, abs=0.02)


def test_what_never_fits(plan):
    lines = plan("--config", T4, "--model.base", "meta-llama/Llama-2-70b-chat-hf", "--gpu-gib", "2")
    assert lines[-1].endswith("and no setting does; take a larger card or a smaller base")


def test_cards_that_share_a_base(plan):
    """Cards share a base that does not fit whole; the host's memory is used only where it was asked for."""
    base = ("--config", T4, "--model.base", "meta-llama/Llama-2-70b-chat-hf", "--model.rank", "8",
            "--data.max_length", "512", "--data.batch_size", "1")  # fmt: skip
    two = ("--gpu", "4090", "--trainer.devices", "2", "--trainer.accumulate_grad_batches", "2", "--samples.count", "0")
    lines = plan(*base, *two)
    assert figures(lines)["its two layers that are whole at a time"] == pytest.approx(0.82, abs=0.01)
    assert any("model.shard: each card keeps 1/2 of the base's layers, 16.44 GiB" in line for line in lines)
    assert any("34.4 GB per micro-batch, 34.4 GB per step" in line for line in lines)
    lines = plan(*base, *two, "--model.shard", "true", "--model.shard_to", "host")
    assert figures(lines)["base's layers on the host, page-locked"] == pytest.approx(32.89, abs=0.01)
    (line,) = plan(*base, "--model.shard", "true", status=2)
    assert line.startswith(
        "error: model.shard: true, and one device has nothing to share with; give --trainer.devices 2"
    )


def test_bare_it_plans_the_demo_on_a_t4_with_counted_tokens(plan):
    lines = plan()
    assert lines[0].startswith("demo in 4-bit, card: T4, assumed: give --gpu NAME")
    assert any("848 rows, 39,738 tokens (counted)" in line for line in lines)
    assert "  download of the base: it is here                      0.00" in lines
    assert lines[-1].startswith("fits: 0.4")


def test_other_cards(plan):
    assert plan("--config", T4, "--gpu", "h200")[-1] == "fits: 32.67 of 139.72 GiB"  # weights stay dequantised
    lines = plan("--config", T4, "--gpu-gib", "7.5")
    assert lines[-1] == "may fit, within 10% of the card: 6.97 of 7.50 GiB"
    assert any("no forecast of the time: the rates of a card of 7.5 GiB" in line for line in lines)
    assert plan("--config", T4, "--gpu", "a100", "--gpu-gib", "5")[-1].startswith("does not fit: 6.97 of 5.00 GiB")


def test_a_card_known_by_its_memory_is_taken_for_one_without_bf16(plan):
    assumed = "; precision 16-mixed (compute capability 7.5 is assumed; --gpu-capability gives another)"
    assert any(line.endswith(assumed) for line in plan("--config", T4, "--gpu-gib", "16"))
    given = plan("--config", T4, "--gpu_gib", "16", "--gpu_capability", "8.6")
    assert any(line.endswith("; precision bf16-mixed (compute capability 8.6)") for line in given)
    # What asks for more than such a card has is no mistake: the user knows the card.
    assumed = "; precision bf16-mixed (compute capability 8.0 is assumed; --gpu-capability gives another)"
    lines = plan("--config", T4, "--gpu-gib", "16", "--trainer.precision", "bf16-mixed")
    assert any(line.endswith(assumed) for line in lines)


def test_a_named_card_keeps_its_own_capability(plan):
    lines = plan("--config", T4, "--gpu", "a100", "--gpu-gib", "20")
    assert any(line.endswith("precision bf16-mixed (compute capability 8.0)") for line in lines)


def test_a_folder_needs_no_more_than_its_config(plan, tmp_path):
    config = LLAMA_2_SIZES["7b"] | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    lines = plan("--config", T4, "--model.base", "base")
    assert lines[0].startswith("base in 4-bit, card: T4, assumed: give --gpu NAME")
    assert "  download of the base                                 12.55" in lines
    assert lines[-1] == "fits: 12.92 of 14.56 GiB"


def test_rows_at_hand_without_their_tokenizer_are_estimated(plan, tmp_path):
    row = '{"text": "### Human: ' + 33 * "abcde " + "### Assistant: " + 66 * "abcde " + '"}\n'
    Path(tmp_path / "train.jsonl").write_text(row * 40 + row.replace("abcde", "other") * 40)
    lines = plan("--config", T4, "--data.source", "train.jsonl")
    assert any("estimated from 3.3 characters per token: the tokenizer is not here" in line for line in lines)
    # One of the two different conversations is held out; 197 and 395 characters, and 6 tokens for each turn.
    assert any(f"40 rows, {40 * (12 + round((197 + 395) / 3.3)):,} tokens" in line for line in lines)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("10", "an epoch: 40 of 9,846 rows, 22,132 tokens"),
        ("0.5", "an epoch: 4,922 of 9,846 rows, 2,107,814 tokens"),
    ],
)
def test_an_epoch_ends_where_it_is_set_to(plan, limit, words):
    assert any(line.startswith(words) for line in plan("--config", T4, "--trainer.limit_train_batches", limit))


def test_prompts_of_the_users_own_are_measured(plan):
    prompts = [
        "a",
        "what is in a sentence that is much longer than all of the held-out ones of the demo are, or is it?",
    ]
    line = next(line for line in plan("--samples.prompts", json.dumps(prompts)) if "sample answers:" in line)
    assert re.fullmatch(r"  sample answers: 2 prompts of (4|5|6)\d tokens, 48 new ones each", line)
    held_out = next(line for line in plan() if "sample answers:" in line)
    assert held_out == "  sample answers: 8 prompts of 29 tokens, 48 new ones each"


def test_a_run_of_a_few_steps(plan):
    lines = plan("--config", T4, "--trainer.max_steps", "1231")
    assert any("the run, 0.5 epochs" in line for line in lines)


def test_paged_state_goes_to_the_host(plan):
    found = figures(plan("--config", T4, "--model.rank", "64", "--model.optimizer", "paged_adamw"))
    assert found["optimizer state that can be paged out to it"] == 1.19


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--modl.rank", "3"], "error: unknown option 'modl.rank'; did you mean 'model.rank'?"),
        (["--model.rank", "x"], "error: model.rank: expected"),
        (["--model.rank", "0"], "error: model.rank: expected a whole number from 1, got 0"),
        (["--data.max_length", "4"], "error: data.max_length: expected at least 8 tokens, got 4"),
        (["--model.target_modules", "nope"], "error: model.target_modules: 'nope' is none of"),
        (["--trainer.precision", "bf16-mixed"], "error: trainer.precision: T4 has compute capability 7.5 and no bf16"),
        (["--model.attention", "flash_attention_2"], "error: model.attention: flash_attention_2 needs compute"),
        (["--trainer.accumulate_grad_batches", "0"], "error: trainer.accumulate_grad_batches: expected a whole number"),
        (["--trainer.accumulate_grad_batches", "-1"], "error: trainer.accumulate_grad_batches: expected a whole"),
        (["--trainer.num_nodes", "2"], "error: trainer.devices: 2, and a step has 1 micro-batch; give --trainer.acc"),
        (["--trainer.limit_train_batches", "0"], "error: trainer.limit_train_batches: expected a whole number"),
        (
            ["--trainer.limit_train_batches", "0.001"],
            "error: trainer.limit_train_batches: expected a share of at least one of the 212 micro-batches",
        ),
        (["--trainer.accelerator", "tpu"], "error: trainer.accelerator: expected one of auto, cpu, gpu, cuda"),
        (["--model.adapter", "/nonexistent"], "error: /nonexistent is no adapter: it has no adapter_config.json"),
        (["--ckpt_path", "best"], "error: unknown option 'ckpt_path'"),
        (["--early_stopping", "0"], "error: early_stopping: expected none, or a whole number from 1, got 0"),
        (["--early_stopping", "1", "--trainer.limit_val_batches", "0"], "error: early_stopping: expected none where"),
        (["--max_nonfinite_losses", "0"], "error: max_nonfinite_losses: expected a whole number from 1, got 0"),
        (
            ["--mirror", " "],
            "error: mirror: expected a folder, named in one line (no URL: mount what is elsewhere), got ' '",
        ),
        (["--trainer.callbacks", "ModelCheckpoint"], "error: trainer.callbacks: expected none that writes checkpoints"),
        (["--trainer.limit_val_batches", "0.001"], "error: trainer.limit_val_batches: expected a share of at least"),
        (["--config", T4, "--trainer.limit_train_batches", "0.0001"], "error: trainer.limit_train_batches: expected a"),
        (["--samples.count", "-1"], "error: samples.count: expected 0 or more, got -1"),
        (["--samples.prompts", '["[INST] x"]'], "error: samples.prompts: expected texts without [INST]"),
        (["--keep_checkpoints", "1"], "error: keep_checkpoints: expected a whole number from 2, got 1"),
        (["--max_time", "soon"], "error: max_time: expected DD:HH:MM:SS"),
        (["--gpu", "t5"], "error: gpu: no card 't5' in the table"),
        (["--gpu-gib", "0"], "error: gpu-gib: expected a number of GiB above 0, got 0.0"),
        (["--gpu-capability", "ampere"], "error: gpu-capability: expected two numbers as in 8.6, from 6.0 on"),
        (["--gpu-capability", "3.7"], "error: gpu-capability: expected two numbers as in 8.6, from 6.0 on"),
        (
            ["--gpu", "h100", "--gpu-capability", "7.5", "--trainer.precision", "bf16-mixed"],
            "error: trainer.precision: H100 has compute capability 7.5 and no bf16",
        ),
        (["--config", "nope.yaml"], "error: config: no file nope.yaml"),
        (["--data.source", "data/train.jsonl"], "error: data/train.jsonl: no such file"),
        (["--model.base", "./nope"], "error: model.base: no folder './nope'"),
    ],
)
def test_mistakes_are_one_line(plan, args, message):
    lines = plan(*args, status=2)
    assert len(lines) == 1
    assert lines[0].startswith(message)


@pytest.mark.parametrize(
    "args",
    [
        ["--trainer.callbacks", "BatchSizeFinder"],
        ["--early_stopping", "1", "--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "train/loss"],
        ["--trainer.limit_train_batches", "0.001"],
        ["--trainer.enable_progress_bar", "maybe"],
        ["--data.template", "no-such-file.jinja"],
        ["--samples.prompts", '["<<SYS>> x"]'],
        ["--model.rank", "1000"],
        ["--save_every_minutes", "0"],
    ],
)
def test_a_fit_refuses_the_same_in_the_same_line(plan, args):
    (line,) = plan(*args, status=2)
    assert plan(*args, status=2, verb="fit") == [line]


@pytest.mark.parametrize("here", [["--trainer.accelerator", "gpu"], ["--trainer.devices", "[3]"]])
def test_what_is_the_other_machines_affair_is_taken(plan, here):
    assert plan(*here)[-1].startswith("fits")


def test_another_cards_flash_attention_is_taken(plan):
    assert plan("--gpu", "a100", "--model.attention", "flash_attention_2")[-1].startswith("fits")


def test_data_is_never_downloaded(plan, monkeypatch):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    load, seen = Parts.train_and_held_out, []

    def watched(*args):
        seen.append((constants.is_offline_mode(), datasets.config.HF_HUB_OFFLINE))
        return load(*args)

    monkeypatch.setattr(Parts, "train_and_held_out", watched)
    assert plan("--config", T4)[-1].startswith("fits")
    assert seen == [(True, True)]
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_nothing_is_written(plan, tmp_path):
    plan()
    assert list(tmp_path.iterdir()) == []


def test_no_logger_is_made_for_it_may_call_somebody(plan, monkeypatch):
    monkeypatch.setattr(csv_logs, "os", None)  # which its constructor needs
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "."}}
    assert plan("--trainer.logger", json.dumps(logger))[-1].startswith("fits")


def test_a_run_is_left_alone(plan, tmp_path):
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "train/lo', encoding="utf-8")  # a fit drops the torn line
    (run / "config.yaml").write_text("model:\n  rank: 8\n", encoding="utf-8")
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert plan("--run", "demo", "--mirror", "elsewhere")[-1].startswith("fits")
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_help_names_the_card_and_fits_options(plan):
    text = "\n".join(plan("--help"))
    assert "--gpu-gib" in text and "--model.rank" in text and "--trainer.max_epochs" in text
