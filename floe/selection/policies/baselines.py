"""Policies that look at nothing but the number of layers: baselines and the null model."""

from __future__ import annotations

import numpy as np

from floe.selection.policies.inputs import Situation, by_position
from floe.types import Floats


def random(situation: Situation) -> Floats:
    """A uniformly random order from the seed. The null model (the paper's Table 2 has it, too)."""
    order = np.random.default_rng(situation.seed).permutation(situation.total)
    return by_position(order)


def even(situation: Situation) -> Floats:
    """K layers spread evenly from the first to the last, then the rest in order.

    K = 1 takes the middle one. Assumes only that neighbouring layers are redundant. A baseline that
    costs nothing; level with every other rule after longer training in our runs.
    """
    chosen = even_layers(situation.count, situation.total)
    rest = [layer for layer in range(situation.total) if layer not in chosen]
    return by_position(np.array([*chosen, *rest]))


def first(situation: Situation) -> Floats:
    """The layers next to the input first. A baseline; the backward pass runs through all layers."""
    return -np.arange(situation.total, dtype=np.float64)


def last(situation: Situation) -> Floats:
    """The layers next to the output first. A baseline with the shortest backward pass."""
    return np.arange(situation.total, dtype=np.float64)


def middle(situation: Situation) -> Floats:
    """The layers nearest to the middle first. A baseline."""
    return -np.abs(np.arange(situation.total, dtype=np.float64) - (situation.total - 1) / 2)


def all_layers(situation: Situation) -> Floats:
    """Every layer, whatever number was asked for: the reference of every comparison."""
    return np.ones(situation.total)


def even_layers(count: int, total: int) -> list[int]:
    """``count`` of ``total`` layers at equal distances, both ends included; halves round up."""
    if count == 1:
        return [(total - 1) // 2]
    steps = 2 * (count - 1)
    return [(2 * i * (total - 1) + count - 1) // steps for i in range(count)]
