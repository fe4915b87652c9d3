"""The layout of a run folder, the choice of its newest whole checkpoint, and its configs."""

import errno
import json
import os
import re
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from lit_qlora.errors import UserError
from lit_qlora.storage.files import SaveError
from lit_qlora.storage.folders import remove_folder, verify_folder, write_folder
from lit_qlora.storage.run import RunFolder, newest_run, open_run, run_path
from tests.expect import check_line


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "runs" / "one")
    run.prepare()
    return run


def save(run, *steps):
    for step in steps:
        write_folder(run.checkpoint(step), lambda folder: (folder / "state.json").write_text("{}", encoding="utf-8"))


def test_the_layout_is_what_the_outside_leans_on():
    run = RunFolder(Path("runs/one"))
    assert run.config == Path("runs/one/config.yaml")
    assert run.metrics == Path("runs/one/metrics.jsonl")
    assert run.adapter == Path("runs/one/adapter")
    assert run.checkpoint(500) == Path("runs/one/checkpoints/step-00000500")
    assert run.finished_mark == Path("runs/one/finished.json")
    assert run.rows == Path("runs/one/rows.json")


@pytest.mark.parametrize("name", [".", "..", "nowhere/../..", "~", "~/..", "/"])
def test_a_run_is_not_begun_in_the_current_folder_the_home_or_what_holds_them(
    name, tmp_path, monkeypatch, expect_error
):
    for one in ("here", "home"):
        (tmp_path / one).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    expect_error(RunFolder(run_path(name)).check_place, "current folder or the home", "--run NAME", option="run")
    RunFolder(run_path("../beside")).check_place()
    assert run_path("nowhere/../../beside") == tmp_path / "beside"  # mkdir would make nowhere, too
    begun = RunFolder(tmp_path / "here")
    save(begun, 5)
    RunFolder(run_path(".")).check_place()


def test_only_a_folder_that_is_not_there_yet_has_to_be_made(tmp_path, monkeypatch, expect_error):
    """A run may be there already where no other can be made beside it."""

    def fail(**options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("lit_qlora.storage.run.TemporaryDirectory", fail)
    RunFolder(tmp_path).check_writable()
    missing = RunFolder(tmp_path / "a" / "b")
    expect_error(missing.check_writable, f"{missing.path} can't be written (Read-only", option="run")


def test_steps_are_sorted_by_number_not_by_date(run):
    save(run, 900, 1000, 20, 123456789)
    os.utime(run.checkpoint(20), (2**31, 2**31))
    assert run.saved_steps() == [20, 900, 1000, 123456789]
    assert run.last_checkpoint() == (run.checkpoint(123456789), [])


def test_what_is_no_checkpoint_is_not_counted(run):
    save(run, 5)
    for name in (".step-00000006.tmp-1-00000000", "step-", "step-best", "step-²", "other", ".DS_Store"):
        (run.checkpoints / name).mkdir()
    assert run.saved_steps() == [5]
    assert RunFolder(run.path / "nowhere").saved_steps() == []


def test_a_damaged_checkpoint_is_passed_over_and_reported(run):
    save(run, 5, 10, 15, 20)
    (run.checkpoint(20) / "manifest.json").unlink()
    (run.checkpoint(15) / "state.json").write_text("[]", encoding="utf-8")
    found, problems = run.last_checkpoint()
    assert found == run.checkpoint(10)
    assert [problem.partition(": expected")[0] for problem in problems] == [
        f"{run.checkpoint(20)}: 'manifest.json'",
        f"{run.checkpoint(15)}: 'state.json'",
    ]


def test_none_may_be_whole_or_there_at_all(run):
    assert run.last_checkpoint() == (None, [])
    save(run, 5)
    (run.checkpoint(5) / "state.json").unlink()
    found, problems = run.last_checkpoint()
    assert (found, len(problems)) == (None, 1)


def damage(run, *steps):
    for step in steps:
        (run.checkpoint(step) / "state.json").write_text("[]", encoding="utf-8")


@pytest.mark.parametrize(
    ("saved", "damaged", "newest", "keep", "outdated"),
    [
        ([2, 4, 6], [], 6, 2, [2]),
        ([2, 4], [], 4, 2, []),
        ([4], [], 4, 2, []),
        ([8, 10, 11, 12, 14], [12, 14], 11, 2, [8, 12, 14]),  # resumed from 10: later ones no longer count
        ([6, 7, 8, 10], [8, 10], 7, 2, [8, 10]),
        ([6, 7, 8, 10], [8, 10], 7, 3, []),  # too few whole ones to throw anything away
        ([8, 10, 11, 12, 13], [12], 13, 2, [8, 10, 12]),
        ([5, 10, 15], [10], 15, 2, [10]),
        ([5, 10, 15, 20], [], 10, 2, []),  # whole and above: none of ours to judge
    ],
)
def test_what_was_just_saved_stays_and_damaged_ones_do_not_count(run, saved, damaged, newest, keep, outdated):
    save(run, *saved)
    damage(run, *damaged)
    assert run.outdated_steps(keep, newest) == outdated


def test_a_whole_checkpoint_is_looked_at_once_and_one_that_was_written_anew_is_whole(run):
    save(run, 5, 10, 15)
    damage(run, 10)
    looked_at = []
    check = lambda folder: (looked_at.append(folder.name), verify_folder(folder))  # noqa: E731
    assert run.outdated_steps(2, 15, check) == [10]
    assert run.outdated_steps(2, 15, check) == [10]
    assert looked_at == ["step-00000010", "step-00000005", "step-00000010"]
    remove_folder(run.checkpoint(10))
    save(run, 10)
    assert run.outdated_steps(2, 10, check) == []


def test_a_file_that_another_program_left_makes_no_checkpoint_worthless(run):
    save(run, 5)
    (run.checkpoint(5) / "desktop.ini").write_text("[.ShellClassInfo]", encoding="utf-8")
    assert run.last_checkpoint() == (run.checkpoint(5), [])


def test_configs_are_kept_beside_each_other_and_never_overwritten(run):
    assert run.write_config("a: 1\n") == run.config
    assert run.write_config("a: 1\n") == run.config
    assert run.write_config("a: 2\n") == run.path / "config.2.yaml"
    assert run.write_config("a: 3\n") == run.path / "config.3.yaml"
    assert run.write_config("a: 2\n") == run.path / "config.2.yaml"
    assert run.write_config("a: 1.0\n") == run.config  # the same value, as a parser reads a float back
    assert sorted(path.name for path in run.path.glob("config*")) == ["config.2.yaml", "config.3.yaml", "config.yaml"]
    assert re.fullmatch(r"# started \S+\na: 1\n", run.config.read_text(encoding="utf-8"))
    assert run.read_config() == {"a": 1}


def test_a_config_is_whole_or_not_there(run, monkeypatch):
    def cut_off(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SaveError, match="No space left on device"):
        patch.setattr(os, "fsync", cut_off)
        run.write_config("a: 1\n")
    assert not run.config.exists()
    assert run.write_config("a: 1\n") == run.config
    assert run.read_config() == {"a": 1}
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "config.yaml"]


def test_prepare_puts_right_what_a_kill_left(run):
    save(run, 5)
    (run.checkpoints / ".step-00000006.tmp-1-00000000").mkdir()
    write_folder(run.adapter, lambda folder: (folder / "weights").write_text("w", encoding="utf-8"))
    run.adapter.rename(run.path / ".adapter.old-1-00000000")  # killed between the two renames
    RunFolder(run.path).prepare()
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000005"]
    assert (run.adapter / "weights").read_text(encoding="utf-8") == "w"
    assert sorted(path.name for path in run.path.iterdir()) == ["adapter", "checkpoints"]


def test_a_place_that_cannot_be_written_is_reported(tmp_path, monkeypatch, expect_error):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)  # tests may run as root, who may write everywhere
    expect_error(
        lambda: RunFolder(tmp_path / "one").prepare(),
        tmp_path / "one",
        "Permission denied",
        "--run",
        option="run",
    )


def test_a_file_in_the_way_is_reported(tmp_path, expect_error):
    (tmp_path / "one").touch()
    expect_error(
        lambda: RunFolder(tmp_path / "one").prepare(),
        tmp_path / "one",
        "Not a directory",
        "--run",
        option="run",
    )


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "others.jsonl", ".lock", "held-out"])
def test_files_that_would_be_written_elsewhere_are_refused(run, tmp_path, name):
    """A folder unpacked from somebody's archive may hold such links: a start cuts figures, and empties the lock's
    file."""
    file = run.path / name
    run.checkpoint(1).mkdir(parents=True)
    file.unlink(missing_ok=True)
    other = tmp_path / "elsewhere.txt"
    other.write_text("of another program")
    file.symlink_to(other)
    with pytest.raises(UserError, match=rf"^run: .*{name} is a link"), ExitStack() as stack:
        run.open(stack)
    assert other.read_text() == "of another program"


def test_the_mark_shows_that_a_run_is_finished(run):
    assert run.finished() is None
    mark = {"step": 7, "steps": 10, "lengths": {"max_steps": 10, "max_epochs": -1, "early_stopping": None}}
    run.finished_mark.write_text(json.dumps(mark), encoding="utf-8")
    assert run.finished() == mark


@pytest.mark.parametrize("lengths", [None, 3, [], {}, {"max_steps": 10, "max_epochs": -1}, {"max_steps": "x"}, {
    "max_steps": None, "max_epochs": 3, "early_stopping": None,
}])  # fmt: skip
def test_a_mark_with_lengths_of_another_kind_is_damaged(run, lengths, capsys):
    run.finished_mark.write_text(json.dumps({"step": 7, "steps": 10, "lengths": lengths}), encoding="utf-8")
    assert run.finished() is None
    check_line(capsys.readouterr().err, "damaged", "completed once more", begins=f"warning: {run.finished_mark} ")


def test_a_run_has_begun_once_something_is_recorded_or_saved(tmp_path):
    def made(name):
        run = RunFolder(tmp_path / name)
        run.prepare()
        run.write_config("a: 1\n")
        run.rows.touch()
        return run

    runs = [made(name) for name in "abcd"]
    save(runs[1], 5)
    runs[2].metrics.touch()
    runs[3].adapter.mkdir()
    assert [run.has_begun() for run in runs] == [False, True, True, True]
    for run in runs:
        run.discard_unless_begun()
    assert [run.path.exists() for run in runs] == [False, True, True, True]
    assert all(run.config.is_file() for run in runs[1:])


def test_a_start_that_failed_removes_nothing_of_anybody_elses(tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    run = RunFolder(tmp_path)
    run.prepare()
    run.write_config("a: 1\n")
    (tmp_path / ".lock").touch()
    run.discard_unless_begun()
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", ".lock"}
    run.check_place()  # as of a logger of the user's: the same command begins anew


@pytest.mark.parametrize("number", range(8))
def test_a_disk_that_is_full_at_the_start_keeps_nothing(tmp_path, monkeypatch, number):
    """The first ``number`` files that a start makes still find room."""
    made = []

    def limited(name, real):
        def make(*args, **kwargs):
            if len(made) >= number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            result = real(*args, **kwargs)
            made.append(name)
            return result

        return make

    for module, name in ((os, "mkdir"), (Path, "touch"), (os, "write")):
        monkeypatch.setattr(module, name, limited(name, getattr(module, name)))
    plain, full = Path.open, limited("open", Path.open)
    monkeypatch.setattr(
        Path, "open", lambda self, *args, **kwargs: (full if self.name == ".lock" else plain)(self, *args, **kwargs)
    )
    run = RunFolder(tmp_path / "new" / "runs" / "mine")
    with ExitStack() as stack:
        if number < 7:
            with pytest.raises(UserError, match=r"can't be written \(No space left on device\); give another folder"):
                run.open(stack)
        else:
            run.open(stack)
    assert list(tmp_path.iterdir()) == []


def test_discarding_what_was_never_made_is_no_error(tmp_path):
    RunFolder(tmp_path / "never").discard_unless_begun()


def test_a_folder_that_another_start_removes_meanwhile_is_empty(run, monkeypatch):
    listed = Path.iterdir

    def removed(folder):
        shutil.rmtree(folder)
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", removed)
    assert run.saved_steps() == []
    assert run.path.is_dir() and run.is_empty()
    run.path.mkdir()
    run.check_place()
    assert not run.path.exists()


def test_a_folder_that_another_start_is_about_to_lock_may_be_used(tmp_path):
    run = RunFolder(tmp_path / "runs" / "new")
    run.prepare(take=run.check_place)
    assert run.checkpoints.is_dir()


def test_a_folder_that_another_start_locks_meanwhile_may_be_used(run, monkeypatch):
    listed = Path.iterdir

    def begun(folder):
        (run.path / ".lock").touch()
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", begun)
    assert run.is_empty()


def test_of_the_newest_runs_one_may_be_removed_meanwhile(tmp_path, monkeypatch, expect_error):
    monkeypatch.chdir(tmp_path)
    for name in ("old", "failed"):
        RunFolder(Path("runs") / name).prepare()
        RunFolder(Path("runs") / name).write_config("a: 1\n")
    read_text = Path.read_text

    def removed(file, **options):
        if file.parent.name == "failed":
            file.unlink()
        return read_text(file, **options)

    monkeypatch.setattr(Path, "read_text", removed)
    assert newest_run().path == Path("runs/old")
    RunFolder(Path("runs/failed")).write_config("a: 1\n")
    Path("runs/old/config.yaml").unlink()
    expect_error(newest_run, "runs/", "'python main.py fit'", "--run")


def test_the_newest_run_is_the_one_that_was_started_last_whatever_the_dates_of_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(["b", "c", "a"]):
        run = RunFolder(Path("runs") / name)
        run.prepare()
        os.utime(run.write_config("a: 1\n"), (10**9 - age, 10**9 - age))  # as a copy or a backup leaves them
    other = Path("runs/by-hand")
    other.mkdir()
    (other / "config.yaml").write_text("a: 1\n", encoding="utf-8")
    Path("runs/no-run").mkdir()
    assert newest_run().path == Path("runs/a")


def test_no_run_at_all_is_reported(tmp_path, monkeypatch, expect_error):
    monkeypatch.chdir(tmp_path)
    expect_error(newest_run, "runs/", "'python main.py fit'", "--run")
    Path("runs/no-run").mkdir(parents=True)
    expect_error(newest_run, "runs/", "'python main.py fit'", "--run")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mine", "runs/mine"),
        ("one.jsonl", "runs/one.jsonl"),
        ("./mine", "mine"),
        ("mine/", "mine"),
        ("runs/mine", "runs/mine"),
        ("../mine", "../mine"),
        ("/tmp/mine", "/tmp/mine"),
        (".", "."),
        ("..", ".."),
    ],
)
def test_a_bare_name_lies_in_runs_and_anything_with_a_slash_is_a_path(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_path(name) == Path(expected)


def test_a_run_of_that_name_in_the_current_folder_is_meant_while_runs_has_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_path("~/mine") == tmp_path / "mine"
    Path("mine").mkdir()
    assert run_path("mine") == Path("runs/mine")
    Path("mine/config.yaml").write_text("a: 1\n")
    assert run_path("mine") == Path("mine")
    Path("runs/mine").mkdir(parents=True)
    assert run_path("mine") == Path("runs/mine")


def test_only_a_run_folder_can_be_opened(run, tmp_path, expect_error):
    run.write_config("a: 1\n")
    assert open_run(str(run.path)).path == run.path
    for path in (tmp_path, tmp_path / "nowhere"):
        expect_error(partial(open_run, str(path)), path, "no config.yaml", option="run")
    for name in ("", "https://hub/a"):  # the newest run stands for no name alone
        expect_error(partial(open_run, name), name, "folder", option="run")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"step": null, "steps": 2}', '{"step": 1}', '{"step": 1, "steps": 1}', "\0\0"]
)
def test_a_damaged_mark_is_none_with_a_warning(run, capsys, text):
    run.finished_mark.write_text(text, encoding="utf-8")
    assert run.finished() is None
    check_line(capsys.readouterr().err, "damaged", "completed once more", begins=f"warning: {run.finished_mark} ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no 'option: value' lines"),
        (b"{]", "expected the node content, but found ']'"),
        (b"a: 1\n\0\0", "(unacceptable character #x0000)"),
        (b"\xff\xfe", "(it is not UTF-8 (byte 0))"),
        (b"[1]", "no 'option: value' lines"),
        (b"a: &a 1\nb: *a\n", "a value given by reference (& and *); write it out"),
        (b"a:\n  b: 1\na.b: 2\n", "a.b is given twice"),
        (b"a: 1\na.b: 2\n", "a is both a section and an option"),
        (b"a.b: 2\na: 1\n", "a is both a section and an option"),
        (b"a: " + 200_000 * b"[", "(it is nested too deeply)"),
        (b"a: !!bool x\n", "(it holds a number, a date or a tag that can't be one)"),
        (b"a: !!int x\n", "(it holds a number, a date or a tag that can't be one)"),
        (b"a: " + b"9" * 5000, "(it holds a number, a date or a tag that can't be one)"),
        (b'a: "\\UFFFFFFFF"\n', "(it holds a number, a date or a tag that can't be one)"),
        (b"a: 2020-13-01\n", "(it holds a number, a date or a tag that can't be one)"),
    ],
)
def test_a_damaged_config_is_reported_with_what_to_do(run, content, reason, expect_error):
    run.config.write_bytes(content)
    expect_error(run.read_config, run.config, reason, "put a copy of it back")
    assert run.write_config("a: 1\n").name == "config.2.yaml"


def test_a_run_s_name_with_a_slip_is_guessed(tmp_path):
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    with pytest.raises(UserError, match=r"no config.yaml; did you mean .*/mine\?$"):
        open_run(f"{tmp_path}/miine")
    with pytest.raises(UserError, match=r"no config.yaml; the runs there: mine, other$"):
        open_run(f"{tmp_path}/quite-another-word-than-those")
    with pytest.raises(UserError, match=r"no config.yaml; did you mean .*/mine\?$"):
        open_run(f"{tmp_path}/mine/nested")
    with pytest.raises(UserError, match=r"no config.yaml$"):
        open_run(f"{tmp_path}/none/nested")


@pytest.mark.parametrize(("there", "given"), [("a", "aa"), ("demo", "demo2"), ("run-1", "run1"), ("my-run", "myrun")])
def test_a_short_name_is_guessed_too(tmp_path, there, given):
    (tmp_path / there).mkdir()
    (tmp_path / there / "config.yaml").touch()
    with pytest.raises(UserError, match=rf"did you mean .*/{there}\?$"):
        open_run(f"{tmp_path}/{given}")


@pytest.mark.parametrize(
    "name", ["mine/", "./mine", "Mine", "runs/mine/adapter", "runs/mine/checkpoints/step-00000001"]
)
def test_what_is_no_run_is_answered_with_the_run_that_is_meant(tmp_path, monkeypatch, expect_error, name):
    """The name may be as a shell completes it, in another case, or of a folder in the run."""
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/config.yaml").touch()
    expect_error(lambda: open_run(name), "did you mean runs/mine?", option="run")


def test_a_run_that_lost_its_config_says_how_to_get_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/mine/checkpoints/step-00000004").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        open_run("mine")
    assert error.value.problem == "runs/mine is no run folder: it has no config.yaml"
    again = "put a copy of it back, or give fit all options (--config FILE --run runs/mine): the run resumes"
    assert error.value.remedy == f"{again}, for its checkpoints hold what identifies it"
    Path("runs/mine/checkpoints/step-00000004").rmdir()
    with pytest.raises(UserError) as error:
        open_run("mine")
    assert error.value.remedy is None
