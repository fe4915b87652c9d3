"""What LoRA on a base promises: fp32 and alone trained, and plain PEFT folders in and out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from lit_qlora.errors import UserError
from lit_qlora.model import lora
from lit_qlora.model.base import check_lora
from lit_qlora.model.fingerprint import fingerprint, short
from lit_qlora.model.lora import adapter_parameters, load_adapter, read_format, read_record
from tests.model.test_load import DTYPES, LINEARS, linears_4bit, logits


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_are_fp32_and_alone_trained(make_model, dtype):
    model = make_model(dtype)
    adapter = adapter_parameters(model)
    assert len(adapter) == 2 * 7 * 2
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == adapter.keys()


def test_a_new_adapter_changes_nothing(load):
    model = lora.add_lora(load(), lora.Lora(4, 8.0, 0.0, "all-linear", False, False))
    assert torch.equal(logits(model), logits(load()))


def test_all_linear_leaves_the_head_alone(make_model):
    touched = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter_parameters(make_model())}
    assert touched == LINEARS


@pytest.mark.parametrize(
    ("targets", "expected"), [(["q_proj", "v_proj"], {"q_proj", "v_proj"}), ("v_proj", {"v_proj"})]
)
def test_chosen_targets(make_model, gradients, targets, expected):
    found = gradients(make_model(target_modules=targets))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in found} == expected
    assert len(found) == 2 * 2 * len(expected)


@pytest.mark.parametrize("variant", [{}, {"rslora": True}, {"dora": True}])
def test_every_variant_has_gradients(make_model, gradients, variant):
    found = gradients(make_model(**variant))
    assert all(torch.isfinite(gradient).all() and gradient.abs().sum() > 0 for gradient in found.values())
    assert any("magnitude" in name for name in found) == variant.get("dora", False)


def test_rslora_scales_by_the_root_of_the_rank(make_model):
    def scaling(**lora):
        return make_model(rank=4, alpha=8.0, **lora).base_model.model.model.layers[0].mlp.up_proj.scaling["default"]

    assert (scaling(), scaling(rslora=True)) == (2.0, 4.0)


def test_targets_that_exist(tiny):
    for targets in ("all-linear", "q_proj", ["q_proj", "down_proj"]):
        check_lora(tiny, 4, targets)


@pytest.mark.parametrize(
    ("targets", "option", "words"),
    [
        (
            ["q_proj", "c_attn"],
            "model.target_modules",
            ["'c_attn'"],
        ),
        (
            "lm_head",
            "model.target_modules",
            ["'lm_head'"],
        ),
        ([], "model.target_modules", ["got none"]),
    ],
)
def test_targets_that_do_not_exist(tiny, targets, option, words, expect_error):
    expect_error(lambda: check_lora(tiny, 4, targets), *words, option=option)


# Saving


@pytest.fixture(scope="module")
def saved(make_model, tiny, tmp_path_factory):
    """A trained adapter as it was saved, and the logits that it gave before."""
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    folder.mkdir()
    model = make_model(rank=4, dropout=0.1)
    lora.save_adapter(model, tiny, folder)
    return folder, logits(model)


@pytest.fixture
def adapter(saved, tmp_path):
    """A copy of it, to damage."""
    return shutil.copytree(saved[0], tmp_path / "adapter")


def plain_base(location):
    """The same base without any code of ours."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = LlamaForCausalLM.from_pretrained(location, quantization_config=quantization, device_map={"": "cpu"})
    for module in linears_4bit(model).values():
        module.support_avx512bf16_for_cpu = False  # its repacking fails at widths that 32 does not divide
    return model


def test_the_folder_holds_just_these_files(saved):
    names = {"adapter_config.json", "adapter_model.safetensors", "lit_qlora.json"}
    assert {path.name for path in saved[0].iterdir()} == names


@pytest.mark.parametrize("variant", [{}, {"rslora": True}, {"dora": True}, {"target_modules": ["q_proj", "v_proj"]}])
def test_plain_peft_gives_the_same_logits(make_model, tiny, tmp_path, variant):
    model = make_model(**variant)
    lora.save_adapter(model, tiny, tmp_path)
    loaded = PeftModel.from_pretrained(plain_base(tiny.location), str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))


def test_weights_are_saved_in_fp32_under_pefts_names(saved):
    tensors = load_file(saved[0] / "adapter_model.safetensors")
    assert len(tensors) == 28
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (4, 172)


def test_no_local_path_leaves(saved, tiny):
    config = json.loads((saved[0] / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "tiny-llama"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8.0, 0.1)
    # In one order, whichever process writes it.
    assert config["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    for name in ("adapter_config.json", "lit_qlora.json"):
        assert str(tiny.location) not in (saved[0] / name).read_text(encoding="utf-8")


def test_the_record_says_base_and_prompt_format(saved, tiny):
    assert read_record(saved[0]) == {
        "base": "tiny-llama",
        "base_fingerprint": fingerprint(tiny),
        "prompt_format": "llama2-chat",
        "base_dtype": "float32",
        "rank": 4,
        "alpha": 8.0,
        "rslora": False,
        "dora": False,
    }


def test_saving_leaves_the_model_in_training(make_model, gradients, tiny, tmp_path):
    model = make_model()
    before = gradients(model)
    lora.save_adapter(model, tiny, tmp_path)
    after = gradients(model)
    assert model.training
    assert all(torch.equal(after[name], before[name]) for name in before)


# Loading an adapter


def test_a_loaded_adapter_gives_the_same_logits(saved, load, tiny):
    folder, expected = saved
    assert torch.equal(logits(load_adapter(load(), tiny, folder, trainable=False)), expected)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_loaded_adapter_is_trained_on_where_asked(saved, load, tiny, trainable):
    model = load_adapter(load(), tiny, saved[0], trainable)
    adapter = adapter_parameters(model)
    assert {weight.requires_grad for weight in adapter.values()} == {trainable}
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    assert not any(weight.requires_grad for name, weight in model.named_parameters() if name not in adapter)


def test_a_loaded_adapter_has_the_gradients_of_the_saved_one(make_model, gradients, load, tiny, tmp_path):
    model = make_model()
    lora.save_adapter(model, tiny, tmp_path)
    loaded = load_adapter(load(), tiny, tmp_path, trainable=True).train()
    expected, found = gradients(model), gradients(loaded)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_loaded_adapter_is_saved_as_it_was(saved, load, tiny, tmp_path):
    lora.save_adapter(load_adapter(load(), tiny, saved[0], trainable=True), tiny, tmp_path)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (saved[0], tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_record(tmp_path) == read_record(saved[0])


def test_weights_alone_are_taken_over(saved, make_model):
    folder, expected = saved
    model = make_model(rank=4)
    with torch.no_grad():
        for weight in adapter_parameters(model).values():
            weight.zero_()
    lora.load_adapter_weights(model, folder)
    assert torch.equal(logits(model), expected)


def test_an_adapter_of_plain_peft_without_a_record(tiny, load, tmp_path):
    model = get_peft_model(plain_base(tiny.location), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for weight in adapter_parameters(model).values():
            weight.normal_()
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert read_record(tmp_path) == {"base": tiny.location, "base_fingerprint": None, "prompt_format": "llama2-chat"}
    loaded = load_adapter(load(), tiny, tmp_path, trainable=False)
    assert torch.equal(logits(loaded), logits(model))


@pytest.fixture
def foreign(saved, tmp_path):
    """An adapter without a record, as other tools save it."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(saved[0] / name, tmp_path)
    return tmp_path


OWN = "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("chat_template.jinja", OWN),
        ("tokenizer_config.json", json.dumps({"chat_template": OWN})),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "default", "template": OWN}]})),
    ],
)
def test_an_adapter_of_another_tool_brings_the_chat_template_of_its_tokenizer(foreign, file, text):
    (foreign / file).write_text(text, encoding="utf-8")
    found = read_format(foreign)
    assert (found.source, found.is_assumed) == (OWN, True)
    assert found.kept(None, "x") == OWN
    assert found.kept("{{ another }}", "x") == "{{ another }}"  # it is no record of training's


@pytest.mark.parametrize("text", ["{}", '{"chat_template": null}', '{"chat_template": [{"name": "rag"}]}'])
def test_without_a_chat_template_the_llama_2_format_is_assumed(foreign, text):
    (foreign / "tokenizer_config.json").write_text(text, encoding="utf-8")
    found = read_format(foreign)
    assert (found.name, found.is_assumed) == ("llama2-chat", True)
    assert found.kept("{{ another }}", "x") == "{{ another }}"


def test_a_weight_that_is_no_lora_is_refused(foreign, expect_error):
    """Such a weight is how peft saves embeddings with tokens added to them."""
    stored = load_file(foreign / "adapter_model.safetensors")
    save_file(stored | {"base_model.model.lm_head.weight": torch.ones(515, 64)}, foreign / "adapter_model.safetensors")
    expect_error(
        lambda: read_record(foreign), "base_model.model.lm_head.weight", "save_embedding_layers=False", place=foreign
    )
    embedding = "base_model.model.model.embed_tokens"  # with LoRA, its weights can't be left out
    of_peft = {f"{embedding}.{name}": torch.ones(4, 4) for name in ("base_layer.weight", "lora_embedding_A")}
    save_file(stored | of_peft, foreign / "adapter_model.safetensors")
    expect_error(lambda: read_record(foreign), "LoRA on model.embed_tokens", "expected linear layers", place=foreign)


def refusal(model, base, folder):
    """What ``folder`` is refused with, one line."""
    with pytest.raises(UserError) as error:
        load_adapter(model, base, folder, trainable=False)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def expect_refusal(expect_error):
    """Has the adapter in ``folder`` refused with these words."""

    def expect_refusal(model, base, folder, *words, place=None):
        return expect_error(
            lambda: load_adapter(model, base, folder, trainable=False), *words, place=folder if place is None else place
        )

    return expect_refusal


def edit(file, **changes):
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(values | changes), encoding="utf-8")


def edit_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


A_WEIGHT = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


def test_a_folder_that_is_no_adapter(load, tiny, tmp_path):
    no_adapter = f"{tmp_path} is no adapter: it has no adapter_config.json"
    assert refusal(load(), tiny, tmp_path) == no_adapter
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").touch()
    assert refusal(load(), tiny, tmp_path) == f"{no_adapter}; did you mean {tmp_path / 'adapter'}?"
    (tmp_path / "config.json").touch()
    assert refusal(load(), tiny, tmp_path).startswith(f"{no_adapter}; it is a whole model")


def test_an_adapter_of_another_base(load, tiny, other_tiny, adapter, expect_refusal):
    was, given = (f"{base.public_name} ({short(fingerprint(base))})" for base in (tiny, other_tiny))
    expect_refusal(load(base=other_tiny), other_tiny, adapter, f"trained on {was}", given, "--model.base")


def test_a_rank_edited_in_the_config(load, tiny, adapter, expect_refusal):
    edit(adapter / "adapter_config.json", r=8)
    edit(adapter / "lit_qlora.json", rank=8)
    expect_refusal(load(), tiny, adapter, "model.layers.0.mlp.down_proj the rank 8", "have 4")


def test_a_weight_of_the_wrong_shape(load, tiny, adapter, expect_refusal):
    edit_tensors(adapter, lambda tensors: tensors.update({A_WEIGHT: torch.ones(4, 64)}))
    expect_refusal(load(), tiny, adapter, "does not fit tiny-llama", f"{A_WEIGHT} is [4, 64]", "[4, 172]")


def test_a_missing_weight(load, tiny, adapter, expect_refusal):
    edit_tensors(adapter, lambda tensors: tensors.pop(A_WEIGHT))
    expect_refusal(load(), tiny, adapter, "does not fit tiny-llama", f"{A_WEIGHT} is missing", "[4, 172]")


def test_a_weight_too_many(load, tiny, adapter, expect_refusal):
    name = "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"  # the base has two layers
    edit_tensors(adapter, lambda tensors: tensors.update({name: torch.ones(4, 64)}))
    expect_refusal(load(), tiny, adapter, "does not fit tiny-llama", f"{name} is [4, 64]", "no such weight")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite(load, tiny, adapter, value, expect_refusal):
    edit_tensors(adapter, lambda tensors: tensors[A_WEIGHT].view(-1).__setitem__(3, float(value)))
    expect_refusal(load(), tiny, adapter, "not finite", place=adapter / "adapter_model.safetensors")


def test_weights_in_a_pickle_alone(adapter, expect_error):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    expect_error(lambda: read_record(adapter), "can execute code", "save_pretrained", place=adapter)


def test_weights_under_other_names_than_peft_s(adapter, expect_error):
    file = adapter / "adapter_model.safetensors"
    save_file({name.removeprefix("base_model.model."): one for name, one in load_file(file).items()}, file)
    expect_error(
        lambda: read_record(adapter), "is no name of peft's", "base_model.model.", "save_pretrained", place=adapter
    )


@pytest.mark.parametrize("kept", [0, 100, -1000])
def test_a_truncated_file(load, tiny, adapter, kept):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert refusal(load(), tiny, adapter).startswith(f"{adapter}: the adapter can't be read: ")


def test_a_folder_without_weights(load, tiny, adapter):
    (adapter / "adapter_model.safetensors").unlink()
    assert refusal(load(), tiny, adapter).startswith(f"{adapter}: the adapter can't be read: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "/adapter_config.json can't be read: it is no JSON"),
        ("[]", "/adapter_config.json: expected a JSON object, got ["),
        ("{}", ": adapter_config.json has the peft_type null, expected LORA"),
        ('{"peft_type": "IA3"}', ": adapter_config.json has the peft_type IA3, expected LORA"),
    ],
)
def test_a_config_of_no_lora(load, tiny, adapter, text, message):
    (adapter / "adapter_config.json").write_text(text, encoding="utf-8")
    assert refusal(load(), tiny, adapter).startswith(f"{adapter}{message}")


def test_an_unknown_prompt_format(load, tiny, adapter, expect_refusal):
    edit(adapter / "lit_qlora.json", prompt_format="alpaca")
    expect_refusal(load(), tiny, adapter, "'alpaca'", "'llama2-chat' and 'jinja'")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", " can't be read: it is no JSON"), ("[1]", ": expected a JSON object, got [")],
)
def test_a_broken_record(load, tiny, adapter, text, message):
    (adapter / "lit_qlora.json").write_text(text, encoding="utf-8")
    assert refusal(load(), tiny, adapter).startswith(f"{adapter / 'lit_qlora.json'}{message}")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora_alpha": 16}, "lora_alpha 16, expected 8.0"),
        ({"r": 8}, "r 8, expected 4"),
        ({"use_rslora": True}, "use_rslora True, expected False"),
        ({"use_dora": True}, "use_dora True, expected False"),
        ({"lora_alpha": None}, "lora_alpha False, expected 8.0"),
    ],
)
def test_a_config_that_says_something_else_than_the_record(adapter, changes, expected, expect_error):
    edit(adapter / "adapter_config.json", **changes)
    expect_error(lambda: read_record(adapter), "altered", expected, "delete its lit_qlora.json", place=adapter)


def test_without_its_record_a_config_that_was_edited_is_taken_as_peft_would(adapter):
    edit(adapter / "adapter_config.json", lora_alpha=16)
    (adapter / "lit_qlora.json").unlink()
    assert read_record(adapter)["base_fingerprint"] is None


@pytest.mark.parametrize("lost", [{"base", "base_fingerprint"}, {"base"}, {"base_fingerprint"}, None])
def test_a_record_without_its_base(adapter, lost, expect_error):
    record = json.loads((adapter / "lit_qlora.json").read_text(encoding="utf-8"))
    left = {name: value for name, value in record.items() if lost and name not in lost}
    (adapter / "lit_qlora.json").write_text(json.dumps(left), encoding="utf-8")
    expect_error(lambda: read_record(adapter), "lit_qlora.json", "name its base", "altered", place=adapter)


def test_an_adapter_is_never_a_url(expect_error):
    expect_error(lambda: read_record(Path("https://x.y/z")), "x.y/z is a URL")
