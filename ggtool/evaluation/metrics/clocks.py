"""Current clock rates of CPUs and GPU, recorded beside every speed."""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

from ggtool.evaluation.metrics import nvidia

_CPUINFO = Path("/proc/cpuinfo")


def cpu_mhz() -> float | None:
    """Return the median clock of the CPUs that this process may use, MHz; None where the kernel does not report it."""
    if not _CPUINFO.exists():
        return None
    clocks = {}
    processor = -1
    for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "processor":
            processor = int(value)
        elif name.strip() == "cpu MHz":
            clocks[processor] = float(value)
    usable = [clocks[index] for index in os.sched_getaffinity(0) if index in clocks]
    return statistics.median(usable) if usable else None


def gpu_mhz() -> float | None:
    """Return the clock of the GPU's multiprocessors, MHz; None in a process that computes on no GPU."""
    torch = sys.modules.get("torch")
    return nvidia.sm_clock_mhz() if torch is not None and torch.cuda.is_available() else None
