"""What a machine's numbers depend on: its hardware, the releases of the runtimes, and how they compute there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version

from ggtool.backends.llama_cpp.selftest import self_test
from ggtool.evaluation.metrics.nvidia import memory_bytes as gpu_memory_bytes
from ggtool.kernels import build
from ggtool.system.machine import describe_machine, fingerprint, gpu_names
from ggtool.system.schedule.work import Site

# Stands beside the runtimes for formats that are computed by our own kernels.
PACKED = "packed"
# Packages that a runtime's numbers depend on.
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "llama_cpp": ("llama-cpp-python",),
    "huggingface": ("torch", "transformers", "bitsandbytes"),
}


@dataclass(frozen=True)
class NodeFacts:
    """A machine, as the keys of records and the scheduler see it.

    kind: its fingerprint. memory_bytes, gpu_bytes: of the machine and of its smallest GPU, 0 where a probe did not ask. versions: runtime ->
    package -> release. extra_buffers: whether llama.cpp computes with them.
    """

    machine: Mapping[str, str]
    kind: str
    memory_bytes: int
    gpu_bytes: int
    cpu_products: str
    gpu_products: str
    versions: Mapping[str, Mapping[str, str]]
    extra_buffers: bool


def node_facts(runtimes: frozenset[str]) -> NodeFacts:
    """Return the facts of this machine that the numbers of some runtimes depend on; PACKED stands for ggtool's products."""
    machine = describe_machine()
    return NodeFacts(
        machine=machine,
        kind=fingerprint(machine),
        memory_bytes=int(machine["memory_bytes"]),
        gpu_bytes=0,
        cpu_products=build.way() if PACKED in runtimes else "",
        gpu_products="torch" if build.is_switched_off() else "Triton",
        versions={name: {one: version(one) for one in _PACKAGES[name]} for name in runtimes - {PACKED}},
        extra_buffers="llama_cpp" not in runtimes or self_test().extra_buffers,
    )


def probe(runtimes: frozenset[str], _site: Site) -> NodeFacts:
    """Return the facts of the node that this runs on, the memory of its GPUs included."""
    return replace(node_facts(runtimes), gpu_bytes=gpu_memory_bytes() if gpu_names() else 0)
