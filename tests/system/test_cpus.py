"""Threads follow the CPUs that others leave free; how long they spin is set once, before a library asks."""

import os
import subprocess
import sys

import pytest

from ggtool.system import cpus
from ggtool.system.cpus import FreeCpus, cpu_times, spin_briefly


class Machine:
    """Sixteen CPUs, of which others use so many, and this process so many."""

    def __init__(self) -> None:
        self.now = self.busy = self.own = 0.0

    def pass_(self, seconds: float, *, others: float, own: float) -> None:
        self.now += seconds
        self.own += own * seconds
        self.busy += (own + others) * seconds

    def free(self, most: int) -> FreeCpus:
        return FreeCpus(most, lambda: self.busy, lambda: self.own, lambda: self.now)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(cpus, "own_cpus", lambda: range(16))
    return Machine()


@pytest.mark.parametrize(
    ("others", "threads"),
    [(0.0, 16), (0.2, 16), (0.45, 16), (0.6, 15), (1.0, 15), (3.9, 12), (15.0, 1), (16.0, 1), (30.0, 1)],
)
def test_a_thread_for_each_free_cpu(machine: Machine, others: float, threads: int) -> None:
    free = machine.free(16)
    machine.pass_(1.0, others=others, own=16 - min(others, 16))
    assert free.count() == threads


def test_no_more_than_were_asked_for(machine: Machine) -> None:
    free = machine.free(4)
    machine.pass_(1.0, others=10.0, own=4.0)
    assert free.count() == 4
    machine.pass_(1.0, others=13.0, own=3.0)
    assert free.count() == 3


def test_threads_come_back_when_the_others_have_gone(machine: Machine) -> None:
    free = machine.free(16)
    machine.pass_(1.0, others=8.0, own=8.0)
    assert free.count() == 8
    machine.pass_(0.4, others=0.0, own=8.0)
    assert free.count() == 8  # too short a time to tell
    machine.pass_(0.4, others=0.0, own=8.0)
    assert free.count() == 16


def test_a_machine_that_does_not_tell_keeps_its_threads() -> None:
    clock = iter(range(100))
    free = FreeCpus(7, lambda: None, lambda: 0.0, lambda: float(next(clock)))
    assert free.count() == 7


def test_the_cpus_count_what_computes() -> None:
    before, _ = cpu_times()
    assert before is not None
    subprocess.run([sys.executable, "-c", "for _ in range(5 * 10**6): pass"], check=True)
    after, _ = cpu_times()
    assert after is not None
    assert after > before


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ({}, {"GOMP_SPINCOUNT": "20000"}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
    ids=["nothing set", "a count set", "a policy set"],
)
def test_what_the_user_has_set_stays(
    was: dict[str, str], becomes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(was))
    spin_briefly()
    assert os.environ == becomes


def test_it_is_set_before_a_runtime_brings_its_openmp() -> None:
    code = "import os, ggtool.backends; print(os.environ['GOMP_SPINCOUNT'], 'gomp' in open('/proc/self/maps').read())"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["20000", "False"]
