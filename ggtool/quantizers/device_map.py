"""One model over several devices: whole blocks in turn, each device about as many bytes.

The token table comes first, then the blocks in their order, then what follows them; a tied output head stays with the table.
accelerate's hooks move activations from one device to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel


def device_map(model: nn.Module, devices: Sequence[str], *, block_scale: float = 1.0) -> dict[str, str]:
    """Return module name -> device, covering every parameter and buffer once.

    block_scale: what a byte of a block will become, where blocks alone are quantized while they are loaded.
    """
    units = list(_units(model, ""))
    seen: dict[int, int] = {}
    sizes = []
    for number, (_, unit, is_block) in enumerate(units):
        tensors = [*unit.parameters(), *unit.buffers()]
        own = [tensor for tensor in tensors if seen.setdefault(id(tensor), number) == number]
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in own)
        sizes.append(n_bytes * (block_scale if is_block else 1.0))
    total, before = sum(sizes), 0.0
    found: list[str] = []
    for (_, unit, _), size in zip(units, sizes, strict=True):
        owner = next((seen[id(tensor)] for tensor in unit.parameters()), None)
        if owner is not None and owner < len(found):
            found.append(found[owner])  # tied to what stands there
        else:
            # By its middle, so that neither device has more than half a block too much. What has no bytes comes first.
            at = (before + size / 2) / total if size else 0.0
            found.append(devices[min(len(devices) - 1, int(at * len(devices)))])
        before += size
    return {name: device for (name, _, _), device in zip(units, found, strict=True)}


def spread_over(model: PreTrainedModel, devices: Sequence[str]) -> PreTrainedModel:
    """Move a loaded model to several devices and have its activations follow."""
    from accelerate import dispatch_model

    spread: PreTrainedModel = dispatch_model(model, device_map(model, devices), force_hooks=True)
    return spread


def _units(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield the modules that stay whole: the blocks of every list of blocks, and all that has no such list in it."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield from ((f"{path}.{number}", block, True) for number, block in enumerate(child))
        elif any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            yield from _units(child, f"{path}.")
        else:
            yield path, child, False
