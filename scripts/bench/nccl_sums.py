"""NCCL's all-reduce, the peer of the engine's own exchange: small sums in a CUDA graph, one process for each GPU.

    python scripts/bench/nccl_sums.py [--ranks 2] [--numbers 4096] [--sums 65] [--cpu] [--seconds 40] [--out FILE]

Microseconds of one all-reduce of float16 and of float32 numbers, medians over replays of a graph with so many. --cpu is a trial by
gloo, without graphs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

REPLAYS = 30


def nccl_us(n_ranks: int, n_numbers: int, n_sums: int, seconds: float, *, is_gpu: bool) -> dict[str, float]:
    """Return microseconds of one all-reduce, by type; what was measured when the time is over."""
    with tempfile.TemporaryDirectory(prefix="ggtool-nccl-") as folder:
        children = mp.spawn(
            _measure, (n_ranks, n_numbers, n_sums, folder, is_gpu), nprocs=n_ranks, join=False
        )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not children.join(timeout=1.0):
            pass
        for process in children.processes:
            process.kill()
        return {file.stem: float(file.read_text()) for file in Path(folder).glob("*.us")}


def _measure(rank: int, n_ranks: int, n_numbers: int, n_sums: int, folder: str, is_gpu: bool) -> None:
    # Multicast over NVLink can put the GPUs of a shared host out of service.
    os.environ.update({"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"})
    device = torch.device("cuda", rank) if is_gpu else torch.device("cpu")
    if is_gpu:
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", n_ranks)
    dist.init_process_group(
        "nccl" if is_gpu else "gloo", store=store, rank=rank, world_size=n_ranks,
        **({"device_id": device} if is_gpu else {}),
    )  # fmt: skip
    for dtype in (torch.float16, torch.float32):
        us = _median_us(torch.full((n_numbers,), rank + 1.0, dtype=dtype, device=device), n_ranks, n_sums)
        if rank == 0:
            Path(folder, f"{str(dtype).removeprefix('torch.')}.us").write_text(str(us))
    gc.collect()  # a communicator is not given back while a graph has it
    dist.destroy_process_group()


def _median_us(numbers: torch.Tensor, n_ranks: int, n_sums: int) -> float:
    is_gpu = numbers.device.type == "cuda"
    dist.all_reduce(numbers)
    assert float(numbers[0]) == sum(range(1, n_ranks + 1))
    numbers.zero_()

    def sums() -> None:
        for _ in range(n_sums):
            dist.all_reduce(numbers)

    run = _graph(sums) if is_gpu else sums
    samples = []
    for _ in range(REPLAYS):
        dist.barrier()
        if is_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if is_gpu:
            torch.cuda.synchronize()
        samples.append((time.perf_counter() - started) * 1e6 / n_sums)
    return statistics.median(samples)


def _graph(start: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        start()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's own thread asks for its events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        start()
    return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--numbers", type=int, default=4096)
    parser.add_argument("--sums", type=int, default=65)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--out", type=Path, help="as JSON")
    args = parser.parse_args()
    found = nccl_us(args.ranks, args.numbers, args.sums, args.seconds, is_gpu=not args.cpu)
    print(f"us for one all-reduce of {args.numbers} numbers, {args.sums} together: {found or 'none in time'}")
    if args.out:
        args.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
