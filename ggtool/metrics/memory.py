"""Memory of one process around one model, from the kernel's own counters.

peak_rss is VmHWM of /proc/self/status, reset between stages where the kernel lets us, so load and run have
peaks of their own. File-backed pages of a mapped model are included: they are held while they are used.
VRAM is what torch's allocator reserved at its highest; None in a process that has no CUDA model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ggtool.backends import Backend, SamplingParams
from ggtool.results import MemoryUsage

N_PREDICT = 16
Progress = Callable[[int, int], None]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # Documentation/filesystems/proc.rst: resets the peak resident set size


@dataclass
class PeakMeter:
    """Peaks by stage: create it before the model is loaded, call `loaded()`, then `finish()` after use."""

    base_rss_bytes: int = 0
    load_peak_rss_bytes: int = 0

    def __post_init__(self) -> None:
        self.base_rss_bytes = _status_bytes("VmRSS")
        _reset_peak()

    def loaded(self) -> None:
        """End the load stage."""
        self.load_peak_rss_bytes = _status_bytes("VmHWM")
        _reset_peak()

    def finish(self, backend: Backend) -> MemoryUsage:
        """End the run stage and add what the backend counts."""
        return MemoryUsage(
            weights_bytes=backend.footprint().weights_bytes,
            kv_cache_bytes=backend.kv_cache_bytes(),
            base_rss_bytes=self.base_rss_bytes,
            load_peak_rss_bytes=self.load_peak_rss_bytes,
            peak_rss_bytes=max(self.load_peak_rss_bytes, _status_bytes("VmHWM")),
            peak_vram_bytes=_peak_vram_bytes(),
        )


def exercise(backend: Backend, tokens: list[int], progress: Progress = lambda done, total: None) -> None:
    """Fill memory as use does: a prompt that leaves N_PREDICT tokens of the context, then those one by one."""
    n_predict = min(N_PREDICT, backend.n_ctx // 2)
    prompt = tokens[: backend.n_ctx - n_predict]
    params = SamplingParams(n_predict=n_predict, temperature=0.0, ignore_eos=True)
    for done, _ in enumerate(backend.generate(prompt, params), 1):
        progress(done, n_predict)


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {key}")


def _reset_peak() -> None:
    # Refused in some sandboxes; then a later peak includes the earlier one, which is still a true bound.
    with suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")


def _peak_vram_bytes() -> int | None:
    torch = sys.modules.get("torch")  # never imported for this: a llama.cpp process has no torch
    if torch is None or not torch.cuda.is_available():
        return None
    return int(torch.cuda.max_memory_reserved())
