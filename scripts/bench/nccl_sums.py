"""NCCL's all-reduce, the peer of the engine's own exchange: small sums in a CUDA graph, one process for each GPU."""

from __future__ import annotations

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


def nccl_us(n_ranks: int, n_numbers: int, n_sums: int, *, is_gpu: bool = True) -> dict[str, float]:
    """Return microseconds of one all-reduce, by type, of `n_sums` in a graph; without GPUs gloo's, with no graph."""
    with tempfile.TemporaryDirectory(prefix="ggtool-nccl-") as folder:
        mp.spawn(_measure, (n_ranks, n_numbers, n_sums, folder, is_gpu), nprocs=n_ranks)
        found = {}
        for file in Path(folder).glob("*.us"):
            found[file.stem] = float(file.read_text())
        return found


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
        numbers = torch.full((n_numbers,), float(rank + 1), dtype=dtype, device=device)
        dist.all_reduce(numbers)
        assert float(numbers[0]) == sum(range(1, n_ranks + 1))
        numbers.zero_()

        def sums(numbers: torch.Tensor = numbers) -> None:
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
        if rank == 0:
            Path(folder, f"{str(dtype).removeprefix('torch.')}.us").write_text(
                str(statistics.median(samples))
            )
    dist.destroy_process_group()


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
