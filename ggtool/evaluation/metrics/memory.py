"""Memory of a process that runs one model, from the kernel's counters.

Peaks are VmHWM of /proc/self/status, reset between stages where the kernel lets us, so loading, prefill and
decode have peaks of their own. What is held at the end comes from /proc/self/smaps_rollup, file-backed pages of a
mapped model told apart. VRAM is torch's allocator's and the driver's; None in a process that has no CUDA model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from ggtool.backends import Backend, SamplingParams
from ggtool.evaluation.metrics import nvidia
from ggtool.results.records import MemoryUsage
from ggtool.system.progress import Progress

N_PREDICT = 16
_STATUS = Path("/proc/self/status")
_ROLLUP = Path("/proc/self/smaps_rollup")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # Documentation/filesystems/proc.rst: resets the peak resident set size


class _Held(TypedDict):
    pss_bytes: int | None
    uss_bytes: int | None
    rss_bytes: int | None
    rss_anon_bytes: int | None
    rss_file_bytes: int | None
    rss_shmem_bytes: int | None


class _Vram(TypedDict):
    peak_vram_bytes: int | None
    peak_vram_allocated_bytes: int | None
    vram_process_bytes: int | None
    vram_bytes_by_device: tuple[int, ...]


@dataclass
class PeakMeter:
    """Peaks by stage: create it before the model is loaded, call `loaded()`, `prefilled()`, then `finish()`."""

    base_rss_bytes: int = 0
    load_peak_rss_bytes: int = 0
    prefill_peak_rss_bytes: int = 0

    def __post_init__(self) -> None:
        self.base_rss_bytes = _status_bytes("VmRSS")
        _reset_peak()

    def loaded(self) -> None:
        """End the load stage."""
        self.load_peak_rss_bytes = _status_bytes("VmHWM")
        _reset_peak()

    def prefilled(self) -> None:
        """End the stage that reads the prompt."""
        self.prefill_peak_rss_bytes = _status_bytes("VmHWM")
        _reset_peak()

    def finish(self, backend: Backend) -> MemoryUsage:
        """End the stage that makes tokens and add what the backend counts."""
        held = _held()  # before the peak, and both before counting, which takes memory of its own
        decode_peak = _status_bytes("VmHWM")
        return MemoryUsage(
            weights_bytes=backend.footprint().weights_bytes,
            kv_cache_bytes=backend.kv_cache_bytes(),
            base_rss_bytes=self.base_rss_bytes,
            load_peak_rss_bytes=self.load_peak_rss_bytes,
            peak_rss_bytes=max(self.load_peak_rss_bytes, self.prefill_peak_rss_bytes, decode_peak),
            prefill_peak_rss_bytes=self.prefill_peak_rss_bytes,
            decode_peak_rss_bytes=decode_peak,
            **held,
            **_vram(),
        )


def exercise(
    backend: Backend,
    tokens: list[int],
    progress: Progress = lambda done, total: None,
    prefilled: Callable[[], None] = lambda: None,
) -> None:
    """Fill memory as use does: a prompt that leaves N_PREDICT tokens of the context, then those one by one.

    prefilled is called once, when the prompt has been read and the first token is there.
    """
    n_predict = min(N_PREDICT, backend.n_ctx // 2)
    prompt = tokens[: backend.n_ctx - n_predict]
    params = SamplingParams(n_predict=n_predict, temperature=0.0, ignore_eos=True)
    for done, _ in enumerate(backend.generate(prompt, params), 1):
        if done == 1:
            prefilled()
        progress(done, n_predict)


def _held() -> _Held:
    """Return what the process holds now; None where the kernel does not report it."""
    rollup, status = _sizes(_ROLLUP), _sizes(_STATUS)
    private = [rollup.get(f"Private_{kind}") for kind in ("Clean", "Dirty")]
    known = [size for size in private if size is not None]
    return _Held(
        pss_bytes=rollup.get("Pss"),
        uss_bytes=sum(known) if len(known) == len(private) else None,
        rss_bytes=status.get("VmRSS"),
        rss_anon_bytes=status.get("RssAnon"),
        rss_file_bytes=status.get("RssFile"),
        rss_shmem_bytes=status.get("RssShmem"),
    )


def _status_bytes(key: str) -> int:
    sizes = _sizes(_STATUS)
    if key not in sizes:
        raise OSError(f"{_STATUS} has no {key}")
    return sizes[key]


def _sizes(path: Path) -> dict[str, int]:
    """Return the lines `Name: N kB` of a file under /proc in bytes; empty where there is no such file."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    fields = [(name, value.split()) for name, _, value in (line.partition(":") for line in lines)]
    return {name: int(value[0]) * 1024 for name, value in fields if value[1:] == ["kB"]}


def _reset_peak() -> None:
    # Refused in some sandboxes; a later peak then includes the earlier one and is still an upper bound.
    with suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")


def _vram() -> _Vram:
    torch = sys.modules.get("torch")  # never imported for this: a llama.cpp process has no torch
    if torch is None or not torch.cuda.is_available():
        return _Vram(
            peak_vram_bytes=None,
            peak_vram_allocated_bytes=None,
            vram_process_bytes=nvidia.process_bytes(),
            vram_bytes_by_device=(),
        )
    devices = range(torch.cuda.device_count())
    reserved = [int(torch.cuda.max_memory_reserved(device)) for device in devices]
    used = tuple(n_bytes for n_bytes in reserved if n_bytes)
    return _Vram(
        peak_vram_bytes=sum(used),
        peak_vram_allocated_bytes=sum(int(torch.cuda.max_memory_allocated(device)) for device in devices),
        vram_process_bytes=nvidia.process_bytes(),
        vram_bytes_by_device=used if len(used) > 1 else (),
    )
