"""Single files: what an option may name."""

from pathlib import Path

import pytest

from lit_qlora.cli import main
from lit_qlora.storage.files import decoded, output_path, write_file


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    return tmp_path


@pytest.mark.parametrize("output", ["a\nb", "-", ".", "..", "/", "", " ", "folder", "folder/", "folder/.", "new/"])
def test_a_folder_is_no_file_to_write(here, expect_error, output):
    expect_error(lambda: output_path(output), "expected a file", f"got {output!r}", option="output")


@pytest.mark.parametrize("what", ["file", "folder"])
@pytest.mark.parametrize("output", ["a" * 300, "a\0b", "file/x"])
def test_what_can_t_be_a_name(here, expect_error, output, what):
    expect_error(lambda: output_path(output, what), repr(output)[:60], f"can't be a {what} (", option="output")


def test_a_name_is_a_path_whether_it_is_there_or_not(here):
    assert output_path("file") == Path("file")
    assert output_path("folder/new.jsonl") == Path("folder/new.jsonl")
    assert output_path("new/", "folder") == Path("new")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["predict", "--prompts", "x.txt", "--output", "."], "output: expected a file to write, got '.'"),
        (
            ["predict", "--prompts", "x.txt", "--output", "x.CSV"],
            "output: expected a name for JSON lines, such as answers",
        ),
        (
            ["predict", "--prompts", "x.txt", "--output", "x.jsonl.gz"],
            "output: expected a name for JSON lines, such as",
        ),
        (["export", "--to", "gguf", "--output", "."], "output: expected a file to write, got '.'"),
        (["merge", "--output", ""], "output: expected a folder to write, got ''"),
    ],
    ids=["predict", "predict csv", "predict packed", "export", "merge"],
)
def test_each_verb_that_writes_asks(here, capsys, args, expected):
    assert main(args) == 2
    assert capsys.readouterr().err.startswith(f"error: {expected}")


def test_what_is_written_is_no_file_elsewhere(here):
    """The temporary name may be a link in a folder that was unpacked from somebody's archive."""
    Path("folder/.report.html.tmp").symlink_to(here / "file")
    write_file(Path("folder/report.html"), "text")
    assert (Path("folder/report.html").read_text(), Path("file").read_text()) == ("text", "")
    assert not Path("folder/report.html").is_symlink()


def test_text_is_utf_8_with_a_mark_at_its_start_or_none(expect_error):
    assert decoded("\ufeffé\r\n".encode()) == decoded("é\r\n".encode()) == "é\r\n"
    expect_error(lambda: decoded(b"a\xe9", place="a.yaml"), "byte 1", "save it as UTF-8", place="a.yaml")
