"""Each command of docs/your-own-data.md, run as it stands there on small files of each kind."""

import gzip
import json
import re
import shlex
from pathlib import Path

import datasets
import pytest

from lit_qlora.cli import main

PAGE = (Path(__file__).parents[1] / "docs" / "your-own-data.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"`python main\.py ([^`]+)` \|", PAGE)
TURNS = [{"role": "user", "content": "Who is 7?"}, {"role": "assistant", "content": "It is 7."}]


def _lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows).replace("7", "{}")


def _many(row: object) -> str:
    return "".join(_lines(row).replace("{}", str(number)) for number in range(12))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    alpaca = _many({"instruction": "Who is 7?", "input": "", "output": "It is 7."})
    Path("alpaca.jsonl").write_text(alpaca)
    Path("alpaca.jsonl.gz").write_bytes(gzip.compress(alpaca.encode()))
    Path("dolly.jsonl").write_text(_many({"instruction": "Who is 7?", "context": "", "response": "Seven 7."}))
    Path("prompts.jsonl").write_text(_many({"prompt": "Who is 7?", "completion": "It is 7."}))
    Path("story.jsonl").write_text(_many({"text": "Once there was a 7."}))
    Path("greeted.jsonl").write_text(_many({"messages": [{"role": "assistant", "content": "Hello 7!"}, *TURNS]}))
    Path("chats.json").write_text(json.dumps([json.loads(line) for line in _many(TURNS).splitlines()]))
    rows = "".join(f"Who is {number}?;It is {number}.\r\n" for number in range(12))
    Path("questions.csv").write_text(f"question;answer\r\n{rows}", newline="")
    Path("table.csv").write_text(f"Frage;Antwort\r\n{rows}", newline="")
    Path("parts").mkdir()
    for part in ("a", "b"):
        Path("parts", f"{part}.jsonl").write_text(_many({"prompt": f"Who is {part} 7?", "response": "It is 7."}))
    datasets.Dataset.from_list([{"messages": TURNS}, {"messages": [*TURNS, *TURNS]}]).save_to_disk("saved")


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) >= 13


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page(here: None, capfd: pytest.CaptureFixture[str], command: str) -> None:
    status = main(shlex.split(command))
    shown = capfd.readouterr()
    assert (status, "error" in shown.err) == (0, False), shown
    assert "verdict: as it should be" in shown.out
