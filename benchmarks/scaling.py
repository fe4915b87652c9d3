"""Measures two GPUs beside one: the same numbers, and how much faster.

    python benchmarks/scaling.py --output scaling.json            # two GPUs, under 8 minutes
    python benchmarks/scaling.py --cpu --output scaling.json      # tries the script itself; its speeds say nothing

First the same short runs on one and on two: in fp32, with recorded kernels, and in fp16 under a T4's limits; their
figures and adapters are compared. Then tokens that are not padding per second of whole optimizer steps, on a random
base in the shape of a 7B (fewer layers: time per layer and traffic per layer are the same), rows as long as Guanaco's;
beside it what the dealing of micro-batches allows, and the time of one all-reduce of the adapter's gradients.

Runs of one GPU share the machine two at a time, each on a GPU of its own. What is not begun in time is left out, and
named. The last line is the JSON that --output gets.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
HERE = Path(__file__).parent
MAIN, T4 = HERE.parent / "main.py", HERE / "as_t4.py"
PLAIN = ["--samples.count", "0", "--trainer.max_epochs", "99"]
EQUAL = [*PLAIN, "--trainer.log_every_n_steps", "1", "--trainer.accumulate_grad_batches", "4", "--data.batch_size", "3",
         "--trainer.limit_val_batches", "6", "--trainer.val_check_interval", "20"]  # fmt: skip
EQUALITIES = {
    "fp32, dropout": ["--trainer.precision", "32-true", "--model.dropout", "0.05", "--model.cuda_graphs", "false"],
    "recorded kernels": ["--model.cuda_graphs", "true"],
    "T4, fp16": [],
}
SPEEDS = {
    "batch 4 x 4": ["--data.batch_size", "4", "--trainer.accumulate_grad_batches", "4"],
    "2048 tokens x 4": ["--data.batch_tokens", "2048", "--trainer.accumulate_grad_batches", "4"],
}
LIMIT_S = 200
NOT_COMPARED = ("speed/tokens_per_second", "memory/")


class Run:
    """A fit in processes of its own, under way."""

    def __init__(self, folder: Path, name: str, options: Sequence[str], gpus: Sequence[int], is_t4: bool, cpu: bool):
        self.run, self.began = folder / re.sub(r"\W+", "-", f"{name} on {len(gpus)}"), time.monotonic()
        script, count = T4 if is_t4 and not cpu else MAIN, len(gpus)
        command = [sys.executable, str(script), "fit", "--run", str(self.run), *options]
        if is_t4 and cpu:
            command += ["--trainer.precision", "32-true"]
        if cpu:
            command += ["--trainer.accelerator", "cpu"]
        if count > 1 and script is MAIN:
            command += ["--trainer.devices", str(count)]
        elif count > 1:
            rendezvous = [f"--nproc-per-node={count}", "--master-port", str(29500 + os.getpid() % 400)]
            command[1:1] = ["-m", "torch.distributed.run", *rendezvous, "--"]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        environment |= {"NCCL_NVLS_ENABLE": "0"}  # multicast may be off on a machine that is lent
        self.log = (self.run.parent / f"{self.run.name}.log").open("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            command, env=environment, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def end(self) -> dict[str, Any]:
        """What it recorded; waits for it."""
        try:
            status = self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()
            status = -9
        self.log.seek(0)
        text = self.log.read()
        self.log.close()
        seconds = round(time.monotonic() - self.began, 1)
        print(f"{self.run.name}: status {status}, {seconds} s", flush=True)
        if status:
            return {"failed": text[-2500:], "status": status, "seconds": seconds}
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        dealt = re.search(r"each works (\d+)%", text)
        recorded = [line for line in text.splitlines() if re.match(r" *(train|plan) ", line)]
        return {"lines": lines, "dealt": int(dealt[1]) / 100 if dealt else None, "said": recorded, "seconds": seconds}


def main() -> None:
    """Measures, and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("scaling.json"))
    parser.add_argument("--cpu", action="store_true", help="tiny runs with gloo, to try this script")
    parser.add_argument("--shape", default="7b", help="of the random base, as in random_base.py")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=60, help="timed in logs of ten; the first two logs are warm-up")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--only", choices=["equalities", "speed"])
    parser.add_argument("--all-reduce", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.all_reduce:
        all_reduce(options.all_reduce, options.cpu)
        return
    if options.cpu:
        options.shape, options.layers, options.rows, options.steps = "small", 1, 60, 4
    found: dict[str, Any] = {"machine": machine(), "options": {k: str(v) for k, v in vars(options).items()}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for part in (equalities, speed):
            if options.only in (None, part.__name__):
                found[part.__name__] = part(options, folder)
                found["seconds"] = round(time.monotonic() - STARTED, 1)
                options.output.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps(found))


def machine() -> dict[str, Any]:
    """What is measured on."""
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"gpus": names, "torch": torch.__version__, "cores": os.cpu_count()}


def is_time_left(options: argparse.Namespace, needed_s: float) -> bool:
    """Whether what takes ``needed_s`` ends within the minutes."""
    return time.monotonic() - STARTED + needed_s < 60 * options.minutes


def equalities(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Differences between one and two GPUs in figures and adapters, relative, on the demo's base."""
    steps = ["--trainer.max_steps", "3" if options.cpu else "12"]
    kinds = {name: own for name, own in EQUALITIES.items() if not (options.cpu and name == "recorded kernels")}
    runs: dict[tuple[str, int], Any] = {}
    for count in (1, 2):  # together: no speed is measured
        for number, (name, own) in enumerate(kinds.items()):
            gpus = [number % 2] if count == 1 else [0, 1]
            runs[name, count] = Run(folder, name, [*EQUAL, *steps, *own], gpus, name.startswith("T4"), options.cpu)
        for name in kinds:
            runs[name, count] = runs[name, count], runs[name, count].end()
    found = {}
    for name in kinds:
        (one, alone), (two, several) = runs[name, 1], runs[name, 2]
        failed = {count: end["failed"] for count, end in ((1, alone), (2, several)) if "failed" in end}
        found[name] = {"failed": failed} if failed else compare(one.run, two.run, alone, several)
        print(f"{name}: {json.dumps(found[name])[:2000]}", flush=True)
    return found


def compare(one: Path, two: Path, alone: dict[str, Any], several: dict[str, Any]) -> dict[str, Any]:
    """The largest relative differences between two runs, and the scaler's skips of both."""
    from safetensors.torch import load_file

    worst: dict[str, float] = {}
    first: dict[str, float] = {}
    for line, other in zip(alone["lines"], several["lines"], strict=True):
        for name in line.keys() & other.keys():
            if name.startswith(NOT_COMPARED) or not isinstance(line[name], float) or not isinstance(other[name], float):
                continue
            difference = abs(line[name] - other[name]) / max(abs(line[name]), 1e-12)
            worst[name] = max(worst.get(name, 0.0), difference)
            if line["step"] <= 1:
                first[name] = max(first.get(name, 0.0), difference)
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two)]
    parted = max(
        float((adapters[0][name] - adapters[1][name]).norm() / (adapters[0][name].norm() + 1e-12))
        for name in adapters[0]
    )
    skips = [[line.get("updates/skipped") for line in lines["lines"]] for lines in (alone, several)]
    names = ("train/loss", "train/gradient_norm", "val/loss")
    return {
        "worst": {name: worst.get(name) for name in names},
        "step_1": {name: first.get(name) for name in names},
        "adapter": parted,
        "skipped": skips,
        "same_skips": skips[0] == skips[1],
        "same_steps": [line["step"] for line in alone["lines"]] == [line["step"] for line in several["lines"]],
        "said": several["said"],
    }


def speed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens per second of one and of two GPUs, without limits and under a T4's."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    from random_base import make

    from lit_qlora import demo

    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tokenizer / name).write_bytes((Path(demo.BASE) / name).read_bytes())
    base = make(options.shape, folder / "base", tokenizer, options.layers)
    rows = write_rows(folder / "rows.jsonl", options.rows)
    print(f"base and rows: {time.monotonic() - STARTED:.0f} s", flush=True)
    logged = 10 if options.steps >= 30 else 1
    common = [
        *PLAIN, "--model.base", str(base), "--data.source", str(rows), "--data.max_length", "1024",
        "--model.learning_rate", "0.0001", "--model.cuda_graphs", "false", "--trainer.limit_val_batches", "0",
        "--trainer.max_steps", str(options.steps), "--trainer.log_every_n_steps", str(logged),
        "--model.quantized_cache", str(folder / "copies"), "--save_every_minutes", "1000",
    ]  # fmt: skip
    found: dict[str, Any] = {"all_reduce_ms": timed_all_reduce(options)}
    print(f"all-reduce: {found['all_reduce_ms']} ms", flush=True)
    # One run by itself before all others: it writes the 4-bit copy, and fills the compiler's cache.
    warm = [*common, *SPEEDS["batch 4 x 4"], "--trainer.max_steps", "2"]
    warmed = Run(folder, "warm", warm, [0], False, options.cpu).end()
    if "failed" in warmed:
        return found | {"failed": warmed["failed"]}
    for is_t4 in (False, True):
        limits = "T4's limits" if is_t4 else "no limits"
        names = [f"{name}, {limits}" for name in SPEEDS]
        if not is_time_left(options, 2 * warmed["seconds"] + 30):
            found |= {name: {"left out": "no time"} for name in names}
            continue
        singles = [
            Run(folder, name, [*common, *own], [number], is_t4, options.cpu)
            for number, (name, own) in enumerate(zip(names, SPEEDS.values(), strict=True))
        ]
        alone = [run.end() for run in singles]
        for name, own, one in zip(names, SPEEDS.values(), alone, strict=True):
            if not is_time_left(options, warmed["seconds"]):
                found[name] = {"left out": "no time"}
                continue
            two = Run(folder, name, [*common, *own], [0, 1], is_t4, options.cpu).end()
            found[name] = rates(one, two)
            print(f"{name}: {json.dumps(found[name])[:2000]}", flush=True)
    return found


def rates(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of both, and the efficiency of two."""
    failed = {count: end["failed"] for count, end in ((1, one), (2, two)) if "failed" in end}
    if failed:
        return {"failed": failed}
    speeds = [timed(run["lines"]) for run in (one, two)]
    return {
        "tokens_per_second": [round(value, 1) for value in speeds],
        "times": round(speeds[1] / speeds[0], 3),
        "efficiency": round(speeds[1] / (2 * speeds[0]), 3),
        "dealing_allows": two["dealt"],
        "logged": [[round(line["speed/tokens_per_second"]) for line in run["lines"] if "train/loss" in line]
                   for run in (one, two)],
        "memory_gib": [max((line.get("memory/train_reserved_gib", 0) for line in run["lines"]), default=0)
                       for run in (one, two)],
    }  # fmt: skip


def timed(lines: Sequence[dict[str, Any]]) -> float:
    """Tokens per second over the logs behind the first two, each of as many steps."""
    logs = [line["speed/tokens_per_second"] for line in lines if "speed/tokens_per_second" in line]
    return statistics.harmonic_mean(logs[2:] or logs)


def write_rows(file: Path, count: int) -> Path:
    """Conversations as long as those of Guanaco, an answer of seven eighths each."""
    from lit_qlora.forecast.foresee import guanaco_lengths

    with file.open("w", encoding="utf-8") as rows:
        for length in guanaco_lengths(count):
            words = max(2, length - 16)
            turns = [("user", words // 8 or 1), ("assistant", words - words // 8)]
            messages = [{"role": role, "content": " ".join(["the"] * many)} for role, many in turns]
            rows.write(json.dumps({"messages": messages}) + "\n")
    return file


def timed_all_reduce(options: argparse.Namespace) -> Any:
    """Milliseconds of one all-reduce of the gradients of a rank-16 adapter of the whole 7B (160 MB)."""
    count = 1_000_000 if options.cpu else 40_000_000
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", "29488", "--"]
    command += [str(Path(__file__).resolve()), "--all-reduce", str(count), *(["--cpu"] if options.cpu else [])]
    environment = os.environ | {"NCCL_NVLS_ENABLE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr[-500:]]
    return json.loads(last[0]) if not done.returncode else {"failed": last[0]}


def all_reduce(count: int, cpu: bool) -> None:
    """In each of two processes: the median of twenty."""
    import torch
    from torch import distributed

    rank = int(os.environ["LOCAL_RANK"])
    if not cpu:
        torch.cuda.set_device(rank)
    values = torch.ones(count, device="cpu" if cpu else f"cuda:{rank}")
    free = 0 if cpu else torch.cuda.mem_get_info()[0]
    distributed.init_process_group("gloo" if cpu else "nccl")
    taken = []
    for _ in range(25):
        _wait(cpu)
        since = time.monotonic()
        distributed.all_reduce(values)
        _wait(cpu)
        taken.append(1000 * (time.monotonic() - since))
        values.fill_(1.0)
    if rank == 0:
        own = 0 if cpu else free - torch.cuda.mem_get_info()[0]
        print(json.dumps({"bytes": 4 * count, "ms": round(statistics.median(taken[5:]), 3), "nccl_mib": own >> 20}))
    distributed.destroy_process_group()


def _wait(cpu: bool) -> None:
    import torch

    if not cpu:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
