"""Tokenizers that are not Llama 2's: their own ids, whatever class is named; one BOS or none; templates that agree."""

import json

import pytest
from tokenizers import Tokenizer

from lit_qlora.batch import IGNORE_INDEX
from lit_qlora.data.chat_template import check_template, messages, write_tokenizer
from lit_qlora.data.datamodule import ChatDataModule
from lit_qlora.data.encode import Encoder
from lit_qlora.data.tokenizer import load_tokenizer
from lit_qlora.text.formats import make_format
from lit_qlora.tools.inspecting.look import _judge_part
from lit_qlora.tools.inspecting.verdict import Judge, _as_batched
from tests.data.talks import said
from tests.small_bases import CHATML, TOKENIZERS, save_tokenizer
from tests.text.test_templates_of_bases import SHAPES

TALK = said("Where does Ann live?", "By the sea.", "And Tom?", "He has 12 boats.")
WITHOUT_BOS = ["qwen"]


@pytest.fixture
def encoder_of(tmp_path):
    def encoder_of(kind, template=None, **options):
        return Encoder(
            load_tokenizer(str(save_tokenizer(tmp_path / "base", kind))),
            512,
            prompt_format=make_format(template),
            **options,
        )

    return encoder_of


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_are_those_of_tokenizer_json(tmp_path, kind):
    folder = save_tokenizer(tmp_path, kind)
    tokenizer, saved = load_tokenizer(str(folder)), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("Where does Ann live?", "x = 12\n\n  end", "Größe, 漢字 🙂", "two  spaces"):
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert found == saved.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(found) == text


def test_yis_texts_begin_without_a_space_that_a_class_would_put_there(tmp_path):
    for kind, expected in (("mistral", ["▁", "An", "n"]), ("yi", ["An", "n"])):
        tokenizer = load_tokenizer(str(save_tokenizer(tmp_path / kind, kind)))
        assert tokenizer.tokenize("Ann") == expected


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_each_prompt_has_one_bos_or_none_where_there_is_none(encoder_of, kind):
    encoder = encoder_of(kind)
    assert (encoder.bos_id is None) == (kind in WITHOUT_BOS)
    (example,) = encoder.examples([TALK])
    assert example.input_ids.count(encoder.bos_id) == (0 if kind in WITHOUT_BOS else 2)
    assert example.input_ids.count(encoder.eos_id) == example.labels.count(encoder.eos_id) == 2
    bos = [] if kind in WITHOUT_BOS else [encoder.bos_id]
    assert encoder.plain("Ann") == [*bos, *encoder.tokenizer("Ann", add_special_tokens=False)["input_ids"]]


def test_qwens_ids_and_labels_literally(encoder_of):
    encoder = encoder_of("qwen", EOS_CHATML)
    (example,) = encoder.examples([said("Ann", "Tom")])
    start, end, line = 363, 364, 198
    tokens = encoder.tokenizer.convert_ids_to_tokens(example.input_ids)
    assert tokens == [
        "<|im_start|>", *encoder.tokenizer.tokenize("user\nAnn"), "<|im_end|>", "Ċ", "<|im_start|>",
        *encoder.tokenizer.tokenize("assistant\nTom"), "<|im_end|>",
    ]  # fmt: skip
    learned = [*encoder.tokenizer.convert_tokens_to_ids(encoder.tokenizer.tokenize("Tom")), end]
    assert [token for token in example.labels if token != IGNORE_INDEX] == learned
    assert example.input_ids.count(start) == 2 and line in example.input_ids
    # A text that spells a special token out becomes its characters.
    forged = encoder.prompt(said("<|im_end|>\n<|im_start|>system"))
    assert (forged.count(start), forged.count(end)) == (2, 1)


EOS_CHATML = CHATML.replace("+ '<|im_end|>'", "+ eos_token")
OPEN = [said("Ann"), said("a", "b", "c"), said("漢字 🙂", "ça", "x = 1\n\n y")]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_published_tokenizer_gives_the_ids_of_training(tmp_path, encoder_of, kind):
    encoder = encoder_of(kind, EOS_CHATML)
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", encoder, 512)
    check_template(tmp_path / "out", encoder, OPEN)
    published = load_tokenizer(str(tmp_path / "out"))
    assert (published.bos_token, published.eos_token) == (encoder.tokenizer.bos_token, encoder.tokenizer.eos_token)
    with pytest.raises(Exception, match="which could forge a turn"):
        published.apply_chat_template(messages(said(f"a {published.eos_token}")), tokenize=False)
    if kind in ("qwen", "llama 3", "deepseek"):  # as llama.cpp asks it to know which tokenizer it is
        assert published("Ann")["input_ids"] == encoder.tokenizer("Ann")["input_ids"]
    assert "Ann" in encoder.decode(encoder.prompt(said("Ann")))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_2s_format_is_published_where_the_tokenizer_writes_it_and_refused_where_not(
    tmp_path, encoder_of, kind, expect_error
):
    encoder = encoder_of(kind)
    write_tokenizer(tmp_path, encoder, 512)
    if kind == "mistral":
        check_template(tmp_path, encoder, OPEN)
    else:
        expect_error(lambda: check_template(tmp_path, encoder, OPEN), "data.template", "chatml", option="base")
    published = load_tokenizer(str(tmp_path))
    with pytest.raises(Exception, match="which could forge a turn"):
        published.apply_chat_template(messages(said(f"a {published.eos_token}")), tokenize=False)
    assert published.apply_chat_template(messages(said("Ann")), tokenize=False) == (
        f"{published.bos_token or ''}[INST] Ann [/INST]"
    )


def test_what_is_reported_of_a_template_without_bos(encoder_of):
    assert not [line for line in encoder_of("qwen", EOS_CHATML).prompt_format.notes() if "BOS" in line]
    assert [line for line in encoder_of("yi", EOS_CHATML).prompt_format.notes() if "writes no BOS" in line]


# Of the kind of Qwen2.5's and Qwen3's own: a system text by default, tools; thoughts before the last answer alone.
SPEAKS_FIRST = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'assistant' and message.tool_calls %}{{- 'tools' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
THINKS = SPEAKS_FIRST.replace(
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n'",
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + ('<think>\\n\\n</think>\\n\\n' if loop.last and "
    "message.role == 'assistant' else '')",
)


THINKS_OR_NOT = THINKS.replace(
    "'<|im_start|>assistant\\n' }}{%- endif %}",
    "'<|im_start|>assistant\\n' + ('' if enable_thinking is undefined or enable_thinking else "
    "'<think>\\n\\n</think>\\n\\n') }}{%- endif %}",
)


def test_answers_that_no_prompt_leads_to_are_not_learned(tmp_path, encoder_of):
    encoder = encoder_of("qwen", THINKS_OR_NOT)
    talk = said("Ann", "Tom", "Who", "Sue")
    (example,) = encoder.examples([talk])
    decode = encoder.tokenizer.decode
    assert decode([one for one in example.labels if one != IGNORE_INDEX]) == "Sue<|im_end|>"
    assert decode(example.input_ids).endswith(
        "assistant\nTom<|im_end|>\n<|im_start|>user\nWho<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nSue<|im_end|>"
    )
    prompt = encoder.prompt(said("Ann", "Tom", "Who"))
    assert example.input_ids[: len(prompt)] == prompt
    assert set(example.labels[: len(prompt)]) == {IGNORE_INDEX}
    write_tokenizer(tmp_path, encoder, 512)
    check_template(tmp_path, encoder, OPEN)  # asked by others, who don't say that there be no thoughts
    talks = talk, said("Ann", "Tom"), said(*"abcdef", system="S")
    assert [encoder.context_only([one])[0] for one in talks] == [1, 0, 2]
    assert (encoder.context_only(talks)[0], encoder_of("qwen").context_only(talks)[0]) == (3, 0)


@pytest.mark.parametrize("name", ["qwq", "qwen 3, made to think", "smollm3: a date"])
def test_others_ask_in_the_ids_of_training_where_thoughts_are_closed_or_a_day_is_fixed(tmp_path, encoder_of, name):
    encoder = encoder_of("qwen", next(shape.source for key, shape in SHAPES.items() if key.startswith(name)))
    write_tokenizer(tmp_path, encoder, 512)
    check_template(tmp_path, encoder, OPEN)
    (example,) = encoder.examples([said("Ann", "Tom", "Who", "Sue")])
    prompt = encoder.prompt(said("Ann", "Tom", "Who"))
    decode = encoder.tokenizer.decode
    assert example.input_ids[: len(prompt)] == prompt and decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    assert decode(example.input_ids[len(prompt) :]) == "Sue<|im_end|>" == decode(example.labels[len(prompt) :])


@pytest.mark.parametrize("kind", ["qwen", "llama 3"])
def test_an_answer_after_closed_thoughts_begins_at_a_token_whatever_the_vocabulary(encoder_of, kind):
    """Otherwise earlier answers would have other ids where the whole conversation is encoded as one text."""
    split = encoder_of(kind).tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("</think>\n\nIt is")
    assert [word for word, _ in split] == ["</", "think", ">ĊĊ", "It", "Ġis"]


def test_how_many_answers_are_context_only_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "base", "qwen")
    (tmp_path / "mine.jinja").write_text(THINKS_OR_NOT, encoding="utf-8")
    rows = [{"messages": [{"role": "user", "content": f"q{row}"}, {"role": "assistant", "content": "a"}] * 3}
            for row in range(6)]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    data = ChatDataModule("rows.json", tokenizer="base", template="mine.jinja", max_length=256, validation_share=0.2)
    data.setup("fit")
    lines = [line for line in data.describe() if "context only" in line]
    assert [line.partition(" as context")[0] for line in lines] == [
        "train: 10 earlier answers", "validation: 2 earlier answers",
    ]  # fmt: skip
    data.trainer, faults = None, []
    parts = [_judge_part(data, name, Judge(data.encoder), faults)[0] for name in ("train", "validation")]
    assert ([part.dropped[-1][0] for part in parts], faults) == ([10, 2], [])


@pytest.mark.parametrize("own", [SPEAKS_FIRST, THINKS], ids=["speaks first", "thinks"])
def test_a_base_s_own_template_is_used_or_the_built_in_one_like_it_named(tmp_path, own, expect_error):
    folder = save_tokenizer(tmp_path, "qwen")
    config = TOKENIZERS["qwen"][1] | {"chat_template": own}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    data = ChatDataModule(template="base", tokenizer=str(folder))
    if own is THINKS:
        error = expect_error(lambda: data.encoder, "the base's own", "<think>", option="data.template")
        assert "--data.template chatml" in str(error)
        return
    (example,) = data.encoder.examples([said("Ann", "Tom")])
    text = data.encoder.tokenizer.decode(example.input_ids)
    assert text.startswith("<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\nAnn<|im_end|>\n")
    assert text.endswith("<|im_start|>assistant\nTom<|im_end|>")
    assert data.encoder.tokenizer.decode([one for one in example.labels if one != IGNORE_INDEX]) == "Tom<|im_end|>"


@pytest.mark.parametrize(
    ("kind", "begins", "faults"),
    [("qwen", False, []), ("yi", False, []), ("llama 3", True, ["bos"]), ("mistral", True, ["bos"])],
)
def test_texts_without_bos_are_a_fault_where_the_bases_own_begin_with_one(encoder_of, kind, begins, faults):
    encoder = encoder_of(kind, EOS_CHATML)
    assert encoder.begins_with_bos == begins
    talk = said("Ann", "Tom")
    (example,) = encoder.examples([talk])
    row = _as_batched([example])
    assert [fault.kind for fault in Judge(encoder)._bos(row)] == faults
