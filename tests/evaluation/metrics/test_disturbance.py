"""What disturbs a timing: judged from counters that a test makes up, and once from a real load beside it."""

import os
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from spinning import load_on_every_cpu

from ggtool.evaluation.metrics import disturbance
from ggtool.evaluation.metrics.disturbance import (
    ALLOWED,
    Counters,
    Load,
    Watch,
    compare,
    read_counters,
    spread,
)
from ggtool.system import cgroup

START = Counters(
    at_s=100.0, own_s=10.0, switches=5, busy_s=1000.0, steal_s=1.0, waiting_s=2.0, throttled_s=3.0, heat=4
)


def after(wall_s: float, **passed: float) -> Counters:
    """The counters of START when `wall_s` and what is named have passed."""
    moved = {name: getattr(START, name) + value for name, value in passed.items()}
    return replace(START, at_s=START.at_s + wall_s, **moved)


def causes(wall_s: float = 1.0, *, threads: int = 2, cpus: int = 2, **passed: float) -> tuple[str, ...]:
    return compare(START, after(wall_s, **passed), threads=threads, cpus=cpus).causes


def test_work_of_ones_own_disturbs_nothing() -> None:
    assert causes(own_s=2.0, busy_s=2.0) == ()
    assert causes(own_s=1.0, busy_s=1.0, waiting_s=0.02, steal_s=0.02) == ()


@pytest.mark.parametrize(
    ("passed", "cause"),
    [
        ({"own_s": 1.5, "busy_s": 2.0}, "others"),
        ({"steal_s": 0.3}, "steal"),
        ({"waiting_s": 0.3}, "waiting"),
        ({"throttled_s": 0.1}, "throttled"),
        ({"heat": 1}, "heat"),
    ],
)
def test_each_loss_is_a_cause(passed: dict[str, float], cause: str) -> None:
    assert causes(**passed) == (cause,)


def test_shares_are_of_what_was_there() -> None:
    load = compare(START, after(2.0, own_s=1.0, busy_s=2.0, waiting_s=1.0, switches=7), threads=2, cpus=2)
    assert (load.wall_s, load.others, load.waiting, load.switches) == (2.0, 0.25, 0.25, 7)
    assert load.lost == 0.25


def test_cpus_that_are_left_free_may_be_used() -> None:
    assert causes(threads=2, cpus=16, own_s=2.0, busy_s=15.0) == ()
    assert causes(threads=16, cpus=16, own_s=13.0, busy_s=16.0) == ("others",)


def test_threads_without_cpus_wait_for_each_other() -> None:
    assert causes(threads=2, cpus=2, waiting_s=1.0) == ("waiting",)
    assert causes(threads=8, cpus=2, waiting_s=6.0) == ()


def test_a_short_round_allows_for_whole_ticks() -> None:
    """In 20 ms /proc/stat may count a tick or two more than there was."""
    assert causes(0.02, own_s=0.04, busy_s=0.05) == ()
    assert causes(0.2, own_s=0.2, busy_s=0.4) == ("others",)


def test_what_the_machine_does_not_count_is_not_judged() -> None:
    silent = Counters(at_s=1.0, own_s=1.0, switches=0)
    load = compare(silent, replace(silent, at_s=2.0), threads=2, cpus=2)
    assert load.causes == ()
    assert (load.others, load.steal, load.waiting, load.throttled, load.heat) == (None,) * 5


class Machine:
    """A machine whose clock stands still but for rounds and sleep, and that is disturbed in the seconds named."""

    def __init__(self, *disturbed: tuple[float, float]) -> None:
        self.now = self.others = 0.0
        self.disturbed = disturbed

    def pass_(self, seconds: float) -> None:
        share = any(start <= self.now < end for start, end in self.disturbed)
        self.now += seconds
        self.others += seconds * share

    def read(self) -> Counters:
        return Counters(at_s=self.now, own_s=0.0, switches=0, busy_s=self.others)

    def watch(self, patience_s: float = 0.0) -> Watch:
        return Watch(1, patience_s, self.read, self.pass_)

    def work(self, name: str):
        def run() -> tuple[str, float]:
            self.pass_(1.0)
            return name, self.now

        return run


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disturbance, "own_cpus", lambda: [0])


def test_a_disturbed_round_is_timed_again() -> None:
    machine = Machine((1.0, 2.0))
    ticks: list[int] = []
    values, disturbed = machine.watch().rounds(
        [machine.work(name) for name in "abc"], lambda: ticks.append(1)
    )
    assert values == [("a", 1.0), ("b", 4.0), ("c", 3.0)]
    assert disturbed == 0
    assert len(ticks) == 3


def test_timing_again_takes_no_longer_than_timing() -> None:
    machine = Machine((0.0, 1000.0))
    watch = machine.watch()
    values, disturbed = watch.rounds([machine.work(name) for name in "abc"], lambda: None, main=True)
    assert machine.now == 6.0
    assert disturbed == 3
    assert [name for name, _ in values] == ["a", "b", "c"]
    found = watch.result({"pp": 0.1, "tg": 0.3})
    assert (found.rounds, found.disturbed, found.repeated) == (3, 3, 3)
    assert found.causes == ("others",)
    assert found.others == 1.0
    assert found.wide == ("tg",)
    assert found.steal is None


def test_the_less_disturbed_of_two_tries_is_kept() -> None:
    shares = iter([0.5, 0.3, 0.9])
    machine = Machine()

    def work() -> float:
        share = next(shares)
        machine.now += 1.0
        machine.others += share
        return share

    assert machine.watch().rounds([work], lambda: None) == ([0.3], 1)


def test_patience_waits_for_quiet_and_no_longer() -> None:
    machine = Machine((0.0, 10.0))
    watch = machine.watch(patience_s=60.0)
    watch.wait()
    assert 10.0 < machine.now <= 11.0
    hopeless = Machine((0.0, 1000.0))
    hopeless.watch(patience_s=20.0).wait()
    assert hopeless.now == 20.0
    at_once = Machine((0.0, 1000.0))
    at_once.watch().wait()
    assert at_once.now == 0.0


def test_patience_is_for_rounds_that_are_timed_again_too() -> None:
    machine = Machine((0.5, 30.0))
    watch = machine.watch(patience_s=60.0)
    _, disturbed = watch.rounds([machine.work("a"), machine.work("b")], lambda: None, main=True)
    assert disturbed == 0
    assert watch.result({}).repeated == 1
    assert machine.now > 30.0


def test_opening_is_watched_by_itself() -> None:
    machine = Machine((0.0, 5.0))
    watch = machine.watch()
    machine.pass_(5.0)
    watch.loaded()
    watch.rounds([machine.work("a")], lambda: None, main=True)
    found = watch.result({})
    assert found.loading
    assert found.disturbed == 0


def test_spread_is_that_of_the_middle_nine_tenths() -> None:
    assert spread(90.0, 120.0, 100.0) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("lines", "path", "said"),
    [
        ("0::/a/b\n", "", "usage_usec 5\nthrottled_usec {}000000\n"),
        (
            "3:cpuset:/x\n2:cpu,cpuacct:/a/b\n0::/\n",
            "cpu",
            "nr_periods 1\nthrottled_time {}000000000\n",
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_a_limit_above_counts_as_ones_own(
    lines: str, path: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "self").write_text(lines)
    monkeypatch.setattr(cgroup, "_MEMBERSHIP", tmp_path / "self")
    monkeypatch.setattr(cgroup, "_MOUNT", tmp_path / "fs")
    for group, seconds in (("a/b", 2), ("a", 3)):
        folder = tmp_path / "fs" / path / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.stat").write_text(said.format(seconds))
    assert read_counters().throttled_s == 5.0


def test_a_machine_without_proc_is_timed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in (
        (disturbance, "_TASKS"),
        (disturbance, "_CPUS"),
        (cgroup, "_MEMBERSHIP"),
        (cgroup, "_MOUNT"),
    ):
        monkeypatch.setattr(module, name, tmp_path / "none")

    def refuse(**_: object) -> None:
        raise FileNotFoundError("/proc/stat")

    monkeypatch.setattr(psutil, "cpu_times", refuse)
    found = read_counters()
    assert (found.busy_s, found.steal_s, found.waiting_s, found.throttled_s, found.heat) == (None,) * 5


def test_a_real_load_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the CPUs that there are
    loads: list[Load] = []

    def work() -> None:
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass

    with load_on_every_cpu():
        before = read_counters()
        work()
        loads.append(compare(before, read_counters(), threads=os.cpu_count() or 1, cpus=os.cpu_count() or 1))
    assert "others" in loads[0].causes
    assert loads[0].others is not None
    assert loads[0].others > ALLOWED
