import gzip
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import datasets
import pytest

from lit_qlora import demo
from lit_qlora.data import sources
from lit_qlora.data.row_files import Row
from lit_qlora.data.sources import Source, as_text, sources_of
from lit_qlora.errors import UserError

A_SOURCE = (
    "expected 'demo', a file (.jsonl, .json, .csv, .parquet), a folder with train.jsonl, or a hub id such as owner/name"
)


def find_splits(source):
    return sources.find_splits(*sources_of(source))


def read_source(source, split="train"):
    return sources.read_source(*sources_of(source), split)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Works in an empty folder, where nothing may ask the hub unless a test sets an answer."""
    monkeypatch.chdir(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    return tmp_path


def write(name: str, text: str = '{"text": "x"}\n') -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, "utf-8")


def test_a_file_is_all_train():
    write("rows.jsonl")
    assert read_source("rows.jsonl", "train") == [Row("rows.jsonl:1", {"text": "x"})]
    assert "train" in find_splits("rows.jsonl").names
    assert "test" not in find_splits("rows.jsonl").names


def test_a_folder_holds_splits():
    write("mine/train.csv", "text\nx\n")
    write("mine/test.jsonl")
    write("mine/README.md")
    assert read_source("mine", "train") == [Row("mine/train.csv:2", {"text": "x"})]
    assert read_source("mine", "test") == [Row("mine/test.jsonl:1", {"text": "x"})]
    assert "train" in find_splits("mine").names
    assert "test" in find_splits("mine").names


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["train.jsonl", "validation.jsonl"], {"train": "train", "validation": "validation"}),
        (["train.jsonl", "val.jsonl", "test.jsonl"], {"train": "train", "validation": "val", "test": "test"}),
        (["train.jsonl", "valid.jsonl"], {"train": "train", "validation": "valid"}),
        (["train.jsonl", "dev.jsonl"], {"train": "train", "validation": "dev"}),
        (["train.jsonl", "eval.jsonl", "test.jsonl"], {"train": "train", "validation": "eval", "test": "test"}),
        (["train_sft.jsonl", "test_sft.jsonl"], {"train": "train_sft", "test": "test_sft"}),
        (["Train.jsonl", "Validation.JSONL"], {"train": "Train", "validation": "Validation"}),
        (["train.jsonl", "train.jsonl.gz", "tests.md", "validation.md"], {"train": "train"}),
    ],
)
def test_a_split_goes_by_several_names(files, names):
    for file in files:
        write(f"mine/{file}")
    splits = find_splits("mine")
    assert (splits.names, splits.unread) == (names, ())
    for name in names.values():
        assert read_source("mine", name)[0].value == {"text": "x"}


def test_a_packed_file_beside_the_same_unpacked_is_the_same_rows():
    for name in ("train/a.jsonl", "test/a.jsonl"):
        write(f"mine/{name}")
        Path(f"mine/{name}.gz").write_bytes(gzip.compress(Path(f"mine/{name}").read_bytes()))
    assert len(read_source("mine")) == len(read_source("mine/**")) == 1
    Path("mine/train/a.jsonl").unlink()
    assert [row.where for row in read_source("mine/**")] == ["mine/train/a.jsonl.gz:1"]


def test_a_file_named_for_training_in_part_is_read_beside_one_of_a_split_s_whole_name():
    for name in ("my_train.jsonl", "val.jsonl"):
        write(f"mine/{name}")
    assert find_splits("mine").names == {"train": "train", "validation": "val"}


def test_two_names_of_one_split_are_refused():
    for name in ("train.jsonl", "val.jsonl", "validation.jsonl"):
        write(f"mine/{name}")
    pattern = "^mine: holds both val.jsonl and validation.jsonl, expected one; keep one of them$"
    with pytest.raises(UserError, match=pattern):
        find_splits("mine")


@pytest.mark.parametrize(
    ("files", "name", "remedy"),
    [
        (["train.jsonl"], "fr", "leave the name out"),
        (["fr/train.jsonl", "en/train.jsonl"], "frr", "did you mean 'fr'?; leave the name out, and name one of"),
        (["data/fr/train.jsonl", "data/en/train.jsonl"], "de", "such as mine/data/en"),
        (["a.jsonl", "b.jsonl"], "a", "leave the name out, and rename yours, or name the file itself, such as mine/a"),
    ],
)
def test_a_name_that_a_folder_has_not_is_refused_with_what_ends_well(files, name, remedy, expect_error):
    for one in files:
        write(f"mine/{one}")
    expect_error(lambda: find_splits(Source("mine", name)), f"no folder '{name}'", remedy, place="mine")


def test_a_folder_without_training_rows_names_a_split_that_it_has(expect_error):
    write("mine/test.jsonl")
    expect_error(lambda: find_splits("mine").training(), "'train'", "{path: …, split: test}", place="mine")
    assert find_splits(Source("mine", split="test")).training() == "test"
    write("mine/talks.jsonl")
    remedy = "rename talks.jsonl train.jsonl, or give mine/talks.jsonl itself"
    expect_error(lambda: find_splits("mine").training(), remedy, place="mine")


def test_a_name_may_stand_for_a_folder_in_data():
    write("mine/data/fr/train.jsonl")
    assert find_splits(Source("mine", "fr")).names == {"train": "train"}


def test_a_packed_split_is_not_passed_over():
    write("mine/train.jsonl")
    Path("mine/validation.jsonl.gz").write_bytes(gzip.compress(b'{"text": "y"}\n'))
    assert find_splits("mine").names == {"train": "train", "validation": "validation"}
    assert read_source("mine", "validation") == [Row("mine/validation.jsonl.gz:1", {"text": "y"})]


def test_what_else_a_folder_holds_is_named():
    for name in ("train.jsonl", "more.jsonl", "README.md", "data/validation-00000-of-00001.parquet", "empty/x.txt"):
        write(f"mine/{name}")
    assert find_splits("mine").unread == ("more.jsonl", "data/")


def test_the_demo_is_not_a_folder_of_that_name():
    write("demo/rows.jsonl")
    assert find_splits("demo").unread == ()


@pytest.mark.parametrize(
    ("found", "names", "unread"),
    [
        (
            ["train_sft", "test_sft", "train_gen", "test_gen"],
            {"train": "train_sft", "test": "test_sft"},
            ("train_gen", "test_gen"),
        ),
        (["train", "validation"], {"train": "train", "validation": "validation"}, ()),
        (["train_sft", "train", "dev"], {"train": "train", "validation": "dev"}, ("train_sft",)),
    ],
)
def test_splits_of_the_hub_go_by_several_names(monkeypatch, found, names, unread):
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda source: found)
    splits = find_splits("owner/name")
    assert (splits.names, splits.unread) == (names, unread)


@pytest.mark.parametrize(
    ("chosen", "held_out"),
    [
        ("train_prefs", {"test": "test_prefs"}),
        ("train_sft", {"test": "test_sft"}),
        ("de_train", {"validation": "de_dev", "test": "test_sft"}),
        ("test_prefs", {"test": "test_sft"}),
    ],
)
def test_beside_a_split_that_is_named_those_of_its_kind_are_held_out(monkeypatch, chosen, held_out):
    found = ["train_prefs", "test_prefs", "train_sft", "test_sft", "de_train", "de_dev"]
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda source: found)
    assert find_splits(f"owner/name:{chosen}").names == {"train": chosen, **held_out}


def test_a_set_of_the_hub_without_training_rows_is_one_line(monkeypatch, expect_error):
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda source: ["en", "de"])
    expect_error(lambda: find_splits("owner/name").training(), "no split 'train'", "en and de", place="owner/name")


@pytest.mark.parametrize(
    ("files", "names", "unread"),
    [
        (["data/train-00000-of-00001.parquet", "README.md"], {"train": ["data/train-00000-of-00001.parquet"]}, ()),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
             "data/test-00000-of-00001.parquet"],
            {"train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
             "test": ["data/test-00000-of-00001.parquet"]},
            (),
        ),
        (["data/train-00000-of-00001-0123456789abcdef.parquet"],
         {"train": ["data/train-00000-of-00001-0123456789abcdef.parquet"]}, ()),
        (["data/train.jsonl", "data/test.jsonl", "more.jsonl"], {"train": ["data/train.jsonl"],
                                                                 "test": ["data/test.jsonl"]}, ("more.jsonl",)),
        (["main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet"],
         {"train": ["main/train-00000-of-00001.parquet"], "test": ["main/test-00000-of-00001.parquet"]}, ()),
        (["train/a.jsonl", "train/b.jsonl", "validation/a.jsonl"],
         {"train": ["train/a.jsonl", "train/b.jsonl"], "validation": ["validation/a.jsonl"]}, ()),
        (["openassistant_best_replies_train.jsonl", "openassistant_best_replies_eval.jsonl"],
         {"train": ["openassistant_best_replies_train.jsonl"],
          "validation": ["openassistant_best_replies_eval.jsonl"]}, ()),
        (["dolly-15k.jsonl", "README.md", "dataset_infos.json"], {"train": ["dolly-15k.jsonl"]}, ()),
        (["train-00001-of-00002.parquet", "train-00002-of-00002.parquet"],
         {"train": ["train-00001-of-00002.parquet", "train-00002-of-00002.parquet"]}, ()),
        (["train.jsonl", "validation/a.jsonl"],
         {"train": ["train.jsonl"], "validation": ["validation/a.jsonl"]}, ()),
        (["train/a.jsonl", "test.jsonl"], {"train": ["train/a.jsonl"], "test": ["test.jsonl"]}, ()),
        (["trainData.jsonl", "TestSet.jsonl"], {"train": ["trainData.jsonl"], "test": ["TestSet.jsonl"]}, ()),
        (["default/train/0000.parquet", "default/test/0000.parquet"],
         {"train": ["default/train/0000.parquet"], "test": ["default/test/0000.parquet"]}, ()),
    ],
)  # fmt: skip
def test_a_clone_of_the_hub_is_read_as_it_lies(files, names, unread):
    for name in files:
        write(f"mine/{name}")
    splits = find_splits("mine")
    assert {*splits.names.values()} == {*names}
    assert splits.unread == unread
    found = sources._find_files(sources.sources_of("mine")[0])
    assert {name: [str(path.relative_to("mine")) for path in paths] for name, paths in found.items()} == names


def test_the_parts_of_a_split_are_read_in_their_order_and_all_of_them(expect_error):
    for number in (1, 0, 2):
        datasets.Dataset.from_dict({"text": [f"x{number}"]}).to_parquet(f"train-0000{number}-of-00003.parquet")
    assert [row.value["text"] for row in read_source(".", "train")] == ["x0", "x1", "x2"]
    Path("train-00001-of-00003.parquet").unlink()
    expect_error(lambda: find_splits("."), "2 of the 3 parts of train", "00001 is missing", place=".")
    write("rows/train/0000-00000-of-00002.jsonl")
    expect_error(lambda: find_splits("rows"), "1 of the 2 parts of 0000", "00001 is missing", place="rows/train")


def test_what_datasets_saved_is_read(expect_error):
    rows = datasets.Dataset.from_dict(
        {"text": ["x", "y", "z"], "messages": [[{"role": "user", "content": "hi"}]] * 3, "turns": [{"a": [1]}] * 3}
    )
    rows.save_to_disk("one", num_shards=2)
    datasets.DatasetDict({"train": rows, "test": rows.select([0]), "gen": rows}).save_to_disk("several")
    assert [row.value["text"] for row in read_source("one")] == ["x", "y", "z"]
    assert read_source("one")[0].where == "one/data-00000-of-00002.arrow: row 1"
    assert read_source("one")[0].value["messages"] == [{"role": "user", "content": "hi"}]
    splits = find_splits("several")
    assert (splits.names, splits.unread) == ({"train": "train", "test": "test"}, ("gen",))
    assert [row.value["text"] for row in read_source("several", "test")] == ["x"]
    assert find_splits("several:gen").training() == "gen"
    Path("one/data-00001-of-00002.arrow").unlink()
    expect_error(lambda: read_source("one"), "data-00001-of-00002.arrow", "copy it again", place="one")
    Path("one/state.json").write_text("{")
    expect_error(lambda: read_source("one"), "save_to_disk", place="one/state.json")
    for text in ("{", "[]", "{}", '{"splits": null}', '{"splits": []}'):
        Path("several/dataset_dict.json").write_text(text)
        expect_error(lambda: find_splits("several"), "save_to_disk", place="several/dataset_dict.json")


@pytest.mark.parametrize(
    ("files", "remedy"),
    [
        (["notes.md"], "put one there, or name the file itself"),
        (
            ["a.jsonl", "b.jsonl"],
            "rename yours, or name the file itself, such as mine/a.jsonl, or all with mine/*.jsonl",
        ),
        (["en/train.jsonl", "de/train.jsonl"], "name one of its folders (de, en), such as mine/de"),
        (["data/en/train.jsonl", "data/de/train.jsonl"], "name one of its folders (de, en), such as mine/data/de"),
        (
            ["train-1.jsonl", "train-2.jsonl"],
            "keep one of them, or give both: mine/*.jsonl",
        ),
        # The held-out rows are not proposed in place of what is named for training.
        (["train1.jsonl", "train2.jsonl", "val.jsonl"], "keep one of them, or give both: mine/*.jsonl"),
    ],
)
def test_a_folder_without_splits_says_what_to_do(files, remedy):
    for name in files:
        write(f"mine/{name}")
    with pytest.raises(UserError) as caught:
        find_splits("mine")
    assert str(caught.value).endswith(remedy)


@pytest.mark.parametrize(
    ("files", "held_out"),
    [
        (["trainset.jsonl", "devset.jsonl"], "devset.jsonl"),
        (["TrainData.jsonl", "ValData.jsonl"], "ValData.jsonl"),
        (["train.jsonl", "validation/a.jsonl"], "validation/a.jsonl"),
        (["train/a.jsonl", "test.jsonl"], "test.jsonl"),
        (["train/a.jsonl", "valData.jsonl"], "valData.jsonl"),
        (["train.jsonl", "test_split.jsonl"], "test_split.jsonl"),
        # None is named for training: what is named as another is, for another split.
        (["talks.jsonl", "talks_val.jsonl"], "talks_val.jsonl"),
        (["talks.jsonl", "ab_test.jsonl"], None),
    ],
)
def test_a_pattern_s_files_for_other_splits_are_not_trained_on(files, held_out):
    for name in files:
        write(name)
    assert [row.where for row in read_source("**/*.jsonl")] == [f"{one}:1" for one in sorted(files) if one != held_out]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["a.jsonl"], "1 file to train on"),
        (["train.jsonl", "test.jsonl"], "1 file to train on"),
        (["talks.jsonl", "ab_test.jsonl"],
         "2 files to train on, with ab_test.jsonl: if it is for test, leave it out and give it as data.test_source"),
        (["train/a.jsonl", "my_val.jsonl", "your_val.jsonl"],
         "3 files to train on, with my_val.jsonl and 1 more: if it is for validation, leave it out and give it as"
         " data.validation_source"),
        (["train/val_a.jsonl"], "1 file to train on"),
        (["part-00000-of-00003.jsonl", "part-00002-of-00003.jsonl"],
         "2 files to train on; has 2 of the 3 parts of part: number 00001 is missing"),
        (["train.jsonl", "test-00000-of-00002.jsonl"],
         "1 file to train on; has 1 of the 2 parts of test: number 00001 is missing"),
        (["a/x-00001-of-00002.jsonl", "a/x-00002-of-00002.jsonl", "b/x-00000-of-00001.jsonl"], "3 files to train on"),
    ],
)  # fmt: skip
def test_a_pattern_shows_which_files_it_trains_on(files, expected):
    for name in files:
        write(name)
    assert find_splits("**/*.jsonl").note == expected
    assert find_splits(files[0]).note == find_splits("demo").note == ""


def test_a_pattern_shows_what_it_does_not_read():
    for name in ("a.jsonl", "b.jsonl", "b.jsonl.gz", "notes.txt", "old/c.jsonl", "empty/notes.txt"):
        write(f"data/{name}")
    assert find_splits("data/*").note == "2 files to train on; not read: notes.txt, old/"
    for number in range(10):
        write(f"data/note-{number}.md")
    assert find_splits("data/*").note.endswith(", note-5.md, note-6.md, note-7.md, 4 more")


def test_a_pattern_is_its_files():
    for name in ("b.jsonl", "a.jsonl", "c.csv", "notes.md"):
        write(f"data/{name}", "text\nx\n" if name.endswith("csv") else '{"text": "x"}\n')
    assert [row.where for row in read_source("data/*.jsonl")] == ["data/a.jsonl:1", "data/b.jsonl:1"]
    assert [row.where for row in read_source("data/*")] == ["data/a.jsonl:1", "data/b.jsonl:1", "data/c.csv:2"]
    assert [row.where for row in read_source("**/[ab].jsonl")] == ["data/a.jsonl:1", "data/b.jsonl:1"]
    # What is another split by its name is none to train on, as in a folder.
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "test_cases.jsonl"):
        write(f"three/{name}")
    splits = find_splits("three/*.jsonl")
    assert splits.names == {"train": "train", "validation": "validation", "test": "test"}
    assert [row.where for row in read_source("three/*.jsonl")] == ["three/test_cases.jsonl:1", "three/train.jsonl:1"]
    assert [row.where for row in read_source("three/test.json*")] == ["three/test.jsonl:1"]
    for files in (["x/train/a.jsonl", "x/validation/a.jsonl", "x/test/a.jsonl"],
                  ["y/alpaca_train.jsonl", "y/alpaca_val.jsonl", "y/alpaca_test.jsonl"]):  # fmt: skip
        for name in files:
            write(name)
        splits = find_splits(f"{files[0][0]}/**/*.jsonl")
        assert splits.names == {"train": "train", "validation": "validation", "test": "test"}
        assert [row.where for row in read_source(f"{files[0][0]}/**/*.jsonl")] == [f"{files[0]}:1"]
    write("dev/a.jsonl")
    write("dev/mine_test.jsonl")
    assert len(read_source("dev/*.jsonl")) == 2  # nothing there says what it is besides
    write("data/[x].jsonl")
    assert [row.where for row in read_source("data/[x].jsonl")] == ["data/[x].jsonl:1"]
    with pytest.raises(UserError, match=r"^data/\*\.json: no such file"):
        read_source("data/*.json")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.jsonl", [Source("a.jsonl")]),
        ("owner/name:train_gen", [Source("owner/name", split="train_gen")]),
        ("owner/name:train[:10%]", [Source("owner/name", split="train[:10%]")]),
        ("demo:test", [Source("demo", split="test")]),
        ("C:\\rows.jsonl", [Source("C:\\rows.jsonl")]),
        ("https://huggingface.co/datasets/a/b", [Source("https://huggingface.co/datasets/a/b")]),
        (Path("a.jsonl"), [Source("a.jsonl")]),
        (["a.jsonl", {"path": "b/c", "name": "main", "split": "x", "revision": "v1", "share": 0.5}],
         [Source("a.jsonl"), Source("b/c", "main", "x", "v1", 0.5)]),
        ({"path": "b/c:x", "share": "0.5"}, [Source("b/c", split="x", share=0.5)]),
        ('["a.jsonl", {"path": "b.jsonl"}]', [Source("a.jsonl"), Source("b.jsonl")]),
        ({"path": "a.jsonl", "columns": {"user": "q", "assistant": "a"}},
         [Source("a.jsonl", columns=(("user", "q"), ("assistant", "a")))]),
    ],
)  # fmt: skip
def test_what_stands_for_sources(value, expected):
    assert sources_of(value) == tuple(expected)
    if not isinstance(value, Path):
        assert sources_of(as_text(value)) == tuple(expected)


@pytest.mark.parametrize(
    ("value", "words", "option"),
    [
        ([], ["an empty list"], "data.source"),
        (["a.jsonl", ""], ["is ''"], "data.source"),
        ([3], ["got 3"], "data.source"),
        (["a.jsonl", "b.jsonl", {"path": "a.jsonl"}], ["lists 'a.jsonl' twice"], "data.source"),
        (["a.jsonl", "./a.jsonl"], ["lists './a.jsonl' twice"], "data.source"),
        (["x/*.jsonl", "y/../x/*.jsonl"], ["lists 'y/../x/*.jsonl' twice"], "data.source"),
        ({}, ["no path"], "data.source"),
        ({"path": 3}, ["no path"], "data.source"),
        ({"path": "a", "shar": 1}, ["'shar' is unknown", "did you mean 'share'?"], "data.source"),
        ({"class_path": "os.system"}, ["'class_path' is unknown"], "data.source"),
        ([{"messages": []}], ["'messages' is unknown", "for rows themselves, write them to a file"], "data.source"),
        ({"path": "a", "share": 0}, ["above 0", "got 0"], "data.source.share"),
        ({"path": "a", "share": 70}, ["up to 1", "got 70"], "data.source.share"),
        ({"path": "a", "share": "half"}, ["got 'half'"], "data.source.share"),
        ({"path": "a", "share": float("nan")}, ["above 0"], "data.source.share"),
        ({"path": "a", "split": 3}, ["expected a text, got 3"], "data.source.split"),
        ({"path": "a", "columns": "q"}, ["expected a table"], "data.source.columns"),
    ],
)
def test_what_stands_for_none(value, words, option, expect_error):
    expect_error(lambda: sources_of(value), *words, option=option)


@pytest.mark.parametrize("key", ["name", "revision"])
@pytest.mark.parametrize("path", ["demo", "train.jsonl", "*.jsonl", "."])
def test_what_only_the_hub_has_is_not_passed_over(path, key, expect_error):
    write("train.jsonl")
    (source,) = sources_of({"path": path, key: "main"})
    expect_error(lambda: find_splits(source), "no folder" if key == "name" else "no revisions", place=path)


def test_a_split_that_there_is_not_is_named_with_those_there_are(monkeypatch, expect_error):
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda source: ["train", "test", "train_gen"])
    for split in ("tarin", "train+tset", "tarin[:10%]"):
        expect_error(lambda split=split: find_splits(f"owner/name:{split}"), "no split", "train and test and train_gen",
                     "did you mean", place="owner/name")  # fmt: skip
    splits = find_splits("owner/name:train_gen")
    assert (splits.names, splits.unread) == ({"train": "train_gen", "test": "test"}, ("train",))
    assert find_splits("owner/name:train[:10%]+test").names == {"train": "train[:10%]+test"}
    write("rows.jsonl")
    expect_error(lambda: find_splits("rows.jsonl:test"), "no split 'test', found: train", place="rows.jsonl")


def test_configuration_and_revision_reach_the_hub(monkeypatch):
    asked = []

    def names(*args, **kwargs):
        asked.append((args, kwargs))
        return ["train"]

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": ["x"]})

    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    monkeypatch.setattr(datasets, "load_dataset", load)
    (source,) = sources_of({"path": "owner/name", "name": "main", "revision": "v1"})
    assert find_splits(source).training() == "train"
    assert read_source(source) == [Row("owner/name, main (train): row 1", {"text": "x"})]
    assert asked == [
        (("owner/name",), {"config_name": "main", "revision": "v1"}),
        (("owner/name",), {"split": "train", "name": "main", "revision": "v1"}),
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (None, ["has several configurations", "main", "{path: owner/name, name: CONFIGURATION}"]),
        ("x", ["no configuration 'x'", "main", "name: CONFIGURATION"]),
        ("main", ["can't be loaded (ValueError: in any words)"]),
    ],
)
def test_a_configuration_is_asked_for_where_none_is_named_that_is_there(monkeypatch, name, words, expect_error):
    def fail(*args, **kwargs):
        raise ValueError("in any words")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda *_, **__: ["main", "socratic"])
    monkeypatch.setattr(datasets, "get_dataset_default_config_name", lambda *_, **__: None)
    (source,) = sources_of({"path": "owner/name"} | ({"name": name} if name else {}))
    expect_error(lambda: find_splits(source), *words, place="owner/name")


def test_a_folder_that_is_named_like_a_hub_id_comes_before_the_hub():
    write("owner/name/train.jsonl")
    assert read_source("owner/name", "train") == [Row("owner/name/train.jsonl:1", {"text": "x"})]
    assert "test" not in find_splits("owner/name").names


def test_parquet_has_rows_in_place_of_lines():
    datasets.Dataset.from_dict({"text": ["x"]}).to_parquet("rows.parquet")
    assert read_source("rows.parquet", "train") == [Row("rows.parquet: row 1", {"text": "x"})]


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("rows.jsonl")
    assert "train" in find_splits("~/rows.jsonl").names


def test_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN", tmp_path / "a.jsonl")
    monkeypatch.setattr(demo, "TEST", tmp_path / "b.jsonl")
    write("a.jsonl")
    write("b.jsonl", '{"text": "y"}\n')
    assert read_source("demo", "train") == [Row(f"{tmp_path}/a.jsonl:1", {"text": "x"})]
    assert read_source("demo", "test") == [Row(f"{tmp_path}/b.jsonl:1", {"text": "y"})]
    assert "test" in find_splits("demo").names
    assert "validation" not in find_splits("demo").names


@pytest.mark.parametrize(
    ("source", "place", "words"),
    [
        ("rows.jsnl", "rows.jsnl", ["no such file", "did you mean 'rows.jsonl'?", A_SOURCE]),
        *((source, source, ["no such file", A_SOURCE]) for source in (
            "zzz.csv", "data/rows.jsonl", "data/rows.txt", "./data/rows", "../rows", "a/b/c",
        )),
        ("Demo", "Demo", ["no such file", "did you mean 'demo'?", A_SOURCE]),
        ("https://huggingface.co/datasets/a/b", "https://huggingface.co/datasets/a/b", ["page of the hub", " a/b"]),
        ("https://b.c/rows.jsonl", "https://b.c/rows.jsonl", ["an address", "download"]),
        ("nope*.jsonl", "nope*.jsonl", ["the pattern matches none"]),
        ("", None, ["''", "'demo', a file, a folder or a hub id"]),
        ("a\nb", None, ["'a\\nb'", "'demo', a file, a folder or a hub id"]),
        (
            "useless",
            "useless",
            ["train.jsonl (.jsonl, .json, .csv, .parquet)", "['README.md', 'more.jsonl', 'rows.jsonl']",
             "useless/more.jsonl", "useless/*.jsonl"],
        ),
        ("twice", "twice", ["train.csv and train.jsonl", "data.source [twice/train.csv, twice/train.jsonl]"]),
        ("half", "half", ["no split 'train'", "found: test"]),
        *(
            ({"path": "half", "split": split}, "half", [f"no split '{split}'", "found: test", "a share", "a list"])
            for split in ("test[:10]", "test+test")
        ),
    ],
)  # fmt: skip
def test_a_source_that_is_not_there_is_one_line(source, place, words, expect_error):
    for name in (
        "rows.jsonl",
        "useless/rows.jsonl",
        "useless/more.jsonl",
        "useless/README.md",
        "twice/train.csv",
        "twice/train.jsonl",
        "half/test.jsonl",
    ):
        write(name)
    split = source["split"] if isinstance(source, dict) else "train"
    expect_error(lambda: read_source(source, split), *words, option=None if place else "data.source", place=place)


def test_the_hub_is_asked_for_the_split_and_never_trusts_code(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": ["x", "y"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_source("owner/name", "train") == [
        Row("owner/name (train): row 1", {"text": "x"}),
        Row("owner/name (train): row 2", {"text": "y"}),
    ]
    assert asked == [(("owner/name",), {"split": "train"})]


def test_the_hub_is_asked_for_its_splits(monkeypatch):
    monkeypatch.setattr(
        datasets, "get_dataset_split_names", lambda source: {"owner/name.v1-0": ["train", "test"]}[source]
    )
    assert "test" in find_splits("owner/name.v1-0").names
    assert "validation" not in find_splits("owner/name.v1-0").names


def test_where_no_split_is_for_training_one_is_shown_as_it_is_given(monkeypatch):
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda source: ["oasst", "dolly"])
    with pytest.raises(UserError, match=r"found: oasst and dolly; .*{path: …, split: oasst}"):
        find_splits("owner/n").training()
    assert find_splits("owner/n:oasst").training() == "oasst"


PAGE = "https://huggingface.co/datasets/owner/name"
NOT_FOUND = datasets.exceptions.DatasetNotFoundError
GENERATED = datasets.exceptions.DatasetGenerationError
GENERATION = "An error occurred while generating the dataset"


def raised_while_handling(error: Exception, cause: Exception) -> Exception:
    """``error`` as it is raised where ``cause`` is handled."""
    try:
        try:
            raise cause
        except Exception:
            raise error from None
    except Exception as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            NOT_FOUND("Dataset 'owner/name' doesn't exist on the Hub or cannot be accessed."),
            ["not found on the hub", "no such file here", "HF_TOKEN"],
        ),
        (
            ConnectionError("Couldn't reach 'owner/name' on the Hub (LocalEntryNotFoundError)"),
            ["the hub can't be reached", "HF_HUB_OFFLINE"],
        ),
        (
            ValueError("Unknown split \"train\". Should be one of ['test'].\nMore."),
            ["(ValueError: Unknown split \"train\". Should be one of ['test'].)", PAGE],
        ),
        (
            raised_while_handling(GENERATED(GENERATION), ValueError("JSON parse error: Invalid value. in row 1")),
            ["(ValueError: JSON parse error: Invalid value. in row 1)", PAGE],
        ),
        (
            raised_while_handling(
                GENERATED(f"{GENERATION}\n\nAll the data files must have the same columns."),
                datasets.table.CastError("Couldn't cast\n…", table_column_names=["a"], requested_column_names=["b"]),
            ),
            ["(CastError: ", "1 new columns ({'a'})", "1 missing columns ({'b'})", PAGE],
        ),
    ],
)
def test_what_goes_wrong_on_the_hub_is_one_line(error, words, monkeypatch, expect_error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    for call in (read_source, find_splits):
        expect_error(lambda call=call: call("owner/name"), *words, place="owner/name")


def test_offline_is_said_by_the_real_library(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^no-such-owner/no-such-name: no such file .* hub can't be reached"):
        read_source("no-such-owner/no-such-name", "train")


# The hub, played by a server that the real libraries talk to


def _lines(split: str, count: int) -> bytes:
    rows = ({"text": f"### Human: {split} {number}### Assistant: a"} for number in range(count))
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


class Hub(BaseHTTPRequestHandler):
    """Knows owner/guanaco, whose files are named as those of timdettmers/openassistant-guanaco."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"
    FILES = {  # noqa: RUF012
        "openassistant_best_replies_train.jsonl": _lines("train", 3),
        "openassistant_best_replies_eval.jsonl": _lines("eval", 2),
        "README.md": b"# Guanaco\n",
    }

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        name = path.rpartition("/")[2]
        if "owner/gated" in path:
            self.answer(401, {"X-Error-Code": "GatedRepo"})
        elif "v9" in path:
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/datasets/owner/guanaco/tree/"):
            listing = [
                {"type": "file", "path": name, "size": len(content), "oid": "1" * 40}
                for name, content in self.FILES.items()
            ]
            self.answer(200, {}, json.dumps(listing).encode())
        elif path.startswith("/api/datasets/owner/guanaco"):
            siblings = [{"rfilename": name} for name in self.FILES]
            about = {"id": "owner/guanaco", "sha": self.COMMIT, "private": False, "tags": [], "siblings": siblings}
            self.answer(200, {}, json.dumps(about).encode())
        elif path.startswith("/datasets/owner/guanaco/resolve/") and name in self.FILES:
            self.answer(200, {"X-Repo-Commit": self.COMMIT, "ETag": f'"{name}"'}, self.FILES[name])
        elif path.startswith("/datasets/owner/guanaco/"):
            self.answer(404, {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(404, {})

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


ASK = """
import json
import datasets
from lit_qlora.data import sources
from lit_qlora.data.sources import Source, as_text, find_splits, read_source, sources_of
from lit_qlora.errors import UserError
from lit_qlora.quiet import quieten

quieten()
datasets.disable_progress_bars()


def ask(question, *words):
    try:
        return question(*words)
    except UserError as error:
        return str(error)


known = ask(find_splits, Source("owner/guanaco"))
print(json.dumps([known.names, *(ask(read_source, Source("owner/guanaco"), split) for split in ("train", "test")),
                  *(ask(find_splits, source) for source in (
                      Source("owner/unknown"), Source("owner/gated"), Source("owner/guanaco", revision="v9"),
                      Source("owner/guanaco", name="other")))], default=str))
"""


def test_the_real_libraries_and_a_server_and_then_the_cache_alone(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }

    def ask(offline):
        # A process of its own: the libraries read their settings once, when imported.
        done = subprocess.run(
            [sys.executable, "-c", ASK],
            env=os.environ | settings | {"HF_HUB_OFFLINE": offline},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        assert done.stderr == ""
        return json.loads(done.stdout)

    try:
        online = ask("0")
    finally:
        server.shutdown()
        server.server_close()
    train = [
        [f"owner/guanaco (train): row {n + 1}", {"text": f"### Human: train {n}### Assistant: a"}, None]
        for n in range(3)
    ]
    test = [
        [f"owner/guanaco (test): row {n + 1}", {"text": f"### Human: eval {n}### Assistant: a"}, None] for n in range(2)
    ]
    assert online[:3] == [{"train": "train", "test": "test"}, train, test]
    assert online[3].startswith("owner/unknown: not found on the hub, and no such file here; check the spelling")
    assert online[4].startswith("owner/gated: is gated on the hub; accept its terms at ")
    assert online[5].startswith("owner/guanaco: has no revision 'v9' on the hub; give a branch")
    assert online[6].startswith(
        "owner/guanaco: no configuration 'other', expected one of ['default']; give data.source"
    )
    offline = ask("1")
    assert offline[:3] == online[:3]
    assert offline[3].startswith("owner/unknown: no such file here, and the hub can't be reached; check the network")
