"""What is best among all masks of a few units, for many problems at once."""

import numpy as np


def masks(units):
    """Every mask of so many units, [2**n, n] bool."""
    return (np.arange(2**units)[:, None] >> np.arange(units)) % 2 == 1


def best_values(value, cost, budget):
    """The most value within each budget; value and cost [B, n], budget [B]; exact for integers."""
    every = masks(value.shape[1]).astype(np.float32)  # sums below 2**24 are exact
    found = []
    for part in range(0, len(value), 32):
        rows = slice(part, part + 32)
        values, costs = (every @ array[rows].T.astype(np.float32) for array in (value, cost))
        found.append(np.where(costs <= budget[rows], values, -1.0).max(0))
    return np.concatenate(found)
