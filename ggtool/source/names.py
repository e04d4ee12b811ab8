"""Strip the prefixes that training wrappers leave in tensor names: torch.compile, DDP, FSDP, an enclosing module.

`rename` gives the model's own names, `renamings` the same as patterns for transformers' loader.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

_WRAPPERS = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
_PARALLEL = r"^module\."
# A whole model kept as `self.model` of another module: all names begin with "model.", the base model's prefix follows.
_NESTED = r"^model\."
_INSIDE = re.compile(r"model\.(model|transformer|gpt_neox|lm_head|embed_out)\.")


def renamings(names: Collection[str]) -> Mapping[str, str]:
    """Return {regular expression: replacement}, to apply in order; empty if `names` are the model's own already."""
    found: dict[str, str] = {}
    for pattern in (_WRAPPERS, _PARALLEL):
        if any(re.search(pattern, name) for name in names):
            found[pattern] = ""
    plain = [_apply(found, name) for name in names]
    if plain and all(re.match(_NESTED, name) for name in plain) and any(map(_INSIDE.match, plain)):
        found[_NESTED] = ""
    return found


def rename(names: Collection[str]) -> dict[str, str]:
    """Return {name in the file: the model's own name}."""
    patterns = renamings(names)
    return {name: _apply(patterns, name) for name in names}


def prefixes_note(names: Collection[str]) -> str:
    """Return a note with an example of what is stripped; empty if nothing is."""
    changed = {name: own for name, own in rename(names).items() if own != name}
    if not changed:
        return ""
    name, own = next(iter(changed.items()))
    return f"{len(changed)} tensors have a wrapper's prefix, which is stripped: {name} is read as {own}."


def _apply(patterns: Mapping[str, str], name: str) -> str:
    for pattern, replacement in patterns.items():
        name = re.sub(pattern, replacement, name)
    return name
