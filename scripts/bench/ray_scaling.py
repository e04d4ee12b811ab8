"""How a sweep's time falls with the number of nodes, and what the driver costs a row, by simulation.

Rows that sleep for a known time on 1, 2, 4 and 8 logical nodes of one CPU each, raylets of this machine: what is measured is
scheduling, and not the machine, which has fewer cores than nodes. Efficiency is rows x sleep / (nodes x time); the last figure is the
time of rows that do nothing, divided by their number. Workers are warm: the probe of a node starts one.

    python scripts/bench/ray_scaling.py [ROWS] [SECONDS]
"""

import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NODES = (1, 2, 4, 8)
N_EMPTY = 200


def sleep_row(seconds: float, site: object) -> float:
    site.progress("sleeping", 0, 1)  # type: ignore[attr-defined]
    time.sleep(seconds)
    return seconds


def timed(scheduler: object, n_rows: int, seconds: float) -> float:
    from ggtool.system.schedule.work import Silent, Work

    works = [Work(str(n), f"row {n}", "ray_scaling:sleep_row", seconds) for n in range(n_rows)]
    started = time.perf_counter()
    ends = list(scheduler.run(works, Silent()))  # type: ignore[attr-defined]
    assert sorted(int(end.work.key) for end in ends) == list(range(n_rows))
    assert all(end.result == seconds for end in ends)
    return time.perf_counter() - started


def main() -> None:
    n_rows = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    # Before Ray is imported, and for its nodes.
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"})
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(HERE))
    from ray.cluster_utils import Cluster

    from ggtool.system.schedule.ray_scheduler import ray_scheduler

    print(f"{n_rows} rows of {seconds:g} s")
    print("nodes      time s  efficiency   driver ms a row")
    for n_nodes in NODES:
        with tempfile.TemporaryDirectory(prefix="gg-") as folder:
            cluster = Cluster()
            for number in range(n_nodes):
                more = {"temp_dir": folder, "include_dashboard": False, "no_monitor": True}
                cluster.add_node(num_cpus=1, include_log_monitor=False, **(more if number == 0 else {}))
            probe = "ggtool.evaluation.node_facts:probe"
            with ray_scheduler(cluster.address, probe, frozenset(), print) as scheduler:
                assert len(scheduler.nodes) == n_nodes
                timed(scheduler, n_nodes, 0.0)
                took = timed(scheduler, n_rows, seconds)
                empty_s = timed(scheduler, N_EMPTY, 0.0)
            cluster.shutdown()
        efficiency = n_rows * seconds / (n_nodes * took)
        print(f"{n_nodes:5} {took:11.2f} {efficiency:11.3f} {1000 * empty_s / N_EMPTY:17.2f}", flush=True)


if __name__ == "__main__":
    main()
