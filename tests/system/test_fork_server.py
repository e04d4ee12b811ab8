"""Children that are forked from a process with a library imported: like children of their own, and nothing lives on."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ggtool.errors import MeasureError
from ggtool.system import worker
from ggtool.system.child import Child
from ggtool.system.fork_server import ForkServer

ROOT = Path(__file__).parents[2]
LIBRARY = "import os\nIMPORTED_BY = os.getpid()\n"
CHILD = """
import os, signal, sys, time
import forked_library
from ggtool.system.child import Parent

def main():
    parent = Parent()
    while True:
        asked = parent.receive()["do"]
        if asked == "who":
            parent.send(own=os.getpid(), imported_by=forked_library.IMPORTED_BY, told=os.environ["TOLD"])
        print("noise", flush=True)
        exec(asked) if asked != "who" else None
"""
JOB = """
import dataclasses, os, forked_library
from typing import ClassVar
from ggtool.system.worker import Outcome

@dataclasses.dataclass(frozen=True)
class ForkedJob:
    runs: ClassVar[str] = "forked_job:do"
    task: ClassVar[str] = "test"
    threads: ClassVar[int] = 1
    imports: str | None = "forked_library"

def do(job, progress):
    return Outcome({"forked": forked_library.IMPORTED_BY != os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}, {}, {})
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "forked_library.py").write_text(LIBRARY)
    (tmp_path / "forked_child.py").write_text(CHILD)
    (tmp_path / "forked_job.py").write_text(JOB)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def server() -> Iterator[ForkServer]:
    with ForkServer("forked_library", {"TOLD": "yes"}) as one:
        assert one.is_ready
        yield one


def is_running(number: int) -> bool:
    return psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE


def wait_for_end(*numbers: int) -> None:
    deadline = time.monotonic() + 20
    while any(is_running(number) for number in numbers):
        assert time.monotonic() < deadline, "a process lives on"
        time.sleep(0.02)


def test_children_find_the_library_imported_and_the_servers_environment(server: ForkServer) -> None:
    with Child("forked_child", server=server) as one, Child("forked_child", server=server) as other:
        answers = []
        for child in (one, other):
            child.send({"do": "who"})
            answers.append(child.receive())
    assert answers[0]["own"] != answers[1]["own"]
    assert answers[0]["imported_by"] == answers[1]["imported_by"] not in {one["own"] for one in answers}
    assert {answer["told"] for answer in answers} == {"yes"}
    wait_for_end(*(answer["own"] for answer in answers))


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV. It said last: noise"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL (out of memory, most likely)"),
        ("os._exit(3)", "ended with exit code 3. It said last: noise"),
        ("sys.exit(4)", "ended with exit code 4"),
        ("raise RuntimeError('shape mismatch')", "ended with exit code 1. It said last: RuntimeError: shape"),
    ],
)
def test_a_forked_childs_end_is_told_as_any_childs(server: ForkServer, does: str, says: str) -> None:
    with Child("forked_child", server=server) as child:
        child.send({"do": does})
        assert child.receive() is None
        assert says in child.cause_of_death()


def test_a_child_that_hangs_is_ended_and_the_server_goes_on(server: ForkServer) -> None:
    started = time.monotonic()
    for _ in range(2):
        with Child("forked_child", server=server) as child:
            child.send({"do": "who"})
            number = child.receive()["own"]
            child.send({"do": "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); time.sleep(600)"})
        assert not is_running(number)
    assert time.monotonic() - started < 20


def test_a_server_that_is_killed_is_told_and_leaves_no_child() -> None:
    with (
        ForkServer("forked_library", {"TOLD": "yes"}) as server,
        Child("forked_child", server=server) as child,
    ):
        assert server.is_ready
        child.send({"do": "who"})
        answer = child.receive()
        os.kill(answer["imported_by"], signal.SIGKILL)
        child.send({"do": "time.sleep(600)"})
        assert "SIGKILL" in child.cause_of_death()
        wait_for_end(answer["own"])
        with pytest.raises(ConnectionError):
            Child("forked_child", server=server)


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_nothing_lives_on_when_the_parent_is_stopped(way: signal.Signals) -> None:
    program = """
        import time
        from ggtool.system.child import Child
        from ggtool.system.fork_server import ForkServer
        with ForkServer("forked_library", {"TOLD": "yes"}) as server:
            assert server.is_ready
            with Child("forked_child", server=server) as child:
                child.send({"do": "who"})
                answer = child.receive()
                print(answer["own"], answer["imported_by"], flush=True)
                child.send({"do": "time.sleep(600)"})
                time.sleep(600)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert parent.stdout is not None
    numbers = [int(number) for number in parent.stdout.readline().split()]
    if way == signal.SIGINT:
        os.killpg(parent.pid, way)  # as a terminal does: to all of them
    else:
        parent.send_signal(way)
    *_, said = parent.communicate(timeout=20)
    wait_for_end(*numbers)
    assert said.count(b"KeyboardInterrupt") == (way == signal.SIGINT), said


def test_a_job_is_forked_where_it_allows_it(modules: Path) -> None:
    from forked_job import ForkedJob

    assert not worker.run(ForkedJob()).numbers["forked"]
    with worker.forking():
        numbers = worker.run(ForkedJob()).numbers
        assert numbers == {"forked": True, "threads": "1"}
        assert not worker.run(ForkedJob(imports=None)).numbers["forked"]
        (server,) = [one for one in psutil.Process().children() if "fork_server" in " ".join(one.cmdline())]
        os.kill(server.pid, signal.SIGKILL)
        assert not worker.run(ForkedJob()).numbers["forked"], "a lost server is no reason to fail"
    assert not worker.run(ForkedJob()).numbers["forked"]


def test_nothing_is_forked_from_a_process_with_another_thread(modules: Path) -> None:
    from forked_job import ForkedJob

    library = (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    (modules / "forked_library.py").write_text(LIBRARY + library)
    with ForkServer("forked_library", {}) as server:
        assert not server.is_ready
    with worker.forking():
        assert not worker.run(ForkedJob()).numbers["forked"]


def test_a_library_that_cannot_be_imported_is_the_jobs_to_tell(modules: Path) -> None:
    from forked_job import ForkedJob

    (modules / "forked_library.py").write_text("raise ImportError('no such part')\n")
    with worker.forking(), pytest.raises(MeasureError, match="no such part"):
        worker.run(ForkedJob())
