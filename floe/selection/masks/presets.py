"""Readings of the FLoE paper's mask stages, as named sets of options.

The paper leaves open what the budget limits, at which scope, and at which cost (Eq. 3, 5, 12 and
Algorithms 1 and 2 do not agree), and the readings rank layers differently, some nearly in opposite
order. So each is named, and none is called *the* method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Objective = Literal["retain", "alg1_literal"]
Granularity = Literal["global", "layer"]
Cost = Literal["class_mean", "unit"]
Refine = Literal["none", "swap", "alg2_literal"]
Pairs = Literal["same_layer_cross", "same_layer", "all"]


@dataclass(frozen=True)
class Preset:
    """Options of the mask stages: determination, refinement and tuning.

    Attributes:
        name: as reports show it.
        objective: "retain" keeps the most Fisher information within a Taylor budget (Eq. 3, 5, 11);
            "alg1_literal" is Algorithm 1 as printed: it masks the least, and the budget limits
            what is masked.
        granularity: one budget for the model ("global") or the same absolute one for every layer
            ("layer"). A budget relative to each layer would mask the same share everywhere and
            rank nothing.
        cost: in determination, every head costs the mean head and every neuron the mean neuron
            ("class_mean"), or each unit its own Taylor score ("unit").
        refine: "swap" repairs the budget in unit costs, then adds and swaps units while that
            gains; "alg2_literal" is Algorithm 2 as printed; "none".
        pairs: which units may swap; "same_layer_cross" is Eq. 14.
        first_order: a unit's value is what masking it is predicted to cost in full, first-order
            term included: Eq. 6 before the paper drops it, because the adapters converged (the
            masks did not). Needs the scores' head_mean and neuron_mean.
        ridge, bound: of the tuning stage (Eq. 16-21); see floe.selection.masks.tuning.

    Raises:
        ValueError: an unknown option, or options that contradict each other.
    """

    name: str
    objective: Objective = "retain"
    granularity: Granularity = "global"
    cost: Cost = "class_mean"
    refine: Refine = "none"
    pairs: Pairs = "same_layer_cross"
    first_order: bool = False
    ridge: float = 1e-3
    bound: float = 10.0

    def __post_init__(self) -> None:
        for option, choices in _CHOICES.items():
            if getattr(self, option) not in choices:
                raise ValueError(
                    f"{option} must be one of {choices}, got {getattr(self, option)!r}"
                )
        if self.objective == "alg1_literal" and self.cost == "unit":
            raise ValueError("objective 'alg1_literal' needs one cost per class, got cost 'unit'")
        if (self.objective, self.refine) in (("retain", "alg2_literal"), ("alg1_literal", "swap")):
            raise ValueError(
                f"refine {self.refine!r} spends another budget than objective {self.objective!r}"
            )


_CHOICES = {
    "objective": get_args(Objective),
    "granularity": get_args(Granularity),
    "cost": get_args(Cost),
    "refine": get_args(Refine),
    "pairs": get_args(Pairs),
}

GLOBAL = Preset("global", refine="swap")
"""One budget for the model, mean costs in determination, unit costs in refinement.

Follows the objective of Eq. 3 with the cost of Eq. 5, which sums the Taylor importance of what is
retained, and the loss of Eq. 11; the "global budget C" in the text below Eq. 12, the one Taylor
score per head and per neuron that Algorithm 1 takes as input, and the unit costs t_p, t_q of Eq. 15
in refinement. Departs from Eq. 12, whose constraint sums over the masked units and is met by
masking nothing. Masks low-Fisher units, so it tends to choose layers of low mask-Fisher.
"""

EXACT = Preset("exact", cost="unit")
"""Eq. 12 with unit costs, solved as a knapsack with a certificate; nothing is left to refine.

Follows Eq. 12's own cost T_{k,i} of every unit, with the retained sum of Eq. 5, and the text after
it that calls this a dynamic programming problem; departs from the "greedy solution" that the text
then takes to save memory, because the exact one fits. Masks units of low Fisher information *and*
high Taylor score.
"""

PAPER_LAYER = Preset(
    "paper_layer", objective="alg1_literal", granularity="layer", refine="alg2_literal"
)
"""Algorithms 1 and 2 as printed, layer by layer, under one common absolute budget.

Follows Eq. 12 and Eq. 13 as printed (the budget limits the masked cost), "for each layer k" and
"within the same layer" in the text before Algorithm 1, the candidates "at the same layer" of Eq.
14, and the valid swaps below Eq. 15. That every layer gets the same absolute budget is assumed: the
paper does not say how C is divided. Ranks almost exactly by ascending Taylor score.
"""

ALG1_LITERAL = Preset("alg1_literal", objective="alg1_literal")
"""Algorithm 1 as printed, over the whole model. For the audit of readings.

Follows lines 3 to 15 of Algorithm 1: the n heads and as many neurons of least Fisher information as
the budget pays for are masked, whichever n loses least. Where the budget can be spent on neurons
alone it returns the masks of the retaining reading at the complementary budget; above that it masks
every neuron and no head.
"""

PRESETS: dict[str, Preset] = {p.name: p for p in (GLOBAL, EXACT, PAPER_LAYER, ALG1_LITERAL)}


def preset_of(preset: str | Preset) -> Preset:
    """The preset of that name, or the preset itself.

    Raises:
        ValueError: no preset has that name.
    """
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
    return PRESETS[preset]
