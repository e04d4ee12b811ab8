"""Progress callbacks: how far a piece of work is, told to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

# progress(done, total)
Progress = Callable[[int, int], None]

# progress(stage, done, total): the stage in words, such as "converting"; each has units of its own.
StageProgress = Callable[[str, int, int], None]

# notify(note): one line for the user that is no error.
Notify = Callable[[str], None]
