"""Decode on one GPU against the same model split over several, in one run, and what their exchanges cost.

    python scripts/bench/ranks_decode.py [--model llama-8b] [--formats fp16,int8] [--contexts 128,1024] [--rounds 5]
        [--devices cuda:0,cuda:1] [--seconds 120] [--out FILE]

Random weights, the same on both sides, greedy, one text. For each format and context, medians of ms a token over rounds in
which the two sides take turns. Of the exchanges: the time of all of a token's in a graph by themselves; the time of one GPU's
kernels without them, which is what a token would take if they cost nothing. `nccl_sums.py` times NCCL's all-reduce. "beside" is the first GPU alone while the last multiplies matrices for somebody else.
--devices cpu,cpu runs a tiny model in the tests' emulation: a trial of the script and no measurement.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compilers import Compilers, Names
from random_models import SIZES, Sizes, random_model

from ggtool.backends.engine import rank_steps, step
from ggtool.backends.engine.model import Model
from ggtool.backends.engine.prompt import forward, head_logits
from ggtool.backends.engine.rank_steps import Rank, RankSteps, Together
from ggtool.backends.engine.ranks import RankedEngine, reach_each_other
from ggtool.backends.engine.split import split
from ggtool.backends.engine.step import Run, Steps
from ggtool.kernels.decode import Launcher
from ggtool.kernels.exchange import choose_together, exchange_sum, mailboxes
from ggtool.kernels.nvrtc import GpuLauncher, KernelName, architecture

N_TOKENS = 32
AT_ONCE = 8
TINY = Sizes("tiny", 2, 64, 4, 2, 256, 320, True)


class WithoutExchanges:
    """A launcher that leaves the exchanges out."""

    def __init__(self, launcher: Any) -> None:
        self._launcher, self.n_processors = launcher, launcher.n_processors

    def launch(self, name: KernelName, *rest: Any) -> None:
        """Start what is no exchange."""
        if name.file != "exchange.cu":
            self._launcher.launch(name, *rest)


def synchronize(devices: Sequence[torch.device]) -> None:
    """Wait for all GPUs."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def launchers_of(devices: Sequence[torch.device]) -> list[Launcher]:
    """Return what runs kernels on each device; on a CPU the tests' emulation."""
    if devices[0].type == "cuda":
        return [GpuLauncher(device) for device in devices]
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from emulator import EmulatedLauncher

    folder = Path("/tmp/ggtool-emulated")
    folder.mkdir(exist_ok=True)
    return len(devices) * [EmulatedLauncher(folder)]


def compile_all(model: Model, ranks: Sequence[Rank], gpu: str, compilers: Compilers | None) -> None:
    """Compile every kernel of both sides in as many processes as there are cores."""
    if compilers is None:
        return
    names = Names(ranks[0].launcher.n_processors)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        alone = Steps(model, names, 1, 1, gpu)
        alone.launch(1)
        forward(model, names, ids, alone.cache)
        named = [Rank(rank.part, names) for rank in ranks]
        for one in Together(named, 1, 1, gpu).of_ranks:
            for _ in one.pieces(1):
                pass
            with one.rank.current():
                forward(one.rank.part.model, names, ids.to(one.rank.device), one.cache)
    errors = compilers.start(dict.fromkeys(names.names)).get()
    if found := [error for error in errors if error]:
        raise SystemExit(found[0])


def decode(steps: Steps, run: Run, context: int, first: torch.Tensor) -> None:
    """Make N_TOKENS tokens behind a context."""
    with torch.inference_mode():
        steps.begin(first, context)
        for _ in range(N_TOKENS // AT_ONCE):
            run(AT_ONCE, steps.n_runs(context + N_TOKENS))


def ms_of(work: Callable[[], None], devices: Sequence[torch.device], n: int) -> float:
    """Return ms of one of n things that a work does."""
    synchronize(devices)
    started = time.perf_counter()
    work()
    synchronize(devices)
    return (time.perf_counter() - started) * 1e3 / n


def graph_of(rank: Rank, start: Callable[[], None]) -> Callable[[], None]:
    """Return what replays a rank's graph of what `start` starts."""
    graph = torch.cuda.CUDAGraph()
    with rank.current(), torch.cuda.graph(graph, stream=torch.cuda.Stream(rank.device)):
        start()

    def replay() -> None:
        with rank.current():
            graph.replay()

    return replay


def again(replays: Sequence[Callable[[], None]]) -> None:
    """Replay graphs of AT_ONCE tokens until there are N_TOKENS."""
    for _ in range(N_TOKENS // AT_ONCE):
        for replay in replays:
            replay()


def exchanges_ms(ranks: Sequence[Rank], n_embd: int, n_layers: int, rounds: int) -> float:
    """Return ms that the exchanges of one token take in graphs of their own, AT_ONCE tokens each."""
    devices = [rank.device for rank in ranks]
    sums, choices = mailboxes(devices, n_embd), mailboxes(devices, 2)
    states: list[dict[str, torch.Tensor]] = [
        {
            "own": torch.randn(n_embd, device=device), "y": torch.zeros(n_embd, device=device),
            "values": torch.zeros(1, 1, device=device),
            "indices": torch.zeros(1, 1, dtype=torch.int32, device=device),
            "tokens": torch.zeros(1, dtype=torch.int32, device=device),
            "made": torch.zeros(N_TOKENS + 1, 1, dtype=torch.int32, device=device),
            "position": torch.zeros(1, dtype=torch.int32, device=device),
        }
        for device in devices
    ]  # fmt: skip

    def start(number: int, launcher: Launcher, phase: Any = "both") -> None:
        state = states[number]
        for _ in range(2 * n_layers + 1):
            exchange_sum(launcher, sums[number], state["own"], state["y"], is_added=False, phase=phase)
        best = state["values"], state["indices"]
        choose_together(
            launcher, choices[number], best, 1, 0, state["tokens"], state["made"], state["position"], phase=phase
        )  # fmt: skip

    if devices[0].type != "cuda":
        for phase in ("send", "receive"):
            for number, rank in enumerate(ranks):
                start(number, rank.launcher, phase)
        return 0.0
    for number, rank in enumerate(ranks):
        assert isinstance(rank.launcher, GpuLauncher)
        with rank.current():
            start(number, rank_steps.Loader(rank.launcher))

    def start_all(number: int, launcher: Launcher) -> None:
        for _ in range(AT_ONCE):
            start(number, launcher)

    replays = [graph_of(rank, partial(start_all, number, rank.launcher)) for number, rank in enumerate(ranks)]
    samples = []
    for _ in range(rounds + 1):
        for state in states:
            state["position"].zero_()
        samples.append(ms_of(partial(again, replays), devices, N_TOKENS))
    return statistics.median(samples[1:])


def without_exchanges_ms(together: Together, context: int, rounds: int) -> float:
    """Return ms a token of the first rank's kernels with no exchange between them."""
    rank = together.of_ranks[0].rank
    lonely = Rank(rank.part, WithoutExchanges(rank.launcher))
    ends = (mailboxes(2 * [rank.device], together.x.numel())[0], mailboxes(2 * [rank.device], 2)[0])
    steps = RankSteps(lonely, ends, 1, together.n_ctx, together._gpu)
    steps.position.fill_(context)
    n_runs = steps.n_runs(context + N_TOKENS)

    def start() -> None:
        for _ in range(AT_ONCE):
            for _ in steps.pieces(n_runs):
                pass

    replay = graph_of(lonely, start)
    samples = [ms_of(partial(again, [replay]), [rank.device], N_TOKENS) for _ in range(rounds + 1)]
    return statistics.median(samples[1:])


def beside_ms(work: Callable[[], None], devices: Sequence[torch.device], rounds: int) -> float:
    """Return ms a token of the first GPU alone while the last is busy with products of large matrices."""
    large = torch.randn(8192, 8192, device=devices[-1], dtype=torch.float16)
    samples = []
    for _ in range(rounds + 1):
        for _ in range(200):
            large @ large
        samples.append(ms_of(work, devices[:1], N_TOKENS))
        if torch.cuda.current_stream(devices[-1]).query():
            return float("nan")  # the other GPU was done too early
        synchronize(devices)
    return statistics.median(samples[1:])


def compare(
    sizes: Sizes,
    name: str,
    contexts: Sequence[int],
    rounds: int,
    devices: Sequence[torch.device],
    compilers: Compilers | None,
) -> dict[str, Any]:
    """Return what is found of one format."""
    n_ctx = max(contexts) + N_TOKENS
    launchers = launchers_of(devices)
    gpu = torch.cuda.get_device_name(devices[0]) if devices[0].type == "cuda" else "none"
    model = random_model(sizes, name, n_ctx, str(devices[0]))
    parts = split(model, devices)
    ranks = [Rank(part, launcher) for part, launcher in zip(parts, launchers, strict=True)]
    compile_all(model, ranks, gpu, compilers)
    alone = Steps(model, launchers[0], 1, n_ctx, gpu)
    run_alone = step.runner(alone)
    engine = RankedEngine(ranks, n_ctx, gpu)
    together, run_together = engine._one
    assert isinstance(together, Together)
    torch.manual_seed(1)
    ids = torch.randint(0, sizes.n_vocab, (1, n_ctx), device=devices[0])
    row: dict[str, Any] = {
        "model": sizes.name, "format": name, "weights_bytes": model.weights_bytes,
        "weights_bytes_by_device": [part.model.weights_bytes for part in parts], "contexts": [],
    }  # fmt: skip
    for context in contexts:
        with torch.inference_mode():
            hidden = forward(model, launchers[0], ids[:, :context], alone.cache)
            want = head_logits(model, launchers[0], hidden[:, -1:])[0]
            hidden = engine._forward(ids[:, :context], together)
            got = engine._head_logits(hidden[:, -1:])[0]
        first = want.argmax(-1)
        made = []
        for steps, run in ((alone, run_alone), (together, run_together)):
            decode(steps, run, context, first)
            synchronize(devices)
            made.append((steps.made[context : context + N_TOKENS, 0].tolist(), steps.all_logits()))
        samples: dict[str, list[float]] = {"one": [], "several": []}
        for _ in range(rounds):
            for who, steps, run in (("one", alone, run_alone), ("several", together, run_together)):
                work = partial(decode, steps, run, context, first)
                samples[who].append(ms_of(work, devices, N_TOKENS))
        found = {
            "context": context,
            **{f"{who}_ms": statistics.median(times) for who, times in samples.items()},
            "samples_ms": samples,
            "prompt_logits_error": float((got - want).norm() / want.norm()),
            "tokens_equal": next(
                (at for at, (a, b) in enumerate(zip(made[0][0], made[1][0], strict=True)) if a != b), N_TOKENS
            ),
        }
        if found["tokens_equal"] == N_TOKENS:
            want, got = (logits for _, logits in made)
            found["last_logits_error"] = float((got - want).norm() / want.norm())
        if devices[0].type == "cuda":
            found["without_exchanges_ms"] = without_exchanges_ms(together, context, rounds)
            work = partial(decode, alone, run_alone, context, first)
            found["beside_ms"] = beside_ms(work, devices, rounds)
        row["contexts"].append(found)
        print(
            json.dumps({"format": name, **{k: v for k, v in found.items() if k != "samples_ms"}}), flush=True
        )
    row["exchanges_ms"] = exchanges_ms(ranks, sizes.n_embd, sizes.n_layers, rounds)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-8b", choices=SIZES)
    parser.add_argument("--formats", default="fp16,int8")
    parser.add_argument("--contexts", default="128,1024")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--devices", default="cuda:0,cuda:1")
    parser.add_argument("--seconds", type=float, default=120.0, help="begin no format after so many")
    parser.add_argument("--out", type=Path, help="all of it as JSON")
    args = parser.parse_args()
    started = time.monotonic()
    devices = [torch.device(name) for name in args.devices.split(",")]
    is_gpu = devices[0].type == "cuda"
    sizes = SIZES[args.model] if is_gpu else TINY
    contexts = [int(context) for context in args.contexts.split(",")] if is_gpu else [8]
    compilers = None
    if is_gpu:
        reach_each_other(devices)
        torch.cuda.set_device(devices[0])
        compilers = Compilers(architecture(devices[0]))
    result: dict[str, Any] = {"torch": torch.__version__, "devices": args.devices, "rows": []}
    if is_gpu:
        result["gpu"] = torch.cuda.get_device_name(devices[0])
    for name in args.formats.split(","):
        if time.monotonic() - started > args.seconds:
            break
        row = compare(sizes, name, contexts, args.rounds, devices, compilers)
        result["rows"].append(row)
        whole = row["weights_bytes"]
        shares = ", ".join(f"{n / (whole / len(devices)):.3f}" for n in row["weights_bytes_by_device"])
        print(f"{name}: weights {whole / 1e9:.3f} GB, on each device {shares} of its share", flush=True)
        took = time.monotonic() - started
        print(
            f"{name}: exchanges of a token alone {row['exchanges_ms']:.4f} ms; after {took:.0f} s", flush=True
        )
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")
        if is_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
