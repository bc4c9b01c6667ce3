"""Masks of a model: the FLoE paper's determination (Algorithm 1) and refinement (Algorithm 2).

L layers of H heads and I neurons; a unit is one of either, True means retained. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from floe import _native
from floe.selection.presets import Pairs, Preset, preset_of
from floe.selection.solvers import (
    Flags,
    Floats,
    MaskSolution,
    count,
    number,
    numbers,
    solve_mask,
    solve_two_class,
    solve_two_class_literal,
    totals,
)

if TYPE_CHECKING:
    from floe.importance.scores import Scores

_TOLERANCE = 1e-12  # relative; a bound met this closely is met

__all__ = [
    "Determination",
    "MaskSolution",
    "Refinement",
    "Units",
    "determine",
    "refine_masks",
    "solve_mask",
    "solve_two_class",
    "solve_two_class_literal",
]


@dataclass(frozen=True, eq=False)
class Refinement:
    """Refined masks [L, H] and [L, I] (True = retained), their totals, and the moves made."""

    head_mask: Flags
    neuron_mask: Flags
    value: float
    cost: float
    masked_value: float
    masked_cost: float
    repairs: int
    adds: int
    swaps: int
    converged: bool


@dataclass(frozen=True, eq=False)
class Units:
    """Value and cost of every head [L, H] and neuron [L, I]: finite float64 >= 0."""

    head_value: Floats
    neuron_value: Floats
    head_cost: Floats
    neuron_cost: Floats

    def __post_init__(self) -> None:
        for name in ("head_value", "neuron_value", "head_cost", "neuron_cost"):
            object.__setattr__(self, name, numbers(name, getattr(self, name), dimensions=2))
        heads, neurons = self.head_value.shape, self.neuron_value.shape
        if (self.head_cost.shape, self.neuron_cost.shape) != (heads, neurons) or heads[
            0
        ] != neurons[0]:
            raise ValueError(
                "values and costs must be [L, H] for heads and [L, I] for neurons, got "
                f"{heads} and {self.head_cost.shape}, {neurons} and {self.neuron_cost.shape}"
            )

    @property
    def value(self) -> Floats:
        """Values of all heads, layer by layer, then of all neurons."""
        return np.concatenate([self.head_value.ravel(), self.neuron_value.ravel()])

    @property
    def cost(self) -> Floats:
        """Costs in the same order."""
        return np.concatenate([self.head_cost.ravel(), self.neuron_cost.ravel()])

    def layer(self, index: int) -> Units:
        """The units of one layer, with L = 1."""
        one = slice(index, index + 1)
        return Units(
            self.head_value[one], self.neuron_value[one], self.head_cost[one], self.neuron_cost[one]
        )

    def split(self, mask: Flags) -> tuple[Flags, Flags]:
        """A mask of all units as [L, H] and [L, I]."""
        heads = self.head_value.size
        return mask[:heads].reshape(self.head_value.shape), mask[heads:].reshape(
            self.neuron_value.shape
        )


def refine_masks(
    units: Units,
    budget: float,
    head_mask: ArrayLike,
    neuron_mask: ArrayLike,
    *,
    pairs: Pairs = "same_layer_cross",
    literal: bool = False,
    max_moves: int = 1_000_000,
    progress: Callable[[int], object] | None = None,
) -> Refinement:
    """Improve masks by single moves under unit costs, the best move first (Algorithm 2).

    First units of least value / cost are masked while the cost exceeds the budget. Then the move
    that gains most is made until none gains more than 1e-12 of the value: retain a masked unit
    that fits, or let it take the place of a retained one. Ties: more budget freed, then the lower
    retained, then the lower masked index (heads of all layers come before neurons). Never ends
    below the repaired start, and never above the budget.

    Args:
        units: values and costs, L layers.
        budget: >= 0; infinity means no limit. Not used if ``literal``.
        head_mask: [L, H], neuron_mask: [L, I]; nonzero = retained. Not changed.
        pairs: what may swap: a head and a neuron of one layer (Eq. 14), any two of one layer, any.
        literal: Algorithm 2 as printed: a masked unit is retained for a retained one of less value
            and no more cost. It never spends what is left of a budget.
        max_moves: where to stop at the latest; see ``converged``.
        progress: told the moves made so far about every 100 ms; what it raises ends the call.

    Raises:
        ValueError: shapes that differ, a negative or non-finite number, an unknown ``pairs``.
        TypeError: no real numbers.
    """
    start = np.concatenate(
        [
            _retained("head_mask", head_mask, units.head_value.shape),
            _retained("neuron_mask", neuron_mask, units.neuron_value.shape),
        ]
    )
    layers, heads = units.head_value.shape
    found = _native.refine(
        units.value,
        units.cost,
        number("budget", budget),
        start,
        layers,
        heads,
        units.neuron_value.shape[1],
        pairs,
        literal,
        count("max_moves", max_moves),
        progress,
    )
    kept_heads, kept_neurons = units.split(found["mask"])
    return Refinement(
        kept_heads,
        kept_neurons,
        **totals(found),
        repairs=found["repairs"],
        adds=found["adds"],
        swaps=found["swaps"],
        converged=found["converged"],
    )


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
    units = Units(
        scores.head_fisher, scores.neuron_fisher, scores.head_taylor, scores.neuron_taylor
    )
    limit = fraction * float(units.head_cost.sum() + units.neuron_cost.sum())
    if chosen.granularity == "global":
        return _determine(units, chosen, limit)
    layers = len(units.head_value)
    parts = [_determine(units.layer(i), chosen, limit / layers) for i in range(layers)]
    return _joined(parts)


def _determine(units: Units, preset: Preset, limit: float) -> Determination:
    """One budget's masks. The certificate is about the costs of the last stage that ran."""
    literal = preset.objective == "alg1_literal"
    solution = _first_masks(units, preset, limit)
    if preset.refine == "none":
        heads, neurons = units.split(solution.mask)
        bound = solution.upper_bound
        certificate = _certificate(solution, bound, solution.optimal, limit, literal)
        return Determination(heads, neurons, certificate, _moves(None))
    refined = _refined(units, preset, limit, solution.mask)
    if literal:
        bound = refined.value + refined.masked_value  # printed, masking nothing is feasible
    else:
        bound = solve_mask(units.value, units.cost, limit, max_nodes=0).upper_bound
    bound = max(bound, refined.value)
    optimal = bound - refined.value <= _TOLERANCE * bound
    certificate = _certificate(refined, bound, optimal, limit, literal)
    return Determination(refined.head_mask, refined.neuron_mask, certificate, _moves(refined))


def _first_masks(units: Units, preset: Preset, limit: float) -> MaskSolution:
    if preset.cost == "unit":
        return solve_mask(units.value, units.cost, limit)
    head_cost, neuron_cost = _mean(units.head_cost), _mean(units.neuron_cost)
    if preset.cost == "pooled":
        head_cost = neuron_cost = _mean(units.cost)
    solve = solve_two_class_literal if preset.objective == "alg1_literal" else solve_two_class
    return solve(
        units.head_value.ravel(), units.neuron_value.ravel(), head_cost, neuron_cost, limit
    )


def _refined(units: Units, preset: Preset, limit: float, mask: Flags) -> Refinement:
    literal = preset.refine == "alg2_literal"
    starts = [mask]
    if preset.start == "better":
        starts.append(solve_mask(units.value, units.cost, limit, max_nodes=0).mask)
    results = [
        refine_masks(units, limit, *units.split(start), pairs=preset.pairs, literal=literal)
        for start in starts
    ]
    return max(results, key=lambda refined: refined.value)  # the first of equals


def _certificate(
    found: MaskSolution | Refinement, bound: float, optimal: bool, limit: float, literal: bool
) -> dict[str, Any]:
    return {
        "value": found.value,
        "cost": found.masked_cost if literal else found.cost,
        "budget": limit,
        "upper_bound": bound,
        "gap": bound - found.value,
        "optimal": optimal,
    }


def _moves(refined: Refinement | None) -> dict[str, int]:
    if refined is None:
        return {"repairs": 0, "adds": 0, "swaps": 0}
    return {"repairs": refined.repairs, "adds": refined.adds, "swaps": refined.swaps}


def _mean(costs: Floats) -> float:
    return float(costs.mean()) if costs.size else 0.0


def _retained(name: str, mask: ArrayLike, shape: tuple[int, ...]) -> Flags:
    found = np.asarray(mask)
    if found.dtype.kind not in "bfiu":
        raise TypeError(f"{name} must be an array of numbers or booleans, got dtype {found.dtype}")
    if found.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {found.shape}")
    return np.ascontiguousarray(found != 0).ravel()


def _joined(parts: list[Determination]) -> Determination:
    certificate: dict[str, Any] = {
        key: sum(part.certificate[key] for part in parts)
        for key in ("value", "cost", "budget", "upper_bound", "gap")
    }
    certificate["optimal"] = all(part.certificate["optimal"] for part in parts)
    return Determination(
        np.concatenate([part.head_mask for part in parts]),
        np.concatenate([part.neuron_mask for part in parts]),
        certificate,
        {move: sum(part.moves[move] for part in parts) for move in ("repairs", "adds", "swaps")},
    )
