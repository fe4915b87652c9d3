"""Measure how speed and memory grow: tokens per row, rows of a micro-batch, rank, layers kept; and rows of data.

    python benchmarks/growth.py --base DIR [--t4]        # training steps on a GPU, beside the planner's forecast
    python benchmarks/growth.py --cpu                    # a few short ones on the demo: it runs; no memory is measured
    python benchmarks/growth.py --rows 1000 10000 100000 # the real fit up to its first step, on this machine

A step is forward, backward, gradient scaling, clipping and AdamW, as the Trainer does them. Ends with a table; with
``--output DIR``, figures are kept there, in growth.json.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from asked import hide_gpus, refuse_unused, require_gpus, whole

if TYPE_CHECKING:
    from lit_qlora.model.module import QLoRAModule

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
GRID = (
    # tokens per row, rows, rank, layers kept (of a base with fewer: all)
    (256, 8, 16, 0), (512, 4, 16, 0), (1024, 2, 16, 0), (2048, 1, 16, 0), (4096, 1, 16, 0), (1024, 1, 16, 0),
    (1024, 4, 16, 0), (1024, 8, 16, 0), (1024, 2, 16, 32), (1024, 4, 16, 16), (512, 4, 16, 16), (256, 4, 16, 32),
    (1024, 2, 64, 0), (1024, 2, 64, 16), (1024, 2, 8, 0), (1024, 2, 8, 32),
)  # fmt: skip
RECORDED = (
    (512, 4, 16, 0), (512, 4, 16, 32), (1024, 4, 16, 16),
    (1024, 1, 16, 0), (1024, 2, 16, 0), (1024, 4, 16, 0), (1024, 8, 16, 0),
)  # fmt: skip
"""Settings that are measured with recorded kernels, too: on a GPU. The last four give the time per micro-batch, however
small, of a card that does not wait for its host."""
PACKED = ((1024, 4, 16, 0), (512, 4, 16, 32))
"""Settings that are measured with their rows packed into one, too: on a GPU."""
TINY_GRID = ((32, 2, 4, 0), (64, 1, 4, 1), (32, 1, 8, 0))
ANSWER_SHARE = 0.86
"""Share of a row's tokens that are answers, as in Guanaco."""


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="folder or hub id")
    parser.add_argument("--cpu", action="store_true", help="short steps on the CPU; base: the demo by default")
    parser.add_argument("--t4", action="store_true", help="14.2 GiB, fp16, no flash or cuDNN attention")
    parser.add_argument("--steps", type=whole, default=5, help="timed steps of a setting, after two that are not")
    parser.add_argument("--rows", type=whole, nargs="+", help="conversations of data instead")
    parser.add_argument("--output", type=Path, help="folder for the figures; default: none")
    options = parser.parse_args()
    if not (options.rows is not None or options.base or options.cpu):
        parser.error("give --base, --cpu or --rows")
    if options.rows:
        refuse_unused(parser, options, "--rows", ["base", "cpu", "t4", "steps"])
        found = [_fit_to_first_step(rows) for rows in options.rows]
        lines = _rows_table(found)
    else:
        from lit_qlora.errors import UserError

        if options.cpu:
            refuse_unused(parser, options, "--cpu", ["t4"])
            hide_gpus()
        else:
            require_gpus(parser, 1, "give --cpu for a few short steps")
        try:
            found = _steps(options)
        except UserError as error:
            parser.error(str(error))
        lines = _steps_table(found)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "growth.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print("\n".join(lines))


def _rows_table(found: list[dict]) -> list[str]:
    head = "| conversations | file MB | host GiB | seconds to the first step | again, from the cache |"
    return [head, "|" + "---|" * 5] + [
        f"| {row['rows']:,} | {row['file_mb']:.0f} | {row['host_gib'][0]:.2f} | {row['seconds'][0]:.0f} | "
        f"{row['seconds'][1]:.0f} |"
        for row in found
    ]


def _steps_table(found: list[dict]) -> list[str]:
    head = "| tokens a row x rows | rank | kept | tokens/s | allocated GiB | forecast | reserved GiB | forecast |"
    lines = [head, "|" + "---|" * 8]
    for row in found:
        allocated, forecast, reserved = "not measured", f"{row['forecast_allocated']:.2f}", "not measured"
        whole = f"{row['forecast_reserved']:.2f}"
        if row["allocated"]:
            allocated, reserved = f"{row['allocated']:.2f}", f"{row['reserved']:.2f}"
            forecast += f" ({row['forecast_allocated'] / row['allocated'] - 1:+.1%})"
            whole += f" ({row['forecast_reserved'] / row['reserved'] - 1:+.1%})"
        setting = f"{row['length']} x {row['rows']}{row['way'] and ', ' + row['way']}"
        lines.append(
            f"| {setting} | {row['rank']} | {row['kept']} | {row['tokens_per_second']:,.0f} | "
            f"{allocated} | {forecast} | {reserved} | {whole} |"
        )
    for part in ("allocated", "reserved") if found[0]["allocated"] else ():
        errors = [row[f"forecast_{part}"] / row[part] - 1 for row in found]
        lines += ["", f"forecast of {part} memory: {min(errors):+.1%} to {max(errors):+.1%} of what was measured"]
    return lines


def _steps(options: argparse.Namespace) -> list[dict]:
    from lit_qlora.cli import prepare_memory

    prepare_memory()
    import torch

    if options.t4:
        import as_t4

        as_t4.emulate()
    from lit_qlora.model.module import QLoRAModule
    from lit_qlora.quiet import quieten

    quieten()
    grid = [(*setting, "") for setting in (TINY_GRID if options.cpu else GRID)]
    if not options.cpu:
        grid += [(*setting, "recorded") for setting in RECORDED] + [(*setting, "packed") for setting in PACKED]
    found = []
    for rank, settings in groupby(sorted(grid, key=lambda setting: setting[2]), key=lambda setting: setting[2]):
        module = QLoRAModule(options.base or "demo", rank=rank)
        module.configure_model()
        for length, rows, _, kept, way in settings:
            most = module.base.shape.num_layers
            found.append(_measure(module, length, rows, rank, min(kept, most), way, options.steps))
            print(found[-1], file=sys.stderr, flush=True)
        del module
        gc.collect()  # modules stand in circles
        torch.cuda.empty_cache()
    return found


def _measure(module: "QLoRAModule", length: int, rows: int, rank: int, kept: int, way: str, num_steps: int) -> dict:
    """A setting's speed and memory, with the forecast.

    Args:
        module: loaded.
        length, rows, rank, kept: tokens per row, rows of a micro-batch, LoRA's rank, and number of layers kept.
        way: ``recorded``, ``packed`` or empty.
        num_steps: timed ones.
    """
    import torch

    from lit_qlora.batch import Batch, answer_targets
    from lit_qlora.forecast import memory
    from lit_qlora.model.lora import adapter_parameters
    from lit_qlora.model.optimizer import OPTIMIZERS

    torch.cuda.empty_cache()
    labels = torch.randint(3, min(30_000, module.base.shape.vocabulary), (rows, length))
    labels[:, : int(length * (1 - ANSWER_SHARE))] = -100
    ids = labels.clamp(min=3)
    batch = Batch(ids, *answer_targets(labels), tuple(range(rows)), ids.numel(), int((labels > 0).sum()))
    if way == "packed":
        batch = batch._replace(input_ids=ids.view(1, -1), lengths=(length,) * rows)
    device, dtype = module.device, module.peft_model.get_input_embeddings().weight.dtype
    batch = batch.to(device)
    parameters = list(adapter_parameters(module).values())
    optimizer = OPTIMIZERS["adamw"].make(parameters, lr=1e-6, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    recorded = way == "recorded"
    module.kept_layers, module.uses_cuda_graphs = kept, recorded
    module.dequantised_layers = 0
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for step in range(2 + num_steps):
        if step == 2:
            if on_gpu:
                torch.cuda.synchronize()
                if not recorded:  # which takes most while it is recorded
                    torch.cuda.reset_peak_memory_stats()
            started = time.monotonic()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            loss = module.summed_loss(batch)[0] / batch.step_answer_tokens
        optimizer.zero_grad()  # as Lightning does: after forward, before backward
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        scaler.step(optimizer)
        scaler.update()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.monotonic() - started) / num_steps
    hopper = on_gpu and torch.cuda.get_device_capability() >= (9, 0) and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    forecast = memory.step_memory(
        memory.Step(
            module.base.shape,
            tokens=ids.numel(),
            scored_tokens=len(batch.targets),
            rank=rank,
            kept_layers=kept,
            element=dtype.itemsize,
            workspace=memory.HOPPER_WORKSPACE if hopper else memory.WORKSPACE,
            num_recordings=int(recorded),
        )
    )
    optimizer.zero_grad()
    module.release()
    return {
        "length": length, "rows": rows, "rank": rank, "kept": kept, "way": way,
        "tokens_per_second": ids.numel() / seconds,
        "allocated": torch.cuda.max_memory_allocated() / memory.GIB if on_gpu else None,
        "forecast_allocated": forecast.total / memory.GIB,
        "reserved": torch.cuda.max_memory_reserved() / memory.GIB if on_gpu else None,
        "forecast_reserved": forecast.reserved / memory.GIB, "moment": forecast.moment,
    }  # fmt: skip


def _fit_to_first_step(rows: int) -> dict:
    """The real command with the demo's base on ``rows`` conversations of about 560 characters, twice."""
    seconds, host_gib = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        with data.open("w", encoding="utf-8") as file:
            for row in range(rows):
                text = " ".join(f"word{(row * 31 + place) % 9973}" for place in range(30))
                file.write(json.dumps({"text": f"### Human: {row}: {text}?### Assistant: {text}."}) + "\n")
        environment = os.environ | {"HF_DATASETS_CACHE": f"{folder}/cache", "OMP_NUM_THREADS": "1"}
        for start in ("first", "second"):
            command = [sys.executable, str(HERE.parent / "main.py"), "fit", "--data.source", str(data)]
            command += ["--data.max_length", "1024", "--data.validation_share", str(min(0.02, 100 / rows))]
            command += ["--trainer.max_steps", "1", "--samples.count", "0", "--run", f"{folder}/{start}"]
            started = time.monotonic()
            with subprocess.Popen(
                command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as process:
                assert process.stdout
                shown = process.stdout.read()
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            assert process.returncode == 0 and re.search(r"step +1/1 ", shown), shown
            seconds.append(time.monotonic() - started)
            host_gib.append(usage.ru_maxrss / 1024**2)
        size_mb = data.stat().st_size / 1e6
    return {"rows": rows, "file_mb": size_mb, "host_gib": host_gib, "seconds": seconds}


if __name__ == "__main__":
    main()
