"""JSON files that others wrote: an object, or one line that names the file; one reader for all of them."""

import os
import re
from pathlib import Path

import pytest

from lit_qlora.errors import UserError
from lit_qlora.storage.foreign import LARGEST_FILE, read_object

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[1]", "config.json: expected a JSON object, got [1]"),
        (b"{", "config.json can't be read: it is no JSON: its end is missing; put another copy of it there"),
        (b"", "config.json can't be read: it is empty; put another copy of it there"),
        (b'{"a": 1,\n"b": x}', "config.json can't be read: it is no JSON: see line 2; put another copy of it there"),
        (b'{"a": "b', "config.json can't be read: it is no JSON: its end is missing; put another copy of it there"),
        (b"\xff{}", "config.json can't be read: it is not UTF-8 (byte 0); put another copy of it there"),
        (b"[" * 200_000, "config.json can't be read: it is nested too deeply"),
        (
            b'{"a": ' + b"9" * 5000 + b"}",
            "config.json can't be read: it holds a number of too many digits; put another",
        ),
        (b" " * (LARGEST_FILE + 1), "config.json has 10,000,001 bytes, expected at most 10,000,000"),
        (None, "config.json can't be read: No such file"),
    ],
    ids=range(10),
)
@pytest.mark.parametrize("place", [None, "model.base: some"])
def test_what_is_no_object_is_one_line(tmp_path, content, expected, place):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_object(file, place)
    assert str(caught.value).startswith(f"{place}: {expected}" if place else f"{tmp_path}/{expected}")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    for file in (tmp_path / "config.json", tmp_path, Path("/dev/null")):
        with pytest.raises(UserError, match=r"is a folder, .*, expected a file"):
            read_object(file)


def test_there_is_one_reader_of_an_object():
    """Whoever parses a file itself expects no object, or has rules of its own for one that is broken."""
    parses = re.compile(r"parse_json\(.*read_(text|bytes)\(")
    found = {
        str(path.relative_to(ROOT / "lit_qlora"))
        for path in (ROOT / "lit_qlora").rglob("*.py")
        if parses.search(path.read_text(encoding="utf-8"))
    }
    assert "storage/foreign.py" in found
    assert not {"model/lora.py", "model/fingerprint.py", "figures/card.py", "storage/files.py"} & found
