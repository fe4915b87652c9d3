"""Adapters made elsewhere: for each field of LoraConfig the numbers of plain peft, or one line that names it."""

import dataclasses
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import LlamaForCausalLM

from lit_qlora.batch import Batch, answer_targets
from lit_qlora.errors import UserError
from lit_qlora.model import lora, lora_config
from lit_qlora.model.decoder import why_not
from lit_qlora.model.lora import Lora, adapter_parameters, check_settings, load_adapter, read_record
from lit_qlora.model.module import QLoRAModule
from lit_qlora.quiet import quieten
from lit_qlora.tools.merging.arithmetic import LoraWeights, StoredWeights, merged_tensors

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

COMPUTED = [
    {},
    {"r": 3},
    {"lora_alpha": 5},
    {"lora_dropout": 0.2},
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": r".*layers\.1\..*(v|up)_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "up_proj"]},
    {"exclude_modules": ["q_proj", "layers.1.mlp.up_proj"]},
    {"exclude_modules": r".*\.0\..*"},
    {"layers_to_transform": 1},
    {"layers_to_transform": [0], "layers_pattern": "layers"},
    {"layers_to_transform": [1], "layers_pattern": ["layers"], "target_modules": ["v_proj"]},
    {"rank_pattern": {"layers.1.self_attn.q_proj": 1}},
    {"rank_pattern": {"k_proj": 1, "down_proj": 8}, "use_rslora": True},
    {"alpha_pattern": {"layers.1.self_attn.q_proj": 1}},
    {"alpha_pattern": {"v_proj": 64, r"layers\.0\.mlp\.(up|down)_proj": 2.5}},
    {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"^model.layers.1.mlp.up_proj": 5}},
    {"rank_pattern": {"k_proj": 1, "up_proj": 2}, "alpha_pattern": {"k_proj": 3, "mlp.gate_proj": 40}},
    {"use_rslora": True},
    {"use_dora": True},
    {"use_dora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    {"lora_bias": True},
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"fan_in_fan_out": True},
    {"qalora_group_size": 8},
    {"megatron_core": "another"},
    {"revision": "main"},
    {"inference_mode": True},
    {"task_type": None},
    {"task_type": "SEQ_2_SEQ_LM"},
]
"""What peft makes, and we compute: by our own layers, but for DoRA and biases."""

LEFT_BEHIND = [
    {"init_lora_weights": "orthogonal"},
    {"ensure_weight_tying": True},
    {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
    {"peft_version": "99.0"},
    {"base_model_name_or_path": "nobody/nothing"},
    {"runtime_config": {"ephemeral_gpu_offload": True}},
    {"loftq_config": {"loftq_bits": 4}},
    {"corda_config": {"corda_method": "kpm"}},
    {"lora_ga_config": {"direction": "ArBr"}},
    {"a_field_of_tomorrow": None},
]
"""What a file may say beside, that changes nothing of a trained adapter."""

REFUSED = [
    {"bias": "all"}, {"bias": "lora_only"},
    {"modules_to_save": ["lm_head"]},
    {"trainable_token_indices": [3, 4]}, {"trainable_token_indices": {"embed_tokens": [3]}},
    *({"init_lora_weights": kind} for kind in (
        "pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "PiSSA", "of_tomorrow")),
    {"layer_replication": [[0, 2], [0, 1]]},
    {"target_parameters": ["mlp.experts"]},
    {"megatron_config": {"a": 1}},
    {"alora_invocation_tokens": [5, 6]},
    {"use_qalora": True},
    {"velora_config": {"num_groups": 8}},
    {"monteclora_config": {"num_samples": 2}},
    {"use_bdlora": {"nblocks": 2}},
    {"arrow_config": {"top_k": 2}},
    {"kasa_config": {"beta": 1e-4}},
    {"a_field_of_tomorrow": "anything"}, {"another": 0.5},
]  # fmt: skip
MALFORMED = [
    {"r": 0}, {"r": "8"}, {"r": True}, {"r": 2.5}, {"lora_alpha": "16"}, {"lora_alpha": [1]}, {"lora_dropout": 1.0},
    {"lora_dropout": "0"}, {"target_modules": 7}, {"target_modules": [1]}, {"exclude_modules": {"a": 1}},
    {"layers_to_transform": "1"}, {"layers_to_transform": [-1]}, {"layers_pattern": 3}, {"rank_pattern": ["q_proj"]},
    {"rank_pattern": {"q_proj": 0}}, {"rank_pattern": {"q_proj": "4"}}, {"alpha_pattern": {"q_proj": None}},
    {"r": 10**18}, {"r": 10**400}, {"rank_pattern": {"q_proj": 10**7}}, {"lora_alpha": 10**400},
    {"lora_alpha": float("inf")}, {"alpha_pattern": {"q_proj": -(10**400)}}, {"layers_to_transform": [10**30]},
    {"alpha_pattern": 4}, {"use_rslora": "no"}, {"use_dora": 1}, {"lora_bias": "none"},
]  # fmt: skip


def named(changes):
    return json.dumps(changes)


def test_every_field_of_peft_is_decided_and_tried():
    """A newer peft may have a field that is in no list: decide it, and give it a case here."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= {*lora_config.COMPUTED, *lora_config.WITHOUT_EFFECT, *lora_config.REFUSED}
    tried = {name for changes in (*COMPUTED, *LEFT_BEHIND, *REFUSED) for name in changes}
    assert fields - tried == {"peft_type"}
    assert {*lora_config.COMPUTED} == {name for changes in MALFORMED for name in changes}


@pytest.fixture(scope="module")
def made(load, tmp_path_factory):
    """An adapter with weights that are not zero, of plain peft on the same 4-bit base, and its folder."""

    def made(changes):
        torch.manual_seed(5)
        model = get_peft_model(load(), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, **changes}))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".lora_A." in name or ".lora_B." in name:
                    weight.normal_(std=0.1)
                elif "magnitude" in name:
                    weight.mul_(1 + 0.3 * torch.rand_like(weight))
        folder = tmp_path_factory.mktemp("made") / "adapter"
        model.save_pretrained(str(folder), save_embedding_layers=False)
        return model, folder

    return made


def batch():
    ids = torch.randint(3, 512, (2, 12), generator=torch.Generator().manual_seed(2))
    return Batch(ids, *answer_targets(ids), (0, 1), ids.numel(), ids.numel())


def gradients(model):
    """Each layer's, under names that no two kinds of PeftModel differ in."""
    found = {name.removeprefix("base_model."): value.grad for name, value in adapter_parameters(model).items()}
    assert all(value is not None for value in found.values())
    return found


def by_peft(model):
    """Loss and gradients of plain peft and transformers."""
    for value in adapter_parameters(model).values():
        value.requires_grad_()
    model.zero_grad()
    one = batch()
    logits = model.eval()(input_ids=one.input_ids, use_cache=False).logits.flatten(0, 1)[one.positions]
    loss = functional.cross_entropy(logits, one.targets, reduction="sum")
    loss.backward()
    return loss.item(), gradients(model)


def by_us(model, tiny, kept_layers=1):
    module = QLoRAModule(tiny.location)
    module.model, module.slow_because, module.kept_layers = model, why_not(model), kept_layers
    model.zero_grad()
    loss = module.eval().summed_loss(batch())[0]
    loss.backward()
    return loss.item(), gradients(model)


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0, name
        assert (found[1][name] - gradient).norm() < 2e-5 * gradient.norm(), name


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("changes", COMPUTED, ids=named)
def test_loss_and_gradients_are_plain_pefts(made, load, tiny, tmp_path, changes):
    """The same holds for the adapter as saved and loaded again."""
    plain, folder = made(changes)
    expected = by_peft(plain)
    model = load_adapter(load(), tiny, folder, trainable=True)
    slow = {"use_dora": "DoRA", "lora_bias": "LoRA with a bias (lora_bias)"}
    assert why_not(model) == next((why for name, why in slow.items() if name in changes), None)
    for kept_layers in (0, 2):
        assert_same(by_us(model, tiny, kept_layers), expected)
    lora.save_adapter(model, tiny, tmp_path)
    assert_same(by_peft(PeftModel.from_pretrained(load(), str(tmp_path), is_trainable=True)), expected)
    assert_same(by_us(load_adapter(load(), tiny, tmp_path, trainable=True), tiny), expected)


@pytest.mark.parametrize("changes", LEFT_BEHIND, ids=named)
def test_what_is_said_beside_changes_nothing(made, load, tiny, changes):
    plain, folder = made({})
    edit(folder, **changes)
    assert_same(by_us(load_adapter(load(), tiny, folder, trainable=True), tiny), by_peft(plain))


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("changes", [one for one in COMPUTED if "lora_bias" not in one], ids=named)
def test_a_merge_is_plain_pefts(tiny, tiny_folder, tmp_path, changes):
    torch.manual_seed(5)
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, **changes}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(0.1 * torch.rand_like(weight))
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    lora = LoraWeights(tmp_path)
    found = dict(merged_tensors(StoredWeights(tiny), lora, "original", torch.float32, torch.device("cpu")))
    for name, value in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


def test_a_bias_of_lora_can_not_be_merged(made):
    _, folder = made({"lora_bias": True})
    with pytest.raises(UserError, match=r"has lora_bias"):
        LoraWeights(folder)


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.fixture(scope="module")
def plain_folder(made):
    return made({})[1]


@pytest.fixture
def folder(plain_folder, tmp_path):
    for file in plain_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("changes", [*REFUSED, *MALFORMED], ids=named)
def test_what_is_not_computed_is_refused_before_anything_is_loaded(folder, changes):
    edit(folder, **changes)
    ((name, value),) = changes.items()
    for read in (read_record, LoraWeights):  # each verb begins with the first
        with pytest.raises(UserError) as caught:
            read(folder)
        assert f"{folder}: adapter_config.json has {name} {json.dumps(value)[:50]}" in str(caught.value)
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"r": 60_000}, "gives model.layers.0.mlp.down_proj the rank 60000, and its weights have 4"),
        ({"rank_pattern": {"q_proj": 5}}, "gives model.layers.0.self_attn.q_proj the rank 5, and its weights have 4"),
        ({"r": 60_000, "rank_pattern": {".*": 4}}, "has a rank of 60000, and no layer is as wide"),
        ({"rank_pattern": {"nothing": 60_000}}, "has a rank of 60000, and no layer is as wide"),
    ],
)
def test_a_rank_that_no_weights_have_is_refused_before_it_takes_memory(folder, changes, expected):
    edit(folder, **changes)
    with pytest.raises(UserError) as caught:
        read_record(folder)
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
@pytest.mark.parametrize("is_null", [True, False])
def test_what_must_be_there(folder, name, is_null):
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config[name]
    file.write_text(json.dumps(config | ({name: None} if is_null else {})), encoding="utf-8")
    with pytest.raises(UserError, match=f"adapter_config.json lacks {name}"):
        read_record(folder)


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_lora_on_other_layers_is_refused(made, layer):
    """The loss reads the head's own weight, and would never see it."""
    _, folder = made({"target_modules": ["q_proj", layer]})
    with pytest.raises(UserError) as caught:
        read_record(folder)
    assert "adapter_config.json's target_modules" in str(caught.value)
    assert f"LoRA on {'model.' if layer[0] == 'e' else ''}{layer}," in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"rank_pattern": {"no_proj": 2}}, {"alpha_pattern": {"no_proj": 2}}, {"exclude_modules": "no_proj"}]
)
def test_what_fits_no_layer_has_no_effect_and_no_warning(folder, changes, load, tiny):
    edit(folder, **changes)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quieten()
        load_adapter(load(), tiny, folder, trainable=False)
    assert [str(one.message) for one in shown] == []


@pytest.mark.parametrize(
    "changes", [{"target_modules": "(q_proj"}, {"rank_pattern": {"(q": 2}}, {"layers_to_transform": 9}]
)
def test_what_peft_can_not_read_is_one_line(folder, load, tiny, changes):
    edit(folder, **changes)
    with pytest.raises(UserError) as caught:
        load_adapter(load(), tiny, folder, trainable=False)
    assert "\n" not in str(caught.value)


def test_to_continue_the_layers_that_have_lora_are_asked_for(made):
    """However the file names them: by a pattern, by whole paths, or by what is left out."""
    for changes in ({"target_modules": r".*\.(q|v)_proj"}, {"exclude_modules": r".*(k|o|gate|up|down)_proj"}):
        _, folder = made(changes)
        check_settings(folder, Lora(4, 8.0, 0.0, ["v_proj", "q_proj"], False, False))
        with pytest.raises(UserError, match=r"""give --model.target_modules '\["q_proj", "v_proj"\]'"""):
            check_settings(folder, Lora(4, 8.0, 0.0, "all-linear", False, False))


def test_a_saved_pattern_stays_a_pattern(made, load, tiny, tmp_path):
    _, folder = made({"target_modules": r".*\.(q|v)_proj"})
    lora.save_adapter(load_adapter(load(), tiny, folder, trainable=True), tiny, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == r".*\.(q|v)_proj"


def test_weights_in_half_precision_are_trained_in_fp32(made, load, tiny):
    plain, folder = made({})
    file = folder / "adapter_model.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file, {"format": "pt"})
    for value in adapter_parameters(plain).values():
        value.data = value.data.half().float()
    model = load_adapter(load(), tiny, folder, trainable=True)
    assert {value.dtype for value in adapter_parameters(model).values()} == {torch.float32}
    assert_same(by_us(model, tiny), by_peft(plain))


ENDLESS = r"model\.(\w+\.?)*x"


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"rank_pattern": {"q_proj": 2, ENDLESS: 1}},
        {"alpha_pattern": {ENDLESS: 1}},
    ],
    ids=named,
)
def test_a_pattern_that_never_ends_is_refused(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(lora_config, "MATCHED_IN_S", 0.5)
    with pytest.raises(UserError, match=r"pattern .* takes too long .*model"):
        lora_config.check_ranks(tmp_path, {"r": 1, **changes}, {})


@pytest.mark.parametrize("name", ["rank_pattern", "layers_pattern"])
def test_what_is_no_pattern_is_refused(tmp_path, name):
    given = {"(": 1} if name == "rank_pattern" else "("
    with pytest.raises(UserError, match=r"adapter_config.json has a pattern .*: \(: missing \)"):
        lora_config.check_ranks(tmp_path, {"r": 1, name: given}, {})


def test_a_pattern_is_matched_without_code_of_the_current_folder(tmp_path, monkeypatch):
    """The current folder is the adapter's own if a command is given there."""
    for name in ("json", "re"):
        (tmp_path / f"{name}.py").write_text(f"open('ran', 'w')\nraise SystemExit('{name} of a stranger')")
    monkeypatch.chdir(tmp_path)
    lora_config.check_ranks(tmp_path, {"r": 1, "rank_pattern": {".*": 1}}, {})
    assert not (tmp_path / "ran").exists()
