"""Policies that look at nothing but the number of layers: baselines and the null model."""

import numpy as np

from floe.selection.policies.registry import PolicyInputs, by_position, policy
from floe.types import Floats


@policy(
    score="a random order from the seed; the null model, which the FLoE paper's Table 2 has, too",
    measured="yes: what every other policy is compared with",
)
def random(inputs: PolicyInputs) -> Floats:
    """A uniformly random order."""
    return by_position(np.random.default_rng(inputs.seed).permutation(inputs.total))


@policy(
    score="K layers at equal distances, both ends included (K = 1: the middle one), then the rest "
    "in order; neighbouring layers are taken to be redundant",
    measured="yes: level with every other policy after longer training",
)
def even(inputs: PolicyInputs) -> Floats:
    """Layers spread evenly."""
    chosen = even_layers(inputs.count, inputs.total)
    rest = [layer for layer in range(inputs.total) if layer not in chosen]
    return by_position([*chosen, *rest])


@policy(
    score="nearest to the input; the backward pass runs through all layers",
    measured="yes: behind random layers after 100 steps",
)
def first(inputs: PolicyInputs) -> Floats:
    """The layers next to the input."""
    return -np.arange(inputs.total, dtype=np.float64)


@policy(
    score="nearest to the output; the shortest backward pass",
    measured="yes: far behind random layers after 100 steps",
)
def last(inputs: PolicyInputs) -> Floats:
    """The layers next to the output."""
    return np.arange(inputs.total, dtype=np.float64)


@policy(score="nearest to the middle", measured="yes: level with random layers after 100 steps")
def middle(inputs: PolicyInputs) -> Floats:
    """The layers in the middle."""
    return -np.abs(np.arange(inputs.total, dtype=np.float64) - (inputs.total - 1) / 2)


@policy(
    "all",
    score="every layer, whatever K: the reference of every comparison",
    measured="yes: ahead of any eight layers after 100 steps, level with them after 300",
)
def every_layer(inputs: PolicyInputs) -> Floats:
    """No layer before another."""
    return np.ones(inputs.total)


def even_layers(count: int, total: int) -> list[int]:
    """``count`` of ``total`` layers at equal distances, both ends included; halves round up."""
    if count == 1:
        return [(total - 1) // 2]
    steps = 2 * (count - 1)
    return [(2 * i * (total - 1) + count - 1) // steps for i in range(count)]
