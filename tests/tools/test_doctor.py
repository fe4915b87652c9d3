"""main.py doctor: whatever is missing, broken or too old, it answers, says what to do, and names nobody."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from peft.import_utils import is_torchao_available

from lit_qlora import demo
from lit_qlora.cli import main
from lit_qlora.model.optimizer import OPTIMIZERS
from lit_qlora.signatures import defaults_of
from lit_qlora.tools import doctor
from lit_qlora.tools.doctor import without_private_parts
from lit_qlora.tools.doctoring import surroundings
from lit_qlora.tools.doctoring.surroundings import GIB
from tests.expect import check_line

ROOT = Path(__file__).parents[2]
RESPONSE = SimpleNamespace(headers={}, request=None, status_code=401)
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))


@pytest.fixture
def diagnose(capsys):
    """Runs the verb; returns its lines but the last, which counts them."""

    def diagnose(*options, status=0):
        assert main(["doctor", *options]) == status
        shown = capsys.readouterr()
        assert shown.err == ""
        *lines, empty, last = shown.out.splitlines()
        assert empty == "" and last.startswith("problems: ")
        facts = [line for line in lines if not line.startswith("     ->")]
        assert len({*facts}) == len(facts), "reported twice"
        return lines

    return diagnose


def line(lines, start):
    """The finding that begins so, and its remedy."""
    (index,) = [index for index, found in enumerate(lines) if found[9:].startswith(start)]
    following = lines[index + 1] if index + 1 < len(lines) else ""
    return lines[index], following[9:] if following.startswith("     ->") else ""


def test_where_nothing_is_wrong(diagnose, tmp_path):
    lines = diagnose()
    kinds = {found[:7].strip() for found in lines}
    assert "problem" not in kinds
    for name in ("torch", "peft", "bitsandbytes"):
        assert f"     ok  {name} {metadata.version(name)}" in lines
    assert "     ok  base: demo may be read, 3.2 MB in 16 bits" in lines
    assert "     ok  bitsandbytes: 4 bits work on the cpu" in lines
    assert "     ok  chosen: precision 32-true (no GPU)" in lines
    assert "     ok  chosen: checkpointing none, compile false (no GPU)" in lines
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_transformers_own_layers_compute(diagnose, tmp_path):
    base = shutil.copytree(demo.BASE, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"hidden_act": "gelu"}
    (base / "config.json").write_text(json.dumps(config))
    lines = diagnose("--base", str(base))
    assert "     ok  chosen: checkpointing auto, compile false (no GPU)" in lines


def test_the_readme_s_line():
    assert "`python main.py doctor`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_what_stands_in_for_options_that_can_not_be_read_are_the_defaults():
    defaults = defaults_of("fit")
    assert {name: defaults[name] for name in doctor.DEFAULTS} == doctor.DEFAULTS
    assert OPTIMIZERS[doctor.DEFAULTS["model.optimizer"]].states == 2


def test_help_and_mistakes_are_short(capsys):
    assert main(["doctor", "--help"]) == 0
    assert "--base" in capsys.readouterr().out
    assert main(["doctor", "--bass", "x"]) == 2
    check_line(capsys.readouterr().err, "'bass'", "did you mean 'base'?", begins="error: ")


@pytest.mark.parametrize(
    ("args", "option", "words"),
    [
        (["--bass=x"], None, ["unknown option 'bass'", "'base'"]), (["x"], None, ["unknown option 'x'", "--help"]),
        (["--run"], "run", ["expected one argument", "--help"]),
    ],
)  # fmt: skip
def test_mistakes_of_the_command_line(expect_error, args, option, words):
    expect_error(["doctor", *args], *words, option=option)


# Packages


def bare(tmp_path, *folders):
    """The verb in a process that sees no package but those in ``folders``."""
    environment = {"PYTHONPATH": os.pathsep.join(map(str, folders)), "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = [sys.executable, "-S", str(ROOT / "main.py"), "doctor", "--base", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.stderr == ""
    return done.returncode, done.stdout.split("\n\n")[0].splitlines(), done.stdout


def fake(folder, name, version, code):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    (folder / f"{name}-{version}.dist-info").mkdir()
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


def test_without_a_single_package(tmp_path):
    status, lines, _ = bare(tmp_path)
    assert status == 2
    found, remedy = line(lines, "torch: not installed, expected torch>=")
    assert found.startswith("problem") and remedy == "pip install -r requirements.txt"
    assert sum(": not installed" in found for found in lines) == 13
    assert line(lines, "base: demo may be read")[0].startswith("     ok")
    assert line(lines, "chosen: unknown until the packages are in order")


def test_a_torch_that_can_not_be_imported(tmp_path):
    packages = tmp_path / "packages"
    fault = "libcudart.so.12: cannot open shared object file, from /home/somebody/secret/lib/libtorch.so"
    fake(packages, "torch", "2.13.0", f"raise ImportError({fault!r})")
    fake(packages, "peft", "0.21.0", "raise AssertionError('it would not say more')")
    status, lines, whole = bare(tmp_path, packages)
    assert status == 2
    found, remedy = line(lines, "torch 2.13.0: can't be imported (ImportError: libcudart.so.12: cannot open")
    assert found.startswith("problem")
    assert remedy.startswith("pip install 'torch>=2.11,<2.14' --force-reinstall")
    assert line(lines, "peft 0.21.0: not tried, for it needs torch")[0].startswith("   note")
    assert "object file, from libtorch.so" in whole and "somebody" not in whole


@pytest.mark.parametrize(
    ("name", "version", "kind"),
    [
        ("torch", "2.11.0+cu128", "ok"),
        ("torch", "2.15.0", "problem"),
        ("lightning", "2.6.2", "problem"),
        ("peft", "0.19.1", "problem"),
        ("transformers", "5.15.0", "ok"),
        ("transformers", "6.0.0", "problem"),
        ("bitsandbytes", "not a version", "problem"),
    ],
)
def test_versions_against_their_ranges(monkeypatch, name, version, kind):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda asked: version if asked == name else real(asked))
    found = {one.text.split(" ")[0].rstrip(":"): one for one in surroundings.packages()}
    assert found[name].kind == kind
    assert {one.kind for other, one in found.items() if other != name} == {"ok"}
    if kind == "problem":
        assert found[name].remedy.startswith(f"pip install '{name}>=")


def test_a_package_that_fails_as_it_is_imported(diagnose, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional")
    lines = diagnose("--base", "demo", status=2)
    assert line(lines, "bitsandbytes ")[0].startswith("problem  bitsandbytes 0.")
    assert "can't be imported (ModuleNotFoundError: import of bitsandbytes halted" in line(lines, "bitsandbytes ")[0]


def test_four_bits_that_fail(diagnose, monkeypatch):
    from bitsandbytes import functional

    def fails(*_, **__):
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setattr(functional, "quantize_4bit", fails)
    lines = diagnose("--base", "demo", status=2)
    found, remedy = line(lines, "bitsandbytes: 4 bits fail on the cpu (RuntimeError: no kernel image is available for")
    assert found.startswith("problem") and remedy.startswith("python -m bitsandbytes")


def test_a_part_that_breaks_does_not_end_it(diagnose, monkeypatch):
    def breaks():
        raise OSError("odd")
        yield

    monkeypatch.setattr(surroundings, "host_memory", breaks)
    lines = diagnose("--base", "demo", status=2)
    assert "problem  breaks: can't be inspected (OSError: odd)" in lines
    assert line(lines, "chosen: precision")


@pytest.mark.parametrize(("version", "found"), [("0.10.0", True), ("0.16.0", False), (None, False)])
def test_colab_s_torchao(diagnose, tmp_path, monkeypatch, version, found):
    """Found by peft's own function, as it raises in a user's code."""
    is_torchao_available.cache_clear()  # another test of this process may have asked
    if version:
        fake(tmp_path / "packages", "torchao", version, "raise AssertionError('nobody imports it')")
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    lines = diagnose("--base", "demo")
    assert any("torchao" in one for one in lines) == found
    if found:
        text, remedy = line(lines, "torchao: peft refuses every base that is not in 4 bits (Found an incompatible")
        assert text.startswith("   note") and "0.10.0" in text
        assert remedy == "pip uninstall -y torchao, or pip install -U torchao"


# GPUs


@pytest.fixture
def card(monkeypatch, tmp_path):
    """Puts a card in, as torch and the driver's program report it."""

    def card(name="Tesla T4", capability=(7, 5), free=14.4, total=14.56, usable=True, cuda="12.8"):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        for function, value in (
            ("is_available", usable), ("device_count", 1), ("get_device_name", name), ("memory_reserved", 0),
            ("get_device_capability", capability), ("mem_get_info", (int(free * GIB), int(total * GIB))),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, function, lambda *_, value=value: value)
        programs = tmp_path / "programs"
        programs.mkdir()
        (programs / "nvidia-smi").write_text(f"#!/bin/sh\necho '{name}, 550.54.15'\n")
        (programs / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(surroundings, "compiler", lambda _: iter(()))
        monkeypatch.setattr(surroundings, "four_bit", lambda: iter(()))

    return card


T4 = ("--config", str(ROOT / "configs" / "colab_t4.yaml"))


@pytest.fixture
def known(monkeypatch):
    """Llama 2 as if its config were in the hub's cache."""
    monkeypatch.setattr("lit_qlora.model.base.find_base", lambda name, **_: doctor._known(name))


@pytest.fixture
def lacks(monkeypatch):
    """Sets what torch's compiler lacks here."""
    return lambda *missing: monkeypatch.setattr("lit_qlora.model.device.compiler_lacks", lambda _: [*missing])


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ("compile: true, checkpointing: full", "checkpointing full, compile true (as asked)"),
        ("own_layers: false", "checkpointing auto, compile false (no GPU)"),
        ("dora: true, compile: false", "checkpointing auto, compile false (as asked)"),
    ],
)
def test_the_choices_of_a_fit_on_a_cpu(diagnose, tmp_path, lacks, given, chosen):
    lacks()
    config = tmp_path / "mine.yaml"
    config.write_text(f"model: {{base: demo, {given}}}\n")
    assert f"     ok  chosen: {chosen}" in diagnose("--config", str(config))


def test_what_the_compiler_lacks_decides(diagnose, card, known, lacks, tmp_path):
    card()
    lacks("triton")
    assert "     ok  chosen: compile false (triton missing)" in diagnose(*T4)
    config = tmp_path / "mine.yaml"
    config.write_text("model: {base: NousResearch/Llama-2-7b-hf, compile: true}\ndata: {template: llama2}\n")
    assert line(diagnose("--config", str(config), status=2), "fit: model.compile: true needs triton")


def test_a_t4(diagnose, card, known, lacks):
    card()
    lacks()
    lines = diagnose(*T4)
    assert "     ok  GPU: Tesla T4, compute capability 7.5, driver 550.54.15, 14.56 GiB, 14.40 free" in lines
    assert "     ok  chosen: precision 16-mixed (compute capability 7.5 has no bf16)" in lines
    attention = line(lines, "chosen: attention sdpa")[0]
    assert attention.endswith(" (flash_attention_2 needs compute capability 8.0 or above, Tesla T4 has less)")
    text = "\n".join(lines)
    assert "     ok  chosen: compile true (a GPU)" in lines
    assert re.search(r"chosen: checkpointing auto \(no layer recomputes its activations; \d+ send some to the", text)
    assert re.search(r"ok  (may )?fits?.* of 14\.\d\d GiB", "\n".join(lines))


def test_cards_with_trouble(diagnose, card, monkeypatch):
    card("Tesla V100", (7, 0), 7.0, 16.0)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "compute_120"])
    lines = diagnose("--base", "demo", status=2)
    assert line(lines, "GPU: Tesla V100, compute capability 7.0")[0].endswith("has kernels from 7.5 on")


T4_TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tPHB\t0-3\t0
GPU1\tPHB\t X \t0-3\t0

Legend:

  X    = Self
"""


@pytest.fixture
def two_cards(card, monkeypatch, tmp_path):
    """Two cards, as `card` has one."""

    def two_cards(names=("Tesla T4", "Tesla T4"), kinds=((7, 5), (7, 5)), direct=False, topology=T4_TOPOLOGY):
        card(names[0], kinds[0])
        properties = [SimpleNamespace(total_memory=int(14.56 * GIB))] * 2
        for function, value in (
            ("device_count", lambda: 2),
            ("get_device_name", lambda gpu=0: names[gpu]),
            ("get_device_capability", lambda gpu=0: kinds[gpu]),
            ("get_device_properties", lambda gpu: properties[gpu]),
            ("can_device_access_peer", lambda *_: direct),
        ):
            monkeypatch.setattr(torch.cuda, function, value)
        (tmp_path / "topology").write_text(topology)
        program = tmp_path / "programs" / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n[ $1 = topo ] && exec cat {tmp_path}/topology\necho '{names[0]}, 550.54.15'\n")

    return two_cards


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, "ok  GPUs: 2, which exchange gradients through the host (links PHB); --trainer.devices 2 trains on all"),
        (
            {"direct": True, "topology": T4_TOPOLOGY.replace("PHB", "NV4")},
            "ok  GPUs: 2, which exchange gradients directly (links NV4); --trainer.devices 2 trains on all",
        ),
        ({"topology": "NVIDIA-SMI has failed"}, "ok  GPUs: 2, which exchange gradients through the host; --trainer"),
        (
            {"names": ("RTX 3090", "RTX 4090"), "kinds": ((8, 6), (8, 9))},
            "ok  GPUs: 2, which exchange gradients through the host (links PHB): RTX 3090 (8.6, 14.56 GiB), RTX "
            "4090 (8.9, 14.56 GiB); a step waits for the slowest",
        ),
        (
            {"names": ("Tesla T4", "RTX 4090"), "kinds": ((7, 5), (8, 9))},
            "note  GPUs: 2, which exchange gradients through the host (links PHB): Tesla T4 (7.5, 14.56 GiB), RTX "
            "4090 (8.9, 14.56 GiB); not all have bf16",
        ),
    ],
    ids=["T4s", "NVLink", "unknown links", "a slower one", "bf16 on one"],
)  # fmt: skip
def test_several_cards_and_their_links(two_cards, options, found):
    two_cards(**options)
    lines = [f"{one.kind}  {one.text}" for one in surroundings.gpu()]
    assert lines[0].endswith("14.40 free; the first of 2")
    assert len(lines) == 2 and lines[1].startswith(found)


def test_pairs_of_which_some_are_direct(two_cards, monkeypatch):
    two_cards()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for function, value in (("get_device_name", "T4"), ("get_device_capability", (7, 5))):
        monkeypatch.setattr(torch.cuda, function, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=GIB))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: one + other == 1)
    (_, found) = surroundings.gpu()
    assert "GPUs: 3, which exchange gradients directly in 1 of 3 pairs, else through the host;" in found.text


def test_a_card_that_another_process_holds(diagnose, card, known):
    card(free=6.0)
    lines = diagnose(*T4)
    assert line(lines, "GPU: Tesla T4")[0].endswith("6.00 free: another process holds the rest")
    found, remedy = line(lines, "does not fit")
    assert found.startswith("   note") and remedy.startswith("python main.py plan --config colab_t4.yaml shows more")


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        (None, "GPU: Tesla T4 driver 550.54.15, and this torch is a build without CUDA"),
        ("12.8", "GPU: Tesla T4 driver 550.54.15, and torch can't use it (RuntimeError: The NVIDIA driver is too old)"),
    ],
)
def test_a_card_that_torch_does_not_see(diagnose, card, monkeypatch, cuda, message):
    def init():
        raise RuntimeError("The NVIDIA driver is too old")

    card(usable=False, cuda=cuda)
    monkeypatch.setattr(torch.cuda, "init", init)
    lines = diagnose("--base", "demo", status=2)
    assert line(lines, "GPU")[0] == f"problem  {message}"


def test_what_kernels_are_compiled_with(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    (found,) = surroundings.compiler((7, 5))
    assert found.kind == "note"  # a fit goes without, unless asked for them
    assert found.text == "compiled kernels: triton and a C compiler and Python's headers missing"
    monkeypatch.undo()


# Room, token, base


def test_a_disk_without_room(diagnose, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100e9, 99e9, 1e9))
    lines = diagnose(*T4, status=2)
    assert (
        line(lines, "disk of the run folder: 1.0 GB free, 1.9 GB needed")[1]
        == "free some, or give --run on another disk"
    )
    remedy = line(lines, "disk of the hub's cache: 1.0 GB free, 13.5 GB needed")[1]
    assert remedy.endswith("set HF_HOME to another disk")


def test_little_host_memory(monkeypatch):
    real = Path.read_text
    meminfo = "MemTotal: 4000000 kB\nMemFree: 9 kB\nMemAvailable: 1000000 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **how: meminfo if "meminfo" in str(self) else real(self, **how))
    (found,) = surroundings.host_memory()
    assert found.kind == "note" and found.text.startswith("host memory: 3.8 GiB, 1.0 available; loading a 7B takes 2.2")


def test_a_token_is_seen_and_not_shown(diagnose, monkeypatch, tmp_path):
    assert "     ok  token: none; open bases need none" in "\n".join(diagnose("--base", "demo"))
    (tmp_path / "token").write_text("hf_storedsecret123\n")
    lines = diagnose("--base", "demo")
    assert "     ok  token: a stored one" in lines
    monkeypatch.setenv("HF_TOKEN", "oddsecret")
    lines = diagnose("--base", "demo")
    assert "     ok  token: in the environment" in lines
    assert "secret" not in "\n".join(lines)


def answer(monkeypatch, error):
    def ask(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", ask)


def test_a_gated_base(diagnose, monkeypatch):
    answer(monkeypatch, errors.GatedRepoError("gated", response=RESPONSE))
    lines = diagnose("--base", "meta-llama/Llama-2-7b-hf", status=2)
    found, remedy = line(lines, "base: meta-llama/Llama-2-7b-hf is gated: accept its licence on the hub, then set")
    assert found.startswith("problem") and remedy.startswith("or take an open copy")


@pytest.mark.parametrize("asked", [T4, ("--base", "NousResearch/Llama-2-7b-hf")], ids=["config", "base"])
def test_a_base_that_can_not_be_had_offline_is_a_problem(diagnose, asked):
    found, remedy = line(diagnose(*asked, status=2), "base: 'NousResearch/Llama-2-7b-hf' is no folder here")
    assert found.startswith("problem") and found.endswith("(offline: whether it is gated is unknown)")
    assert remedy == "check the network or give a local folder"


def test_bare_it_judges_what_a_bare_fit_runs_and_with_a_config_that(diagnose, tmp_path):
    assert line(diagnose(), "base: demo may be read")
    config = tmp_path / "mine.yaml"
    config.write_text("model:\n  base: demo\n  rank: 8\n  optimizer: adamw_8bit\ntrainer:\n  precision: bf16-mixed\n")
    lines = diagnose("--config", str(config))
    assert line(lines, "chosen: optimizer adamw_8bit")[0].endswith("at rank 8)")
    assert line(lines, "chosen: precision bf16-mixed")
    config.write_text("model:\n  base: demo\n  rnak: 8\n")
    assert line(diagnose("--config", str(config), status=2), "fit: unknown option 'model.rnak'")[0].startswith(
        "problem"
    )


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ("data: {template: nope.jinja}", "fit: data.template: nope.jinja: expected llama2, "),
        ("data: {template: base}", "fit: data.template: base: 'demo' has no chat template"),
        ("model: {rank: 0}", "fit: model.rank: expected a whole number from 1, got 0"),
        ("trainer: {logger: NoLogger}", "fit: trainer.logger: no class 'NoLogger'"),
    ],
)
def test_a_value_that_fit_refuses_is_found(diagnose, tmp_path, config, found):
    (tmp_path / "mine.yaml").write_text(config)
    assert line(diagnose("--config", f"{tmp_path}/mine.yaml", status=2), found)[0].startswith("problem")


def test_a_config_that_is_not_there(capsys):
    assert main(["doctor", "--config", "nope.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: config: no file nope.yaml")


def test_what_launchers_left_is_reported(diagnose, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert line(diagnose(), "LOCAL_RANK=1 in the environment is ignored")[0].startswith("   note")
    monkeypatch.setenv("RANK", "1")
    assert line(diagnose(status=2), "RANK=1 in the environment, and no WORLD_SIZE")[0].startswith("problem")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found, remedy = line(diagnose(status=2), "WORLD_SIZE=2 in the environment: several processes were started")
    assert found.startswith("problem") and remedy.startswith("start python main.py by itself")


def test_what_is_pasted_names_nobody(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "oddsecret")
    monkeypatch.setattr(socket, "gethostname", lambda: "annas-laptop")
    hostile = (
        "E: '/home/anna/thesis/model.so' and C:\\Users\\anna\\x.dll (~/anna/y.py, line 3) at http://anna:pw@proxy:80/z "
        "host='anna.lan', token hf_abcDEF123456 oddsecret on annas-laptop: NousResearch/Llama-2-7b-hf, GB/s, and/or"
    )
    assert without_private_parts(hostile) == (
        "E: 'model.so' and x.dll (y.py, line 3) at (address) "
        "host=(host), token (token) (token) on (host): NousResearch/Llama-2-7b-hf, GB/s, and/or"
    )
