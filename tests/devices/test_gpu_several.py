"""Runs on GPUs: replicas with NCCL, a shared base, layers from the host's memory. Each run has processes of its own.

All runs begin together, before the first test; a test waits for those that it compares.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_qlora.devices.world import STORE
from lit_qlora.figures.lines import read_lines
from tests.devices.on_gpu import OVERFLOWS_IN

ROOT = Path(__file__).parents[2]
LIMIT_S = 240
GONE_WITHIN_S = 15
"""Seconds in which a run of several ends once one of its processes was killed."""
BEGINS_WITHIN_S = 120

FIT = [
    *("fit", "--samples.count", "0", "--trainer.log_every_n_steps", "1", "--trainer.max_epochs", "9"),
    *("--trainer.accumulate_grad_batches", "4", "--data.batch_size", "3", "--trainer.limit_val_batches", "4"),
    *("--trainer.val_check_interval", "10", "--trainer.max_steps", "6"),
]
FP32 = ["--trainer.precision", "32-true"]
DROPOUT = [*FP32, "--model.dropout", "0.05", "--model.cuda_graphs", "false"]
RECORDED = [*FP32, "--model.cuda_graphs", "true"]
SHARED = ["--model.shard", "true"]
SAME_BITS = ["--trainer.deterministic", "true", "--model.checkpointing", "full"]
"""Options that recompute all activations, as a shared base's layers do, and sum in one order."""
ON_HOST = [*SHARED, "--model.shard_to", "host"]
WIDE = "wide"
"""Stands for a base of layers so large that copies of them take as long as a short micro-batch."""
CALM = 0.0175
"""Scale of its weights."""
RUNS: dict[str, tuple[int, str, str | None, list[str]]] = {
    # number of GPUs, limits, base, options
    "fp32, one": (1, "none", None, DROPOUT),
    "fp32, two": (2, "none", None, DROPOUT),
    "recorded, one": (1, "none", None, RECORDED),
    "recorded, two": (2, "none", None, RECORDED),
    "t4, one": (1, "t4", None, []),
    "t4, two": (2, "t4", None, []),
    "t4, overflow": (2, "overflow", None, []),
    "wide, one": (1, "none", WIDE, [*DROPOUT, *SAME_BITS]),
    "wide, one on host": (1, "none", WIDE, [*DROPOUT, *SAME_BITS, *ON_HOST]),
    "wide, two": (2, "none", WIDE, [*DROPOUT, *SAME_BITS]),
    "wide, two shared": (2, "none", WIDE, [*DROPOUT, *SAME_BITS, *SHARED]),
    "wide, two on host": (2, "none", WIDE, [*DROPOUT, *SAME_BITS, *ON_HOST]),
    "wide t4, two": (2, "t4", WIDE, [*SAME_BITS, "--model.cuda_graphs", "false"]),
    "wide t4, two shared": (2, "t4", WIDE, [*SAME_BITS, *SHARED]),
}


class Processes:
    """The processes of a run, one per GPU; what they print is kept."""

    def __init__(self, folder: Path, count: int, args: list[str]) -> None:
        folder.mkdir()
        self.folder = folder
        environment = os.environ | {"NCCL_NVLS_ENABLE": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if "--trainer.deterministic" in args else {}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        self.log = (folder / "log").open("w+", encoding="utf-8")
        self.processes = []
        for rank in range(count):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            own = {name: str(value) for name, value in places.items()} if count > 1 else {}
            command = [sys.executable, str(Path(__file__).with_name("on_gpu.py")), str(folder), *args]
            self.processes.append(
                subprocess.Popen(
                    command, env=environment | own | {STORE: str(folder / "store")}, cwd=folder,
                    stdout=self.log, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip

    def seen(self) -> list[dict[str, Any]]:
        """What each process left; all have ended well."""
        ends_at = time.monotonic() + LIMIT_S
        statuses = [process.wait(max(1, ends_at - time.monotonic())) for process in self.processes]
        self.log.seek(0)
        assert statuses == [0] * len(statuses), self.log.read()[-3000:]
        files = [self.folder / f"{rank}.json" for rank in range(len(statuses))]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def end(self) -> None:
        """Ends what has not ended."""
        for process in self.processes:
            process.kill()
            process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def gpus() -> int:
    count = torch.cuda.device_count()
    if not count:
        pytest.skip("no GPU")
    return count


@pytest.fixture(scope="module")
def wide(gpus: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base in 4 bits of 16 layers, each of other bytes, and the demo's tokenizer.

    Its weights are half as large as the benchmarks': those make a rounding grow 150 times in the first gradient and
    9,000 times in the fourth, so that another order of sums is seen at once; these make it no larger.
    """
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tokenizer / name).write_bytes((ROOT / "lit_qlora" / "demo" / "base" / name).read_bytes())
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "random_base.py"),
        "--shape",
        "1b",
        "--in-4-bits",
        "--scale",
        str(CALM),
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    options = ["--output", str(folder / "base"), "--tokenizer", str(tokenizer)]
    subprocess.run([*command, *options], check=True, env=environment, timeout=120, stdout=subprocess.DEVNULL)
    return folder / "base"


@pytest.fixture(scope="module")
def runs(gpus: int, wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Processes]]:
    """All that this machine has the GPUs for, under way."""
    folder, begun = tmp_path_factory.mktemp("runs"), {}
    try:
        for at, (name, (count, limits, base, options)) in enumerate(RUNS.items()):
            if count <= gpus:
                own = ["--model.base", str(wide)] if base else []
                args = ["fit", limits, *FIT, "--run", str(folder / str(at) / "run"), *options, *own]
                begun[name] = Processes(folder / str(at), count, args)
        yield begun
    finally:
        for run in begun.values():
            run.end()


def assert_same(one: Processes, other: Processes, rounding: float, adapter: bool) -> None:
    """Losses, gradient norms, updates and the adapter are equal but for rounding; an adapter's tensor by its norm."""
    lines, found = ([*read_lines(run.folder / "run" / "metrics.jsonl")] for run in (one, other))
    assert [line["step"] for line in lines] == [line["step"] for line in found] and lines[-1]["step"] == 6
    for line, beside in zip(lines, found, strict=True):
        assert line.keys() == beside.keys()
        for name in line.keys() & {"train/loss", "train/gradient_norm", "val/loss"}:
            assert beside[name] == pytest.approx(line[name], rel=rounding), (line["step"], name)
        for name in ("updates/applied", "updates/skipped"):
            assert beside.get(name) == line.get(name), (line["step"], name)
    if not adapter:
        return
    adapters = [load_file(run.folder / "run" / "adapter" / "adapter_model.safetensors") for run in (one, other)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[0].items():
        assert (adapters[1][name] - value).norm() <= 5 * rounding * value.norm(), name


def compare(
    runs: dict[str, Processes], one: str, other: str, rounding: float, adapter: bool = True
) -> tuple[list[Any], list[Any]]:
    """Compares two runs; what their processes saw."""
    if {one, other} - runs.keys():
        pytest.skip("needs two GPUs")
    seen = runs[one].seen(), runs[other].seen()
    assert_same(runs[one], runs[other], rounding, adapter)
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "rounding"), [("fp32", 1e-5), ("recorded", 1e-5), ("t4", 1e-3)])
def test_two_cards_learn_what_one_does(runs: dict[str, Processes], kind: str, rounding: float) -> None:
    _, several = compare(runs, f"{kind}, one", f"{kind}, two", rounding)
    assert [seen["device"] for seen in several] == ["cuda:0", "cuda:1"]
    assert several[0]["scale"] == several[1]["scale"]
    assert kind == "t4" or [seen["records"] for seen in several] == [kind == "recorded"] * 2


@pytest.mark.gpu
def test_a_gradient_that_overflows_on_one_card_is_skipped_on_both(runs: dict[str, Processes]) -> None:
    if "t4, overflow" not in runs:
        pytest.skip("needs two GPUs")
    seen = runs["t4, overflow"].seen()
    lines = [line for line in read_lines(runs["t4, overflow"].folder / "run" / "metrics.jsonl") if "train/loss" in line]
    skipped = [line["updates/skipped"] for line in lines]
    before = skipped[OVERFLOWS_IN - 2]
    assert skipped[OVERFLOWS_IN - 1 :] == [before + 1] * (len(lines) - OVERFLOWS_IN + 1)
    whole = runs["t4, two"].seen()
    assert [one["scale"] for one in seen] == [whole[0]["scale"] / 2] * 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("whole", "shared"),
    [
        ("wide, one", "wide, one on host"),
        ("wide, two", "wide, two shared"),
        ("wide, two", "wide, two on host"),
        ("wide t4, two", "wide t4, two shared"),
    ],
)
def test_a_shared_base_learns_what_a_whole_one_does(runs: dict[str, Processes], whole: str, shared: str) -> None:
    """To the last bit, with as many processes: bytes are moved, and nothing is computed otherwise."""
    (one, *_), several = compare(runs, whole, shared, 0)
    assert sum(one["storages"]) >= one["packed_bytes"] > 0
    for seen in several:
        # What is whole on a card are two layers; the rest of the weights has no storage of its own.
        assert seen["storages"] == [seen["layer_bytes"]] * 2
        total = seen["num_layers"] * seen["layer_bytes"]
        assert seen["own_bytes"] == pytest.approx(total / len(several), rel=1e-3)
        assert seen["allocated"] < one["allocated"]


@pytest.mark.gpu
@pytest.mark.parametrize("several", ["wide, two", "wide, two shared", "wide, two on host"])
def test_the_figures_of_a_wide_base_are_those_of_one_card(runs: dict[str, Processes], several: str) -> None:
    """Not each weight of the adapter: of millions, some gradients are as small as rounding, and Adam knows only their
    sign."""
    compare(runs, "wide, one", several, 1e-5, adapter=False)


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "places"), [(1, ["host"]), (2, ["gpu", "host"])])
def test_no_layer_computes_with_the_bytes_of_another(
    gpus: int, wide: Path, tmp_path: Path, count: int, places: list[str]
) -> None:
    """To the last bit, pass after pass without a wait between them."""
    if count > gpus:
        pytest.skip("needs two GPUs")
    processes = Processes(tmp_path / "layers", count, ["layers", str(wide), *places])
    try:
        for seen in processes.seen():
            assert all(seen[place] is True and seen[f"{place} compared"] > 1000 for place in places)
    finally:
        processes.end()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], SHARED], ids=["replicas", "shared"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_all_within_seconds(
    gpus: int, tmp_path: Path, rank: int, options: list[str]
) -> None:
    if gpus < 2:
        pytest.skip("needs two GPUs")
    endless = ["--trainer.max_steps", "100000", "--trainer.max_epochs", "9999", "--trainer.val_check_interval", "99999"]
    command = [sys.executable, str(ROOT / "main.py"), *FIT, *endless, "--run", str(tmp_path / "run"), *options]
    process = subprocess.Popen(
        [*command, "--trainer.devices", "2"], env=os.environ | {"NCCL_NVLS_ENABLE": "0"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        metrics, ends_at = tmp_path / "run" / "metrics.jsonl", time.monotonic() + BEGINS_WITHIN_S
        while not (metrics.is_file() and "train/loss" in metrics.read_text(encoding="utf-8")):
            assert time.monotonic() < ends_at and process.poll() is None
            time.sleep(0.2)
        children = children_of(process.pid)
        assert len(children) == 2
        os.kill(children[rank], signal.SIGKILL)
        since = time.monotonic()
        _, said = process.communicate(timeout=GONE_WITHIN_S)
        assert time.monotonic() - since < GONE_WITHIN_S and process.returncode == 128 + signal.SIGKILL
        assert f"error: process {rank} of 2 was ended by SIGKILL" in said and said.count("error: ") == 1
        assert not any(Path(f"/proc/{number}").exists() for number in children)
    finally:
        process.kill()
        process.wait()


def children_of(number: int) -> list[int]:
    """The processes that ``number`` began, in order."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(file.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == number:
            found.append(int(file.parent.name))
    return sorted(found)
