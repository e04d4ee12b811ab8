"""Machine facts that numbers depend on, as short strings for a record's `environment`."""

from __future__ import annotations

import itertools
import os
import platform
from pathlib import Path

from ggtool import __version__

NO_CUDA = "there is no CUDA device here, or torch was built without CUDA; use --device cpu."

_CPUINFO = Path("/proc/cpuinfo")


def describe_machine() -> dict[str, str]:
    """Return ggtool's version, Python, the operating system, the CPU and the memory of this machine."""
    return {
        "ggtool": __version__,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cpu_count": str(usable_cpus()),
        "memory_bytes": str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    }


def usable_cpus() -> int:
    """Return how many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_features() -> frozenset[str]:
    """Return the instruction sets of the first CPU by the kernel's names for them; empty where it tells none."""
    for line in _cpuinfo():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def cpu_identity() -> str:
    """Return what tells CPUs with different instructions apart: model and features; elsewhere the processor's name."""
    kept = {line for line in _cpuinfo() if line.startswith(("model name", "flags", "Features", "CPU "))}
    return "".join(sorted(kept)).rstrip("\n") or platform.processor()


def _cpuinfo() -> list[str]:
    """Return what the kernel says of the first CPU: the whole list takes it a tenth of a second where there are hundreds."""
    try:
        with _CPUINFO.open(encoding="utf-8", errors="replace") as file:
            return list(itertools.takewhile(str.strip, file))
    except OSError:
        return []


def _cpu_name() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
