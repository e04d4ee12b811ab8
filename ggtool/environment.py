"""The facts of a machine that a number depends on, as short strings for a record's `environment`."""

from __future__ import annotations

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


def _cpu_name() -> str:
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
