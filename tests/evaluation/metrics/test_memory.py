"""Peaks against allocations of a known size, in a child because a peak belongs to a process."""

import json
import subprocess
import sys

import pytest

CODE = """
import json, dataclasses
from ggtool.evaluation.metrics.memory import PeakMeter
from ggtool.backends import Footprint

class Held:
    n_ctx = 64
    def footprint(self): return Footprint(123, 1, 0, 0)
    def kv_cache_bytes(self): return 7

meter = PeakMeter()
passing = bytearray(b"1") * (200 << 20)
held = bytes(passing[:50 << 20])
del passing
meter.loaded()
reading = bytearray(b"1") * (150 << 20)
del reading
meter.prefilled()
again = bytearray(b"1") * (100 << 20)
import mmap, tempfile
file = tempfile.TemporaryFile()
file.write(b"1" * (30 << 20))
file.flush()
mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
sum(mapped[::4096])
print(json.dumps(dataclasses.asdict(meter.finish(Held()))))
"""


def test_peaks_by_stage_are_the_processs_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=60
    )
    usage = json.loads(done.stdout)
    load = usage["load_peak_rss_bytes"] - usage["base_rss_bytes"]
    assert 240 << 20 < load < 300 << 20  # the passing 200 MiB and the held 50 together
    assert usage["peak_rss_bytes"] >= usage["load_peak_rss_bytes"]
    assert usage["weights_bytes"] == 123
    assert usage["kv_cache_bytes"] == 7
    assert usage["peak_vram_bytes"] is None
    base = usage["base_rss_bytes"]
    assert 190 << 20 < usage["prefill_peak_rss_bytes"] - base < 260 << 20  # 50 MiB held and 150 that passed
    assert 170 << 20 < usage["decode_peak_rss_bytes"] - base < 240 << 20
    assert usage["peak_rss_bytes"] == usage["load_peak_rss_bytes"]


def test_what_is_held_is_told_apart_by_kind() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=60
    )
    usage = json.loads(done.stdout)
    parts = [usage[f"rss_{kind}_bytes"] for kind in ("anon", "file", "shmem")]
    assert usage["rss_bytes"] == pytest.approx(sum(parts), rel=0.01)
    assert parts[0] > 150 << 20  # 50 MiB and 100 MiB of arrays
    assert parts[1] + parts[2] > 30 << 20  # the mapped file; on a tmpfs it counts as shared memory
    assert usage["uss_bytes"] <= usage["pss_bytes"] <= usage["rss_bytes"] * 1.01
    assert usage["uss_bytes"] > 150 << 20
