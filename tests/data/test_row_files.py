import bz2
import gzip
import io
import lzma
from pathlib import Path

import pandas
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from lit_qlora.data.forms import columns_of, forms_for
from lit_qlora.data.row_files import Row, read_rows, split_place
from lit_qlora.errors import UserError

GOOD = b'{"text": "### Human: hi### Assistant: yo"}\n'
HI = {"text": "### Human: hi### Assistant: yo"}
BY_ROWS = "write each row with the names of its columns (with pandas: to_json(…, orient='records'))"
OBJECT = 'expected an object such as {"question": "…", "answer": "…"}'
NO_ROWS = 'holds no rows, expected some such as {"question": "…", "answer": "…"}; check how it was made'
UTF16 = "is UTF-16, expected UTF-8; save it again as UTF-8 (iconv -f UTF-16 -t UTF-8 a.{0} > a-utf8.{0})"
COLUMNS = columns_of(forms_for("training"))
BY_COLUMNS = (
    "a.json: is written by columns, expected a list of rows, got {}; write it by rows (with pandas: to_json(…,"
    " orient='records'))"
)
WEB_PAGE = "is a web page, not data; download the file itself ('resolve' in its link, not 'blob')"
NAME_IT = 'name it after what it holds, such as rows.jsonl, or write each text as a row {"text": "…"}'
CONVERT = (
    "convert the file from the encoding it was saved in, such as iconv -f WINDOWS-1252 -t UTF-8 a.{0} > a-utf8.{0}"
)
CUT_SHORT = "it may be cut short, download it again"


def parquet(rows: list[dict]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


ROWS = [{"text": "a", "id": 1}, {"text": "b", "id": 2}]
FRAME = pandas.DataFrame(ROWS)
OTHER = FRAME.rename(columns={"text": "Frage", "id": "Antwort"})


@pytest.mark.parametrize("orient", ["records", "index", "split", "table"])
@pytest.mark.parametrize("frame", [FRAME, FRAME[:1], OTHER], ids=["two rows", "one row", "other columns"])
def test_what_pandas_writes_by_rows_is_read(orient, frame):
    frame.to_json("a.json", orient=orient)
    found = [
        {name: one for name, one in row.value.items() if name != "index"} for row in read_rows(Path("a.json"), COLUMNS)
    ]
    assert found == frame.to_dict("records")


@pytest.mark.parametrize("frame", [FRAME, FRAME[:1], OTHER], ids=["two rows", "one row", "other columns"])
def test_what_pandas_writes_by_columns_is_refused(frame, expect_error):
    frame.to_json("a.json", orient="columns")
    expect_error(lambda: read_rows(Path("a.json"), COLUMNS), "by columns", "orient='records'", place="a.json")


BAD_FILES = {
    "empty": ("a.jsonl", b"", "a.jsonl: is empty (0 bytes); check how it was made, or download it again"),
    "blank lines": (
        "a.jsonl",
        b"\n \r\n\n",
        "a.jsonl: holds only blank lines; check how it was made, or download it again",
    ),
    "torn line": (
        "a.jsonl",
        GOOD + b'{"text": "### Hum',
        "a.jsonl:2: no JSON (Unterminated string starting at column 10), expected whole objects,"
        ' got \'{"text": "### Hum\'; mend or delete the line',
    ),
    "torn over several lines": (
        "a.jsonl",
        b'{\n  "text": "x"\n}\n{\n  "text": "y"\n  "more": 1\n}\n',
        "a.jsonl:6: no JSON (Expecting ',' delimiter at column 3), expected whole objects, got '  \"more\": 1';"
        " mend the file there",
    ),
    "a name twice": (
        "a.jsonl",
        GOOD + b'{"text": "x", "text": "y"}',
        "a.jsonl:2: no JSON (two values are named 'text' in one object), expected whole objects,"
        ' got \'{"text": "x", "text": "y"}\'; mend or delete the line',
    ),
    "line is a list": (
        "a.jsonl",
        GOOD + b'["a", 1]',
        f"a.jsonl:2: holds a list, {OBJECT}, got ['a', 1]; {BY_ROWS}",
    ),
    "lists of texts": (
        "a.json",
        b'[["a", "b"], ["c", "d"]]',
        f"a.json: row 1: holds a list, {OBJECT}, got ['a', 'b']; {BY_ROWS}",
    ),
    "line is a number": (
        "a.jsonl",
        b"\r\n\n42",
        f"a.jsonl:3: holds a number, {OBJECT}, got 42; mend or delete it",
    ),
    "line is a text": ("a.jsonl", b'"hi"', f"a.jsonl:1: holds a text, {OBJECT}, got 'hi'; mend or delete it"),
    "line is null": ("a.jsonl", b"null", f"a.jsonl:1: holds null, {OBJECT}, got None; mend or delete it"),
    "columns of texts": ("a.json", b'{"text": ["hi", "yo"]}', BY_COLUMNS.format("{'text': ['hi', 'yo']}")),
    "columns of messages": (
        "a.json",
        b'{"id": [1, 2], "messages": [[], [{"role": "user"}]]}',
        BY_COLUMNS.format("{'id': [1, 2], 'messages': [[], [{'role': 'user'}]]}"),
    ),
    "columns as pandas has them": ("a.json", b'{"text": {"0": "hi"}}', BY_COLUMNS.format("{'text': {'0': 'hi'}}")),
    "columns of another form": (
        "a.json",
        b'{"instruction": {"0": "a"}, "output": {"0": "b"}}',
        BY_COLUMNS.format("{'instruction': {'0': 'a'}, 'output': {'0': 'b'}}"),
    ),
    "splits in one file": (
        "a.json",
        b'{"train": [{"text": "hi"}], "test": [{"text": "yo"}]}',
        "a.json: holds lists under 'train' and 'test', expected one list of rows; write each into a file of its own,"
        " such as train.json and test.json in one folder",
    ),
    "torn .json": (
        "a.json",
        b'[\n{"text": "a"},\n{"text": ',
        "a.json:3: no JSON (Expecting value at column 10), expected whole objects, got '{\"text\": ';"
        " mend the file there",
    ),
    "scalar .json": ("a.json", b"3", f"a.json:1: holds a number, {OBJECT}, got 3; mend or delete it"),
    "texts in .json": (
        "a.json",
        b'[{"text": "x"}, "a"]',
        f"a.json: row 2: holds a text, {OBJECT}, got 'a'; mend or delete it",
    ),
    "empty list": ("a.json", b"[]", f"a.json: {NO_ROWS}"),
    "web page": ("a.jsonl", b"<!DOCTYPE html>\n<html>", f"a.jsonl: {WEB_PAGE}"),
    "web page as parquet": ("a.parquet", b"\n<html lang='en'>", f"a.parquet: {WEB_PAGE}"),
    "git-LFS pointer": (
        "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a.parquet: is a git-LFS pointer, not the file itself; run 'git lfs pull' where it was cloned",
    ),
    "csv quote": (
        "a.csv",
        b'text\n"fine"\n"say "hi" to"\n',
        "a.csv:3: broken quoting (',' expected after '\"'); double every quote inside a quoted text",
    ),
    "csv open quote": (
        "a.csv",
        b'text\n"two\nlines"\n"never closed\n',
        "a.csv:4: broken quoting (unexpected end of data); double every quote inside a quoted text",
    ),
    "csv without header": (
        "a.csv",
        b"### Human: hi### Assistant: yo\n",
        "a.csv:1: no known column, columns found: ['### Human: hi### Assistant: yo'];"
        " the first line of a .csv names the columns; give other names with data.columns, or columns of predict",
    ),
    "csv header only": ("a.csv", b"text\n", f"a.csv: {NO_ROWS}"),
    "csv loose comma": (
        "a.csv",
        b"id,text\n1,hi\n2,hi, you\n",
        "a.csv:3: 3 columns, expected 2 as in the first line, got ['2', 'hi', ' you'];"
        " put quotes around texts that hold commas",
    ),
    "csv loose semicolon": (
        "a.csv",
        b"id;text\n1;hi; you\n",
        "a.csv:2: 3 columns, expected 2 as in the first line, got ['1', 'hi', ' you'];"
        " put quotes around texts that hold semicolons",
    ),
    "csv short row": (
        "a.csv",
        b"id,text\n1\n",
        "a.csv:2: 1 columns, expected 2 as in the first line, got ['1']; put quotes around texts that hold commas",
    ),
    "parquet without rows": ("a.parquet", parquet([]), f"a.parquet: {NO_ROWS}"),
    "a kind of archive": (
        "a.jsonl.zip",
        b"PK\x03\x04",
        "a.jsonl.zip: is compressed, expected one of .jsonl, .json, .csv, .parquet; unpack it first",
    ),
    "packed archive": (
        "a.tar.gz",
        b"\x1f\x8b\x08",
        "a.tar.gz: is compressed, expected one of .jsonl, .json, .csv, .parquet; unpack it first",
    ),
    "packed pointer": (
        "a.jsonl.gz",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a.jsonl.gz: is a git-LFS pointer, not the file itself; run 'git lfs pull' where it was cloned",
    ),
    "packed emptiness": (
        "a.jsonl.gz",
        gzip.compress(b""),
        "a.jsonl.gz: is empty (0 bytes); check how it was made, or download it again",
    ),
    "packed web page": ("a.jsonl.gz", gzip.compress(b"<!DOCTYPE html>\n<html>"), f"a.jsonl.gz: {WEB_PAGE}"),
    "secretly packed": (
        "a.jsonl",
        bz2.compress(b"{}"),
        "a.jsonl: is compressed in spite of its ending; unpack it first",
    ),
    "secretly parquet": (
        "a.jsonl",
        parquet([{"text": "x"}]),
        "a.jsonl: is a .parquet file in spite of its ending; rename it",
    ),
    "secretly compressed": (
        "a.jsonl",
        b"\x1f\x8b\x08",
        "a.jsonl: is compressed in spite of its ending; unpack it first",
    ),
    "unknown ending": (
        "a.txt",
        GOOD,
        f"a.txt: the ending is '.txt', expected one of .jsonl, .json, .csv, .parquet; {NAME_IT}",
    ),
    "a table": (
        "a.xlsx",
        GOOD,
        "a.xlsx: the ending is '.xlsx', expected one of .jsonl, .json, .csv, .parquet; save it as .csv, in UTF-8",
    ),
    "another ending": (
        "a.yaml",
        GOOD,
        "a.yaml: the ending is '.yaml', expected one of .jsonl, .json, .csv, .parquet; convert the file",
    ),
    "no ending": (
        "a",
        GOOD,
        f"a: the ending is '', expected one of .jsonl, .json, .csv, .parquet; {NAME_IT}",
    ),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), f"a.jsonl: {UTF16.format('jsonl')}"),
    "UTF-16 without mark": ("a.csv", "text\nhi".encode("utf-16-be"), f"a.csv: {UTF16.format('csv')}"),
    "UTF-32": ("a.jsonl", GOOD.decode().encode("utf-32"), f"a.jsonl: {UTF16.format('jsonl').replace('16', '32')}"),
    "UTF-32 without mark": (
        "a.csv",
        "text\nhi".encode("utf-32-be"),
        f"a.csv: {UTF16.format('csv').replace('16', '32')}",
    ),
    "Latin-1": (
        "a.jsonl",
        GOOD + b'{"text": "caf\xe9"}',
        f"a.jsonl:2: byte 0xe9 is not UTF-8; {CONVERT.format('jsonl')}",
    ),
    "Windows-1252 after a mark": (
        "a.csv",
        b"\xef\xbb\xbftext\n\n\x93hi\x94\n",
        f"a.csv:3: byte 0x93 is not UTF-8; {CONVERT.format('csv')}",
    ),
    "NUL": (
        "a.jsonl",
        GOOD + b"\0\0\0\0",
        "a.jsonl:2: holds a NUL byte, expected UTF-8 text; it's damaged or binary, copy it again",
    ),
}


@pytest.mark.parametrize(("name", "data", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_line_that_says_where_and_what_to_do(name, data, message):
    Path(name).write_bytes(data)
    assert first_fault(name) == message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ('[{"text": "a"},]', "take out the comma before ]"),
        ('[\n{"text": "a",\n}\n]', "take out the comma before }"),
        ('{"text": "a"},\n{"text": "b"},\n', "take out the comma behind it, or put [ and ] around all"),
        ("{'text': 'a'}\n{'text': 'b'}\n", "write \" in place of ' around names and texts, as json.dumps does"),
        ('{"text": ,"a": {}}', "mend the file there"),
    ],
)
def test_a_common_slip_in_json_is_named(text, remedy):
    Path("a.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_rows(Path("a.json"), COLUMNS)
    assert caught.value.remedy == remedy


def first_fault(name: str) -> str:
    """The first fault of a file or of a row in it."""
    try:
        rows = read_rows(Path(name), COLUMNS)
    except UserError as error:
        return str(error)
    return str(next(row.fault for row in rows if row.fault))


@pytest.mark.parametrize("data", [parquet([{"text": "hi"}])[:-20], GOOD, b"PAR1"], ids=["cut", "lines", "stub"])
def test_a_parquet_file_that_is_not_whole(data):
    Path("a.parquet").write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_rows(Path("a.parquet"), COLUMNS)
    message = str(caught.value)
    assert message.startswith("a.parquet: no whole parquet file (")
    assert message.endswith(f"; {CUT_SHORT}")
    assert "\n" not in message


def test_brackets_without_end():
    Path("a.jsonl").write_bytes(b"[" * 200_000)
    with pytest.raises(UserError, match=r"^a\.jsonl:1: no JSON \(maximum recursion depth .*$") as caught:
        read_rows(Path("a.jsonl"), COLUMNS)
    assert len(str(caught.value)) < 400


def test_a_file_that_may_not_be_read(monkeypatch, expect_error):
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    expect_error(
        lambda: read_rows(Path("a.jsonl"), COLUMNS),
        "Permission denied",
        place="a.jsonl",
    )


GOOD_FILES = {
    "lines": ("a.jsonl", b'{"a": 1}\n\n{"a": 2}', [("a.jsonl:1", {"a": 1}), ("a.jsonl:3", {"a": 2})]),
    "Windows lines": (
        "a.jsonl",
        b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n',
        [("a.jsonl:1", {"a": 1}), ("a.jsonl:3", {"a": 2})],
    ),
    "odd line ends inside": (
        "a.JSONL",
        '{"a": "x\u2028\x85y"}'.encode(),
        [("a.JSONL:1", {"a": "x\u2028\x85y"})],
    ),
    "list": ("a.json", b'[{"a": 1},\n{"a": 2}]', [("a.json: row 1", {"a": 1}), ("a.json: row 2", {"a": 2})]),
    "list under a key": ("a.json", b'{"data": [{"a": 1}]}', [("a.json: row 1", {"a": 1})]),
    "list under a key beside others": (
        "a.json",
        b'{"version": "1", "authors": ["x"], "data": [{"a": 1}]}',
        [("a.json: row 1", {"a": 1})],
    ),
    "the list that holds rows": (
        "a.json",
        b'{"features": [{"name": "text"}], "rows": [{"text": "hi"}]}',
        [("a.json: row 1", {"text": "hi"})],
    ),
    "list under keys": ("a.json", b'{"data": {"train": [{"a": 1}]}}', [("a.json: row 1", {"a": 1})]),
    "list under a key in .jsonl": ("a.jsonl", b'{"data": [{"a": 1}]}\n', [("a.jsonl: row 1", {"a": 1})]),
    "each row under a name": (
        "a.json",
        b'{"x": {"text": "hi"}, "y": {"text": "yo"}}',
        [("a.json: row 1", {"text": "hi"}), ("a.json: row 2", {"text": "yo"})],
    ),
    "single row of another form": (
        "a.jsonl",
        b'{"prompt": "a", "chosen": [{"role": "user"}], "rejected": [{"role": "user"}]}',
        [("a.jsonl:1", {"prompt": "a", "chosen": [{"role": "user"}], "rejected": [{"role": "user"}]})],
    ),
    "single object": (
        "a.json",
        b'\n{"messages": [{"role": "user"}]}',
        [("a.json:2", {"messages": [{"role": "user"}]})],
    ),
    "lines in .json": ("a.json", GOOD + GOOD, [("a.json:1", HI), ("a.json:2", HI)]),
    "pretty list in .jsonl": ("a.jsonl", b'[\n  {"text": "x"}\n]\n', [("a.jsonl: row 1", {"text": "x"})]),
    "objects over several lines": (
        "a.jsonl",
        b'{\r\n  "a": 1\r\n}\r\n{\r\n  "a": {"b": "}\\n{"}\r\n}\r\n',
        [("a.jsonl:1", {"a": 1}), ("a.jsonl:4", {"a": {"b": "}\n{"}})],
    ),
    "two objects on a line": ("a.jsonl", b'{"a": 1} {"a": 2}', [("a.jsonl:1", {"a": 1}), ("a.jsonl:1", {"a": 2})]),
    "csv": (
        "a.csv",
        b'\n"text",id\r\n"two\r\nlines",1\r\n\r\n"say ""hi"", you",2\r\n',
        [
            ("a.csv:3", {"text": "two\r\nlines", "id": "1"}),
            ("a.csv:6", {"text": 'say "hi", you', "id": "2"}),
        ],
    ),
    "csv of another form": ("a.csv", b"instruction,output\na,b\n", [("a.csv:2", {"instruction": "a", "output": "b"})]),
    "csv near column": ("a.csv", b"Texts\nhi\n", [("a.csv:2", {"Texts": "hi"})]),
    "csv of Excel": (
        "a.csv",
        b'\xef\xbb\xbfinstruction;output\r\n"a; b";"c, d"\r\n',
        [("a.csv:2", {"instruction": "a; b", "output": "c, d"})],
    ),
    "csv that says what it is": ("a.csv", b"sep=;\r\ntext;id\r\nhi;1\r\n", [("a.csv:3", {"text": "hi", "id": "1"})]),
    "csv with tabs": ("a.csv", b"question\tanswer\na, b\tc\n", [("a.csv:2", {"question": "a, b", "answer": "c"})]),
    "csv by hand, a blank behind each comma": (
        "a.csv",
        b'question, answer \nhi, "well, yo"\n',
        [("a.csv:2", {"question": "hi", "answer": "well, yo"})],
    ),
    "csv of code, no blank in its first line": (
        "a.csv",
        b"question,answer\nhi,  return 1\n",
        [("a.csv:2", {"question": "hi", "answer": "  return 1"})],
    ),
    "csv of one column with others inside": ("a.csv", b"text\na;b\n", [("a.csv:2", {"text": "a;b"})]),
    "csv with an index of pandas": ("a.csv", b",text\n0,hi\n", [("a.csv:2", {"": "0", "text": "hi"})]),
    "lists of messages": (
        "a.json",
        b'[[{"role": "user", "content": "a"}], [{"from": "human", "value": "b"}]]',
        [
            ("a.json: row 1", {"messages": [{"role": "user", "content": "a"}]}),
            ("a.json: row 2", {"messages": [{"from": "human", "value": "b"}]}),
        ],
    ),
    "a list of messages on each line": (
        "a.jsonl",
        b'[{"role": "user", "content": "a"}]\n[{"role": "user", "content": "b"}]\n',
        [
            ("a.jsonl:1", {"messages": [{"role": "user", "content": "a"}]}),
            ("a.jsonl:2", {"messages": [{"role": "user", "content": "b"}]}),
        ],
    ),
    "one list of messages": (
        "a.json",
        b'[{"role": "user", "content": "a"}]',
        [("a.json:1", {"messages": [{"role": "user", "content": "a"}]})],
    ),
    "pandas, a table": (
        "a.json",
        b'{"schema": {"fields": [{"name": "text"}]}, "data": [{"index": 0, "text": "hi"}]}',
        [("a.json: row 1", {"index": 0, "text": "hi"})],
    ),
    "parquet": (
        "a.parquet",
        parquet([{"messages": [{"role": "user", "content": "hi"}]}, {"messages": None}]),
        [
            ("a.parquet: row 1", {"messages": [{"role": "user", "content": "hi"}]}),
            ("a.parquet: row 2", {"messages": None}),
        ],
    ),
}


@pytest.mark.parametrize(("name", "data", "rows"), GOOD_FILES.values(), ids=GOOD_FILES)
def test_a_good_file_is_rows_that_know_where_they_stand(name, data, rows):
    Path(name).write_bytes(data)
    assert read_rows(Path(name), COLUMNS) == [Row(*row) for row in rows]


@pytest.mark.parametrize(("name", "start", "end"), [("a.jsonl", b'{"text": "', b'"}'), ("a.csv", b'text\n"', b'"')])
def test_long_rows_are_fine(name, start, end):
    Path(name).write_bytes(start + b"x" * 3_000_000 + end)
    (row,) = read_rows(Path(name), COLUMNS)
    assert len(row.value["text"]) == 3_000_000


def test_a_fault_stands_in_its_row_s_place():
    Path("a.jsonl").write_bytes(GOOD + b'{"text": \n' + GOOD + b"[]\n" + GOOD)
    rows = read_rows(Path("a.jsonl"), COLUMNS)
    assert [(row.where, row.fault is None) for row in rows] == [
        ("a.jsonl:1", True),
        ("a.jsonl:2", False),
        ("a.jsonl:3", True),
        ("a.jsonl:4", False),
        ("a.jsonl:5", True),
    ]


def zst(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def arrow(rows: list[dict], new=pyarrow.ipc.new_file) -> bytes:
    table, sink = pyarrow.Table.from_pylist(rows), pyarrow.BufferOutputStream()
    with new(sink, table.schema) as file:
        file.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.ndjson", GOOD + GOOD),
        ("a.ndjson.gz", gzip.compress(GOOD + GOOD, mtime=0)),
        ("a.tsv", b"text\tmore\n" + 2 * b"### Human: hi### Assistant: yo\tx\n"),
        ("a.feather", arrow([HI, HI])),
        ("a.arrow", arrow([HI, HI])),
        ("a.arrow", arrow([HI, HI], pyarrow.ipc.new_stream)),
    ],
)
def test_other_endings_of_the_same_formats(name, data):
    Path(name).write_bytes(data)
    assert [row.value["text"] for row in read_rows(Path(name), COLUMNS)] == [HI["text"]] * 2


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize(
    ("name", "data"),
    [("a.jsonl", GOOD + GOOD), ("a.json", b"[" + GOOD + b"," + GOOD + b"]"), ("a.csv", b"text\n" + 2 * b"hi\n"),
     ("a.parquet", parquet([HI, HI]))],
)  # fmt: skip
def test_a_packed_file_is_unpacked(packing, name, data):
    Path(name).write_bytes(data)
    Path(f"{name}{packing}").write_bytes(PACK[packing](data))
    plain, packed = read_rows(Path(name), COLUMNS), read_rows(Path(f"{name}{packing}"), COLUMNS)
    assert len(plain) == 2
    assert [(row.where, row.value) for row in packed] == [
        (row.where.replace(name, f"{name}{packing}"), row.value) for row in plain
    ]


@pytest.mark.parametrize("packing", PACK)
def test_a_packed_file_that_is_not_whole(packing, expect_error):
    data = b"".join(b'{"text": "%d"}\n' % (number * 7919 % 100_003) for number in range(20_000))
    name = f"a.jsonl{packing}"
    for broken in (PACK[packing](data)[:-9], PACK[packing](data)[:2000], b"no such thing"):
        Path(name).write_bytes(broken)
        expect_error(lambda: read_rows(Path(name), COLUMNS), "can't be unpacked", "download it again", place=name)


def test_files_one_after_the_other_in_a_packed_one():
    Path("a.jsonl.gz").write_bytes(gzip.compress(GOOD) * 2)
    Path("a.jsonl.zst").write_bytes(zst(GOOD) * 2)
    assert len(read_rows(Path("a.jsonl.gz"), COLUMNS)) == 2
    assert len(read_rows(Path("a.jsonl.zst"), COLUMNS)) == 2


@pytest.mark.parametrize(
    ("where", "file", "number"),
    [
        ("rows.jsonl:17", "rows.jsonl", "17"), ("a/b.parquet: row 2", "a/b.parquet", "2"),
        ("some/one (train): row 30", "some/one (train)", "30"), ("C:/a:3.jsonl:4", "C:/a:3.jsonl", "4"),
        ("a\n: row 1:2", "a\n: row 1", "2"), ("rows.jsonl", "rows.jsonl", ""), ("rows:x", "rows:x", ""),
    ],
)  # fmt: skip
def test_a_place_is_a_file_and_a_number(where, file, number):
    assert split_place(where) == (file, number)
