"""Peaks against allocations of a known size, in a child because a peak belongs to a process."""

import json
import subprocess
import sys

CODE = """
import json, dataclasses
from ggtool.metrics.memory import PeakMeter
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
again = bytearray(b"1") * (100 << 20)
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
