"""No secret reaches a file or the terminal: none is taken as an option, and none is told."""

from pathlib import Path

import pytest

from lit_qlora.cli import main
from lit_qlora.secrecy import check_no_secrets, redact

CANARY = "CanaryInTheCoalMine0123456789"
TOKEN = f"hf_{CANARY}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"https://user:{CANARY}@host/rows.jsonl: no such file", "https://***@host/rows.jsonl: no such file"),
        (f"no folder 'https:/{CANARY}@host/x'", "no folder 'https:/***@host/x'"),
        (f"s3://a:p@ss{CANARY}@bucket/x", "s3://***@bucket/x"),
        (f"https://h/x?token={CANARY}&rows=3", "https://h/x?token=***&rows=3"),
        (f"https://h/x?rows=3&X-Amz-Signature={CANARY}", "https://h/x?rows=3&X-Amz-Signature=***"),
        (f"expected int, got {TOKEN}", "expected int, got ***"),
        (f"{{'x': 'api_org_{CANARY}'}}", "{'x': '***'}"),
    ],
)
def test_a_secret_is_not_told(text: str, told: str) -> None:
    assert redact(text) == told


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/datasets/a/b",
        "https://example.org/@someone/a?page=2",
        "C:/Users/me@home/rows.jsonl",
        "runs/hf_internal/token=3",
        "mail me@example.org",
        "hf-internal-testing/tiny-random-LlamaForCausalLM",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text
    check_no_secrets(["fit", "--data.batch_tokens", "300", "--samples.max_new_tokens=3", "--data.source", text])


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
def test_a_secret_is_refused_untold(
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
