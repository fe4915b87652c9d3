"""A tokenizer's chat template, and Ollama's, give the very ids of the encoder, with every tokenizer at hand."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from lit_qlora.data.chat_template import check_template, messages, write_tokenizer
from lit_qlora.data.encode import Encoder
from lit_qlora.data.tokenizer import load_tokenizer
from lit_qlora.errors import UserError
from lit_qlora.text.formats import make_format
from tests.data.talks import said

DIALOGS = [
    said("Who goes everywhere with Silas?"),
    said("hi", system="Always answer with Haiku"),
    said("a", "b", "c"),
    said("a", "b", "c", system="Be kind.\nBe brief."),
    said("one", "two", "three", "four", "five"),
    said("漢字 und Größe 🙂", "ça va?", "naïve"),
    said("x = [1, 2]\n\tif x:  # two  spaces\n\n\nend", "```python\nprint(1)\n```", "more"),
    said("[inst] <<sys>> {{ .System }} {% if %}", "$later", '"""'),
    said("ends with a bracket [", "] starts with one", "5 / 7", system="[x]"),
    said("▁ ▁", "##", "###"),
    said("▁a", "▁b", "▁▁c", "▁ d", "▁"),
]
WITH_OUTER_SPACE = [
    said("  hi\n"),
    said("  hi", system=" S "),
    said("a", "\n b \t", " c "),
    said("a\N{NO-BREAK SPACE}", "\N{EN SPACE}b", "c\v"),
]


@pytest.fixture(params=["demo", "llama2-tokenizer", "stories260K"])
def base(request) -> str:
    if request.param == "demo":
        return "demo"
    return str(request.getfixturevalue("real") / request.param)


@pytest.fixture
def published(base, tmp_path):
    """Writes an encoder's tokenizer; gives the encoder and the tokenizer as AutoTokenizer loads it."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")

    def publish(system: str | None = None):
        encoder = Encoder(load_tokenizer(base), 512, prompt_format=make_format(system=system))
        write_tokenizer(tmp_path, encoder, 512)
        return encoder, load_tokenizer(str(tmp_path))

    return publish


@pytest.mark.parametrize("system", [None, 'The "default" \\n one.\nWith a \N{SLIGHTLY SMILING FACE}'])
def test_the_template_gives_the_ids_of_training(published, tmp_path, system):
    encoder, tokenizer = published(system)
    for dialog in DIALOGS + WITH_OUTER_SPACE:
        ids = tokenizer.apply_chat_template(messages(dialog), add_generation_prompt=True, return_dict=False)
        assert ids == encoder.prompt(dialog), dialog
        assert ids.count(encoder.bos_id) == (len(dialog.turns) + 1) // 2
    check_template(tmp_path, encoder, DIALOGS)


def test_an_answered_dialog_has_the_ids_that_were_trained_on(published):
    encoder, tokenizer = published()
    dialog = said("a", "b", "c", "d")
    (example,) = encoder.examples([dialog])
    assert tokenizer.apply_chat_template(messages(dialog), return_dict=False) == example.input_ids


def test_plain_text_has_the_base_s_ids(base, published):
    _, tokenizer = published()
    for text in ("hello", "Two  words, 7 ½\n", "é"):
        assert tokenizer(text)["input_ids"] == load_tokenizer(base)(text)["input_ids"]


def test_a_tokenizer_that_gives_other_ids_is_not_published(published, tmp_path):
    encoder, _ = published()
    file = tmp_path / "chat_template.jinja"
    text = file.read_text(encoding="utf-8")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"] == text
    file.write_text(text.replace("bos_token ~ '[INST] '", "bos_token ~ '[INST]  '"), encoding="utf-8")
    with pytest.raises(UserError, match="base: its tokenizer gives"):
        check_template(tmp_path, encoder, DIALOGS)


def test_meta_s_ids(real, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    write_tokenizer(tmp_path, Encoder(load_tokenizer(str(real / "llama2-tokenizer")), 4096), 4096)
    tokenizer = load_tokenizer(str(tmp_path))
    cases = json.loads((real / "meta" / "chat_prompt_ids.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 5
    for case in cases:
        assert tokenizer.apply_chat_template(case["dialog"], return_dict=False) == case["prompt_ids"]


# Ollama


def test_ollama_s_prompts_have_the_ids_of_training(published):
    """Rendered as Ollama does, then encoded as llama.cpp does: BOS first, special tokens in the text as such, and a
    space before each stretch between them, which is what the published tokenizer.json says, too."""
    encoder, tokenizer = published()
    spec = importlib.util.spec_from_file_location("go_template", Path(__file__).parents[1] / "text" / "go_template.py")
    go_template = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(go_template)
    template = re.search(r'TEMPLATE """(.*)"""\n', make_format().modelfile(Path("x.gguf")), re.DOTALL)[1]
    for dialog in DIALOGS:
        rows = messages(dialog)
        rendered = go_template.render(template, dialog.system or "", rows)
        assert [encoder.bos_id, *tokenizer(rendered, add_special_tokens=False)["input_ids"]] == encoder.prompt(dialog)
