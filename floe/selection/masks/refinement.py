"""Refinement of masks by single moves: the FLoE paper's Algorithm 2. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from floe import _native
from floe.selection.masks.presets import Pairs
from floe.selection.masks.solvers import count, flags, number, numbers, totals
from floe.types import Flags, Floats


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
        units: values and costs, L layers; values sum to less than 2**1021, and so do costs if the
            budget is finite.
        budget: >= 0; infinity means no limit. Not used if ``literal``.
        head_mask: [L, H], neuron_mask: [L, I]; nonzero = retained. Not changed.
        pairs: what may swap: a head and a neuron of one layer (Eq. 14), any two of one layer, any.
        literal: Algorithm 2 as printed: a masked unit is retained for a retained one of less value
            and no more cost. It never spends what is left of a budget.
        max_moves: where to stop at the latest; see ``converged``.
        progress: told the moves made so far about every 100 ms; what it raises ends the call.

    Raises:
        ValueError: shapes that differ, a negative or non-finite number or sum, an unknown
            ``pairs``.
        TypeError: no real numbers.
    """
    start = np.concatenate(
        [
            flags("head_mask", head_mask, units.head_value.shape).ravel(),
            flags("neuron_mask", neuron_mask, units.neuron_value.shape).ravel(),
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
