"""Where adapters go, and how large they are: placements, and rank and experts under one budget.

Rank r and M experts of every layer are one option of a list that all layers share; (0, 0) is no
adapter. Which options to take is a multiple-choice knapsack problem, solved exactly. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from floe import _native
from floe.artifacts.schema import IF_SET, Layers, Text, Whole
from floe.errors import require, require_all
from floe.selection.masks.solvers import count, number, numbers, solve_mask
from floe.selection.policies import POLICIES
from floe.types import Floats, Integers

if TYPE_CHECKING:
    from floe.importance.scores import Scores

Options = Sequence[tuple[int, int]]

MAX_TABLE_BYTES = 2**30  # of the dynamic program
_TOLERANCE = 1e-12  # relative; a bound met this closely is met


@dataclass(frozen=True)
class Placement:
    """The adapted layers; where given, which of their projections, and of what size.

    ``Placement(layers)`` adapts whole layers, :meth:`of_modules` single projections, and
    :meth:`of_sizes` gives each layer its rank and experts.

    Attributes:
        layers: that carry adapters, ascending, 0-based.
        modules: layer -> names of its adapted projections; empty: all target projections of each.
        sizes: layer -> (rank, experts); empty: one size for all.
    """

    layers: Layers
    modules: Mapping[int, tuple[Text, ...]] = field(default_factory=dict, metadata=IF_SET)
    sizes: Mapping[int, tuple[Whole, Whole]] = field(default_factory=dict, metadata=IF_SET)

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must be ascending and at least one, got {self.layers}")
        for name in ("modules", "sizes"):
            given = sorted(getattr(self, name))
            if given and given != list(self.layers):
                raise ValueError(f"{name} must be of the layers {self.layers}, got {given}")

    @property
    def patterns(self) -> dict[str, Any]:
        """The arguments of FloeConfig that say so."""
        said: dict[str, Any] = {"layers": list(self.layers)}
        if self.modules:
            said["layer_modules"] = {str(k): list(names) for k, names in self.modules.items()}
        if self.sizes:
            said["rank_pattern"] = {str(k): rank for k, (rank, _) in self.sizes.items()}
            said["expert_pattern"] = {str(k): experts for k, (_, experts) in self.sizes.items()}
        return said

    @classmethod
    def of_modules(
        cls, scores: ArrayLike, parameters: ArrayLike, budget: int, names: Sequence[str]
    ) -> Placement:
        """Adapters on the (layer, projection) pairs of most score that fit a budget together.

        Exact, as a 0/1 knapsack problem (see solvers.solve_mask): unlike the front of a ranking it
        weighs what a projection takes. A pair of score 0 is never chosen. Ties: free pairs first,
        then the larger score, the lower layer, the earlier name.

        Args:
            scores: [L, P] finite, >= 0; see :func:`module_scores`.
            parameters: [L, P] adapter parameters, integers >= 0.
            budget: adapter parameters in all, >= 0 and below 2**39 unless there are fewer.
            names: of the P projections.

        Raises:
            ValueError: shapes that do not fit, a negative number, names that repeat, or a budget
                that pays for no projection.
            TypeError: no numbers, or parameters that are no integers.
        """
        values = numbers("module_scores", scores, dimensions=2)
        sizes = _integers("parameters", parameters)
        if sizes.shape != values.shape or not len(names) == len(set(names)) == values.shape[1]:
            raise ValueError(
                "module_scores and parameters must be [L, P] and names P different ones, got "
                f"{values.shape}, {sizes.shape} and {list(names)}"
            )
        limit, whole = count("budget", budget), int(sizes.sum(dtype=object))
        if 2**39 <= limit < whole:  # the solver's tolerance is a parameter there
            raise ValueError(
                "budget must be below 2**39 parameters where it limits them, "
                f"got {limit} of {whole}"
            )
        costs = sizes.astype(np.float64).ravel()
        solution = solve_mask(values.ravel(), costs, min(limit, whole))
        chosen = solution.mask.reshape(values.shape) & (values > 0)
        modules = {
            layer: tuple(name for name, taken in zip(names, row, strict=True) if taken)
            for layer, row in enumerate(chosen)
            if row.any()
        }
        if not modules:
            raise ValueError(f"budget must pay for a projection of score above 0, got {budget}")
        return cls(tuple(modules), modules)

    @classmethod
    def of_sizes(
        cls,
        layer_scores: ArrayLike,
        options: Options,
        costs: ArrayLike,
        budget: int,
        gain: ArrayLike | Saturating,
    ) -> Placement:
        """Rank and experts of each layer; see :func:`allocate`. Layers of option (0, 0) have none.

        Costs are counted in steps of 1 / 10,000 of the budget where their own divisor is finer, so
        that the table stays small; the result is within the budget either way.

        Raises:
            ValueError: as there, or a budget that pays for no adapter.
        """
        divisor = max(1, int(np.gcd.reduce(np.asarray(costs), axis=None)))
        scale = max(1, budget // (divisor * 10_000))
        index = allocate(layer_scores, options, costs, budget, gain, scale=scale).index
        sizes = {layer: options[j] for layer, j in enumerate(index) if all(options[j])}
        if not sizes:
            raise ValueError(
                f"budget must pay for the adapter of a layer of score > 0, got {budget}"
            )
        return cls(tuple(sizes), sizes=sizes)


def module_scores(scores: Scores, policy: str) -> Floats:
    """What ``policy`` says of every adapted projection, [L, P]; P as in meta["adapter_modules"].

    Raises:
        ValueError: a policy that scores whole layers only, or scores without what it needs.
    """
    known = {name: p.modules for name, p in POLICIES.items() if p.modules is not None}
    require(policy in known, f"policy must be one of {tuple(known)} for projections", policy)
    values = known[policy](scores)
    if values is None:
        raise ValueError(
            f"policy {policy!r} needs scores of single projections, got none: score the model again"
        )
    return np.asarray(values, dtype=np.float64)


@dataclass(frozen=True)
class Saturating:
    """A layer's gain as its capacity grows: ``score * (1 - exp(-rank * sqrt(experts) / r0))``.

    r0 > 0 is the rank of a single expert that reaches 63% of the gain.
    """

    r0: float

    def __post_init__(self) -> None:
        require(0 < number("r0", self.r0) < np.inf, "r0 must be > 0 and finite", self.r0)

    def gains(self, layer_scores: ArrayLike, options: Options) -> Floats:
        """The gain of every option in every layer, [L, J] float64."""
        share = -np.expm1(-_capacity(options) / self.r0)
        gains: Floats = np.multiply.outer(_scores(layer_scores), share)
        return gains


@dataclass(frozen=True, eq=False)
class Allocation:
    """An option for every layer.

    Attributes:
        index: [L] int64, which option.
        value: the sum of their gains; cost: the sum of their costs, at most ``budget``.
        upper_bound: no allocation within the budget gains more (the linear program's value).
        optimal: none gains more than this one; with ``scale`` only if the bound proves it.
        unit: the costs were counted in steps of this size.
    """

    index: Integers
    value: float
    cost: int
    budget: int
    upper_bound: float
    optimal: bool
    unit: int


def allocate(
    layer_scores: ArrayLike,
    options: Options,
    costs: ArrayLike,
    budget: int,
    gain: ArrayLike | Saturating,
    *,
    scale: int = 1,
) -> Allocation:
    """Choose rank and experts of every layer together: the most gain that the budget pays for.

    Exact, by dynamic programming over the budget in steps of the costs' greatest common divisor.
    Ties: the least cost, then the lower options, the first layer first.

    Args:
        layer_scores: [L], finite, >= 0.
        options: J pairs (rank, experts); (0, 0) for no adapter.
        costs: [J] or [L, J] integers >= 0, parameters or bytes; see :func:`option_costs`.
        budget: integer >= 0 in the same unit.
        gain: [L, J] finite numbers, taken as they are, or a model of them. The layers' largest
            must sum to a finite number; sums are compared as floats.
        scale: counts in steps this many times as large and rounds costs up to them: a smaller
            table, an allocation within the budget, and a bound that says what it may have lost.

    Raises:
        ValueError: the cheapest options exceed the budget, the table would exceed 1 GiB (says the
            divisor and both sizes), shapes that differ, a negative or non-finite number or sum.
        TypeError: costs that are no integers.
    """
    scores = _scores(layer_scores)
    shape = (len(scores), len(options))
    gains = _gains(gain, scores, options)
    prices = _costs(costs, shape)
    limit, factor = count("budget", budget), count("scale", scale)
    require(factor >= 1, "scale must be >= 1", scale)
    # What no choice can avoid paying, or miss, is no part of the problem.
    least = prices.min(axis=1, keepdims=True)
    free, above = limit - int(least.sum()), prices - least
    if free < 0:
        raise ValueError(
            "the budget must pay for every layer's cheapest option "
            f"({int(least.sum())}), got {limit}"
        )
    near, offset, exponent = _near(gains)
    bound = offset + math.ldexp(_native.allocate_bound(near, above, free), exponent)
    divisor = max(1, int(np.gcd.reduce(above, axis=None)))
    unit = min(divisor * factor, 2**62)  # more than any cost
    steps, most = -(-above // unit), free // unit
    most = min(most, int(steps.max(axis=1).sum()))
    _check_table(shape[0], most + 1, divisor, free)
    index = _native.allocate(near, steps, most, None)
    layers = np.arange(shape[0])
    value = float(gains[layers, index].sum())
    bound = max(bound, value)
    proven = factor == 1 or bound - value <= _TOLERANCE * abs(bound)
    cost = int(prices[layers, index].sum())
    return Allocation(index, value, cost, limit, bound, proven, unit)


def option_costs(
    dimensions: Sequence[tuple[int, int]], options: Options, shared_a: bool = True
) -> Integers:
    """Adapter parameters of one layer for every option, [J] int64.

    A projection from K to N features takes ``r*K + M*N*r + M*K``: the shared A, M matrices B and
    the router; ``M*r*K`` of A where every expert has its own (``shared_a`` False).

    Args:
        dimensions: (K, N) of each of the layer's adapted projections.
        options: pairs (rank, experts).
    """
    pairs = _options(options)
    costs = [
        sum(r * k * (1 if shared_a else m) + m * n * r + m * k for k, n in dimensions)
        if r and m
        else 0
        for r, m in pairs
    ]
    return np.array(costs, dtype=np.int64)


def fit_gain(trials: Sequence[Mapping[str, Any]]) -> Saturating:
    """Fit how the loss falls with capacity.

    ``loss = a - b * (1 - exp(-rank * sqrt(experts) / r0))`` by least squares over a, b and r0.

    Args:
        trials: mappings with ``rank``, ``num_experts`` and ``value`` (the loss).

    Raises:
        ValueError: the trials cannot determine the fit: fewer than three different capacities, a
            loss that does not fall, or one that shows no knee (falls straight, or is flat behind
            the smallest capacity).
    """
    capacity = _capacity([(trial["rank"], trial["num_experts"]) for trial in trials])
    loss = numbers("value", [trial["value"] for trial in trials])
    if not np.isfinite(loss).all():
        raise ValueError("the trials' values must be finite")
    different = np.unique(capacity)
    if len(different) < 3:
        raise ValueError(
            "trials must have at least 3 different rank * sqrt(experts) to fit a gain, got "
            f"{different.tolist()}"
        )
    if np.ptp(loss) <= _TOLERANCE * np.abs(loss).max():
        raise ValueError(f"the trials' loss must fall with capacity, got {loss[0]} everywhere")
    r0 = _best_r0(capacity, loss, different)
    slope, _ = _linear_fit(capacity, loss, r0)
    if not slope < 0:
        raise ValueError(f"the trials' loss must fall with capacity, got a slope of {slope:.3g}")
    return Saturating(r0)


def _best_r0(capacity: Floats, loss: Floats, different: Floats) -> float:
    """For a given r0 the fit is linear in a and b, so only r0 is searched, ever finer."""
    positive = different[different > 0]
    low, high = np.log(positive[0] / 30), np.log(30 * positive[-1])
    for _ in range(12):
        grid = np.linspace(low, high, 41)
        residuals = [_linear_fit(capacity, loss, float(np.exp(x)))[1] for x in grid]
        best = int(np.argmin(residuals))
        if best in (0, 40):
            what = "flat behind the smallest" if best == 0 else "straight up to the largest"
            raise ValueError(f"the trials show no knee: the loss is {what} capacity")
        low, high = grid[best - 1], grid[best + 1]
    return float(np.exp((low + high) / 2))


def _linear_fit(capacity: Floats, loss: Floats, r0: float) -> tuple[float, float]:
    """-b, and the root mean square of the residual."""
    design = np.stack([np.ones_like(capacity), -np.expm1(-capacity / r0)], axis=1)
    fit, *_ = np.linalg.lstsq(design, loss, rcond=None)
    return float(fit[1]), float(np.sqrt(np.mean((design @ fit - loss) ** 2)))


def _options(options: Options) -> list[tuple[int, int]]:
    return [(count("rank", rank), count("experts", experts)) for rank, experts in options]


def _capacity(options: Options) -> Floats:
    pairs = np.array(_options(options), dtype=np.float64).reshape(-1, 2)
    capacity: Floats = pairs[:, 0] * np.sqrt(pairs[:, 1])
    return capacity


def _scores(layer_scores: ArrayLike) -> Floats:
    scores = numbers("layer_scores", layer_scores)
    fine = (scores >= 0) & np.isfinite(scores)
    require_all(fine, "layer_scores", "a finite number >= 0", scores)
    if not len(scores):
        raise ValueError("layer_scores must have at least one layer, got none")
    return scores


def _gains(gain: ArrayLike | Saturating, scores: Floats, options: Options) -> Floats:
    if not len(options):
        raise ValueError("options must have at least one pair, got none")
    if isinstance(gain, Saturating):
        return gain.gains(scores, options)
    _options(options)
    gains = numbers("gain", gain, dimensions=2)
    if gains.shape != (len(scores), len(options)):
        raise ValueError(
            f"gain must have shape [L, J] = {(len(scores), len(options))}, got {gains.shape}"
        )
    require_all(np.isfinite(gains), "gain", "finite", gains)
    return gains


def _near(gains: Floats) -> tuple[Floats, float, int]:
    """Gains beyond each layer's least, divided by 2 ** exponent to at most 1; and what the least
    gain together. Exact but for what is 1e-300 of the largest, so no sum or slope overflows.

    Raises:
        ValueError: the sum over layers may overflow.
    """
    least, most = gains.min(axis=1, keepdims=True), gains.max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        size = np.abs([least, most]).max(axis=0).sum()
        beyond = gains - least
    if not size <= np.finfo(np.float64).max / 8:
        raise ValueError(f"the layers' gains must sum to less than 2**1021, got {size}")
    _, exponent = np.frexp(beyond.max())
    return np.ldexp(beyond, -exponent), float(least.sum()), int(exponent)


def _costs(costs: ArrayLike, shape: tuple[int, int]) -> Integers:
    prices = np.asarray(costs)
    if prices.dtype.kind not in "iu":
        raise TypeError(f"costs must be an array of integers, got dtype {prices.dtype}")
    if prices.shape not in (shape, shape[1:]):
        raise ValueError(
            f"costs must have shape [J] = {shape[1:]} or [L, J] = {shape}, got {prices.shape}"
        )
    least, most = int(prices.min()), int(prices.max())
    require(least >= 0, "costs must be >= 0", least)
    if most * shape[0] >= 2**61:
        raise ValueError(f"the layers' costs must sum to less than 2**61, got a cost of {most}")
    return np.ascontiguousarray(np.broadcast_to(prices, shape), dtype=np.int64)


def _check_table(layers: int, width: int, divisor: int, budget: int) -> None:
    size = 8 * (layers + 1) * width
    if size <= MAX_TABLE_BYTES:
        return
    enough = -(-size // MAX_TABLE_BYTES)
    raise ValueError(
        f"the table of {layers} layers by {width} steps (budget {budget} above the cheapest "
        f"options, greatest common divisor {divisor}) would take {size} bytes, more than "
        f"{MAX_TABLE_BYTES}; scale={enough + 1} rounds costs up to a coarser unit"
    )


def _integers(name: str, array: ArrayLike) -> Integers:
    sizes = np.asarray(array)
    if sizes.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got dtype {sizes.dtype}")
    least, most = (int(sizes.min()), int(sizes.max())) if sizes.size else (0, 0)
    if not 0 <= least <= most < 2**39:
        raise ValueError(f"{name} must be in [0, 2**39), got {least} to {most}")
    return sizes.astype(np.int64)
