"""Which tensor type for which tensor, so that all fit and the sum of their costs is least: a knapsack, solved whole.

One choice per tensor, a size and a cost each, and a budget. Sizes are rounded up to a 16,384th of the budget,
which is all that keeps the answer from being the best one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ggtool.errors import UsageError

_STEPS = 1 << 14


@dataclass(frozen=True)
class Choice:
    """A way to hold a tensor: bytes, and what it costs in whatever is to be kept small."""

    n_bytes: int
    cost: float


def allocate(choices: Mapping[str, Mapping[str, Choice]], budget_bytes: int) -> dict[str, str]:
    """Return {tensor: tensor type} of least total cost within the budget; UsageError when nothing is small enough."""
    least = sum(min(choice.n_bytes for choice in of.values()) for of in choices.values())
    if least > budget_bytes:
        raise UsageError(
            f"the target leaves {max(budget_bytes, 0):,} bytes for tensors and the smallest mix takes {least:,}; raise it."
        )
    # What a tensor takes at least is taken exactly, so that rounding can never make the feasible infeasible.
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
