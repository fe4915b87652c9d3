"""Owns which device computes which micro-batch. Knows sizes; no batch, no device."""

from collections.abc import Iterable, Sequence
from heapq import heapreplace

FIXED_TOKENS = 128
"""Cost of a micro-batch beside its tokens, in tokens: dequantised weights. A 7B's take 0.2 s on a T4, of
about 1.5 ms per token."""
EVALUATED_AT_ONCE = 8
"""Micro-batches per device that are dealt together where no gradient waits for them."""


def deal(sizes: Sequence[int], num_devices: int) -> list[int]:
    """The device of each of some micro-batches, so that all are done at about the same time.

    The largest first, each to the device that has the least to do so far: the slowest device has at most the mean and
    one micro-batch more.

    Args:
        sizes: tokens of each micro-batch, padding counted.
        num_devices: number of devices.
    """
    devices = [0] * len(sizes)
    loads = [(0, device) for device in range(num_devices)]  # a heap: the least load first, of equal ones the first
    for at in sorted(range(len(sizes)), key=lambda at: (-sizes[at], at)):
        load, devices[at] = loads[0]
        heapreplace(loads, (load + sizes[at] + FIXED_TOKENS, devices[at]))
    return devices


def deal_steps(sizes: Sequence[int], at_once: int, num_devices: int) -> list[int]:
    """The device of each micro-batch of an epoch.

    Args:
        sizes: tokens of each micro-batch, padding counted.
        at_once: micro-batches that `deal` is given at a time, as those of an optimizer step.
        num_devices: number of devices.
    """
    return [device for step in steps(sizes, at_once) for device in deal(step, num_devices)]


def steps(sizes: Sequence[int], at_once: int) -> Iterable[Sequence[int]]:
    """The micro-batches of each optimizer step.

    Args:
        sizes: tokens of each micro-batch of an epoch.
        at_once: micro-batches of a step; the last may have fewer.
    """
    return (sizes[start : start + at_once] for start in range(0, len(sizes), at_once))


def efficiency(sizes: Sequence[int], at_once: int, num_devices: int) -> float:
    """The share, up to 1, of the devices' time in which they compute: each step waits for its slowest device.

    Args:
        sizes: tokens of each micro-batch, padding counted.
        at_once: micro-batches that are dealt at a time.
        num_devices: number of devices.
    """
    if num_devices == 1:
        return 1.0
    busy = taken = 0
    for step in steps(sizes, at_once):
        loads = [0] * num_devices
        for size, device in zip(step, deal(step, num_devices), strict=True):
            loads[device] += size + FIXED_TOKENS
        busy, taken = busy + sum(loads), taken + max(loads)
    return busy / (num_devices * taken) if taken else 1.0
