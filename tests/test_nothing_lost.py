"""Kill it, fill its disk, send it signals: the command ends with the right status and one line, and resumes."""

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import socket
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.summary.writer.record_writer import RecordWriter

from lit_qlora.callbacks.stop import TimeLimit
from lit_qlora.cli import main
from lit_qlora.figures.lines import StepLines, read_lines
from lit_qlora.place import DEMO_CONFIG
from lit_qlora.storage import folders
from lit_qlora.storage.adapter import mend_adapter
from lit_qlora.storage.lock import RunLock
from lit_qlora.storage.run import RunFolder
from lit_qlora.storage.state import load_state, save_state
from tests.expect import ExpectError, check_line

QUICK = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "100", "--trainer.log_every_n_steps", "1",
         "--save_every_steps", "2", "--samples.count", "0", "--trainer.limit_val_batches", "1"]  # fmt: skip
FIT = ["fit", "--run", "./run", *QUICK]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def forbid_pickle(patch: pytest.MonkeyPatch) -> None:
    """Reading one may run anything, writing one has others read it. (`datasets` hashes with dill, in memory.)"""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a pickle")

    for owner, names in ((pickle, ("load", "loads", "dump", "Unpickler")), (torch, ("load", "save"))):
        for name in names:
            patch.setattr(owner, name, never)


# Failed saves


def test_a_last_save_that_fails_ends_with_status_1_and_the_same_command_mends_it(
    here: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = folders.sync_file

    def sync(path: Path) -> None:
        if "step-00000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "sync_file", sync)
        assert main(FIT) == 1
    first, last = capsys.readouterr().err.splitlines()
    path = "run/checkpoints/step-00000004"
    assert first.startswith(f"error: {path} could not be saved: No space left on device (2.0 MB needed, ")
    assert last.startswith(f"error: trained to the end, and not saved: {path} could not be saved: No space left on d")
    assert last.endswith("; the same command resumes from the last existing checkpoint")
    assert not Path("run/finished.json").exists()
    assert main(FIT) == 0
    assert Path("run/finished.json").is_file()
    for name in ("checkpoints/step-00000004/state.safetensors", "adapter/adapter_model.safetensors"):
        assert Path("run", name).read_bytes() == (finished / "run" / name).read_bytes()


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's page shows of a run, but for speed and memory."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    found = {}
    for part in ("training", "held-out"):
        events = EventAccumulator(str(run / part)).Reload()
        found |= {
            f"{part}: {name}": [(event.step, make_ndarray(event.tensor_proto).item()) for event in events.Tensors(name)]
            for name in events.Tags()["tensors"]
            if not name.startswith(("3 Speed/", "4 Memory", "_hparams_"))
        }
    return found


def test_where_nothing_was_ever_saved_the_same_command_begins_anew(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folders, "sync_file", full)
    assert main(FIT) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("; the same command begins anew")


@pytest.mark.parametrize("what", ["TensorBoard", "metrics.jsonl"])
def test_figures_that_found_no_room_to_the_end_are_status_1_and_the_same_command_writes_them(
    here: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if what == "TensorBoard":
            patch.setattr(RecordWriter, "write", full)
            problem = "TensorBoard's files in run can't be written: No space left on device"
        else:
            patch.setattr(StepLines, "_append", full)
            problem = "run/metrics.jsonl can't be written: No space left on device"
        assert main(FIT) == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {problem}; training continues, its ")
    check_line(last, "not saved", problem, "resumes from the last existing checkpoint", begins="error: ")
    assert not Path("run/finished.json").exists()
    assert main(FIT) == 0
    assert capsys.readouterr().err == ""
    assert Path("run/finished.json").is_file()
    assert curves(Path("run")) == curves(finished / "run")
    steps = [[line["step"] for line in read_lines(run / "metrics.jsonl")] for run in (Path("run"), finished / "run")]
    assert steps[0] == steps[1] == [0, 1, 2, 3, 4]


def test_a_run_killed_between_its_last_save_and_its_end_is_ended_by_the_next_start(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_pickle(monkeypatch)  # in a resume neither
    mark = (run / "finished.json").read_text()
    (run / "finished.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))  # the last one is in the checkpoint until then
    assert main(FIT) == 0
    out, err = capsys.readouterr()
    assert "held-out loss" in out and "best adapter: run/adapter\n" in out
    assert err == ""
    assert (run / "finished.json").read_text() == mark
    assert (run / "metrics.jsonl").read_text() == "".join(lines)


def test_a_finished_mark_that_cannot_be_written_is_one_line_and_status_1(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if target.name == "finished.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    assert main(FIT) == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("error: run/finished.json could not be saved: Input/output error (")
    assert last.startswith("error: trained to the end, and not saved: run/finished.json could not be saved: ")


def test_a_config_that_cannot_be_written_is_one_line_and_status_1(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def replace(path: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", replace)
    assert main(FIT) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: run/config.yaml could not be saved: No space left on device (0.0 MB needed, ")
    assert not Path("run").exists()


# Damage


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with a token in the environment and all that it printed; nothing of it was pickled."""
    folder = tmp_path_factory.mktemp("finished")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
        forbid_pickle(patch)
        patch.chdir(folder)
        patch.setenv("HF_TOKEN", "hf_canary_in_a_coal_mine")
        assert main(FIT) == 0
    (folder / "output.txt").write_text(printed.getvalue(), encoding="utf-8")
    return folder


@pytest.fixture
def run(finished: Path, here: Path) -> Path:
    shutil.copytree(finished / "run", here / "run")
    return Path("run")


def test_no_token_reaches_a_file_or_the_terminal(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    expected = {"output.txt", "config.yaml", "metrics.jsonl", "state.json", "adapter_config.json", "README.md"}
    assert {path.name for path in files} >= expected and len(list(finished.glob("run/*/events.*"))) == 2
    assert [path for path in files if b"hf_canary" in path.read_bytes()] == []


DAMAGES = {
    "truncated": lambda file: os.truncate(file, 1000),
    "flipped": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
    "zero-tailed": lambda file: file.write_bytes(file.read_bytes()[:-1000] + bytes(1000)),
    "gone": lambda file: file.unlink(),
    "without a manifest": lambda file: (file.parent / "manifest.json").unlink(),
    "pickled": lambda file: file.write_bytes(b"\x80\x04cposix\nsystem\n(S'touch pwned'\ntR."),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(run: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    """The run resumes from the one before, to the same end; with all damaged, from none."""
    whole = (run / "checkpoints/step-00000004/state.safetensors").read_bytes()
    (run / "finished.json").unlink()
    DAMAGES[damage](run / "checkpoints/step-00000004/state.safetensors")
    assert main(["validate", "--run", "./run", "--ckpt_path", "run/checkpoints/step-00000004"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ckpt_path: run/checkpoints/step-00000004: ")
    assert error.endswith("; give best, last, base, or a folder that is whole\n")
    if damage in ("flipped", "without a manifest"):
        assert main(FIT) == 0
        warning = capsys.readouterr().err
        assert warning.startswith("warning: run/checkpoints/step-00000004: '")
        assert warning.endswith("; falling back to the previous checkpoint\n")
        assert (run / "checkpoints/step-00000004/state.safetensors").read_bytes() == whole
        (run / "finished.json").unlink()
        DAMAGES[damage](run / "checkpoints/step-00000004/state.safetensors")
    DAMAGES[damage](run / "checkpoints/step-00000002/state.safetensors")
    assert main(FIT) == 2
    (last,) = capsys.readouterr().err.splitlines()[2:]
    check_line(last, "run/checkpoints", "whole", "another --run", begins="error: run: ")
    assert not Path("pwned").exists()


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_pickle_in_a_resealed_checkpoint(run: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """The manifest fits, and still the run resumes from the one before, to the same end."""
    folder = run / "checkpoints/step-00000004"
    whole = (folder / "state.safetensors").read_bytes()
    (run / "finished.json").unlink()

    reseal(folder, lambda new: DAMAGES["pickled"](new / name))
    assert main(FIT) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {folder}: '{name}': expected ")
    assert warning.endswith("; falling back to the previous checkpoint")
    assert (folder / "state.safetensors").read_bytes() == whole
    assert not Path("pwned").exists()


def change_state(folder: Path, change: Callable[[dict], object]) -> None:
    """Seals the checkpoint again with another state in it."""
    state = load_state(folder)
    change(state)
    reseal(folder, lambda new: save_state(state, new))


@pytest.mark.parametrize("part", ["run", "metrics_line", "callbacks", "lr_schedulers"])
def test_a_resealed_checkpoint_that_lacks_a_part_is_passed_over(
    run: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    folder = run / "checkpoints/step-00000004"
    whole = (folder / "state.safetensors").read_bytes()
    (run / "finished.json").unlink()
    change_state(folder, lambda state: state.pop(part))
    assert main(FIT) == 0
    words = "'state.json'", f"found no {part}", "falling back to the previous checkpoint"
    check_line(capsys.readouterr().err, *words, begins=f"warning: {folder}: ")
    assert (folder / "state.safetensors").read_bytes() == whole
    assert load_state(folder, with_tensors=False)["run"]["steps"] == 4


@pytest.mark.parametrize("part", ["prompt_format", "precision"])
def test_a_resealed_checkpoint_whose_record_lacks_a_part_is_refused(
    part: str, run: Path, expect_error: ExpectError
) -> None:
    folder = run / "checkpoints/step-00000004"
    change_state(folder, lambda state: state["run"].pop(part))
    other = [*FIT, "--trainer.precision", "32-true"]  # in question where the run is finished, too
    expect_error(other, folder, f"{part}: expected a text, got nothing", "remove that folder", option="run")
    (run / "finished.json").unlink()
    for command in (FIT, ["validate", "--run", "./run", "--ckpt_path", "last"]):
        expect_error(command, folder, f"{part}: expected a text, got nothing", "remove that folder", option="run")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_resealed_checkpoint_with_a_weight_that_is_not_finite_is_refused(
    run: Path, value: str, expect_error: ExpectError
) -> None:
    folder = run / "checkpoints/step-00000004"
    (run / "finished.json").unlink()
    name = "model.base_model.model.model.layers.0.mlp.down_proj.lora_A.default.weight"
    change_state(folder, lambda state: state["state_dict"][name].view(-1)[3:4].fill_(float(value)))
    for command in (FIT, ["validate", "--run", "./run", "--ckpt_path", "last"]):
        expect_error(command, name, "not finite", "remove that checkpoint's folder", place=folder)
    shutil.rmtree(folder)
    assert main(FIT) == 0


def test_files_of_other_programs_do_no_harm(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "finished.json").unlink()
    for folder in (*(run / "checkpoints").iterdir(), run / "adapter"):
        (folder / "desktop.ini").write_text("[.ShellClassInfo]", encoding="utf-8")
    assert main(FIT) == 0
    out, err = capsys.readouterr()
    assert "resuming from step-00000004" in out or "best adapter: run/adapter" in out
    assert err == ""
    assert main(["validate", "--run", "./run", "--ckpt_path", "last"]) == 0


def test_a_checkpoint_that_is_not_there(run: Path, expect_error: ExpectError) -> None:
    folder = "run/checkpoints/step-00000009"
    words = "found nothing", "best, last, base, or a folder"
    expect_error(["validate", "--run", "./run", "--ckpt_path", folder], folder, *words, option="ckpt_path")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "result.json"])
def test_an_adapter_that_was_altered(run: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """An edited alpha, a flipped bit, a doctored result."""
    file = run / "adapter" / name
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"lora_alpha": 16', b'"lora_alpha": 32') if name == "adapter_config.json" else (
        content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    ))  # fmt: skip
    assert main(["validate", "--run", "./run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: run/adapter: '{name}': expected ")
    assert "the adapter was altered or cut short after it was saved" in error
    (run / "finished.json").unlink()
    shutil.rmtree(run / "checkpoints/step-00000004")
    shutil.rmtree(run / "adapter.copy")
    assert main(FIT) == 0
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: run/adapter: '{name}': expected ")
    assert warning.endswith("; put aside as run/adapter.damaged, and the search for the best starts over\n")
    assert main(["validate", "--run", "./run"]) == 0
    assert (run / "adapter.damaged" / name).read_bytes() != content


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("damage", ["flipped", "removed"])
def test_the_best_adapter_survives_what_happens_to_its_folder(
    run: Path, capsys: pytest.CaptureFixture[str], damage: str, is_finished: bool
) -> None:
    weights = run / "adapter/adapter_model.safetensors"
    whole = weights.read_bytes()
    if not is_finished:
        (run / "finished.json").unlink()
    if damage == "flipped":
        DAMAGES["flipped"](weights)
    else:
        shutil.rmtree(run / "adapter")
    assert main(FIT) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: run/adapter: ")
    assert warning.endswith(", and restored from run/adapter.copy")
    assert weights.read_bytes() == whole


def test_a_finished_run_without_a_whole_adapter_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("adapter", "adapter.copy"):
        DAMAGES["flipped"](run / folder / "adapter_model.safetensors")
    assert main(FIT) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: run/adapter: 'adapter_model.safetensors': expected sha256=")
    assert error.endswith(
        "; the run is finished, and no intact copy of its adapter is left; train it with another --run"
    )
    assert (run / "adapter").is_dir()


def test_a_best_adapter_that_is_gone_with_its_copy_is_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "finished.json").unlink()
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "adapter.copy")
    assert main(FIT) == 0
    assert "warning: the best adapter so far, that of step 4, is gone from run/adapter" in "".join(capsys.readouterr())


def reseal(folder: Path, change: Callable[[Path], object]) -> None:
    def fill(new: Path) -> None:
        shutil.copytree(folder, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        change(new)

    folders.write_folder(folder, fill, replace=True)


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def with_other_alpha(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"lora_alpha": 16', '"lora_alpha": 32'), encoding="utf-8")


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (with_nan, "holds values that are not finite"),
        (with_other_alpha, "adapter_config.json has lora_alpha 32.0, expected 16.0: it was altered"),
    ],
)
def test_an_adapter_that_was_altered_and_sealed_again(
    run: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], expected: str, is_finished: bool
) -> None:
    if not is_finished:
        (run / "finished.json").unlink()
    reseal(run / "adapter", change)
    assert main(FIT) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert expected in error
    assert error.endswith("; move run/adapter away, and a copy or a new best takes its place")
    shutil.rmtree(run / "adapter")
    assert main(FIT) == 0
    assert capsys.readouterr().err.endswith(", and restored from run/adapter.copy\n")


def test_a_second_process_is_refused_and_the_first_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock(run):
        assert main(FIT) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: run is in use by process {os.getpid()} on {socket.gethostname()} since ")
    assert error.endswith(": wait for it, stop it, or give another --run\n")


def test_a_second_process_leaves_alone_what_the_first_is_writing(run: Path) -> None:
    half = run / "checkpoints" / ".step-00000009.tmp-abc"
    half.mkdir()
    with RunLock(run):
        assert main(FIT) == 2
    assert half.is_dir()


# What a run folder may not do


def test_no_code_is_taken_from_a_run_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All else in the run's config is taken, for the run may be one's own."""
    (run / "payload.py").write_text("raise AssertionError('it ran')\n")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(f"trainer.callbacks: [{{class_path: run.payload.X}}]\n{config}")
    for verb, said in (("validate", "val/loss"), ("test", "test/loss"), ("fit", "nothing to do")):
        assert main([verb, "--run", "./run"]) == 0
        printed = capsys.readouterr()
        assert printed.err.startswith("warning: trainer.callbacks of run/config.yaml left out: it can name code")
        assert (printed.err.count("\n"), said in printed.out) == (1, True)


def test_a_validation_of_no_batch_is_refused(run: Path, expect_error: ExpectError) -> None:
    """A run without validations has this setting."""
    name = "trainer.limit_val_batches"
    expect_error(["validate", "--run", "./run", f"--{name}", "0"], "1.0 for all", "got 0", option=name)


def test_a_run_with_classes_of_ones_own_resumes_by_the_same_command(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given by short names, which config.yaml has in full."""
    own = ["--trainer.callbacks+=DeviceStatsMonitor", "--trainer.callbacks+=Timer",
           "--trainer.logger", "CSVLogger"]  # fmt: skip
    assert main([*FIT, *own, "--trainer.max_steps", "1"]) == 0
    capsys.readouterr()
    assert main([*FIT, *own, "--trainer.max_steps", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "changed: trainer.max_steps: 1 -> 2" in printed.out
    assert [line["step"] for line in read_lines(Path("run/metrics.jsonl"))] == [0, 1, 2]
    assert len([*Path("run").glob("lightning_logs/version_*/metrics.csv")]) == 2  # one per start
    assert main(["validate", "--run", "./run"]) == 0
    assert capsys.readouterr().err.startswith("warning: trainer.logger, trainer.callbacks of run/config.yaml left out")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["--seed_everything", "7"], "seed_everything: 42 -> 7"),
        (["--model.weight_decay", "0.5"], "model.weight_decay: 0.0 -> 0.5"),
        (["--data.batch_size", "8"], "data.batch_size: 4 -> 8"),
        (["--model.optimizer", "adamw_8bit"], "model.optimizer: adamw -> adamw_8bit"),
    ],
)
def test_a_checkpoint_knows_its_settings_without_config_yaml(
    run: Path, changed: list[str], expected: str, expect_error: ExpectError
) -> None:
    (run / "finished.json").unlink(missing_ok=True)
    (run / "config.yaml").unlink()
    longer = [*FIT, "--trainer.max_steps", "6"]
    expect_error([*longer, *changed], expected, "--run NAME", option="run")
    assert main(longer) == 0


def test_a_url_is_no_run_folder(here: Path, expect_error: ExpectError) -> None:
    for verb in ("fit", "validate"):
        expect_error([verb, "--run", "http://example.org/x"], "http://example.org/x", "give a folder", option="run")
    assert list(here.iterdir()) == []


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_is_loaded(
    number: int, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lit_qlora.model import load

    monkeypatch.setattr(load, "load_base", lambda *_: os.kill(os.getpid(), number))
    assert main(FIT) == 128 + number
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[signal.Signals(number)]
    assert capsys.readouterr().err == f"\nstopped by {name}; given again, the same command resumes from what is saved\n"
    assert not Path("run").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_in_the_validation_before_the_first_step(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lit_qlora.model.module import QLoRAModule

    monkeypatch.setattr(QLoRAModule, "validation_step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(FIT) == 143
    assert capsys.readouterr().err == "\nstopped by SIGTERM; given again, the same command resumes from what is saved\n"
    assert not Path("run").exists()


# Side files


@pytest.mark.parametrize("text", ["{", '{"val/loss": 1.0}', ""])
def test_a_damaged_result_puts_the_adapter_aside(run: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (run / "adapter/result.json").write_text(text)
    manifest = run / "adapter/manifest.json"
    entries = json.loads(manifest.read_text())
    digest = hashlib.sha256(text.encode()).hexdigest()
    entries["files"]["result.json"] = {"bytes": len(text), "sha256": digest}
    manifest.write_text(json.dumps(entries))
    shutil.rmtree(run / "adapter.copy", ignore_errors=True)
    mend_adapter(RunFolder(run))
    err = capsys.readouterr().err
    assert err.startswith("warning: run/adapter: 'result.json': expected a step and its figures, found ")
    assert err.endswith("; put aside as run/adapter.damaged, and the search for the best starts over\n")
    assert not (run / "adapter").exists()


def test_a_damaged_config_stops_at_once_and_without_it_the_run_resumes(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.yaml").write_bytes(b"")
    remedy = "put a copy of it back, or remove it and give fit all options (--config FILE --run run): "
    for args in (["fit", "--run", "./run"], ["validate", "--run", "./run"]):
        assert main(args) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: run/config.yaml: the file is empty; {remedy}") and err.count("\n") == 1
    assert main([*FIT, "--config", str(DEMO_CONFIG)]) == 2
    assert capsys.readouterr().err.startswith(f"error: run/config.yaml is damaged (no 'option: value' lines); {remedy}")
    (run / "config.yaml").unlink()
    assert main(FIT) == 0
    assert "run is finished (4 of 4 steps): nothing to do" in capsys.readouterr().out
    assert main(["validate", "--run", "./run"]) == 0  # it stands there again


# Time


def test_max_time_ends_with_status_0_and_the_same_command_resumes(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lit_qlora.training.max_time_s", lambda text: {"00:00:00:01": 0.01}[text])
        limit, times = "lit_qlora.training.TimeLimit", list[float]()
        patch.setattr(limit, lambda *args: times.append(args[1]) or TimeLimit(*args))  # type: ignore[func-returns-value]
        patch.setattr("lit_qlora.cli.import_module", lambda name: times.append(time.monotonic()) or import_module(name))  # type: ignore[func-returns-value]
        assert main([*FIT, "--max_time", "00:00:00:01"]) == 0  # over before the first step, which is done all the same
    before_imports, started_at = times
    assert 0 < before_imports - started_at < 60
    assert capsys.readouterr().out.endswith(
        "\nstopped and saved at step 1 by max_time; the same command resumes from here\n"
    )
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step-00000001"]
    assert not Path("run/finished.json").exists()
    assert "max_time" not in Path("run/config.yaml").read_text()
    with Path("run/config.yaml").open("a") as file:  # by hand
        file.write("max_time: 00:00:00:01\n")
    monkeypatch.setattr("lit_qlora.training.max_time_s", None)
    assert main(["fit", "--run", "./run"]) == 0
    assert "changed" not in capsys.readouterr().out
    assert Path("run/finished.json").is_file()


def test_a_time_limit_that_is_none_is_refused_at_once(here: Path, expect_error: ExpectError) -> None:
    started = time.monotonic()
    expect_error([*FIT, "--max_time", "3h"], "DD:HH:MM:SS", "'3h'", option="max_time")
    assert time.monotonic() - started < 60
    expect_error([*FIT, "--save_every_minutes", "0"], "above 0", "0.0", option="save_every_minutes")
    assert not Path("run").exists()


# A mirror


def test_a_fresh_machine_resumes_from_the_mirror_to_the_same_bits(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lit_qlora.model.module import QLoRAModule

    more = ["--trainer.val_check_interval", "2", "--model.dropout", "0.1", "--mirror", "drive"]
    assert main(["fit", "--run", "./whole", *QUICK, *more[:-2]]) == 0
    real = QLoRAModule.training_step

    def step(module: QLoRAModule, batch: object, batch_idx: int) -> object:
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(QLoRAModule, "training_step", step)
        assert main([*FIT, *more]) == 143
    shutil.rmtree("run")
    capsys.readouterr()
    assert main([*FIT, *more]) == 0
    out, err = capsys.readouterr()
    assert "   run  restored from drive/run/checkpoints/step-00000003\n" in out
    assert "resuming from step-00000003" in out
    assert err == ""
    for name in ("checkpoints/step-00000004/state.safetensors", "adapter/adapter_model.safetensors"):
        assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()
        assert Path("drive/run", name).read_bytes() == Path("whole", name).read_bytes()
    losses = [
        [(line["step"], line.get("train/loss"), line.get("val/loss")) for line in read_lines(run / "metrics.jsonl")]
        for run in (Path("run"), Path("whole"), Path("drive/run"))
    ]
    assert losses[0] == losses[1] == losses[2]
    assert Path("drive/run/finished.json").is_file()
    shutil.rmtree("run")
    assert main([*FIT, *more]) == 0
    assert "run is finished (4 of 4 steps): nothing to do" in capsys.readouterr().out
    Path("drive/run/finished.json").unlink()  # the drive was full at the end
    assert main([*FIT, *more]) == 0
    assert capsys.readouterr().out.endswith("   run  copied to drive/run: the mirror was incomplete\n")
    assert Path("drive/run/finished.json").is_file()


@pytest.fixture
def mirrored(run: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A finished run with a mirror, ``drive``, that has all of it."""
    assert main([*FIT, "--mirror", "drive"]) == 0
    assert capsys.readouterr().out.endswith("   run  copied to drive/run: the mirror was incomplete\n")
    return Path("drive/run")


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_best_adapter_that_is_damaged_with_its_copy_comes_from_the_mirror(
    run: Path, mirrored: Path, capsys: pytest.CaptureFixture[str], is_finished: bool
) -> None:
    weights = (run / "adapter/adapter_model.safetensors").read_bytes()
    if not is_finished:
        (run / "finished.json").unlink()
    for folder in ("adapter", "adapter.copy"):
        DAMAGES["flipped"](run / folder / "adapter_model.safetensors")
    (mirrored / "adapter/README.md").write_text("edited by its reader", encoding="utf-8")
    assert main([*FIT, "--mirror", "drive"]) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: run/adapter: 'adapter_model.safetensors': expected sha256=")
    assert warning.endswith("; put aside as run/adapter.damaged, and restored from drive/run/adapter")
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == weights
    assert (run / "adapter/README.md").read_text(encoding="utf-8") == "edited by its reader"
    assert main(["validate", "--run", "./run"]) == 0


def test_an_older_adapter_in_the_mirror_is_not_taken_for_the_best_of_a_finished_run(
    run: Path, mirrored: Path, expect_error: ExpectError
) -> None:
    """A drive that was full at the end has an older one."""
    reseal(mirrored / "adapter", lambda new: (new / "result.json").write_text('{"step": 2, "val/loss": 9.0}'))
    for folder in ("adapter", "adapter.copy"):
        shutil.rmtree(run / folder)
    words = "found nothing", "no intact copy", "another --run"
    expect_error([*FIT, "--mirror", "drive"], "run/adapter", *words)


def test_a_checkpoint_in_the_mirror_is_looked_at_as_one_here(
    run: Path, mirrored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sealed again without what a resume needs: neither is it restored, nor does one here hide a whole one there."""
    folder = mirrored / "checkpoints/step-00000004"
    whole = (folder / "state.json").read_bytes()
    for mark in (run, mirrored):
        (mark / "finished.json").unlink()
    change_state(run / "checkpoints/step-00000004", lambda state: state.pop("run"))
    assert main([*FIT, "--mirror", "drive"]) == 0
    out, err = capsys.readouterr()
    assert f"   run  restored from {folder}\n" in out and err == ""
    assert (run / "checkpoints/step-00000004/state.json").read_bytes() == whole
    change_state(folder, lambda state: state.pop("run"))
    shutil.rmtree(run)
    assert main([*FIT, "--mirror", "drive"]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    check_line(warning, "'state.json'", "found no run", "previous checkpoint", begins=f"warning: mirror: {folder}: ")
    assert error.startswith("error: mirror: no checkpoint in drive/run/checkpoints is whole; give another --mirror ")


def test_a_start_that_fails_leaves_nothing_in_the_mirror(
    here: Path, capsys: pytest.CaptureFixture[str], expect_error: ExpectError
) -> None:
    assert main([*FIT, "--mirror", "drive", "--data.source", "nope.jsonl"]) == 2
    assert "nope.jsonl: no such file" in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir()) == ["drive"]
    assert list(Path("drive").iterdir()) == []
    words = "no folder content/drive", "mount the drive"
    expect_error([*FIT, "--mirror", "content/drive/MyDrive"], *words, option="mirror")
