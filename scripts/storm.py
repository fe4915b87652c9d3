"""Owns the proof by force: runs of the real command, killed at random moments and started again until they finish.

``python scripts/storm.py --runs 100 --seed 0`` prints how many ended as if never cut, to the last bit, and in which
phases the kills fell; exit status 1 if any did not. Most starts are forked from a process that has done the imports:
processes of their own, with a real SIGKILL and real files. A share of them, ``--cold``, is ``python main.py`` itself.
Knows no training.
"""

import argparse
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
COMMON = [
    "--model.dropout", "0.1", "--trainer.max_epochs", "2", "--trainer.limit_val_batches", "2",
    "--trainer.log_every_n_steps", "2", "--samples.count", "1", "--samples.max_new_tokens", "3",
    "--trainer.callbacks", "scripts.witness.Witness",
]  # fmt: skip
VARIANTS = {
    "accumulated": [
        "--trainer.limit_train_batches", "9", "--trainer.accumulate_grad_batches", "2",
        "--trainer.val_check_interval", "5", "--save_every_steps", "2",
    ],
    "eight-bit": [
        "--trainer.limit_train_batches", "6", "--data.batch_tokens", "300", "--data.num_workers", "2",
        "--model.optimizer", "adamw_8bit", "--trainer.val_check_interval", "1.0", "--save_every_steps", "3",
    ],
    "packed": [
        "--trainer.limit_train_batches", "7", "--data.batch_tokens", "200", "--data.packing", "true",
        "--trainer.accumulate_grad_batches", "3", "--trainer.val_check_interval", "4", "--save_every_steps", "1",
    ],
}  # fmt: skip
LEFTOVER = re.compile(r"\..+\.(tmp|old|gone)\b.*")
"""What only stands in a run folder while something is being written there."""


@dataclass
class Uncut:
    """A variant's run without a kill.

    Args:
        result: What `witness.result` returns.
        testimony: What its only start has seen.
        seconds: Time of the run, by whether its start is cold.
    """

    result: dict[str, Any]
    testimony: list[dict[str, Any]]
    seconds: dict[bool, float]


@dataclass
class Outcome:
    """What became of one run.

    Args:
        variant: Its settings, a name in ``VARIANTS``.
        problems: A sentence for each difference from the uncut run.
        kills: Number of kills by phase.
        writes_cut: Number of kills that left an unfinished file or folder.
    """

    variant: str
    problems: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    writes_cut: int = 0


def warm_up() -> None:
    """All imports that a run makes, so that a fork of this process begins where they are done."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    import lit_qlora.training  # noqa: F401
    import scripts.witness  # noqa: F401


def start(run: Path, variant: str, is_cold: bool) -> ForkProcess:
    """Start ``fit`` in a process of its own; what it prints goes into a file beside the run folder.

    Args:
        run: Run folder.
        variant: Its settings, a name in ``VARIANTS``.
        is_cold: True to start python main.py itself, False to fork a process that has done the imports.
    """
    from scripts import witness

    witness.note(run, phase="start")
    args = ["fit", "--run", str(run), *COMMON, *VARIANTS[variant]]
    sys.stdout.flush()
    process = multiprocessing.get_context("fork").Process(target=_give, args=(args, _log(run), is_cold))
    process.start()
    return process


def _give(args: list[str], log: Path, is_cold: bool) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if is_cold:
        os.execv(sys.executable, [sys.executable, str(ROOT / "main.py"), *args])
    from lit_qlora.cli import main

    sys.exit(main(args))


def ended_within(process: ForkProcess, seconds: float) -> bool:
    """True if a process ends within a time.

    Its ``join`` knows an end by a pipe, which another program may still hold open: a cold start would be waited for to
    its very end, and never be killed.

    Args:
        process: The process.
        seconds: Time to wait, in seconds.
    """
    deadline = time.monotonic() + seconds
    while process.exitcode is None:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(left, 0.005))
    return True


def _log(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def run_uncut(folder: Path, variant: str, cold: float) -> Uncut:
    """Run to the end without a kill, once for each kind of start that is used; all must give the same.

    Args:
        folder: Folder for the runs.
        variant: Their settings, a name in ``VARIANTS``.
        cold: Share of starts that are python main.py itself.

    Raises:
        SystemExit: A run failed, or two of them differ.
    """
    from scripts import witness

    found: list[Uncut] = []
    for is_cold in dict.fromkeys((cold == 1, cold > 0)):
        run = folder / f"uncut-{variant}-{is_cold}"
        began = time.monotonic()
        process = start(run, variant, is_cold)
        process.join()
        seconds = time.monotonic() - began
        if process.exitcode:
            sys.exit(f"{variant}, uncut: exit status {process.exitcode}\n{_log(run).read_text(encoding='utf-8')}")
        found.append(Uncut(witness.result(run), witness.testimony(run)[0], {is_cold: seconds}))
    differences = witness.differences(found[-1].result, found[0].result)
    if differences or found[-1].testimony != found[0].testimony:
        sys.exit(f"{variant}: two runs that nobody cut are not the same: {differences[:3]}")
    return Uncut(found[0].result, found[0].testimony, found[0].seconds | found[-1].seconds)


def storm(folder: Path, uncut: dict[str, Uncut], seed: int, cold: float, number: int) -> Outcome:
    """Kill a run and start it again until it finishes, and compare it with the uncut one.

    Args:
        folder: Folder for the run, which is removed if it ends well.
        uncut: The uncut runs, by variant.
        seed: Seed of all moments of a kill.
        cold: Share of starts that are python main.py itself.
        number: Number of the run, which chooses variant and moments.
    """
    from scripts import witness

    draw = random.Random(f"{seed}/{number}")
    variant = sorted(uncut)[number % len(uncut)]
    outcome, run = Outcome(variant), folder / f"run-{number}"
    while True:
        is_cold = draw.random() < cold
        process = start(run, variant, is_cold)
        if ended_within(process, draw.uniform(0, uncut[variant].seconds[is_cold])):
            break
        process.kill()
        process.join()
        outcome.kills[f"{witness.last_phase(run)}{' (cold)' if is_cold else ''}"] += 1
        outcome.writes_cut += any(LEFTOVER.fullmatch(path.name) for path in run.rglob(".*"))
    if process.exitcode:
        outcome.problems.append(f"exit status {process.exitcode}")
    else:
        outcome.problems += witness.differences(witness.result(run), uncut[variant].result)
        outcome.problems += witness.contradictions(witness.testimony(run), uncut[variant].testimony)
    if not outcome.problems:
        shutil.rmtree(run)
    return outcome


def all_storms(folder: Path, args: argparse.Namespace) -> Iterator[Outcome]:
    """Yield the outcomes in the order of the runs.

    Args:
        folder: Folder for the runs.
        args: Parsed options of this script.
    """
    variants = args.variants or list(VARIANTS)
    uncut = {variant: run_uncut(folder, variant, args.cold) for variant in variants[: args.runs]}
    one = partial(storm, folder, uncut, args.seed, args.cold)
    if args.jobs == 1:
        yield from map(one, range(args.runs))
        return
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(one, range(args.runs))


def main() -> int:
    """Run all storms, print what was found, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--runs", type=int, default=100, help="runs to the end")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--cold", type=float, default=0.1, help="share of the starts that are python main.py itself")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="settings that take turns; default: all")
    parser.add_argument("--deterministic", action="store_true", help="on a GPU: only so are its bits the same")
    parser.add_argument("--kills", type=float, default=float("inf"), help="start no run after so many kills")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start counting up no later than this")
    args = parser.parse_args()
    if min(args.runs, args.jobs) < 1 or not 0 <= args.cold <= 1 or not (args.kills > 0 and args.minutes > 0):
        parser.error("expected --runs and --jobs from 1, --cold from 0 to 1, and --kills and --minutes above 0")
    if args.deterministic:
        COMMON.extend(["--trainer.deterministic", "true"])
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}
    folder = Path(tempfile.mkdtemp(prefix="lit_qlora-storm-"))
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    began, outcomes, kills = time.monotonic(), list[Outcome](), Counter[str]()
    if args.cold < 1:
        warm_up()
    for number, outcome in enumerate(all_storms(folder, args)):
        outcomes.append(outcome)
        for problem in outcome.problems[:5]:
            print(f"run {number} ({outcome.variant}, {folder / f'run-{number}'}): {problem[:300]}", flush=True)
        kills += outcome.kills
        if kills.total() >= args.kills or time.monotonic() - began > 60 * args.minutes:
            break
    same = sum(not outcome.problems for outcome in outcomes)
    phases = ", ".join(f"{phase} {count}" for phase, count in kills.most_common())
    print(f"{same} of {len(outcomes)} runs ended as if never cut, to the last bit")
    print(f"{kills.total()} kills: {phases}")
    print(f"{sum(outcome.writes_cut for outcome in outcomes)} of them in the middle of a write to the run folder")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes, {args.jobs} at a time")
    if same == len(outcomes):
        shutil.rmtree(folder)
    return int(same < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
