"""A Ray cluster of several nodes on this machine, each with a cache of its own: no file system is shared but by the driver.

with ray_nodes(folder, 3) as nodes:
    subprocess.run([..., "--ray", nodes.address])
    nodes.kill(2)
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ggtool.system.cache import cache_folder

# Of each file whose tests are on a cluster.
ON_RAY = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
    ),
    pytest.mark.skipif(shutil.which("ray") is None, reason="ray is not installed"),
]
# Settings of measurements that take as little time as they can.
SMALL = {
    "n_ctx": 64,
    "chunks": 2,
    "device": "cpu",
    "threads": 1,
    "repetitions": 1,
    "speed_prompts": (),
    "speed_depths": (),
    "speed_batches": (),
}
# The cluster is started by a process of its own: Ray keeps one connection a process, which the tests' drivers need.
_PROGRAM = """
import json, os, sys
from ray.cluster_utils import Cluster

folder, caches, n_cpus, n_gpus = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
cluster, nodes = Cluster(), []
for number, cache in enumerate(caches):
    os.environ["GGTOOL_CACHE"] = cache
    more = {"temp_dir": folder, "include_dashboard": False, "no_monitor": True} if number == 0 else {}
    sizes = {"num_cpus": n_cpus, "num_gpus": n_gpus}
    nodes.append(cluster.add_node(wait=False, include_log_monitor=False, **sizes, **more))
cluster.wait_for_nodes(120)
print(json.dumps({"address": cluster.address}), flush=True)
for line in sys.stdin:
    cluster.remove_node(nodes[int(line)], allow_graceful=False)
    print("{}", flush=True)
cluster.shutdown()
"""


class RayNodes:
    """The address of a running cluster, the nodes' caches, and a way to lose a node."""

    def __init__(self, process: subprocess.Popen[str], caches: list[Path], log: Path) -> None:
        self._process = process
        self._log = log
        self.caches = caches
        self.pid = process.pid
        self.address = str(self._answer()["address"])

    def kill(self, number: int) -> None:
        """Kill all processes of a node with SIGKILL; node 0 is the one that the drivers are on."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> dict[str, object]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self._log.read_text()[-3000:]
        return json.loads(line)


@contextmanager
def short_folder() -> Iterator[Path]:
    """Yield a folder with a name short enough for Ray's sockets, gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="gg-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def ray_nodes(folder: Path, n_nodes: int, n_cpus: float = 1, n_gpus: float = 0) -> Iterator[RayNodes]:
    """Start a cluster whose files are under `folder`, which has a short name, and end it after the block.

    n_gpus: of each node, which need not be there: Ray hands them out by number.
    """
    caches = [folder / f"cache{number}" for number in range(n_nodes)]
    for cache in caches:
        # Compiling and testing again would take longer than most tests, and is not what they are about.
        for kind in ("kernels", "selftest"):
            if (there := cache_folder() / kind).is_dir():
                shutil.copytree(there, cache / kind)
    listed = json.dumps([str(cache) for cache in caches])
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_worker_niceness": "0",
    }
    with (folder / "cluster.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(folder / "ray"), listed, str(n_cpus), str(n_gpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **quiet},
        )
        try:
            yield RayNodes(process, caches, folder / "cluster.log")
        finally:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.wait(60)
            process.stdout.close()
