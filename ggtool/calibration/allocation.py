"""Choose one type per tensor, so that all fit a budget of bytes at the least total cost: a multiple-choice knapsack.

Solved by dynamic programming over sizes rounded up to a 16,384th of the budget. That rounding is the only thing that
can keep the answer from being the optimum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ggtool.errors import UsageError

_STEPS = 1 << 14


@dataclass(frozen=True)
class Choice:
    """One way to store a tensor: its bytes, and its cost in the quantity that is minimized."""

    n_bytes: int
    cost: float


def allocate(choices: Mapping[str, Mapping[str, Choice]], budget_bytes: int) -> dict[str, str]:
    """Return {tensor: tensor type} of least total cost within the budget; UsageError when nothing is small enough."""
    least = sum(min(choice.n_bytes for choice in of.values()) for of in choices.values())
    if least > budget_bytes:
        raise UsageError(
            f"the target leaves {max(budget_bytes, 0):,} bytes for tensors and the smallest mix takes {least:,}; raise it."
        )
    # The smallest size of each tensor is counted exactly, so that rounding never makes a feasible budget infeasible.
    step = max(1, -(-(budget_bytes - least) // _STEPS))
    room = (budget_bytes - least) // step
    best = np.zeros(room + 1)  # best[r]: the least cost so far with r steps above the least
    picks = []
    for of in choices.values():
        base = min(choice.n_bytes for choice in of.values())
        fresh = np.full(room + 1, np.inf)
        pick = np.zeros(room + 1, np.int16)
        for number, choice in enumerate(of.values()):
            steps = -(-(choice.n_bytes - base) // step)
            if steps > room:
                continue
            candidate = best[: room + 1 - steps] + choice.cost
            better = candidate < fresh[steps:]
            fresh[steps:][better] = candidate[better]
            pick[steps:][better] = number
        best = fresh
        picks.append(pick)
    return _trace(choices, picks, step, room)


def _trace(
    choices: Mapping[str, Mapping[str, Choice]], picks: list[np.ndarray], step: int, room: int
) -> dict[str, str]:
    found = {}
    for (tensor, of), pick in zip(reversed(list(choices.items())), reversed(picks), strict=True):
        name = list(of)[pick[room]]
        found[tensor] = name
        room -= -(-(of[name].n_bytes - min(choice.n_bytes for choice in of.values())) // step)
    return dict(reversed(found.items()))
