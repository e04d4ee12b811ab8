"""Machine facts that numbers depend on, as short strings for a record's `environment`."""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from ggtool import __version__
from ggtool.system.cgroup import cpu_limit, memory_limit_bytes

NO_CUDA = "there is no CUDA device here, or torch was built without CUDA; use --device cpu."

_CPUINFO = Path("/proc/cpuinfo")
_GPUS = Path("/proc/driver/nvidia/gpus")


def describe_machine() -> dict[str, str]:
    """Return ggtool's version, Python, the operating system, the CPU and the memory of this machine."""
    return {
        "ggtool": __version__,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(),
        "cpu_count": str(usable_cpus()),
        "memory_bytes": str(min(memory_bytes(), memory_limit_bytes() or memory_bytes())),
    }


def fingerprint(facts: Mapping[str, str]) -> str:
    """Return 12 digits that are equal for machines whose speeds may be compared, of what `describe_machine` says of one.

    System, CPU, their number, memory in GiB, and the GPUs of this machine.
    """
    gib = round(int(facts["memory_bytes"]) / 2**30)
    listed = [facts["os"], facts["cpu"], facts["cpu_count"], str(gib), *gpu_names()]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()[:12]


def gpu_names() -> list[str]:
    """Return the models of this machine's NVIDIA GPUs, as their driver names them."""
    found = []
    for path in sorted(_GPUS.glob("*/information")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return found


def usable_cpus() -> int:
    """Return how many threads this process can keep running: its CPUs, or what its control group may use of them.

    Rounded down, for threads that wait for each other by spinning use up what one too many of them is given; at least 1.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cpu_limit()
    return there if limit is None else max(1, min(there, int(limit)))


def memory_bytes() -> int:
    """Return the machine's memory, 0 where the system does not tell."""
    return max(0, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def cpu_name() -> str:
    """Return the model name of the first CPU, or its architecture."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
