"""Owns the pin of a move or a renaming: what two short CPU runs of the real command leave behind, as digests.

    python scripts/pin.py --write before.json      # with the code as it was
    python scripts/pin.py --compare before.json    # with the code as it is

A change that is to change no number leaves every digest the same; the command prints those that differ, and ends with
status 1. Figures of the clock and of host memory are left out. Write and compare on the same machine.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CLOCK = ("speed/tokens_per_second", "memory/host_gib")
RUNS = {
    "accumulated, with dropout": [
        *("--trainer.max_steps", "12", "--trainer.accumulate_grad_batches", "3", "--trainer.val_check_interval", "12"),
        *("--model.dropout", "0.05", "--save_every_steps", "6", "--data.system", "You are brief."),
    ],
    "packed, rslora, 8-bit AdamW": [
        *("--trainer.max_steps", "8", "--data.batch_tokens", "400", "--data.packing", "true"),
        *("--model.rslora", "true", "--model.optimizer", "adamw_8bit", "--model.target_modules", "[q_proj,down_proj]"),
    ],
}
"""Options of the runs, by what they are to show."""


def main() -> int:
    """Write or compare the digests; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the digests of this code are kept")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="digests to hold this code against")
    args = parser.parse_args()
    if not (args.write or args.compare):
        parser.error("give --write FILE or --compare FILE")
    try:
        was = json.loads(args.compare.read_text(encoding="utf-8")) if args.compare else {}
    except (OSError, ValueError) as error:
        parser.error(f"--compare: {error}")
    with tempfile.TemporaryDirectory(prefix="lit_qlora-pin-") as folder:
        found = pin(Path(folder))
    if args.write:
        args.write.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not args.compare:
        return 0
    different = [name for name in sorted({*was, *found}) if was.get(name) != found.get(name)]
    for name in different:
        print(f"{name}: {was.get(name)} -> {found.get(name)}")
    print(f"{len(found)} digests, {len(different)} differ")
    return 1 if different else 0


def pin(folder: Path) -> dict[str, Any]:
    """The digests of both runs, made in ``folder``."""
    found: dict[str, Any] = {}
    for number, (name, options) in enumerate(RUNS.items()):
        run = folder / str(number)
        command(folder, "fit", *options, "--run", str(run))
        for step in sorted((run / "checkpoints").iterdir()):
            found[f"{name}: {step.name} tensors"] = _digest((step / "state.safetensors").read_bytes())
            record = _record(json.loads((step / "state.json").read_bytes()))
            found |= {f"{name}: {step.name} {key}": value for key, value in record.items() if key != "settings"}
        for file in ("adapter_model.safetensors", "adapter_config.json", "lit_qlora.json", "result.json"):
            found[f"{name}: adapter/{file}"] = _digest((run / "adapter" / file).read_bytes())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        kept = [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]
        found[f"{name}: metrics.jsonl"] = _digest(json.dumps(kept).encode())
        validated = command(folder, "validate", "--run", str(run))
        found[f"{name}: validate"] = _digest(validated.replace(str(folder), "").encode())
        answer = command(folder, "chat", "--run", str(run), "--prompt", "Where does Tom live?")
        found[f"{name}: answer"] = _digest(answer.encode())
    caches = sorted(file.name for file in (folder / "cache" / "lit_qlora").iterdir() if not file.name.startswith("."))
    printed = command(folder, "plan", "--config", str(ROOT / "configs" / "colab_t4_1k.yaml"), "--model.base", "demo",
                      "--data.source", "demo", "--gpu", "t4")  # fmt: skip
    return found | {"cache keys": caches, "plan": _digest(printed.encode())}


def command(folder: Path, *args: str) -> str:
    """What main.py prints for ``args``; runs and caches lie in ``folder``.

    Raises:
        SystemExit: It ended with another exit status than 0.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "COLUMNS": "120",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *args],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"main.py {' '.join(args)} ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


def _record(state: Any) -> dict[str, str | int]:
    """The record of the run in a checkpoint's state.json, in which a dict is a list of pairs."""
    record = dict(dict(state["state"]["dict"])["run"]["dict"])
    return {key: value if isinstance(value, str | int) else json.dumps(value) for key, value in record.items()}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
