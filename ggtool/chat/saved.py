"""A conversation in a file: JSON that another session, or another program, can read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ggtool.chat.conversation import Turn
from ggtool.errors import UsageError
from ggtool.system.atomic import atomic_output

_SCHEMA = 1
_LONGEST_BYTES = 64 << 20


def save_conversation(path: Path, model: str, system: str, turns: Sequence[Turn]) -> None:
    """Write a conversation to `path`; OutputError when it exists or cannot be written."""
    said = [
        {"user": turn.entry, **({"steps": turn.steps} if turn.steps else {}), "assistant": turn.text}
        for turn in turns
    ]
    content = {"schema": _SCHEMA, "model": model, "system": system, "turns": said}
    with atomic_output(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def load_conversation(path: Path) -> tuple[str, list[Turn]]:
    """Return the system message and the turns that `save_conversation` wrote; UsageError for what is no such file."""
    try:
        if path.stat().st_size > _LONGEST_BYTES:
            raise UsageError(f"{path} is too large to be a conversation.")
        content = json.loads(path.read_text(encoding="utf-8"))
        system = content["system"]
        turns = [
            Turn(turn["user"], turn["assistant"], steps=tuple(turn.get("steps", ())))
            for turn in content["turns"]
        ]
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{path} is not a conversation that /save wrote.") from None
    texts = [system, *(part for turn in turns for part in (turn.entry, turn.text))]
    steps = [step for turn in turns for step in turn.steps]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(step, dict) for step in steps):
        raise UsageError(f"{path} is not a conversation that /save wrote.")
    return system, turns
