"""Run a command of main.py on a larger GPU under the limits of a T4.

    python benchmarks/as_t4.py fit --config configs/colab_t4.yaml …
    python benchmarks/as_t4.py --gib 23.3 fit …    # this card, with less memory
    python -m torch.distributed.run --nproc-per-node 2 benchmarks/as_t4.py fit …    # two of them

Memory is capped, compute capability reads 7.5 (so fp16 is chosen), attention has neither flash nor cuDNN kernels, and
cuBLAS has the scratch that it has on a T4.
It shows memory and which code runs, not a T4's speed. Without torchrun it has one GPU, whatever the machine has: those
processes that fit itself starts for others would be without the limits.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from asked import above_0, require_gpus

sys.path.insert(0, str(Path(__file__).parents[1]))
from lit_qlora.model import device

MEMORY_GIB = 14.2
"""Memory that torch may take of the 14.56 GiB that it sees on a T4: without the CUDA context."""


def emulate() -> None:
    """Put the limits on this process and its GPU, one of several or not, before its first product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")  # torch's default below compute capability 9.0
    # Not in torch itself: its compiler would then build for another card than this one.
    limit_memory(MEMORY_GIB, "T4, emulated", (7, 5))
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def limit_memory(gib: float, name: str = "", capability: tuple[int, int] | None = None) -> None:
    """Cap the memory that torch may take of this process's GPU, and have the package see no more than that.

    Args:
        gib: Memory that torch may take, in GiB.
        name: Name of the GPU that the package is to see; empty for its own.
        capability: Compute capability that the package is to see; None for its own.
    """
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(gib * 1024**3 / total)
    shown = name or torch.cuda.get_device_name(), capability or torch.cuda.get_device_capability()
    device.decide_from_now_on_for(device.Device(*shown, int(gib * 1024**3)))


def main() -> int:
    """Run the command under the limits; return its exit status."""
    from lit_qlora.cli import main as run
    from lit_qlora.cli import prepare_memory

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gib", type=above_0, help="of this card's memory, as the only limit")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="of main.py, with its options")
    options = parser.parse_args()
    prepare_memory()
    if "LOCAL_RANK" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    require_gpus(parser, 1, "the limits are a GPU's")
    if options.gib:
        limit_memory(options.gib)
    else:
        emulate()
    return run(options.command)


if __name__ == "__main__":
    raise SystemExit(main())
