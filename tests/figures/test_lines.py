"""A file of lines is cut back to what a checkpoint counted on, whatever stands in it, and is never read before."""

import errno
import json
import os

import pytest

from lit_qlora.figures import lines
from lit_qlora.figures.lines import StepLines, read_lines
from lit_qlora.storage.files import SaveError
from tests.expect import check_line


def lines_of(*steps):
    return "".join(f'{{"step": {step}, "a": {step}}}\n' for step in steps)


def steps(path):
    return [line["step"] for line in read_lines(path)]


def resumed(path, counted_on, **unwritten):
    file = StepLines(path)
    file.go_back({"counted_on": counted_on, "unwritten": unwritten})
    return file


@pytest.mark.parametrize("content", ["", '{"step"', '{"step": 1}'])
def test_a_file_without_a_whole_line_is_empty(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content, encoding="utf-8")
    assert [*read_lines(path)] == []
    file = StepLines(path)
    file.go_back(None)
    file.add(0, {"a": 1})
    assert path.read_text(encoding="utf-8") == '{"step": 0, "a": 1}\n'


def test_without_a_checkpoint_all_lines_are_of_an_earlier_start(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines_of(0, 1, 5))
    StepLines(path).go_back(None)
    assert path.read_bytes() == b""
    assert capsys.readouterr().out == f"   run  {path}: 3 lines after step 0 replaced\n"
    path.write_text(lines_of(0))
    StepLines(path).go_back(None)
    assert capsys.readouterr().out == f"   run  {path}: 1 line after step 0 replaced\n"


def test_lines_after_the_checkpoint_are_removed_and_those_that_it_held_restored(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines_of(0, 3, 5, 7, 9) + '{"step": 1')
    file = StepLines(path)
    file.go_back({"counted_on": 3, "unwritten": {4: lines_of(4)}})
    assert path.read_text() == lines_of(0, 3, 4)
    assert file.state_dict() == {"counted_on": 4, "unwritten": {}}
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (f"   run  {path}: 3 lines after step 3 replaced\n", "")


def test_nothing_is_touched_before_it_is_known_where_to_go_back_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines_of(0, 1) + "torn")
    StepLines(path)
    StepLines(tmp_path / "none.jsonl").go_back(None)
    assert path.read_text() == lines_of(0, 1) + "torn"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_damaged_lines_are_left_out_with_a_warning_and_once(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    content = [json.dumps({"step": step, "a": step}) for step in range(8)]
    content[1], content[3], content[6] = "\0" * 9, content[3][:4] + "\0\0", "[6]"
    path.write_text("".join(f"{line}\n" for line in content))
    assert steps(path) == [0, 2, 4, 5, 7]
    resumed(path, 5)
    assert steps(path) == [0, 2, 4, 5]
    check_line(capsys.readouterr().err, "(2, from line 2 on)", "left out", begins=f"warning: {path}: ")
    resumed(path, 5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("doubled", [lines_of(0, 1, 1, 2), lines_of(0, 1, 0, 2)])
def test_a_step_that_stands_twice_is_damage(tmp_path, capsys, doubled):
    path = tmp_path / "metrics.jsonl"
    path.write_text(doubled)
    resumed(path, 2)
    assert steps(path) == [0, 1, 2]
    assert "damaged lines (1, from line 3 on)" in capsys.readouterr().err


LOST = "its lines of the steps {} to 7, which the checkpoint relies on, are lost"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda whole: whole, []),
        (lambda whole: whole + b'{"st', []),  # after the checkpoint: written anew
        (lambda whole: whole[:-9] + bytes(9), [LOST.format(6)]),
        (lambda whole: whole[:22], [LOST.format(1)]),
        (lambda whole: b"", [LOST.format(0)]),
    ],
)  # fmt: skip
def test_an_end_that_was_cut_off_or_zeroed_is_reported_with_the_steps_that_are_lost(tmp_path, capsys, damage, expected):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(damage(lines_of(0, 3, 5, 7).encode()))
    file = resumed(path, 7)
    assert capsys.readouterr().err.splitlines() == [f"warning: {path}: {line}" for line in expected]
    file.add(9, {"b": 1})
    assert [*read_lines(path)][-1] == {"step": 9, "b": 1}


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_cut_needs_no_room(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines_of(0, 1, 2))
    monkeypatch.setattr(lines, "write_file", full)
    resumed(path, 1)
    assert steps(path) == [0, 1]


@pytest.mark.parametrize("broken", ["os.truncate", "lit_qlora.figures.lines.write_file"])
def test_a_file_that_cannot_be_changed_is_one_error_and_as_it_was(tmp_path, monkeypatch, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines_of(0, 1, 2) if broken == "os.truncate" else "damage\n" + lines_of(0, 1, 2))
    before = path.read_bytes()
    monkeypatch.setattr(broken, full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        resumed(path, 1)
    assert isinstance(caught.value, SaveError) or "write_file" in broken
    assert path.read_bytes() == before


def test_a_file_that_could_not_even_be_begun_is_begun_later(tmp_path, capsys):
    (tmp_path / "run").touch()
    file = StepLines(tmp_path / "run" / "metrics.jsonl")
    file.add(1, {"a": 1})
    file.add(2, {"a": 2})
    assert file.problem and capsys.readouterr().err.count("error: ") == 1
    (tmp_path / "run").unlink()
    file.add(3, {"a": 3})
    assert steps(file.path) == [1, 2, 3] and file.problem is None


def test_lines_are_on_the_disk_before_a_checkpoint_is_and_synced_once(tmp_path, monkeypatch, capsys):
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.fstat(number).st_size), real(number)))
    file = StepLines(tmp_path / "metrics.jsonl")
    file.sync()
    assert synced == []
    file.add(2, {"a": 2})
    file.sync()
    file.sync()
    assert synced == [file.path.stat().st_size]
    file.add(3, {"a": 3})

    def broken(number):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    file.sync()
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/metrics.jsonl can't be written: Input/output error;")
