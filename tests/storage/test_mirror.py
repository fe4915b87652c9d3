"""A run's copy elsewhere is whole or not there, never harms the run, and is where a fresh machine begins."""

import errno
import json
import os
import shutil
import stat
import threading
import time
from pathlib import Path

import pytest

from lit_qlora.errors import UserError
from lit_qlora.storage import files, folders
from lit_qlora.storage import mirror as mirror_module
from lit_qlora.storage.folders import verify_folder, write_folder
from lit_qlora.storage.mirror import Mirror
from lit_qlora.storage.run import RunFolder
from tests.expect import check_line

CONFIG = {"model": {"rank": 8}, "save_every_steps": 5}


def save(run, step, metrics=None, adapter=True):
    """Save a step as a run does: figures, adapter, checkpoint."""

    def write(name):
        return lambda folder: (folder / name).write_text(f"{name} of {step}", encoding="utf-8")

    with run.metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step}) + "\n")
    if adapter:
        write_folder(run.adapter, write("weights"), replace=True)
    write_folder(run.checkpoint(step), write("state"))


@pytest.fixture
def machine(tmp_path):
    """A fresh machine with the same drive: (the run folder, its mirror, what it reported)."""

    def make(name="a", config=CONFIG, opened=True):
        run = RunFolder(tmp_path / name / "runs" / "one")
        run.prepare()
        reports = []
        mirror = Mirror(run, tmp_path / "drive", reports.append)
        if opened:
            mirror.open(config)
            run.write_config("model:\n  rank: 8\nsave_every_steps: 5\n")
            mirror.start()
        return run, mirror, reports

    return make


@pytest.fixture
def drive(tmp_path):
    return RunFolder(tmp_path / "drive" / "one")


def wait_for(holds):
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert holds()


def test_each_save_is_copied_and_two_are_kept(machine, drive):
    run, mirror, reports = machine()
    for step in (5, 10, 15):
        save(run, step)
        mirror.push()
        wait_for(drive.checkpoint(step).is_dir)
    for part in ("training", "held-out"):
        (run.path / part).mkdir()
        (run.path / part / "events.out.tfevents.1").write_bytes(part.encode())
    run.report.write_text("<html>", encoding="utf-8")
    run.decisions.write_text("{}", encoding="utf-8")
    run.rows.write_text("{}", encoding="utf-8")
    run.finished_mark.write_text('{"step": 15, "steps": 15}', encoding="utf-8")
    mirror.close()
    assert drive.saved_steps() == [10, 15]
    for folder in (drive.adapter, drive.checkpoint(10), drive.checkpoint(15)):
        verify_folder(folder)
    assert (drive.adapter / "weights").read_text() == "weights of 15"
    events = ("training/events.out.tfevents.1", "held-out/events.out.tfevents.1")
    for name in (
        "config.yaml",
        "rows.json",
        "metrics.jsonl",
        "report.html",
        "decisions.json",
        "finished.json",
        *events,
    ):
        assert (drive.path / name).read_bytes() == (run.path / name).read_bytes()
    assert {path.name for path in drive.path.iterdir()} == {
        *(".mirror", "adapter", "checkpoints", "config.yaml", "decisions.json", "finished.json", "held-out"),
        *("metrics.jsonl", "report.html", "rows.json", "training"),
    }  # fmt: skip
    assert reports == []


def test_samples_are_copied_and_the_event_files_are_those_of_the_run_as_it_is(machine, drive):
    run, mirror, _ = machine()
    save(run, 5)
    (run.path / "training").mkdir()
    for name in ("samples.jsonl", "others.jsonl", "training/events.out.tfevents.1"):
        (run.path / name).write_bytes(b"a")
    mirror.push()
    wait_for(drive.checkpoint(5).is_dir)
    (run.path / "training" / "events.out.tfevents.1").rename(run.path / "training" / "events.out.tfevents.2")
    mirror.close()
    names = {path.name for path in drive.path.glob("*.*") if path.is_file()} - {".mirror", "config.yaml"}
    assert names == {"metrics.jsonl", "samples.jsonl", "others.jsonl"}
    assert [path.name for path in drive.path.glob("*/events*")] == ["events.out.tfevents.2"]


def test_a_fresh_machine_gets_all_of_it_back(machine, drive, capsys):
    run, mirror, _ = machine()
    run.rows.write_text("{}", encoding="utf-8")
    for step in (5, 10):
        save(run, step)
    mirror.close()
    other, _, reports = machine("b")
    assert capsys.readouterr().out == f"   run  restored from {drive.checkpoint(10)}\n"
    assert other.last_checkpoint() == (other.checkpoint(10), [])
    verify_folder(other.adapter)
    assert other.metrics.read_bytes() == run.metrics.read_bytes()
    assert other.config.read_bytes() == run.config.read_bytes()
    assert other.rows.read_bytes() == b"{}"
    assert reports == []


def test_damaged_checkpoints_are_skipped_with_a_warning(machine, drive, capsys, expect_error):
    run, mirror, _ = machine()
    for step in (5, 10):
        save(run, step)
        mirror.push()
        wait_for(drive.checkpoint(step).is_dir)
    mirror.close()
    (drive.checkpoint(10) / "state").write_text("state of 11", encoding="utf-8")
    (drive.adapter / "weights").write_text("bitrot", encoding="utf-8")
    other, _, _ = machine("b")
    assert other.saved_steps() == [5]
    assert not other.adapter.exists()
    skipped, adapter = capsys.readouterr().err.splitlines()
    assert skipped.startswith(f"warning: mirror: {drive.checkpoint(10)}: 'state': expected sha256=")
    assert skipped.endswith("; falling back to the previous checkpoint")
    assert adapter.endswith("; continuing without the best adapter so far")
    (drive.checkpoint(5) / "state").unlink()
    expect_error(lambda: machine("c"), drive.checkpoints, "no checkpoint", "--mirror", option="mirror")


def test_both_empty_is_a_new_run_and_a_failed_start_leaves_nothing(machine, drive):
    run, mirror, _ = machine()
    assert run.saved_steps() == []
    mirror.close()
    assert not drive.path.exists()


def test_the_newer_of_the_two_is_taken(machine, drive, capsys):
    run, mirror, _ = machine()
    save(run, 5)
    mirror.close()
    save(run, 10)  # killed before it was copied
    Mirror(run, drive.path.parent, print).open(CONFIG)
    assert capsys.readouterr().out == ""
    assert run.last_checkpoint()[0] == run.checkpoint(10)
    other, mirror, _ = machine("b")
    for step in (11, 15):
        save(other, step)
    mirror.close()
    Mirror(run, drive.path.parent, print).open(CONFIG)  # back on the first machine
    assert run.last_checkpoint()[0] == run.checkpoint(15)
    assert (run.adapter / "weights").read_text() == "weights of 15"
    assert run.metrics.read_bytes() == other.metrics.read_bytes()


def test_a_damaged_checkpoint_here_is_replaced_by_the_whole_one_there(machine, drive):
    run, mirror, _ = machine()
    save(run, 5)
    mirror.close()
    (run.checkpoint(5) / "state").write_text("bitrot", encoding="utf-8")
    Mirror(run, drive.path.parent, print).open(CONFIG)
    verify_folder(run.checkpoint(5))


def test_the_mirror_of_another_run_is_refused(machine, drive, expect_error):
    run, mirror, _ = machine()
    save(run, 5)
    mirror.close()
    before = sorted(path.name for path in drive.path.iterdir())
    expect_error(
        lambda: machine("b", {"model": {"rank": 16}, "save_every_steps": 9}),
        drive.path,
        "model.rank: 8 -> 16",
        "--mirror",
        option="mirror",
    )
    assert sorted(path.name for path in drive.path.iterdir()) == before
    machine("c", {"model": {"rank": 8}, "save_every_steps": 9})


def test_a_drive_that_is_not_mounted_is_refused(tmp_path, expect_error):
    run = RunFolder(tmp_path / "one")
    expect_error(
        lambda: Mirror(run, tmp_path / "drive" / "MyDrive", print).open(CONFIG),
        tmp_path / "drive",
        "no folder",
        "mount the drive",
        option="mirror",
    )
    assert not (tmp_path / "drive").exists()
    run.prepare()
    with pytest.raises(UserError, match="is in the run's own folder; "):
        Mirror(run, tmp_path, print).open(CONFIG)
    (tmp_path / "file").touch()
    expect_error(
        lambda: Mirror(run, tmp_path / "file", print).open(CONFIG),
        tmp_path / "file",
        "is a file",
        "give a folder",
        option="mirror",
    )


def refused(folder):
    run = RunFolder(folder.parent / "elsewhere" / "one")
    with pytest.raises(UserError) as caught:
        Mirror(run, folder, print).open(CONFIG)
    return str(caught.value)


@pytest.mark.parametrize("below", ["a", "a/b", "a/b/c"])
def test_nothing_is_made_below_the_empty_place_of_a_drive(tmp_path, below):
    place = tmp_path / "usb"
    place.mkdir()
    folder = place / below
    lacks = f"{folder.parent} is empty" if below == "a" else f"there is no folder {folder.parent}"
    assert refused(folder).startswith(f"mirror: {lacks}; mount the drive")
    (tmp_path / "link").symlink_to(folder)
    assert refused(tmp_path / "link").startswith("mirror: ")
    assert not any(place.iterdir())
    folder.mkdir(parents=True)  # then it is meant
    Mirror(RunFolder(tmp_path / "run" / "one"), folder, print).open(CONFIG)


def test_an_empty_drive_that_is_mounted_is_written_to(tmp_path, monkeypatch):
    (tmp_path / "usb").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "usb")
    Mirror(RunFolder(tmp_path / "run" / "one"), tmp_path / "usb" / "a", print).open(CONFIG)
    assert (tmp_path / "usb" / "a" / "one").is_dir()


def test_the_empty_drive_of_a_new_account_is_written_to(tmp_path, monkeypatch):
    (tmp_path / "content" / "MyDrive").mkdir(parents=True)
    monkeypatch.setattr(mirror_module, "COLAB_DRIVE", tmp_path / "content")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "content")
    Mirror(RunFolder(tmp_path / "run" / "one"), tmp_path / "content" / "MyDrive" / "a", print).open(CONFIG)
    assert (tmp_path / "content" / "MyDrive" / "a" / "one").is_dir()


@pytest.mark.parametrize("below", [".", "MyDrive", "MyDrive/a"])
def test_below_a_known_place_of_a_drive_one_must_be_mounted(tmp_path, monkeypatch, below):
    """Whatever lies there on the disk below: a copy that was made while none was mounted is no copy on the drive."""
    fstab, listed, colab = tmp_path / "fstab", tmp_path / "the drive", tmp_path / "content"
    fstab.write_text(f"# a comment\n/dev/sda1 / ext4\n\nnone none swap\n/dev/sdb1\t{tmp_path}/the\\040drive ext4 0 2\n")
    monkeypatch.setattr(mirror_module, "FSTAB", fstab)
    monkeypatch.setattr(mirror_module, "COLAB_DRIVE", colab)
    for point in (listed, colab):
        (point / "MyDrive" / "a").mkdir(parents=True)
        check_line(refused(point / below), "nothing is mounted", point, "mount the drive", begins="mirror: ")
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    Mirror(RunFolder(tmp_path / "run" / "one"), listed / below, print).open(CONFIG)


def test_a_failure_is_reported_and_tried_again_and_harms_nothing(machine, drive, monkeypatch):
    run, mirror, reports = machine()
    real = shutil.copyfile

    def full(source, target):
        if str(drive.path) in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(source, target)

    save(run, 5)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        mirror.push()
        wait_for(lambda: reports)
    (line,) = reports
    assert line.startswith(f"warning: mirror: {drive.adapter} could not be saved: No space left on device (0.0 MB need")
    assert line.endswith(" MB free); tried again with the next save")
    assert drive.saved_steps() == []
    save(run, 10)
    mirror.close()
    assert drive.saved_steps() == [10]
    assert len(reports) == 1
    verify_folder(run.checkpoint(5))


def test_a_drive_that_goes_away_is_reported_and_copied_to_again_once_it_is_back(machine, drive, tmp_path):
    run, mirror, reports = machine(opened=False)
    mirror.open(CONFIG)
    save(run, 5)
    mirror._copy_newest()
    mirror.start()
    (tmp_path / "drive").rename(tmp_path / "elsewhere")
    (tmp_path / "drive").mkdir()  # what a mount hides
    save(run, 10)
    mirror.push()
    wait_for(lambda: reports)
    start = f"warning: mirror: {drive.path} could not be saved: the folder that was opened is gone; is the drive still "
    assert reports[0].startswith(start) and reports[0].endswith("; tried again with the next save")
    assert list((tmp_path / "drive").iterdir()) == []
    Mirror(run, tmp_path / "drive", print).copy.prepare()  # as an earlier start could have left it there
    save(run, 15)
    mirror.push()
    wait_for(lambda: len(reports) == 2)
    assert drive.saved_steps() == []
    shutil.rmtree(tmp_path / "drive")
    (tmp_path / "elsewhere").rename(tmp_path / "drive")
    mirror.close()
    assert drive.saved_steps() == [5, 15]
    assert len(reports) == 2


def test_a_drive_that_goes_away_in_the_middle_of_a_copy_leaves_nothing_below_it(machine, drive, tmp_path, monkeypatch):
    """Not even a folder: a drive is mounted on empty ones only. What it has of the copy goes with the next."""
    run, mirror, reports = machine(opened=False)
    mirror.open(CONFIG)
    save(run, 5)
    mirror._copy_newest()
    save(run, 10)
    real, cut = folders.sync_file, []

    def unmount(file):
        real(file)
        if not cut and "step-00000010" in str(file):
            cut.append(file)
            (tmp_path / "drive").rename(tmp_path / "elsewhere")
            (tmp_path / "drive").mkdir()

    monkeypatch.setattr(folders, "sync_file", unmount)
    mirror.start()
    mirror.push()
    wait_for(lambda: reports)
    assert reports[0].startswith(
        f"warning: mirror: {drive.checkpoint(10)} could not be saved: No such file or directory ("
    )
    assert list((tmp_path / "drive").iterdir()) == []
    (tmp_path / "drive").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / "drive")
    assert [path.name.split("-")[1] for path in drive.checkpoints.glob(".*")] == ["00000010.tmp"]
    mirror.close()
    assert sorted(path.name for path in drive.checkpoints.iterdir()) == ["step-00000005", "step-00000010"]
    verify_folder(drive.checkpoint(10))
    assert len(reports) == 1


def test_what_was_just_copied_and_the_last_whole_one_stay_whatever_is_damaged(machine, drive):
    run, mirror, reports = machine(opened=False)
    mirror.open(CONFIG)
    for step in (5, 10, 15):
        save(run, step)
        mirror._copy_newest()
    assert drive.saved_steps() == [10, 15]
    (drive.checkpoint(15) / "state").write_text("bitrot", encoding="utf-8")
    drive.checkpoint(99).mkdir()  # the beginning of a copy, by another tool
    shutil.rmtree(run.checkpoint(15))  # this machine has gone back to before it
    shutil.rmtree(run.checkpoint(10))
    mirror = Mirror(run, drive.path.parent, reports.append)
    mirror.open(CONFIG)  # 10 comes back from there
    save(run, 12)
    mirror._copy_newest()
    assert drive.saved_steps() == [10, 12, 15, 99]
    save(run, 15)  # the same again, bit for bit, over the damaged one
    mirror._copy_newest()
    verify_folder(drive.checkpoint(15))
    assert drive.saved_steps() == [12, 15, 99]


def test_a_damaged_copy_stays_while_only_one_is_known_to_be_whole(machine, drive):
    """The disk may read the other wrongly this once, and a single copy is no reserve."""
    run, mirror, reports = machine(opened=False)
    mirror.open(CONFIG)
    save(run, 5)
    mirror._copy_newest()
    (drive.checkpoint(5) / "state").write_text("bitrot", encoding="utf-8")
    mirror = Mirror(run, drive.path.parent, reports.append)
    mirror.open(CONFIG)
    save(run, 10)
    mirror._copy_newest()
    assert drive.saved_steps() == [5, 10]
    save(run, 15)
    mirror._copy_newest()
    assert drive.saved_steps() == [10, 15]


def test_a_finished_run_that_the_mirror_lacks_is_completed(machine, drive, monkeypatch, capsys):
    run, mirror, reports = machine()
    save(run, 5)
    run.finished_mark.write_text('{"step": 5, "steps": 5}', encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        mirror.close()
        assert len(reports) == 2 and not drive.finished_mark.exists()
        late = Mirror(run, drive.path.parent, print)
        late.open(CONFIG)
        with pytest.raises(files.SaveError, match=f"{drive.adapter} could not be saved: full"):
            late.complete()
        assert not drive.finished_mark.exists()
    capsys.readouterr()
    late.complete()
    assert capsys.readouterr().out == f"   run  copied to {drive.path}: the mirror was incomplete\n"
    assert drive.finished_mark.is_file() and drive.saved_steps() == [5]
    again = Mirror(run, drive.path.parent, print)
    again.open(CONFIG)
    again.complete()
    assert capsys.readouterr().out == ""


def test_a_drive_that_became_full_keeps_nobody_from_a_start(machine, drive, monkeypatch):
    run, mirror, _ = machine()
    save(run, 5)
    mirror.close()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    Mirror(run, drive.path.parent, print).open(CONFIG)
    new = drive.path.parent / "new"
    with pytest.raises(UserError, match=r"can't be written: .* could not be saved: full"):
        Mirror(run, new, print).open(CONFIG)
    assert list(new.iterdir()) == []
    shutil.rmtree(run.path)
    monkeypatch.undo()
    real = Path.touch

    def touch(path, *args):
        if path.is_relative_to(drive.path.parent):
            raise OSError(errno.ENOSPC, "full")
        real(path, *args)

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(UserError, match=r"mirror: .* can't be written \(full\); give another folder with --mirror"):
        Mirror(run, new, print).open(CONFIG)
    run.prepare()
    reports = []
    Mirror(run, drive.path.parent, reports.append).open(CONFIG)
    (line,) = reports
    check_line(line, "(full)", "--mirror", "tried again", begins=f"warning: mirror: {drive.path} can't be written ")
    assert run.saved_steps() == [5]  # and it is still read from


def test_at_the_end_a_failure_is_reported_once_more(machine, drive, monkeypatch):
    run, mirror, reports = machine()
    save(run, 5)
    monkeypatch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(RuntimeError("transport endpoint")))
    mirror.close()
    first, last = reports
    check_line(first, "transport endpoint", "tried again", begins=f"warning: mirror: {drive.path}: ")
    check_line(last, "last state", run.path, begins=f"warning: mirror: {drive.path} ")


def test_a_slow_drive_delays_neither_a_save_nor_the_end(machine, drive, monkeypatch):
    run, mirror, reports = machine()
    real, goes_on = shutil.copyfile, threading.Event()

    def slow(source, target):
        if "step-" in str(target):
            is_waiting.set()
            goes_on.wait(60)
        return real(source, target)

    is_waiting = threading.Event()
    monkeypatch.setattr(shutil, "copyfile", slow)
    save(run, 1)
    mirror.push()
    assert is_waiting.wait(30)
    started = time.monotonic()
    for step in range(5, 30, 5):  # the run removes what is being copied
        save(run, step)
        mirror.push()
        for old in run.saved_steps()[:-2]:
            folders.remove_folder(run.checkpoint(old))
    mirror.close(limit_s=0.1)
    assert time.monotonic() - started < 30  # for the copy that stands still it would be 60
    first, last = reports
    check_line(first, drive.path, "Ctrl-C")
    check_line(last, "0 s", "the last state is not there", begins=f"warning: mirror: {drive.path} ")
    goes_on.set()
    wait_for(lambda: not mirror._thread.is_alive())
    assert drive.saved_steps() == [25]
    verify_folder(drive.checkpoint(25))
    assert len(reports) == 2


def test_a_file_system_that_knows_only_plain_files(machine, drive, monkeypatch):
    """Neither modes, nor links, nor locks, nor a sync of folders, as a mounted drive."""

    def unknown(*_, **__):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    real_open, real_fsync = os.open, os.fsync

    def open_(path, flags, *args, **kwargs):
        if Path(os.fsdecode(path)).is_dir():
            unknown()
        return real_open(path, flags, *args, **kwargs)

    for owner, name in ((os, "chmod"), (Path, "chmod"), (os, "link"), (os, "symlink"), (Path, "symlink_to")):
        monkeypatch.setattr(owner, name, unknown)
    monkeypatch.setattr(files.os, "open", open_)
    run, mirror, reports = machine()
    save(run, 5)
    mirror.close()
    assert reports == []
    other, _, _ = machine("b")
    assert other.last_checkpoint() == (other.checkpoint(5), [])
    monkeypatch.setattr(files.os, "open", real_open)
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: unknown() if stat.S_ISDIR(os.fstat(descriptor).st_mode) else real_fsync(descriptor),
    )
    save(run, 10)


class Killed(BaseException):
    """Stands for a kill: nothing but a test may catch it."""


def test_a_copy_that_is_cut_off_anywhere_can_be_resumed_from(machine, drive, monkeypatch):
    """After each cut, a fresh machine finds a checkpoint with an adapter and figures no older than it."""
    run, mirror, _ = machine(opened=False)
    mirror.open(CONFIG)
    save(run, 5)
    mirror._copy_newest()
    save(run, 10)
    pristine = drive.path.with_name("pristine")
    shutil.copytree(drive.path, pristine)
    for at in range(1, 100):
        calls = [0]

        def cut(real, calls=calls, at=at):
            def call(*args, **kwargs):
                calls[0] += 1
                if calls[0] >= at:
                    raise Killed
                return real(*args, **kwargs)

            return call

        mirror._copied = {}
        with monkeypatch.context() as patch:
            for owner, name in (
                (os, "rename"),
                (os, "replace"),
                (os, "fsync"),
                (shutil, "copyfile"),
                (shutil, "rmtree"),
            ):
                patch.setattr(owner, name, cut(getattr(owner, name)))
            try:
                mirror._copy_newest()
            except Killed:
                pass
            else:
                break
        other, _, _ = machine(f"after-{at}")
        checkpoint, _ = other.last_checkpoint()
        step = int(checkpoint.name[-2:])
        assert step in (5, 10)
        assert int((other.adapter / "weights").read_text().rpartition(" ")[2]) >= step
        verify_folder(other.adapter)
        assert json.loads(other.metrics.read_text().splitlines()[-1])["step"] >= step
        shutil.rmtree(drive.path)
        shutil.copytree(pristine, drive.path)
    assert at > 12
    assert drive.saved_steps() == [5, 10]


def test_a_restore_that_is_cut_off_is_begun_anew(machine, drive, monkeypatch):
    run, mirror, _ = machine()
    save(run, 5)
    mirror.close()
    for at in range(1, 100):
        calls = [0]
        real = os.fsync

        def cut(descriptor, calls=calls, at=at, real=real):
            calls[0] += 1
            if calls[0] >= at:
                raise Killed
            real(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", cut)
            try:
                machine(f"b{at}", opened=False)[1].open(CONFIG)
            except Killed:
                pass
            else:
                break
        other, _, _ = machine(f"b{at}")
        assert other.last_checkpoint() == (other.checkpoint(5), [])
        verify_folder(other.adapter)
        assert other.metrics.read_bytes() == run.metrics.read_bytes()
    assert at > 5
