"""Rows are encoded once and read from disk after that; what is not whole, or of other contents, is never taken."""

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest

from lit_qlora.batch import IGNORE_INDEX
from lit_qlora.data import cache
from lit_qlora.data.cache import encode_records
from lit_qlora.data.encode import Encoder
from lit_qlora.data.tokenizer import load_tokenizer
from lit_qlora.errors import UserError
from lit_qlora.storage.folders import write_folder
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.text.formats import make_format
from tests.data.talks import said
from tests.expect import check_line

TALKS = [said(f"question {index}", "word " * index + "end") for index in range(1, 8)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "lit_qlora"


@pytest.fixture
def no_encoding(monkeypatch):
    """A function after whose call any encoding fails."""

    def refuse():
        def fail(*_):
            pytest.fail("encoded again")

        monkeypatch.setattr(Encoder, "written", fail)
        monkeypatch.setattr(Encoder, "_encode", fail)

    return refuse


def contents(rows):
    return [(row["input_ids"], row["labels"]) for row in rows.examples]


def test_rows_are_the_encoders_in_their_order(tokenizer):
    encoder = Encoder(tokenizer, 1024)
    rows = encode_records(TALKS, encoder)
    expected = list(encoder.examples(TALKS))
    assert contents(rows) == [(one.input_ids, one.labels) for one in expected]
    assert len(rows) == 7
    assert rows.lengths == [len(one.input_ids) for one in expected]
    assert rows.answer_tokens == [sum(label != IGNORE_INDEX for label in one.labels) for one in expected]
    assert (rows.num_cut, rows.num_left_out) == (0, 0)
    assert rows.examples.column_names == ["input_ids", "labels"]


def test_a_second_call_reads_from_disk(tokenizer, folder, no_encoding):
    first = encode_records(TALKS, Encoder(tokenizer, 1024))
    no_encoding()
    second = encode_records(list(TALKS), Encoder(load_tokenizer("demo"), 1024))
    assert contents(second) == contents(first)
    assert (second.lengths, second.answer_tokens) == (first.lengths, first.answer_tokens)
    assert len([*folder.iterdir()]) == 1


@pytest.mark.parametrize(
    ("talks", "settings"),
    [
        (TALKS, {"max_length": 1023}),
        (TALKS, {"train_on": "all"}),
        (TALKS, {"prompt_format": make_format(system="be brief")}),
        (TALKS[:-1], {}),
        (TALKS[::-1], {}),
        ([*TALKS[:-1], said("question 7", "other")], {}),
        ([*TALKS[:-1], Conversation(TALKS[-1].turns, "be brief")], {}),
    ],
    ids=["max_length", "train_on", "system", "fewer", "order", "an answer", "a system text"],
)
def test_other_settings_or_contents_are_another_entry(tokenizer, folder, talks, settings):
    encode_records(TALKS, Encoder(tokenizer, 1024))
    encoder = Encoder(tokenizer, **{"max_length": 1024, **settings})
    rows = encode_records(talks, encoder)
    assert len([*folder.iterdir()]) == 2
    assert contents(rows) == [(one.input_ids, one.labels) for one in encoder.examples(talks)]


def test_an_entry_s_name_is_what_it_always_was(tokenizer):
    """Or runs that began with an earlier version could not be resumed; what is encoded otherwise has another name."""
    encoder = Encoder(tokenizer, 1024)

    def name(*rows: list) -> str:
        content = f"1 {encoder.fingerprint()}" + "".join(json.dumps(row) for row in rows)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    talks = [said(" a", "b"), said("c", "d", "e", "f", system="s")]
    expected = [[None, ["user", " a"], ["assistant", "b"]]]
    expected += [["s", ["user", "c"], ["assistant", "d"], ["user", "e"], ["assistant", "f"]]]
    assert cache._key(talks, encoder) == name(*expected)
    assert cache._key([said("a", " ▁b")], encoder) != name([None, ["user", "a"], ["assistant", " ▁b"]])
    context_only = Conversation((Turn("user", "a"), Turn("assistant", "b", learned=False), *said("c", "d").turns))
    assert context_only == said("a", "b", "c", "d")
    assert cache._key([context_only], encoder) != cache._key([said("a", "b", "c", "d")], encoder)


def test_another_layout_is_another_entry(tokenizer, folder, monkeypatch):
    encode_records(TALKS, Encoder(tokenizer, 1024))
    monkeypatch.setattr(cache, "LAYOUT", cache.LAYOUT + 1)
    encode_records(TALKS, Encoder(tokenizer, 1024))
    assert len([*folder.iterdir()]) == 2


def test_cut_and_left_out_conversations_are_counted(tokenizer, monkeypatch):
    monkeypatch.setattr(cache, "ROWS_PER_WRITE", 2)
    long_answer, long_question = said("a", "b " * 99), said("a " * 99, "b")
    talks = [TALKS[0], long_question, long_answer, long_question, long_question, long_answer, TALKS[1]]
    rows = encode_records(talks, Encoder(tokenizer, 80))
    assert (len(rows), rows.num_cut, rows.num_left_out) == (4, 2, 3)
    assert rows.lengths[1:3] == [80, 80]


def _story(words):
    return Conversation((Turn("text", "word " * words),))


def test_long_texts_take_several_rows_and_a_name_of_their_own(tokenizer, folder):
    encoder = Encoder(tokenizer, 16, "all")
    short = encode_records([_story(3)], encoder)
    assert (len(short), short.num_divided) == (1, 0)
    assert (folder / short.fingerprint).is_dir()  # as always
    rows = encode_records([_story(3), _story(40)], encoder)
    assert (rows.num_cut, rows.num_left_out, rows.num_divided) == (0, 0, 1)
    assert rows.lengths[:2] == [short.lengths[0], 16]
    assert (
        sum(rows.answer_tokens)
        == sum(len(one.ids) for talk in encoder.written([_story(3), _story(40)]) for one in talk) - 2
    )
    assert not (folder / rows.fingerprint).exists()  # a run that learned the cut text is none that resumes
    assert encode_records([_story(3), _story(40)], encoder).fingerprint == rows.fingerprint


def test_learned_tokens_are_counted_as_a_batch_counts_them(tokenizer):
    # With train_on=all nearly every token is learned; the first is BOS, which no token comes before.
    rows = encode_records([said("a", "b", "c", "d")], Encoder(tokenizer, 1024, "all"))
    (row,) = rows.examples
    assert rows.answer_tokens == [len(row["input_ids"]) - 2]  # two BOS


def test_nothing_left_is_no_row(tokenizer):
    rows = encode_records([said("a " * 99, "b")], Encoder(tokenizer, 16))
    assert (len(rows), rows.lengths, rows.num_left_out) == (0, [], 1)


def test_rows_are_mapped_from_disk_and_not_held_in_memory(tokenizer, folder):
    rows = encode_records(TALKS, Encoder(tokenizer, 1024))
    (entry,) = folder.iterdir()
    assert rows.examples.cache_files == [{"filename": str(entry / "rows.arrow")}]
    assert isinstance(rows.examples.data, datasets.table.MemoryMappedTable)


def test_rows_are_written_a_few_at_a_time(tokenizer, monkeypatch):
    monkeypatch.setattr(cache, "ROWS_PER_WRITE", 2)
    rows = encode_records(TALKS, Encoder(tokenizer, 1024))
    chunks = rows.examples.data.column("input_ids").chunks
    assert [len(chunk) for chunk in chunks] == [2, 2, 2, 1]


def test_an_encoding_that_was_cut_off_leaves_nothing_and_is_made_anew(tokenizer, folder, monkeypatch):
    monkeypatch.setattr(cache, "ROWS_PER_WRITE", 1)
    whole = Encoder.written

    def breaks(self, talks):
        for index, one in enumerate(whole(self, talks)):
            if index == 4:
                raise OSError("disk full")
            yield one

    with monkeypatch.context() as patch, pytest.raises(UserError, match="disk full"):
        patch.setattr(Encoder, "written", breaks)
        encode_records(TALKS, Encoder(tokenizer, 1024))
    assert [*folder.iterdir()] == []
    assert len(encode_records(TALKS, Encoder(tokenizer, 1024))) == 7
    assert len([*folder.iterdir()]) == 1


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero_tail(path):
    content = path.read_bytes()
    path.write_bytes(content[:-100] + bytes(100))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("rows.arrow", flip, "'rows.arrow': expected sha256="),
        ("rows.arrow", zero_tail, "'rows.arrow': expected sha256="),
        ("rows.arrow", lambda path: os.truncate(path, 1000), "'rows.arrow': expected bytes="),
        ("rows.arrow", lambda path: os.truncate(path, 0), "'rows.arrow': expected bytes="),
        ("rows.arrow", Path.unlink, "'rows.arrow': expected a file, found no such file"),
        ("counts.json", flip, "'counts.json': expected sha256="),
        ("counts.json", lambda path: os.truncate(path, 0), "'counts.json': expected bytes="),
        ("manifest.json", lambda path: os.truncate(path, 0), "'manifest.json': expected a manifest of version 1"),
    ],
    ids=["flipped", "zeros", "cut", "empty", "gone", "counts", "no counts", "empty manifest"],
)
def test_a_damaged_entry_is_encoded_anew_with_one_line(tokenizer, folder, capsys, name, damage, said):
    expected = contents(encode_records(TALKS, Encoder(tokenizer, 1024)))
    (entry,) = folder.iterdir()
    copy = (entry / name).read_bytes()  # the first rows are mapped: other bytes under the same name, not in place
    (entry / name).unlink()
    (entry / name).write_bytes(copy)
    damage(entry / name)
    rows = encode_records(TALKS, Encoder(tokenizer, 1024))
    assert (contents(rows), rows.num_cut, rows.fingerprint) == (expected, 0, entry.name)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {entry}: {said}") and line.endswith("; the rows are encoded again")
    assert [*folder.iterdir()] == [entry]
    encode_records(TALKS, Encoder(tokenizer, 1024))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("counts", [[], {}, {"cut": 0, "left_out": 0}, {"cut": 0, "left_out": 0, "divided": "0"}])
def test_an_entry_with_other_counts_is_encoded_anew_though_its_manifest_fits(tokenizer, folder, capsys, counts):
    expected = contents(encode_records(TALKS, Encoder(tokenizer, 1024)))
    (entry,) = folder.iterdir()

    def fill(new):
        shutil.copytree(entry, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        (new / "counts.json").write_text(json.dumps(counts), encoding="utf-8")

    write_folder(entry, fill, replace=True)
    assert contents(encode_records(TALKS, Encoder(tokenizer, 1024))) == expected
    words = "'counts.json': expected the numbers cut, left_out, divided", "the rows are encoded again"
    check_line(capsys.readouterr().err, *words, begins=f"warning: {entry}: ")


def test_an_entry_without_its_manifest_is_none(tokenizer, folder, capsys):
    """Nobody can be using it, and what is missing there may as well be a removal by another process."""
    expected = contents(encode_records(TALKS, Encoder(tokenizer, 1024)))
    (entry,) = folder.iterdir()
    (entry / "manifest.json").unlink()
    assert contents(encode_records(TALKS, Encoder(tokenizer, 1024))) == expected
    assert [*folder.iterdir()] == [entry]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("does", ["make", "remove"])
def test_an_entry_that_another_process_makes_or_removes_is_no_damage(tokenizer, folder, capsys, monkeypatch, does):
    """Made as soon as it was found missing, or removed as soon as it was made: whole rows, and not a word."""
    held, looks, elsewhere = cache.Held, [], folder.with_name("elsewhere")
    expected = contents(encode_records(TALKS, Encoder(tokenizer, 1024)))
    (entry,) = folder.iterdir()
    entry.rename(elsewhere)

    def between(path):
        looks.append(path)
        if (does, len(looks)) == ("remove", 2):
            entry.rename(elsewhere.with_name("removed"))
        found = held(path)
        if (does, len(looks)) == ("make", 1):
            elsewhere.rename(entry)
        return found

    monkeypatch.setattr(cache, "Held", between)
    rows = encode_records(TALKS, Encoder(tokenizer, 1024))
    assert (contents(rows), rows.held.found, len(looks)) == (expected, True, 2 + (does == "remove"))
    assert capsys.readouterr().err == ""


def test_an_entry_is_on_the_disk_before_it_has_its_name(tokenizer, folder, monkeypatch):
    synced, fsync = [], os.fsync

    def note(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        assert not any((path / "rows.arrow").is_file() for path in folder.glob("[!.]*")) or synced[-1] == folder.name
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    encode_records(TALKS, Encoder(tokenizer, 1024))
    assert {"rows.arrow", "counts.json", "manifest.json"} < {*synced}
    assert synced[-1] == folder.name


def test_an_entry_that_another_process_made_meanwhile_is_left_as_it_is(tokenizer, folder, monkeypatch):
    write, others = cache._write_rows, []

    def overtaken(path, talks, encoder):
        if not others:  # another device's process does the same from start to end
            others.append(encoder)
            encode_records(talks, encoder)
            (entry,) = (path for path in folder.iterdir() if (path / "counts.json").is_file())
            (entry / "mark").touch()
        return write(path, talks, encoder)

    monkeypatch.setattr(cache, "_write_rows", overtaken)
    assert len(encode_records(TALKS, Encoder(tokenizer, 1024))) == 7
    (entry,) = folder.iterdir()
    assert (entry / "mark").is_file()


# Pruning


@pytest.fixture
def aged(folder, monkeypatch, tokenizer):
    """Makes entries of a conversation each, which were used so many hours ago; room is for two."""

    def make(**hours):
        entries = {}
        for name, ago in hours.items():
            known = {*folder.iterdir()} if folder.is_dir() else set()
            encode_records([said(name, "yes")], Encoder(tokenizer, 1024))
            (entries[name],) = {*folder.iterdir()} - known
            os.utime(entries[name] / "manifest.json", (time.time() - 3600 * ago,) * 2)
        gc.collect()  # nobody has them open any more
        size = sum(file.stat().st_size for file in next(iter(entries.values())).iterdir())
        monkeypatch.setattr(cache, "KEPT_BYTES", int(2.5 * size))
        return entries

    return make


def left(entries):
    return [name for name, entry in entries.items() if entry.is_dir()]


def test_what_was_used_longest_ago_goes_first(aged, tokenizer, folder):
    entries = aged(a=5, b=9, c=2, d=7)
    encode_records([said("a", "yes")], Encoder(tokenizer, 1024))  # used again; nothing is added, and nothing removed
    assert left(entries) == ["a", "b", "c", "d"]
    os.utime(entries["a"] / "manifest.json", (time.time() - 3600 * 1.5,) * 2)
    encode_records([said("new", "yes")], Encoder(tokenizer, 1024))
    assert left(entries) == ["a"]
    assert len([*folder.iterdir()]) == 2


def test_a_use_makes_an_entry_new(aged, tokenizer):
    entries = aged(a=9, b=2, c=3)
    rows = encode_records([said("a", "yes")], Encoder(tokenizer, 1024))
    rows.held.close()
    encode_records([said("new", "yes")], Encoder(tokenizer, 1024))
    assert left(entries) == ["a"]


def test_the_new_one_and_the_recent_ones_stay_however_large(aged, tokenizer, folder, monkeypatch):
    entries = aged(a=5, b=0.5, c=0.5)
    monkeypatch.setattr(cache, "KEPT_BYTES", 1)
    rows = encode_records([said("new", "yes")], Encoder(tokenizer, 1024))
    assert left(entries) == ["b", "c"]
    assert len(rows.examples[0]["input_ids"]) > 3 and len([*folder.iterdir()]) == 3


HOLD = """
import fcntl, sys
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_SH)
print("held", flush=True)
sys.stdin.read()
"""


def test_what_another_process_has_open_stays(aged, tokenizer, folder):
    entries = aged(a=5, b=9, c=3, d=4)
    command = [sys.executable, "-c", HOLD, entries["b"] / "manifest.json"]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "held\n"
        rows = encode_records([said("new", "yes")], Encoder(tokenizer, 1024))
        assert left(entries) == ["b", "c"]
        other.stdin.close()
    for entry in folder.iterdir():
        os.utime(entry / "manifest.json", (time.time() - 7200,) * 2)
    os.utime(entries["b"] / "manifest.json", (0, 0))
    rows.held.close()
    encode_records([said("newer", "yes")], Encoder(tokenizer, 1024))
    assert "b" not in left(entries)


def test_what_this_process_has_open_stays_until_it_is_closed(aged, tokenizer, monkeypatch):
    entries = aged(a=5)
    monkeypatch.setattr(cache, "KEPT_BYTES", 1)
    rows = encode_records([said("a", "yes")], Encoder(tokenizer, 1024))
    os.utime(entries["a"] / "manifest.json", (0, 0))
    encode_records([said("new", "yes")], Encoder(tokenizer, 1024))
    assert left(entries) == ["a"] and len(rows.examples[0]["input_ids"]) > 3
    rows.held.close()
    encode_records([said("newer", "yes")], Encoder(tokenizer, 1024))
    assert left(entries) == []


def test_what_a_kill_left_is_removed_after_a_day(aged, tokenizer, folder):
    aged(a=1)
    for name, hours in ((".0123.tmp-1-00000000", 25), (".0123.tmp-2-00000000", 23)):
        (folder / name).mkdir()
        (folder / name / "rows.arrow").write_text("half")
        os.utime(folder / name, (time.time() - 3600 * hours,) * 2)
    encode_records([said("new", "yes")], Encoder(tokenizer, 1024))
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [".0123.tmp-2-00000000"]


@pytest.mark.slow
def test_many_processes_write_prune_and_read_at_once(tmp_path):
    """Each has room for one entry only, and finds its rows whole all the same."""
    code = f"""
import datasets, sys
datasets.config.HF_DATASETS_CACHE = {str(tmp_path)!r}
from lit_qlora.data import cache
from lit_qlora.data.encode import Encoder
from lit_qlora.data.tokenizer import load_tokenizer
from lit_qlora.text.conversation import Conversation, Turn
cache.KEPT_BYTES, cache.RECENT_S = 1, 0
encoder = Encoder(load_tokenizer("demo"), 64)
for number in range(100):
    talk = Conversation((Turn("user", f"question {{number % 3}}"), Turn("assistant", "yes")))
    rows = cache.encode_records([talk], encoder)
    assert rows.examples[0]["labels"][-1] == encoder.eos_id
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    started = [subprocess.Popen([sys.executable, "-c", code], stderr=-1, env=environment, text=True) for _ in range(3)]
    assert [(process.communicate()[1], process.returncode) for process in started] == [("", 0)] * 3


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_folder_that_can_not_be_written_is_one_line_and_nothing_is_left(
    tokenizer, folder, monkeypatch, error, expect_error
):
    def fail(*_):
        raise error

    monkeypatch.setattr(cache, "_write_rows", fail)
    expect_error(lambda: encode_records(TALKS, Encoder(tokenizer, 1024)), folder, error.strerror, "HF_DATASETS_CACHE")
    assert list(folder.iterdir()) == []
