"""A connection to Ray: to a cluster at an address, or to one that is started here and ends with this process.

A cluster started here listens on the loopback address alone, asks every client for a token that only this process knows, has no
dashboard, and sends no usage statistics.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ggtool.errors import UsageError
from ggtool.system.machine import usable_cpus
from ggtool.system.progress import Notify
from ggtool.system.schedule import LOCAL

# A cluster that was started on this machine.
_AUTO = "auto"
_CONNECT_S = 10.0
# Ray's client protocol: the driver would not be on a node of the cluster, and nodes could not read its files.
_CLIENT = "ray://"

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray warns about what it will do otherwise in future
    "RAY_worker_niceness": "0",  # Ray's workers are nice by 15, so that timings would wait for every other process
}
_LOOPBACK_HOSTS = ("127.0.0.1:", "localhost:")
# Ray's switch for systems without clusters: everything binds to the loopback address.
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextmanager
def connected(address: str, notify: Notify) -> Iterator[Any]:
    """Connect to Ray and yield its module; disconnect after the block, and end a cluster that was started here.

    address: LOCAL starts a cluster of this machine; else host:port, or "auto" for one that runs on this machine.
    UsageError where Ray is not installed or there is no such cluster.
    """
    if address.startswith(_CLIENT):
        raise UsageError(
            f"--ray {address}: ggtool runs on a node of the cluster; log in to one and pass its host:port, or auto."
        )
    if address not in (LOCAL, _AUTO):
        _refuse_silence(address)  # Ray itself would try for a minute
    os.environ.update(_QUIET)
    folder = None
    if address == LOCAL:
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    if address == LOCAL or address.startswith(_LOOPBACK_HOSTS):
        os.environ[_LOOPBACK] = "0"
    ray = _import()
    # `None`, with which ray.init also looks for a running cluster, would not say which of the two happened.
    where: dict[str, Any]
    if address == LOCAL:
        folder = tempfile.mkdtemp(prefix="ggtool-ray-")  # short: it is part of the names of sockets
        where = {
            "address": "local",
            "num_cpus": usable_cpus(),
            "include_dashboard": False,
            "_temp_dir": folder,
        }
    else:
        where = {"address": address}
    try:
        try:
            ray.init(**where, logging_level="ERROR", log_to_driver=False, configure_logging=True)
        except Exception as error:  # noqa: BLE001  # Ray raises its bare base class where a node does not start in time
            raise UsageError(_unreachable(address, error)) from None
        if address == LOCAL:
            notify(
                f"No cluster named: a local one of {usable_cpus()} CPUs was started for this run, reachable from this machine alone."
            )
        yield ray
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _refuse_silence(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(_unreachable(address, error)) from None


def _import() -> Any:
    if "ray" not in sys.modules and importlib.util.find_spec("ray") is None:
        raise UsageError(
            "--ray needs the package ray, which is not installed: `pip install 'ggtool[ray]'`, on every node of the cluster."
        )
    return importlib.import_module("ray")


def _unreachable(address: str, error: Exception) -> str:
    said = str(error).strip().splitlines()
    why = (said[0] if said else type(error).__name__).rstrip(".")
    if address == LOCAL:
        return f"no local Ray cluster can be started: {why}."
    return f"there is no Ray cluster at {address}, or this machine is not a node of it: {why}. Start one with `ray start`, or leave out the address."
