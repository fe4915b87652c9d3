"""No secret reaches a file or the terminal: none is taken as an option, and none is printed."""

from pathlib import Path

import pytest

from lit_qlora.cli import check_texts, main
from lit_qlora.errors import UserError, require
from lit_qlora.secrecy import holds_secret, redact

CANARY = "CanaryInTheCoalMine0123456789"
TOKEN = f"hf_{CANARY}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"https://user:{CANARY}@host/rows.jsonl: no such file", "https://***@host/rows.jsonl: no such file"),
        (f"no folder 'https:/{CANARY}@host/x'", "no folder 'https:/***@host/x'"),
        (f"s3://a:p@ss{CANARY}@bucket/x", "s3://***@bucket/x"),
        (f"https://h/x?token={CANARY}&rows=3", "https://h/x?token=***&rows=3"),
        (f"https://h/x?rows=3&X-Amz-Signature={CANARY}", "https://h/x?rows=3&X-Amz-Signature=***"),
        (f"expected int, got {TOKEN}", "expected int, got ***"),
        (f"{{'x': 'api_org_{CANARY}'}}", "{'x': '***'}"),
        (f"hf://me:{CANARY}@datasets/x", "hf://***@datasets/x"),
        (f"hf://datasets/me:{CANARY}@owner/x.jsonl is not", "hf://datasets/***@owner/x.jsonl is not"),
        (f"s3://a:p/ss{CANARY}@bucket/x", "s3://***@bucket/x"),
        (f"s3://a:p?ss#{CANARY}@bucket/x", "s3://***@bucket/x"),
        (f"no folder //me:{CANARY}@host/x", "no folder //***@host/x"),
        (f"me:{CANARY}@host:rows.jsonl: no such file", "***@host:rows.jsonl: no such file"),
        (f"HTTPS://ME:{CANARY}@HOST/x", "HTTPS://***@HOST/x"),
        (f"https://h/x?accessToken={CANARY}", "https://h/x?accessToken=***"),
        (f"https://h/x#access_token={CANARY}", "https://h/x#access_token=***"),
        (f"https://h/x?api-key={CANARY}&key={CANARY}", "https://h/x?api-key=***&key=***"),
        (f"https://h/x?AWSAccessKeyId={CANARY}&pwd={CANARY}", "https://h/x?AWSAccessKeyId=***&pwd=***"),
        (f"got ghp_{CANARY} and github_pat_11_{CANARY}", "got *** and ***"),
        (f"got sk-proj-{CANARY}, glpat-{CANARY}", "got ***, ***"),
        (f"Authorization: Bearer {CANARY}", "Authorization: Bearer ***"),
    ],
)
def test_a_secret_is_not_reported(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/datasets/a/b",
        "https://example.org/@someone/a?page=2",
        "C:/Users/me@home/rows.jsonl",
        "runs/hf_internal/token=3",
        "mail me@example.org",
        "hf-internal-testing/tiny-random-LlamaForCausalLM",
        "hf://datasets/owner/name@main/rows.jsonl",
        "http://localhost:8080/@someone",
        "http://localhost:8080",
        "mailto:me@example.org",
        "D:/rows@home:2/x.jsonl",
        "runs/sk-learn-classification-of-all-things",
        "rows.jsonl?page=2&sort=key",
        "What is a token: a word? An api_key=x?",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text
    check_texts(["fit", "--data.batch_tokens", "300", "--samples.max_new_tokens=3", "--data.source", text])


def test_a_token_of_a_tokenizer_is_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("pad_token", "model.bos_token", "add_eos_token"):
        assert main(["fit", f"--{option}", "</s>"]) == 2
        assert "the tokenizer is that of model.base" in capsys.readouterr().err
    check_texts(["fit", "--tokenizer.unk_token=<unk>"])
    with pytest.raises(UserError):
        check_texts(["fit", "--hub_token=abc"])


@pytest.mark.parametrize(
    ("value", "holds"), [("", False), ("null", False), ("False", False), ("0", False), ("1234", True)]
)
def test_the_default_of_a_callbacks_own_argument_is_no_secret(value: str, holds: bool) -> None:
    """A run keeps all of them in its config.yaml, from which it resumes."""
    assert holds_secret("trainer.callbacks.init_args.api_key", value) is holds


def test_a_mail_address_after_a_colon_may_be_asked_about() -> None:
    check_texts(["fit", "--samples.prompts", '["Reply to:me@example.org in one line."]'])


def test_an_error_shows_no_secret_wherever_it_ends() -> None:
    """The error may end in a program of the user's: in its sentence, its fields or its repr."""
    url = f"hf://me:{CANARY}@datasets/x"
    error = UserError(f"no {url}", option=f"x={TOKEN}", place=url, remedy=f"give no {url}")
    with pytest.raises(UserError) as required:
        require(False, "data.source", "a file", url)
    for one in (error, error.replace(problem=f"not {url}"), required.value):
        assert CANARY not in f"{one} {one!r} {vars(one)}"
        assert "hf://***@datasets/x" in str(one)


ENDS = {
    "the source's password": ["fit", "--data.source", f"https://user:{CANARY}@host/rows.jsonl"],
    "the source's token": ["fit", f"--data.source=https://host/rows.jsonl?token={CANARY}"],
    "the base's user": ["fit", "--model.base", f"https://{CANARY}@host/llama"],
    "the mirror's password": ["fit", "--mirror", f"sftp://me:{CANARY}@host/runs"],
    "the run's token": ["fit", "--run", f"runs/{TOKEN}"],
    "an unknown option's": ["fit", f"--model.token={CANARY}"],
    "a token by itself": ["fit", TOKEN],
    "a list's": ["fit", "--samples.prompts", f'["Hi", "https://u:{CANARY}@h"]'],
    "in YAML": ["fit", "--config", "mine.yaml"],
    "a list's in YAML": ["fit", "--config", "list.yaml"],
    "hf's password": ["fit", "--data.source", f"hf://me:{CANARY}@datasets/owner/rows.jsonl"],
    "hf's password further behind": ["fit", "--data.validation_source", f"hf://datasets/me:{CANARY}@owner/rows.jsonl"],
    "a password of all characters": ["fit", f"--data.test_source=hf://me:a b'/?{CANARY}@x"],
    "a login without a scheme": ["fit", "--mirror", f"me:{CANARY}@host:runs"],
    "in an object": ["fit", "--data", f'{{"source": "hf://me:{CANARY}@x"}}'],
    "evaluate's": ["evaluate", "--source", f"hf://me:{CANARY}@x"],
    "doctor's": ["doctor", "--config", f"hf://me:{CANARY}@x"],
    "push's": ["push", "--to", f"hf://me:{CANARY}@x"],
    "test's run": ["test", "--run", f"hf://me:{CANARY}@x"],
    "inspect's": ["inspect", "--data.source", f"https://user:{CANARY}@host/rows.jsonl"],
    "plan's": ["plan", "--data.source", f"https://user:{CANARY}@host/rows.jsonl"],
    "merge's": ["merge", "--output", f"https://user:{CANARY}@host/x"],
    "validate's": ["validate", "--ckpt_path", f"https://user:{CANARY}@host/x"],
    "chat's, which is redacted only": [
        "chat",
        "--base",
        f"https://user:{CANARY}@host/x",
        "--adapter",
        "x",
        "--prompt",
        "Hi",
    ],
}


@pytest.mark.parametrize("args", ENDS.values(), ids=ENDS)
def test_a_secret_is_refused_without_being_printed(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(f"data:\n  source: https://user:{CANARY}@host/rows.jsonl\n", encoding="utf-8")
    Path("list.yaml").write_text(f"samples:\n  prompts: [Hi, {TOKEN}]\n", encoding="utf-8")
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert CANARY not in err
    assert ("it holds a password or a token" in err) == (args[0] != "chat"), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["list.yaml", "mine.yaml"]


def test_a_long_text_is_looked_through_at_once() -> None:
    """This takes half a second, and hours where each pattern looks for a user after each scheme."""
    text = "a://" * 250_000
    assert redact(text) == text
