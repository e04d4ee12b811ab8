"""Text on a GPU: ggtool's engine against transformers, torch.compile, bitsandbytes and llama.cpp, on models of real sizes.

    python scripts/bench/gpu_decode.py [--models gpt2-124m,...] [--formats fp16,int8,...] [--peers eager,compile,...]
        [--texts 1,4,16] [--contexts 128,1024] [--prompts 1x512,8x1024] [--files FOLDER --llama-bench PROGRAM]
        [--rounds 5] [--seconds 300] [--out FILE]

Random weights. For each model and number of texts, everyone is loaded and warmed up, and then takes turns: a round is 32
tokens after a context, greedy, for each. With --prompts, whole prompts are read in turn as well. Medians of ms a token (of a
prompt: ms in all); the share of the copy bandwidth that the weights' bytes over that time are; bytes of weights, of the KV
cache and of CUDA's allocator. Peers are transformers' modules: eager in float16, eager with bitsandbytes' linear layers in
their place, and a static cache with torch.compile (reduce-overhead). With --files the GGUF formats are read from files, written
there, and with --llama-bench llama.cpp reads the same files afterwards. What was found by `--seconds` is kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_contestants import N_SPARE, N_TOKENS, PEERS, Contestant, engine, llama_bench, peer, prompts
from random_gguf import random_gguf
from random_models import FORMATS, SIZES, Sizes

from ggtool.errors import MeasureError

Maker = Callable[[], Contestant]
HEADER = ("model", "who", "texts", "context", "ms", "of copy", "MB", "held MB")


def copy_bandwidth() -> float:
    """Return bytes a second of a large copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    samples = []
    for _ in range(8):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(samples)


def timed(contestant: Contestant, context: int) -> float:
    """Return ms a token, or of a prompt."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    contestant.make(context)
    torch.cuda.synchronize()
    ended = time.perf_counter()
    started = getattr(contestant.make, "started", started)
    return (ended - started) / contestant.n_steps * 1e3


def attempted(maker: Maker, contexts: Sequence[int]) -> Contestant | None:
    """Return a contestant that has been warmed up, None and a line on stderr for one that cannot run."""
    try:
        made = maker()
        for context in contexts:
            timed(made, context)
            alone = timed(made, context)
            print(f"  {made.name} after {context}: {alone:.4f} ms", file=sys.stderr, flush=True)
        if not made.is_finite():
            raise MeasureError("a logit is not finite")
    except Exception as error:  # noqa: BLE001 - whatever ails a peer, the others go on
        said = str(error).splitlines() or [""]
        print(f"  {type(error).__name__}: {said[0]}", file=sys.stderr, flush=True)
        return None
    return made


def compare(
    makers: Sequence[Maker], contexts: Sequence[int], rounds: int, deadline: float
) -> list[dict[str, Any]]:
    """Return a row for each contestant and context; after the deadline no one else is loaded."""
    contestants, rows = [], []
    for maker in makers:
        made = attempted(maker, contexts) if time.monotonic() < deadline else None
        if made is not None:
            contestants.append(made)
    for context in contexts:
        samples: dict[str, list[float]] = {one.name: [] for one in contestants}
        for _ in range(rounds):
            for one in contestants:
                samples[one.name].append(timed(one, context))
        rows += [
            {
                "who": one.name,
                "context": context,
                "ms": statistics.median(samples[one.name]),
                "samples_ms": samples[one.name],
                "weights_bytes": one.weights_bytes,
                "cache_bytes": one.cache_bytes,
                "allocated_bytes": one.allocated_bytes,
            }
            for one in contestants
        ]
    return rows


def llama_rows(
    program: Path, path: Path, contexts: Sequence[int], shapes: Sequence[tuple[int, int]], rounds: int
) -> list[dict[str, Any]]:
    """Return what llama-bench makes of a file: tokens after contexts, and prompts of one text."""
    # (context, prompt, its flags): one of the two is 0.
    asked = [(context, 0, ["-p", "0", "-n", str(N_TOKENS), "-d", str(context)]) for context in contexts]
    asked += [(0, length, ["-p", str(length), "-n", "0"]) for n_texts, length in shapes if n_texts == 1]
    rows = []
    for context, prompt, extra in asked:
        try:
            rates = llama_bench(program, path, extra, rounds)
        except (subprocess.SubprocessError, ValueError) as error:
            print(f"  llama-bench {path.name} {extra}: {error}", file=sys.stderr, flush=True)
            continue
        samples = [(prompt or 1) * 1e3 / rate for rate in rates]
        rows.append(
            {
                "who": f"llama.cpp {path.stem}",
                "texts": 1,
                "context": context,
                "prompt": prompt,
                "ms": statistics.median(samples),
                "samples_ms": samples,
                "weights_bytes": path.stat().st_size,
            }
        )
    return rows


class Report:
    """The rows so far: printed as they come, and kept in a file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        bandwidth = copy_bandwidth()
        self._result: dict[str, Any] = {
            "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bytes_s": bandwidth, "rows": [],
        }  # fmt: skip
        print(
            f"{self._result['gpu']}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s", flush=True
        )
        print("{:10} {:24} {:>5} {:>8} {:>9} {:>8} {:>8} {:>8}".format(*HEADER))

    def add(self, rows: Sequence[dict[str, Any]], **facts: Any) -> None:
        """Print and keep rows with facts that they share; a prompt's length stands where else the context does."""
        for row in rows:
            row.update({name: value for name, value in facts.items() if name not in row})
            share = row["weights_bytes"] / (row["ms"] / 1e3) / self._result["copy_bytes_s"]
            place = f"p{row['prompt']}" if row.get("prompt") else str(row["context"])
            print(
                f"{row['model']:10} {row['who']:24} {row['texts']:5} {place:>8} {row['ms']:9.4f} {share:8.1%} "
                f"{row['weights_bytes'] / 1e6:8.1f} {row.get('allocated_bytes', 0) / 1e6:8.1f}",
                flush=True,
            )
        self._result["rows"] += rows
        if self._path:
            self._path.write_text(json.dumps(self._result, indent=1) + "\n")


def parted(text: str) -> list[str]:
    """Return the parts of a list with commas, none for an empty text."""
    return [part for part in text.split(",") if part]


def freed() -> None:
    """Give back what the contestants before held."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(SIZES))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--texts", default="1,4,16")
    parser.add_argument("--contexts", default="128,1024")
    parser.add_argument(
        "--prompts", default="", help="texts and tokens of prompts to read, such as 1x512,8x1024"
    )
    parser.add_argument("--files", type=Path, help="a folder for GGUF files, which both engines then read")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's program, built for CUDA")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--out", type=Path, help="all of it as JSON")
    args = parser.parse_args()
    if args.llama_bench and not args.files:
        parser.error("--llama-bench reads files: pass --files too")
    deadline = time.monotonic() + args.seconds
    formats, peers = parted(args.formats), parted(args.peers)
    shapes = [(int(n), int(length)) for n, length in (part.split("x") for part in parted(args.prompts))]
    report = Report(args.out)
    for sizes in (SIZES[name] for name in parted(args.models)):
        # A GPT-2 has no more positions than these.
        limit = 1 << 20 if sizes.is_gated else 1024 - N_SPARE
        contexts = sorted({min(int(context), limit) for context in parted(args.contexts)})
        for n_texts in map(int, parted(args.texts)):
            if time.monotonic() > deadline:
                break
            asked = sizes, n_texts, max(contexts) + N_SPARE
            print(f"{sizes.name}, {n_texts} texts", file=sys.stderr, flush=True)
            makers = decoding(*asked, formats, peers, args.files)
            report.add(
                compare(makers, contexts, args.rounds, deadline), model=sizes.name, texts=n_texts, prompt=0
            )
            del makers
            freed()
        for n_texts, length in shapes:
            print(f"{sizes.name}, prompts of {n_texts} x {length}", file=sys.stderr, flush=True)
            rows = compare(
                reading(sizes, n_texts, length, formats, peers, args.files), [0], args.rounds, deadline
            )
            report.add(rows, model=sizes.name, texts=n_texts, prompt=length)
            freed()
        for name in formats:
            if args.llama_bench and time.monotonic() < deadline and name.startswith("gguf"):
                path = random_gguf(sizes, name, args.files)
                report.add(
                    llama_rows(args.llama_bench, path, contexts, shapes, args.rounds), model=sizes.name
                )


def decoding(
    sizes: Sizes, n_texts: int, n_ctx: int, formats: Sequence[str], peers: Sequence[str], files: Path | None
) -> list[Maker]:
    """Return what loads each contestant that continues texts."""
    ours: list[Maker] = [lambda name=name: engine(sizes, name, n_texts, n_ctx, files) for name in formats]  # type: ignore[misc]
    return ours + [lambda name=name: peer(sizes, name, n_texts, n_ctx) for name in peers]


def reading(
    sizes: Sizes, n_texts: int, length: int, formats: Sequence[str], peers: Sequence[str], files: Path | None
) -> list[Maker]:
    """Return what loads each contestant that reads prompts; compiling is for what has one shape."""
    names = [*formats, *(name for name in peers if name != "compile")]
    return [lambda name=name: prompts(sizes, name, n_texts, length, files) for name in names]  # type: ignore[misc]


if __name__ == "__main__":
    main()
