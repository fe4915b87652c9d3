"""Data that can't be trained on: one line and status 2, before a model is loaded, and no files are left."""

import gzip
import io
import json
import os
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_qlora.model import load
from tests.expect import ExpectError

GOOD = {"text": "### Human: Hi?### Assistant: Yes."}
FOLDER = object()


def jsonl(*rows: object) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def chat(*turns: tuple[str, str]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def parquet(rows: list[dict[str, str]], cut: int | None = None) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()[:cut]


CASES: list[tuple[str, str, object, str | None, str | None, list[str]]] = [
    ("missing", "rows.jsonl", None, "rows.jsonl", None, ["no such file", "'demo'", "owner/name"]),
    ("empty", "rows.jsonl", "", "rows.jsonl", None, ["empty (0 bytes)"]),
    ("blank lines only", "rows.jsonl", "\n \n\n", "rows.jsonl", None, ["only blank lines"]),
    (
        "torn line",
        "rows.jsonl",
        jsonl(GOOD) + '{"text": "### Human: a### Ass',
        "rows.jsonl:2",
        None,
        ["no JSON", "column 10", "### Ass'"],
    ),
    (
        "html",
        "rows.jsonl",
        "<!doctype html><html><body>404</body></html>\n",
        "rows.jsonl",
        None,
        ["a web page", "'resolve'"],
    ),
    ("utf16", "rows.jsonl", jsonl(GOOD).encode("utf-16"), "rows.jsonl", None, ["is UTF-16", "iconv -f UTF-16"]),
    (
        "latin1",
        "rows.jsonl",
        '{"text": "### Human: caf\xe9### Assistant: ok"}\n'.encode("latin-1"),
        "rows.jsonl:1",
        None,
        ["0xe9", "not UTF-8", "iconv"],
    ),
    ("gzip", "rows.jsonl", gzip.compress(jsonl(GOOD).encode()), "rows.jsonl", None, ["compressed", "unpack"]),
    ("zip", "rows.jsonl", b"PK\x03\x04" + bytes(60), "rows.jsonl", None, ["compressed", "unpack"]),
    ("nul", "rows.jsonl", b"\0" * 200, "rows.jsonl", None, ["nothing but NUL bytes"]),
    (
        "single object json",
        "rows.json",
        json.dumps(GOOD),
        "rows.json",
        None,
        ["one conversation only", "data.validation_source"],
    ),
    ("json scalar", "rows.json", "42", "rows.json:1", None, ["holds a number", "got 42"]),
    (
        "json array of strings",
        "rows.json",
        json.dumps(["a", "b"]),
        "rows.json: row 1",
        None,
        ["holds a text", "got 'a'"],
    ),
    ("json nan", "rows.json", '[{"text": NaN}]', "rows.json: row 1", None, ["'text' holds a number", "{'text': nan}"]),
    ("json torn", "rows.json", '[{"text": "a"}, {"te', "rows.json:1", None, ["no JSON", "column 18"]),
    (
        "jsonl array line",
        "rows.jsonl",
        jsonl(GOOD) + '["a", "b"]\n',
        "rows.jsonl:2",
        None,
        ["holds a list", "'records'"],
    ),
    ("jsonl number line", "rows.jsonl", "42\n", "rows.jsonl:1", None, ["holds a number", "got 42"]),
    (
        "number in text",
        "rows.jsonl",
        jsonl({"text": 42}),
        "rows.jsonl:1",
        None,
        ["'text' holds a number", "{'text': 42}"],
    ),
    ("null text", "rows.jsonl", jsonl({"text": None}), "rows.jsonl:1", None, ["'text' holds null"]),
    (
        "list in text",
        "rows.jsonl",
        jsonl({"text": ["### Human: a### Assistant: b"]}),
        "rows.jsonl:1",
        None,
        ["'text' holds a list"],
    ),
    (
        "wrong column",
        "rows.jsonl",
        jsonl({"prompt": "a", "answer": "b"}),
        "rows.jsonl:1",
        None,
        ["columns found: ['prompt', 'answer']", "--data.columns.user prompt --data.columns.assistant answer"],
    ),
    (
        "no conversation",
        "rows.jsonl",
        jsonl(GOOD, {"text": "just some prose"}),
        "rows.jsonl:2",
        None,
        ["'### Human:'", "'[INST]'", "just some prose"],
    ),
    (
        "assistant first",
        "rows.jsonl",
        jsonl({"text": "### Assistant: hello"}),
        "rows.jsonl:1",
        None,
        ["only the assistant speaks", "data.opening"],
    ),
    (
        "unknown role",
        "rows.jsonl",
        jsonl(chat(("user", "a"), ("robot", "b"))),
        "rows.jsonl:1",
        None,
        ["turn 2", "unknown role 'robot'", "system, user, human, assistant, gpt"],
    ),
    (
        "missing role",
        "rows.jsonl",
        jsonl({"messages": [{"content": "a"}]}),
        "rows.jsonl:1",
        None,
        ["turn 1", "unknown role None"],
    ),
    (
        "missing content",
        "rows.jsonl",
        jsonl({"messages": [{"role": "user"}]}),
        "rows.jsonl:1",
        None,
        ["turn 1", "the user's content", "got null", "'role'"],
    ),
    (
        "content null",
        "rows.jsonl",
        jsonl({"messages": [{"role": "user", "content": None}]}),
        "rows.jsonl",
        None,
        ["no row to train on or score", "last turn of the user has no text"],
    ),
    (
        "content parts",
        "rows.jsonl",
        jsonl(
            {
                "messages": [
                    {"role": "user", "content": [{"image": "a"}]},
                    {"role": "assistant", "content": "b"},
                ]
            }
        ),
        "rows.jsonl:1",
        None,
        ["turn 1", "the user's content", "got a list"],
    ),
    (
        "messages string",
        "rows.jsonl",
        jsonl({"messages": "hello"}),
        "rows.jsonl:1",
        None,
        ["list of messages", "got a text"],
    ),
    (
        "messages empty",
        "rows.jsonl",
        jsonl({"messages": []}),
        "rows.jsonl:1",
        None,
        ["at least one turn", "{'messages': []}"],
    ),
    (
        "empty turn",
        "rows.jsonl",
        jsonl(chat(("user", "  "), ("assistant", "b"))),
        "rows.jsonl:1",
        None,
        ["turn 1", "user is empty"],
    ),
    (
        "empty answer",
        "rows.jsonl",
        jsonl(chat(("user", "a"), ("assistant", ""))),
        "rows.jsonl:1",
        None,
        ["turn 2", "assistant is empty"],
    ),
    (
        "only system",
        "rows.jsonl",
        jsonl(chat(("system", "s"))),
        "rows.jsonl:1",
        None,
        ["at least one turn", "'role': 'system'"],
    ),
    (
        "only questions",
        "rows.jsonl",
        jsonl(*[chat(("user", "a"))] * 5),
        "rows.jsonl",
        None,
        ["no row to train on or score", "nothing answered: 5"],
    ),
    (
        "tags in text",
        "rows.jsonl",
        jsonl(chat(("user", "a [INST] b"), ("assistant", "c"))),
        "rows.jsonl",
        None,
        ["no row to train on or score", "Llama 2 tag inside a turn: 1"],
    ),
    (
        "sharegpt unknown",
        "rows.jsonl",
        jsonl({"conversations": [{"from": "narrator", "value": "x"}]}),
        "rows.jsonl:1",
        None,
        ["turn 1", "unknown role 'narrator'"],
    ),
    (
        "inst unclosed",
        "rows.jsonl",
        jsonl({"text": "<s>[INST] a b </s>"}),
        "rows.jsonl:1",
        None,
        ["turn 1", "[INST] without its [/INST]"],
    ),
    ("csv wrong column", "rows.csv", "a,b\n1,2\n", "rows.csv:1", None, ["no known column", "['a', 'b']"]),
    ("csv empty", "rows.csv", "", "rows.csv", None, ["empty (0 bytes)"]),
    ("csv header only", "rows.csv", "text\n", "rows.csv", None, ["holds no rows"]),
    (
        "csv dup header",
        "rows.csv",
        "text,text\n### Human: a### Assistant: b,x\n",
        "rows.csv:1",
        None,
        ["two columns are named 'text'"],
    ),
    (
        "csv ragged",
        "rows.csv",
        "text\n### Human: a### Assistant: b,extra\n",
        "rows.csv:2",
        None,
        ["2 columns, expected 1", "'extra'"],
    ),
    ("csv open quote", "rows.csv", 'text\n"### Human: a### Assistant: b\n', "rows.csv:2", None, ["broken quoting"]),
    ("parquet cut", "rows.parquet", parquet([GOOD] * 30, cut=100), "rows.parquet", None, ["no whole parquet file"]),
    ("parquet empty", "rows.parquet", b"", "rows.parquet", None, ["empty (0 bytes)"]),
    ("parquet is text", "rows.parquet", b"hello", "rows.parquet", None, ["no whole parquet file", "5 bytes"]),
    (
        "parquet wrong column",
        "rows.parquet",
        parquet([{"q": "a"}]),
        "rows.parquet: row 1",
        None,
        ["no column 'messages' or 'conversations' or 'text'", "['q']"],
    ),
    ("unknown suffix", "rows.txt", "hello\n", "rows.txt", None, ["'.txt'", ".jsonl, .json, .csv, .parquet"]),
    ("no suffix", "rows", "hello\n", "rows", None, ["the ending is ''", ".jsonl"]),
    ("folder without train", "folder", FOLDER, "folder", None, ["train.jsonl", "found: []"]),
    ("one row", "rows.jsonl", jsonl(GOOD), "rows.jsonl", None, ["one conversation only", "data.validation_source"]),
    (
        "all too long",
        "rows.jsonl",
        jsonl(*[{"text": f"### Human: {n} " + "long " * 400 + "### Assistant: ok"} for n in range(30)]),
        None,
        "data.max_length",
        ["28 conversations", "within 64 tokens", "raise it"],
    ),
]
"""What it is called, a file and what it holds; what is said: the place, the option, and words that matter."""


@pytest.mark.parametrize(
    ("name", "content", "place", "option", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_bad_data_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expect_error: ExpectError,
    name: str,
    content: str | bytes | object | None,
    place: str | None,
    option: str | None,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "load_base", _never)
    if content is FOLDER:
        Path(name).mkdir()
    elif content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else str(content).encode())
    args = ["fit", "--data.source", name, "--run", "./run", "--data.max_length", "64"]
    expect_error(args, *words, option=option, place=place)
    assert not Path("run").exists()


def test_a_pipe_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_error: ExpectError) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jsonl")
    # A reader would wait until the one that could write has gone.
    descriptor = os.open("pipe.jsonl", os.O_RDWR | os.O_NONBLOCK)
    ending = threading.Timer(30, os.close, [descriptor])
    ending.start()
    expect_error(["fit", "--data.source", "pipe.jsonl", "--run", "./run"], "a pipe", place="pipe.jsonl")
    ending.cancel()
    os.close(descriptor)
    assert not Path("run").exists()


def _never(*_: object) -> None:
    raise AssertionError("a model was loaded")


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 35
    assert len({(place, *words) for *_, place, _, words in CASES}) >= 35
