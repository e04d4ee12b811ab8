"""Detect load that disturbs a timing: other processes, the hypervisor, a CPU limit, heat.

A Watch reads the kernel's counters before and after each timed round and repeats disturbed rounds; `docs/method.md`
("Disturbance") defines the limits. A counter that the machine does not have is None and is not judged.
"""

from __future__ import annotations

import os
import resource
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ggtool.evaluation.metrics import clocks, nvidia
from ggtool.results.records import Disturbance
from ggtool.system.cgroup import throttled_s
from ggtool.system.cpus import cpu_times, own_cpus

# Largest share of the CPUs' time (others, steal) or of the round (waiting, throttled, gpu) that is no disturbance.
ALLOWED = 0.05
# Largest spread of rounds that may be compared: 5th to 95th percentile, over the median.
ALLOWED_SPREAD = 0.25

# Resolution of /proc/stat, at both ends of a round.
_TICKS_S = 2 / os.sysconf("SC_CLK_TCK")
_MOMENT_S = 0.5  # the machine must be quiet this long before timing starts

_TASKS = Path("/proc/self/task")
_CPUS = Path("/sys/devices/system/cpu")
_HEAT = "cpu[0-9]*/thermal_throttle/*_throttle_count"

T = TypeVar("T")


@dataclass(frozen=True)
class Counters:
    """The counters at one moment; seconds unless another unit is named.

    own_s: CPU time of this process. switches: its involuntary context switches. busy_s, steal_s: of the CPUs that it may
    use, by anyone and by the hypervisor. waiting_s: its threads were ready to run without a CPU. throttled_s: a cgroup's
    CPU limit stopped processes. heat: how often CPUs were slowed down for their temperature.
    """

    at_s: float
    own_s: float
    switches: int
    busy_s: float | None = None
    steal_s: float | None = None
    waiting_s: float | None = None
    throttled_s: float | None = None
    heat: int | None = None
    cpu_mhz: float | None = None


@dataclass(frozen=True)
class Load:
    """What a round lost, as shares between 0 and 1, and which of them exceed their limit (`causes`).

    others, steal: of the time of the CPUs that may be used. waiting: of the threads' time. throttled: of the round's time.
    """

    wall_s: float
    others: float | None
    steal: float | None
    waiting: float | None
    throttled: float | None
    heat: int | None
    switches: int
    cpu_mhz: float | None
    causes: tuple[str, ...]

    @property
    def lost(self) -> float:
        """The largest of the shares; 1 where heat slowed the CPUs, since the loss is unknown."""
        shares = (self.others, self.steal, self.waiting, self.throttled, 1.0 if self.heat else 0.0)
        return max(share or 0.0 for share in shares)


def read_counters() -> Counters:
    """Read the counters of this process and of the CPUs that it may use."""
    busy_s, steal_s = cpu_times()
    return Counters(
        at_s=time.perf_counter(),
        own_s=time.process_time(),
        switches=resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw,
        busy_s=busy_s,
        steal_s=steal_s,
        waiting_s=_waiting_s(),
        throttled_s=throttled_s(),
        heat=_heat(),
        cpu_mhz=clocks.cpu_mhz(),
    )


def compare(before: Counters, after: Counters, *, threads: int, cpus: int) -> Load:
    """Return what a process with `threads` threads on `cpus` CPUs lost between two readings."""
    wall_s = max(after.at_s - before.at_s, 1e-9)
    used_s = _difference(before.busy_s, after.busy_s)
    others_s = None if used_s is None else max(0.0, used_s - (after.own_s - before.own_s))
    steal_s = _difference(before.steal_s, after.steal_s)
    waiting_s = _difference(before.waiting_s, after.waiting_s)
    stopped_s = _difference(before.throttled_s, after.throttled_s)
    heat = None if before.heat is None or after.heat is None else after.heat - before.heat
    rounding = _TICKS_S / (wall_s * cpus)
    # CPUs that the process leaves free are free for others.
    spare = max(0, cpus - threads) / cpus
    load = {
        "others": None if others_s is None else others_s / (wall_s * cpus),
        "steal": None if steal_s is None else steal_s / (wall_s * cpus),
        "waiting": None if waiting_s is None else waiting_s / (wall_s * threads),
        "throttled": None if stopped_s is None else stopped_s / wall_s,
    }
    limits = {
        "others": spare + ALLOWED + rounding,
        "steal": ALLOWED + rounding,
        # More threads than CPUs wait for each other.
        "waiting": ALLOWED if threads <= cpus else 1.0,
        "throttled": ALLOWED,
    }
    causes = [name for name, share in load.items() if share is not None and share > limits[name]]
    return Load(
        wall_s=wall_s,
        heat=heat,
        switches=after.switches - before.switches,
        cpu_mhz=after.cpu_mhz,
        causes=(*causes, *(["heat"] if heat else [])),
        **load,
    )


class Watch:
    """Watches the rounds of one measurement and repeats the disturbed ones within a time budget.

    threads: how many threads compute. patience_s: seconds to wait, in total, for other load to end. Repeated rounds may
    take as long as the first ones did, plus the patience that is left.
    """

    def __init__(
        self,
        threads: int,
        patience_s: float = 0.0,
        read: Callable[[], Counters] = read_counters,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._threads = threads
        self._cpus = len(own_cpus())
        self._patience_s = patience_s
        self._read = read
        self._sleep = sleep
        self._repeated = 0
        self._began = read()
        self._loading: Load | None = None
        self._kept: list[Load] = []
        self._gpu: list[float] = []

    def loaded(self) -> None:
        """Mark the end of loading, which began when the Watch was made."""
        # Loading is the work of one thread.
        self._loading = compare(self._began, self._read(), threads=1, cpus=self._cpus)

    def wait(self) -> None:
        """Wait until other load has ended or the patience is used up."""
        while self._patience_s > 0:
            before = self._read()
            self._sleep(_MOMENT_S)
            self._patience_s -= _MOMENT_S
            if not compare(before, self._read(), threads=self._threads, cpus=self._cpus).causes:
                return

    def look_at_gpu(self) -> None:
        """Record how busy others keep the GPU; call it while this process does not use it. Does nothing without a GPU."""
        busy = nvidia.idle_utilization(self._sleep)
        if busy is not None:
            self._gpu.append(busy)

    def rounds(
        self, works: Sequence[Callable[[], T]], done: Callable[[], None], *, main: bool = False
    ) -> tuple[list[T], int]:
        """Run each work, and disturbed ones again; return the results and how many remained disturbed.

        The less disturbed of two tries is kept. done is called after each first try. main: `result` reports on these
        rounds.
        """
        found = []
        for work in works:
            found.append(self._timed(work))
            done()
        left_s = sum(load.wall_s for _, load in found)
        again = deque(index for index, (_, load) in enumerate(found) if load.causes)
        while again and (left_s > 0 or self._patience_s > 0):
            self.wait()
            index = again.popleft()
            value, load = self._timed(works[index])
            left_s -= load.wall_s
            self._repeated += 1
            if load.lost < found[index][1].lost or not load.causes:
                found[index] = (value, load)
            if found[index][1].causes:
                again.append(index)
        if main:
            self._kept = [load for _, load in found]
        return [value for value, _ in found], sum(bool(load.causes) for _, load in found)

    def result(self, spreads: dict[str, float]) -> Disturbance:
        """Return the Disturbance to record; `spreads` are the main rounds' spreads by name."""
        kept = self._kept
        causes = dict.fromkeys(cause for load in kept for cause in load.causes)
        gpu = max(self._gpu, default=None)
        if gpu is not None and gpu > ALLOWED:
            causes["gpu"] = None
        clock = [load.cpu_mhz for load in kept if load.cpu_mhz is not None]
        return Disturbance(
            rounds=len(kept),
            disturbed=sum(bool(load.causes) for load in kept),
            repeated=self._repeated,
            causes=tuple(causes),
            wide=tuple(name for name, value in spreads.items() if value > ALLOWED_SPREAD),
            loading=bool(self._loading and self._loading.causes),
            others=_most(load.others for load in kept),
            steal=_most(load.steal for load in kept),
            waiting=_most(load.waiting for load in kept),
            throttled=_most(load.throttled for load in kept),
            heat=_sum(load.heat for load in kept),
            switches=sum(load.switches for load in kept),
            gpu=gpu,
            cpu_mhz_low=min(clock, default=None),
            cpu_mhz_high=max(clock, default=None),
        )

    def _timed(self, work: Callable[[], T]) -> tuple[T, Load]:
        before = self._read()
        value = work()
        return value, compare(before, self._read(), threads=self._threads, cpus=self._cpus)


def spread(low: float, high: float, median: float) -> float:
    """Return the 5th to 95th percentile over the median."""
    return (high - low) / median


def _most(shares: Iterable[float | None]) -> float | None:
    return max((share for share in shares if share is not None), default=None)


def _sum(counts: Iterable[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _waiting_s() -> float | None:
    """Return the seconds that threads of this process were ready to run without a CPU (scheduler statistics)."""
    # "ran waited slices", nanoseconds; a thread that has just ended has no such file any more
    lines = [_text(path).split() for path in _TASKS.glob("*/schedstat")]
    known = [int(fields[1]) / 1e9 for fields in lines if len(fields) == 3]
    return sum(known) if known else None


def _heat() -> int | None:
    counts = [int(text) for path in _CPUS.glob(_HEAT) if (text := _text(path).strip()).isdecimal()]
    return sum(counts) if counts else None


def _text(path: Path) -> str:
    """Return what a file of the kernel says, nothing where it cannot be read."""
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
