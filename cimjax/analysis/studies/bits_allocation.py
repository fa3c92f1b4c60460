"""Which choice to make for every layer under a budget: pure arithmetic, without networks and without jax."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def allocate(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The choices of the least sum of losses whose costs do not exceed a budget: exact, and of equals the cheapest.

    A multiple-choice knapsack, `min sum_l losses[l][c_l]` with `sum_l costs[l][c_l] <= budget`. Layer by layer, only
    sums are kept than which no other is as cheap and as good (Nemhauser and Ullmann 1969). The counts of conversions
    of a network have large common divisors, so that these are few: thousands for 50 layers.

    Args:
      costs: of each layer, the cost of each of its choices, whole numbers from 0.
      losses: the loss of each of them; may be negative.
      budget: the largest sum of costs.

    Returns:
      The number of the choice for each layer.

    Raises:
      ValueError: where even the cheapest choices cost more; their sum is `cheapest(costs)`.

    >>> allocate([[1, 2], [1, 2]], [[5.0, 0.0], [3.0, 0.0]], 3)
    [1, 0]
    """
    if cheapest(costs) > budget:
        raise ValueError(f"`budget` is {budget:,}; the cheapest choices cost {cheapest(costs):,}.")
    cost, loss = np.zeros(1, np.int64), np.zeros(1)
    # Of each kept sum: that of the layers before which it goes on from, and the choice that it adds.
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for layer, (own_costs, own_losses) in enumerate(zip(costs, losses, strict=True)):
        choices = len(own_costs)
        sums = (cost[:, None] + np.asarray(own_costs, np.int64)).reshape(-1)
        totals = (loss[:, None] + np.asarray(own_losses, float)).reshape(-1)
        kept = _not_beaten(sums, totals, budget - cheapest(costs[layer + 1 :]))
        cost, loss = sums[kept], totals[kept]
        steps.append((kept // choices, kept % choices))
    found, place = [], len(cost) - 1
    for before, choice in reversed(steps):
        found.append(int(choice[place]))
        place = before[place]
    return found[::-1]


def cheapest(costs: Sequence[Sequence[int]]) -> int:
    """The sum of the lowest costs."""
    return sum(map(min, costs))


def _not_beaten(costs: np.ndarray, losses: np.ndarray, most: int) -> np.ndarray:
    """The places, by rising cost, of the sums that cost at most so much and lose less than all that are cheaper."""
    order = np.lexsort((losses, costs))
    order = order[costs[order] <= most]
    lowest = np.minimum.accumulate(losses[order])
    return order[np.concatenate([[True], losses[order][1:] < lowest[:-1]])]
