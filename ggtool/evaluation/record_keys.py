"""Record keys: one hash per task of everything its numbers depend on, for finding them in a store.

Content is hashed, not names: the sha256 of the artifact, of the text and of the token ids. Paths, times and the timeout
are left out, so that a sweep in another folder finds earlier results.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from ggtool.backends.llama_cpp.selftest import self_test
from ggtool.evaluation.jobs import TASKS, Task
from ggtool.evaluation.plan import Plan, Target
from ggtool.kernels import build
from ggtool.results.records import EvalRecord
from ggtool.system.cache import sources_sha256
from ggtool.system.machine import describe_machine

# Packages that a runtime's numbers depend on.
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "llama_cpp": ("llama-cpp-python",),
    "huggingface": ("torch", "transformers", "bitsandbytes"),
}
# Formats computed by our own kernels.
_PACKED = "scratch-"
# Speed and memory depend on the machine; perplexity and divergence do not.
_MACHINE = ("os", "cpu", "cpu_count", "memory_bytes")
# Record schema in which the meaning of a task's numbers last changed.
_SCHEMA: Mapping[Task, int] = {"quality": 1, "speed": 2, "memory": 1}

Known = Mapping[Target, Mapping[Task, EvalRecord]]


def target_keys(what: Plan, target: Target) -> dict[Task, str]:
    """Return task -> sha256 for `target`; empty for a target whose file is not made yet."""
    reference = what.reference
    if not target.sha256 or (reference is not None and not reference.sha256):
        return {}
    return {task: settings_sha256(_settings(what, target, task)) for task in TASKS}


def find_known(what: Plan, records: Iterable[EvalRecord]) -> dict[Target, dict[Task, EvalRecord]]:
    """Return, per target, the tasks whose numbers `records` has, each with the newest record that has them.

    A request that waits for quiet does not accept speeds that were disturbed.
    """
    held: dict[tuple[Task, str], EvalRecord] = {}
    for record in records:
        is_wanted = record.speed is not None and not (what.request.wait_s and record.speed.is_disturbed)
        parts = {"quality": record.perplexity, "speed": is_wanted, "memory": record.memory}
        held.update(
            {(task, record.keys[task]): record for task in TASKS if parts[task] and task in record.keys}
        )
    return {
        target: {
            task: held[task, key] for task, key in target_keys(what, target).items() if (task, key) in held
        }
        for target in what.targets
    }


def _settings(what: Plan, target: Target, task: Task) -> dict[str, Any]:
    request = what.request
    reference = what.reference if what.reference != target else None
    settings: dict[str, Any] = {
        "schema": _SCHEMA[task],
        "task": task,
        "format": target.label,
        "artifact": target.sha256,
        "text": what.text.sha256,
        "tokens": what.tokens.sha256,
        "n_ctx": request.n_ctx,
        "threads": request.threads,
        "device": what.device,
        "versions": target_versions(target),
    }
    if what.device == "cuda":
        settings["engine"] = [request.engine, sources_sha256("backends/engine", "kernels")]
    if (target.format.quantizer or "").startswith(_PACKED):
        if what.device == "cpu":
            settings["cpu_products"] = build.way()
        else:
            settings["gpu_products"] = "torch" if build.is_switched_off() else "Triton"
    if task == "quality":
        protocol = {"protocol": request.protocol, "stride": request.stride, "n_chunks": request.n_chunks}
        compared = (
            None if reference is None else [reference.label, reference.sha256, target_versions(reference)]
        )
        return settings | protocol | {"reference": compared}
    machine = describe_machine()
    settings["machine"] = [machine[name] for name in _MACHINE]
    if task == "speed":
        rounds = {"repetitions": request.repetitions}
        lengths = {"prompts": request.speed_prompts, "depths": request.speed_depths}
        return settings | rounds | lengths | {"batches": request.speed_batches}
    return settings


def target_versions(target: Target) -> dict[str, str]:
    """Return the releases of the code that runs a target, and of ours that quantizes it while it is loaded."""
    # Formats that are quantized while they are loaded have no file to hash.
    made = {"quantizers": sources_sha256("kernels", "quantizers")} if target.format.quantizer else {}
    # Products of another layout round otherwise, and take another time.
    plain = target.format.runtime == "llama_cpp" and not self_test().extra_buffers
    layout = {"llama_cpp_extra_buffers": "off"} if plain else {}
    return {name: version(name) for name in _PACKAGES[target.format.runtime]} | made | layout


def settings_sha256(settings: Mapping[str, Any]) -> str:
    """Return the sha256 of settings as JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
