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
from lit_qlora.data.files import Row
from lit_qlora.data.sources import find_splits, read_source
from lit_qlora.errors import UserError

A_SOURCE = (
    "expected 'demo', a file (.jsonl, .json, .csv, .parquet), a folder with train.jsonl, or a hub id such as owner/name"
)


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


def test_two_names_of_one_split_are_refused():
    for name in ("train.jsonl", "val.jsonl", "validation.jsonl"):
        write(f"mine/{name}")
    with pytest.raises(UserError, match=r"^mine: holds both val.jsonl and validation.jsonl, expected one; keep one"):
        find_splits("mine")


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


def test_a_set_of_the_hub_without_training_rows_is_one_line(monkeypatch, expect_error):
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda source: ["en", "de"])
    expect_error(lambda: find_splits("owner/name").training(), "no split 'train'", "en and de", place="owner/name")


@pytest.mark.parametrize(
    ("files", "remedy"),
    [
        (["data/train-00000-of-00001.parquet"], "give mine/data"),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            "put the parts of a split, such as data/train-00000-of-00002.parquet, together in one file, and name it",
        ),
        (["data/train.jsonl", "data/test.jsonl"], "give mine/data"),
        (["notes.md"], "put one there, or name the file itself"),
    ],
)
def test_a_folder_without_splits_says_what_to_do(files, remedy):
    for name in files:
        write(f"mine/{name}")
    with pytest.raises(UserError) as caught:
        find_splits("mine")
    assert str(caught.value).endswith(remedy)


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
    ("source", "message"),
    [
        ("rows.jsnl", f"rows.jsnl: no such file, did you mean 'rows.jsonl'?; {A_SOURCE}"),
        ("zzz.csv", f"zzz.csv: no such file; {A_SOURCE}"),
        ("data/rows.jsonl", f"data/rows.jsonl: no such file; {A_SOURCE}"),
        ("data/rows.txt", f"data/rows.txt: no such file; {A_SOURCE}"),
        ("./data/rows", f"./data/rows: no such file; {A_SOURCE}"),
        ("../rows", f"../rows: no such file; {A_SOURCE}"),
        ("a/b/c", f"a/b/c: no such file; {A_SOURCE}"),
        ("Demo", f"Demo: no such file; {A_SOURCE}"),
        (
            "https://huggingface.co/datasets/a/b",
            f"https://huggingface.co/datasets/a/b: no such file; {A_SOURCE}",
        ),
        ("", "data.source: is '', expected 'demo', a file, a folder or a hub id"),
        ("a\nb", "data.source: is 'a\\nb', expected 'demo', a file, a folder or a hub id"),
        (
            "useless",
            "useless: no train, validation or test file in this folder, expected train.jsonl (.jsonl, .json, .csv,"
            " .parquet), found: ['README.md', 'rows.jsonl']; rename yours, or name the file itself, such as"
            " useless/rows.jsonl",
        ),
        ("twice", "twice: holds both train.csv and train.jsonl, expected one; keep one of them"),
        ("half", "half: has no split 'train', found: test; choose another"),
    ],
)
def test_a_source_that_is_not_there_is_one_line(source, message):
    for name in (
        "rows.jsonl",
        "useless/rows.jsonl",
        "useless/README.md",
        "twice/train.csv",
        "twice/train.jsonl",
        "half/test.jsonl",
    ):
        write(name)
    with pytest.raises(UserError) as caught:
        read_source(source, "train")
    assert str(caught.value) == message
    assert "\n" not in message


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


NOT_FOUND = datasets.exceptions.DatasetNotFoundError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            NOT_FOUND("Dataset 'owner/name' doesn't exist on the Hub or cannot be accessed."),
            "owner/name: not found on the hub, and no such file here; check the spelling,"
            " or set HF_TOKEN if it's private",
        ),
        (
            NOT_FOUND("Dataset 'owner/name' is a gated dataset on the Hub. You must be authenticated to access it."),
            "owner/name: is gated on the hub; accept its terms at https://huggingface.co/datasets/owner/name"
            " and set HF_TOKEN",
        ),
        (
            ConnectionError("Couldn't reach 'owner/name' on the Hub (LocalEntryNotFoundError)"),
            "owner/name: no such file here, and the hub can't be reached; check the network"
            " (and HF_HUB_OFFLINE), or give a local file",
        ),
        (
            ValueError("Unknown split \"train\". Should be one of ['test'].\nMore."),
            "owner/name: the hub's files can't be loaded (ValueError: Unknown split \"train\"."
            " Should be one of ['test'].); see https://huggingface.co/datasets/owner/name",
        ),
    ],
)
def test_what_goes_wrong_on_the_hub_is_one_line(error, message, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    for call in (read_source, find_splits):
        with pytest.raises(UserError) as caught:
            call("owner/name")
        assert str(caught.value) == message
        assert "\n" not in message


def test_offline_is_said_by_the_real_library(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"^no-such-owner/no-such-name: no such file here, and the hub can't be reached"
    ):
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
        if path.startswith("/api/datasets/owner/guanaco/tree/"):
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
from lit_qlora.data.sources import find_splits, read_source
from lit_qlora.errors import UserError
from lit_qlora.quiet import quieten

quieten()
datasets.disable_progress_bars()


def ask(question, *words):
    try:
        return question(*words)
    except UserError as error:
        return str(error)


known = ask(find_splits, "owner/guanaco")
print(json.dumps([known.names, *(ask(read_source, "owner/guanaco", split) for split in ("train", "test")),
                  ask(find_splits, "owner/unknown")]))
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
    offline = ask("1")
    assert offline[:3] == online[:3]
    assert offline[3].startswith("owner/unknown: no such file here, and the hub can't be reached; check the network")
