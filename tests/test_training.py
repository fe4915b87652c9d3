"""fit, validate, test and predict through `main([...])`: a run folder, its resume, its mistakes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_qlora import demo
from lit_qlora.batch import Batch
from lit_qlora.cli import main
from lit_qlora.errors import UserError
from lit_qlora.figures.lines import read_lines
from lit_qlora.model.module import QLoRAModule
from lit_qlora.storage.run import RunFolder
from tests.expect import ExpectError
from tests.interrupted import interrupt

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
T4_CONFIGS = [config for config in CONFIGS if "t4" in config.stem]
SHORT = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1",
         "--save_every_steps", "2", "--samples.count", "2", "--samples.max_new_tokens", "8",
         "--trainer.limit_val_batches", "3"]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _rows(path: Path, count: int = 40) -> Path:
    lines = demo.TRAIN.read_text(encoding="utf-8").splitlines()[:count]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_a_run_from_start_to_answers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *SHORT]) == 0
    run = here / "runs" / "demo"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000002", "step-00000004"}
    assert {path.name for path in (run / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "lit_qlora.json", "manifest.json", "result.json",
        "README.md", "curves.png", "chat_template.jinja", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    lines = [*read_lines(run / "metrics.jsonl")]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    # Of each step itself: one step of warm-up to half, then down in a line.
    rates = [line["train/learning_rate"] for line in lines[1:]]
    assert rates == pytest.approx([0.0015, 0.003, 0.002, 0.001])
    before = _snapshot(run)

    capsys.readouterr()
    assert main(["fit", *SHORT]) == 0
    printed = capsys.readouterr().out
    assert "is finished (4 of 4 steps): nothing to do" in printed
    assert "\nnext: python main.py chat\n" in printed
    assert main(["fit", *SHORT, "--trainer.max_steps", "2"]) == 0
    assert "is finished (4 of 4 steps): nothing to do" in capsys.readouterr().out
    assert _snapshot(run) == before

    by_step = {line["step"]: line for line in read_lines(run / "metrics.jsonl")}
    best = json.loads((run / "adapter" / "result.json").read_text())
    assert main(["validate"]) == 0
    assert f"val/loss  {by_step[best['step']]['val/loss']:.6f}\n" in capsys.readouterr().out
    assert main(["validate", "--ckpt_path", "base"]) == 0
    assert f"val/loss  {by_step[0]['val/loss']:.6f}\n" in capsys.readouterr().out
    assert main(["validate", "--ckpt_path", "last"]) == 0
    assert f"val/loss  {by_step[4]['val/loss']:.6f}\n" in capsys.readouterr().out
    assert main(["test", "--run", "runs/demo", "--ckpt_path", "runs/demo/adapter"]) == 0
    assert "test/loss  " in capsys.readouterr().out
    assert _snapshot(run) == before

    (here / "prompts.txt").write_text("Who goes everywhere with Silas?\n\nWhat is in Marshford?\n")
    predict = ["predict", "--prompts", "prompts.txt", "--output", "answers.jsonl", "--max_new_tokens", "8"]
    assert main(predict) == 0
    answers = [json.loads(line) for line in (here / "answers.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["Who goes everywhere with Silas?", "What is in Marshford?"]
    before = (here / "answers.jsonl").read_bytes()
    assert main(predict) == 0
    assert "finished: " in capsys.readouterr().out
    assert (here / "answers.jsonl").read_bytes() == before


def test_a_run_without_validation_has_one_line_for_its_last_step(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--samples.count", "0"]
    assert main(["fit", "--run", "runs/mine", *SHORT, *options]) == 0
    (line,) = [*read_lines(here / "runs" / "mine" / "metrics.jsonl")]
    assert line["step"] == 1 and {"train/loss", "memory/host_gib"} <= line.keys()
    assert "\n\n\n" not in capsys.readouterr().out


def test_rows_that_came_later_are_not_scored(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A share drawn anew from a source that grew would hold rows that were trained on."""
    fit = ["fit", "--run", "runs/mine", "--data.source", str(_rows(here / "rows.jsonl", 24)), *SHORT,
           "--data.validation_share", "0.25", "--samples.count", "0", "--trainer.limit_val_batches", "1.0"]  # fmt: skip
    assert main(fit) == 0
    best = json.loads((here / "runs" / "mine" / "adapter" / "result.json").read_text())["val/loss"]
    kept = json.loads((here / "runs" / "mine" / "rows.json").read_text())
    assert (len(kept["held_out"]), len(kept["train"])) == (6, 18)
    _rows(here / "rows.jsonl", 40)
    capsys.readouterr()
    for command in (["validate"], ["validate", "--seed_everything", "7"], ["test"], ["evaluate"]):
        assert main(command) == 0
        out = capsys.readouterr().out
        assert "6 conversations of" in out and "16 new conversations there since the run began" in out
        shown = re.search(r"/loss  ([\d.]+)\n", out) or re.search(r"\nloss +\S+ +([\d.]+) ", out)
        assert shown and float(shown[1]) == pytest.approx(best, rel=1e-5)

    lines = (here / "rows.jsonl").read_text().splitlines(keepends=True)
    (here / "rows.jsonl").write_text("".join(reversed(lines[:12])))
    assert main(["validate"]) == 0
    out, err = capsys.readouterr()
    assert re.match(r"warning: \d of the 6 conversations that the run held out (is|are) no longer in .*rows.jsonl", err)
    (here / "runs" / "mine" / "rows.json").write_text("{")
    assert main(["evaluate"]) == 2
    assert "rows.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("config", [one for one in CONFIGS if one not in T4_CONFIGS], ids=lambda path: path.stem)
def test_every_config_trains(config: Path, here: Path) -> None:
    """The config stays as it is but for base, data, length and number of devices; those for a T4 do in the next
    test."""
    data = _rows(here / "rows.jsonl")
    small = ["--model.base", "demo", "--data.source", str(data), "--data.max_length", "48", "--trainer.max_steps", "2"]
    small += ["--trainer.devices", "1"]
    assert main(["fit", "--config", str(config), *small]) == 0
    assert (here / "runs" / config.stem / "adapter" / "adapter_model.safetensors").is_file()


class _NoBf16(TorchDispatchMode):
    """Fails at the first operation that takes or gives a bfloat16 tensor, in forward, backward and update."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            assert not isinstance(leaf, torch.Tensor) or leaf.dtype != torch.bfloat16, f"{func} in bfloat16"
        return out


@pytest.mark.parametrize("config", T4_CONFIGS, ids=lambda path: path.stem)
def test_a_t4_config_meets_no_bf16(
    config: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No tensor and no autocast is in bf16, from loading to the last sample answer, on the CPU with what `auto`
    takes on a T4."""
    from lightning.pytorch.plugins import MixedPrecision

    from lit_qlora import trainer, training
    from lit_qlora.model.device import Device, choose_precision

    chosen: list[str] = []
    autocasts: set[torch.dtype] = set()
    entered = torch.autocast.__enter__

    class OnCpu(trainer.QLoRATrainer):
        def __init__(self, **options: Any) -> None:
            plugins = [*options.pop("plugins"), MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
            super().__init__(**options, plugins=plugins)

    def on_a_t4(wanted: Any, device: object, num_weights: int = 0) -> tuple[None, str]:
        precision, reason = choose_precision(wanted, Device("Tesla T4", (7, 5)), num_weights)
        chosen.append(precision)
        return None, reason  # the plugin brings the precision

    def watched(self: Any) -> Any:
        if self._enabled:
            autocasts.add(self.fast_dtype)
        return entered(self)

    monkeypatch.setattr(trainer, "choose_precision", on_a_t4)
    monkeypatch.setattr(training, "QLoRATrainer", OnCpu)
    monkeypatch.setattr(torch.autocast, "__enter__", watched)
    data = _rows(here / "rows.jsonl", 12)
    small = ["--model.base", "demo", "--data.source", str(data), "--data.max_length", "48", "--trainer.max_steps", "2"]
    small += ["--trainer.devices", "1"]
    with _NoBf16():
        assert main(["fit", "--config", str(config), *small, "--samples.max_new_tokens", "4"]) == 0
    assert chosen == ["16-mixed"]
    assert autocasts == {torch.float16}
    assert (here / "runs" / config.stem / "adapter" / "adapter_model.safetensors").is_file()


def test_the_seed_recipe() -> None:
    import yaml

    config = yaml.safe_load((ROOT / "configs" / "colab_t4.yaml").read_text())
    assert config["model"]["base"] == "NousResearch/Llama-2-7b-hf"
    assert config["data"] == {
        "source": "timdettmers/openassistant-guanaco", "train_on": "answers", "max_length": 1024, "batch_size": 4,
    }  # fmt: skip
    assert config["trainer"]["max_epochs"] == 3
    assert config["trainer"]["log_every_n_steps"] == 25
    assert config["trainer"]["precision"] == "auto"


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_end(here: Path) -> None:
    arguments = ["--trainer.max_steps", "12", "--trainer.val_check_interval", "4", "--trainer.log_every_n_steps", "3",
                 "--save_every_steps", "2", "--samples.count", "0", "--model.dropout", "0.1",
                 "--trainer.limit_val_batches", "2"]  # fmt: skip
    assert main(["fit", "--run", "./whole", *arguments]) == 0
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "main.py"), "fit", "--run", "./cut", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    deadline = time.monotonic() + 120
    while not list(Path("cut/checkpoints").glob("step-*4")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(Path("cut/checkpoints").glob("step-*")), "killed before its first checkpoint"
    assert main(["fit", "--run", "./cut", *arguments]) == 0
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-00000012/state.safetensors"):
        assert Path("whole", name).read_bytes() == Path("cut", name).read_bytes()
    assert _figures(Path("whole")) == _figures(Path("cut"))


def _figures(run: Path) -> list[dict[str, object]]:
    """What was recorded, without what the clock and the host's memory have a say in."""
    return [
        {name: value for name, value in line.items() if not name.startswith(("speed/tokens", "memory/"))}
        for line in read_lines(run / "metrics.jsonl")
    ]


@pytest.mark.slow
def test_ctrl_c_saves_and_says_so(here: Path) -> None:
    command = [sys.executable, "-u", str(ROOT / "main.py"), "fit", "--trainer.log_every_n_steps", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    out, err = interrupt(process, 3, lambda: process.send_signal(signal.SIGINT))
    assert (process.returncode, err) == (130, "")
    assert "the same command resumes from here" in out
    assert list(Path("runs/demo/checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("number", "status", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
@pytest.mark.slow
def test_a_signal_to_all_of_its_processes_is_answered_by_one(
    here: Path, number: signal.Signals, status: int, name: str
) -> None:
    """A terminal sends Ctrl-C to the workers that load rows, too, and `timeout` SIGTERM."""
    command = [sys.executable, "-u", str(ROOT / "main.py"), "fit", "--trainer.log_every_n_steps", "1",
               "--data.num_workers", "2", "--samples.count", "0", "--trainer.limit_val_batches", "1"]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    workers = list[str]()

    def send() -> None:
        workers.extend(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        os.killpg(process.pid, number)

    out, err = interrupt(process, 2, send)
    assert (process.returncode, err, len(workers)) == (status, "", 2)
    said = [line for line in out.splitlines() if line and not line.startswith("step ")]
    assert said[0] == "stopping after this step; again to stop at once"
    assert re.fullmatch(rf"stopped and saved at step \d+ by {name}; the same command resumes from here", said[1])
    assert len(said) == 2
    assert list(Path("runs/demo/checkpoints").glob("step-*"))
    with pytest.raises(ProcessLookupError):  # no worker is left of the group
        os.killpg(process.pid, 0)


def test_settings_that_make_another_run_start_it_where_none_is_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--trainer.max_steps", "1", "--samples.count", "0", "--trainer.limit_val_batches", "1"]
    assert main(["fit", "--run", "demo", *short]) == 0
    before = _snapshot(here)
    another = ["--model.rank", "8", "--data.batch_size", "2"]
    assert main(["fit", "--run", "demo", *short, *another]) == 2
    changes = "data.batch_size: 4 -> 2; model.rank: 16 -> 8; "
    error = capsys.readouterr().err
    assert error.startswith("error: run: runs/demo") and changes in error and "--run NAME" in error
    assert main(["fit", *short, *another]) == 0
    assert f"   run  runs/demo differs: {changes}this one is runs/demo-2\n" in capsys.readouterr().out
    assert main(["fit", *short, *another]) == 0
    assert "runs/demo-2 is finished (1 of 1 step): nothing to do." in capsys.readouterr().out
    assert {path.name for path in Path("runs").iterdir()} == {"demo", "demo-2"}
    assert before.items() <= _snapshot(here).items()
    assert main(["validate"]) == 0
    assert capsys.readouterr().out.startswith("   run  runs/demo-2, the newest\n")


def test_a_config_may_name_the_run_and_an_adapter_keeps_its_rank(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text("run: ./elsewhere\nmodel:\n  rank: 4\n")
    short = ["--trainer.max_steps", "1", "--samples.count", "0", "--trainer.limit_val_batches", "1"]
    assert main(["fit", "--config", "mine.yaml", *short]) == 0
    assert Path("elsewhere/adapter/adapter_config.json").is_file()
    assert not Path("runs").exists()
    assert main(["fit", "--run", "./next", "--model.adapter", "elsewhere/adapter", *short]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model.rank: 16") and "elsewhere/adapter has 4" in error


BAD: list[tuple[list[str], str | None, str | None, list[str]]] = [
    (
        ["fti"],
        None,
        None,
        ["no verb 'fti'", "did you mean 'fit'", "fit, validate, test, plan, inspect, chat", "push, report"],
    ),
    (["fit", "--model.rnak", "3"], None, None, ["'model.rnak'", "did you mean 'model.rank'"]),
    (["xyz"], None, None, ["no verb 'xyz'; there are"]),
    (["train"], None, None, ["no verb 'train'; here it is fit; there are"]),
    (["Fine-Tune"], None, None, ["no verb 'Fine-Tune'; here it is fit; there are"]),
    (["serve"], None, None, ["here it is merge, and vLLM"]),
    (["--config", "demo"], None, None, ["'--config' stands where a verb is expected", "fit --config …"]),
    (["fit", "--model.rank", "x"], None, "model.rank", ["whole number", "got x"]),
    (["fit", "--model.rank", "1,000"], None, "model.rank", ["whole number", "got 1,000"]),
    (["fit", "--model.learning_rate=-0,001"], None, "model.learning_rate", ["a number", "write -0.001"]),
    (["fit", "--trainer.gradient_clip_val", "0,3"], None, "trainer.gradient_clip_val", ["a number", "write 0.3"]),
    (["plan", "--gpu_gib", "0"], None, "gpu-gib", ["above 0", "got 0"]),
    (["plan", "--gpu_capability=x"], None, "gpu-capability", ["8.6", "got 'x'"]),
    (["fit", "--model.rank", "0"], None, "model.rank", ["from 1", "got 0"]),
    (["fit", "--model.schedule", "cosin"], None, "model.schedule", ["linear", "got cosin"]),
    (["fit", "--trainer.precision", "fp16"], None, "trainer.precision", ["16-mixed", "got fp16"]),
    (["fit", "--trainer.precision", "16-mixed"], None, "trainer.precision", ["CUDA", "use auto"]),
    (["fit", "--model.attention", "flash_attention_2"], None, "model.attention", ["8.0"]),
    (["fit", "--model.base", "./nowhere"], None, "model.base", ["no folder './nowhere'", "owner/name"]),
    (["fit", "--model.target_modules", "q_prj"], None, "model.target_modules", ["'q_prj'", "all-linear, q_proj"]),
    (["fit", "--model.adapter", "."], None, None, [". is no adapter", "adapter_config.json"]),
    (["fit", "--data.source", "nope.jsonl"], "nope.jsonl", None, ["no such file"]),
    (["fit", "--data.source", "empty.jsonl"], "empty.jsonl", None, ["empty (0 bytes)"]),
    (["fit", "--data.source", "one.jsonl"], "one.jsonl", None, ["one conversation only"]),
    (["fit", "--data.source", "torn.jsonl"], "torn.jsonl:2", None, ["no JSON"]),
    (["fit", "--data.source", "latin.jsonl"], "latin.jsonl:1", None, ["not UTF-8"]),
    (["fit", "--data.max_length", "8"], None, "data.max_length", ["848 conversations in demo", "within 8 tokens"]),
    (["fit", "--data.batch_size", "0"], None, "data.batch_size", ["at least 1", "got 0"]),
    (["fit", "--data.train_on", "question"], None, "data.train_on", ["answers, all", "got question"]),
    (["fit", "--trainer.max_steps", "0"], None, "trainer.max_steps", ["from 1, or -1", "got 0"]),
    (["fit", "--trainer.devices", "0"], None, "trainer.devices", ["a number from 1", "got 0"]),
    (["fit", "--model.ran", "8"], None, None, ["'model.ran'", "did you mean 'model.rank'"]),
    (["fit", "--ru", "x"], None, None, ["'ru'", "did you mean 'run'"]),
    (["fit", "--data.system", "x [INST]"], None, "data.system", ["without '[INST]'", "Llama 2"]),
    (["fit", "--samples.prompts", '["[INST] x"]'], None, "samples.prompts", ["without [INST]", "got '[INST] x'"]),
    (["predict", "--prompts", "latin.txt", "--output", "o"], "latin.txt", None, ["not UTF-8", "byte 0"]),
    (["fit", "--trainer.max_time", "x"], None, None, ["unknown option 'trainer.max_time'"]),
    (["fit", "--trainer.inference_mode", "null"], None, "trainer.inference_mode", ["true or false", "got null"]),
    (["fit", "--run", "./full"], None, "run", ["full holds other files", "--run"]),
    (["fit", "--trainer.callbacks", "foo"], None, "trainer.callbacks", ["no class 'foo'"]),
    (["fit", "--trainer.enable_checkpointing", "true"], None, None, ["unknown option 'trainer.enable_checkpointing'"]),
    (["fit", "--seed_everything", "true"], None, "seed_everything", ["whole number", "got true"]),
    (["fit", "--early_stopping", "0"], None, "early_stopping", ["from 1", "got 0"]),
    (["fit", "--save_every_steps", "0"], None, "save_every_steps", ["from 1", "got 0"]),
    (["fit", "--run", "/dev/null/x"], None, "run", ["/dev/null/x can't be written"]),
    (["fit", "--run", "./one.jsonl"], None, "run", ["one.jsonl is a file"]),
    (["fit", "--config", "misspelt.yaml"], None, None, ["'model.rnak'", "did you mean 'model.rank'"]),
    (["fit", "--config", "nope.yaml"], None, "config", ["no file nope.yaml"]),
    (["fit", "--config", "doubled.yaml"], "doubled.yaml:3", None, ["'model.rank'", "second time", "line 2"]),
    (["validate"], None, None, ["no run in runs/", "'python main.py fit'", "--run"]),
    (["validate", "--run", "."], None, "run", [". is no run folder", "config.yaml"]),
    (["predict", "--promts", "x"], None, None, ["'promts'", "did you mean 'prompts'"]),
    (["predict", "--prompts", "nope.txt", "--output", "o"], "nope.txt", None, ["No such file"]),
]
"""A command line, and of what is said the place, the option, and words that matter."""


@pytest.mark.parametrize(("args", "place", "option", "words"), BAD, ids=[" ".join(args) for args, *_ in BAD])
def test_a_mistake_is_one_line(
    args: list[str],
    place: str | None,
    option: str | None,
    words: list[str],
    here: Path,
    expect_error: ExpectError,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lit_qlora.model import load

    monkeypatch.setattr(load, "load_base", lambda *_: pytest.fail("a model was loaded"))
    (here / "full").mkdir()
    (here / "full" / "thesis.tex").write_text("precious")
    (here / "empty.jsonl").write_text("")
    (here / "one.jsonl").write_text('{"text": "### Human: a### Assistant: b"}\n')
    (here / "torn.jsonl").write_text('{"text": "### Human: a### Assistant: b"}\n{"text": "### Hu\n')
    (here / "latin.jsonl").write_bytes('{"text": "### Human: é### Assistant: b"}\n'.encode("latin-1"))
    (here / "latin.txt").write_bytes("é".encode("latin-1"))
    (here / "misspelt.yaml").write_text("model:\n  rnak: 8\n")
    (here / "doubled.yaml").write_text("model:\n  rank: 8\n  rank: 16\n")
    expect_error(args, *words, option=option, place=place)
    assert (here / "full" / "thesis.tex").read_text() == "precious"
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (500, "the weights are not those of its config.json: model.embed_tokens.weight is [1024, "),
        (1024, "the tokenizer of 'base' has ids up to 1,024, and its config.json a vocab_size of 1,024; take another"),
    ],
)
def test_a_vocabulary_that_does_not_fit(
    vocabulary: int, message: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from lit_qlora.chosen import choose_adapter
    from lit_qlora.data.tokenizer import load_tokenizer
    from lit_qlora.model import load, lora
    from lit_qlora.tools.answering.answerer import Answerer

    monkeypatch.setattr(load, "load_base", lambda *_: pytest.fail("a model was loaded"))
    shutil.copytree(demo.BASE, "base")
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps(config | {"vocab_size": vocabulary}))
    if vocabulary == 1024:
        tokenizer = load_tokenizer("base")
        tokenizer.add_tokens(["Silas"])
        tokenizer.save_pretrained("base")
    assert main(["fit", "--model.base", "base"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()
    if vocabulary == 1024:
        assert main(["plan", "--model.base", "base"]) == 2
        assert message in capsys.readouterr().err
        Path("adapter").mkdir()
        Path("adapter/adapter_config.json").touch()
        record = {"base": "base", "base_fingerprint": "one of ours", "prompt_format": None}
        monkeypatch.setattr(lora, "read_record", lambda _: record)
        with pytest.raises(UserError, match="has ids up to 1,024"):
            Answerer(choose_adapter(adapter="adapter"))


@pytest.mark.parametrize(
    ("free", "message"),
    [
        (1_000_000, "run: runs/demo, with its checkpoints, needs 8.0 MB, and the disk has 1.0 MB left"),
        (
            5_000_000_000,
            "model.base: the download of someone/llama needs 13.5 GB, and the disk has 5.0 GB",
        ),
    ],
)
def test_too_little_room(
    free: int, message: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from lit_qlora.model import base, module

    config = json.loads((demo.BASE / "config.json").read_text())
    seven_billion = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000,
                     "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}  # fmt: skip
    if free > 1e9:
        monkeypatch.setattr(
            module, "find_base", lambda name, **_: base.Base("someone/llama", "someone/llama", config | seven_billion)
        )
    (here / "elsewhere").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(here / "elsewhere" / "hub"))
    asked = list[Path]()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=free))
    assert main(["fit"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert (here / "elsewhere" in asked) is message.startswith("model.base")


@pytest.mark.parametrize("form", ["guanaco", "llama2"])
def test_real_base_and_real_rows(form: str, real: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = {
        "guanaco": real / "guanaco" / "openassistant_best_replies_eval_first259.jsonl",
        "llama2": real / "guanaco" / "guanaco-llama2-1k.train.parquet",
    }[form]
    base = real / "stories260K"
    arguments = ["--run", "./run", "--model.base", str(base), "--data.source", str(source), "--data.max_length", "256"]
    assert main(["fit", *arguments, *SHORT]) == 0
    best = json.loads(Path("run/adapter/result.json").read_text())
    capsys.readouterr()
    assert main(["validate", "--run", "./run"]) == 0
    assert f"val/loss  {best['val/loss']:.6f}\n" in capsys.readouterr().out
    _check_outside(base, Path("run/adapter"))


def _check_outside(base: Path, adapter: Path) -> None:
    """Plain peft over the base, loaded without this project, gives the logits of the module that trained."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lit_qlora.model.base import find_base
    from lit_qlora.model.load import load_base
    from lit_qlora.model.lora import load_adapter

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    outside = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
    for module in outside.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    outside = PeftModel.from_pretrained(outside, str(adapter)).eval()
    ours = load_base(find_base(str(base)), torch.float32, torch.device("cpu"), "sdpa")
    inside = load_adapter(ours, find_base(str(base)), adapter, trainable=False).eval()
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(outside(input_ids=ids).logits, inside(input_ids=ids).logits)
        with inside.disable_adapter():
            assert not torch.equal(outside(input_ids=ids).logits, inside(input_ids=ids).logits)


def test_the_demos_settings_are_for_the_demo_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(demo.BASE, "llamas/mine")
    assert main(["fit", "--model.base", "llamas/mine", *SHORT, "--trainer.max_steps", "1"]) == 0
    assert main(["fit", "--model.base", "demo", *SHORT, "--trainer.max_steps", "1"]) == 0
    rates = [RunFolder(Path("runs", name)).read_config()["model"]["learning_rate"] for name in ("mine", "demo")]
    assert rates == [0.0002, 0.003]


@pytest.mark.parametrize(
    ("batch", "fits", "change"),
    [
        ([], 1, "--data.batch_size 1 --trainer.accumulate_grad_batches 4"),
        (["--data.batch_size", "1"], 0, "--data.max_length 48"),
        (["--data.batch_tokens", "512"], 1, "--data.batch_tokens 128 --trainer.accumulate_grad_batches 4"),
    ],
)
def test_out_of_memory_after_all_gives_the_change_to_make(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    batch: list[str],
    fits: int,
    change: str,
) -> None:
    real = QLoRAModule.summed_loss

    def short(self: QLoRAModule, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int]:
        if torch.is_grad_enabled() and len(batch.rows) > fits:
            raise torch.OutOfMemoryError
        return real(self, batch)

    monkeypatch.setattr(QLoRAModule, "summed_loss", short)
    assert main(["fit", *SHORT, "--data.max_length", "96", *batch]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory at a micro-batch of ")
    assert error.endswith(f"after all that could be done in a run; give {change}, in a new run: --run NAME\n")


FULL = ["--model.checkpointing", "full"]


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (["--samples.count", "1"], "--samples.count 0 or --model.checkpointing full, with which this run resumes"),
        (["--samples.count", "1", *FULL], "--samples.count 0, with which this run resumes"),
        (
            ["--samples.prompts", "[Why?]", *FULL],
            "--samples.prompts null --samples.count 0, with which this run resumes",
        ),
        (["--samples.count", "0"], "--model.checkpointing full, with which this run resumes"),
        (
            ["--samples.count", "0", *FULL],
            "--data.batch_size 1 --trainer.accumulate_grad_batches 4, in a new run: --run NAME",
        ),
    ],
)
def test_out_of_memory_in_a_validation_is_one_line_and_gives_what_is_not_given_yet(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    change: str,
) -> None:
    def short(self: QLoRAModule, batch: Batch, batch_idx: int) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(QLoRAModule, "validation_step", short)
    assert main(["fit", *SHORT, *options]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: out of memory outside of a training step .*\n", error)
    assert error.endswith(f"; give {change}\n")


@pytest.mark.parametrize(
    ("steps", "note"),
    [
        ((5, 10), "is saved up to step 10: the same command, once that is mended, resumes"),
        ((), "nothing was saved: the same command, once that is mended, begins anew"),
    ],
)
def test_after_the_traceback_of_a_callback_of_ones_own_stands_what_is_saved(
    steps: tuple[int, ...], note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_qlora import training

    def fails(*args: Any, **options: Any) -> None:
        raise ValueError("mine is broken")

    monkeypatch.setattr(training, "say_loading", lambda *parts: None)
    run = RunFolder(tmp_path)
    for step in steps:
        run.checkpoint(step).mkdir(parents=True)
    cli: Any = SimpleNamespace(trainer=SimpleNamespace(fit=fails), resume_from=None, run=run)
    with pytest.raises(ValueError, match="mine is broken") as caught:
        training.QLoRACLI.fit(cli, None, None)  # type: ignore[arg-type]
    assert caught.value.__notes__ == [f"{tmp_path} {note}" if steps else note]
