"""The files that are a base's weights, and the check that they are those of its config.json; one answer for all."""

import json
import shutil
import struct
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lit_qlora.errors import UserError
from lit_qlora.model.base import find_base, missing_bytes, weight_files
from lit_qlora.model.fingerprint import fingerprint
from lit_qlora.model.load import load_base
from lit_qlora.model.weights import check_weights, fetch, stored_tensors
from lit_qlora.storage.folders import INDEX, ONE_FILE
from lit_qlora.storage.weight_files import write_shards
from lit_qlora.tools.merging.arithmetic import StoredWeights
from lit_qlora.tools.merging.streamed import streamed_logits
from tests.expect import check_line

QUERY, HEAD, EMBEDDINGS = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "model.embed_tokens.weight"
NORM = "model.norm.weight"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "base")


def config(folder, **changes):
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")


def weights(folder, changes):
    """Puts ``changes`` in place of a folder's tensors; None takes one out."""
    tensors = load_file(folder / ONE_FILE) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / ONE_FILE)


def add_shards(folder, of):
    """Index and shards of the weights ``of`` another base."""
    single = folder.parent / "shards"
    single.mkdir()
    write_shards(single, load_file(f"{of.location}/{ONE_FILE}").items(), shard_bytes=200_000)
    for file in single.iterdir():
        shutil.move(file, folder / file.name)


def refused(folder):
    with pytest.raises(UserError) as caught:
        check_weights(find_base(str(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"model.base: {folder}: ").removeprefix(f"model.base: {folder} ")


# Which files


def test_the_one_file_goes_before_an_index_for_everyone(folder, tiny, other_tiny):
    """The rule is transformers' own: training, fingerprint and merge use the same file."""
    add_shards(folder, of=other_tiny)
    base = find_base(str(folder))
    assert [file.name for file in weight_files(base)] == [ONE_FILE]
    assert fingerprint(base) == fingerprint(tiny) != fingerprint(other_tiny)
    mine = StoredWeights(base)[QUERY]
    assert torch.equal(mine, load_file(folder / ONE_FILE)[QUERY])
    assert torch.equal(mine, LlamaForCausalLM.from_pretrained(folder).get_parameter(QUERY))
    loaded, plain = (load_base(one, torch.float32, torch.device("cpu"), "sdpa") for one in (base, tiny))
    assert torch.equal(loaded.get_parameter(QUERY), plain.get_parameter(QUERY))


def test_an_index_is_followed_where_the_one_file_lacks(folder, other_tiny):
    add_shards(folder, of=other_tiny)
    (folder / ONE_FILE).unlink()
    save_file({QUERY: torch.zeros(64, 64)}, folder / "model-00009-of-00009.safetensors")  # in no index
    base = find_base(str(folder))
    assert len(weight_files(base)) > 2
    assert fingerprint(base) == fingerprint(other_tiny)
    assert missing_bytes(base) == 0
    assert torch.equal(StoredWeights(base)[QUERY], load_file(f"{other_tiny.location}/{ONE_FILE}")[QUERY])


@pytest.mark.parametrize(
    "name", ["consolidated.00.pth", "consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin"]
)
def test_weights_of_other_names_are_not_looked_at(folder, tiny, name):
    save_file({QUERY: torch.zeros(64, 64)}, folder / name)
    assert fingerprint(find_base(str(folder))) == fingerprint(tiny)
    check_weights(find_base(str(folder)))


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "model.fp16.safetensors", "model-00001-of-00002.safetensors"]
)
def test_weights_of_other_names_alone_are_reported(folder, name):
    (folder / ONE_FILE).rename(folder / name)
    said = f"has neither {ONE_FILE} nor {INDEX}, and {name} is no name that transformers loads"
    assert refused(folder).startswith(said)


def test_a_shard_that_is_missing_is_reported_before_anything_is_loaded(folder, other_tiny):
    add_shards(folder, of=other_tiny)
    (folder / ONE_FILE).unlink()
    first, second, *others = sorted(folder.glob("model-*"))
    for gone, also in ((second, []), (first, others)):
        for file in (gone, *also):
            file.unlink()
        with pytest.raises(UserError) as caught:
            find_base(str(folder))
        assert f"has no {gone.name}, which {INDEX} names; copy it there" in str(caught.value)
    find_base(str(folder), weights=False)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"weight_map": {QUERY: "../other/model.safetensors"}}),
        json.dumps({"weight_map": {QUERY: "/etc/model.safetensors"}}),
        json.dumps({"weight_map": {QUERY: "sub/model.safetensors"}}),
        json.dumps({"weight_map": {QUERY: ".."}}),
        json.dumps({"weight_map": {QUERY: "pytorch_model.bin"}}),
        json.dumps({"weight_map": {}}),
        json.dumps({"weight_map": {QUERY: 5}}),
        json.dumps({"weight_map": {QUERY: ["a.safetensors"]}}),
        json.dumps({"weight_map": [QUERY]}),
        json.dumps({"weight_map": {QUERY: "model-00001-of-00001.safetensors"}}),
        json.dumps({"weight_map": {QUERY: "model-00001-of-00001.safetensors"}, "metadata": None}),
        json.dumps({}),
        "[]",
        "",
        "[" * 200_000,
    ],
)  # fmt: skip
def test_an_index_that_names_no_files_beside_it_is_one_line(folder, text):
    (folder.parent / "other").mkdir()
    (folder / ONE_FILE).rename(folder.parent / "other" / ONE_FILE)
    (folder / INDEX).write_text(text, encoding="utf-8")
    (folder / "model-00001-of-00001.safetensors").touch()
    assert refused(folder).startswith(INDEX)


def test_a_tensor_in_two_shards_is_refused(folder, tiny):
    add_shards(folder, of=tiny)
    (folder / ONE_FILE).unlink()
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    twice = next(iter(sorted(load_file(first))))
    save_file(load_file(last) | {twice: torch.zeros(2)}, last)
    assert refused(folder).startswith(f"{twice} is in {first.name} and in {last.name}")


def test_an_adapter_beside_the_weights_is_refused(folder):
    """transformers would put it on the base, unasked."""
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert refused(folder).startswith("holds an adapter beside its config.json (adapter_config.json)")


@pytest.mark.parametrize("whole", [True, False])
def test_a_base_in_the_hub_s_cache_has_the_same_files(folder, tiny, other_tiny, whole, tmp_path, monkeypatch):
    add_shards(folder, of=other_tiny)
    if not whole:
        (folder / ONE_FILE).unlink()
    repo = tmp_path / "models--owner--tiny"
    shutil.copytree(folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    base = find_base("owner/tiny")
    assert missing_bytes(base) == 0
    fetch(base)
    assert fingerprint(base) == fingerprint(tiny if whole else other_tiny)
    loaded = load_base(base, torch.float32, torch.device("cpu"), "sdpa")
    norm = load_file(f"{(tiny if whole else other_tiny).location}/{ONE_FILE}")[NORM]
    assert torch.equal(loaded.get_parameter(NORM), norm)


def test_what_comes_from_the_hub_is_checked_before_it_is_loaded(folder, tmp_path, monkeypatch):
    from lit_qlora.model.base import Base

    weights(folder, {NORM: None})
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / COMMIT
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT, encoding="utf-8")

    def download(location, name, **_):
        snapshot.mkdir(parents=True, exist_ok=True)
        if not (folder / name).is_file():
            raise RemoteEntryNotFoundError(name, response=SimpleNamespace(headers={}, request=None))  # type: ignore
        return str(shutil.copyfile(folder / name, snapshot / name))

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    base = Base("owner/tiny", "owner/tiny", find_base(str(folder)).config)
    assert missing_bytes(base) == 2 * base.shape.num_parameters
    with pytest.raises(UserError, match=r"model\.norm\.weight is missing"):
        load_base(base, torch.float32, torch.device("cpu"), "sdpa")


def test_a_base_that_is_nowhere_can_not_be_fetched(folder, monkeypatch, tmp_path):
    from lit_qlora.model.base import Base

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    base = Base("owner/unknown", "owner/unknown", find_base(str(folder)).config)
    assert check_weights(base) == []
    with pytest.raises(UserError, match="the weights of owner/unknown can't be downloaded: "):
        fetch(base)


# Whether they are those of config.json


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({NORM: None}, f"{NORM} is missing, expected [64]"),
        ({NORM: torch.ones(32)}, f"{NORM} is [32], expected [64]"),
        ({QUERY: torch.ones(64, 64).to(torch.float8_e4m3fn)}, f"{QUERY} is [64, 64] of F8_E4M3, expected [64, 64]"),
        ({QUERY: torch.ones(64, 64).to(torch.int8)}, f"{QUERY} is [64, 64] of I8, expected [64, 64]"),
        ({QUERY: torch.ones(2048, 1).to(torch.uint8)}, f"{QUERY} is [2048, 1] of U8, expected [64, 64]"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, "q_proj.bias is [64], expected no such weight"),
        ({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, "q_norm.weight is [16], expected no such weight"),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}, "layers.2.mlp.up_proj.weight is [1], expected no such"),
        ({f"{QUERY}.absmax": torch.ones(1)}, "q_proj.weight.absmax is [1], expected no such weight"),
    ],
)
def test_a_tensor_that_is_not_of_this_llama_is_named(folder, changes, expected):
    weights(folder, changes)
    message = refused(folder)
    assert message.startswith("the weights are not those of its config.json: ")
    assert expected in message


def test_a_buffer_of_old_exports_is_let_pass(folder):
    weights(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert len(check_weights(find_base(str(folder)))) == 14


def test_biases_that_config_json_has_are_demanded(folder):
    config(folder, attention_bias=True)
    assert "self_attn.q_proj.bias is missing, expected [64]" in refused(folder)


def test_a_tied_head_is_the_embeddings(folder):
    config(folder, tie_word_embeddings=True)
    assert refused(folder).startswith("config.json says tie_word_embeddings, and the weights hold an lm_head.weight")
    weights(folder, {HEAD: load_file(folder / ONE_FILE)[EMBEDDINGS].clone()})
    check_weights(find_base(str(folder)))
    weights(folder, {HEAD: None})
    check_weights(find_base(str(folder)))


def test_16_bits_that_config_json_calls_4_are_reported(folder):
    config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    check_line(refused(folder), "quantization_config", "16 bits", "take that key out of config.json")


def test_a_streamed_model_follows_no_code_either(folder, tiny):
    ids = torch.tensor([[1, 77, 400, 5]])
    expected = streamed_logits(tiny, ids, torch.device("cpu"))
    config(folder, _attn_implementation="evil/kernel", experts_implementation="evil/kernel", eos_token_id="x")
    assert torch.equal(streamed_logits(find_base(str(folder)), ids, torch.device("cpu")), expected)


def save_in_4_bits(tiny, folder, dtype=None, **options):
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True, **options)
    model = LlamaForCausalLM.from_pretrained(tiny.location, quantization_config=quantization, dtype=dtype)
    model.save_pretrained(folder)
    return folder


def test_4_bits_that_config_json_does_not_name_are_reported(tiny, tmp_path):
    folder = save_in_4_bits(tiny, tmp_path / "base")
    config(folder, quantization_config=None)
    assert " of U8, expected [" in refused(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"bnb_4bit_quant_type": "nf4"},
        {"bnb_4bit_quant_type": "fp4"},
        {"llm_int8_skip_modules": ["lm_head", "up_proj", "model.layers.0.self_attn"]},
    ],
    ids=["double", "single", "fp4", "mixed"],
)
def test_4_bits_made_elsewhere_load_as_they_are(tiny, tmp_path, options):
    folder = save_in_4_bits(tiny, tmp_path / "base", **options)
    base = find_base(str(folder))
    plain = check_weights(base)
    assert len(plain) == (6 if "llm_int8_skip_modules" in options else 0)
    found = load_base(base, torch.float32, torch.device("cpu"), "sdpa")
    expected = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for module in expected.modules():
        module.compute_dtype, module.support_avx512bf16_for_cpu = torch.float32, False
    ids = torch.tensor([[1, 77, 400, 5]])
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)
    stored = StoredWeights(base)
    assert stored.dequantized("model.layers.1.self_attn.q_proj.weight", torch.device("cpu")).shape == (64, 64)


@pytest.mark.parametrize("written", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [torch.float32, torch.float16, torch.bfloat16])
def test_a_base_in_4_bits_computes_in_the_dtype_that_was_asked_for(tiny, tmp_path, written, asked):
    """Whatever its files are in: what a T4 is given in bf16 has to become fp16 there."""
    folder = save_in_4_bits(tiny, tmp_path / "base", dtype=written, bnb_4bit_compute_dtype=written)
    stored = load_file(folder / ONE_FILE)["model.embed_tokens.weight"]
    found = load_base(find_base(str(folder)), asked, torch.device("cpu"), "sdpa")
    assert stored.dtype == written
    assert {one.dtype for one in found.parameters() if one.is_floating_point()} == {asked}
    assert torch.equal(found.model.embed_tokens.weight, stored.to(asked))
    with torch.no_grad():
        assert found(torch.tensor([[1, 77, 400, 5]])).logits.dtype == asked


# Headers


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b'{"a": 1}', b'{"a": {}}', b'{"a": {"dtype": "F32", "shape": 5, "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 99]}}', b"[" * 200_000, b"\xff\xfe",
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
    ],
)  # fmt: skip
def test_an_odd_header_is_one_line(folder, header):
    (folder / ONE_FILE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(
        UserError, match=r"^model.base: the weights of [^\n]+ can't be read: model.safetensors: [^\n]+$"
    ):
        stored_tensors(find_base(str(folder)))


@pytest.mark.parametrize("length", [0, 2**20, 2**63])
def test_a_header_longer_than_the_file_is_one_line(folder, length):
    (folder / ONE_FILE).write_bytes(struct.pack("<Q", length))
    with pytest.raises(UserError, match=r"can't be read: model\.safetensors: "):
        stored_tensors(find_base(str(folder)))
