"""Callbacks for progress and notes."""

from __future__ import annotations

from collections.abc import Callable

# progress(done, total)
Progress = Callable[[int, int], None]

# progress(stage, done, total): the stage in words, such as "converting"; each has units of its own.
StageProgress = Callable[[str, int, int], None]

# notify(note): one line for the user that is not an error.
Notify = Callable[[str], None]
