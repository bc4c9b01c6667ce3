"""Policies that read :class:`~floe.importance.scores.Scores` alone."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from floe.selection.policies.inputs import Policy, Situation, best_window, finite
from floe.types import Floats


def masks(situation: Situation) -> Floats:
    """The FLoE paper's rule: the more of a layer is masked, the more it should be adapted.

    Source: the paper's three mask stages under a preset (floe.selection.masks.presets), scored by
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
    resampling of rows; after an epoch of our runs ahead of random layers on one mix of questions,
    level with them on another.
    """
    return finite("adapter_fisher", situation.scores.adapter_fisher)


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
    return finite("probe_fisher", values)


def gate_fisher_diagonal(situation: Situation) -> Floats:
    """Fisher information of the gate that scales a layer's adapters, descending.

    A gate g_k = 1 multiplies all adapters of layer k, so its gradient is the sum of theirs; the
    score is sum_n (d L_n / d g_k)^2. Source: Eq. 9 of the FLoE paper with gates on the adapters in
    place of masks on the weights. Assumes that an adapter is worth keeping if closing it hurts the
    warm-up model, and drops the first-order term, as Eq. 6 does.
    """
    gradient = situation.scores.gate_gradient
    if gradient is None:
        raise ValueError(
            "policy 'gate_fisher_diagonal' needs scores.gate_gradient, got None; "
            "floe.score measures it with the adapters' Fisher information: score the model again"
        )
    if len(gradient) == 0 or np.shape(gradient)[1] != situation.total:
        raise ValueError(
            f"gate_gradient must be [S, {situation.total}, P] with S > 0, "
            f"got shape {np.shape(gradient)}"
        )
    layers = np.asarray(gradient, dtype=np.float64).sum(axis=2)
    return finite("gate_fisher_diagonal", np.square(layers).sum(axis=0))


def fisher_high(situation: Situation) -> Floats:
    """Layers of high mask Fisher first: sum over heads and neurons of Eq. 9-11, descending.

    Source: the FLoE paper's abstract, which has layers of high Fisher information adapted; its
    Algorithm 1 goes the other way (``fisher_low``). Assumes that heads and neurons add up in one
    unit (nats^2). In our runs with a 135M model it was no better than random layers at 100 steps.
    """
    return _fisher(situation)


def fisher_low(situation: Situation) -> Floats:
    """Layers of low mask Fisher first: minus the score of ``fisher_high``.

    Source: the direction of the FLoE paper's Algorithm 1 without its masks and costs: layers that
    may be changed at little cost. In our runs it was worse than random layers after 100 steps.
    """
    return -_fisher(situation)


def taylor_high(situation: Situation) -> Floats:
    """Layers of high first-order Taylor cost first: sum over heads and neurons of Eq. 4-5.

    Source: the FLoE paper's cost, used alone. Assumes that layers whose weights the loss leans on
    are worth adapting. In our runs level with random layers after 100 steps.
    """
    return _taylor(situation)


def taylor_low(situation: Situation) -> Floats:
    """Layers of low Taylor cost first: minus the score of ``taylor_high``.

    Source: the FLoE paper's sentence that layers of low cost are preferred. In our runs worse than
    random layers after 100 steps; it picked nearly the last layers.
    """
    return -_taylor(situation)


def segment_of(base: Policy) -> Policy:
    """The policy that takes the K contiguous layers of the largest sum of ``base``'s scores.

    Then the layers that the next best windows add. Scores must be finite; of equal windows the one
    that starts lower wins.
    """

    def segment(situation: Situation) -> Floats:
        values = finite("score", base(situation))
        starts = range(situation.total - situation.count + 1)
        # fsum: equal windows stay equal in whatever order they hold their scores
        sums = [math.fsum(values[start : start + situation.count]) for start in starts]
        return best_window(sums, situation.count)

    return segment


def segment(situation: Situation) -> Floats:
    """The K contiguous layers with the largest sum of adapter Fisher.

    Source: contiguous layer segments as in CLP, "The Structural Scalpel" (October 2025), which
    prunes a segment found by a differentiable gate. Assumed, from its abstract alone: the best
    segment is the window of the largest summed score, found by trying all; keeping takes the place
    of pruning.
    """
    return segment_of(adapter_fisher)(situation)


def _fisher(situation: Situation) -> Floats:
    scores = situation.scores
    return _sum_of_units("fisher", scores.head_fisher, scores.neuron_fisher)


def _taylor(situation: Situation) -> Floats:
    scores = situation.scores
    return _sum_of_units("taylor", scores.head_taylor, scores.neuron_taylor)


def _sum_of_units(name: str, heads: ArrayLike, neurons: ArrayLike) -> Floats:
    parts = [np.asarray(units, dtype=np.float64).sum(axis=1) for units in (heads, neurons)]
    return finite(name, parts[0] + parts[1])
