"""The self-test of llama.cpp: it passes here, planted faults make it fall back or refuse, and what it said is kept."""

import json
import logging
import os
import subprocess
import sys
import time

import pytest
import tiny_gguf

from ggtool.backends import LoadOptions, SamplingParams
from ggtool.backends.llama_cpp import log as llama_log
from ggtool.backends.llama_cpp import selftest
from ggtool.backends.llama_cpp.backend import LlamaCppBackend
from ggtool.backends.llama_cpp.model import runtime_versions
from ggtool.backends.llama_cpp.selftest import SelfTest, describe, self_test
from ggtool.backends.llama_cpp.selftest_child import TYPES, write_model
from ggtool.errors import CrashError


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("GGTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GGTOOL_LLAMA_SELFTEST", raising=False)
    self_test.cache_clear()
    yield
    self_test.cache_clear()


@pytest.fixture
def plant(monkeypatch):
    def set_switch(value: str) -> None:
        monkeypatch.setenv("GGTOOL_LLAMA_SELFTEST", value)
        self_test.cache_clear()

    return set_switch


@pytest.fixture(scope="module")
def q4_0(tmp_path_factory):
    import gguf

    return tiny_gguf.gpt2(
        tmp_path_factory.mktemp("selftest") / "q4_0.gguf", qtype=gguf.GGMLQuantizationType.Q4_0
    ).path


def kept(tmp_path):
    return [json.loads(file.read_text()) for file in (tmp_path / "cache" / "selftest").iterdir()]


def test_this_machine_passes_and_is_asked_once(tmp_path, monkeypatch, caplog) -> None:
    assert self_test() == SelfTest()
    assert describe(self_test()) == "llama.cpp computes right on this CPU."
    assert caplog.records == []
    assert kept(tmp_path) == [{"extra_buffers": True, "usable": True, "failure": "", "done": True}]
    self_test.cache_clear()
    monkeypatch.setattr(selftest, "Child", None)  # what is kept needs no child
    assert self_test() == SelfTest()


def test_another_cpu_another_build_and_a_damaged_answer_are_asked_anew(tmp_path, monkeypatch) -> None:
    names = {selftest._key()}
    with monkeypatch.context() as patch:
        patch.setattr(selftest, "cpu_identity", lambda: "another")
        names.add(selftest._key())
    library = tmp_path / "lib"
    library.mkdir()
    (library / "libllama.so").write_bytes(b"1")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(library))
    names.add(selftest._key())
    (library / "libllama.so").write_bytes(b"22")
    names.add(selftest._key())
    assert len(names) == 4
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH")
    file = tmp_path / "cache" / "selftest" / f"{selftest._key()}.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    assert self_test() == SelfTest()
    assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize(
    ("planted", "says"), [("crash:q4_0", "Q4_0 ended with SIGSEGV"), ("wrong:Q6_K", "Q6_K is off by")]
)
def test_a_build_that_fails_with_extra_buffers_runs_without(
    planted, says, plant, q4_0, caplog, tmp_path
) -> None:
    plant(planted)
    with caplog.at_level(logging.WARNING):
        result = self_test()
    assert (result.extra_buffers, result.usable) == (False, True)
    assert says in result.failure
    (record,) = caplog.records
    assert "fails its self-test with its extra buffers" in record.getMessage()
    assert runtime_versions()["llama_cpp_extra_buffers"] == "off"
    assert _buffers(q4_0) == {"CPU_Mapped"}
    # What was said is kept under what was planted: without it the machine is the one it was.
    plant("")
    assert self_test() == SelfTest()
    assert "llama_cpp_extra_buffers" not in runtime_versions()


def _buffers(path) -> set[str]:
    """Load and run a model; return the kinds of buffers that llama.cpp said it put weights in."""
    llama_log.forget()
    lines: list[str] = []
    forget = llama_log.forget
    llama_log.forget = lambda: (lines.extend(llama_log.lines()), forget())[1]
    try:
        backend = LlamaCppBackend(None, path, LoadOptions(0, 1))
        assert len(list(backend.generate([1, 2], SamplingParams(n_predict=3, temperature=0.0)))) == 3
        backend.close()
    finally:
        llama_log.forget = forget
    return {line.split()[1] for line in lines if "model buffer size" in line}


def test_extra_buffers_are_used_where_the_test_passed(q4_0) -> None:
    buffers = _buffers(q4_0)
    if buffers == {"CPU_Mapped"}:
        pytest.skip("this build has no other layout for Q4_0 on this CPU")
    assert any(name != "CPU_Mapped" for name in buffers)


@pytest.mark.parametrize("planted", ["always-crash:F16", "always-wrong:IQ2_XXS"])
def test_a_build_that_fails_either_way_is_refused_in_one_line(planted, plant, q4_0) -> None:
    plant(planted)
    with pytest.raises(CrashError) as caught:
        LlamaCppBackend(None, q4_0, LoadOptions(0, 1))
    said = str(caught.value)
    assert planted.partition(":")[2] in said
    assert "does not compute on this CPU" in said
    assert "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install" in said
    assert "GGTOOL_LLAMA_SELFTEST=0" in said
    assert "\n" not in said


def test_the_command_line_says_so_and_falls_back_or_refuses(q4_0, tmp_path) -> None:
    def generate(planted: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "ggtool",
            "generate",
            q4_0,
            "-p",
            "Paris",
            "-n",
            "4",
            "-q",
            "-t",
            "1",
        ]
        environment = {**os.environ, "GGTOOL_LLAMA_SELFTEST": planted}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    fallen, refused = generate("crash:q8_0"), generate("always-crash:q8_0")
    assert fallen.returncode == 0
    assert fallen.stdout.strip()
    (line,) = fallen.stderr.splitlines()
    assert "Q8_0 ended with SIGSEGV" in line
    assert generate("crash:q8_0").stderr == ""  # once for a machine
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert line.startswith(
        "ggtool: the installed llama.cpp does not compute on this CPU: Q8_0 ended with SIGSEGV"
    )


def test_the_switch_leaves_it_out(plant, tmp_path) -> None:
    plant("0")
    assert self_test() == SelfTest(done=False)
    assert "left out (GGTOOL_LLAMA_SELFTEST=0)" in describe(self_test())
    assert not (tmp_path / "cache").exists()


def test_a_test_that_could_not_be_run_says_nothing_of_the_build_and_is_not_kept(
    tmp_path, monkeypatch, caplog
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    monkeypatch.setattr(selftest, "_CHILD", "ggtool.no_such_module")
    result = self_test()
    assert (result.extra_buffers, result.usable, result.done) == (True, True, False)
    assert "could not be run" in caplog.text
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_no_obstacle(monkeypatch) -> None:
    monkeypatch.setenv("GGTOOL_CACHE", "/dev/null/cache")
    assert self_test() == SelfTest()


def test_scripts_are_told_by_exit_code_and_a_few_words() -> None:
    command = [sys.executable, "-m", "ggtool.backends.llama_cpp.selftest"]
    good = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (good.returncode, good.stderr) == (0, "")
    environment = {**os.environ, "GGTOOL_LLAMA_SELFTEST": "crash:iq4_nl"}
    bad = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (bad.returncode, bad.stderr) == (3, "IQ4_NL ended with SIGSEGV\n")


def test_the_products_cover_what_the_types_are_for(tmp_path) -> None:
    assert set(TYPES) == {"F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_NL", "IQ2_XXS"}
    for name in TYPES:
        want = write_model(tmp_path / f"{name}.gguf", name)
        assert want.shape == (64, 64)
        assert (want.std(0) > 0).all()  # every row of the matrix counts


@pytest.mark.slow
def test_it_takes_less_than_a_second() -> None:
    """Apart from the rest, for a machine that does nothing else."""
    started = time.monotonic()
    assert self_test() == SelfTest()
    assert time.monotonic() - started < 1
