"""`--tasks llama:hellaswag FILE`: the one task whose value is two words."""

from __future__ import annotations

from collections.abc import Sequence

_FLAG = "--tasks"
_TASK = "llama:hellaswag"


def with_task_file(args: Sequence[str]) -> list[str]:
    """Return the arguments with `--tasks llama:hellaswag FILE` as `--tasks llama:hellaswag=FILE`."""
    found = list(args)
    for at in range(len(found) - 3, -1, -1):
        flag, value, file = found[at : at + 3]
        if flag == _FLAG and value.lower() == _TASK and not file.startswith("-"):
            found[at + 1 : at + 3] = [f"{_TASK}={file}"]
    return found
