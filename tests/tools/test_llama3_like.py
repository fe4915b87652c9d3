"""A base whose end of turn is not its EOS, from fit to Ollama: answers stop at either, wherever they are made."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer, GenerationConfig

from lit_qlora.chosen import choose_adapter
from lit_qlora.cli import main
from lit_qlora.model.generate import Sampling, generate
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.tools.answering.answerer import Answerer
from tests.answers import answers
from tests.llama3_like import END_OF_TEXT, EOT, TEMPLATE, write_base

QUESTION = Conversation((Turn("user", "Who goes everywhere with Silas?"),))
FIT = ["--model.base", "base", "--data.max_length", "256", "--trainer.max_steps", "2", "--run", "run",
       "--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "2", "--samples.count", "1",
       "--samples.max_new_tokens", "4", "--model.target_modules", "[q_proj]"]  # fmt: skip


@pytest.mark.slow
def test_answers_stop_at_either_end_wherever_they_are_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_base(Path("base"), weights=True)
    assert main(["fit", *FIT]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the base has a chat template of its own, which data.template base takes" in shown
    assert main(["fit", *FIT[:-4], "--run", "own", "--data.template", "base"]) == 0
    assert "which data.template base takes" not in " ".join(capsys.readouterr().out.split())
    config = yaml.safe_load(Path("runs/own/config.yaml").read_text(encoding="utf-8"))
    assert config["data"]["template"] == TEMPLATE  # whatever becomes of the base
    assert main(["fit", *FIT[:-4], "--run", "own", "--data.template", "base"]) == 0
    assert "is finished" in " ".join(capsys.readouterr().out.split())

    adapter = Path("runs/own/adapter")
    answerer = Answerer(choose_adapter("runs/own"))
    assert answerer.encoder.stop_ids == [EOT, END_OF_TEXT]
    assert GenerationConfig.from_pretrained(adapter).eos_token_id == [EOT, END_OF_TEXT]
    chat = [{"role": "user", "content": QUESTION.turns[0].content}]
    found = AutoTokenizer.from_pretrained(adapter)
    assert found.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == (
        answerer.encoder.prompt(QUESTION)
    )

    sampling = Sampling(max_new_tokens=12)
    (ids,) = generate(answerer.model, [answerer.prompt(QUESTION, sampling)], [EOT], sampling)
    for end in {*ids[2:8]} - {*ids[:2]}:
        # As if that were one of the two: random weights say neither.
        monkeypatch.setitem(vars(answerer.encoder), "stop_ids", [EOT, end])
        cut = ids[: ids.index(end)]
        expected = (answerer.encoder.answer([*cut, end])[0], True)
        assert answers(answerer, [QUESTION, QUESTION], sampling) == [expected, expected]
        assert answerer.stream(QUESTION, sampling, lambda _: True) == expected

    capsys.readouterr()
    assert main(["merge", "--run", "own", "--output", "merged", "--dtype", "float32"]) == 0
    for name in ("config.json", "generation_config.json"):
        settings = json.loads(Path("merged", name).read_text(encoding="utf-8"))
        assert (settings["eos_token_id"], settings["pad_token_id"]) == ([EOT, END_OF_TEXT], END_OF_TEXT)
    script = 'import sys, pathlib\npathlib.Path(sys.argv[sys.argv.index("--outfile") + 1]).write_bytes(b"GGUF")\n'
    Path("convert_hf_to_gguf.py").write_text(script, encoding="utf-8")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert main(["export", "--model", "merged", "--output", "x.gguf"]) == 0  # without a tokenizer.model
    modelfile = Path("x.Modelfile").read_text(encoding="utf-8")
    assert modelfile.endswith('PARAMETER stop "<|eot_id|>"\nPARAMETER stop "<|end_of_text|>"\n')

    # A merged model is a base again, with the template that it was written with.
    again = [*FIT[:-4], "--run", "again", "--data.template", "base"]
    again[1] = "merged"
    assert main(["fit", *again]) == 0
    assert choose_adapter("runs/again").encoder().prompt(QUESTION) == answerer.encoder.prompt(QUESTION)
