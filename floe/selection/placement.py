"""What a choice comes down to for the model: where adapters go, and how large. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from floe.artifacts.schema import IF_SET, Layers, Text, Whole
from floe.selection.allocate import Options, Saturating, allocate
from floe.selection.masks.solvers import count, numbers, solve_mask
from floe.selection.policies import POLICIES
from floe.types import Floats, Integers

if TYPE_CHECKING:
    from floe.importance.scores import Scores


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
    if policy not in known:
        raise ValueError(f"policy must be one of {tuple(known)} for projections, got {policy!r}")
    values = known[policy](scores)
    if values is None:
        raise ValueError(
            f"policy {policy!r} needs scores of single projections, got none: score the model again"
        )
    return np.asarray(values, dtype=np.float64)


def _integers(name: str, array: ArrayLike) -> Integers:
    sizes = np.asarray(array)
    if sizes.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got dtype {sizes.dtype}")
    least, most = (int(sizes.min()), int(sizes.max())) if sizes.size else (0, 0)
    if not 0 <= least <= most < 2**39:
        raise ValueError(f"{name} must be in [0, 2**39), got {least} to {most}")
    return sizes.astype(np.int64)
