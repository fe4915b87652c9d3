"""Each command of the README's table, run as it stands there on a trained demo; only placeholders are filled in."""

import io
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lit_qlora.cli import TOOLS, main

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(
    r"^\| `python main\.py ([^`]+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
)
DEMO = str(ROOT / "configs" / "demo.yaml")
FILLED_IN = {
    "fit --config F": ["fit", "--config", DEMO, "--run", "./new", "--trainer.max_steps", "2",
                       "--trainer.limit_val_batches", "1", "--samples.count", "0"],
    "inspect --config F": ["inspect", "--config", DEMO],
    "plan --config F": ["plan", "--config", DEMO],
    "predict --prompts F --output F": ["predict", "--prompts", "prompts.txt", "--output", "answers.jsonl"],
    "merge --output DIR": ["merge", "--output", "merged"],
    "export --to gguf --output F": ["export", "--to", "gguf", "--output", "demo.gguf"],
    "push --to NAME/REPO": ["push", "--to", "ann/demo"],
}  # fmt: skip
REFUSED = {
    "export --to gguf --output F": "error: export: demo has no tokenizer.model",
    "push --to NAME/REPO": "error: ",  # no token, and no terminal to ask at; a server plays the hub in test_push.py
    "chat --web": "error: web: ",
}
"""What needs something that is not here, in one line."""


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    Path("prompts.txt").write_text("Who is Jonas?\nWhat is Amberwick known for?\n")
    question = '"Which is the first letter?",A,B,C,D,A\n'
    for name, count in (("test", 2), ("dev", 5)):
        Path(name).mkdir()
        Path(name, f"letters_{name}.csv").write_text(question * count)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Who is Jonas?")))
    return tmp_path


def test_the_table_has_every_verb() -> None:
    verbs = {command.split()[0] for command in COMMANDS}
    assert verbs == {
        "fit", "inspect", "plan", "validate", "test", *TOOLS, "doctor",
    }  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme(here: Path, capfd: pytest.CaptureFixture[str], command: str) -> None:
    if command == "chat --web" and find_spec("gradio"):
        pytest.skip("gradio is here: the page has tests of its own, in a browser")
    status = main(FILLED_IN.get(command, command.split()))
    shown = capfd.readouterr()
    if command in REFUSED:
        assert status == 2
        assert shown.err.startswith(REFUSED[command]) and shown.err.count("\n") == 1
    else:
        assert (status, "error" in shown.err) == (0, False), shown.err
        assert shown.out
