"""Record keys: one hash per task of everything its numbers depend on, for finding them in a store.

Content is hashed, not names: the sha256 of the artifact, of the text and of the token ids. Paths, times and the timeout
are left out, so that a sweep in another folder finds earlier results.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ggtool.evaluation.accuracy.harness import harness_of
from ggtool.evaluation.jobs import Task
from ggtool.evaluation.node_facts import PACKED, NodeFacts, node_facts
from ggtool.evaluation.plan import Plan
from ggtool.evaluation.target import Target
from ggtool.results.records import EvalRecord
from ggtool.system.cache import sources_sha256

# Speed and memory depend on the machine; perplexity and divergence do not.
_MACHINE = ("os", "cpu", "cpu_count", "memory_bytes")
# Record schema in which the meaning of a task's numbers last changed; of answers to tasks.
_ANSWERS_SCHEMA = 3
_SCHEMA: Mapping[Task, int] = {"quality": 1, "speed": 2, "memory": 1}

Known = Mapping[Target, Mapping[Task, EvalRecord]]


def target_keys(what: Plan, target: Target, facts: NodeFacts | None = None) -> dict[Task, str]:
    """Return task -> sha256 for `target` on the machine of `facts`, this one for None.

    Empty for a target whose file is not made yet.
    """
    reference = what.reference
    if not target.sha256 or (reference is not None and not reference.sha256):
        return {}
    here = facts or node_facts(runtimes(what))
    return {task: settings_sha256(_settings(what, target, task, here)) for task in what.parts}


def runtimes(what: Plan) -> frozenset[str]:
    """Return the runtimes of a plan's targets and its reference, as `node_facts` takes them."""
    everything = [*what.targets, *([what.reference] if what.reference else [])]
    packed = {PACKED} if any(is_packed(target) for target in everything) else set()
    return frozenset(target.format.runtime for target in everything) | packed


def is_packed(target: Target) -> bool:
    """Whether a format is computed by our own kernels."""
    return (target.format.quantizer or "").startswith("scratch-")


def find_known(
    what: Plan, records: Iterable[EvalRecord], machines: Sequence[NodeFacts | None] = (None,)
) -> dict[Target, dict[Task, EvalRecord]]:
    """Return, per target, the tasks whose numbers `records` has, each with the newest record that has them.

    machines: those that the plan runs on; None is this one. A request that waits for quiet does not accept speeds that were disturbed.
    """
    held: dict[tuple[Task, str], EvalRecord] = {}
    for record in records:
        is_wanted = record.speed is not None and not (what.request.wait_s and record.speed.is_disturbed)
        parts: dict[Task, object] = {
            "quality": record.perplexity,
            "speed": is_wanted,
            "memory": record.memory,
            **{items.part: record.find_task(items.task) for items in what.tasks},
        }
        held.update(
            {(task, record.keys[task]): record for task in what.parts if parts[task] and task in record.keys}
        )
    return {
        target: {
            task: held[task, key]
            for facts in machines
            for task, key in target_keys(what, target, facts).items()
            if (task, key) in held
        }
        for target in what.targets
    }


def _settings(what: Plan, target: Target, task: Task, facts: NodeFacts) -> dict[str, Any]:
    request = what.request
    reference = what.reference if what.reference != target else None
    items = what.items_of(task)
    settings: dict[str, Any] = {
        "schema": _SCHEMA.get(task, _ANSWERS_SCHEMA),
        "task": task,
        "format": target.label,
        "artifact": target.sha256,
        "text": what.text.sha256,
        "tokens": what.tokens.sha256,
        "n_ctx": request.n_ctx,
        "threads": request.threads,
        "device": what.device,
        "versions": target_versions(target, facts),
    }
    if what.request.gpus:
        settings["gpus"] = len(what.request.gpus)
    if what.device == "cuda" or is_packed(target):
        settings["engine"] = [request.engine, sources_sha256("backends/engine", "kernels")]
    if is_packed(target):
        if what.device == "cpu":
            settings["cpu_products"] = facts.cpu_products
        else:
            settings["gpu_products"] = facts.gpu_products
    if items is not None:
        # What is asked is in the items; the text that perplexity is measured on does not matter.
        asked = {"text": "", "tokens": "", "n_ctx": 0, "items": items.sha256, "harness": harness_of(items)}
        return settings | asked
    if task == "quality":
        protocol = {"protocol": request.protocol, "stride": request.stride, "n_chunks": request.n_chunks}
        compared = (
            None
            if reference is None
            else [reference.label, reference.sha256, target_versions(reference, facts)]
        )
        return settings | protocol | {"reference": compared}
    settings["machine"] = [facts.machine[name] for name in _MACHINE]
    if task == "speed":
        rounds = {"repetitions": request.repetitions}
        lengths = {"prompts": request.speed_prompts, "depths": request.speed_depths}
        return settings | rounds | lengths | {"batches": request.speed_batches}
    return settings


def target_versions(target: Target, facts: NodeFacts | None = None) -> dict[str, str]:
    """Return the releases of the code that runs a target, and of ours that quantizes it while it is loaded."""
    here = facts or node_facts(frozenset({target.format.runtime}))
    # Formats that are quantized while they are loaded have no file to hash.
    made = {"quantizers": sources_sha256("kernels", "quantizers")} if target.format.quantizer else {}
    # Products of another layout round otherwise, and take another time.
    plain = target.format.runtime == "llama_cpp" and not here.extra_buffers
    layout = {"llama_cpp_extra_buffers": "off"} if plain else {}
    return {**here.versions[target.format.runtime], **made, **layout}


def settings_sha256(settings: Mapping[str, Any]) -> str:
    """Return the sha256 of settings as JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
