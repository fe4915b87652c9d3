"""The model card: what was measured and nothing else, in the hub's form, without a trace of the machine."""

import getpass
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, GenerationConfig

from lit_qlora import demo
from lit_qlora.cli import main
from lit_qlora.data.chat_template import write_tokenizer
from lit_qlora.data.encode import Encoder
from lit_qlora.data.tokenizer import load_tokenizer
from lit_qlora.figures.card import addressed, card, merged_card, published
from lit_qlora.figures.lines import read_lines
from lit_qlora.storage.folders import verify_folder
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.text.formats import make_format

CONFIG = {
    "seed_everything": 42,
    "model": {"base": "meta-llama/Llama-2-7b-hf", "rank": 16},
    "data": {"source": "timdettmers/openassistant-guanaco", "system": None},
    "trainer": {"max_epochs": 3},
}
FIGURES = {
    0: {"val/loss": 1.5, "val/perplexity": 4.4817, "val/accuracy": 0.61, "memory/train_reserved_gib": 9.0},
    50: {"val/loss": 1.25, "val/perplexity": 3.4903, "val/accuracy": 0.66, "memory/train_reserved_gib": 8.5},
}


LLAMA_2 = "the Llama 2 chat format"


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_of_a_llama_2_adapter():
    text = card("meta-llama/Llama-2-7b-hf", CONFIG, FIGURES, 50, 5400.0)
    assert metadata(text) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": "meta-llama/Llama-2-7b-hf",
        "base_model_relation": "adapter",
        "license": "llama2",
        "datasets": ["timdettmers/openassistant-guanaco"],
        "tags": ["lora", "qlora", "peft", "llama", "lightning"],
    }
    assert "LLAMA 2 Community License" in text
    assert "| held-out loss, nats per token | 1.5000 | 1.2500 |" in text
    assert "| held-out perplexity | 4.48 | 3.49 |" in text
    assert "| held-out token accuracy | 61.0% | 66.0% |" in text
    assert "\n50 optimizer steps; 90 min in them; train reserved memory at most 9.00 GiB.\n" in text
    assert "sample answers" not in text  # they were not asked for
    assert "curves.png" not in text
    assert 'from_pretrained("meta-llama/Llama-2-7b-hf", quantization_config' in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["trainer"] == {"max_epochs": 3}


@pytest.mark.parametrize("system", [None, 'Be "brief" ü and\nkind.'])
def test_its_lines_of_python_ask_as_in_training(system, tmp_path, capsys):
    """Other programs ask so with the files of the adapter's folder, which also say where answers stop."""
    encoder = Encoder(load_tokenizer("demo"), 512, prompt_format=make_format(system=system))
    write_tokenizer(tmp_path, encoder, 512)
    expected = encoder.prompt(Conversation((Turn("user", "Your question"),)))
    said = encoder.tokenizer("Yes.", add_special_tokens=False)["input_ids"]

    class Model:
        device = "cpu"

        def generate(self, input_ids, attention_mask, max_new_tokens):
            assert input_ids.tolist() == [expected] and self.generation_config.eos_token_id == encoder.eos_id
            return torch.tensor([[*expected, *said, encoder.eos_id]])

    text = card("a/b", CONFIG | {"data": {"source": "x/y", "system": system}}, {}, 7, 0.0)
    code = (
        text.split("```python\n")[1].split("```")[0].partition("PeftModel.from_pretrained(base, ")[2].partition("\n")[2]
    )
    names = {"model": Model(), "AutoTokenizer": AutoTokenizer, "GenerationConfig": GenerationConfig}
    exec(code.replace("this-folder", str(tmp_path)), names)
    assert capsys.readouterr().out == "Yes.\n"


def test_words_that_look_like_a_place_stay_whole():
    text = card("a/b", CONFIG | {"data": {"source": "/home/ann/rows.jsonl", "system": ".NET/C#: briefly"}}, {}, 7, 0.0)
    configuration = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert configuration["data"] == {"source": "rows.jsonl", "system": ".NET/C#: briefly"}


def test_on_the_hub_a_card_leads_to_its_repository():
    own = CONFIG | {"data": {"source": "x/y", "template": "{{ eos_token }}"}}
    text = addressed(card("a/b", own, {}, 7, 0.0), "ann/mine")
    assert (
        'AutoTokenizer.from_pretrained("ann/mine")' in text and 'GenerationConfig.from_pretrained("ann/mine")' in text
    )
    assert 'PeftModel.from_pretrained(base, "ann/mine")' in text
    assert "`hf download ann/mine --local-dir this-folder`, then `python main.py chat --adapter this-folder" in text
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_nothing_is_said_that_was_not_measured():
    text = card("someone/TinyLlama-1.1B", CONFIG, {}, 7, 0.0)
    assert "No held-out rows were scored.\n\n7 optimizer steps.\n" in text
    assert "license" not in metadata(text)
    assert "Community License" not in text
    text = card("a/b", CONFIG, {50: FIGURES[50]}, 50, 0.0)
    assert "| held-out loss, nats per token | not measured | 1.2500 |" in text


@pytest.mark.parametrize("base", ["meta-llama/Llama-2-7b-hf", "my-llama"])
def test_the_hub_s_own_reader_takes_the_metadata(base):
    text = card(base, CONFIG, FIGURES, 50, 5400.0, has_curves=True)
    read = ModelCard(text)  # raises where the block is none, or has what the hub refuses
    assert read.data.to_dict() == metadata(text)
    assert "\n\n![Loss over the optimizer steps, in training and held-out](curves.png)\n\n" in read.text


def test_the_card_of_a_merged_model():
    text = merged_card(
        "meta-llama/Llama-2-7b-hf", ["/home/ann/rows.jsonl"], "The weights are in float16.", "Far.", LLAMA_2
    )
    assert ModelCard(text).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "meta-llama/Llama-2-7b-hf",
        "base_model_relation": "finetune",
        "license": "llama2",
        "tags": ["lora", "qlora", "llama", "lightning"],
    }
    assert (
        "trained with QLoRA on `rows.jsonl`, in the Llama 2 chat format, worked into its base. The weights are" in text
    )
    assert "LLAMA 2 Community License" in text
    assert "## Measured\n\nFar.\n" in text
    assert "on conversations in the Llama 2 chat format, worked" in merged_card("a/b", [], "", "", LLAMA_2)


def test_a_base_that_is_no_hub_model_is_not_named_as_one():
    text = card("my-llama", CONFIG, {}, 7, 0.0)
    assert "base_model" not in metadata(text)
    assert 'from_pretrained("path/to/my-llama"' in text


def test_a_fence_in_the_configuration_stays_inside():
    config = CONFIG | {"data": {"source": "demo", "system": "```\n---\nlicense: mit\n```"}}
    text = card("a/b", config, {}, 7, 0.0)
    block = re.search(r"^````yaml\n(.*?)^````$", text, re.DOTALL | re.MULTILINE)[1]
    assert yaml.safe_load(block)["data"]["system"] == config["data"]["system"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/ann/llama", "llama"), ("~/llama/", "llama"), ("./rows.jsonl", "rows.jsonl"), ("../a/b", "b"),
        ("a/b/rows.jsonl", "rows.jsonl"), (r"C:\Users\ann\rows.csv", "rows.csv"), ("C:/Users/ann/rows.csv", "rows.csv"),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"), ("demo", "demo"), ("16-mixed", "16-mixed"),
        ("Answer yes and/or no.", "Answer yes and/or no."), ("a/b\nc", "a/b\nc"), (3, 3), (False, False),
        ([{"x": "/home/ann/llama", "y": None}], [{"x": "llama"}]),
        *[(given, given) for given in ({"opening": "/start"}, {"stop": ["/end"]}, {"prompts": ["/a b"]})],
    ],
)  # fmt: skip
def test_paths_lose_all_but_their_last_part(value, expected):
    assert published(value) == expected


def test_a_folder_that_looks_like_a_hub_id_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ann smith").mkdir()
    for name in ("ann smith/rows.jsonl", "rows.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "llama").mkdir()
    assert published(["secret/llama", "ann smith/rows.jsonl"]) == ["llama", "rows.jsonl"]


def test_a_run_s_card(tmp_path, monkeypatch, draws):
    """Rows and base lie in private places; the figures are the run's own."""
    monkeypatch.setenv("HF_TOKEN", "hf_averysecrettoken")
    private = tmp_path / "private"
    base = private / "my-llama"
    base.mkdir(parents=True)
    for file in demo.BASE.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    rows = private / "rows.jsonl"
    rows.write_text("".join(demo.TRAIN.read_text(encoding="utf-8").splitlines(keepends=True)[:40]), encoding="utf-8")
    options = ["--model.base", str(base), "--data.source", str(rows), "--trainer.max_steps", "4"]
    options += ["--trainer.val_check_interval", "2", "--samples.count", "1", "--samples.max_new_tokens", "2"]
    assert main(["fit", "--run", str(tmp_path / "run"), *options]) == 0
    folder = tmp_path / "run" / "adapter"
    verify_folder(folder)
    assert {"README.md", "curves.png"} < json.loads((folder / "manifest.json").read_text())["files"].keys()
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "(curves.png)" in text
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    for secret in ("private", str(Path.home()), "hf_averysecrettoken", f"/{getpass.getuser()}", str(tmp_path)):
        assert secret not in text
    result = json.loads((folder / "result.json").read_text())
    by_step = {line["step"]: line for line in read_lines(tmp_path / "run" / "metrics.jsonl")}
    before, after = by_step[0]["val/loss"], by_step[result["step"]]["val/loss"]
    assert f"| held-out loss, nats per token | {before:.4f} | {after:.4f} |" in text
    assert "| sample answers that ended by themselves | 0 of 1 | 0 of 1 |" in text
    assert "| sample answers cut at 2 tokens | 1 of 1 | 1 of 1 |" in text
    assert re.search(rf"\n{result['step']} optimizer steps; (under 1|\d\d?) s in them; host memory at most ", text)
    assert "python main.py chat --adapter this-folder --base path/to/my-llama" in text
