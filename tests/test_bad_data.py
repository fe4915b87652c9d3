"""Data that can't be trained on: each ends in one line and status 2, before a model is loaded, and leaves nothing behind."""

# ruff: noqa: E501  # a message is shown as the user reads it: in one line
import gzip
import io
import json
import os
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_qlora.cli import main
from lit_qlora.model import load

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


CASES: list[tuple[str, str, object, str]] = [
    (
        "missing",
        "rows.jsonl",
        None,
        "rows.jsonl: no such file; expected 'demo', a file (.jsonl, .json, .csv, .parquet), a folder with train.jsonl, or a hub id such as owner/name",
    ),
    (
        "empty",
        "rows.jsonl",
        "",
        "rows.jsonl: is empty (0 bytes); check how it was made, or download it again",
    ),
    (
        "blank lines only",
        "rows.jsonl",
        "\n \n\n",
        "rows.jsonl: holds only blank lines; check how it was made, or download it again",
    ),
    (
        "torn line",
        "rows.jsonl",
        jsonl(GOOD) + '{"text": "### Human: a### Ass',
        'rows.jsonl:2: no JSON (Unterminated string starting at column 10), expected whole objects, got \'{"text": "### Human: a### Ass\'; mend or delete the line',
    ),
    (
        "html",
        "rows.jsonl",
        "<!doctype html><html><body>404</body></html>\n",
        "rows.jsonl: is a web page, not data; download the file itself ('resolve' in its link, not 'blob')",
    ),
    (
        "utf16",
        "rows.jsonl",
        jsonl(GOOD).encode("utf-16"),
        "rows.jsonl: is UTF-16, expected UTF-8; save it again as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    ),
    (
        "latin1",
        "rows.jsonl",
        '{"text": "### Human: caf\xe9### Assistant: ok"}\n'.encode("latin-1"),
        "rows.jsonl:1: byte 0xe9 is not UTF-8; convert the file from the encoding it was saved in (such as iconv -f WINDOWS-1252 -t UTF-8)",
    ),
    (
        "gzip",
        "rows.jsonl",
        gzip.compress(jsonl(GOOD).encode()),
        "rows.jsonl: is compressed in spite of its ending; unpack it first",
    ),
    (
        "zip",
        "rows.jsonl",
        b"PK\x03\x04" + bytes(60),
        "rows.jsonl: is compressed in spite of its ending; unpack it first",
    ),
    (
        "nul",
        "rows.jsonl",
        b"\0" * 200,
        "rows.jsonl: holds nothing but NUL bytes: it was cut off while it was written; copy it again",
    ),
    (
        "single object json",
        "rows.json",
        json.dumps(GOOD),
        "rows.json: has one conversation only, so none can be held out; add rows, or give data.validation_source",
    ),
    (
        "json scalar",
        "rows.json",
        "42",
        'rows.json:1: holds a number, expected an object such as {"text": "### Human: …### Assistant: …"}, got 42; mend or delete it',
    ),
    (
        "json array of strings",
        "rows.json",
        json.dumps(["a", "b"]),
        'rows.json: row 1: holds a text, expected an object such as {"text": "### Human: …### Assistant: …"}, got \'a\'; mend or delete it',
    ),
    (
        "json nan",
        "rows.json",
        '[{"text": NaN}]',
        "rows.json: row 1: column 'text' holds a number, expected text; got {'text': nan}; mend or delete this row",
    ),
    (
        "json torn",
        "rows.json",
        '[{"text": "a"}, {"te',
        'rows.json:1: no JSON (Unterminated string starting at column 18), expected whole objects, got \'[{"text": "a"}, {"te\'; mend the file there',
    ),
    (
        "jsonl array line",
        "rows.jsonl",
        jsonl(GOOD) + '["a", "b"]\n',
        "rows.jsonl:2: holds a list, expected an object such as {\"text\": \"### Human: …### Assistant: …\"}, got ['a', 'b']; mend or delete it",
    ),
    (
        "jsonl number line",
        "rows.jsonl",
        "42\n",
        'rows.jsonl:1: holds a number, expected an object such as {"text": "### Human: …### Assistant: …"}, got 42; mend or delete it',
    ),
    (
        "number in text",
        "rows.jsonl",
        jsonl({"text": 42}),
        "rows.jsonl:1: column 'text' holds a number, expected text; got {'text': 42}; mend or delete this row",
    ),
    (
        "null text",
        "rows.jsonl",
        jsonl({"text": None}),
        "rows.jsonl:1: column 'text' holds null, expected text; got {'text': None}; mend or delete this row",
    ),
    (
        "list in text",
        "rows.jsonl",
        jsonl({"text": ["### Human: a### Assistant: b"]}),
        "rows.jsonl:1: column 'text' holds a list, expected text; got {'text': ['### Human: a### Assistant: b']}; mend or delete this row",
    ),
    (
        "wrong column",
        "rows.jsonl",
        jsonl({"prompt": "a", "answer": "b"}),
        'rows.jsonl:1: a form of questions and answers (prompt, answer) is not read; got {\'prompt\': \'a\', \'answer\': \'b\'}; write each row as {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
    ),
    (
        "no conversation",
        "rows.jsonl",
        jsonl(GOOD, {"text": "just some prose"}),
        "rows.jsonl:2: column 'text' has neither '### Human:' nor '[INST]', expected a conversation; got {'text': 'just some prose'}; mend or delete this row",
    ),
    (
        "assistant first",
        "rows.jsonl",
        jsonl({"text": "### Assistant: hello### Human: hi"}),
        "rows.jsonl:1: turn 1 is the assistant's, expected the user's; got {'text': '### Assistant: hello### Human: hi'}; mend or delete this row",
    ),
    (
        "two humans",
        "rows.jsonl",
        jsonl(chat(("user", "a"), ("user", "b"), ("assistant", "c"))),
        "rows.jsonl:1: turns 1 and 2 are both the user's; join the two into one; got {'messages': [{'role': 'user', 'content': 'a'}, {'role': 'user', 'content': 'b'…; mend or delete this row",
    ),
    (
        "unknown role",
        "rows.jsonl",
        jsonl(chat(("user", "a"), ("robot", "b"))),
        "rows.jsonl:1: turn 2: unknown role 'robot', expected one of system, user, human, assistant, gpt; got {'messages': [{'role': 'user', 'content': 'a'}, {'role': 'robot', 'content': 'b…; mend or delete this row",
    ),
    (
        "missing role",
        "rows.jsonl",
        jsonl({"messages": [{"content": "a"}]}),
        "rows.jsonl:1: turn 1: unknown role None, expected one of system, user, human, assistant, gpt; got {'messages': [{'content': 'a'}]}; mend or delete this row",
    ),
    (
        "missing content",
        "rows.jsonl",
        jsonl({"messages": [{"role": "user"}]}),
        "rows.jsonl:1: turn 1: the user's content is text, got NoneType; got {'messages': [{'role': 'user'}]}; mend or delete this row",
    ),
    (
        "content null",
        "rows.jsonl",
        jsonl({"messages": [{"role": "user", "content": None}]}),
        "rows.jsonl:1: turn 1: the user's content is text, got NoneType; got {'messages': [{'role': 'user', 'content': None}]}; mend or delete this row",
    ),
    (
        "content parts",
        "rows.jsonl",
        jsonl(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}]},
                    {"role": "assistant", "content": "b"},
                ]
            }
        ),
        "rows.jsonl:1: turn 1: the user's content is text, got list; got {'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'a'}]}, {'r…; mend or delete this row",
    ),
    (
        "messages string",
        "rows.jsonl",
        jsonl({"messages": "hello"}),
        "rows.jsonl:1: expected a list of messages, got str; got {'messages': 'hello'}; mend or delete this row",
    ),
    (
        "messages empty",
        "rows.jsonl",
        jsonl({"messages": []}),
        "rows.jsonl:1: a conversation needs at least one turn; got {'messages': []}; mend or delete this row",
    ),
    (
        "empty turn",
        "rows.jsonl",
        jsonl(chat(("user", "  "), ("assistant", "b"))),
        "rows.jsonl:1: turn 1: a turn of the user is empty; got {'messages': [{'role': 'user', 'content': '  '}, {'role': 'assistant', 'content…; mend or delete this row",
    ),
    (
        "empty answer",
        "rows.jsonl",
        jsonl(chat(("user", "a"), ("assistant", ""))),
        "rows.jsonl:1: turn 2: a turn of the assistant is empty; got {'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content'…; mend or delete this row",
    ),
    (
        "system late",
        "rows.jsonl",
        jsonl(chat(("user", "a"), ("assistant", "b"), ("system", "s"))),
        "rows.jsonl:1: turn 3: the system speaks, which it may only before the first turn; got {'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content'…; mend or delete this row",
    ),
    (
        "only system",
        "rows.jsonl",
        jsonl(chat(("system", "s"))),
        "rows.jsonl:1: a conversation needs at least one turn; got {'messages': [{'role': 'system', 'content': 's'}]}; mend or delete this row",
    ),
    (
        "only questions",
        "rows.jsonl",
        jsonl(*[chat(("user", "a"))] * 5),
        "rows.jsonl: nothing to train on (rows left out: nothing answered: 5); expected conversations that end on an answer",
    ),
    (
        "tags in text",
        "rows.jsonl",
        jsonl(chat(("user", "a [INST] b"), ("assistant", "c"))),
        "rows.jsonl: nothing to train on (rows left out: a Llama 2 tag inside a turn: 1); expected conversations that end on an answer",
    ),
    (
        "sharegpt unknown",
        "rows.jsonl",
        jsonl({"conversations": [{"from": "narrator", "value": "x"}]}),
        "rows.jsonl:1: turn 1: unknown role 'narrator', expected one of system, user, human, assistant, gpt; got {'conversations': [{'from': 'narrator', 'value': 'x'}]}; mend or delete this row",
    ),
    (
        "inst unclosed",
        "rows.jsonl",
        jsonl({"text": "<s>[INST] a b </s>"}),
        "rows.jsonl:1: turn 1: [INST] without its [/INST]; got {'text': '<s>[INST] a b </s>'}; mend or delete this row",
    ),
    (
        "csv wrong column",
        "rows.csv",
        "a,b\n1,2\n",
        "rows.csv:1: no column 'text', columns found: ['a', 'b']; the first line of a .csv names the columns",
    ),
    (
        "csv empty",
        "rows.csv",
        "",
        "rows.csv: is empty (0 bytes); check how it was made, or download it again",
    ),
    (
        "csv header only",
        "rows.csv",
        "text\n",
        'rows.csv: holds no rows, expected some such as {"text": "### Human: …### Assistant: …"}; check how it was made',
    ),
    (
        "csv dup header",
        "rows.csv",
        "text,text\n### Human: a### Assistant: b,x\n",
        "rows.csv:1: two columns are named 'text'; rename or remove one",
    ),
    (
        "csv ragged",
        "rows.csv",
        "text\n### Human: a### Assistant: b,extra\n",
        "rows.csv:2: 2 columns, expected 1 as in the first line, got ['### Human: a### Assistant: b', 'extra']; put quotes around texts that hold commas",
    ),
    (
        "csv open quote",
        "rows.csv",
        'text\n"### Human: a### Assistant: b\n',
        "rows.csv:2: broken quoting (unexpected end of data); double every quote inside a quoted text",
    ),
    (
        "parquet cut",
        "rows.parquet",
        parquet([GOOD] * 30, cut=100),
        "rows.parquet: no whole parquet file (Could not open Parquet input source '<Buffer>': Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file.); it may be cut short, download it again",
    ),
    (
        "parquet empty",
        "rows.parquet",
        b"",
        "rows.parquet: is empty (0 bytes); check how it was made, or download it again",
    ),
    (
        "parquet is text",
        "rows.parquet",
        b"hello",
        "rows.parquet: no whole parquet file (Could not open Parquet input source '<Buffer>': Parquet file size is 5 bytes, smaller than the minimum file footer (8 bytes)); it may be cut short, download it again",
    ),
    (
        "parquet wrong column",
        "rows.parquet",
        parquet([{"q": "a"}]),
        "rows.parquet: row 1: no column 'messages' or 'conversations' or 'text', columns found: ['q']; got {'q': 'a'}; write rows such as {\"text\": \"### Human: …### Assistant: …\"}",
    ),
    (
        "unknown suffix",
        "rows.txt",
        "hello\n",
        "rows.txt: the ending is '.txt', expected one of .jsonl, .json, .csv, .parquet; convert the file",
    ),
    (
        "no suffix",
        "rows",
        "hello\n",
        "rows: the ending is '', expected one of .jsonl, .json, .csv, .parquet; convert the file",
    ),
    (
        "folder without train",
        "folder",
        FOLDER,
        "folder: no train, validation or test file in this folder, expected train.jsonl (.jsonl, .json, .csv, .parquet), found: []; put one there, or name the file itself",
    ),
    (
        "one row",
        "rows.jsonl",
        jsonl(GOOD),
        "rows.jsonl: has one conversation only, so none can be held out; add rows, or give data.validation_source",
    ),
    (
        "all too long",
        "rows.jsonl",
        jsonl(*[{"text": f"### Human: {n} " + "long " * 400 + "### Assistant: ok"} for n in range(30)]),
        "data.source: of 28 conversations in rows.jsonl none has an answer within data.max_length=64 tokens; raise it",
    ),
]


@pytest.mark.parametrize(("name", "content", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_data_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str | bytes | object | None,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "load_base", _never)
    if content is FOLDER:
        Path(name).mkdir()
    elif content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else str(content).encode())
    assert main(["fit", "--data.source", name, "--run", "./run", "--data.max_length", "64"]) == 2
    assert capsys.readouterr().err == f"error: {expected}\n"
    assert not Path("run").exists()


def test_a_pipe_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jsonl")
    # A reader would wait until the one that could write has gone.
    descriptor = os.open("pipe.jsonl", os.O_RDWR | os.O_NONBLOCK)
    ending = threading.Timer(30, os.close, [descriptor])
    ending.start()
    assert main(["fit", "--data.source", "pipe.jsonl", "--run", "./run"]) == 2
    ending.cancel()
    os.close(descriptor)
    assert capsys.readouterr().err == (
        "error: pipe.jsonl: is a folder, a pipe or a device, expected a file; write the rows into one\n"
    )
    assert not Path("run").exists()


def _never(*_: object) -> None:
    raise AssertionError("a model was loaded")


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 35
    assert len({message for *_, message in CASES}) >= 35
