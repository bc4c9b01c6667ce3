"""Which units to retain under a cost budget (FLoE paper, Eq. 12, Algorithms 1 and 2).

A unit is a head or a neuron. Its value is its Fisher score, what is lost when it is masked; its
cost is its Taylor score, what retaining it takes from the budget. True always means retained.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from floe import _native
from floe.errors import require
from floe.types import Array, Flags, Floats

Pairs = Literal["same_layer_cross", "same_layer", "all"]
DEFAULT_NODES = 20_000_000  # about a second; a count, so that every machine stops at the same masks


@dataclass(frozen=True, eq=False)
class MaskSolution:
    """Masks and how good they are.

    Attributes:
        mask: [n] bool, True = retained; for two classes the heads, then the neurons.
        value, cost: totals of the retained units. ``cost`` exceeds the budget by rounding at most
            (1e-12 relative).
        masked_value, masked_cost: totals of the masked units. A cost is infinite if its sum is
            beyond the range of floats.
        upper_bound: no feasible choice retains more value. It is ``lambda_ * budget + sum(max(0,
            value - lambda_ * cost))`` over the units that fit the budget on their own, the
            linear-programming bound. For Algorithm 1 as printed it is the value of everything:
            masking nothing is feasible there.
        lambda_: value per cost of the first unit that did not fit; 0 if all fit.
        optimal: proven; then a positive gap only says that the linear bound is not attainable.
        head_mask, neuron_mask: the two parts of ``mask``; None if the units have no classes.
        nodes: states the exact search examined.
    """

    mask: Flags
    value: float
    cost: float
    masked_value: float
    masked_cost: float
    upper_bound: float
    lambda_: float
    optimal: bool
    head_mask: Flags | None = None
    neuron_mask: Flags | None = None
    nodes: int = 0

    @property
    def gap(self) -> float:
        """upper_bound - value, >= 0."""
        return self.upper_bound - self.value


def solve_mask(
    value: ArrayLike, cost: ArrayLike, budget: float, *, max_nodes: int = DEFAULT_NODES
) -> MaskSolution:
    """Retain the most value at a total cost of at most ``budget``.

    Eq. 12 of the FLoE paper, read with Eq. 3, 5 and 11: a 0/1 knapsack problem.

    Greedy by value / cost, the linear-programming bound, then an exact search among the units
    whose reduced cost is below the gap. Ties: zero costs first, then larger value, then lower
    index; the greedy choice stays unless something better is found. Equal input gives equal masks.

    Args:
        value, cost: [n], finite, >= 0; values sum to less than 2**1021. float64 arrays are not
            copied.
        budget: >= 0, in the unit of ``cost``; infinity means no limit.
        max_nodes: states the search may examine; 0 returns the greedy choice with its bound.

    Raises:
        ValueError: a negative or non-finite number (names the first unit) or sum, lengths that
            differ.
        TypeError: no real numbers.
    """
    nodes = count("max_nodes", max_nodes)
    values, costs, limit = numbers("value", value), numbers("cost", cost), number("budget", budget)
    return _solution(_native.solve_knapsack(values, costs, limit, nodes, 0.0, None))


def solve_two_class(
    head_value: ArrayLike,
    neuron_value: ArrayLike,
    head_cost: float,
    neuron_cost: float,
    budget: float,
) -> MaskSolution:
    """Retain the most value when every head costs ``head_cost`` and every neuron ``neuron_cost``.

    Algorithm 1 in the retaining reading, exact, O(n): tries every number n of heads with as many
    neurons as the rest of the budget pays for. Units are masked in ascending (value, index); of
    equally good n the smallest is taken.

    Args:
        head_value: [H], neuron_value: [I]; finite, >= 0, each summing to less than 2**1021.
            Either may be empty.
        head_cost, neuron_cost: finite, >= 0.
        budget: >= 0; infinity means no limit. 0.3 pays for three units of 0.1 in spite of binary
            floats.

    Raises:
        ValueError: a negative or non-finite number; names the first unit.
        TypeError: no real numbers.
    """
    return _two_class((head_value, neuron_value), (head_cost, neuron_cost), budget, literal=False)


def solve_two_class_literal(
    head_value: ArrayLike,
    neuron_value: ArrayLike,
    head_cost: float,
    neuron_cost: float,
    budget: float,
) -> MaskSolution:
    """Algorithm 1 as printed, for the audit of readings: the budget limits the *masked* cost.

    For every affordable number n of heads it masks the n heads and the f(n) neurons of least
    value, f(n) as many as the budget still pays for, and takes the n whose masked value is least
    (the smallest of equals). ``masked_value`` is its loss, ``masked_cost`` its used budget;
    ``value`` and ``cost`` are still those of the retained units. Arguments and errors as in
    :func:`solve_two_class`.
    """
    return _two_class((head_value, neuron_value), (head_cost, neuron_cost), budget, literal=True)


def _two_class(
    values: tuple[ArrayLike, ArrayLike], costs: tuple[float, float], budget: float, *, literal: bool
) -> MaskSolution:
    head_value, neuron_value = numbers("head_value", values[0]), numbers("neuron_value", values[1])
    head_cost, neuron_cost = number("head_cost", costs[0]), number("neuron_cost", costs[1])
    limit = number("budget", budget)
    result = _native.solve_two_class(
        head_value, neuron_value, head_cost, neuron_cost, limit, literal
    )
    return _solution(
        result,
        mask=np.concatenate([result["head_mask"], result["neuron_mask"]]),
        optimal=result["masked_value"] == 0 if literal else True,
    )


def _solution(result: Any, **more: Any) -> MaskSolution:
    named = {"lambda_" if name == "lambda" else name: value for name, value in result.items()}
    return MaskSolution(**named, **more)


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
        same = (self.head_cost.shape, self.neuron_cost.shape) == (heads, neurons)
        if not same or heads[0] != neurons[0]:
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
        arrays = self.head_value, self.neuron_value, self.head_cost, self.neuron_cost
        return Units(*(array[index : index + 1] for array in arrays))

    def split(self, mask: Flags) -> tuple[Flags, Flags]:
        """A mask of all units as [L, H] and [L, I]."""
        heads, neurons = np.split(mask, [self.head_value.size])
        return heads.reshape(self.head_value.shape), neurons.reshape(self.neuron_value.shape)


def refine_masks(
    units: Units,
    budget: float,
    head_mask: ArrayLike,
    neuron_mask: ArrayLike,
    *,
    pairs: Pairs = "same_layer_cross",
    literal: bool = False,
    max_moves: int = 1_000_000,
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

    Raises:
        ValueError: shapes that differ, a negative or non-finite number or sum, an unknown
            ``pairs``.
        TypeError: no real numbers.
    """
    heads = flags("head_mask", head_mask, units.head_value.shape)
    neurons = flags("neuron_mask", neuron_mask, units.neuron_value.shape)
    sizes = heads.shape[0], heads.shape[1], neurons.shape[1]
    start, limit = np.concatenate([heads.ravel(), neurons.ravel()]), number("budget", budget)
    most = count("max_moves", max_moves)
    arguments = (units.value, units.cost, limit, start, *sizes, pairs, literal, most, None)
    result: dict[str, Any] = dict(_native.refine(*arguments))
    return Refinement(*units.split(result.pop("mask")), **result)


def numbers(name: str, array: ArrayLike, dimensions: int = 1) -> Floats:
    """``array`` as aligned C-contiguous float64, copied only if it is not that already.

    Raises:
        TypeError: not an array of real numbers. ValueError: of another number of dimensions.
    """
    plain = _plain(name, array)
    if plain.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be an array of real numbers, got dtype {plain.dtype}")
    if plain.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimension(s), got shape {plain.shape}")
    with np.errstate(over="ignore"):  # of a wider type: the solvers refuse infinity by position
        return np.require(plain, np.float64, ["C", "A"])


def flags(name: str, mask: ArrayLike, shape: tuple[int, ...]) -> Flags:
    """A mask as a C-contiguous copy; nonzero = True.

    Raises:
        TypeError: not an array of numbers or booleans. ValueError: of another shape, or with NaN.
    """
    plain = _plain(name, mask)
    if plain.dtype.kind not in "bfiu":
        raise TypeError(f"{name} must be an array of numbers or booleans, got dtype {plain.dtype}")
    require(plain.shape == shape, f"{name} must have shape {shape}", plain.shape)
    if np.isnan(plain).any():
        raise ValueError(f"{name} must be finite, got NaN")
    return np.ascontiguousarray(plain != 0)


def _plain(name: str, array: ArrayLike) -> Array:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a plain array, got a masked one, whose mask would be lost")
    return np.asarray(array)


def number(name: str, value: Any) -> float:
    """``value`` as float; the solvers check its range.

    Raises:
        TypeError: not a real number. ValueError: beyond the range of floats.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be in the range of floats, got a larger number") from None


def count(name: str, value: Any) -> int:
    """``value`` as int >= 0.

    Raises:
        TypeError: not an integer. ValueError: negative or beyond 64 bits.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not 0 <= int(value) < 2**63:
        raise ValueError(f"{name} must be in [0, 2**63), got {value}")
    return int(value)
