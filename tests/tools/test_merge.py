"""main.py merge: the folder that comes out is base + adapter, loads as it is, and is whole or not there."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lit_qlora import console, demo
from lit_qlora.chosen import choose_adapter
from lit_qlora.cli import main
from lit_qlora.data.chat_template import messages
from lit_qlora.data.held_out import Parts
from lit_qlora.data.run_rows import RunRows
from lit_qlora.model.base import find_base
from lit_qlora.model.generate import Sampling
from lit_qlora.model.weights import stored_tensors
from lit_qlora.quiet import quieten
from lit_qlora.storage import weight_files
from lit_qlora.storage.folders import verify_folder, write_folder
from lit_qlora.storage.run import RunFolder
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.tools import merge
from lit_qlora.tools.answering.answerer import Answerer
from lit_qlora.tools.merging import compare
from lit_qlora.tools.merging.arithmetic import LoraWeights, as_trained
from lit_qlora.tools.merging.folder import _lies_in
from tests.answers import answers
from tests.expect import check_line

SHORT = ["--trainer.val_check_interval", "100", "--samples.count", "0", "--trainer.limit_val_batches", "2"]
QUESTION = Conversation((Turn("user", "Who goes everywhere with Silas?"),))


def fit(run: Path, *options: str) -> Path:
    assert main(["fit", "--run", str(run), *SHORT, *options]) == 0
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that has learned enough to matter, with a system text of its own."""
    options = ["--trainer.max_steps", "12", "--data.system", "Be brief."]
    return fit(tmp_path_factory.mktemp("runs") / "demo", *options)


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("merged") / "out"
    assert main(["merge", "--run", str(run), "--output", str(target), "--dtype", "float32"]) == 0
    return target


def test_a_terminal_sees_how_far_it_is(run, tmp_path, monkeypatch):
    """One bar for the weights that are written, one for those by which the result is checked, each to its end."""
    bars = []
    make = console.progress_bar

    def made(label, **options):
        bars.append((label, options["total"], make(label, **options)))
        return bars[-1][2]

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(console, "progress_bar", made)
    assert main(["merge", "--run", str(run), "--output", str(tmp_path / "out")]) == 0
    names = len(stored_tensors(find_base(str(tmp_path / "out"))))
    seen = {label: (total, bar.n) for label, total, bar in bars if label in ("merge", "check")}
    assert seen == {"merge": (names, names), "check": (names, names)}


def plain_base_and_adapter(base: Path, adapter: Path):
    """Load base and adapter as anyone would, without this project."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
    return PeftModel.from_pretrained(without_shortcut(model), str(adapter)).eval()


def without_shortcut(model):
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # bitsandbytes' own on some CPUs, in bf16
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def assert_is_base_and_adapter(merged: Path, base: Path, run: Path) -> None:
    """Logits to 1e-3, and the same greedy text, through nothing but transformers."""
    quieten()
    model = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer.apply_chat_template(messages(QUESTION), return_tensors="pt", return_dict=False)
    expected = logits(plain_base_and_adapter(base, run / "adapter"), ids)
    assert (logits(model, ids) - expected).abs().max() < 1e-3
    without = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert (logits(without, ids) - expected).abs().max() > 0.1  # so the adapter does matter
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40)[0, ids.shape[1] :]
    answerer = Answerer(choose_adapter(str(run)))
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == (
        answers(answerer, [QUESTION], Sampling(max_new_tokens=40))[0].text
    )


def test_the_merged_folder_is_base_and_adapter(merged, run):
    assert_is_base_and_adapter(merged, demo.BASE, run)


def test_on_a_real_model_and_real_rows(real, tmp_path, capsys):
    base = shutil.copytree(real / "stories260K", tmp_path / "base")
    (base / "LICENSE.txt").symlink_to("/etc/hostname")
    rows = real / "guanaco" / "openassistant_best_replies_eval_first259.jsonl"
    options = ["--model.base", str(base), "--data.source", str(rows), "--data.max_length", "256"]
    run = fit(tmp_path / "run", *options, "--trainer.max_steps", "8")
    capsys.readouterr()
    assert main(["merge", "--run", str(run), "--output", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "held-out conversations of openassistant_best_replies_eval_first259.jsonl, on " in printed
    assert "the likeliest token the same at 100.00%" in printed
    assert_is_base_and_adapter(tmp_path / "out", base, run)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    assert not (tmp_path / "out" / "LICENSE.txt").exists() and "LICENSE.txt of the base is a link" in printed


def test_compared_is_what_the_run_held_out_although_the_source_grew(run, tmp_path):
    source = tmp_path / "rows.jsonl"
    rows = [{"text": f"### Human: q{number}### Assistant: a"} for number in range(40)]
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:20]))
    chosen = choose_adapter(str(run))
    options = chosen.options | {"data": chosen.options["data"] | {"source": str(source), "validation_share": 0.1}}
    train, held_out = Parts(str(source), share=0.1).train_and_held_out()
    recorded, empty = RunFolder(tmp_path), RunFolder(tmp_path / "empty")
    RunRows.of(train.conversations, held_out.conversations, None).write(recorded.rows)
    source.write_text("".join(f"{json.dumps(row)}\n" for row in reversed(rows)))

    def compared(of_run):
        return compare.conversations_to_compare(chosen._replace(run=of_run, options=options), chosen.encoder())

    assert compared(recorded) == (held_out.conversations, "held-out conversations of rows.jsonl")
    assert len(held_out.conversations) == 2
    assert len(compared(empty)[0]) == 4


def test_what_is_in_the_folder(merged, run):
    assert {path.name for path in merged.iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "lit_qlora.json", "manifest.json",
        "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert [path.name for path in merged.parent.iterdir()] == ["out"]
    verify_folder(merged)
    assert json.loads((merged / "generation_config.json").read_text()) == {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    config = json.loads((merged / "config.json").read_text())
    base = json.loads((demo.BASE / "config.json").read_text())
    assert {name: config[name] for name in config.keys() ^ base.keys() if name in config} == {"torch_dtype": "float32"}
    assert json.loads((merged / "lit_qlora.json").read_text()) == {
        "base": "demo", "onto": "quantized", "prompt_format": "llama2-chat", "system": "Be brief.",
    }  # fmt: skip
    texts = [path.read_text() for path in merged.iterdir() if path.suffix in (".json", ".md")]
    assert str(run) not in "".join(texts)
    card = (merged / "README.md").read_text()
    assert re.search(
        r"\nOn \d+ tokens, in fp32: greatest difference of a logit \S+, the likeliest token the same at ", card
    )
    assert 'AutoModelForCausalLM.from_pretrained("this-folder")' in card


HUB = ("load_and_register_attn_kernel", "get_kernel", "kernelize", "register_kernel_replacements_and_fusions")
"""Functions by which transformers fetches and loads a kernel."""


@pytest.fixture
def odd_base(tmp_path, monkeypatch):
    """The demo, with files that would have code run, other weights loaded, and answers continue after their EOS."""

    def refuse(*args, **options):
        raise AssertionError(f"code was asked for: {args} {options}")

    for name in HUB:
        monkeypatch.setattr(f"transformers.integrations.hub_kernels.{name}", refuse)
    monkeypatch.setattr("transformers.dynamic_module_utils.get_class_from_dynamic_module", refuse)
    monkeypatch.setattr("transformers.dynamic_module_utils.get_class_in_module", refuse)
    folder = tmp_path / "base"
    shutil.copytree(demo.BASE, folder)
    kernel, code = "evil/kernel", {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    config = json.loads((folder / "config.json").read_text()) | {
        "eos_token_id": [77, 5], "bos_token_id": 9, "pad_token_id": 3, "auto_map": code, "use_kernels": True,
        "_attn_implementation": kernel, "attn_implementation": kernel, "experts_implementation": kernel,
        "kernel_config": {"RMSNorm": kernel}, "transformers_weights": "other.safetensors", "trust_remote_code": True,
        "custom_pipelines": {"text-generation": {"impl": "evil.Evil"}}, "custom_generate": "evil/generate",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": "odd", "max_length": [1], "do_sample": true}')
    (folder / "evil.py").write_text("raise AssertionError('imported')")
    return folder


def test_a_merged_folder_ends_answers_where_training_did_and_carries_no_code(run, odd_base, tmp_path):
    target = tmp_path / "out"
    options = ["--adapter", str(run / "adapter"), "--base", str(odd_base)]
    assert main(["merge", *options, "--output", str(target)]) == 0
    config = json.loads((target / "config.json").read_text())
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert json.loads((target / "generation_config.json").read_text()) == tokens
    assert {name: config[name] for name in tokens} == tokens
    assert "evil" not in json.dumps(config)
    assert not config.keys() & {"auto_map", "use_kernels", "trust_remote_code", "transformers_weights"}
    assert not [*target.glob("*.py")]
    (target / "generation_config.json").unlink()  # some ask config.json alone
    assert AutoModelForCausalLM.from_pretrained(target).generation_config.eos_token_id == 2


def test_no_verb_follows_what_a_base_says_of_code(run, odd_base, tmp_path, capsys):
    options = ["--adapter", str(run / "adapter"), "--base", str(odd_base)]
    assert main(["chat", *options, "--prompt", "Hello", "--max_new_tokens", "2"]) == 0
    assert main(["fit", "--run", str(tmp_path / "run"), "--model.base", str(odd_base), *SHORT,
                 "--trainer.max_steps", "1"]) == 0  # fmt: skip


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 0.05), ("bfloat16", 0.5)])
def test_16_bits_in_several_files(run, tmp_path, monkeypatch, capsys, dtype, largest):
    monkeypatch.setattr(weight_files.write_shards, "__defaults__", (2**20,))
    target = tmp_path / "out"
    assert main(["merge", "--run", str(run), "--output", str(target), "--dtype", dtype]) == 0
    assert len(list(target.glob("model-*.safetensors"))) >= 4
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.dtype == getattr(torch, dtype)
    printed = capsys.readouterr().out.split("greatest difference of a logit ")[1]
    assert 0 < float(printed.split(",")[0]) < largest


def test_onto_the_original_weights(run, tmp_path, capsys):
    target = tmp_path / "out"
    assert main(["merge", "--run", str(run), "--output", str(target), "--dtype", "float32", "--onto", "original"]) == 0
    assert "against the 4-bit base + adapter that was trained" in capsys.readouterr().out
    base, merged = load_file(demo.BASE / "model.safetensors"), load_file(target / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = LoraWeights(run / "adapter").add_to(name, base[name].float())
    assert torch.equal(merged[name], expected)
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"].float())


def test_the_command_to_serve_it_can_be_pasted(run, capsys, monkeypatch):
    monkeypatch.setattr(merge, "merge_into", lambda *_: None)
    assert main(["merge", "--run", str(run), "--output", "my model"]) == 0
    assert "vllm serve 'my model'\n" in capsys.readouterr().out


# What is refused, and which files are left


def refusal(capsys, *options) -> str:
    assert main(["merge", *map(str, options)]) == 2
    return capsys.readouterr().err


def test_an_output_that_stands_there(run, merged, capsys):
    before = (merged / "config.json").stat().st_mtime_ns
    error = refusal(capsys, "--run", run, "--output", merged)
    check_line(error, "exists already", "another name", begins=f"error: output: {merged} ")
    assert (merged / "config.json").stat().st_mtime_ns == before


def test_a_disk_without_room(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10_000_000}))
    error = refusal(capsys, "--run", run, "--output", tmp_path / "a" / "out")
    words = "needs 70.3 MB", "10.0 MB left", "another disk"
    check_line(error, *words, begins=f"error: output: {tmp_path / 'a' / 'out'} ")


def test_a_disk_that_fills_up_on_the_way(run, tmp_path, capsys, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_files, "save_file", full)
    error = refusal(capsys, "--run", run, "--output", tmp_path / "out")
    assert error.startswith(f"error: output: {tmp_path / 'out'} can't be written: ")
    assert "No space left on device" in error
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_merge_is_not_kept(run, tmp_path, capsys, monkeypatch):
    made = LoraWeights.__init__

    def twice(self, folder):
        made(self, folder)
        self._config = self._config | {"lora_alpha": 2 * self._config["lora_alpha"]}

    monkeypatch.setattr(LoraWeights, "__init__", twice)
    error = refusal(capsys, "--run", run, "--output", tmp_path / "out", "--dtype", "float32")
    assert error.startswith("error: output: not kept, for the merged model is not base + adapter: on ")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_a_running_fit_replaces_meanwhile(run, tmp_path, capsys, monkeypatch):
    adapter, reference = tmp_path / "run" / "adapter", compare.reference
    shutil.copytree(run, tmp_path / "run")

    def fill(folder):
        shutil.copytree(run / "adapter", folder, dirs_exist_ok=True)
        (folder / "result.json").write_text('{"step": 1}')

    def replaced(*args):
        write_folder(adapter, fill, replace=True)
        return reference(*args)

    monkeypatch.setattr(compare, "reference", replaced)
    error = refusal(capsys, "--run", tmp_path / "run", "--output", tmp_path / "out")
    check_line(error, str(adapter), "replaced", "again", begins="error: merge: ")
    assert not (tmp_path / "out").exists()


def copy_adapter(run: Path, folder: Path) -> Path:
    """Copy an adapter without its manifest, so that a test may alter it."""
    folder.mkdir()
    for name in ("adapter_config.json", "lit_qlora.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((run / "adapter" / name).read_bytes())
    return folder


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_base_is_rounded_as_it_was_in_training(run, tmp_path, dtype):
    """The base is in 16 bits on a GPU before it goes to 4; which 16, the adapter's record says."""
    adapter = copy_adapter(run, tmp_path / "adapter")
    record = json.loads((adapter / "lit_qlora.json").read_text())
    assert record["base_dtype"] == "float32"
    (adapter / "lit_qlora.json").write_text(json.dumps(record | {"base_dtype": dtype}))
    target = tmp_path / "out"
    assert main(["merge", "--adapter", str(adapter), "--output", str(target), "--dtype", "float32"]) == 0
    name = "model.layers.2.mlp.down_proj.weight"
    base = load_file(demo.BASE / "model.safetensors")
    expected = LoraWeights(adapter).add_to(name, as_trained(base[name], getattr(torch, dtype)))
    merged = load_file(target / "model.safetensors")
    assert torch.equal(merged[name], expected)
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"].to(getattr(torch, dtype)).float())


def test_values_that_16_bits_do_not_hold(run, tmp_path, capsys):
    folder = copy_adapter(run, tmp_path / "adapter")
    stored = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    stored[key] = torch.full_like(stored[key], 1e6)
    save_file(stored, folder / "adapter_model.safetensors")
    options = ["--adapter", folder, "--base", "demo", "--output", tmp_path / "out"]
    error = refusal(capsys, *options, "--dtype", "float16")
    assert error.startswith("error: dtype: model.layers.1.mlp.up_proj.weight has values that float16 can't hold; give ")
    assert not (tmp_path / "out").exists()


def test_what_a_kill_left_is_cleared(run, tmp_path):
    left = tmp_path / ".out.tmp-1-0123abcd"
    left.mkdir()
    (left / "model-00001.safetensors").write_bytes(b"half")
    assert main(["merge", "--run", str(run), "--output", str(tmp_path / "out")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_run_at_all(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(capsys, "--output", "out").startswith("error: no run in runs/: train one first")


def test_an_adapter_of_another_base(run, tmp_path, capsys, real):
    options = ["--adapter", run / "adapter", "--base", real / "stories260K", "--output", tmp_path / "out"]
    assert "this adapter was trained on demo" in refusal(capsys, *options)


def test_peft_s_trap_on_colab_does_not_matter(run, tmp_path, monkeypatch):
    """An old torchao makes peft refuse every base that is not quantised; the merge never asks peft for one."""

    def refuse():
        raise ImportError("Found an incompatible version of torchao")

    for place in ("peft.import_utils", "peft.tuners.lora.torchao", "peft.tuners.lora.model"):
        monkeypatch.setattr(f"{place}.is_torchao_available", refuse, raising=False)
    with pytest.raises(ImportError, match="torchao"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(demo.BASE), LoraConfig(target_modules="all-linear"))
    assert main(["merge", "--run", str(run), "--output", str(tmp_path / "out")]) == 0


def test_a_link_to_elsewhere_is_no_file_of_the_base(tmp_path):
    base, cache = tmp_path / "base", tmp_path / "models--a--b"
    for folder in (base, cache / "blobs", cache / "snapshots" / "1"):
        folder.mkdir(parents=True)
    for file in (tmp_path / "secret", base / "own", cache / "blobs" / "2"):
        file.write_text("text")
    (base / "out").symlink_to(tmp_path / "secret")
    (base / "in").symlink_to("own")
    (cache / "snapshots" / "1" / "file").symlink_to("../../blobs/2")
    (cache / "snapshots" / "1" / "out").symlink_to("../../../secret")
    snapshot = cache / "snapshots" / "1"
    found = [_lies_in(base, base / name) for name in ("own", "in", "out")]
    assert found + [_lies_in(snapshot, snapshot / name) for name in ("file", "out")] == [True, True, False, True, False]
