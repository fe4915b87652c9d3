"""Owns kernel time by class, and what it projects for a T4. Knows no peer.

A step's wall clock on a large GPU waits for the host; a T4 waits for nothing, so there the kernels' own time counts.
Products and attention are scaled by the FLOP/s that the two cards sustain, all else by their bandwidths. This card's
rates are measured in the same process, as the T4's were: products of 4096 x 4096 x 4096 in 16 bits, and a copy.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from lit_qlora.forecast.cards import find_card

HOST = "copies to and from the host"
"""Copies, which run beside kernels, on the bus; not among the kernels' time."""
WAITS = "no kernel"
"""Time in which the GPU waits for the host; a T4 does not."""
CLASSES = {
    # The first that a kernel's name, in lower case, holds a word of.
    WAITS: (WAITS,),
    HOST: ("dtoh", "htod"),
    "dequantisation": ("dequant",),
    "attention": ("fmha", "flash", "attention"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "splitk"),
    "copies": ("memcpy", "memset", "direct_copy"),
}
OTHER = "elementwise"
BY_FLOPS = ("products", "attention")
LONGEST = 70
"""Number of kernels kept by name: enough to see below the products."""


def class_of(kernel: str) -> str:
    """The class of a kernel, by the words that its name ``kernel`` holds."""
    name = kernel.lower()
    return next((kind for kind, words in CLASSES.items() if any(word in name for word in words)), OTHER)


def projected(us_per_token: dict[str, float], tflops: float, gb_per_s: float) -> float:
    """Tokens per second on a T4.

    Args:
        us_per_token: kernel time in microseconds by class, measured on a card of these rates.
        tflops: the card's sustained rate of 16-bit products, in TFLOP/s.
        gb_per_s: its bandwidth, in GB/s.
    """
    t4 = find_card("t4")
    assert t4.tflops and t4.gb_per_s
    scale = {kind: tflops / t4.tflops if kind in BY_FLOPS else gb_per_s / t4.gb_per_s for kind in us_per_token}
    return 1e6 / sum(us * scale[kind] for kind, us in us_per_token.items() if kind not in (HOST, WAITS))


def sustained() -> tuple[float, float]:
    """TFLOP/s and GB/s of this GPU, over half a second each."""
    import torch

    factor = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    products = _per_second(lambda: factor @ factor)
    copies = _per_second(lambda: target.copy_(source))
    return products * 2 * 4096**3 / 1e12, copies * 2 * source.nbytes / 1e9


def _per_second(run: Any) -> float:
    import torch

    for _ in range(10):
        run()
    torch.cuda.synchronize()
    started, count = time.monotonic(), 0
    while time.monotonic() - started < 0.5:
        for _ in range(10):
            run()
        torch.cuda.synchronize()
        count += 10
    return count / (time.monotonic() - started)


class KernelTimes:
    """Sum the time of every kernel on the GPU between ``start`` and ``stop``, and the time in which none runs."""

    def start(self) -> None:
        """Begin to record."""
        import torch

        self._profile: Any = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profile.__enter__()

    def stop(self) -> dict[str, float]:
        """End, and return microseconds by kernel name; see ``waits`` for those without any."""
        self._profile.__exit__(None, None, None)
        found: dict[str, float] = {}
        spans = []
        # Read off directly: `key_averages` takes minutes for 100,000 kernels.
        for event in self._profile.profiler.kineto_results.events():
            name = event.name()
            if not str(event.device_type()).endswith("CPU") and not name.startswith(("ProfilerStep", "gpu_user")):
                found[name] = found.get(name, 0.0) + event.duration_ns() / 1000
                if class_of(name) != HOST:
                    spans.append((event.start_ns(), event.start_ns() + event.duration_ns(), name))
        return found | waits(spans)


def waits(spans: list[tuple[int, int, str]]) -> dict[str, float]:
    """Microseconds in which no kernel ran, by the kernel that came next.

    Args:
        spans: start and end in nanoseconds, and name, of each kernel; of several streams, in any order.
    """
    found: dict[str, float] = {}
    busy_until = min((start for start, _, _ in spans), default=0)
    for start, end, name in sorted(spans):
        if start > busy_until:
            before = f"{WAITS} before {name}"
            found[before] = found.get(before, 0.0) + (start - busy_until) / 1000
        busy_until = max(busy_until, end)
    return found


def summed(us: dict[str, float], tokens: int) -> dict[str, Any]:
    """Sum kernel times by class.

    Args:
        us: Microseconds by kernel name.
        tokens: Number of tokens computed in that time.

    Returns:
        ``us_per_token``, microseconds per token by class, and ``longest``, name and microseconds per token of the
        kernels that take most.
    """
    classes: dict[str, float] = {}
    for name, time_us in us.items():
        kind = class_of(name)
        classes[kind] = classes.get(kind, 0.0) + time_us / tokens
    longest = sorted(us.items(), key=lambda item: -item[1])[:LONGEST]
    return {"us_per_token": classes, "longest": [[name[:200], time_us / tokens] for name, time_us in longest]}
