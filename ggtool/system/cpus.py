"""Threads beside other work: how many pay, and how long they spin for each other.

Two threads that compute a model meet at a barrier hundreds of times a token. With another process on one of their CPUs each
barrier lasts until the scheduler comes round again, and generation falls to a tenth and less. So the number of threads
follows the CPUs that others leave free, and a thread that waits goes to sleep sooner than libgomp has it do.
`scripts/bench/threads.py` measures the choices, `docs/log.md` has its table.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

# Rounds of libgomp's waiting loop, about a millisecond, after which a thread sleeps: libgomp's own 300,000 are longer
# than a time slice, and with 1,000 threads sleep and wake twenty times a token on an idle machine.
_SPINS = "20000"
_LOOK_S = 0.5


def spin_briefly() -> None:
    """Have the OpenMP of libraries that are loaded later spin for a short while; what the user has set stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def cpu_times() -> tuple[float | None, float | None]:
    """Return the seconds that the usable CPUs computed for anyone, and those that a hypervisor took; None if unknown."""
    import psutil  # not for a command's --help

    try:
        times = psutil.cpu_times(percpu=True)
    except (OSError, RuntimeError):  # no /proc, or one that a sandbox has emptied
        return None, None
    mine = [times[cpu] for cpu in own_cpus() if cpu < len(times)]
    if not mine:
        return None, None
    # guest is part of user; time in iowait is free for anyone.
    names = [name for name in ("user", "nice", "system", "irq", "softirq") if hasattr(mine[0], name)]
    busy = sum(getattr(cpu, name) for cpu in mine for name in names)
    return busy, sum(getattr(cpu, "steal", 0.0) for cpu in mine)


class FreeCpus:
    """How many threads this process should compute with: one for each CPU that others leave free, `most` at most.

    busy, own, clock: seconds of CPU time of everyone and of this process, and the time.
    """

    def __init__(
        self,
        most: int,
        busy: Callable[[], float | None] = lambda: cpu_times()[0],
        own: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._count = most
        self._cpus = len(own_cpus())
        self._busy, self._own, self._clock = busy, own, clock
        self._last = self._read()

    def count(self) -> int:
        """Return the number of threads for the next computation; it changes twice a second at most."""
        if self._clock() - self._last[0] >= _LOOK_S:
            before, self._last = self._last, self._read()
            self._count = self._free_since(before)
        return self._count

    def _free_since(self, before: tuple[float, float | None, float]) -> int:
        (then, busy_before, own_before), (now, busy, own) = before, self._last
        if busy is None or busy_before is None:
            return self._most
        others = (busy - busy_before - (own - own_before)) / (now - then)
        # From half a CPU on: a thread that shares its CPU holds up the rest for longer than it helps.
        free = int(self._cpus - others + 0.5)
        return max(1, min(self._most, free))

    def _read(self) -> tuple[float, float | None, float]:
        return self._clock(), self._busy(), self._own()


def own_cpus() -> Sequence[int]:
    """Return the numbers of the CPUs that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
