"""A run that is given other settings, rows or another base says what changed, and resumes or refuses."""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lit_qlora import demo
from lit_qlora.batch import Batch
from lit_qlora.cli import main
from lit_qlora.figures.lines import read_lines
from lit_qlora.model import load
from lit_qlora.model.module import QLoRAModule
from lit_qlora.options import take_option
from lit_qlora.place import DEMO_CONFIG
from lit_qlora.storage.folders import write_folder
from lit_qlora.text import llama2

STEPS = ["--trainer.max_steps", "6", "--trainer.val_check_interval", "100", "--trainer.log_every_n_steps", "1",
         "--save_every_steps", "2", "--samples.count", "0", "--trainer.limit_val_batches", "1",
         "--data.max_length", "64"]  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, a base, and a run of these that was cut after step 2 of 6."""
    here = tmp_path_factory.mktemp("begun")
    lines = demo.TRAIN.read_text(encoding="utf-8").splitlines()
    (here / "rows.jsonl").write_text("\n".join(lines[:60]) + "\n", encoding="utf-8")
    (here / "held_out.jsonl").write_text("\n".join(lines[60:70]) + "\n", encoding="utf-8")
    (here / "others.jsonl").write_text("\n".join(lines[70:80]) + "\n", encoding="utf-8")
    shutil.copytree(demo.BASE, here / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        assert main(FIT) == 0
    run = here / "run"
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    (run / "finished.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    (here / "whole.jsonl").write_text("".join(lines))
    return here


FIT = ["fit", "--config", str(DEMO_CONFIG), "--run", "./run", "--data.source", "rows.jsonl",
       "--data.validation_source", "held_out.jsonl", "--model.base", "base",
       "--keep_checkpoints", "9", *STEPS]  # fmt: skip


@pytest.fixture
def here(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(begun, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def refusal(capsys: pytest.CaptureFixture[str], *args: str, of_the_base: bool = False) -> str:
    """The error message after ``error: run:``; nothing was written by then, and only another base was loaded."""
    before = _saved()
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        if not of_the_base:
            patch.setattr(load, "load_base", _never)
        assert main([*take_option(FIT, *args[:1])[1], *args]) == 2  # a source given twice is refused as such
    error = capsys.readouterr().err
    assert error.startswith("error: run: ") and error.count("\n") == 1
    assert _saved() == before
    return error.removeprefix("error: run: ").removesuffix("\n")


def _never(*_: object) -> None:
    raise AssertionError("a base was loaded")


def _saved() -> dict[str, bytes]:
    files = [*Path("run/adapter").iterdir(), *Path("run/checkpoints").rglob("*"), Path("run/metrics.jsonl")]
    return {str(file): file.read_bytes() for file in files if file.is_file()}


@pytest.mark.parametrize(
    ("args", "change"),
    [
        (["--data.source", "others.jsonl"], "data.source: rows.jsonl -> others.jsonl"),
        (["--seed_everything", "1"], "seed_everything: 42 -> 1"),
        (["--data.batch_size", "2"], "data.batch_size: 4 -> 2"),
        (["--trainer.accumulate_grad_batches", "2"], "trainer.accumulate_grad_batches: 1 -> 2"),
        (["--model.rank", "8"], "model.rank: 16 -> 8"),
        (["--model.alpha", "8"], "model.alpha: 16.0 -> 8.0"),
        (["--model.target_modules", "q_proj"], "model.target_modules: all-linear -> q_proj"),
        (["--model.dropout", "0.5"], "model.dropout: 0.0 -> 0.5"),
        (["--model.learning_rate", "0.1"], "model.learning_rate: 0.003 -> 0.1"),
        (["--model.schedule", "cosine"], "model.schedule: linear -> cosine"),
        (["--data.system", "Be brief."], "data.system: None -> Be brief."),
    ],
)
def test_settings_that_make_another_run(
    here: Path, capsys: pytest.CaptureFixture[str], args: list[str], change: str
) -> None:
    message = refusal(capsys, *args)
    assert change in message and "--run NAME" in message


def test_settings_that_may_change_are_reported_in_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--save_every_steps", "3", "--trainer.enable_progress_bar", "false", "--mirror", "drive"]
    assert main([*FIT, *args]) == 0
    changed = "mirror: None -> drive; save_every_steps: 2 -> 3; trainer.enable_progress_bar: None -> False"
    assert f"   run  changed: {changed}\n" in capsys.readouterr().out
    assert {path.name for path in Path("run/checkpoints").iterdir()} >= {"step-00000003", "step-00000006"}


def test_other_rows_under_the_same_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, part in (("rows", "train"), ("held_out", "held out")):
        text = Path(f"{name}.jsonl").read_text(encoding="utf-8")
        count = len({*text.splitlines()})
        Path(f"{name}.jsonl").write_text(text.replace("the", "teh", 1), encoding="utf-8")
        message = refusal(capsys)
        counted = f"its {part} rows changed: 1 of {count} conversations gone and 1 new conversation; give"
        assert message.startswith(counted)
        assert message.endswith(
            f"; give the {'held-out ' if name == 'held_out' else ''}rows that the run began with, "
            "or --run NAME to start another run"
        )
        Path(f"{name}.jsonl").write_text(text, encoding="utf-8")


def test_a_copy_of_the_base_is_the_same_base(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("base").rename("moved")
    for verb in ("fit", "validate"):
        assert main([verb, "--run", "./run"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: model.base: no folder 'base'") and error.endswith(
            "; run has this path: give --model.base if the base is elsewhere now\n"
        )
    assert main([*FIT, "--model.base", "moved"]) == 0
    assert "   run  changed: model.base: base -> moved\n" in capsys.readouterr().out


def test_a_copy_of_the_adapter_to_start_from_is_the_same_adapter(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("run/adapter", "start")
    fit = [*take_option(FIT, "--run")[1], "--run", "./next"]
    assert main([*fit, "--model.adapter", "start", "--trainer.max_steps", "2"]) == 0
    Path("start").rename("moved")
    capsys.readouterr()
    assert main(["fit", "--run", "./next", "--trainer.max_steps", "6"]) == 2
    advice = "start is no adapter: it has no adapter_config.json; next has this path: give --model.adapter if"
    assert advice in capsys.readouterr().err
    fit += ["--model.adapter", "moved", "--trainer.max_steps", "4"]
    assert main(fit) == 0
    assert "   run  changed: model.adapter: start -> moved; trainer.max_steps: 2 -> 4\n" in capsys.readouterr().out
    another = ["--model.adapter", "next/adapter"]
    for done in (True, False):
        if not done:
            Path("next/finished.json").unlink()
        assert main([*take_option(fit, "--model.adapter")[1], *another]) == 2
        words = "model.adapter: start -> next/adapter" if done else "its adapter changed: "
        assert words in capsys.readouterr().err


def test_a_finished_run_refuses_another_base(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(FIT) == 0
    shutil.copytree("base", "other")
    config = json.loads(Path("other/config.json").read_text())
    Path("other/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert "model.base: base -> other" in refusal(capsys, "--model.base", "other")


def test_rows_elsewhere_are_the_same_rows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("drive").mkdir()
    for name in ("rows", "held_out"):
        Path(f"{name}.jsonl").rename(f"drive/{name}.jsonl")
    for args in (["fit", "--run", "./run"], ["validate", "--run", "./run"]):
        assert main(args) == 2
        advice = "; run has this path: give --data.source if the rows are elsewhere now\n"
        shown = capsys.readouterr().err
        assert shown.startswith("error: rows.jsonl: no such file") and shown.endswith(advice)
    assert main(["evaluate", "--run", "./run"]) == 2
    assert capsys.readouterr().err.endswith("; run has this path: give --source for other rows\n")
    assert main(["evaluate", "--run", "./run", "--source", "others.jsonl", "--draws", "100"]) == 0
    for verb, option in (("validate", "--data.validation_source"), ("test", "--data.test_source")):
        assert main([verb, "--run", "./run", option, "others.jsonl"]) == 0
    capsys.readouterr()
    moved = [*take_option(take_option(FIT, "--data.source")[1], "--data.validation_source")[1],
             "--data.source", "drive/rows.jsonl", "--data.validation_source", "drive/held_out.jsonl"]  # fmt: skip
    assert main([*moved, "--mirror", "drive"]) == 0
    shown = capsys.readouterr().out
    changed = "data.source: rows.jsonl -> drive/rows.jsonl; data.validation_source: held_out.jsonl -> drive/held_out"
    assert f"   run  changed: {changed}" in shown and "is finished" not in shown
    shutil.rmtree("run")
    assert main([*take_option(moved, "--data.source")[1], "--data.source", f"{here}/drive/rows.jsonl",
                 "--mirror", "drive"]) == 0  # fmt: skip
    assert "run is finished (6 of 6 steps): nothing to do" in capsys.readouterr().out
    Path("others.jsonl").replace("drive/rows.jsonl")
    assert main([*moved, "--mirror", "drive"]) == 2
    assert "drive/run belongs to another run: data.source: rows.jsonl -> drive/rows.jsonl" in capsys.readouterr().err


def test_another_base_under_the_same_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file("base/model.safetensors")
    tensors["model.norm.weight"][3] += 0.5
    save_file(tensors, "base/model.safetensors", {"format": "pt"})
    message = refusal(capsys, of_the_base=True)
    assert message.startswith("its base changed: base (") and ") -> base (" in message
    assert message.endswith("; give that base with --model.base, or --run NAME to start another run")


def test_a_setting_of_the_base_that_no_width_shows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert refusal(capsys, of_the_base=True).startswith("its base changed: base (")


def test_another_tokenizer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = json.loads(Path("base/tokenizer.json").read_text(encoding="utf-8"))
    *_, (a, one), (b, other) = rules["model"]["vocab"].items()
    rules["model"]["vocab"] |= {a: other, b: one}
    Path("base/tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
    message = refusal(capsys)
    assert message.startswith("its tokenizer changed: ")
    assert message.endswith("; give a base with that tokenizer, or --run NAME to start another run")


def test_another_template(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama2.Llama2, "name", "llama2-chat-2")
    message = refusal(capsys)
    assert message.startswith("its prompt format changed: llama2-chat ") and " -> llama2-chat-2 " in message


def test_another_precision(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "--trainer.precision", "bf16-mixed")
    assert "precision changed: 32-true -> bf16-mixed" in message and "--run NAME" in message
    assert main([*FIT, "--trainer.precision", "32-true"]) == 0  # what auto had chosen


def test_a_shorter_run_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "--trainer.max_steps", "4")
    assert message.startswith("it has 6 optimizer steps, and is asked for 4; a run can be made longer, not shorter: ")
    assert ": give --trainer.max_steps 6, as its last start had, " in message and "--run NAME" in message


def test_an_extended_run_that_was_cut_resumes_with_what_the_message_gives(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FIT, "--trainer.max_steps", "8"]) == 0
    Path("run/finished.json").unlink()
    shutil.rmtree("run/checkpoints/step-00000008")
    capsys.readouterr()
    assert main(["fit", "--run", "./run"]) == 2  # its config.yaml is that of its first start
    given = re.search(": give (.*), as its last start had, ", capsys.readouterr().err)
    assert given and given[1] == "--trainer.max_steps 8"
    assert main(["fit", "--run", "./run", *given[1].split()]) == 0
    assert json.loads(Path("run/finished.json").read_text())["step"] == 8


def test_a_longer_run_takes_the_learning_rate_of_the_longer_schedule(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FIT, "--trainer.max_steps", "10"]) == 0
    out = capsys.readouterr().out
    assert "   run  changed: trainer.max_steps: 6 -> 10\n" in out
    assert "   run  6 steps became 10: from step 2 on, the learning rate is that of the longer run\n" in out
    rates = {
        line["step"]: line["train/learning_rate"] for line in read_lines(Path("run/metrics.jsonl")) if line["step"]
    }
    # Warm-up of one step to half, then down in a line over 5 steps; from the third step on over 9.
    expected = [0.0015, 0.003] + [0.003 * (1 - done / 9) for done in range(1, 9)]
    assert [rates[step] for step in range(1, 11)] == pytest.approx(expected)
    mark = json.loads(Path("run/finished.json").read_text())
    lengths = {"max_steps": 10, "max_epochs": 1, "early_stopping": None}
    best_step = json.loads(Path("run/adapter/result.json").read_text())["step"]
    assert mark == {"step": 10, "steps": 10, "lengths": lengths, "best_step": best_step}


LONGER = ["--trainer.max_steps", "10", "--trainer.val_check_interval", "3"]


def test_what_was_done_after_the_checkpoint_with_other_settings_is_no_part_of_the_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines and a best adapter of steps 3 to 6, from before the kill, which now come otherwise."""
    clean = here.with_name("clean")
    shutil.copytree(here, clean)
    for name in ("adapter", "adapter.copy"):
        shutil.rmtree(clean / "run" / name)
    result = Path("run/adapter/result.json")
    assert json.loads(result.read_text())["step"] == 6
    # As if the steps from before were better than any to come.
    files = {path.name: path.read_bytes() for path in result.parent.iterdir() if path.name != "manifest.json"}
    files["result.json"] = json.dumps({"step": 6, "val/loss": 0.5}).encode()

    def fill(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)

    write_folder(result.parent, fill, replace=True)
    Path("whole.jsonl").replace("run/metrics.jsonl")
    assert main([*FIT, *LONGER]) == 0
    shown = capsys.readouterr()
    assert "   run  run/metrics.jsonl: 5 lines after step 1 replaced\n" in shown.out
    assert "   run  run/adapter is of step 6, after step 2: put aside as run/adapter.before\n" in shown.out
    assert shown.err == ""
    assert "max_steps: 10" in Path("run/adapter/README.md").read_text()
    assert Path("run/adapter.before").is_dir()  # better than any that came
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(clean)
        assert main([*FIT, *LONGER]) == 0
    for name in ("adapter/adapter_model.safetensors", "adapter/result.json", "finished.json"):
        assert Path("run", name).read_bytes() == (clean / "run" / name).read_bytes(), name
    lines, expected = (
        [{name: value for name, value in line.items() if "speed" not in name and "memory" not in name}
         for line in read_lines(folder / "run" / "metrics.jsonl")]
        for folder in (here, clean)
    )  # fmt: skip
    assert lines == expected
    assert [line["step"] for line in lines] == [*range(11)]


def test_a_finished_run_that_was_made_longer_and_killed_ends_as_it_was_with_the_old_command(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    same = [*FIT, "--mirror", "drive/mirror"]
    Path("drive/mirror").mkdir(parents=True)
    assert main(same) == 0
    kept = ("adapter/adapter_model.safetensors", "adapter/result.json", "finished.json")
    before = {name: Path("run", name).read_bytes() for name in kept}
    lines = [*read_lines(Path("run/metrics.jsonl"))]
    real = QLoRAModule.training_step

    def killed(self: QLoRAModule, batch: Batch, batch_idx: int) -> dict[str, Any]:
        if self.global_step == 7:
            raise RuntimeError("killed")
        return real(self, batch, batch_idx)

    longer = [*LONGER, "--save_every_steps", "9", "--trainer.val_check_interval", "7"]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(QLoRAModule, "training_step", killed)
        main([*same, *longer])
    assert json.loads(Path("run/adapter/result.json").read_text())["step"] == 7
    assert not Path("run/finished.json").exists()
    (mirrored,) = Path("drive/mirror").glob("**/metrics.jsonl")
    assert not mirrored.with_name("finished.json").exists()
    capsys.readouterr()
    assert main(same) == 0
    assert "is finished" not in capsys.readouterr().out
    assert {name: Path("run", name).read_bytes() for name in kept} == before
    assert [line["step"] for line in read_lines(Path("run/metrics.jsonl"))] == [line["step"] for line in lines]
    assert mirrored.with_name("finished.json").read_bytes() == before["finished.json"]
    assert main(same) == 0
    assert "run is finished (6 of 6 steps): nothing to do" in capsys.readouterr().out


def test_before_the_first_save_other_settings_begin_anew(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("run/checkpoints")
    Path("whole.jsonl").replace("run/metrics.jsonl")
    assert main([*FIT, *LONGER]) == 0
    shown = capsys.readouterr()
    assert "   run  run/metrics.jsonl: 7 lines after step 0 replaced\n" in shown.out
    assert "   run  run/adapter is of step 6, after step 0: put aside as run/adapter.before\n" in shown.out
    assert [line["step"] for line in read_lines(Path("run/metrics.jsonl"))] == [*range(11)]


def test_the_same_settings_repeat_the_steps_after_the_checkpoint(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rule of going back, whatever changed: lines and best adapter come again, as they were."""
    Path("whole.jsonl").replace("run/metrics.jsonl")
    before = [*read_lines(Path("run/metrics.jsonl"))]
    adapter = Path("run/adapter/adapter_model.safetensors").read_bytes()
    assert main([*FIT, "--save_every_steps", "3"]) == 0
    shown = capsys.readouterr()
    assert "   run  run/metrics.jsonl: 5 lines after step 1 replaced\n" in shown.out
    assert shown.err == ""
    timed = ("speed/tokens_per_second", "memory/host_gib")
    lines = [
        [{name: value for name, value in line.items() if name not in timed} for line in found]
        for found in ([*read_lines(Path("run/metrics.jsonl"))], before)
    ]
    assert lines[0] == lines[1]
    assert Path("run/adapter/adapter_model.safetensors").read_bytes() == adapter
    assert "put aside as run/adapter.before" in shown.out and not Path("run/adapter.before").exists()


def test_the_same_length_says_nothing_of_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(FIT) == 0
    out = capsys.readouterr().out
    assert "became" not in out and "changed" not in out


def ended(step: int, steps: int, max_epochs: int = 4, early_stopping: int | None = None) -> None:
    lengths = {"max_steps": -1, "max_epochs": max_epochs, "early_stopping": early_stopping}
    Path("run/finished.json").write_text(json.dumps({"step": step, "steps": steps, "lengths": lengths}))


@pytest.mark.parametrize("args", [["4"], ["3"], ["4", "--early_stopping", "2"]])
def test_a_run_that_was_made_longer_and_is_finished_has_nothing_to_do(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: list[str]
) -> None:
    ended(60, 60)
    monkeypatch.setattr(load, "load_base", _never)
    assert main([*FIT, "--trainer.max_steps", "-1", "--trainer.max_epochs", *args]) == 0
    assert "run is finished (60 of 60 steps): nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mark", "args"),
    [
        ({"step": 60, "steps": 60}, ["-1", "--trainer.max_epochs", "5"]),
        ({"step": 60, "steps": 60}, ["61", "--trainer.max_epochs", "-1"]),
        ({"step": 30, "steps": 60, "early_stopping": 2}, ["-1", "--trainer.max_epochs", "4", "--early_stopping", "3"]),
        ({"step": 30, "steps": 60, "early_stopping": 2}, ["-1", "--trainer.max_epochs", "4"]),
    ],
)
def test_a_finished_run_that_is_asked_for_more_continues(
    here: Path, monkeypatch: pytest.MonkeyPatch, mark: dict[str, int], args: list[str]
) -> None:
    ended(**mark)
    monkeypatch.setattr(load, "load_base", _never)
    with pytest.raises(AssertionError, match="a base was loaded"):
        main([*FIT, "--trainer.max_steps", *args])


def test_early_stopping_may_come_and_go(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--early_stopping", "3"]) == 0
    assert "   run  changed: early_stopping: None -> 3\n" in capsys.readouterr().out
    assert main(["validate", "--run", "./run", "--ckpt_path", "last"]) == 0
    assert main([*FIT, "--trainer.max_steps", "7"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("args", [[], LONGER])
def test_a_base_that_is_refused_late_leaves_lines_and_adapter_as_they_were(
    here: Path, capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    """The base's weights are compared once they are loaded, when the rest of the checkpoint is read already."""
    Path("whole.jsonl").replace("run/metrics.jsonl")
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert refusal(capsys, *args, of_the_base=True).startswith("its base changed: base (")


def test_a_disk_without_room_does_not_keep_a_run_from_going_back(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("whole.jsonl").replace("run/metrics.jsonl")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lit_qlora.figures.lines.write_file", full)
    assert main([*FIT, *LONGER]) == 0
    assert [line["step"] for line in read_lines(Path("run/metrics.jsonl"))] == [*range(11)]


def test_lines_that_cannot_be_dropped_are_one_error_and_stay(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("whole.jsonl").replace("run/metrics.jsonl")
    before = Path("run/metrics.jsonl").read_bytes()

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "truncate", broken)
    assert main([*FIT, *LONGER]) == 1
    assert capsys.readouterr().err.startswith("error: run/metrics.jsonl could not be saved: Input/output error")
    assert Path("run/metrics.jsonl").read_bytes() == before
