"""main.py push: what arrives at a server that speaks the hub's protocol, who may see it, and what never leaves."""

import getpass
import hashlib
import io
import json
import os
import pty
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from random import Random

import pytest

from lit_qlora.cli import main
from lit_qlora.model.lora import read_record
from lit_qlora.storage.adapter import mend_adapter
from lit_qlora.storage.folders import write_folder
from lit_qlora.storage.run import RunFolder
from tests.expect import check_line

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")  # huggingface_hub, of how it calls its own client
SPEC = spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
hub_server = module_from_spec(SPEC)
sys.modules["hub_server"] = hub_server  # which its dataclass looks itself up in
SPEC.loader.exec_module(hub_server)
TOKEN, Repository = hub_server.TOKEN, hub_server.Repository

FILES = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": Random(0).randbytes(256_000),
    "lit_qlora.json": b'{"base": "demo"}',
    "README.md": b'---\ntags:\n- lora\n---\n\nPeftModel.from_pretrained(base, "this-folder")\n',
}


@pytest.fixture
def hub():
    server = hub_server.FakeHub()
    yield server
    server.close()


def make(folder: Path, files=FILES) -> Path:
    def fill(target: Path) -> None:
        for name, content in files.items():
            (target / name).write_bytes(content)

    write_folder(folder, fill)
    return folder


@pytest.fixture
def adapter(tmp_path) -> Path:
    return make(tmp_path / "my adapter")


@pytest.fixture
def environment(hub, tmp_path) -> dict[str, str]:
    """The environment of a user who is logged in, and whose only hub is the stand-in."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    home = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "home" / "hf")}
    return own | home | {
        "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip


@pytest.fixture
def client(environment, monkeypatch):
    """The same for this process: huggingface_hub reads its environment as it is imported, and tests are offline."""
    from huggingface_hub import constants

    for name, value in (
        ("ENDPOINT", environment["HF_ENDPOINT"]), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True),
        ("HF_TOKEN_PATH", f"{environment['HF_HOME']}/token"),
    ):  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def run(environment, *options, stdin=subprocess.DEVNULL):
    """Run push in a process of its own, as a user does."""
    command = [sys.executable, str(ROOT / "main.py"), "push", *map(str, options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, stdin=stdin)
    assert TOKEN not in done.stdout + done.stderr
    return done


@pytest.fixture
def push(client, capsys, monkeypatch):
    """Runs the verb in this process; gives status, standard output and standard error."""
    monkeypatch.setattr("sys.stdin", io.StringIO())

    def call(*options):
        status = main(["push", *map(str, options)])
        printed = capsys.readouterr()
        assert TOKEN not in printed.out + printed.err
        return subprocess.CompletedProcess([], status, printed.out, printed.err)

    return call


@pytest.fixture
def refusal(push):
    def call(*options) -> str:
        done = push(*options)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        return done.stderr

    return call


def assert_says(error: str, option: str, *words: str) -> None:
    assert error.startswith(f"error: {option}: ") and error.count("\n") == 1, error
    assert [word for word in words if word not in error] == []


def only_read(hub) -> bool:
    return not hub.sent("POST") and not hub.sent("PUT")


def test_an_adapter(hub, environment, adapter, tmp_path):
    """The repository is private and holds the very bytes that are here, and the token went to the hub alone."""
    done = run(environment, "--adapter", adapter, "--to", "ann/mine", "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout
        == f"""\
push  adapter {adapter}
to    ann/mine: private, to be created; as ann
        README.md                    0.1 kB
        adapter_config.json          0.0 kB
        adapter_model.safetensors  256.0 kB
        lit_qlora.json               0.0 kB
      4 files, 256.1 kB
sent, private: {hub.url}/ann/mine
"""
    )
    repository = hub.repositories["ann/mine"]
    assert repository.private is True
    assert repository.files == FILES | {"README.md": FILES["README.md"].replace(b"this-folder", b"ann/mine")}
    assert len(repository.commits) == 2
    assert {server for server, _, authorization in hub.requests if authorization} == {"hub"}
    assert {server for server, request, _ in hub.requests if "PUT" in request} == {"store"}
    assert len(hub.sent("PUT")) == 1
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in left if TOKEN.encode() in path.read_bytes()] == []


@pytest.mark.slow
def test_by_the_chunks_that_the_hub_prefers(hub, environment, adapter):
    """Xet, where its client is installed: another protocol, and another token, which the hub gives for it."""
    del environment["HF_HUB_DISABLE_XET"]
    done = run(environment, "--adapter", adapter, "--to", "ann/mine", "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    arrived = hub.repositories["ann/mine"].files
    assert arrived["adapter_model.safetensors"] == FILES["adapter_model.safetensors"]
    assert hub.sent("POST /v1/xorbs/")
    tokens = {(server, authorization) for server, _, authorization in hub.requests if authorization}
    assert tokens == {("hub", f"Bearer {TOKEN}"), ("store", f"Bearer {hub_server.STORE_TOKEN}")}


def test_a_run_s_own_adapter(hub, push, trained, tmp_path):
    """All that fit has written but the seal, and no word of this machine in it."""
    done = push("--run", trained, "--to", "ann/demo", "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    arrived = hub.repositories["ann/demo"].files
    assert {*arrived} == {path.name for path in (trained / "adapter").iterdir()} - {"manifest.json"}
    for name, content in arrived.items():
        if name != "README.md":
            assert content == (trained / "adapter" / name).read_bytes()
        for secret in (str(trained), str(Path.home()), f"/{getpass.getuser()}", TOKEN):
            assert secret.encode() not in content
    assert b'PeftModel.from_pretrained(base, "ann/demo")' in arrived["README.md"]


def test_what_lies_beside_is_not_sent(hub, push, adapter):
    (adapter / "notes.txt").write_text("mine")
    (adapter / "optimizer.pt").write_bytes(b"state")
    assert push("--adapter", adapter, "--to", "ann/mine", "--yes").returncode == 0
    assert {*hub.repositories["ann/mine"].files} == {*FILES}


def test_public_is_said(hub, push, adapter):
    done = push("--adapter", adapter, "--to", "ann/mine", "--yes", "--public")
    assert "to    ann/mine: PUBLIC, for everybody to see, to be created; as ann\n" in done.stdout
    assert f"sent, public: {hub.url}/ann/mine\n" in done.stdout
    assert hub.repositories["ann/mine"].private is False


def test_a_public_repository_is_not_sent_to_unasked(hub, refusal, adapter):
    hub.repositories["ann/mine"] = Repository(private=False)
    error = refusal("--adapter", adapter, "--to", "ann/mine", "--yes")
    assert_says(error, "to", "ann/mine", "public", "--public")
    assert only_read(hub)


def test_one_that_becomes_public_meanwhile(hub, refusal, adapter):
    def race(request):
        if "create" in request:
            hub.repositories["ann/mine"] = Repository(private=False)

    hub.before_answer = race
    error = refusal("--adapter", adapter, "--to", "ann/mine", "--yes")
    assert "ann/mine is not as it was asked for; nothing was sent" in error
    assert hub.repositories["ann/mine"].files == {}
    assert not hub.sent("preupload")


def test_a_private_one_stays_private(hub, push, adapter):
    hub.repositories["ann/mine"] = Repository(private=True, files={"README.md": b"old", "x": b"1"})
    done = push("--adapter", adapter, "--to", "ann/mine", "--yes", "--public")
    assert "to    ann/mine: private, is there; 1 of its 2 files replaced; as ann\n" in done.stdout
    assert hub.repositories["ann/mine"].private
    assert not hub.sent("create")
    assert {*hub.repositories["ann/mine"].files} == {*FILES, "x"}


# Asking


def test_without_a_terminal_or_yes_nothing_is_sent(hub, push, adapter):
    done = push("--adapter", adapter, "--to", "ann/mine")
    assert done.returncode == 2
    assert_says(done.stderr, "yes", "nothing was sent", "terminal", "--yes")
    assert "adapter_model.safetensors  256.0 kB" in done.stdout
    assert only_read(hub)


@pytest.mark.parametrize(
    ("answer", "is_sent"),
    [("y\n", True), ("\n", False), ("\x04", False)],
)
@pytest.mark.slow
def test_at_a_terminal_it_asks(hub, environment, adapter, answer, is_sent):
    keyboard, terminal = pty.openpty()
    os.write(keyboard, answer.encode())
    done = run(environment, "--adapter", adapter, "--to", "ann/mine", stdin=terminal)
    os.close(keyboard)
    os.close(terminal)
    assert (done.returncode, done.stderr) == (0, "")
    assert "send it? [y/N] " in done.stdout
    assert ("nothing was sent" not in done.stdout) is is_sent
    assert bool(hub.repositories) is is_sent


# Resuming after a cut


def test_what_is_there_is_not_sent_again(hub, push, refusal, adapter):
    hub.fails["/commit/"] = 502
    error = refusal("--adapter", adapter, "--to", "ann/mine", "--yes")
    assert error.startswith(
        "error: push: the hub can't be reached or broke off; give the same command again, it resumes: "
    )
    assert hub.repositories["ann/mine"].files == {}
    assert len(hub.sent("PUT")) == 1
    hub.fails.clear()
    assert push("--adapter", adapter, "--to", "ann/mine", "--yes").returncode == 0
    assert {*hub.repositories["ann/mine"].files} == {*FILES}
    assert len(hub.sent("PUT")) == 1
    assert len(hub.sent("create")) == 1
    done = push("--adapter", adapter, "--to", "ann/mine", "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"all of it was there already: {hub.url}/ann/mine\n")
    assert len(hub.repositories["ann/mine"].commits) == 2


def test_no_hub_at_all(hub, refusal, adapter):
    hub.close()
    error = refusal("--adapter", adapter, "--to", "ann/mine", "--yes")
    assert "the hub can't be reached or broke off; give the same command again, it resumes: " in error


def test_an_adapter_that_training_replaces_meanwhile(hub, refusal, adapter):
    def train(request):
        if request.startswith("PUT"):
            better = FILES | {"adapter_model.safetensors": b"better", "adapter_config.json": b'{"peft_type": "lora"}'}
            write_folder(adapter, lambda folder: [(folder / n).write_bytes(c) for n, c in better.items()], replace=True)

    hub.before_answer = train
    error = refusal("--adapter", adapter, "--to", "ann/mine", "--yes")
    assert_says(error, "push", str(adapter), "changed", "none of it")
    assert hub.repositories["ann/mine"].files == {}


# What is refused


def test_no_token(hub, refusal, adapter, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    error = refusal("--adapter", adapter, "--to", "ann/mine", "--yes")
    assert_says(error, "push", "no token", "HF_TOKEN", "hf auth login")
    assert hub.requests == []


def test_the_stored_login(hub, push, environment, adapter, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    stored = Path(environment["HF_HOME"]) / "token"
    stored.parent.mkdir(parents=True)
    stored.write_text(TOKEN)
    assert push("--adapter", adapter, "--to", "ann/mine", "--yes").returncode == 0
    assert hub.repositories["ann/mine"].private


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("hf_another", "the hub does not accept the token; renew HF_TOKEN or, without it, the stored login"),
        (
            f"{TOKEN}\x01",
            "the token of the hub (HF_TOKEN or the stored login) holds invalid characters; renew it",
        ),
    ],
)
def test_a_wrong_token(hub, refusal, adapter, monkeypatch, token, expected):
    monkeypatch.setenv("HF_TOKEN", token)
    error = refusal("--adapter", adapter, "--to", "ann/mine", "--yes")
    assert error == f"error: push: {expected}\n"
    assert only_read(hub)


def test_a_token_that_may_only_read(hub, refusal, adapter):
    hub.role = "read"
    error = refusal("--adapter", adapter, "--to", "ann/mine", "--yes")
    assert_says(error, "push", "token of ann", "only read")


def test_somebody_else_s_name(hub, refusal, adapter):
    hub.fails["create"] = 403
    error = refusal("--adapter", adapter, "--to", "bob/mine", "--yes")
    assert error.startswith("error: push: this account, or its token, may not write to bob/mine (403): ")


@pytest.mark.parametrize("name", ["mine", "ann/mine/x", "ann/", "ann/my adapter", ""])
def test_no_name_of_a_repository(hub, refusal, adapter, name):
    error = refusal("--adapter", adapter, f"--to={name}", "--yes")
    assert_says(error, "to", "NAME/REPO", repr(name))
    assert hub.requests == []


def test_two_kinds_in_one_repository(hub, refusal, adapter):
    hub.repositories["ann/mine"] = Repository(private=True, files={"config.json": b"{}"})
    error = refusal("--adapter", adapter, "--to", "ann/mine", "--yes")
    assert_says(error, "to", "ann/mine", "another kind", "config.json")
    assert only_read(hub)


def test_an_altered_file(hub, refusal, adapter):
    (adapter / "adapter_config.json").write_bytes(b'{"peft_type": "lora"}')
    error = refusal("--adapter", adapter, "--to", "ann/mine", "--yes")
    assert error.startswith(f"error: {adapter}: 'adapter_config.json': expected sha256=")
    assert error.endswith("it was altered or cut short after it was saved, and is not sent\n")
    assert hub.requests == []


def test_a_card_may_be_edited(hub, push, adapter):
    (adapter / "README.md").write_bytes(b"# Mine\n")
    assert push("--adapter", adapter, "--to", "ann/mine", "--yes").returncode == 0
    assert hub.repositories["ann/mine"].files["README.md"] == b"# Mine\n"


def test_a_card_that_is_no_utf_8_is_not_sent(hub, refusal, adapter):
    (adapter / "README.md").write_bytes(b"caf\xe9")
    error = refusal("--adapter", adapter, "--to", "ann/mine", "--yes")
    check_line(error, "not UTF-8 (byte 3)", "nothing was sent", begins=f"error: {adapter / 'README.md'}: ")
    assert only_read(hub)


def test_an_edited_card_makes_no_damaged_adapter(trained, tmp_path, capsys):
    """Neither for a verb that uses the adapter, nor for a fit that is given again."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "adapter" / "README.md").write_text("# Mine\n")
    read_record(run / "adapter")
    mend_adapter(RunFolder(run))
    assert (run / "adapter").is_dir()
    assert capsys.readouterr().err == ""


def test_a_token_in_a_text(hub, refusal, adapter):
    (adapter / "README.md").write_text(f"log in with {TOKEN}\n")
    error = refusal("--adapter", adapter, "--to", "ann/mine", "--yes")
    assert_says(error, "push", str(adapter / "README.md"), "token")
    assert TOKEN not in error
    assert hub.requests == []


@pytest.mark.parametrize("missing", ["manifest.json", "adapter_config.json", "lit_qlora.json", None])
def test_folders_that_are_none_of_ours(hub, refusal, adapter, tmp_path, missing):
    folder = adapter if missing else tmp_path / "nowhere"
    if missing:
        (adapter / missing).unlink()
    error = refusal("--adapter", folder, "--to", "ann/mine", "--yes")
    assert error.startswith(f"error: push: {folder} ")
    assert "give a folder that fit or merge made" in error
    assert hub.requests == []


def test_one_source(hub, refusal, adapter):
    error = refusal("--adapter", adapter, "--run", "./x", "--to", "ann/mine")
    assert_says(error, "adapter", str(adapter), "--run ./x")


def test_no_option_takes_a_token(push):
    shown = push("--help").stdout
    assert "HF_TOKEN" in shown
    assert "--token" not in shown


def test_a_merged_model_with_many_files(hub, push, tmp_path):
    shards = {f"model-0000{n}-of-00003.safetensors": os.urandom(50_000) for n in (1, 2, 3)}
    files = shards | {"config.json": b"{}", "lit_qlora.json": b"{}", "tokenizer.json": b"{}"}
    folder = make(tmp_path / "merged", files)
    assert push("--folder", folder, "--to", "ann/big", "--yes").returncode == 0
    assert hub.repositories["ann/big"].files == files
    assert {*hub.large} == {hashlib.sha256(content).hexdigest() for content in shards.values()}
    assert json.loads((folder / "manifest.json").read_text())["version"] == 1
