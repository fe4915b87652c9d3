"""The peers of the comparison: Unsloth, which can't be imported without a GPU, by stand-ins that note what is asked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers.py"
SPEC = {
    "base": "base",
    "max_length": 64,
    "t4": False,
    "rank": 16,
    "batch_size": 4,
    "kernels": False,
    "ids": "ids.jsonl",
}
UNSLOTH = """
import sys
EARLY = [name for name in ("transformers", "peft", "trl", "datasets") if name in sys.modules]
class FastLanguageModel:
    def from_pretrained(*_, **__): return None, None
    def get_peft_model(*_, **__): return None
"""
TRL = """
import json, sys
import unsloth
class SFTConfig:
    def __init__(self, **options): self.options = options
class {name}:
    def __init__(self, model, args, **_):
        print(json.dumps({{"early": unsloth.EARLY, **args.options}}))
        sys.exit()
SFTTrainer = {name}
"""


@pytest.fixture
def ask(tmp_path):
    """Runs a peer up to its trainer; returns what is printed last and what goes wrong."""

    def ask(peer: str, trainer: str = "UnslothSFTTrainer") -> tuple[str, str]:
        for name, code in (("unsloth", UNSLOTH), ("trl", TRL.format(name=trainer))):
            (tmp_path / f"{name}.py").write_text(code)
        for name in ("datasets", "transformers", "torch"):
            (tmp_path / f"{name}.py").write_text(
                "bfloat16 = TrainerCallback = type('Any', (), {})\n"
                "class Dataset:\n    def from_list(rows): return rows\n"
                "class cuda:\n    def is_available(): return False\n"
            )
        (tmp_path / "ids.jsonl").write_text('{"input_ids": [1], "labels": [1]}\n')
        (tmp_path / "spec.json").write_text(json.dumps(SPEC))
        # By its text, so that what stands here goes before what is installed.
        code = f"import sys; sys.argv = ['peers.py', {peer!r}, 'spec.json']; __file__ = {str(PEERS)!r}\n"
        command = [sys.executable, "-c", code + PEERS.read_text(encoding="utf-8")]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.stdout.strip().rpartition("\n")[2], done.stderr

    return ask


@pytest.mark.parametrize(
    ("peer", "rows", "batches"), [("unsloth", 4, 1), ("unsloth_packed", 2, 1), ("unsloth_kept", 2, 2)]
)
def test_unsloth_is_imported_first_and_learns_the_rows_of_a_step(ask, peer, rows, batches):
    found = json.loads(ask(peer)[0])
    assert found["early"] == []
    assert found["gradient_accumulation_steps"] == batches and found["per_device_train_batch_size"] == rows
    # Padding-free is left to it, as by anyone who says nothing of it.
    assert "padding_free" not in found and found.get("packing", False) == (peer == "unsloth_packed")


def test_an_unpatched_trainer_is_not_measured(ask):
    printed, error = ask("unsloth", trainer="SFTTrainer")
    assert printed == "" and "RuntimeError: Unsloth did not put its trainer into TRL" in error
