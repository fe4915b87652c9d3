"""Owns the reading of local files: .jsonl, .json, .csv and .parquet, packed or not, to rows that know their place.

`read_rows` is its interface. Every fault is one line that starts with the file, and the line or row in it: a row's
fault takes its place, a file's fault ends the reading. Knows a row as named columns, not its meaning.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple, TypeGuard

from lit_qlora.data.forms import PREFERENCES
from lit_qlora.errors import UserError, excerpt, first_line, nearest
from lit_qlora.storage.files import LFS, LFS_POINTER
from lit_qlora.text.messages import holds_messages, holds_turns
from lit_qlora.wording import kind

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
ARROW = ".arrow"
"""The ending of what datasets.save_to_disk writes, a format of its own."""
OTHER_NAMES = {".ndjson": ".jsonl", ".tsv": ".csv", ".feather": ARROW}
"""Endings of the same formats."""
PACKED = (".gz", ".zst", ".bz2", ".xz")
"""Further endings of packed files, which are unpacked while they are read."""
_NAME_IT = 'name it after what it holds, such as rows.jsonl, or write each text as a row {"text": "…"}'
SHEETS = (".xlsx", ".xls", ".ods")
INSTEAD = {".txt": _NAME_IT, "": _NAME_IT} | dict.fromkeys(SHEETS, "save it as .csv, in UTF-8")
"""Remedies for files of other endings."""
_TABLES = (".csv", ".parquet", ARROW)
TABLES = (*_TABLES, *(name for name, one in OTHER_NAMES.items() if one in _TABLES), *SHEETS)
"""Endings of files that hold no JSON, and neither lines of text nor YAML."""
COMPRESSED = (*PACKED, ".zip", ".tar", ".tgz", ".7z")
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""Separators of the cells of a .csv, the usual one first."""
EXAMPLE = '{"question": "…", "answer": "…"}'


class Row(NamedTuple):
    """One row by column name, and its place: ``rows.jsonl:17`` or ``rows.parquet: row 17``.

    An unreadable row has a ``fault`` in place of its value.

    Args:
        where: file and line or row number.
        value: cells by column name.
        fault: why it can't be read; None for a readable one.
    """

    where: str
    value: dict[str, Any]
    fault: UserError | None = None


def split_place(where: str) -> tuple[str, str]:
    """The file and the number of ``where`` a `Row` stands; the number is empty where the place has none."""
    found = re.fullmatch(r"(.*?):(?: row )?(\d+)", where, re.DOTALL)
    return (found[1], found[2]) if found else (where, "")


class SourceError(UserError):
    """An error in a source of rows.

    Args:
        place: the source, its file, or the line or row in it.
        problem: what was expected, and what was found.
        remedy: what to do about it.
    """

    def __init__(self, place: object, problem: str, remedy: str) -> None:
        super().__init__(problem, place=str(place), remedy=remedy)


def kind_of(path: Path) -> tuple[str, str]:
    """The format of the file of rows at ``path`` by its ending, and of `PACKED` what stands behind it.

    Raises:
        UserError: for another file.
    """
    packing = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    ending = Path(path.name.lower().removesuffix(packing)).suffix
    ending = OTHER_NAMES.get(ending, ending)
    if ending in COMPRESSED:
        raise SourceError(path, f"is compressed, expected one of {', '.join(ENDINGS)}", "unpack it first")
    if ending not in (*ENDINGS, ARROW):
        expected = f"expected one of {', '.join(ENDINGS)}"
        raise SourceError(path, f"the ending is {ending!r}, {expected}", INSTEAD.get(ending, "convert the file"))
    return ending, packing


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """Read every row of a file, by its ending.

    A .json or .jsonl file holds a row on each line, or rows over several lines, or a list of rows, which may stand
    under a name. A list of messages stands for a row that has them in its column ``messages``.

    Args:
        path: the file.
        columns: names of which the first line of a .csv has to have one.

    Returns:
        At least one row; one that can't be read has its fault in place of its values.

    Raises:
        UserError: when the file can't be read, is not what its ending says, or holds no rows.
    """
    ending, packing = kind_of(path)
    data = _unpacked(path, packing)
    if ending in (".parquet", ARROW):
        rows = list(_table_rows(path, data, ending))
    elif ending == ".csv":
        rows = list(_csv_rows(path, _text_of(path, data), columns))
    else:
        rows = _json_rows(path, _text_of(path, data), columns)
    if not rows:
        raise SourceError(path, f"holds no rows, expected some such as {EXAMPLE}", "check how it was made")
    return rows


def _unpacked(path: Path, packing: str = "") -> bytes:
    """The bytes of a file, unpacked. Raises SourceError if it can't be read, or is empty."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for without a word
            raise SourceError(path, "is a folder, a pipe or a device, expected a file", "write the rows into one")
        data = path.read_bytes()
    except OSError as error:
        remedy = (
            "check the file's permissions, and that its disk or drive is mounted, and where it leads, if it's a link"
        )
        raise SourceError(path, f"can't be read ({error.strerror})", remedy) from error
    if data.startswith(LFS):
        raise SourceError(path, *LFS_POINTER)
    if packing:
        data = _unpack(path, data, packing)
    start = data[:200].lstrip().lower()
    if not data:
        raise SourceError(path, "is empty (0 bytes)", "check how it was made, or download it again")
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        remedy = "download the file itself ('resolve' in its link, not 'blob')"
        raise SourceError(path, "is a web page, not data", remedy)
    if data.startswith((b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise SourceError(path, "is compressed in spite of its ending", "unpack it first")
    for begins, ending in {b"PAR1": ".parquet", b"ARROW1": ARROW}.items():
        if data.startswith(begins) and kind_of(path)[0] != ending:
            raise SourceError(path, f"is a {ending} file in spite of its ending", "rename it")
    return data


def _unpack(path: Path, data: bytes, packing: str) -> bytes:
    """The unpacked ``data``. Raises SourceError if it is not whole."""
    import bz2
    import gzip
    import lzma
    import zlib

    unpack = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress, ".zst": _unpack_zst}[packing]
    try:
        return unpack(data) if data else data
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        remedy = f"it may be cut short, download it again; or it's not packed, rename it without {packing}"
        raise SourceError(path, f"can't be unpacked ({_reason(error)})", remedy) from error


def _unpack_zst(data: bytes) -> bytes:
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd") as stream:
        return bytes(stream.read())


def _text_of(path: Path, data: bytes) -> str:
    if not data.strip(b"\0"):
        raise SourceError(path, "holds nothing but NUL bytes: it was cut off while it was written", "copy it again")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:2]:
        name = "UTF-32" if b"\0\0" in data[:4] else "UTF-16"
        raise SourceError(path, f"is {name}, expected UTF-8", f"save it again as UTF-8 ({_iconv(path, name)})")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        remedy = "it's damaged or binary, copy it again"
        raise SourceError(f"{path}:{line}", "holds a NUL byte, expected UTF-8 text", remedy)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        remedy = f"convert the file from the encoding it was saved in, such as {_iconv(path, 'WINDOWS-1252')}"
        raise SourceError(f"{path}:{line}", f"byte 0x{data[error.start]:02x} is not UTF-8", remedy) from error
    if not text.strip():
        raise SourceError(path, "holds only blank lines", "check how it was made, or download it again")
    return text


def _iconv(path: Path, encoding: str) -> str:
    """The command that writes a copy of ``path`` in UTF-8."""
    copy = path.with_name(f"{path.stem}-utf8{path.suffix}")
    return f"iconv -f {encoding} -t UTF-8 {quote(str(path))} > {quote(str(copy))}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a name given twice in an object, of which Python would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two values are named {excerpt(doubled)} in one object")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_once)


def _json_rows(path: Path, text: str, columns: Sequence[str]) -> list[Row]:
    try:
        values = list(_json_values(text))
    except (ValueError, RecursionError) as error:
        return _valid_lines(path, text, error)
    if len(values) == 1:
        listed = _list_of_rows(path, values[0][1], columns)
        if listed is not None:
            return [_row_at(f"{path}: row {number}", row) for number, row in enumerate(listed, start=1)]
    return [_row_at(f"{path}:{line}", value) for line, value in values]


def _json_values(text: str) -> Iterator[tuple[int, Any]]:
    """The consecutive values in ``text``, each with the line of its start."""
    end, line, counted = 0, 1, 0
    while True:
        start = _SPACE.match(text, end).end()  # type: ignore[union-attr]  # it matches nothing, too
        if start == len(text):
            return
        line, counted = line + text.count("\n", counted, start), start
        value, end = _JSON.raw_decode(text, start)
        yield line, value


# Not str.split() and the like: those would also cut at U+2028 and its like, which JSON allows inside a text.
_SPACE = re.compile(r"[ \t\r\n]*")


def _valid_lines(path: Path, text: str, error: Exception) -> list[Row]:
    """The rows of a file that is not JSON as a whole, because of ``error``: those of its valid lines, and faults."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                rows.append(_row_at(where, _JSON.decode(line)))
            except (ValueError, RecursionError) as fault:
                rows.append(Row(where, {}, _no_json(where, line, fault, "mend or delete the line")))
    place = getattr(error, "lineno", 1 if len(rows) == 1 else None)
    if place and sum(row.fault is not None for row in rows) > len(rows) / 2:  # a row over several lines, torn somewhere
        line = text.split("\n")[place - 1]
        raise _no_json(f"{path}:{place}", line, error, "mend the file there") from error
    return rows


def _no_json(where: str, line: str, error: Exception, remedy: str) -> UserError:
    if isinstance(error, json.JSONDecodeError):
        behind = error.doc[error.pos :].lstrip(", \t\r\n")[:1]
        if behind in ("]", "}") and error.doc[: error.pos + 1].rstrip(f" \t\r\n{behind}").endswith(","):
            remedy = f"take out the comma before {behind}"
        elif error.doc[error.pos :].startswith(",") and error.doc[: error.pos].rstrip().endswith("}"):
            remedy = "take out the comma behind it, or put [ and ] around all"
        elif behind == "'":
            remedy = "write \" in place of ' around names and texts, as json.dumps does"
    return SourceError(where, f"no JSON ({_reason(error)}), expected whole objects, got {excerpt(line)}", remedy)


def _list_of_rows(path: Path, value: Any, columns: Sequence[str]) -> list[Any] | None:
    """The rows in a file's only value; None if it is a row itself.

    Raises SourceError for several lists of rows, or columns in place of rows.
    """
    if not isinstance(value, dict):
        return value if isinstance(value, list) and not holds_turns(value) else None
    names, data = value.get("columns"), value.get("data")
    if (
        isinstance(names, list)
        and isinstance(data, list)
        and all(isinstance(one, list) and len(one) == len(names) for one in data)
    ):
        return [dict(zip(map(str, names), one, strict=True)) for one in data]  # as pandas splits a table
    if _is_by_columns(value, columns):
        problem = f"is written by columns, expected a list of rows, got {excerpt(value)}"
        raise SourceError(path, problem, "write it by rows (with pandas: to_json(…, orient='records'))")
    if {*columns} & {*value} or {*PREFERENCES} <= {*value}:
        return None
    parts = [*value.values()]
    is_numbered = all(name.isdecimal() for name in value)
    if parts and all(isinstance(part, dict) and (is_numbered or {*columns} & {*part}) for part in parts):
        return parts  # each under a name of its own
    if len(parts) == 1:
        return _list_of_rows(path, parts[0], columns)
    lists = {name: part for name, part in value.items() if _is_list(part)}
    lists = {name: part for name, part in lists.items() if {*columns} & {*part[0]}} or lists
    if len(lists) > 1:
        problem = f"holds lists under {' and '.join(map(repr, lists))}, expected one list of rows"
        remedy = "write each into a file of its own, such as train.json and test.json in one folder"
        raise SourceError(path, problem, remedy)
    return next(iter(lists.values()), None)


def _is_by_columns(value: dict[str, Any], columns: Sequence[str]) -> bool:
    """True if each name holds a column, as a list or by row numbers."""
    parts = [value[name] for name in columns if name in value]
    lists = [part for part in parts if isinstance(part, list) and len(part) > 1 and not _is_list(part)]
    numbered = all(isinstance(part, dict) and part and all(map(str.isdecimal, part)) for part in value.values())
    return bool(lists or (numbered and value) or any(isinstance(part, dict) for part in parts))


def _is_list(part: object) -> TypeGuard[list[dict[str, Any]]]:
    """True for a list that starts with an object, as one of rows or of messages does."""
    return isinstance(part, list) and bool(part) and isinstance(part[0], dict)


def read_cells(path: Path) -> list[tuple[str, list[str]]]:
    """The rows of the .csv at ``path``, its first line included, each with its place; blank lines are left out.

    Raises SourceError when the file can't be read or is no CSV.
    """
    return list(_csv_cells(path, _text_of(path, _unpacked(path))))


def _csv_cells(
    path: Path, text: str, delimiter: str = ",", skips_blanks: bool = False
) -> Iterator[tuple[str, list[str]]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 131,072 characters
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter, skipinitialspace=skips_blanks)
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise SourceError(where, f"broken quoting ({error})", "double every quote inside a quoted text") from error
        if cells is None:
            return
        if cells:
            yield where, cells


def _delimiter(path: Path, text: str, columns: Sequence[str]) -> str:
    """The separator of cells by the first line: a comma, or else one that Excel and databases write."""

    def known(delimiter: str) -> tuple[int, int]:
        try:
            _, cells = next(_csv_cells(path, text, delimiter), ("", []))
        except SourceError:
            return 0, 0
        return sum(cell.strip() in (*columns, *PREFERENCES) for cell in cells), len(cells)

    return max(DELIMITERS, key=known)


def _csv_rows(path: Path, text: str, columns: Sequence[str]) -> Iterator[Row]:
    text = re.sub(r"\Asep=[,;\t]\r?\n", "\n", text)  # as Excel has it
    delimiter, header = _delimiter(path, text, columns), list[str]()
    is_by_hand = re.match(rf"\s*\S[^\r\n]*{delimiter} ", text) is not None  # a blank behind each comma, also in line 1
    for where, cells in _csv_cells(path, text, delimiter, is_by_hand):
        if not header:
            header = [cell.strip() for cell in cells]
            doubled = [name for name in header if header.count(name) > 1]
            if doubled:
                raise SourceError(where, f"two columns are named {excerpt(doubled[0])}", "rename or remove one")
            if not any(nearest(name.lower(), [*columns, *PREFERENCES], 0.7) for name in header):
                remedy = "the first line of a .csv names the columns; give other names with data.columns, or columns of"
                raise SourceError(where, f"no known column, columns found: {excerpt(header)}", f"{remedy} predict")
        elif len(cells) != len(header):
            what = f"{len(cells)} columns, expected {len(header)} as in the first line, got {excerpt(cells)}"
            remedy = f"put quotes around texts that hold {DELIMITERS[delimiter]}"
            yield Row(where, {}, SourceError(where, what, remedy))
        else:
            yield Row(where, dict(zip(header, cells, strict=True)))


def _table_rows(path: Path, data: bytes, ending: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    buffer = pyarrow.BufferReader(data)
    # Arrow has two formats: a file, which begins with its name, and a stream, as datasets writes it.
    arrow = pyarrow.ipc.open_file if data.startswith(b"ARROW1") else pyarrow.ipc.open_stream
    try:
        table = arrow(buffer).read_all() if ending == ARROW else pyarrow.parquet.read_table(buffer)
        values = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        problem = f"no whole {ending[1:]} file ({_reason(error)})"
        raise SourceError(path, problem, "it may be cut short, download it again") from error
    for number, value in enumerate(values, start=1):
        yield Row(f"{path}: row {number}", value)


def _row_at(where: str, value: object) -> Row:
    if isinstance(value, dict):
        return Row(where, value)
    if holds_messages(value):
        return Row(where, {"messages": value})
    remedy = "mend or delete it"
    if isinstance(value, list):  # cells, of a table without the names of its columns
        remedy = "write each row with the names of its columns (with pandas: to_json(…, orient='records'))"
    what = f"holds {kind(value)}, expected an object such as {EXAMPLE}, got {excerpt(value)}"
    return Row(where, {}, SourceError(where, what, remedy))


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return first_line(error)
