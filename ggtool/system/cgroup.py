"""What a container or a service may use of the machine: the CPU and memory limits of this process's control groups.

A limit of any group on the way up to the root counts, so the smallest is taken. Both versions of Linux's control groups
are read (Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/); elsewhere, and with no /proc or /sys, there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_MEMBERSHIP = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 1 << 60  # version 1 says "no limit" as the largest multiple of a page


def cpu_limit() -> float | None:
    """Return how many CPUs' time this process may use, such as 0.5; None without a limit."""
    limits = []
    for folder in _folders("cpu"):
        if quota := _words(folder / "cpu.max"):
            limits += [float(quota[0]) / float(quota[1])] if quota[0] != "max" and len(quota) == 2 else []
        elif (quota := _words(folder / "cpu.cfs_quota_us")) and quota[0] != "-1":
            period = _words(folder / "cpu.cfs_period_us")
            limits += [float(quota[0]) / float(period[0])] if period else []
    return min(limits, default=None)


def memory_limit_bytes() -> int | None:
    """Return how much memory this process and those it shares a group with may use; None without a limit."""
    limits = []
    for folder in _folders("memory"):
        said = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        if said and said[0].isdigit() and int(said[0]) < _UNLIMITED_BYTES:
            limits.append(int(said[0]))
    return min(limits, default=None)


def throttled_s() -> float | None:
    """Return the seconds for which the CPU limits have stopped processes so far; None where nothing counts them."""
    found = []
    for folder in _folders("cpu"):
        words = _words(folder / "cpu.stat")
        counts = dict(zip(words[::2], words[1::2], strict=False))
        if "throttled_usec" in counts:
            found.append(int(counts["throttled_usec"]) / 1e6)
        elif "throttled_time" in counts:  # version 1, nanoseconds
            found.append(int(counts["throttled_time"]) / 1e9)
    return sum(found) if found else None


def _folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of those above it; inside a container they may be the root alone."""
    try:
        lines = _MEMBERSHIP.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = _MOUNT / controller if controllers else _MOUNT
        group = Path(path.lstrip("/"))
        # A container sees its own group as the root of what is mounted, and may still be told its path outside.
        for part in (group, *group.parents):
            yield top / part


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return []
