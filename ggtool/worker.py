"""One measurement in a fresh process: the job goes in, events come out, and a dead child is only a reason.

The parent sends a Job as one line of JSON on the child's stdin and keeps that pipe open; the child exits
when it closes, so a parent that was killed leaves nothing running. Events come back as JSON lines on a pipe
of their own, because libraries print to stdout and stderr as they please; both go to a log whose last
lines explain a crash.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from ggtool.errors import GgtoolError, MeasureError
from ggtool.formats import FORMATS

Task = Literal["tokenize", "perplexity", "speed", "memory"]
Progress = Callable[[int, int], None]

_LOG_TAIL_CHARS = 300


@dataclass(frozen=True)
class Job:
    """What a child needs to know. Paths are absolute; `tokens` is an .npy file of int32 ids.

    format: the fields of a Format.
    text: a file to tokenize with the GGUF's own vocabulary and compare with `tokens`; empty to skip.
    """

    task: Task
    format: Mapping[str, Any]
    path: str
    tokens: str
    text: str
    bos: int | None
    n_ctx: int
    n_chunks: int
    threads: int
    device: Literal["cpu", "cuda"]
    repetitions: int


@dataclass(frozen=True)
class Outcome:
    """What a child measured: the task's own numbers, the model's footprint, the library versions it ran."""

    numbers: dict[str, Any]
    footprint: dict[str, Any]
    versions: dict[str, str]


def run(job: Job, progress: Progress, timeout_s: float | None = None) -> Outcome:
    """Measure `job` in a child; MeasureError says how the child ended when it did not answer."""
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "ggtool.worker", str(writer)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[writer],
            env=_environment(job.threads),
        )
        os.close(writer)
        try:
            assert child.stdin is not None
            child.stdin.write(json.dumps(dataclasses.asdict(job)).encode() + b"\n")
            child.stdin.flush()
            with os.fdopen(reader, "rb", buffering=0) as events:
                outcome = _follow(
                    events, progress, None if timeout_s is None else time.monotonic() + timeout_s
                )
            if outcome is None:
                raise MeasureError(f"{job.task}: {_cause(child.wait(), log)}")
            child.stdin.close()
            child.wait()
            return outcome
        except BrokenPipeError:
            raise MeasureError(f"{job.task}: {_cause(child.wait(), log)}") from None
        except TimeoutError:
            raise MeasureError(f"{job.task}: no answer within {timeout_s:g} s, stopped.") from None
        finally:
            child.kill()
            child.wait()


def tokenize(path: Path, text: Path, out: Path) -> int | None:
    """Encode the file `text` with the vocabulary of the GGUF at `path` into `out` (.npy, int32).

    Returns the BOS id that the vocabulary puts first, or None.
    """
    fmt = dataclasses.asdict(FORMATS["gguf-f32"])  # the vocabulary is the same in every quant type
    job = Job("tokenize", fmt, str(path), str(out), str(text), None, 0, 0, 1, "cpu", 0)
    bos: int | None = run(job, lambda done, total: None).numbers["bos"]
    return bos


def _follow(events: IO[bytes], progress: Progress, deadline: float | None) -> Outcome | None:
    """Relay progress until the outcome comes; None when the child ended without one."""
    pending = b""
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([events], [], [], left)[0]:
            raise TimeoutError
        block = os.read(events.fileno(), 65536)
        if not block:
            return None
        *lines, pending = (pending + block).split(b"\n")
        for event in map(json.loads, lines):
            if "done" in event:
                progress(event["done"], event["total"])
            elif "error" in event:
                raise MeasureError(event["error"])
            else:
                return Outcome(**event["outcome"])


def _environment(threads: int) -> dict[str, str]:
    # Everything a child loads is on this disk already; a library that would rather ask a hub must not.
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    # bitsandbytes' CPU code takes its thread count from OpenMP alone.
    return {**os.environ, **offline, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def _cause(status: int, log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    said = f" It said last: {lines[-1][-_LOG_TAIL_CHARS:]}" if lines else ""
    if status >= 0:
        return f"the process ended with exit code {status}.{said}"
    name = signal.Signals(-status).name
    hint = " (out of memory, most likely)" if name == "SIGKILL" else ""
    return f"the process was ended by {name}{hint}.{said}"


def main() -> None:
    """Run the child's side: read a Job from stdin, write events to the descriptor named in argv."""
    job = Job(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8", buffering=1) as events:

        def send(**event: Any) -> None:
            events.write(json.dumps(event, allow_nan=False) + "\n")

        try:
            outcome = _measure(job, lambda done, total: send(done=done, total=total))
        except GgtoolError as error:
            send(error=f"{job.task}: {error}")
        else:
            send(outcome=dataclasses.asdict(outcome))


def _exit_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os._exit(1)


def _measure(job: Job, progress: Progress) -> Outcome:
    # These imports happen in the child alone: the parent stays small and cannot be taken down by them.
    import numpy as np

    from ggtool.backends import RUNTIMES, LoadOptions, open_backend
    from ggtool.formats import Format
    from ggtool.metrics import memory, perplexity, speed

    fmt = Format(**job.format)
    runtime = importlib.import_module(RUNTIMES[fmt.runtime].partition(":")[0])
    if job.task == "tokenize":
        made = runtime.tokenize_with(Path(job.path), Path(job.text).read_bytes().decode())
        np.save(job.tokens, made.ids)
        return Outcome({"bos": made.bos}, {}, {})
    tokens = np.load(job.tokens)
    if job.text:
        _check_vocabulary(runtime, job, tokens)
    meter = memory.PeakMeter()
    started = time.perf_counter()
    with closing(
        open_backend(fmt, Path(job.path), LoadOptions(job.n_ctx, job.threads, job.device))
    ) as backend:
        load_s = time.perf_counter() - started
        meter.loaded()
        numbers: Any
        if job.task == "perplexity":
            numbers = perplexity.perplexity(
                backend, tokens, n_ctx=job.n_ctx, n_chunks=job.n_chunks, bos=job.bos, progress=progress
            )
        elif job.task == "speed":
            pp_tokens, tg_tokens = speed.lengths(backend.n_ctx)
            numbers = speed.speed(
                backend,
                tokens.tolist(),
                load_s=load_s,
                threads=job.threads,
                pp_tokens=pp_tokens,
                tg_tokens=tg_tokens,
                repetitions=job.repetitions,
                progress=progress,
            )
        else:
            memory.exercise(backend, tokens.tolist(), progress)
            numbers = meter.finish(backend)
        return Outcome(
            dataclasses.asdict(numbers),
            dataclasses.asdict(backend.footprint()),
            dict(runtime.runtime_versions()),
        )


def _check_vocabulary(runtime: Any, job: Job, tokens: Any) -> None:
    own = runtime.tokenize_with(Path(job.path), Path(job.text).read_bytes().decode()).ids.tolist()
    expected = tokens.tolist()
    if own == expected:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(own, expected, strict=False)) if a != b),
        min(len(own), len(expected)),
    )
    raise MeasureError(
        f"the GGUF's vocabulary gives other token ids than the checkpoint's tokenizer (first at token {at} of "
        f"{len(expected)}); numbers on different tokens cannot be compared. Convert the model again."
    )


if __name__ == "__main__":
    main()
