"""Readings of nvidia-smi; None where there is no such tool or no such reading."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

_TIMEOUT_S = 20
# The driver reports utilization over up to the past second.
_UTILIZATION_S = 1.1


def sm_clock_mhz() -> float | None:
    """Return the clock of the first GPU's multiprocessors, MHz."""
    lines = _query("--query-gpu=clocks.sm")
    return _number(lines[0]) if lines else None


def memory_bytes() -> int:
    """Return the memory of the GPU that has least, 0 where the driver does not tell."""
    found = [mib for line in _query("--query-gpu=memory.total") if (mib := _number(line)) is not None]
    return int(min(found, default=0) * 2**20)


def process_bytes() -> int | None:
    """Return the bytes of GPU memory that the driver counts for this process, its context included."""
    for line in _query("--query-compute-apps=pid,used_memory"):
        pid, _, used = line.partition(",")
        if pid.strip() == str(os.getpid()) and (mib := _number(used)) is not None:
            return int(mib * 2**20)
    return None


def idle_utilization(sleep: Callable[[float], None]) -> float | None:
    """Return the GPU's utilization by other processes over a second, between 0 and 1.

    The calling process must not use the GPU meanwhile. None in a process without one.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    sleep(_UTILIZATION_S)
    device = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    lines = _query("--query-gpu=uuid,utilization.gpu")
    busy = {uuid.strip(): _number(used) for uuid, _, used in (line.partition(",") for line in lines)}
    percent = busy.get(device)
    return None if percent is None else percent / 100


def _query(what: str) -> list[str]:
    command = ["nvidia-smi", what, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]", as in a container that does not see process ids
        return None
