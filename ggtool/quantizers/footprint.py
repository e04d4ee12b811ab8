"""The size of a loaded torch model, counted from its tensors.

Every storage counts once and whole: parameters, buffers that belong to the checkpoint, and what bitsandbytes
keeps beside its parameters (absmax, codebooks, row scales). Buffers that a model computes for itself, such as
causal masks and rotary frequencies, do not count: modules register those as not persistent.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

# bitsandbytes: Params4bit.quant_state (nested in state2), Int8Params and Linear8bitLt.state. Their other
# attributes are activations of the last call.
_HIDDEN = ("quant_state", "state", "state2", "absmax", "code", "offset", "CB", "SCB")


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all unique storages that hold weights, scales or codebooks."""
    storages = {}
    for tensor in weight_tensors(model):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def weight_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield every tensor that holds weights; shared ones may come more than once."""
    for module in model.modules():
        yield from _hidden(module)
        for parameter in module.parameters(recurse=False):
            yield parameter
            yield from _hidden(parameter)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer


def _hidden(holder: object) -> Iterator[Tensor]:
    for name in _HIDDEN:
        value = vars(holder).get(name)
        if isinstance(value, Tensor):
            yield value
        elif hasattr(value, "__dict__"):
            yield from _hidden(value)
