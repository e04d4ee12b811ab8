"""Facts of a machine: a container's limits, no /proc, no home."""

from pathlib import Path

import pytest

from ggtool.errors import OutputError
from ggtool.kernels import build
from ggtool.system import cgroup, machine
from ggtool.system.cache import cache_folder


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Write files of control groups, and what /proc says of this process's own."""
    monkeypatch.setattr(cgroup, "_MOUNT", tmp_path / "sys")
    monkeypatch.setattr(cgroup, "_MEMBERSHIP", tmp_path / "membership")

    def write(membership: str | None, **files: str) -> None:
        if membership is not None:
            (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            file = tmp_path / "sys" / name.replace("__", "/").replace("_dot_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    return write


def test_no_groups_no_limits(group) -> None:
    assert (cgroup.cpu_limit(), cgroup.memory_limit_bytes()) == (None, None)
    group("0::/\n", cpu_dot_max="max 100000\n", memory_dot_max="max\n")
    assert (cgroup.cpu_limit(), cgroup.memory_limit_bytes()) == (None, None)


def test_the_smallest_limit_on_the_way_up_counts(group) -> None:
    group(
        "0::/slice/pod\n",
        slice__cpu_dot_max="150000 100000\n",
        slice__pod__cpu_dot_max="400000 100000\n",
        slice__memory_dot_max="max\n",
        slice__pod__memory_dot_max="1073741824\n",
    )
    assert cgroup.cpu_limit() == 1.5
    assert cgroup.memory_limit_bytes() == 1 << 30


def test_a_container_that_is_told_its_path_outside_is_found_at_the_root(group) -> None:
    group("0::/docker/abc\n", cpu_dot_max="50000 100000\n")
    assert cgroup.cpu_limit() == 0.5


def test_version_1_of_the_groups(group) -> None:
    group(
        "4:cpu,cpuacct:/a\n3:memory:/a\n1:name=systemd:/b\n",
        cpu__a__cpu_dot_cfs_quota_us="250000\n",
        cpu__a__cpu_dot_cfs_period_us="100000\n",
        cpu__cpu_dot_cfs_quota_us="-1\n",
        memory__a__memory_dot_limit_in_bytes="2147483648\n",
        memory__memory_dot_limit_in_bytes="9223372036854771712\n",
    )
    assert cgroup.cpu_limit() == 2.5
    assert cgroup.memory_limit_bytes() == 2 << 30


@pytest.mark.parametrize(("limit", "threads"), [("50000", 1), ("190000", 1), ("200000", 2), ("9900000", 4)])
def test_threads_fit_the_limit(group, monkeypatch, limit, threads) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    group("0::/\n", cpu_dot_max=f"{limit} 100000\n", memory_dot_max="1048576\n")
    assert machine.usable_cpus() == threads
    described = machine.describe_machine()
    assert described["cpu_count"] == str(threads)
    assert described["memory_bytes"] == "1048576"


def test_without_proc_there_are_names_and_no_errors(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    assert machine.cpu_features() == frozenset()
    assert machine.describe_machine()["cpu"]
    assert isinstance(machine.cpu_identity(), str)
    assert build.best_instructions() == "scalar"


def test_only_the_first_cpu_is_read(tmp_path, monkeypatch) -> None:
    cpu = "processor\t: {}\nmodel name\t: Some CPU {}\nflags\t\t: fpu avx2\n\n"
    (tmp_path / "cpuinfo").write_text(cpu.format(0, 0) + cpu.format(1, 1))
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.cpu_features() == {"fpu", "avx2"}
    assert machine.cpu_identity() == "flags\t\t: fpu avx2\nmodel name\t: Some CPU 0"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch) -> None:
    def no_home(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GGTOOL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(OutputError, match="set GGTOOL_CACHE"):
        cache_folder()
