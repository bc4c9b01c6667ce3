"""The FLoE paper's masks: readings of it (presets), determination and refinement (Algorithms 1, 2).

L layers of H heads and I neurons; a unit is one of either, True means retained. Needs no torch.

The paper leaves open what the budget limits, at which scope, and at which cost (Eq. 3, 5, 12 and
Algorithms 1 and 2 do not agree), and the readings rank layers differently, some nearly in opposite
order. So each has a name, and none is called *the* method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

import numpy as np

from floe.errors import require
from floe.selection.masks.solvers import (
    MaskSolution,
    Pairs,
    Refinement,
    Units,
    number,
    refine_masks,
    solve_mask,
    solve_two_class,
    solve_two_class_literal,
)
from floe.selection.ranking import layer_score
from floe.types import Flags, Floats

if TYPE_CHECKING:
    from floe.importance.scores import Scores

BUDGET_PATH = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # the FLoE paper gives no value for its budget
_TOLERANCE = 1e-12  # relative; a bound met this closely is met
_MOVES = ("repairs", "adds", "swaps")


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
    objective: Literal["retain", "alg1_literal"] = "retain"
    granularity: Literal["global", "layer"] = "global"
    cost: Literal["class_mean", "unit"] = "class_mean"
    refine: Literal["none", "swap", "alg2_literal"] = "none"
    pairs: Pairs = "same_layer_cross"
    first_order: bool = False
    ridge: float = 1e-3
    bound: float = 10.0

    def __post_init__(self) -> None:
        for option, kind in get_type_hints(Preset).items():
            choices, value = get_args(kind), getattr(self, option)
            if choices and value not in choices:
                raise ValueError(f"{option} must be one of {choices}, got {value!r}")
        if self.objective == "alg1_literal" and self.cost == "unit":
            raise ValueError("objective 'alg1_literal' needs one cost per class, got cost 'unit'")
        if (self.objective, self.refine) in (("retain", "alg2_literal"), ("alg1_literal", "swap")):
            raise ValueError(
                f"refine {self.refine!r} spends another budget than objective {self.objective!r}"
            )


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
    require(preset in PRESETS, f"preset must be one of {sorted(PRESETS)}", preset)
    return PRESETS[preset]


@dataclass(frozen=True, eq=False)
class Determination:
    """Binary masks of a model, [L, H] and [L, I] (True = retained), with their certificate.

    certificate holds value, cost, budget, upper_bound, gap and optimal, summed over the layers if
    each had a budget of its own; ``cost`` is what the budget limits, so for the printed algorithms
    the cost of the masked units. moves counts the repairs, adds and swaps of the refinement.
    """

    head_mask: Flags
    neuron_mask: Flags
    certificate: dict[str, Any]
    moves: dict[str, int]


def determine(
    scores: Scores, preset: str | Preset = "global", budget: float = 0.5
) -> Determination:
    """Determine and refine the masks of a model under a preset (stages 1 and 2 of the FLoE paper).

    Args:
        scores: head_fisher [L, H], neuron_fisher [L, I] are the values, head_taylor and
            neuron_taylor the costs.
        preset: a name or a Preset.
        budget: fraction of the total Taylor mass, in (0, 1]; the paper gives none. With
            granularity "layer" every layer gets the same absolute share, budget * total / L.

    Raises:
        ValueError: an unknown preset, a budget outside (0, 1], scores that are negative or not
            finite.
    """
    chosen = preset_of(preset)
    fraction = number("budget", budget)
    require(0 < fraction <= 1, "budget must be a fraction in (0, 1]", fraction)
    values = _values(scores, chosen.first_order)
    units = Units(*values, scores.head_taylor, scores.neuron_taylor)
    with np.errstate(over="ignore"):
        limit = fraction * float(units.head_cost.sum() + units.neuron_cost.sum())
    if math.isinf(limit):
        raise ValueError("Taylor scores must sum to a finite number, got more")
    if chosen.granularity == "global":
        return _determine(units, chosen, limit)
    layers = len(units.head_value)
    return _joined([_determine(units.layer(i), chosen, limit / layers) for i in range(layers)])


def budget_path_of(budgets: Sequence[float]) -> tuple[float, ...]:
    """Budgets to average over, ascending.

    Raises:
        ValueError: no budget, or one that is given twice. TypeError: no number.
    """
    path = tuple(sorted(number("budget_path", budget) for budget in budgets))
    if not path or len(set(path)) != len(path):
        raise ValueError(f"budget_path must hold budgets, each once, got {list(budgets)}")
    return path


def masked_shares(
    scores: Scores, preset: str | Preset = "global", budgets: Sequence[float] = BUDGET_PATH
) -> Floats:
    """How much of each layer is masked under each budget, [budgets, L]; one solve for each.

    The share is half the masked share of the heads and half that of the neurons ("sparsity" of
    ranking.layer_score), of binary masks. Arguments and errors as in :func:`determine` and
    :func:`budget_path_of`.
    """
    masks = [determine(scores, preset, budget) for budget in budget_path_of(budgets)]
    return np.array([layer_score(m.head_mask, m.neuron_mask, how="sparsity") for m in masks])


def path_score(
    scores: Scores, preset: str | Preset = "global", budgets: Sequence[float] = BUDGET_PATH
) -> Floats:
    """The mean of :func:`masked_shares` over the budgets, [L]; spares choosing one of them."""
    return np.asarray(masked_shares(scores, preset, budgets).mean(axis=0))


def _values(scores: Scores, first_order: bool) -> tuple[Floats, Floats]:
    """What masking each unit costs, in Fisher information: [L, H] and [L, I].

    Over S rows the loss rises by tau / 2 - sum_n g_n when a mask goes from 1 to 0 (Eq. 6 with the
    empirical Fisher for the Hessian); twice that, or 0 where masking is predicted to help.
    """
    if not first_order:
        return scores.head_fisher, scores.neuron_fisher
    rows, values = scores.meta.get("rows"), []
    for kind in ("head", "neuron"):
        mean = getattr(scores, f"{kind}_mean")
        if mean is None or rows is None:
            raise ValueError(
                f"first_order needs scores.{kind}_mean, got None; measure it with "
                "floe.score(..., first_order=True)"
            )
        values.append(np.maximum(0.0, getattr(scores, f"{kind}_fisher") - 2 * int(rows) * mean))
    return values[0], values[1]


def _determine(units: Units, preset: Preset, limit: float) -> Determination:
    """One budget's masks. The certificate is about the costs of the last stage that ran."""
    literal = preset.objective == "alg1_literal"
    if preset.cost == "unit":
        first = solve_mask(units.value, units.cost, limit)
    else:
        solve = solve_two_class_literal if literal else solve_two_class
        values = units.head_value.ravel(), units.neuron_value.ravel()
        costs = units.head_cost, units.neuron_cost
        head_cost, neuron_cost = (float(cost.mean()) if cost.size else 0.0 for cost in costs)
        first = solve(*values, head_cost, neuron_cost, limit)
    last: MaskSolution | Refinement = first
    masks, moves = units.split(first.mask), dict.fromkeys(_MOVES, 0)
    bound, optimal = first.upper_bound, first.optimal
    if preset.refine != "none":
        printed = preset.refine == "alg2_literal"
        last = refine_masks(units, limit, *masks, pairs=preset.pairs, literal=printed)
        masks = last.head_mask, last.neuron_mask
        moves = {move: getattr(last, move) for move in _MOVES}
        if literal:
            bound = last.value + last.masked_value  # printed, masking nothing is feasible
        else:
            bound = solve_mask(units.value, units.cost, limit, max_nodes=0).upper_bound
        bound = max(bound, last.value)
        optimal = bound - last.value <= _TOLERANCE * bound
    certificate = {
        "value": last.value,
        "cost": last.masked_cost if literal else last.cost,
        "budget": limit,
        "upper_bound": bound,
        "gap": bound - last.value,
        "optimal": optimal,
    }
    return Determination(*masks, certificate, moves)


def _joined(parts: list[Determination]) -> Determination:
    certificates = [part.certificate for part in parts]
    certificate = {key: sum(each[key] for each in certificates) for key in certificates[0]}
    return Determination(
        np.concatenate([part.head_mask for part in parts]),
        np.concatenate([part.neuron_mask for part in parts]),
        certificate | {"optimal": all(each["optimal"] for each in certificates)},
        {move: sum(part.moves[move] for part in parts) for move in _MOVES},
    )
