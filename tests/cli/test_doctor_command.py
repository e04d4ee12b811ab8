"""`ggtool doctor` on this machine, and on machines that lack something: each thing missing is a line with what to do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ggtool.cli import examine
from ggtool.cli.doctor import as_json, as_text
from ggtool.cli.examine import Finding
from ggtool.kernels import build
from ggtool.system import cgroup, machine

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ggtool", "doctor", *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def by_name(findings, section):
    return {finding.name: finding for finding in findings if finding.section == section}


@pytest.fixture(scope="module")
def told():
    """What it says of this machine with a secret in the environment."""
    done = run("--json", HF_TOKEN="hf_this_must_not_be_seen", GGTOOL_LLAMA_SELFTEST="")
    assert done.stderr == ""
    assert "must_not_be_seen" not in done.stdout
    return done


def test_everything_is_told_of_this_machine(told) -> None:
    found = json.loads(told.stdout)
    sections = found["sections"]
    assert found["ok"] == (told.returncode == 0)
    assert sections["ggtool"]["llama-cpp-python"]
    assert sections["cpu"]["threads_used"] >= 1
    assert sections["memory"]["total_bytes"] > 2**28
    assert sections["llama.cpp"]["self-test"] == "passed"
    assert sections["llama.cpp"]["features"]
    assert sections["cache"]["size_bytes"] >= 0
    assert sections["hub"]["token"] == "present"
    assert sections["environment"]["HF_TOKEN"] == "set"
    for one in found["advice"]:
        assert one["advice"], one  # nothing is missing without what to do
        assert "\n" not in one["advice"]


@pytest.mark.parametrize("section", ["llama.cpp", "gpu", "packed products", "tools", "cache", "hub"])
def test_the_page_in_the_docs_has_every_section(told, section) -> None:
    assert section in json.loads(told.stdout)["sections"]
    assert f"\n    {section}\n" in (ROOT / "docs" / "doctor.md").read_text()


def test_without_a_gpu_that_is_a_note_and_no_problem(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(examine, "_NVIDIA", tmp_path / "none")
    facts = {"gpu": False, "built_for_cuda": None, "version": "1"}
    probes = {"torch": facts, "bitsandbytes": facts, "llama_cpp": facts, "triton": {"failure": "none"}}
    found = by_name(examine._gpu(probes), "gpu")
    assert found["devices"].state == "note"
    assert "everything runs on the CPU" in found["devices"].advice
    assert found["torch can use one"] == Finding("gpu", "torch can use one", False)
    # With a driver each library that cannot use it says what to install.
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    found = by_name(examine._gpu(probes), "gpu")
    assert found["devices"].value == ["NVIDIA H200, 143771 MiB"]
    assert "built for CUDA" in found["torch can use one"].advice
    assert "-DGGML_CUDA=on" in found["llama.cpp can use one"].advice
    assert "pip install triton" in found["triton"].advice


def test_without_compilers_torch_computes_and_the_packages_are_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    build.built.cache_clear()
    (way,) = examine._products()
    build.built.cache_clear()
    assert way.value == "torch (there is no C++ compiler; CXX may name one)"
    assert "apt-get install g++" in way.advice
    tools = by_name(examine._tools(), "tools")
    assert {name: tool.value for name, tool in tools.items()} == dict.fromkeys(tools)
    assert all("apt-get install" in tool.advice for tool in tools.values())


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler here")
def test_a_build_below_the_cpu_says_how_to_get_a_better_one(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("GGTOOL_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "best_instructions", lambda: "AVX-1024")
    build.built.cache_clear()
    monkeypatch.setattr(build, "_warn_below", lambda made_for: None)
    (way,) = examine._products()
    build.built.cache_clear()
    assert way.state == "note"
    assert "AVX-1024: unset CXXFLAGS" in way.advice


def test_a_cache_that_cannot_be_written_says_what_to_set(monkeypatch) -> None:
    monkeypatch.setenv("GGTOOL_CACHE", "/proc/ggtool/cache")  # not even root writes there
    found = by_name(examine._cache(), "cache")
    assert found["writable"].state == "problem"
    assert "set GGTOOL_CACHE" in found["writable"].advice


def test_a_full_disk_points_to_the_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("GGTOOL_CACHE", str(tmp_path))
    monkeypatch.setattr(examine, "_LOW_DISK_BYTES", 1 << 60)
    assert "ggtool cache" in by_name(examine._cache(), "cache")["free_disk_bytes"].advice
    assert list(tmp_path.iterdir()) == []  # nothing is left of the attempt to write


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch) -> None:
    from ggtool.errors import OutputError

    def none():
        raise OutputError("this user has no home folder to keep a cache in; set GGTOOL_CACHE to a folder.")

    monkeypatch.setattr(examine, "cache_folder", none)
    (folder,) = examine._cache()
    assert (folder.state, folder.value) == ("problem", None)
    assert "set GGTOOL_CACHE" in folder.advice


def test_a_container_s_limits_are_told(monkeypatch, tmp_path) -> None:
    (tmp_path / "membership").write_text("0::/\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("2147483648\n")
    monkeypatch.setattr(cgroup, "_MOUNT", tmp_path)
    monkeypatch.setattr(cgroup, "_MEMBERSHIP", tmp_path / "membership")
    cpu = by_name(examine._processor(), "cpu")
    assert cpu["container_limit"].value == 0.5
    assert "one CPU or more" in cpu["container_limit"].advice
    assert cpu["threads_used"].value == 1
    memory = by_name(examine._memory(), "memory")
    assert memory["container_limit_bytes"].value == 2 << 30
    assert "2.0 GiB" in as_text([*memory.values()])


def test_without_proc_it_has_less_to_say_and_says_it(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    cpu = by_name(examine._processor(), "cpu")
    assert cpu["features"].state == "note"
    assert "/proc/cpuinfo" in cpu["features"].advice
    assert cpu["model"].value


def test_a_library_that_cannot_be_loaded_is_a_problem_and_the_rest_goes_on() -> None:
    broken = {"failure": "the process was ended by SIGILL."}
    (library,) = examine._llama_cpp(broken)
    assert library.state == "problem"
    assert "pip install --force-reinstall" in library.advice
    assert not json.loads(as_json([library]))["ok"]
    assert "! library" in as_text([library])
    assert as_text([library]).endswith("1 problems, 0 notes")


@pytest.mark.slow  # every type once in a child; the self-test's own tests are in the default run
def test_a_planted_fault_in_llama_cpp_is_told(tmp_path) -> None:
    done = run("--json", GGTOOL_CACHE=str(tmp_path), GGTOOL_LLAMA_SELFTEST="crash:Q4_0")
    llama = json.loads(done.stdout)["sections"]["llama.cpp"]
    assert llama["self-test"] == "Q4_0 ended with SIGSEGV"
    assert llama["extra_buffers"] is False
    assert done.returncode == 0  # it runs


@pytest.mark.slow
def test_with_no_proc_at_all_no_home_and_no_writable_cache_it_still_answers() -> None:
    """In a mount namespace of its own, where this user may make one."""
    script = (
        "mount -t tmpfs none /proc && exec env -i PATH=/usr/bin:/bin PYTHONPATH=$PYTHONPATH "
        'GGTOOL_CACHE=/sys/ggtool "$0" -m ggtool doctor'
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, sys.executable],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("this user may not make a mount namespace")
    assert done.returncode == 1
    assert "set GGTOOL_CACHE" in done.stdout
    assert "Traceback" not in done.stderr
