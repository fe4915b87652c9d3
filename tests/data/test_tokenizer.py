"""A base's tokenizer: Meta's ids of Llama 2's vocabulary, whatever the config says; refused if it can't be loaded."""

import json
import shutil
from types import SimpleNamespace

import pytest

from lit_qlora import demo
from lit_qlora.data.encode import Encoder
from lit_qlora.data.tokenizer import LLAMA_TOKENS, file_of, load_tokenizer
from lit_qlora.errors import UserError
from lit_qlora.quiet import quieten
from lit_qlora.text import messages
from tests.expect import check_line

MODEL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def base(folder, files, config=None):
    """A folder with ``files`` of the real tokenizer, and what tokenizer_config.json says otherwise."""
    folder.mkdir()
    for file in files:
        shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    if config is not None:
        rules = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps(rules | config), encoding="utf-8")
    return str(folder)


def refused(name):
    with pytest.raises(UserError) as caught:
        load_tokenizer(name)
    return str(caught.value).removeprefix(f"model.base: no tokenizer could be loaded from {name!r}: ")


def gives_metas_ids(real, tokenizer):
    cases = json.loads((real / "meta" / "chat_prompt_ids.json").read_text(encoding="utf-8"))["cases"]
    encoder = Encoder(tokenizer, 4096)
    return all(encoder.prompt(messages.parse(case["dialog"]).conversation) == case["prompt_ids"] for case in cases)


def test_demo_is_the_name_of_the_embedded_tokenizer(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer("demo").get_vocab() == load_tokenizer(str(demo.BASE)).get_vocab()


def test_no_tokenizer_is_reported_in_one_line(tmp_path):
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path / "nowhere"))
    assert str(caught.value).startswith(f"model.base: no tokenizer could be loaded from '{tmp_path}/nowhere': ")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_code_is_refused_and_nobody_is_asked(tmp_path, monkeypatch, expect_error):
    base, ran = tmp_path / "base", tmp_path / "ran"
    shutil.copytree(demo.BASE, base)
    (base / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n", encoding="utf-8")
    rules = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    rules |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (base / "tokenizer_config.json").write_text(json.dumps(rules), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    expect_error(lambda: load_tokenizer(str(base)), base, "code of its own", "never run", option="model.base")
    assert not ran.exists()


def _changed(tmp_path, name, text):
    base = tmp_path / "base"
    shutil.copytree(demo.BASE, base)
    (base / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(base))
    assert str(caught.value).startswith(f"model.base: no tokenizer could be loaded from '{base}': ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"]
)
def test_files_nested_without_end_are_one_line(tmp_path, name):
    assert "nested too deep" in _changed(tmp_path, name, '{"a": ' + 200_000 * "[")


@pytest.mark.parametrize(
    "changed",
    [
        {"auto_map": "x"},
        {"auto_map": 3},
        {"tokenizer_class": 3},
        {"tokenizer_class": ["LlamaTokenizer"]},
        {"tokenizer_class": "BertJapaneseTokenizer"},
        {"bos_token": 3},
        {"extra_special_tokens": 3},
        {"added_tokens_decoder": {"a": 1}},
        {"init_inputs": ["x"]},
        {"self": 1},
        {"padding_side": "up"},
    ],
    ids=str,
)
def test_a_tokenizer_config_of_odd_values_is_one_line(tmp_path, changed):
    rules = json.loads((demo.BASE / "tokenizer_config.json").read_text(encoding="utf-8"))
    _changed(tmp_path, "tokenizer_config.json", json.dumps(rules | changed))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "AutoModel", "AutoTokenizer", "pipeline", "logging"])
def test_a_tokenizer_config_names_nothing_but_a_tokenizer(tmp_path, name, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    rules = json.loads((demo.BASE / "tokenizer_config.json").read_text(encoding="utf-8"))
    message = _changed(tmp_path, "tokenizer_config.json", json.dumps(rules | {"tokenizer_class": name}))
    assert message.endswith(f'tokenizer_config.json: tokenizer_class: expected the name of a tokenizer, got "{name}"')


def test_a_tokenizer_without_eos_is_refused(tmp_path, expect_error):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a"))).save_pretrained(tmp_path)
    expect_error(lambda: load_tokenizer(str(tmp_path)), tmp_path, "has no EOS token", option="model.base")


@pytest.mark.parametrize(
    "config",
    [
        {"add_prefix_space": False},
        {"add_prefix_space": False, "legacy": True},
        {"add_prefix_space": False, "tokenizer_class": "PreTrainedTokenizerFast"},
        {"add_prefix_space": True},
    ],
)
def test_the_ids_are_metas_whatever_the_config_says(real, tmp_path, config):
    tokenizer = load_tokenizer(base(tmp_path / "base", (real / "llama2-tokenizer").iterdir(), config))
    assert gives_metas_ids(real, tokenizer)


def test_llama_2_without_bos_is_refused(real, tmp_path):
    name = base(tmp_path / "base", (real / "llama2-tokenizer").iterdir(), {"bos_token": None})
    check_line(
        refused(name), f"{name!r}", "no BOS token", "tokenizer_config.json (bos_token, <s>)", begins="model.base: "
    )


def test_ids_that_stay_others_are_refused(real, tmp_path):
    name = base(
        tmp_path / "base", (real / "llama2-tokenizer").iterdir(), {"tokenizer_class": "PreTrainedTokenizerFast"}
    )
    rules = json.loads((tmp_path / "base" / "tokenizer.json").read_text(encoding="utf-8"))
    rules["normalizer"]["normalizers"] = rules["normalizer"]["normalizers"][1:]
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
    check_line(refused(name), f"{name!r}", "ids of a text", "another copy", begins="model.base: ")


def test_a_tokenizer_model_alone_will_do(real, tmp_path):
    pytest.importorskip("sentencepiece")
    files = [real / "llama2-tokenizer" / name for name in ("tokenizer.model", "tokenizer_config.json")]
    assert gives_metas_ids(real, load_tokenizer(base(tmp_path / "base", files)))


def test_a_tokenizer_model_with_empty_special_tokens_is_reported(real, tmp_path):
    """The first conversions of Llama have them: the library fails before there is a tokenizer to look at."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (tmp_path / "tokenizer.model").write_bytes((real / "llama2-tokenizer" / "tokenizer.model").read_bytes())
    config = {"tokenizer_class": "LLaMATokenizer", "add_bos_token": True, **EMPTY}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "has an empty bos_token, as early conversions do; write its text into" in one_line(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | LLAMA_TOKENS), encoding="utf-8")
    assert load_tokenizer(str(tmp_path))("[INST]")["input_ids"] == [1, 518, 25580, 29962]


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (False, ["needs sentencepiece", "pip install sentencepiece"]),
        (True, ["its tokenizer.model is no whole one", "copy it again"]),
    ],
)
def test_a_tokenizer_model_that_can_not_be_read_is_one_line(tmp_path, monkeypatch, caplog, there, words):
    quieten()
    name = base(tmp_path / "base", [])
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"torn")
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}', encoding="utf-8")
    monkeypatch.setattr("lit_qlora.data.tokenizer.find_spec", lambda _: there or None)
    check_line(refused(name), "no tokenizer.json", *words)
    assert caplog.records == []


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    check_line(refused(base(tmp_path / "base", [])), "neither tokenizer.json nor tokenizer.model", "copy one")


# What stands in the files of others


@pytest.fixture
def demo_files(tmp_path):
    """Copies the demo's tokenizer, with some of its tokenizer_config.json in another way."""

    def files(**changes):
        folder = tmp_path / "base"
        if not folder.is_dir():
            shutil.copytree(demo.BASE, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        rules = json.loads((demo.BASE / "tokenizer_config.json").read_text(encoding="utf-8")) | changes
        (folder / "tokenizer_config.json").write_text(json.dumps(rules), encoding="utf-8")
        return folder

    return files


def one_line(folder):
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(folder))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


EMPTY = {"bos_token": "", "eos_token": "", "unk_token": ""}


@pytest.mark.parametrize("empty", [EMPTY, *({name: ""} for name in EMPTY)], ids=["all", *EMPTY])
@pytest.mark.parametrize("source", ["tokenizer_config.json", "special_tokens_map.json"])
def test_empty_special_tokens_are_reported(demo_files, empty, source):
    """The first conversions of Llama have them: the library looks for the unknown token's id without end."""
    folder = demo_files(**empty if source == "tokenizer_config.json" else {})
    if source != "tokenizer_config.json":
        rules = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        for name in ("added_tokens_decoder", *empty):
            rules.pop(name, None)
        (folder / "tokenizer_config.json").write_text(json.dumps(rules), encoding="utf-8")
        (folder / source).write_text(json.dumps(empty), encoding="utf-8")
    assert f"has an empty {next(iter(empty))}, as early conversions do; write its text into" in one_line(folder)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("bos_token", [0, True, [], {}, {"content": 5}, ["<s>"]]),
        ("eos_token", [0, [], {"a": 1}]),
        ("unk_token", [5]),
        ("pad_token", [0, [], 1.5]),
        (
            "added_tokens_decoder",
            [None, 0, "", [], {"x": {"content": "<s>"}}, {"1": "<s>"}, {"1": {}}, {"-5": {"content": ""}}],
        ),
        ("additional_special_tokens", ["", 0, "a", {"a": 1}, [[["a"]]]]),
        ("extra_special_tokens", ["", {"a": 1}]),
        ("auto_map", [None, "", 0, [], ["a"]]),
        ("chat_template", [["a"], 5, {"a": 1}]),
        ("init_inputs", [None, 0, ["a"], "a", {"a": 1}]),
        ("fast_tokenizer_files", [None, 0, [[]]]),
        ("model_input_names", [None, 0]),
        ("model_max_length", ["", [], {}, "4096"]),
        ("split_special_tokens", [None, 0, "", "no"]),
        ("padding_side", ["up", "x" * 5000, 0]),
        ("tokenizer_class", [0, [], {}]),
    ],
)
def test_odd_values_are_named(demo_files, key, values):
    for value in values:
        folder = demo_files(**{key: value})
        assert f"loaded from '{folder}': tokenizer_config.json: {key}: expected " in one_line(folder)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("tokenizer_config.json", ["", "[]", "7", "{", "[" * 200_000, '{"a":' + "[" * 200_000]),
        ("special_tokens_map.json", ["", "[]", "[" * 200_000]),
        ("added_tokens.json", ["[" * 200_000]),
        ("tokenizer.json", ["", "[]", "{", '{"a": 1}', "[" * 200_000]),
    ],
)
def test_a_file_that_is_none_is_one_line(demo_files, name, texts):
    folder = demo_files()
    if name != "tokenizer_config.json":  # which is asked first, and would do without them
        rules = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        rules.pop("added_tokens_decoder", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(rules), encoding="utf-8")
    for text in texts:
        (folder / name).write_text(text, encoding="utf-8")
        one_line(folder)


def test_a_tokenizer_that_splits_at_random_is_refused(demo_files, expect_error):
    folder = demo_files(tokenizer_class="PreTrainedTokenizerFast")
    rules = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    rules["model"] = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3, "</s>": 4}, "merges": [["a", "b"]]}
    for dropout in (0.1, 0.0, None):
        rules["model"]["dropout"] = dropout
        (folder / "tokenizer.json").write_text(json.dumps(rules | {"added_tokens": []}), encoding="utf-8")
        if dropout:
            expect_error(lambda: load_tokenizer(str(folder)), "dropout", "tokenizer.json", option="model.base")
        else:
            load_tokenizer(str(folder))


def test_what_config_json_says_has_no_part_in_it(demo_files):
    """Neither odd values of its nor code or classes that it names."""
    folder = demo_files()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"eos_token_id": "x", "pad_token_id": [1], "use_cache": "maybe", "tokenizer_class": "Evil", "id2label": 5}
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"}, "dtype": "float17"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert Encoder(load_tokenizer(str(folder)), 64).fingerprint() == Encoder(load_tokenizer("demo"), 64).fingerprint()


# Files of a base


@pytest.mark.parametrize("error", ["entry", "gated", "offline", "name"])
def test_a_file_that_the_hub_does_not_give_is_that_of_its_cache_or_none(tmp_path, monkeypatch, error):
    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, request=None)
    raised = {
        "entry": errors.RemoteEntryNotFoundError("404", response=response),
        "gated": errors.GatedRepoError("401", response=response),
        "offline": errors.LocalEntryNotFoundError("no network"),
        "name": errors.HFValidationError("Repo id must be in the form 'repo_name'"),
    }

    def fail(*_):
        raise raised[error]

    kept = tmp_path / "generation_config.json"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    assert file_of("owner/name", kept.name) is None
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(kept))
    assert file_of("owner/name", kept.name) == kept
