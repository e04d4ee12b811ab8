"""The server against llama.cpp's own, on one GGUF file: one stream, many clients, memory, cut requests, long conversations.

    python scripts/bench/serve.py MODEL.gguf --tools FOLDER [--threads 2] [--clients 16] [--seconds 60] [--text FILE] [--json]

FOLDER holds llama-bench and, where the comparison with them is wanted, llama-server and llama-batched-bench, all built from the
vendored source (`scripts/build-llama-tools llama-server`). One stream and llama-bench take turns, so that other load meets both;
llama-batched-bench is what llama.cpp itself reaches with as many texts, prompts included, and no server around it. Everything runs in one go on one machine, one server after the other, and every
claim is a ratio within the run. The clients are plain sockets in this process and the same for both servers: each asks
for 128 tokens behind a prompt of 400 to 1200 characters of the text, at temperature 0.8 and top_k 40, again and again
until the time is up. Rates count generated tokens as they come in. How busy the machine was before is said first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

N_PREDICT = 128
N_SINGLE = 256
N_PROMPT = 190  # tokens of a mean prompt
N_ROUNDS = 5
TEXT = Path(__file__).parents[2] / "models" / "gpt2-demo" / "heldout.txt"


@dataclass
class Load:
    """What many clients saw. Times in s; tokens_s is the sum over all of them."""

    tokens_s: float
    requests: int
    statuses: dict[str, int]
    ttft_p50_s: float
    ttft_p95_s: float


@dataclass
class Measured:
    """One server's numbers; memory in bytes, before and after the load."""

    name: str
    llama_bench_tokens_s: list[float] = field(default_factory=list)
    singles_tokens_s: list[float] = field(default_factory=list)
    load: Load | None = None
    memory_before: int = 0
    memory_after: int = 0
    busy_after_cuts: int | None = None
    turns_ttft_s: list[float] = field(default_factory=list)

    @property
    def single_tokens_s(self) -> float:
        """The median over rounds."""
        return statistics.median(self.singles_tokens_s)

    @property
    def share_of_llama_bench(self) -> float:
        """The median over rounds."""
        pairs = zip(self.singles_tokens_s, self.llama_bench_tokens_s, strict=True)
        return statistics.median(one / bench for one, bench in pairs)


@dataclass
class Answer:
    """One streamed answer: when its texts came, seconds after it was asked for."""

    status: int
    moments: list[float]
    text: str


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tools", type=Path, required=True, help="folder of llama-bench and llama-server")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    busy = psutil.cpu_percent(interval=3)
    text = args.text.read_text(encoding="utf-8")
    together = llama_batched_bench(args)
    servers = [measure("ggtool", args, text)]
    if (args.tools / "llama-server").exists():
        servers.append(measure("llama-server", args, text))
    result = {
        "machine_busy_percent": busy,
        "llama_batched_bench": together,
        "servers": [asdict(one) for one in servers],
    }
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        report(busy, together, servers, args)


def report(busy: float, together: float | None, servers: list[Measured], args: argparse.Namespace) -> None:
    print(f"{args.model.name}, {args.threads} threads; the machine was {busy:.0f} % busy before")
    if together is not None:
        print(f"llama-batched-bench, {args.clients} texts, prompts included: {together:.1f} tokens/s")
    for one in servers:
        load = one.load
        assert load is not None
        print(f"{one.name}:")
        print(
            f"  one stream        {one.single_tokens_s:.1f} tokens/s, {one.share_of_llama_bench:.3f} of llama-bench "
            f"({statistics.median(one.llama_bench_tokens_s):.1f})"
        )
        print(
            f"  {args.clients} clients, {args.seconds:.0f} s  {load.tokens_s:.1f} tokens/s, "
            f"{load.tokens_s / one.single_tokens_s:.2f} of one stream; first token p50 {load.ttft_p50_s:.3f} s, "
            f"p95 {load.ttft_p95_s:.3f} s; {load.requests} answers {load.statuses}"
        )
        if together is not None:
            print(f"                    {load.tokens_s / together:.3f} of llama-batched-bench")
        print(f"  memory            {one.memory_after / one.memory_before:.3f} of before the load")
        print(f"  busy after cuts   {one.busy_after_cuts}")
        if one.turns_ttft_s:
            ratio = one.turns_ttft_s[9] / one.turns_ttft_s[1]
            first = f"{1e3 * one.turns_ttft_s[9]:.1f} over {1e3 * one.turns_ttft_s[1]:.1f} ms"
            print(f"  first token       turn ten over turn two {ratio:.2f} ({first})")
    if len(servers) == 2:
        ours, theirs = servers
        assert ours.load is not None
        assert theirs.load is not None
        print(f"throughput against llama-server: {ours.load.tokens_s / theirs.load.tokens_s:.2f}")
        print(f"one stream against llama-server: {ours.single_tokens_s / theirs.single_tokens_s:.2f}")


def llama_bench(args: argparse.Namespace) -> float:
    command = [
        args.tools / "llama-bench",
        "-m",
        args.model,
        "-t",
        str(args.threads),
        "-p",
        "0",
        "-n",
        str(N_SINGLE),
    ]
    found = subprocess.run([*map(str, command), "-r", "3", "-o", "json"], capture_output=True, check=True)
    return float(json.loads(found.stdout)[0]["avg_ts"])


def llama_batched_bench(args: argparse.Namespace) -> float | None:
    """Return generated tokens a second of `clients` texts, over the time of their prompts too; without flash attention, the quicker."""
    tool = args.tools / "llama-batched-bench"
    if not tool.exists():
        return None
    n_ctx = (N_PROMPT + N_PREDICT) * args.clients
    sizes = f"-c {n_ctx} -npp {N_PROMPT} -ntg {N_PREDICT} -npl {args.clients} -fa off --output-format jsonl"
    command = [tool, "-m", args.model, "-t", args.threads, *sizes.split()]
    found = subprocess.run([*map(str, command)], capture_output=True, check=True)
    (row,) = (json.loads(line) for line in found.stdout.splitlines() if line.startswith(b"{"))
    return float(args.clients * N_PREDICT / (row["t_pp"] + row["t_tg"]))


def measure(name: str, args: argparse.Namespace, text: str) -> Measured:
    with (serving_ggtool if name == "ggtool" else serving_llama)(args) as (process, port):
        made = Measured(name)
        for _ in range(N_ROUNDS):
            made.llama_bench_tokens_s.append(llama_bench(args))
            made.singles_tokens_s.append(asyncio.run(single(port, text)))
        asyncio.run(load(port, text, args.clients, 5.0, seed=1000))  # memory taken once has been taken
        made.memory_before = resident(process)
        made.load = asyncio.run(load(port, text, args.clients, args.seconds, seed=2000))
        made.memory_after = resident(process)
        made.turns_ttft_s = asyncio.run(conversations(port, text, 7))
        asyncio.run(cut(port, text, args.cuts))
        made.busy_after_cuts = busy_slots(name, port)
    return made


@contextlib.contextmanager
def serving_ggtool(args: argparse.Namespace) -> Iterator[tuple[psutil.Process, int]]:
    port = free_port()
    command = [sys.executable, "-m", "ggtool", "serve", f"model={args.model}", "--port", str(port), "--quiet"]
    command += ["--slots", str(args.clients), "--threads", str(args.threads)]
    with running(command, port) as process:
        yield process, port


@contextlib.contextmanager
def serving_llama(args: argparse.Namespace) -> Iterator[tuple[psutil.Process, int]]:
    port = free_port()
    n_ctx = 1024
    command = [
        str(args.tools / "llama-server"),
        "-m",
        str(args.model),
        "--port",
        str(port),
        "-t",
        str(args.threads),
    ]
    command += [
        "-np",
        str(args.clients),
        "-c",
        str(n_ctx * args.clients),
        "--no-webui",
        "--slots",
        "--log-disable",
    ]
    with running(command, port) as process:
        yield process, port


@contextlib.contextmanager
def running(command: list[str], port: int) -> Iterator[psutil.Process]:
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ.copy()
    )
    try:
        for _ in range(1200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            assert child.poll() is None, f"{command[0]} ended"
            time.sleep(0.1)
        yield psutil.Process(child.pid)
    finally:
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(30)
        child.kill()
        child.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def resident(process: psutil.Process) -> int:
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))


def busy_slots(name: str, port: int) -> int:
    time.sleep(1)
    path = "health" if name == "ggtool" else "slots"
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as response:
        found = json.load(response)
    if name == "ggtool":
        return sum(one["busy"] for one in found["loaded"].values())
    return sum(bool(slot["is_processing"]) for slot in found)


def prompts(text: str, seed: int) -> Iterator[str]:
    dice = random.Random(seed)
    while True:
        at, n = dice.randrange(len(text) - 1200), dice.randrange(400, 1200)
        yield text[at : at + n]


async def ask(port: int, prompt: str, n_predict: int, *, cut_after: int = 0, **options: Any) -> Answer:
    """Stream one completion; with cut_after, close the connection behind so many texts."""
    body = {"prompt": prompt, "max_tokens": n_predict, "stream": True, "ignore_eos": True, "temperature": 0.8}
    data = json.dumps({**body, "top_k": 40, "seed": 1, **options}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        writer.write(head.encode() + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(data) + data)
        status = int((await reader.readline()).split()[1])
        came: list[tuple[float, bytes]] = []
        n_texts = 0
        while block := await reader.read(1 << 16):
            came.append((time.perf_counter() - started, block))
            if cut_after and (n_texts := n_texts + block.count(b"\ndata: {")) >= cut_after:
                break
        # Taken apart afterwards: this process takes its time from the server's CPUs.
        said = [(moment, text) for moment, line in lines_of(came) if (text := text_of(line))]
        return Answer(status, [moment for moment, _ in said], "".join(text for _, text in said))
    finally:
        writer.close()


def lines_of(blocks: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Yield the lines with an event's data, and when their ends came."""
    rest = b""
    for moment, block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from ((moment, line) for line in lines if line.startswith(b"data: {"))


def text_of(line: bytes) -> str:
    choices = json.loads(line[6:]).get("choices")
    return choices[0].get("text") or "" if choices else ""


async def single(port: int, text: str) -> float:
    """Return the median rate of three answers to one client at temperature 0, from the first token on."""
    await ask(port, "Hello", 8)
    rates = []
    for prompt, _ in zip(prompts(text, 1), range(3), strict=False):
        answer = await ask(port, prompt[:40], N_SINGLE, temperature=0)
        rates.append((len(answer.moments) - 1) / (answer.moments[-1] - answer.moments[0]))
    return statistics.median(rates)


async def load(port: int, text: str, n_clients: int, seconds: float, seed: int) -> Load:
    """Have clients ask for `seconds`; another seed is other prompts, which no server has seen."""
    until = time.perf_counter() + seconds
    answers: list[Answer] = []
    in_time = 0

    async def client(number: int) -> None:
        nonlocal in_time
        for prompt in prompts(text, seed + number):
            left = until - time.perf_counter()
            if left <= 0:
                return
            answer = await ask(port, prompt, N_PREDICT)
            answers.append(answer)
            in_time += sum(moment <= left for moment in answer.moments)
            if answer.status == 429:
                await asyncio.sleep(1)

    await asyncio.gather(*(client(number) for number in range(n_clients)))
    first = sorted(answer.moments[0] for answer in answers if answer.moments)
    statuses: dict[str, int] = {}
    for answer in answers:
        statuses[str(answer.status)] = statuses.get(str(answer.status), 0) + 1
    p95 = first[min(len(first) - 1, int(0.95 * len(first)))]
    return Load(in_time / seconds, len(answers), statuses, statistics.median(first), p95)


async def conversations(port: int, text: str, n: int) -> list[float]:
    """Return the times to the first token of ten turns, each behind all that was said before: medians of `n` talks."""
    talks = [await conversation(port, text[4000 * number :]) for number in range(n)]
    return [statistics.median(times) for times in zip(*talks, strict=True)]


async def conversation(port: int, text: str) -> list[float]:
    said, times = text[:300], []
    for turn in range(10):
        answer = await ask(port, said, 24)
        times.append(answer.moments[0])
        said += answer.text + "\n" + text[2000 + 100 * turn : 2040 + 100 * turn]
    return times


async def cut(port: int, text: str, n: int) -> None:
    """Close the connection of `n` requests in the middle of their answers, eight at a time."""
    wanted = prompts(text, 5)

    async def some() -> None:
        for _ in range(n // 8):
            await ask(port, next(wanted), N_PREDICT, cut_after=3)

    await asyncio.gather(*(some() for _ in range(8)))


if __name__ == "__main__":
    main()
