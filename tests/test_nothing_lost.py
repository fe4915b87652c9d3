"""Kill it, fill its disk, send it signals: the command ends with the right status and one line, and goes on well."""

import errno
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from lit_qlora.callbacks.metrics import read_metrics
from lit_qlora.cli import main
from lit_qlora.storage import folders

QUICK = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "100", "--trainer.log_every_n_steps", "1",
         "--save_every_steps", "2", "--samples.count", "0", "--trainer.limit_val_batches", "1"]  # fmt: skip
FIT = ["fit", "--run", "run", *QUICK]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Failed saves


def test_a_last_save_that_fails_ends_with_status_1_and_the_same_command_mends_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    assert last.endswith("; the same command goes on from the last checkpoint that stands")
    assert not Path("run/finished.json").exists()
    assert main(FIT) == 0
    assert Path("run/finished.json").is_file()
    assert main(["fit", "--run", "whole", *QUICK]) == 0
    for name in ("checkpoints/step-00000004/state.safetensors", "adapter/adapter_model.safetensors"):
        assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_is_loaded(
    number: int, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lit_qlora.model import load

    monkeypatch.setattr(load, "load_base", lambda *_: os.kill(os.getpid(), number))
    assert main(FIT) == 128 + number
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[signal.Signals(number)]
    assert capsys.readouterr().err == f"\nstopped by {name}; given again, the same command goes on\n"
    assert not Path("run").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_in_the_validation_before_the_first_step(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lit_qlora.model.module import QLoRAModule

    monkeypatch.setattr(QLoRAModule, "validation_step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(FIT) == 143
    assert capsys.readouterr().err == "\nstopped by SIGTERM; given again, the same command goes on\n"
    assert not Path("run").exists()


# Time


def test_max_time_ends_with_status_0_and_the_same_command_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = [*FIT, "--trainer.max_steps", "100", "--save_every_steps", "99"]
    assert main([*longer, "--max_time", "00:00:00:01"]) == 0
    told = r"\nstopped and saved at step (\d+) by max_time; the same command goes on from here\n$"
    stopped = re.search(told, capsys.readouterr().out)
    assert stopped and 0 < int(stopped[1]) < 99
    assert [path.name for path in Path("run/checkpoints").iterdir()] == [f"step-{int(stopped[1]):08d}"]
    assert not Path("run/finished.json").exists()
    assert main([*longer, "--max_time", "00:01:00:00"]) == 0
    assert Path("run/finished.json").is_file()


def test_a_time_limit_that_is_none_is_refused_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert main([*FIT, "--max_time", "3h"]) == 2
    assert time.monotonic() - started < 10
    assert capsys.readouterr().err == "error: max_time: expected DD:HH:MM:SS, such as 00:03:30:00, got '3h'\n"
    assert main([*FIT, "--save_every_minutes", "0"]) == 2
    assert capsys.readouterr().err == "error: save_every_minutes: expected none, or a number above 0, got 0.0\n"
    assert not Path("run").exists()


# A mirror


def test_a_fresh_machine_goes_on_from_the_mirror_to_the_same_bits(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lit_qlora.model.module import QLoRAModule

    more = ["--trainer.val_check_interval", "2", "--model.dropout", "0.1", "--mirror", "drive"]
    assert main(["fit", "--run", "whole", *QUICK, *more[:-2]]) == 0
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
    assert "going on from step-00000003" in out
    assert err == ""
    for name in ("checkpoints/step-00000004/state.safetensors", "adapter/adapter_model.safetensors"):
        assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()
        assert Path("drive/run", name).read_bytes() == Path("whole", name).read_bytes()
    losses = [
        [(line["step"], line.get("train/loss"), line.get("val/loss")) for line in read_metrics(run / "metrics.jsonl")]
        for run in (Path("run"), Path("whole"), Path("drive/run"))
    ]
    assert losses[0] == losses[1] == losses[2]
    assert Path("drive/run/finished.json").is_file()
    shutil.rmtree("run")
    assert main([*FIT, *more]) == 0
    assert "run is finished (4 of 4 steps): nothing to do" in capsys.readouterr().out


def test_a_start_that_fails_leaves_nothing_in_the_mirror(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--mirror", "drive", "--data.source", "nope.jsonl"]) == 2
    assert "nope.jsonl: no such file" in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir()) == ["drive"]
    assert list(Path("drive").iterdir()) == []
    assert main([*FIT, "--mirror", "content/drive/MyDrive"]) == 2
    assert capsys.readouterr().err == (
        "error: mirror: there is no folder content/drive; mount the drive, or give another one\n"
    )
