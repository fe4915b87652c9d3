"""A text given to an option is that text, whatever YAML would make of it; files stay YAML."""

import json

import pytest
from jsonargparse import ArgumentParser

from lit_qlora.errors import UserError
from lit_qlora.options import OneLineErrors
from lit_qlora.storage.config_file import as_yaml

TEXTS = [
    "# x", "null", "~", "Null", "yes", "1e3", "-1e3", "1.5e3", "[a]", "a: b", "a:", "*x", "&x", "!x", "@x", '"x', '"x"',
    "'x'", "`x",
    "%x", "> x", "| x", "{a}", "{a: 1}", "- [ ] x\n- y", "-x", "-", "---", "--- # x", "x # y", "true", "0x10",
    "2024-01-01", "  x ", "a\nb: c", "", "=x", "x=y",
]  # fmt: skip


class _Parser(OneLineErrors, ArgumentParser):
    """A parser like a verb's."""


def _verb(
    prompt: str | None = None,
    output: str = "",
    run: str | None = None,
    stop: str | list[str] = "",
    prompts: list[str] | None = None,
    columns: dict[str, str] | None = None,
    count: int | None = None,
) -> None:
    """A verb with options of each kind that holds texts."""


@pytest.fixture(scope="module")
def parser():
    parser = _Parser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(_verb)
    return parser


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_as_typed(parser, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args in (["--prompt", text], [f"--prompt={text}"]):
        assert parser.parse_args(args).prompt == text
    assert parser.parse_args([f"--output={text}"]).output == text
    assert parser.parse_args([f"--columns.user={text}"]).columns == {"user": text}
    if text not in ("null", "~", "Null", "", "[a]"):
        assert parser.parse_args([f"--prompts+={text}", "--prompts+=z"]).prompts == [text, "z"]
    assert parser.parse_args([f"--stop={text}"]).stop == (["a"] if text == "[a]" else text)


@pytest.mark.parametrize("text", TEXTS)
def test_what_a_run_s_config_holds_comes_back(parser, text):
    given = {"prompt": text, "output": text, "stop": [text], "prompts": [text], "columns": {"user": text}}
    for written in (as_yaml(given), json.dumps(given)):  # JSON is YAML, with each text in quotes
        found = parser.parse_args(["--config", written])
        assert {name: found[name] for name in given} == given


def test_a_file_is_yaml(parser):
    found = parser.parse_args(
        ["--config", "prompt: # nothing\nrun: ~\ncount: 3 # three\nstop: [a, b]\noutput: 'null'\n"]
    )
    assert (found.prompt, found.run, found.count, found.stop, found.output) == (None, None, 3, ["a", "b"], "null")


def test_a_table_may_have_dotted_names_in_a_file(parser):
    found = parser.parse_args(["--config", "columns.user: q\ncolumns.assistant: a\n"])
    assert found.columns == {"user": "q", "assistant": "a"}


def test_null_is_none_for_a_name_and_a_comment_is_no_number(parser):
    assert parser.parse_args(["--run", "null", "--count", "null"]).as_dict().keys() >= {"run"}
    found = parser.parse_args(["--run", "null", "--count", "null", "--prompts", "null"])
    assert (found.run, found.count, found.prompts) == (None, None, None)
    found = parser.parse_args(["--run", "none", "--count", "none"])  # as help and messages call it
    assert (found.run, found.count) == ("none", None)
    for option in ("count", "prompts"):
        with pytest.raises(UserError) as caught:
            parser.parse_args([f"--{option}", "# 3"])
        assert f"{option}: " in str(caught.value) and "# 3" in str(caught.value)


def test_a_text_that_looks_like_an_option_is_one(parser):
    with pytest.raises(UserError, match="prompt"):
        parser.parse_args(["--prompt", "--count", "3"])
    with pytest.raises(UserError):
        parser.parse_args(["--prompt", "--cuont", "3"])


def test_a_file_of_the_text_s_name_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cpu").write_text("{a: b}")
    parser = _Parser(exit_on_error=False)
    parser.add_argument("--device", type=str, sub_configs=True)
    assert parser.parse_args(["--device", "cpu"]).device == "cpu"
