"""Measure two GPUs beside one: the same numbers, and how much faster.

    python benchmarks/scaling.py --output FILE        # two GPUs, under 8 minutes
    python benchmarks/scaling.py --cpu                # tries the script itself; its speeds say nothing

First the same short runs on one and on two: in fp32, with recorded kernels, and in fp16 under a T4's limits; their
figures and adapters are compared. Then tokens that are not padding per second of whole optimizer steps, on a random
base in the shape of a 7B, rows as long as Guanaco's; beside it what the dealing of micro-batches allows, and the time
of one all-reduce of the adapter's gradients. Then a base in the shape of a 70B, shared by two GPUs limited to the
memory of 24 GB cards: its tokens per second, and its memory beside the forecast.

Runs of one GPU share the machine two at a time, each on a GPU of its own. What is not begun in time is left out, and
named. The last line is the JSON that --output gets, if it is given.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from asked import above_0, require_gpus, whole

STARTED = time.monotonic()
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
MAIN, T4 = HERE.parent / "main.py", HERE / "as_t4.py"
PLAIN = ["--samples.count", "0", "--trainer.max_epochs", "99"]
EQUAL = [*PLAIN, "--trainer.log_every_n_steps", "1", "--trainer.accumulate_grad_batches", "4", "--data.batch_size", "3",
         "--trainer.limit_val_batches", "6", "--trainer.val_check_interval", "20"]  # fmt: skip
EQUALITIES = {
    "fp32, dropout": ["--trainer.precision", "32-true", "--model.dropout", "0.05", "--model.cuda_graphs", "false"],
    "recorded kernels": ["--model.cuda_graphs", "true"],
    "T4, fp16": [],
}
STARTED_SINGLY = ["--trainer.accumulate_grad_batches", "4", "--model.cuda_graphs", "false"]
SPEEDS = {
    "batch 4 x 4": [*STARTED_SINGLY, "--data.batch_size", "4"],
    "2048 tokens x 4": [*STARTED_SINGLY, "--data.batch_tokens", "2048"],
    "8192 tokens x 4": [*STARTED_SINGLY, "--data.batch_tokens", "8192"],
    "batch 4 x 4, recorded": [
        *("--data.batch_size", "4", "--trainer.accumulate_grad_batches", "4", "--model.cuda_graphs", "true")
    ],
}
"""A large card waits for its host, which starts the kernels of 2,048 tokens too slowly, unless they are recorded. That
takes some hundred ``--steps``, since each length is recorded."""
LIMIT_S = 200
RUN_S = 60
"""Seconds that a run of `speed` takes at least, with its start."""
GIB_OF_24_GB = 23.3
"""What torch may take of a card of 24 GB: an RTX 4090's 23.64 GiB without CUDA's context."""
LARGE = ["--config", str(HERE.parent / "configs" / "70b_2x24.yaml"), "--data.batch_tokens", "1024", "--data.max_length",
         "1024", "--trainer.accumulate_grad_batches", "8", "--model.shard", "true"]  # fmt: skip
NOT_COMPARED = ("speed/tokens_per_second", "memory/")


under_way: list["Run"] = []
"""All runs so far, to be stopped with this script."""


class Run:
    """A fit in processes of its own, under way.

    Args:
        folder: Folder for the run.
        name: Its name in the figures.
        options: Further options of ``fit``.
        gpus: Numbers of the GPUs that it may use.
        limits: Arguments of as_t4.py; None for none of its limits.
        cpu: True to use as many processes on the CPU instead.
    """

    def __init__(
        self, folder: Path, name: str, options: Sequence[str], gpus: Sequence[int], limits: list[str] | None, cpu: bool
    ):
        self.run, self.began = folder / re.sub(r"\W+", "-", f"{name} on {len(gpus)}"), time.monotonic()
        script, count = MAIN if limits is None or cpu else T4, len(gpus)
        own = [] if script is MAIN else limits or []
        command = [sys.executable, str(script), *own, "fit", "--run", str(self.run), *options]
        if limits is not None and cpu:
            command += ["--trainer.precision", "32-true"]
        if cpu:
            command += ["--trainer.accelerator", "cpu"]
        if count > 1 and script is MAIN:
            command += ["--trainer.devices", str(count)]
        elif count > 1:
            rendezvous = [f"--nproc-per-node={count}", "--master-port", str(29500 + os.getpid() % 400)]
            command[1:1] = ["-m", "torch.distributed.run", *rendezvous, "--"]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        # Multicast may be off on a machine that is lent.
        environment |= {"NCCL_NVLS_ENABLE": "0", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
        under_way.append(self)
        self.log = (self.run.parent / f"{self.run.name}.log").open("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            command, env=environment, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def stop(self) -> None:
        """End it, and the processes that it began: torchrun's are no longer in its group."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> dict[str, Any]:
        """Wait for its end; return what it recorded."""
        try:
            status = self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.stop()
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
    """Measure, and write what was found."""
    from random_base import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE", help="for the figures; default: none")
    parser.add_argument("--cpu", action="store_true", help="tiny runs with gloo, to try this script")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="of the random base, as in random_base.py")
    parser.add_argument("--layers", type=whole, help="of the 7B, fewer than it has")
    parser.add_argument("--large", choices=SHAPES, default="70b", help="shape of the base that is shared")
    parser.add_argument("--rows", type=whole, default=2000)
    parser.add_argument("--steps", type=whole, default=40, help="the last half is timed")
    parser.add_argument("--minutes", type=above_0, default=7.5)
    parser.add_argument("--limits", choices=["none", "t4"], help="of speed; default: one after the other")
    parser.add_argument("--speeds", nargs="+", choices=SPEEDS, default=list(SPEEDS)[:2], help="which settings of speed")
    parser.add_argument("--only", choices=[part.__name__ for part in (equalities, speed, shared)])
    parser.add_argument("--all-reduce", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.all_reduce:
        all_reduce(options.all_reduce, options.cpu)
        return
    if options.cpu:
        parser.set_defaults(shape="small", layers=1, rows=120, steps=4, large="small")
        options = parser.parse_args()
    else:
        require_gpus(parser, 2, "give --cpu to try the script itself")
    found: dict[str, Any] = {"machine": machine(), "options": {k: str(v) for k, v in vars(options).items()}}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            for part in (equalities, speed, shared):
                if options.only in (None, part.__name__):
                    found[part.__name__] = part(options, folder)
                    found["seconds"] = round(time.monotonic() - STARTED, 1)
                    if options.output:
                        options.output.write_text(json.dumps(found, indent=1), encoding="utf-8")
        finally:
            for run in under_way:
                run.stop()
    print(json.dumps(found))


def machine() -> dict[str, Any]:
    """What is measured on."""
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"gpus": names, "torch": torch.__version__, "cores": os.cpu_count()}


def is_time_left(options: argparse.Namespace, needed_s: float) -> bool:
    """True if something that takes ``needed_s`` seconds ends within the minutes that ``options`` allow."""
    return time.monotonic() - STARTED + needed_s < 60 * options.minutes


def equalities(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compare one and two GPUs in figures and adapters, on the demo's base.

    Args:
        options: Parsed options of this script.
        folder: Folder for the runs.

    Returns:
        What `compare` returns, or what failed, by kind of run.
    """
    steps = ["--trainer.max_steps", "3" if options.cpu else "12"]
    kinds = {name: own for name, own in EQUALITIES.items() if not (options.cpu and name == "recorded kernels")}
    runs: dict[tuple[str, int], Any] = {}
    for count in (1, 2):  # together: no speed is measured
        for number, (name, own) in enumerate(kinds.items()):
            gpus = [number % 2] if count == 1 else [0, 1]
            limits: list[str] | None = [] if name.startswith("T4") else None
            runs[name, count] = Run(folder, name, [*EQUAL, *steps, *own], gpus, limits, options.cpu)
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
    """Compare two finished runs.

    Args:
        one: Run folder of one GPU.
        two: Run folder of two.
        alone: What the first recorded, as `Run.end` returns it.
        several: What the second recorded.

    Returns:
        The largest relative differences, of all steps and of the first, of figures and adapter; the scaler's skips.
    """
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
    """Measure tokens per second of one and of two GPUs, without limits and under a T4's.

    Args:
        options: Parsed options of this script.
        folder: Folder for the runs.

    Returns:
        What `rates` returns, or why it was left out, by setting; and the time of an all-reduce.
    """
    found: dict[str, Any] = {"all_reduce_ms": timed_all_reduce(options)}
    print(f"all-reduce: {found['all_reduce_ms']} ms", flush=True)
    for is_t4 in (False, True) if options.limits is None else (options.limits == "t4",):
        limits = "T4's limits" if is_t4 else "no limits"
        settings = {f"{name}, {limits}": SPEEDS[name] for name in options.speeds}
        if not is_time_left(options, 2 * RUN_S):
            found |= {name: {"left out": "no time"} for name in settings}
            continue
        dtype = "float32" if options.cpu else "float16" if is_t4 else "bfloat16"
        common = [
            *inputs(options, folder, options.shape, options.layers, dtype), "--data.max_length", "1024",
            "--trainer.limit_val_batches", "0",
            "--trainer.max_steps", str(options.steps), "--trainer.log_every_n_steps", str(max(1, options.steps // 8)),
        ]  # fmt: skip
        arguments: list[str] | None = [] if is_t4 else None
        singles = [
            Run(folder, name, [*common, *own], [number % 2], arguments, options.cpu)
            for number, (name, own) in enumerate(settings.items())
        ]
        alone = [run.end() for run in singles]
        for (name, own), one in zip(settings.items(), alone, strict=True):
            if not is_time_left(options, RUN_S):
                found[name] = {"left out": "no time"}
                continue
            two = Run(folder, name, [*common, *own], [0, 1], arguments, options.cpu).end()
            found[name] = rates(one, two)
            print(f"{name}: {json.dumps(found[name])[:2000]}", flush=True)
    return found


def shared(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure a base that neither of two cards of 24 GB holds alone.

    Args:
        options: Parsed options of this script.
        folder: Folder for the runs.

    Returns:
        What `of_shared` returns, or why it was left out, by where the shares lie.
    """
    dtype = "float32" if options.cpu else "bfloat16"
    common = [
        *LARGE, *inputs(options, folder, options.large, 2 if options.cpu else None, dtype),
        "--trainer.max_steps", "6", "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "2",
    ]  # fmt: skip
    found: dict[str, Any] = {}
    for where in ("gpu", "host"):
        if not is_time_left(options, RUN_S):
            found[where] = {"left out": "no time"}
            continue
        limits = ["--gib", str(GIB_OF_24_GB)]
        own = [*common, "--model.shard_to", where]
        end = Run(folder, f"shared on {where}", own, [0, 1], limits, options.cpu).end()
        found[where] = end if "failed" in end else of_shared(end)
        print(f"shared on {where}: {json.dumps(found[where])[:3000]}", flush=True)
    return found


def of_shared(end: dict[str, Any]) -> dict[str, Any]:
    """Speed, losses and memory of a run with a shared base, from what it recorded.

    Args:
        end: What `Run.end` returns.
    """

    def peak(name: str) -> float | None:
        return max((line[name] for line in end["lines"] if name in line), default=None)

    names = {"reserved": "train_reserved", "allocated": "train_allocated", "forecast": "predicted_reserved",
             "load": "load_reserved", "host": "host"}  # fmt: skip
    memory = {name: peak(f"memory/{key}_gib") for name, key in names.items()}
    return {
        "tokens_per_second": round(timed(end["lines"]), 1),
        "logged": [round(line["speed/tokens_per_second"]) for line in end["lines"] if "train/loss" in line],
        "losses": [line["train/loss"] for line in end["lines"] if "train/loss" in line],
        "memory_gib": memory,
        "forecast_is_off": memory["reserved"] and memory["forecast"] / memory["reserved"] - 1,  # type: ignore[operator]
        "dealing_allows": end["dealt"],
        "seconds": end["seconds"],
        "said": end["said"],
    }


def inputs(options: argparse.Namespace, folder: Path, shape: str, layers: int | None, dtype: str) -> list[str]:
    """Options of a fit on a random base in 4 bits and on rows as long as Guanaco's, both made on the first call.

    Args:
        options: Parsed options of this script.
        folder: Folder for base and rows.
        shape: Shape of the base, a name in ``SHAPES``.
        layers: Number of decoder layers; None for the shape's own.
        dtype: Dtype that the base computes in, by torch's name.
    """
    from random_base import make_in_4_bits

    from lit_qlora import demo

    tokenizer, base, rows = folder / "tokenizer", folder / f"{shape}-{dtype}", folder / "rows.jsonl"
    tokenizer.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tokenizer / name).write_bytes((Path(demo.BASE) / name).read_bytes())
    if not base.is_dir():
        make_in_4_bits(shape, base, tokenizer, layers, dtype)
        write_rows(rows, options.rows)
        print(f"{base.name} and rows: {time.monotonic() - STARTED:.0f} s", flush=True)
    return [*PLAIN, "--model.base", str(base), "--data.source", str(rows), "--model.learning_rate", "0.0001",
            "--save_every_minutes", "1000"]  # fmt: skip


def rates(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of two runs, and the efficiency of two GPUs.

    Args:
        one: What a run of one GPU recorded, as `Run.end` returns it.
        two: The same of two GPUs.
    """
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
    """Tokens per second over the last half of a run's logs; during the first half, kernels are still compiled.

    Args:
        lines: Lines of metrics.jsonl, each of as many steps.
    """
    logs = [line["speed/tokens_per_second"] for line in lines if "speed/tokens_per_second" in line]
    return statistics.harmonic_mean(logs[len(logs) // 2 :])


def write_rows(file: Path, count: int) -> Path:
    """Write ``count`` conversations as long as Guanaco's to ``file``, seven eighths of each an answer; return it."""
    from lit_qlora.forecast.foresee import guanaco_lengths

    with file.open("w", encoding="utf-8") as rows:
        for length in guanaco_lengths(count):
            words = max(2, length - 16)
            turns = [("user", words // 8 or 1), ("assistant", words - words // 8)]
            messages = [{"role": role, "content": " ".join(["the"] * many)} for role, many in turns]
            rows.write(json.dumps({"messages": messages}) + "\n")
    return file


def timed_all_reduce(options: argparse.Namespace) -> Any:
    """Measure one all-reduce of the gradients of a 7B's rank-16 adapter (160 MB) in two processes.

    Args:
        options: Parsed options of this script.

    Returns:
        What `all_reduce` prints, or what failed.
    """
    count = 1_000_000 if options.cpu else 40_000_000
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", "29488", "--"]
    command += [str(Path(__file__).resolve()), "--all-reduce", str(count), *(["--cpu"] if options.cpu else [])]
    environment = os.environ | {"NCCL_NVLS_ENABLE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr[-500:]]
    return json.loads(last[0]) if not done.returncode else {"failed": last[0]}


def all_reduce(count: int, cpu: bool) -> None:
    """Measure an all-reduce in one of two processes; the first prints the median of twenty in milliseconds.

    Args:
        count: Number of fp32 values.
        cpu: True for gloo on the CPU, False for NCCL.
    """
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
