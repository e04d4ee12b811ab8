"""The device of a record, and the memory that counts on it: the GPU's if it ran on one, else resident memory."""

from __future__ import annotations

from ggtool.results.records import EvalRecord


def device_name(record: EvalRecord) -> str:
    """Return the GPU, or the processor and the number of threads, that a record was timed on."""
    facts = record.environment
    if facts.get("device") == "cuda":
        return facts.get("cuda_device", "a GPU")
    return f"{facts.get('cpu') or facts.get('device', 'unknown device')}, {facts.get('threads', '?')} threads"


def is_on_gpu(record: EvalRecord) -> bool:
    """Whether the measured process held memory of a GPU."""
    return gpu_peak(record) is not None


def gpu_peak(record: EvalRecord) -> int | None:
    """Return the process's peak GPU memory in bytes, CUDA's own included where the driver reports it."""
    memory = record.memory
    if memory is None:
        return None
    return memory.vram_process_bytes or memory.peak_vram_bytes


def peak(record: EvalRecord) -> int | None:
    """Return the process's peak memory in bytes: of the GPU if it ran on one, else resident, libraries included."""
    on_gpu = gpu_peak(record)
    if on_gpu is not None or record.memory is None:
        return on_gpu
    return record.memory.peak_rss_bytes
