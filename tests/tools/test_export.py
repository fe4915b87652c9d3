"""main.py export: llama.cpp's script is found and called as it is to be; a stand-in for it records the call."""

import json
import re
from pathlib import Path

import pytest
import torch

from lit_qlora import demo
from lit_qlora.cli import main
from lit_qlora.model.base import find_base
from lit_qlora.model.load import load_base
from lit_qlora.model.lora import Lora, add_lora, save_adapter
from lit_qlora.quiet import quieten
from lit_qlora.tools import export
from tests.expect import check_line
from tests.small_bases import save_base

STAND_IN = """
import json, pathlib, sys
model, output = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
call = {"options": sys.argv[2:], "config": json.loads((model / "config.json").read_text())}
pathlib.Path(__file__).with_name("call.json").write_text(json.dumps(call))
output.write_bytes(%r)
print("a line of log")
sys.exit(%r)
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    quieten()  # peft calls an old name of transformers
    base = find_base("demo")
    model = load_base(base, torch.float32, torch.device("cpu"), "sdpa")
    save_adapter(add_lora(model, Lora(2, 4, 0.0, ["q_proj"], False, False)), base, folder)
    return folder


@pytest.fixture
def llama_cpp(tmp_path, monkeypatch):
    """Puts a stand-in for the script where LLAMA_CPP says."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    monkeypatch.setenv("LLAMA_CPP", str(folder))

    def make(content: bytes = b"GGUF and more", status: object = 0) -> Path:
        (folder / "convert_hf_to_gguf.py").write_text(STAND_IN % (content, status), encoding="utf-8")
        return folder

    make()
    return make


@pytest.fixture
def merged(tmp_path) -> Path:
    """A model that is merged already: the demo's own base, with the tokenizer.model that the script would read."""
    folder = tmp_path / "merged"
    folder.mkdir()
    for file in demo.BASE.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "tokenizer.model").write_bytes(b"stand-in")
    (folder / "lit_qlora.json").write_text(json.dumps({"system": "Be brief."}), encoding="utf-8")
    return folder


def refusal(capsys, *options) -> str:
    assert main(["export", *map(str, options)]) == 2
    return capsys.readouterr().err


def test_a_merged_model(llama_cpp, merged, tmp_path, capsys):
    target = tmp_path / "new one" / "mine.gguf"
    assert main(["export", "--to", "gguf", "--model", str(merged), "--output", str(target), "--outtype", "q8_0"]) == 0
    assert target.read_bytes() == b"GGUF and more"
    assert {path.name for path in target.parent.iterdir()} == {"mine.gguf", "mine.Modelfile"}
    text = target.with_suffix(".Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./mine.gguf\nTEMPLATE ")
    assert text.endswith('SYSTEM """Be brief."""\n')
    call = json.loads((tmp_path / "llama.cpp" / "call.json").read_text())
    option, unfinished, *others = call["options"]
    assert [option, *others] == ["--outfile", "--outtype", "q8_0", "--model-name", "mine"]
    assert re.fullmatch(r"\.mine\.gguf\.\w+/mine\.gguf", str(Path(unfinished).relative_to(target.parent)))
    assert f"try it: ollama create mine -f '{tmp_path}/new one/mine.Modelfile' && " in capsys.readouterr().out


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_bos_that_llama_cpp_does_not_add_stands_in_the_modelfile(llama_cpp, merged, tmp_path, adds_bos):
    config = json.loads((merged / "tokenizer_config.json").read_text(encoding="utf-8"))
    (merged / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": adds_bos}), encoding="utf-8")
    assert main(["export", "--model", str(merged), "--output", str(tmp_path / "mine.gguf")]) == 0
    text = (tmp_path / "mine.Modelfile").read_text(encoding="utf-8")
    assert text.startswith('FROM ./mine.gguf\nTEMPLATE """' + "<s>" * (not adds_bos) + "{{-")


def test_a_model_made_elsewhere_gets_no_modelfile(llama_cpp, merged, tmp_path, capsys):
    (merged / "lit_qlora.json").unlink()
    assert main(["export", "--model", str(merged), "--output", str(tmp_path / "x.gguf")]) == 0
    assert (tmp_path / "x.gguf").is_file()
    assert not (tmp_path / "x.Modelfile").exists()
    assert "does not record the prompt format it was trained with" in capsys.readouterr().out


@pytest.mark.parametrize(("outtype", "dtype"), [("f16", "float16"), ("f32", "float32")])
def test_an_adapter_is_merged_on_the_way(llama_cpp, adapter, tmp_path, monkeypatch, outtype, dtype):
    base = tmp_path / "base"
    base.mkdir()
    for file in demo.BASE.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "tokenizer.model").write_bytes(b"stand-in")
    target = tmp_path / "out" / "mine.gguf"
    options = ["--adapter", str(adapter), "--base", str(base), "--output", str(target), "--outtype", outtype]
    assert main(["export", *options]) == 0
    assert {path.name for path in target.parent.iterdir()} == {"mine.gguf", "mine.Modelfile"}
    call = json.loads((tmp_path / "llama.cpp" / "call.json").read_text())
    assert call["config"]["torch_dtype"] == dtype


def test_a_model_in_4_bits(llama_cpp, merged, tmp_path, capsys):
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    error = refusal(capsys, "--model", merged, "--output", tmp_path / "x.gguf")
    check_line(error, "4 bits", "such as merge writes", begins=f"error: model: {merged} ")


def test_a_model_with_other_weights_beside_its_own(llama_cpp, merged, tmp_path, capsys):
    """llama.cpp would take those for parts of the model."""
    (merged / "model-00002-of-00002.safetensors").touch()
    error = refusal(capsys, "--model", merged, "--output", tmp_path / "x.gguf")
    assert "llama.cpp would read them too: move model-00002-of-00002.safetensors away" in error
    assert not (llama_cpp() / "call.json").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_with_code_of_its_own(llama_cpp, merged, tmp_path, capsys, name):
    settings = json.loads((merged / name).read_text()) | {"auto_map": {"AutoConfig": "evil--x.Evil"}}
    (merged / name).write_text(json.dumps(settings))
    error = refusal(capsys, "--model", merged, "--output", tmp_path / "x.gguf")
    assert f"comes with code of its own: take auto_map out of its {name}" in error
    assert not (llama_cpp() / "call.json").exists()


def test_without_llama_cpp(merged, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    error = refusal(capsys, "--model", merged, "--output", tmp_path / "x.gguf")
    assert re.fullmatch(
        r"error: export: llama\.cpp's convert_hf_to_gguf\.py is not here; git clone .* LLAMA_CPP=.*\n", error
    )
    error = refusal(capsys, "--run", tmp_path / "nope", "--output", tmp_path / "out.gguf")
    assert error.startswith(f"error: run: {tmp_path / 'nope'}") and "llama.cpp" not in error
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    error = refusal(capsys, "--model", merged, "--output", tmp_path / "x.gguf")
    check_line(error, "no convert_hf_to_gguf.py", tmp_path, "llama.cpp's folder", begins="error: LLAMA_CPP: ")


def test_the_script_may_be_on_the_path(llama_cpp, merged, tmp_path, monkeypatch):
    script = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    script.chmod(0o755)
    monkeypatch.delenv("LLAMA_CPP")
    monkeypatch.setenv("PATH", str(script.parent))
    assert main(["export", "--model", str(merged), "--output", str(tmp_path / "x.gguf")]) == 0


@pytest.mark.parametrize(
    ("content", "status", "expected"),
    [
        (b"GGUF", "No module named 'sentencepiece'", "ended with status 1: No module named 'sentencepiece'"),
        (b"GGUF", 3, "ended with status 3: a line of log"),
        (b"half", 0, "wrote no GGUF file"),
    ],
)
def test_a_conversion_that_fails_leaves_nothing(llama_cpp, merged, tmp_path, capsys, content, status, expected):
    llama_cpp(content, status)
    error = refusal(capsys, "--model", merged, "--output", tmp_path / "out" / "x.gguf")
    assert error == f"error: export: convert_hf_to_gguf.py {expected}\n"
    assert list((tmp_path / "out").iterdir()) == []


def test_without_tokenizer_model(llama_cpp, merged, tmp_path, capsys):
    """llama.cpp would split text otherwise: the scores by which it merges pieces are in no other file."""
    (merged / "tokenizer.model").unlink()
    error = refusal(capsys, "--model", merged, "--output", tmp_path / "x.gguf")
    assert error.startswith(
        f"error: export: {merged} has no tokenizer.model, and without it llama.cpp would split text "
    )
    assert not (tmp_path / "llama.cpp" / "call.json").exists()


@pytest.mark.parametrize(("like", "tokenizer"), [("qwen3", "qwen"), ("llama 3.2", "llama 3")])
def test_a_byte_level_tokenizer_needs_no_tokenizer_model(llama_cpp, tmp_path, like, tokenizer):
    """llama.cpp reads its merges off tokenizer.json, and knows by a table how it splits."""
    folder = save_base(tmp_path / "base", like, tokenizer)
    assert main(["export", "--model", str(folder), "--output", str(tmp_path / "x.gguf")]) == 0
    call = json.loads((tmp_path / "llama.cpp" / "call.json").read_text(encoding="utf-8"))
    assert call["config"]["architectures"] == ["Qwen3ForCausalLM" if like == "qwen3" else "LlamaForCausalLM"]


@pytest.mark.parametrize("name", ["x.gguf", "x.Modelfile"])
def test_what_stands_there_is_kept(llama_cpp, merged, tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    error = refusal(capsys, "--model", merged, "--output", tmp_path / "x.gguf")
    check_line(error, "exists already", "another name", begins=f"error: output: {tmp_path / name} ")
    assert (tmp_path / name).read_text() == "mine"


def test_what_another_process_writes_meanwhile_is_kept(llama_cpp, merged, tmp_path, capsys, monkeypatch):
    convert = export._convert

    def overtaken(script, model, target, outtype):
        (tmp_path / "x.gguf").write_text("theirs")
        convert(script, model, target, outtype)

    monkeypatch.setattr(export, "_convert", overtaken)
    error = refusal(capsys, "--model", merged, "--output", tmp_path / "x.gguf")
    check_line(error, "exists already", "another name", begins=f"error: output: {tmp_path / 'x.gguf'} ")
    assert (tmp_path / "x.gguf").read_text() == "theirs"
    assert {path.name for path in tmp_path.iterdir()} == {"llama.cpp", "merged", "x.gguf"}


@pytest.mark.parametrize("source", ["model", "adapter"])
def test_a_disk_without_room(llama_cpp, merged, adapter, tmp_path, capsys, monkeypatch, source):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    options = ["--model", merged] if source == "model" else ["--adapter", adapter, "--base", merged]
    error = refusal(capsys, *options, "--output", tmp_path / "out" / "x.gguf")
    assert re.match(r"error: output: \S+x.gguf needs \d\.\d MB, and the disk has 1\.0 MB left; free some, or ", error)
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_go_together(llama_cpp, merged, tmp_path, capsys):
    error = refusal(capsys, "--model", merged, "--run", "./x", "--output", tmp_path / "x.gguf")
    assert error.startswith("error: model: it is merged already")
