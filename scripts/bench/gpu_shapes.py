"""Find the fastest shape of every product of some models on this GPU, for ggtool/backends/engine/shapes.json.

    python scripts/bench/gpu_shapes.py [--models gpt2-124m,gpt2-xl,llama-1b,llama-8b] [--formats fp16,int8,iq4]
        [--texts one,many] [--ranks 1,2] [--seconds 300] [--out shapes.json]

A shape's time is the median of chains of launches in one CUDA graph, each launch on other weights, 192 MB of them at
least, so that they come from memory as in a model. Kernels are compiled in as many processes as there are cores. What
OUT holds is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path

import torch
from compilers import Compilers, Names
from random_models import FORMATS, SIZES, layout_of, random_matrix

from ggtool.backends.engine.shapes import candidates, key_of
from ggtool.kernels import decode
from ggtool.kernels.decode import MAX_TEXTS, Launcher, Norm, Shape
from ggtool.kernels.device_matrix import DeviceMatrix
from ggtool.kernels.nvrtc import GpuLauncher, KernelName, architecture

COLD_BYTES = 192 << 20
MOST_COPIES = 48
ROUNDS = 5


class Task:
    """One product: its weights several times over, and what it reads and writes."""

    def __init__(
        self,
        layout: str,
        n_rows: int,
        n_columns: int,
        epilogue: str,
        *,
        is_batched: bool,
        is_gated_model: bool,
    ) -> None:
        self.epilogue, self.is_batched = epilogue, is_batched
        first = random_matrix(layout, n_rows, n_columns)
        n_bytes = sum(tensor.nbytes for tensor in first.tensors)
        self.copies = [first]
        for _ in range(min(MOST_COPIES, max(3, COLD_BYTES // n_bytes)) - 1):
            scales = None if first.scales is None else first.scales.clone()
            copy = DeviceMatrix(
                layout, first.shape, first.codes.clone(), scales, first.row_scales, first.values
            )
            self.copies.append(copy)
        self.n_bytes = n_bytes
        self.key = key_of(first, epilogue, is_batched=is_batched)
        n_texts = MAX_TEXTS if is_batched else 1
        is_gated = epilogue == "swiglu"
        self.x = torch.randn(1, n_columns, device="cuda")
        self.rows = torch.randn(MAX_TEXTS * first.n_slots, device="cuda").half() if is_batched else None
        self.y = torch.zeros(n_texts, n_rows // (2 if is_gated else 1), device="cuda")
        n_most = -(-n_rows // 8)
        self.best = (
            torch.zeros(n_texts, n_most, device="cuda"),
            torch.zeros(n_texts, n_most, dtype=torch.int32, device="cuda"),
        )
        self.norm = Norm()
        if not is_batched and epilogue != "add":
            ones = torch.ones(n_columns, device="cuda")
            zeros = None if is_gated_model else torch.zeros_like(ones)
            self.norm = Norm("rms" if is_gated_model else "layer", ones, zeros, 1e-5)

    def shapes(self) -> Iterator[Shape]:
        """Yield what is to be tried."""
        return candidates(
            self.copies[0], is_gated=self.epilogue == "swiglu", is_batched=self.rows is not None
        )

    def names(self, n_processors: int) -> list[KernelName]:
        """Return the kernel of each shape."""
        names = Names(n_processors)
        for shape in self.shapes():
            self.chain(names, shape, 1)
        return names.names

    def chain(self, launcher: Launcher, shape: Shape, n: int) -> None:
        """Start the product n times."""
        for index in range(n):
            decode.product(
                launcher, self.copies[index % len(self.copies)], self.y, shape, torch.float16, epilogue=self.epilogue,
                x=None if self.is_batched else self.x, norm=self.norm, rows=self.rows,
                best=self.best if self.epilogue == "logits" else None,
            )  # fmt: skip

    def seconds(self, launcher: GpuLauncher, shape: Shape) -> float:
        """Return the time of one launch in a chain of them."""
        n = max(8, min(len(self.copies), 24))
        self.chain(launcher, shape, 1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.chain(launcher, shape, n)
        graph.replay()
        samples = []
        for _ in range(ROUNDS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples.append(begin.elapsed_time(end) / 1e3 / n)
        return statistics.median(samples)


def tasks(
    models: list[str], formats: list[str], texts: list[str], ranks: list[int]
) -> list[tuple[str, int, int, str, bool, bool]]:
    """Return (layout, rows, columns, epilogue, is_batched, is_gated_model) of every product, each kind once."""
    found: dict[tuple[object, ...], tuple[str, int, int, str, bool, bool]] = {}
    for text in texts:
        for name in formats:
            for model, n_ranks in itertools.product(models, ranks):
                sizes = replace(SIZES[model], n_ranks=n_ranks)
                for product, rows, columns, epilogue in sizes.products():
                    for layer in range(sizes.n_layers):
                        layout = layout_of(sizes, name, product, layer)
                        key = (layout, rows, columns, epilogue == "swiglu", text)
                        found.setdefault(
                            key, (layout, rows, columns, epilogue, text == "many", sizes.is_gated)
                        )
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(SIZES))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--texts", default="one,many")
    parser.add_argument("--ranks", default="1", help="GPUs that hold a model together")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop with what was found by then")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    started = time.monotonic()
    launcher = GpuLauncher(torch.device("cuda", 0))
    gpu, arch = torch.cuda.get_device_name(), architecture(launcher.device)
    found: dict[str, dict[str, list[int]]] = json.loads(args.out.read_text()) if args.out.exists() else {}
    known = found.setdefault(gpu, {})
    log = args.out.with_suffix(".tsv").open("a")
    wanted = tasks(
        args.models.split(","),
        args.formats.split(","),
        args.texts.split(","),
        [int(n) for n in args.ranks.split(",")],
    )
    with Compilers(arch) as compilers:
        made = [
            Task(layout, rows, columns, epilogue, is_batched=is_batched, is_gated_model=is_gated_model)
            for layout, rows, columns, epilogue, is_batched, is_gated_model in wanted
        ]
        made = [task for task in made if task.key not in known]
        compiled = [compilers.start(task.names(launcher.n_processors)) for task in made]
        for task, results in zip(made, compiled, strict=True):
            if time.monotonic() - started > args.seconds:
                break
            times: dict[Shape, float] = {}
            for shape, error in zip(task.shapes(), results.get(), strict=True):
                if error:
                    print(f"{task.key} {astuple(shape)}: {error}", file=sys.stderr)
                else:
                    times[shape] = task.seconds(launcher, shape)
            best = min(times, key=lambda shape: times[shape])
            known[task.key] = list(astuple(best))
            rate = task.n_bytes / times[best] / 1e9
            for shape, seconds in sorted(times.items(), key=lambda item: item[1])[:8]:
                print(task.key, *astuple(shape), f"{seconds * 1e6:.2f}", sep="\t", file=log, flush=True)
            print(f"{task.key}: {astuple(best)} {times[best] * 1e6:.2f} us, {rate:.0f} GB/s", file=sys.stderr)
            args.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
            launcher = GpuLauncher(launcher.device)


if __name__ == "__main__":
    main()
