"""Owns what this machine's memory holds. Knows no torch."""

from pathlib import Path

from lit_qlora.devices.world import world

ROOM_SHARE = 2
"""Divisor of the available memory, for the part that may be used to save time."""


def memory_bytes() -> tuple[int, int] | None:
    """Total and available bytes of this machine, or of the container if that has less; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        total, free = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total, min(free, total)


def room_bytes() -> int:
    """Bytes that this process, one of those on this machine, may use to save time; 0 if the memory is unknown."""
    memory = memory_bytes()
    return memory[1] // ROOM_SHARE // world().local_size if memory else 0
