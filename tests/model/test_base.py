"""How a base is recognised before it is loaded: what is accepted, and one clear line for all else."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from lit_qlora.errors import UserError
from lit_qlora.model.architectures import ARCHITECTURES
from lit_qlora.model.base import check_context, find_base, missing_bytes
from lit_qlora.model.fingerprint import fingerprint
from lit_qlora.model.load import load_base
from lit_qlora.model.weights import check_weights
from lit_qlora.storage.folders import INDEX

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 172,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def expect_refusal(expect_error):
    """Has ``name`` refused as model.base with these words."""

    def expect_refusal(name, *words):
        return expect_error(lambda: find_base(str(name)), *words, option="model.base")

    return expect_refusal


def refusal(name):
    """The message that ``name`` is refused with, one line."""
    with pytest.raises(UserError) as error:
        find_base(str(name))
    message = str(error.value)
    assert message.startswith("model.base: ")
    assert "\n" not in message
    return message.removeprefix("model.base: ")


def model_folder(folder, config, files=("model.safetensors",)):
    folder.mkdir()
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text, encoding="utf-8")
    for file in files:
        (folder / file).touch()
    return folder


# Local folders


@pytest.mark.parametrize(
    ("more", "tokens"),
    [({}, 2048), ({"max_position_embeddings": None}, 2048), ({"max_position_embeddings": 512}, 512),
     ({"max_position_embeddings": 8192, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 8192)],
)  # fmt: skip
def test_the_context_is_what_the_config_says(tmp_path, more, tokens):
    base = find_base(str(model_folder(tmp_path / "base", CONFIG | more)))
    assert base.context_tokens == tokens
    check_context(base, tokens)
    with pytest.raises(
        UserError, match=rf"^data.max_length: expected at most {tokens:,} tokens, .*, got {tokens + 1}$"
    ):
        check_context(base, tokens + 1)


def test_a_local_folder(tiny_folder):
    base = find_base(str(tiny_folder))
    assert (base.name, base.location) == (str(tiny_folder), str(tiny_folder))
    assert base.config["intermediate_size"] == 172
    assert base.shape.linears["down_proj"] == (172, 64)


def test_only_the_last_part_of_a_local_path_is_public(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "my-llama", CONFIG)
    assert find_base(str(folder)).public_name == "my-llama"
    monkeypatch.chdir(folder)
    assert find_base(".").public_name == "my-llama"


def test_the_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model_folder(tmp_path / "my-llama", CONFIG)
    assert find_base("~/my-llama").location == str(tmp_path / "my-llama")


def test_the_demo():
    base = find_base("demo")
    assert (base.name, base.public_name) == ("demo", "demo")
    assert base.shape.num_parameters < 5_000_000


def test_a_folder_that_is_not_there_names_the_nearest(tmp_path, expect_refusal):
    model_folder(tmp_path / "llama-7b", CONFIG)
    missing = tmp_path / "lama-7b"
    expect_refusal(missing, str(missing), f"did you mean {tmp_path / 'llama-7b'}?", "owner/name")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~nobody/x", "models/llama/7b", "llama"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name, monkeypatch, tmp_path, expect_refusal):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    assert "did you mean" not in str(expect_refusal(name, f"no folder {name!r}", "owner/name"))


def test_a_folder_without_config(tmp_path, expect_refusal):
    expect_refusal(tmp_path, tmp_path, "no config.json", "Hugging Face")


def test_a_file_is_no_folder(tmp_path, expect_refusal):
    file = tmp_path / "model.safetensors"
    file.touch()
    expect_refusal(file, file, "a file", "Hugging Face", "give the folder")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        *(
            (CONFIG | {"model_type": kind, "architectures": ["X"]}, kind)
            for kind in ("mixtral", "qwen2_moe", "qwen3_moe", "gemma", "phi3", "gpt2", "mllama", "qwen2_vl", "mistral3")
        ),
        ({}, "model of unknown type"),
        ({"model_type": ["llama"]}, "model of unknown type"),
    ],
)
def test_what_is_of_another_architecture(tmp_path, config, kind, expect_refusal):
    folder = model_folder(tmp_path / "model", config)
    expect_refusal(folder, folder, f"a {kind} by the model_type", ", ".join(ARCHITECTURES))


@pytest.mark.parametrize("architectures", [{}, {"architectures": None}])
def test_a_llama_need_not_name_its_architecture(tmp_path, architectures):
    config = {name: value for name, value in CONFIG.items() if name != "architectures"} | architectures
    folder = model_folder(tmp_path / "model", config)
    assert find_base(str(folder)).shape.hidden == 64


def test_a_config_that_lacks_a_width(tmp_path):
    folder = model_folder(tmp_path / "model", {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4})
    assert refusal(folder).endswith("config.json has no intermediate_size")


def test_broken_json(tmp_path):
    folder = model_folder(tmp_path / "model", '{"model_type": "llama",')
    assert refusal(folder).startswith(f"{folder}: config.json can't be read: it is no JSON")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_clone_without_git_lfs_is_refused_by_its_first_pointer(tiny_folder, tmp_path, name, expect_error):
    folder = shutil.copytree(tiny_folder, tmp_path / "clone")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    expect_error(lambda: find_base(str(folder)), f"{name} is a git-LFS pointer", "git lfs pull", option="model.base")


def test_a_folder_without_weights_is_no_folder_of_pickled_ones(tmp_path, expect_error):
    folder = model_folder(tmp_path / "model", CONFIG, ["model.gguf", "model.safetensors.incomplete"])
    error = expect_error(lambda: find_base(str(folder)), "no .safetensors", "download all", option="model.base")
    assert "pickled" not in str(error)


def test_what_belongs_to_a_base_or_was_made_of_it_is_named(tmp_path, expect_error):
    adapter = tmp_path / "mine" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    for path, what in ((adapter, "is an adapter"), (tmp_path / "mine", "is the folder of a run")):
        expect_error(lambda path=path: find_base(str(path)), what, f"--model.adapter {adapter}", option="model.base")
    for page in ("https://huggingface.co/owner/Llama-2.7b", "https://huggingface.co/owner/Llama-2.7b/tree/main"):
        expect_error(lambda page=page: find_base(page), "an address", "owner/Llama-2.7b", option="model.base")


def test_pickled_weights_are_refused(tmp_path, expect_refusal):
    folder = model_folder(tmp_path / "model", CONFIG, ["pytorch_model.bin"])
    expect_refusal(folder, folder, ".safetensors", "pickled", "save_pretrained")


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes"),
        ({"bits": 4}, "in an unknown way"),
    ],
)
def test_other_quantisations_are_refused(tmp_path, quantization, method, expect_refusal):
    folder = model_folder(tmp_path / "model", CONFIG | {"quantization_config": quantization})
    expect_refusal(folder, folder, f"quantised ({method})", "quantization_config", "16-bit weights")


def test_a_bitsandbytes_4_bit_copy_is_accepted(tmp_path):
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    folder = model_folder(tmp_path / "model", CONFIG | {"quantization_config": quantization})
    assert find_base(str(folder)).location == str(folder)


# The hub, played by the errors that the installed library raises

RESPONSE = SimpleNamespace(headers={}, request=None, status_code=401)


def answering(monkeypatch, config=None, listing=None):
    """Lets the hub's client answer with a value, or raise."""

    def play(answer):
        def ask(*_, **__):
            if isinstance(answer, Exception):
                raise answer
            return answer

        return ask

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", play(config))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", play(listing))


def siblings(*names):
    return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG), encoding="utf-8")
    return file


def test_an_open_model_of_the_hub(monkeypatch, config_file):
    answering(monkeypatch, str(config_file), siblings("config.json", INDEX, "model-00001-of-00002.safetensors"))
    base = find_base("owner/llama")
    assert (base.name, base.location, base.public_name) == ("owner/llama", "owner/llama", "owner/llama")


def test_pickled_weights_on_the_hub_are_refused(monkeypatch, config_file):
    answering(monkeypatch, str(config_file), siblings("config.json", "pytorch_model.bin"))
    assert refusal("owner/llama").startswith("owner/llama has no .safetensors weights")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError("gated", response=RESPONSE), ["gated", "HF_TOKEN", "NousResearch/Llama-2-7b-hf"]),
        (errors.RepositoryNotFoundError("unknown", response=RESPONSE), ["no model on the hub", "HF_TOKEN"]),
        (errors.RemoteEntryNotFoundError("no file", response=RESPONSE), ["on the hub it has no config.json"]),
        (errors.LocalEntryNotFoundError("not cached"), ["not in the cache", "the network"]),
        (errors.HfHubHTTPError("401\n\nInvalid token", response=RESPONSE), ["HF_TOKEN", "401 Invalid token"]),
    ],
)
def test_refusals_of_the_hub(monkeypatch, error, words, expect_refusal):
    answering(monkeypatch, error)
    expect_refusal("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf", *words)


def test_a_name_that_the_hub_cannot_have(expect_refusal):
    expect_refusal("owner/a name", "no folder 'owner/a name'", "a hub id")


def test_offline_and_not_cached():
    assert refusal("owner/never-seen").startswith("'owner/never-seen' is no folder here, not in the cache, and the hub")


@pytest.fixture
def cached(monkeypatch, tmp_path, tiny_folder):
    """The tiny Llama in a hub cache, as the hub's client lays it out; the hub itself can't be reached."""
    repo = tmp_path / "models--owner--tiny"
    shutil.copytree(tiny_folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.usefixtures("cached")
def test_cached_with_the_hub_silent(tiny):
    base = find_base("owner/tiny")
    assert base.config == tiny.config
    assert fingerprint(base) == fingerprint(tiny)


@pytest.mark.parametrize(
    "error", [errors.OfflineModeIsEnabled("offline"), errors.HfHubHTTPError("", response=RESPONSE)]
)
def test_a_hub_that_gives_no_listing_is_let_pass(monkeypatch, config_file, error):
    answering(monkeypatch, str(config_file), error)
    assert find_base("owner/llama").location == "owner/llama"


# The hub, played by a server that the real client talks to


class Hub(BaseHTTPRequestHandler):
    """Knows owner/open, owner/gated, owner/refused, owner/no-config and owner/shy, which lists no files."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        owner, _, rest = self.path.removeprefix("/api/models").lstrip("/").partition("/")
        name = rest.partition("/")[0].partition("?")[0]
        listing = self.path.startswith("/api/")
        if (owner, name) == ("owner", "gated"):
            self.answer(401, {"X-Error-Code": "GatedRepo"})
        elif (owner, name) == ("owner", "refused"):
            self.answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif (owner, name) == ("owner", "no-config"):
            self.answer(404, {"X-Error-Code": "EntryNotFound"})
        elif (owner, name) in (("owner", "open"), ("owner", "shy")) and not listing:
            body = json.dumps(CONFIG).encode()
            self.answer(200, {"X-Repo-Commit": COMMIT, "ETag": '"1"'}, body)
        elif (owner, name) == ("owner", "open"):
            files = [{"rfilename": "config.json"}, {"rfilename": "model.safetensors"}]
            self.answer(200, {}, json.dumps({"id": "owner/open", "siblings": files}).encode())
        elif (owner, name) == ("owner", "shy"):
            self.answer(403, {})
        else:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


ASK = """
import json, sys
from lit_qlora.errors import UserError
from lit_qlora.model.base import find_base
answers = []
for name in sys.argv[1:]:
    try:
        answers.append(find_base(name).location)
    except UserError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def test_the_real_client_and_a_server(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # A process of its own: the client reads its settings once, when imported.
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": "not-a-token",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    names = ["owner/open", "owner/shy", "owner/gated", "owner/refused", "owner/no-config", "owner/unknown"]
    try:
        command = [sys.executable, "-c", ASK, *names]
        done = subprocess.run(
            command, env=os.environ | settings, capture_output=True, text=True, check=True, timeout=60
        )
    finally:
        server.shutdown()
        server.server_close()
    found, shy, gated, refused, no_config, unknown = json.loads(done.stdout)
    assert (found, shy) == ("owner/open", "owner/shy")
    assert gated.startswith("model.base: owner/gated is gated: accept its licence on the hub")
    assert refused.startswith("model.base: 'owner/refused' can't be loaded from the hub (check HF_TOKEN): ")
    assert no_config == "model.base: 'owner/no-config' is no folder here, and on the hub it has no config.json"
    assert unknown.startswith("model.base: 'owner/unknown' is no folder here and no model on the hub")
    assert not any("\n" in message for message in (gated, refused, no_config, unknown))


@pytest.mark.usefixtures("cached")
def test_the_cached_base_loads_with_the_hub_silent():
    model = load_base(find_base("owner/tiny"), torch.float32, torch.device("cpu"), "sdpa")
    assert model.config.intermediate_size == 172


# Downloads


def test_a_local_base_is_no_download(tiny):
    assert missing_bytes(tiny) == 0


@pytest.mark.usefixtures("cached")
def test_a_cached_base_is_no_download():
    assert missing_bytes(find_base("owner/tiny")) == 0


def test_a_base_that_is_not_cached_is_two_bytes_a_weight(monkeypatch, config_file):
    answering(monkeypatch, str(config_file), siblings("model.safetensors"))
    base = find_base("owner/llama")
    assert missing_bytes(base) == 2 * base.shape.num_parameters > 100_000


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is missing, expected [64, 64]"),
        ({"intermediate_size": 96}, "model.layers.0.mlp.gate_proj.weight is [172, 64], expected [96, 64]"),
        ({"vocab_size": 100}, "model.embed_tokens.weight is [%d, 64], expected [100, 64]"),
        (
            {"vocab_size": 100, "quantization_config": {"load_in_4bit": True}},
            "model.embed_tokens.weight is [%d, 64], expected [100, 64]",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_config(tiny_folder, tmp_path, changes, expected, expect_error):
    folder = shutil.copytree(tiny_folder, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    base = find_base(str(folder))
    expected = expected.replace("%d", str(config["vocab_size"]))
    expect_error(lambda: check_weights(base), folder, "config.json", expected, option="model.base")
    check_weights(find_base(str(tiny_folder)))


def test_a_head_that_is_missing_is_reported_unless_it_is_tied(tiny_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lm_head.weight is missing, expected " + re.escape(str([*head.shape]))):
        check_weights(find_base(str(folder)))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    check_weights(find_base(str(folder)))
