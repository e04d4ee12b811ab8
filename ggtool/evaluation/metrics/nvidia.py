"""What nvidia-smi says of the GPU and of this process; None where there is no such tool or no such answer."""

from __future__ import annotations

import os
import subprocess

_TIMEOUT_S = 20


def sm_clock_mhz() -> float | None:
    """Return the clock of the first GPU's multiprocessors, MHz."""
    lines = _query("--query-gpu=clocks.sm")
    return _number(lines[0]) if lines else None


def process_bytes() -> int | None:
    """Return the bytes of GPU memory that the driver counts for this process, its context included."""
    for line in _query("--query-compute-apps=pid,used_memory"):
        pid, _, used = line.partition(",")
        if pid.strip() == str(os.getpid()) and (mib := _number(used)) is not None:
            return int(mib * 2**20)
    return None


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
