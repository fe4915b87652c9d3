"""Bases that are no Llama 2 by the command line, from fit to merge; slow but for what the page of bases says."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from lit_qlora.cli import main
from lit_qlora.data.tokenizer import load_tokenizer
from lit_qlora.figures.lines import read_lines
from lit_qlora.model.architectures import ARCHITECTURES, LINEARS
from lit_qlora.model.base import find_base
from lit_qlora.model.module import QLoRAModule
from tests.small_bases import save_base

PAGE = Path(__file__).parents[1] / "docs" / "bases.md"


def test_the_page_and_the_help_name_what_is_accepted():
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == ["model_type", *ARCHITECTURES]
    assert all(f"`{name}`" in text for name in LINEARS)
    (named,) = re.findall(r"any (.+) without experts", " ".join((QLoRAModule.__doc__ or "").split()))
    classes = {name.partition(".")[0] for name in re.split(", | or ", named)}  # Qwen2.5 is a Qwen2
    assert classes == {one.prefix for one in ARCHITECTURES.values()}
    for file in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (PAGE.parents[1] / file).is_file(), file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("like", "tokenizer"),
    [("qwen3", "qwen"), ("qwen2.5", "qwen"), ("mistral v0.1", "mistral v0.3"), ("llama 3.2", "llama 3")],
)
def test_from_fit_to_merge(tmp_path, monkeypatch, capsys, like, tokenizer):
    monkeypatch.chdir(tmp_path)
    base = save_base(tmp_path / "base", like, tokenizer)
    turns = [("Where does Ann live?", "By the sea."), ("And Tom?", "He has a boat.")] * 8
    rows = [{"messages": [{"role": "user", "content": f"{number}: {question}"},
                          {"role": "assistant", "content": answer}]}
            for number, (question, answer) in enumerate(turns)]  # fmt: skip
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shared = ["--model.base", str(base), "--data.source", "rows.jsonl", "--data.template", "base"]
    shared += ["--data.max_length", "64", "--data.validation_share", "0.25", "--data.batch_tokens", "128"]
    shared += ["--data.packing", "true", "--model.learning_rate", "0.01"]
    assert main(["plan", *shared, "--gpu", "t4"]) == 0
    assert "fits: " in capsys.readouterr().out
    run = ["--trainer.max_steps", "8", "--trainer.val_check_interval", "8", "--samples.count", "1"]
    run += ["--samples.max_new_tokens", "4", "--trainer.precision", "32-true"]
    assert main(["fit", "--run", "./run", *shared, *run, "--model.quantized_cache", "copies"]) == 0
    before, after = [line["val/loss"] for line in read_lines(Path("run/metrics.jsonl")) if "val/loss" in line]
    capsys.readouterr()
    assert after < before - 0.1
    assert main(["validate", "--run", "./run"]) == 0
    assert float(re.search(r"val/loss +([\d.]+)", capsys.readouterr().out)[1]) == pytest.approx(after, abs=1e-4)
    assert main(["evaluate", "--run", "./run"]) == 0
    assert main(["chat", "--run", "./run", "--prompt", "Where?", "--max_new_tokens", "3"]) == 0
    assert main(["merge", "--run", "./run", "--output", "merged", "--dtype", "float32"]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged").eval()
    assert type(merged).__name__ == find_base(str(base)).architecture.class_name
    published, own = load_tokenizer("merged"), load_tokenizer(str(base))
    assert (published.bos_token, published.eos_token) == (own.bos_token, own.eos_token)
    ids = published.apply_chat_template(
        [{"role": "user", "content": "Where?"}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        assert merged(ids).logits.isfinite().all()
