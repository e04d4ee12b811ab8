"""How llama.cpp's threads wait for each other, and what that costs on an idle and on a busy machine.

    python scripts/bench/threads.py MODEL.gguf... --store rows.jsonl [--busy 0,1,2] [--choices "default;passive"]
        [--rounds 3] [--seconds 1] [--threads 2] [--limit 280] [--first] [--no-openmp FOLDER]

Each choice is a row: how the barrier between threads waits, or how many threads there are. --busy gives how many
processes compute beside it, at normal priority. A cell is the median over rounds of tokens/s, generation and prompts of
256 tokens apart, with its share of what is fair: the first choice's rate beside nothing (the first column's, as if it were
fair, where nothing was measured beside nothing), times the share of the CPUs that so many threads get beside so many
processes. Each run is a process of its own; what is measured is kept in --store, and a second call goes on.

A run waits until nothing else computes and does not count if something did. Where that never happens, --first (as root)
puts what is measured before everything else: beside nothing at real-time priority, beside busy processes together with
them at nice -20.

--no-openmp FOLDER adds the choices of a llama.cpp that was built with GGML_OPENMP=OFF: a copy of llama_cpp/lib, with the
libggml-cpu of such a build in it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

_PROMPT = 256
_STRANGERS = 0.03  # the share of the CPUs that others may take before a run is tried again
_MOMENT_S = 0.3
_WARM_UP_S = 0.7  # long enough for threads to have followed the load
_RATES = ("decode", "prefill")


Row = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """One way for threads to wait: variables of libgomp, threads less than asked for, a poll level of ggml's own pool.

    follows: as many threads as others leave CPUs free, which is what ggtool does.
    """

    name: str
    env: tuple[tuple[str, str], ...] = ()
    fewer: int = 0
    poll: int | None = None
    follows: bool = False


def _spins(count: int) -> Choice:
    return Choice(f"spin {count}", (("GOMP_SPINCOUNT", str(count)),))


_BOUND = (("OMP_PROC_BIND", "true"),)
CHOICES = (
    Choice("default"),
    Choice("passive", (("OMP_WAIT_POLICY", "passive"),)),
    *(_spins(count) for count in (100, 300, 1000, 3000, 10000, 20000, 100000)),
    Choice("default, bound", _BOUND),
    Choice("spin 1000, bound", (*_BOUND, ("GOMP_SPINCOUNT", "1000"))),
    Choice("spin 20000, bound", (*_BOUND, ("GOMP_SPINCOUNT", "20000"))),
    Choice("threads - 1", fewer=1),
    Choice("ggtool", (("GOMP_SPINCOUNT", "20000"),), follows=True),
)
OWN_POOL = tuple(Choice(f"no OpenMP, poll {poll}", poll=poll) for poll in (0, 50, 100))


def main() -> None:
    """Parse, run all choices in turn, print a table for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--busy", default="0,1,2")
    parser.add_argument("--choices", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--limit", type=float, default=280.0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-openmp", type=Path)
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        if args.first:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        print(
            json.dumps(measure(args.models[0], Choice(**json.loads(args.child)), args.threads, args.seconds))
        )
        return
    if args.first:
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    choices = [*CHOICES, *(OWN_POOL if args.no_openmp else ())]
    wanted = [name.strip() for name in args.choices.split(";") if name.strip()]
    if unknown := set(wanted) - {choice.name for choice in choices}:
        parser.error(f"unknown choices {unknown}; known: {'; '.join(c.name for c in choices)}")
    choices = [choice for choice in choices if not wanted or choice.name in wanted]
    results = run_all(args, choices, [int(n) for n in args.busy.split(",")])
    print_tables(results, choices, args)


def run_all(args: argparse.Namespace, choices: Sequence[Choice], busy: Sequence[int]) -> list[Row]:
    """Return the rows of the store, with those that were missing and could be measured in --limit seconds.

    The order is shuffled. A run waits until strangers leave the CPUs alone, and does not count if they came back.
    """
    rows = read_rows(args.store)
    end = time.monotonic() + args.limit
    while missing := missing_cells(rows, args, choices, busy):
        random.shuffle(missing)
        for model, choice, n_busy in missing:
            while time.monotonic() < end and not (args.first or is_quiet()):
                pass
            if time.monotonic() >= end:
                return rows
            with busy_processes(n_busy) as running:
                before = strangers_s(running)
                rates = run_child(args, model, choice, first=args.first and not n_busy)
                strangers = strangers_share(before, strangers_s(running))
            print(
                f"{model.name}, {choice.name}, {n_busy} busy: {rates}, strangers {strangers:.3f}",
                file=sys.stderr,
            )
            if args.first or strangers < _STRANGERS:
                rows.append({"model": model.name, "choice": choice.name, "busy": n_busy, **rates})
                with args.store.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    return rows


def missing_cells(
    rows: Sequence[Row], args: argparse.Namespace, choices: Sequence[Choice], busy: Sequence[int]
) -> list[tuple[Path, Choice, int]]:
    """Return the cells that have fewer than --rounds rows."""
    held = Counter((row["model"], row["choice"], row["busy"]) for row in rows)
    cells = itertools.product(args.models, choices, busy)
    return [cell for cell in cells if held[cell[0].name, cell[1].name, cell[2]] < args.rounds]


def read_rows(path: Path) -> list[Row]:
    """Return what a store holds."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_quiet() -> bool:
    """Tell, after a moment, whether the CPUs were idle in it."""
    before = strangers_s(())
    time.sleep(_MOMENT_S)
    return strangers_share(before, strangers_s(())) < _STRANGERS


def strangers_s(running: Sequence[subprocess.Popen[bytes]]) -> tuple[float, float]:
    """Return the time now, and the CPU seconds that neither these processes nor our children have used."""
    counts = psutil.cpu_times()
    used = sum(counts) - counts.idle - counts.iowait - counts.guest - counts.guest_nice
    mine = sum(sum(psutil.Process(process.pid).cpu_times()[:2]) for process in running)
    own = os.times()
    return time.monotonic(), used - mine - sum(own[:4])


def strangers_share(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Return the share of all CPUs that strangers took between two readings."""
    return (after[1] - before[1]) / (after[0] - before[0]) / (os.cpu_count() or 1)


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[Sequence[subprocess.Popen[bytes]]]:
    """Keep `count` processes computing."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def run_child(args: argparse.Namespace, model: Path, choice: Choice, *, first: bool) -> dict[str, float]:
    """Measure one choice in a process that has its variables, and no others of OpenMP's."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environment |= dict(choice.env)
    if choice.poll is not None:
        environment["LLAMA_CPP_LIB_PATH"] = str(args.no_openmp)
    command = [sys.executable, __file__, str(model), "--child", json.dumps(asdict(choice))]
    command += ["--threads", str(args.threads), "--seconds", str(args.seconds), "--store", os.devnull]
    command += ["--first"] * first
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rates: dict[str, float] = json.loads(done.stdout)
    return rates


def measure(path: Path, choice: Choice, threads: int, seconds: float) -> dict[str, float]:
    """Return tokens/s of generation and of prompts, over `seconds` each."""
    import llama_cpp.llama_cpp as lib

    from ggtool.system.cpus import FreeCpus

    silence = lib.llama_log_callback(lambda *_: None)  # kept alive: the library calls it until the end
    lib.llama_log_set(silence, None)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = 512
    params.n_threads = params.n_threads_batch = max(threads - choice.fewer, 1)
    context = lib.llama_init_from_model(model, params)
    if choice.poll is not None:
        attach_pool(lib, context, params.n_threads, choice.poll)
    memory = lib.llama_get_memory(context)
    free = FreeCpus(threads)
    prompt = (lib.llama_token * _PROMPT)(*(100 + index % 1000 for index in range(_PROMPT)))
    one = (lib.llama_token * 1)(100)

    def adapt() -> None:
        if choice.follows:
            lib.llama_set_n_threads(context, free.count(), free.count())

    def read() -> int:
        adapt()
        lib.llama_memory_clear(memory, True)
        assert lib.llama_decode(context, lib.llama_batch_get_one(prompt, _PROMPT)) == 0
        lib.llama_synchronize(context)
        return _PROMPT

    def make() -> int:
        adapt()
        if lib.llama_memory_seq_pos_max(memory, 0) > 400:
            lib.llama_memory_seq_rm(memory, 0, _PROMPT, -1)
        assert lib.llama_decode(context, lib.llama_batch_get_one(one, 1)) == 0
        lib.llama_synchronize(context)
        return 1

    prefill = rate(read, seconds)
    slept = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    decode = rate(make, seconds)
    slept = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - slept
    return {"prefill": prefill, "decode": decode, "sleeps": slept / (decode * seconds)}


def rate(step, seconds: float) -> float:  # type: ignore[no-untyped-def]
    """Run a step over and over, to warm up and then for `seconds`; return its tokens/s."""
    end = time.perf_counter() + _WARM_UP_S
    while time.perf_counter() < end:
        step()
    n_tokens, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        n_tokens += step()
    return n_tokens / passed


def attach_pool(lib, context, threads: int, poll: int) -> None:  # type: ignore[no-untyped-def]
    """Give a context a thread pool of ggml's own, which polls for `poll` * 131072 rounds before it sleeps."""

    class Params(ctypes.Structure):
        _fields_ = (
            ("cpumask", ctypes.c_bool * 512),
            ("n_threads", ctypes.c_int),
            ("prio", ctypes.c_int),
            ("poll", ctypes.c_uint32),
            ("strict_cpu", ctypes.c_bool),
            ("paused", ctypes.c_bool),
        )

    cpu = ctypes.CDLL(str(Path(os.environ["LLAMA_CPP_LIB_PATH"]) / "libggml-cpu.so"))
    cpu.ggml_threadpool_new.restype = ctypes.c_void_p
    params = Params(n_threads=threads, prio=0, poll=poll)
    pool = ctypes.c_void_p(cpu.ggml_threadpool_new(ctypes.byref(params)))
    lib._lib.llama_attach_threadpool(ctypes.c_void_p(context), pool, pool)


def print_tables(rows: Sequence[Row], choices: list[Choice], args: argparse.Namespace) -> None:
    """Print, for each model and rate, a row a choice and a column a number of busy processes."""
    busy = sorted({row["busy"] for row in rows})
    for model in args.models:
        for kind in _RATES:
            print(f"\n{model.name}, {kind}, tokens/s (share of the fair rate)\n")
            print("| choice | " + " | ".join(f"{n} busy" for n in busy) + " |")
            print("| --- |" + " --: |" * len(busy))
            base = median(rows, model.name, choices[0].name, busy[0], kind)
            for choice in choices:
                cells = []
                for n in busy:
                    value = median(rows, model.name, choice.name, n, kind)
                    cells.append(f"{value:,.0f} ({value / (base * fair_share(args.threads, n)):.2f})")
                print(f"| {choice.name} | " + " | ".join(cells) + " |")


def median(rows: Sequence[Row], model: str, choice: str, busy: int, kind: str) -> float:
    """Return the median over rounds of one cell."""
    cell = (model, choice, busy)
    found = [r[kind] for r in rows if (r["model"], r["choice"], r["busy"]) == cell]
    return statistics.median(found) if found else float("nan")


def fair_share(threads: int, busy: int) -> float:
    """Return the share of its idle rate that a process with so many threads may expect beside `busy` processes."""
    n_cpus = len(os.sched_getaffinity(0))
    return min(1.0, n_cpus / (threads + busy))


if __name__ == "__main__":
    main()
