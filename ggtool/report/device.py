"""What a record was measured on, and the memory that counts there: the GPU's for what ran on one, else the machine's."""

from __future__ import annotations

from ggtool.results.records import EvalRecord


def device_name(record: EvalRecord) -> str:
    """Return the GPU, or the processor and the threads, that a record's speed is of."""
    facts = record.environment
    if facts.get("device") == "cuda":
        return facts.get("cuda_device", "a GPU")
    return f"{facts.get('cpu') or facts.get('device', 'unknown device')}, {facts.get('threads', '?')} threads"


def is_on_gpu(record: EvalRecord) -> bool:
    """Whether the measured process held memory of a GPU."""
    return gpu_peak(record) is not None


def gpu_peak(record: EvalRecord) -> int | None:
    """Return the bytes of a GPU that the process held at most, CUDA itself included where the driver says it."""
    memory = record.memory
    if memory is None:
        return None
    return memory.vram_process_bytes or memory.peak_vram_bytes


def peak(record: EvalRecord) -> int | None:
    """Return the bytes that the process held at most: of the GPU if it ran on one, else resident, libraries included."""
    on_gpu = gpu_peak(record)
    if on_gpu is not None or record.memory is None:
        return on_gpu
    return record.memory.peak_rss_bytes
