"""A load on every CPU, for tests of what a timing says of it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def load_on_every_cpu() -> Iterator[None]:
    """Two processes that compute for each CPU, so that whoever is timed beside them has a third of it at most."""
    command = [sys.executable, "-c", "while True: pass"]
    spinning = [subprocess.Popen(command) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()
