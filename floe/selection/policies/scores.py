"""Policies that read the scores of floe.score alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from floe.selection.policies.registry import PolicyInputs, best_window, policy
from floe.types import Floats

if TYPE_CHECKING:
    from floe.importance.scores import Scores

FISHER = ("head_fisher", "neuron_fisher")
TAYLOR = ("head_taylor", "neuron_taylor")


@policy(
    reads=(*FISHER, *TAYLOR),
    score="how densely a layer's heads and neurons are masked",
    source="FLoE paper, Alg. 1-2, Eq. 12-21",
    assumed="what the paper leaves open, by preset; units of low Fisher information can be changed "
    "at no cost, and a dense mask means a layer worth adapting",
    measured="yes: no reading beat random layers, `paper_layer` was worse; behind `adapter_fisher` "
    "on one mix of questions of two, level on the other",
)
def masks(inputs: PolicyInputs) -> Floats:
    """The FLoE paper's rule: the more of a layer is masked, the more it should be adapted."""
    return inputs.mask_scores


def _module_fisher(scores: Scores) -> Floats | None:
    return scores.module_fisher


@policy(
    reads=("adapter_fisher",),
    modules=_module_fisher,
    score=r"sum_n \|\|dL_n/dphi_k\|\|^2 of the warmed-up adapters phi_k of layer k; the default",
    source="FLoE paper, named in its introduction (adapter sensitivity high, pre-trained weights' "
    "low), not computed",
    assumed="layers that the data pull hardest gain most",
    measured="yes: after an epoch ahead of random layers on one mix of questions, level with them "
    "on another; stable under resampling of rows",
)
def adapter_fisher(inputs: PolicyInputs) -> Floats:
    """Sensitivity of the loss to a layer's warmed-up adapters."""
    return inputs.array("adapter_fisher")


@policy(
    reads=("probe_fisher",),
    score="the same at freshly drawn adapters, B = 0 (`floe.score(..., probe=True)`): no warm-up",
    source="gradient probes of fresh adapters",
    measured="yes: behind `adapter_fisher` on both mixes after 60 steps; in an earlier run of one "
    "seed it chose 7 of the same 8 layers and trained alike",
)
def probe(inputs: PolicyInputs) -> Floats:
    """The same sensitivity at freshly drawn adapters."""
    return inputs.array("probe_fisher")


def _gates(scores: Scores) -> Floats | None:
    gates = scores.gate_gradient
    return None if gates is None else np.square(np.asarray(gates, np.float64)).sum(axis=0)


@policy(
    reads=("gate_gradient",),
    modules=_gates,
    score="sum_n g_n^2 of the gradient g_n of a gate of 1 that multiplies all adapters of a layer "
    "(the sum of their gates' gradients)",
    source="FLoE paper, Eq. 9, with gates on the adapters in place of masks on the weights",
    assumed="an adapter is worth keeping if closing it hurts the warm-up model; the first-order "
    "term left out, as in Eq. 6",
)
def gate_fisher_diagonal(inputs: PolicyInputs) -> Floats:
    """Fisher information of the gate that scales a layer's adapters."""
    gates = inputs.array("gate_gradient")
    if gates.ndim != 3 or gates.shape[1] != inputs.total or not len(gates):
        raise ValueError(
            f"gate_gradient must be [S, {inputs.total}, P] with S > 0, got {gates.shape}"
        )
    return np.asarray(np.square(gates.sum(axis=2)).sum(axis=0))


@policy(
    reads=FISHER,
    score="sum over heads and neurons of the mask Fisher (Eq. 9-11)",
    source="FLoE paper, abstract, which has layers of high Fisher information adapted; its "
    "Algorithm 1 goes the other way",
    assumed="heads and neurons add up in one unit (nats^2)",
    measured="yes: level with random layers after 100 steps",
)
def fisher_high(inputs: PolicyInputs) -> Floats:
    """Layers of high mask Fisher information."""
    return _of_units(inputs, FISHER)


@policy(
    reads=FISHER,
    score="minus `fisher_high`: layers that may be changed at little cost",
    source="FLoE paper, direction of Alg. 1",
    assumed="masks and costs left out",
    measured="yes: worse than random layers after 100 steps",
)
def fisher_low(inputs: PolicyInputs) -> Floats:
    """Layers of low mask Fisher information."""
    return -_of_units(inputs, FISHER)


@policy(
    reads=TAYLOR,
    score="sum over heads and neurons of the first-order Taylor cost",
    source="FLoE paper, Eq. 4-5, its cost used alone",
    assumed="layers whose weights the loss leans on are worth adapting",
    measured="yes: level with random layers after 100 steps",
)
def taylor_high(inputs: PolicyInputs) -> Floats:
    """Layers of high Taylor cost."""
    return _of_units(inputs, TAYLOR)


@policy(
    reads=TAYLOR,
    score="minus `taylor_high`",
    source="FLoE paper: layers of low cost are preferred",
    measured="yes: worse than random layers after 100 steps; it chose nearly the last layers",
)
def taylor_low(inputs: PolicyInputs) -> Floats:
    """Layers of low Taylor cost."""
    return -_of_units(inputs, TAYLOR)


@policy(
    reads=("adapter_fisher",),
    score="the K contiguous layers of the largest sum of `adapter_fisher` (of equal windows the "
    "one that starts lower), then those of the next windows",
    source='CLP, "The Structural Scalpel" (October 2025), abstract, which prunes a segment',
    assumed="all windows are tried, where the source learns a differentiable gate; keeping instead "
    "of pruning",
)
def segment(inputs: PolicyInputs) -> Floats:
    """The best contiguous layers."""
    values = inputs.array("adapter_fisher")
    starts = range(inputs.total - inputs.count + 1)
    # fsum: equal windows stay equal in whatever order they hold their scores
    return best_window([math.fsum(values[k : k + inputs.count]) for k in starts], inputs.count)


def _of_units(inputs: PolicyInputs, names: tuple[str, str]) -> Floats:
    heads, neurons = (inputs.array(name).sum(axis=1) for name in names)
    return np.asarray(heads + neurons)
