"""Owns what this machine's memory holds. Knows no torch."""

from pathlib import Path


def memory_bytes() -> tuple[int, int] | None:
    """Memory of this machine, or of the container where that has less: all, and available; None if unknown."""
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
