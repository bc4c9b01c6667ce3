"""Rules that order layers: functions of a :class:`Situation` to one score per layer, [L] float64.

Layers are ranked by descending score, ties to the lower index, so every policy gives a full
ranking. What the rules are worth is an empirical question: in our runs with a 135M model (8 of 30
layers), adapter sensitivity learned fastest over 100 steps and was level with evenly spread and
random layers at the end of longer training, where no rule separated from another. No policy here
is claimed to do better than that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from floe.selection.solvers import Floats

if TYPE_CHECKING:
    from floe.importance.scores import Scores


@dataclass(frozen=True, eq=False)
class Situation:
    """What a policy may look at.

    Attributes:
        scores: of the model.
        count: K, how many layers will be chosen, in [1, total].
        total: L.
        seed: for policies that draw.
        mask_scores: [L], the layer scores of the paper's masks.
    """

    scores: Scores
    count: int
    total: int
    seed: int
    mask_scores: Floats


Policy = Callable[[Situation], Floats]


def masks(situation: Situation) -> Floats:
    """The FLoE paper's rule: the more of a layer is masked, the more it should be adapted.

    Source: the paper's three mask stages under a preset (floe.selection.presets), scored by
    ranking.layer_score. Assumes that units of low Fisher information can be changed at no cost and
    that a dense mask means a layer worth adapting. None of its readings beat random layers in our
    runs; the "paper_layer" preset was worse.
    """
    return situation.mask_scores


def adapter_fisher(situation: Situation) -> Floats:
    """The default: sensitivity of the loss to a layer's warmed-up adapters, descending.

    sum_n || dL_n / d phi_k ||^2 over rows n and the adapter parameters phi_k of layer k. Source:
    the second sensitivity the paper names (adapter high, pre-trained weights low) but does not
    compute. Assumes that layers whose adapters the data pull hardest gain most. Stable under
    resampling of rows and the fastest learner at equal steps in our runs, level with random layers
    after longer training.
    """
    return _natural("adapter_fisher", situation.scores.adapter_fisher)


def probe(situation: Situation) -> Floats:
    """The same sensitivity at freshly drawn adapters (B = 0), descending: needs no warm-up.

    Source: gradient probes of the initial adapter. Chose 7 of adapter_fisher's 8 layers and
    trained alike, in one run of one seed.
    """
    values = situation.scores.probe_fisher
    if values is None:
        raise ValueError(
            "policy 'probe' needs scores.probe_fisher, got None; "
            "measure it with floe.score(..., probe=True)"
        )
    return _natural("probe_fisher", values)


def random(situation: Situation) -> Floats:
    """A uniformly random order from the seed. The null model (the paper's Table 2 has it, too)."""
    order = np.random.default_rng(situation.seed).permutation(situation.total)
    return _by_position(order)


def even(situation: Situation) -> Floats:
    """K layers spread evenly from the first to the last, then the rest in order.

    K = 1 takes the middle one. Assumes only that neighbouring layers are redundant. A baseline that
    costs nothing; level with every other rule after longer training in our runs.
    """
    chosen = even_layers(situation.count, situation.total)
    rest = [layer for layer in range(situation.total) if layer not in chosen]
    return _by_position(np.array([*chosen, *rest]))


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


POLICIES: dict[str, Policy] = {
    "masks": masks,
    "adapter_fisher": adapter_fisher,
    "probe": probe,
    "random": random,
    "even": even,
    "first": first,
    "last": last,
    "middle": middle,
    "all": all_layers,
}


def even_layers(count: int, total: int) -> list[int]:
    """``count`` of ``total`` layers at equal distances, both ends included; halves round up."""
    if count == 1:
        return [(total - 1) // 2]
    steps = 2 * (count - 1)
    return [(2 * i * (total - 1) + count - 1) // steps for i in range(count)]


def _by_position(order: np.ndarray) -> Floats:
    """Scores in (0, 1] that reproduce an order: the first gets 1, the last 1 / L."""
    scores = np.empty(len(order))
    scores[order] = np.arange(len(order), 0, -1) / len(order)
    return scores


def _natural(name: str, values: Floats) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(found))
    if bad.size:
        raise ValueError(f"{name}[{bad[0]}] must be finite, got {found[bad[0]]}")
    return found
