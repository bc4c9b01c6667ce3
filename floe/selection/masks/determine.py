"""Masks of a model: the FLoE paper's determination (Algorithm 1) and refinement (Algorithm 2).

L layers of H heads and I neurons; a unit is one of either, True means retained. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from floe.selection.masks.presets import Preset, preset_of
from floe.selection.masks.solvers import (
    MaskSolution,
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
    if not 0 < fraction <= 1:
        raise ValueError(f"budget must be a fraction in (0, 1], got {fraction}")
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
    first = _first_masks(units, preset, limit)
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


def _first_masks(units: Units, preset: Preset, limit: float) -> MaskSolution:
    if preset.cost == "unit":
        return solve_mask(units.value, units.cost, limit)
    costs = units.head_cost, units.neuron_cost
    head_cost, neuron_cost = (float(cost.mean()) if cost.size else 0.0 for cost in costs)
    solve = solve_two_class_literal if preset.objective == "alg1_literal" else solve_two_class
    values = units.head_value.ravel(), units.neuron_value.ravel()
    return solve(*values, head_cost, neuron_cost, limit)


def _joined(parts: list[Determination]) -> Determination:
    certificates = [part.certificate for part in parts]
    certificate = {key: sum(each[key] for each in certificates) for key in certificates[0]}
    return Determination(
        np.concatenate([part.head_mask for part in parts]),
        np.concatenate([part.neuron_mask for part in parts]),
        certificate | {"optimal": all(each["optimal"] for each in certificates)},
        {move: sum(part.moves[move] for part in parts) for move in _MOVES},
    )
