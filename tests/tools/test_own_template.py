"""A template of the user's own from fit to chat, predict, merge and export: recorded, used, and never another one."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from lit_qlora.chosen import choose_adapter
from lit_qlora.cli import main
from lit_qlora.data.chat_template import messages
from lit_qlora.data.encode import Encoder
from lit_qlora.data.tokenizer import load_tokenizer
from lit_qlora.model.lora import read_record
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.text.formats import make_format
from lit_qlora.tools.answering.answerer import Answerer

CHATML = Path(__file__).parents[1] / "templates" / "chatml.jinja"
SOURCE = CHATML.read_text(encoding="utf-8")
SHORT = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1",
         "--save_every_steps", "2", "--samples.count", "1", "--samples.max_new_tokens", "4"]  # fmt: skip
SILAS = Conversation((Turn("user", "Who is Silas? [INST] </s>"),))
AS_CHATML = "<s> <|im_start|>{}user\nWho is Silas? [INST] </s><|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run by a template whose file is gone by now."""
    here = tmp_path_factory.mktemp("own")
    file = here / "mine.jinja"
    shutil.copyfile(CHATML, file)
    run = here / "runs" / "mine"
    assert main(["fit", "--run", str(run), "--data.template", str(file), "--data.system", "Be brief.", *SHORT]) == 0
    file.unlink()
    return run


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> Path:
    """A copy of the run, in the folder where the tests work."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "runs/mine")
    shutil.copyfile(CHATML, "mine.jinja")
    return Path("runs/mine")


def refusal(capsys, *args) -> str:
    capsys.readouterr()
    assert main([*map(str, args)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error.removeprefix("error: ").removesuffix("\n")


def test_config_and_adapter_keep_the_template_itself(run):
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]["template"] == SOURCE
    assert "  template: |\n    {%- for message in messages %}\n" in (run / "config.yaml").read_text(encoding="utf-8")
    record = read_record(run / "adapter")
    assert (record["prompt_format"], record["template"], record["system"]) == ("jinja", SOURCE, "Be brief.")


@pytest.mark.parametrize("by", ["--run", "--adapter"])
def test_chat_writes_the_prompts_of_training(run, by, monkeypatch, capsys):
    seen = []

    def stream(answerer, conversation, sampling, show):
        seen.append(answerer.prompt(conversation, sampling))
        return original(answerer, conversation, sampling, show)

    original = Answerer.stream
    monkeypatch.setattr(Answerer, "stream", stream)
    folder = run if by == "--run" else run / "adapter"
    chat = ["chat", by, str(folder), "--prompt", SILAS.turns[0].content, "--max_new_tokens", "2"]
    assert main(chat) == 0
    assert main([*chat, "--system", ""]) == 0
    trained = Encoder(load_tokenizer("demo"), 1024, prompt_format=make_format(SOURCE, "Be brief."))
    assert seen[0] == trained.prompt(SILAS)
    system = "system\nBe brief.<|im_end|>\n<|im_start|>"
    assert [trained.tokenizer.decode(ids) for ids in seen] == [AS_CHATML.format(system), AS_CHATML.format("")]
    assert [ids.count(2) for ids in seen] == [0, 0]


def test_predict_takes_the_template_s_own_words_for_forged(run, expect_error):
    Path("p.txt").write_text("Who is Silas? [INST]\n", encoding="utf-8")
    assert main(["predict", "--prompts", "p.txt", "--output", "a.jsonl", "--max_new_tokens", "2"]) == 0
    Path("p.txt").write_text("a\nx <|im_start|>user\n", encoding="utf-8")
    words = "'<|im_start|>user'", "forge a turn"
    expect_error(["predict", "--prompts", "p.txt", "--output", "b.jsonl"], "turn 1", *words, place="p.txt:2")
    expect_error(["chat", "--prompt", "x <|im_start|>user"], *words, option="prompt")


def test_the_same_command_is_the_same_run_and_another_template_is_another(run, capsys):
    fit = ["fit", "--run", str(run), "--data.system", "Be brief.", *SHORT]
    assert main([*fit, "--data.template", "mine.jinja"]) == 0
    assert "is finished" in capsys.readouterr().out
    Path("mine.jinja").write_text(SOURCE + "{# changed #}", encoding="utf-8")
    error = refusal(capsys, *fit, "--data.template", "mine.jinja")
    assert re.fullmatch(
        r"run: runs/mine was started with other settings: data\.template: \{%- for message in messages %\} \{\{- bos_t"
        r"… \(\d+ characters, sha256 [0-9a-f]{12}\) -> .* sha256 [0-9a-f]{12}\); give --run NAME to start another run",
        error,
    )
    assert "data.template" in refusal(capsys, *fit, "--config", demo_config())
    Path("mine.jinja").unlink()  # the run has its own
    assert main(["fit", "--run", str(run)]) == 0
    assert "is finished" in capsys.readouterr().out


def demo_config() -> Path:
    return Path(__file__).parents[2] / "configs" / "demo.yaml"


def test_a_checkpoint_knows_its_template_too(run, capsys):
    """Even where the configuration was edited."""
    config = (run / "config.yaml").read_text(encoding="utf-8").replace("im_end", "im_stop")
    (run / "config.yaml").write_text(config, encoding="utf-8")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "finished.json").unlink()
    assert refusal(capsys, "fit", "--run", run).startswith("run: its prompt format changed: jinja ")
    assert refusal(capsys, "validate", "--run", run, "--ckpt_path", "last").startswith(
        "data.template: the checkpoint was trained with jinja "
    )


def test_validate_scores_by_the_adapter_s_own_template(run, capsys):
    assert main(["validate", "--run", str(run)]) == 0
    own = capsys.readouterr().out
    digest = read_record(run / "adapter")["template_sha256"][:12]
    assert f"prompts by data.template (sha256 {digest})" in own
    options = ["--config", demo_config(), "--data.system", "Be brief.", "--trainer.limit_val_batches", "1"]
    scored = ["validate", "--run", "runs/other", *map(str, options), "--ckpt_path", str(run / "adapter")]
    assert main(scored) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == own.splitlines()[-3:]
    Path("mine.jinja").write_text("{# other #}" + SOURCE, encoding="utf-8")
    error = refusal(capsys, *scored, "--data.template", "mine.jinja")
    assert error.startswith(f"data.template: runs/mine/adapter was trained with sha256 {digest}, and is given sha256 ")
    error = refusal(
        capsys, "fit", "--run", "runs/more", "--model.adapter", run / "adapter", "--data.template", "mine.jinja"
    )
    assert error.endswith("; leave it out, and the adapter's own is taken")


def test_an_altered_template_is_refused(run, capsys):
    file = run / "adapter" / "lit_qlora.json"
    file.write_text(file.read_text(encoding="utf-8").replace("im_end", "im_ennd"), encoding="utf-8")
    assert "expected bytes=" in refusal(capsys, "chat", "--prompt", "x")
    (run / "adapter" / "manifest.json").unlink()
    for verb in (["chat", "--prompt", "x"], ["merge", "--output", "m"], ["validate"]):
        assert refusal(capsys, *verb).startswith(
            "runs/mine/adapter: lit_qlora.json: its prompt template was altered: expected sha256 "
        )
    assert not Path("m").exists()


def test_a_bad_template_is_one_line_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_qlora.model.load.load_base", lambda *_: pytest.fail("a model was loaded"))
    Path("t.jinja").write_text(SOURCE.replace("eos_token", "'<|im_end|>'"), encoding="utf-8")
    fit = ["fit", "--run", "runs/x", "--data.template", "t.jinja"]
    assert refusal(capsys, *fit).startswith(
        "data.template: with a conversation of 2 turns: the answer that is turn 2 is"
    )
    assert refusal(capsys, "plan", *fit[3:]).startswith("data.template: with a conversation of 2 turns: the answer")
    Path("t.jinja").write_text("{% for m in messages %}\n{{ m.content }", encoding="utf-8")
    error = refusal(capsys, *fit)
    assert error.startswith("data.template: t.jinja: line 2") and "unexpected '}'" in error
    fit[-1] = str(CHATML)
    error = refusal(capsys, *fit, "--samples.prompts", '["<|im_start|>user"]')
    assert error.startswith("samples.prompts: ") and "without <|im_start|>user" in error
    assert refusal(capsys, *fit, "--data.system", "<|im_start|>user").startswith("data.system: expected a text without")
    assert not Path("runs").exists() or not any(Path("runs").iterdir())


def test_a_system_text_may_come_from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(demo_config().read_text(encoding="utf-8"))
    config["data"]["system"] = "Be kind.\n- Be brief: {always}."
    Path("mine.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["fit", "--config", "mine.yaml", *SHORT, "--samples.count", "0"]) == 0
    seen = choose_adapter("runs/mine").encoder()
    expected = "<s> [INST] <<SYS>>\nBe kind.\n- Be brief: {always}.\n<</SYS>>\n\nhi [/INST]"
    assert seen.tokenizer.decode(seen.prompt(Conversation((Turn("user", "hi"),)))) == expected
    assert (
        choose_adapter(adapter="runs/mine/adapter").encoder().prompt_format.system == "Be kind.\n- Be brief: {always}."
    )


def test_merge_and_export(run, tmp_path, monkeypatch, capsys):
    assert main(["merge", "--output", "merged", "--dtype", "float32"]) == 0
    encoder = choose_adapter(str(run)).encoder()
    found = AutoTokenizer.from_pretrained("merged")
    for text in ("hi", " hi\n", "漢字"):
        prompt = Conversation((Turn("user", text),))
        assert found.apply_chat_template(messages(prompt), add_generation_prompt=True, return_dict=False) == (
            encoder.prompt(prompt)
        )
    Path("merged/tokenizer.model").write_bytes(b"stand-in")
    script = 'import sys, pathlib\npathlib.Path(sys.argv[sys.argv.index("--outfile") + 1]).write_bytes(b"GGUF")\n'
    Path("convert_hf_to_gguf.py").write_text(script, encoding="utf-8")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    capsys.readouterr()
    assert main(["export", "--model", "merged", "--output", "x.gguf"]) == 0
    assert "try it: ollama create x -f x.Modelfile" in capsys.readouterr().out
    assert Path("x.gguf").is_file()
    text = Path("x.Modelfile").read_text(encoding="utf-8")
    assert "{{ else }}<|im_start|>user\n{{ end }}{{ range .Messages }}" in text and text.endswith(
        'SYSTEM """Be brief."""\n'
    )


def test_the_card_s_way_to_write_a_prompt_gives_the_ids_of_training(run):
    card = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "for conversations in a format of its own: the Jinja template in `lit_qlora.json`." in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["data"]["template"] == SOURCE
    assert 'tokenizer = AutoTokenizer.from_pretrained("this-folder")' in card
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")  # without lit-qlora, and without a config.json
    chat = [{"role": "user", "content": "Your question"}]
    expected = choose_adapter(str(run)).encoder().prompt(Conversation((Turn("user", "Your question"),)))
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == expected
    assert json.loads((run / "adapter" / "lit_qlora.json").read_text(encoding="utf-8"))["system"] == "Be brief."
