"""Policies that open and close the layers' warmed-up adapters: what each does for the model."""

from __future__ import annotations

from math import inf

from floe.selection.policies.registry import Measure, PolicyInputs, Statistic, policy
from floe.types import Floats

_HOME = "floe.importance.layer_statistics.adapters"


@policy(
    measure=Measure(
        f"{_HOME}:kl_to_full",
        {
            "kl_to_full": Statistic(
                "L", "nats: KL of all adapters' model to that of layer k's adapters alone"
            )
        },
    ),
    score=r"minus KL(all adapters \|\| layer k's alone) at the labels, mean over rows",
    source='"Distilling to hybrid attention models via KL-guided layer selection", '
    "arXiv 2512.20569, which restores a layer, trains briefly and ranks by the KL to the teacher",
    assumed="adapters are what is restored, all of them are the teacher, no training for each "
    "layer",
    cost="warm-up; 2 + L/2 forwards",
)
def kl_guided(inputs: PolicyInputs) -> Floats:
    """Layers whose adapters alone come nearest to the whole warmed-up model."""
    return -inputs.statistic("kl_to_full")


@policy(
    measure=Measure(
        f"{_HOME}:shapley",
        {
            "shapley": Statistic(
                "L", "nats: share of the loss that layer k's adapters take away", low=-inf
            )
        },
    ),
    score="Shapley value of layer k's adapters for v(S) = -loss with only S open, from a linear "
    "surrogate over sets of every size",
    source='"Pruning as a cooperative game", arXiv 2602.07804, abstract',
    assumed="adapters instead of layers; Shapley-kernel weights, under which all sets together "
    "give the exact value; two sets a layer",
    cost="warm-up; 2 + sets forwards",
)
def shapley(inputs: PolicyInputs) -> Floats:
    """What a layer's adapters add to sets of others."""
    return inputs.statistic("shapley")


@policy(
    measure=Measure(
        f"{_HOME}:forward_selection",
        {
            "forward_place": Statistic("L", "when layer k's adapters join, 1 = first"),
            "forward_loss": Statistic("L", "nats: the loss when they have joined"),
        },
    ),
    score="the order in which opening layers' adapters, one after the other, lowers the loss most",
    source="forward selection of regression, with adapters for variables",
    assumed="what the warm-up's adapters do together says what fresh ones on these layers would "
    "learn",
    measured="yes: no better than `adapter_fisher` after 60 and 200 steps (three seeds, two mixes)",
    cost="warm-up; L + L^2/4 forwards, or n (1 + L/2 - n/4) for the first n layers (`steps`)",
)
def forward_selection(inputs: PolicyInputs) -> Floats:
    """Each layer joins those already open."""
    return -inputs.statistic("forward_place")
