"""What a choice comes down to for the model: where adapters go, and how large. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from floe.selection.allocate import Options, Saturating, allocate
from floe.selection.modules import choose_modules


@dataclass(frozen=True)
class Placement:
    """The adapted layers; where given, which of their projections, and of what size.

    Attributes:
        layers: that carry adapters, ascending, 0-based.
        modules: layer -> names of its adapted projections; empty: all target projections of each.
        sizes: layer -> (rank, experts); empty: one size for all.
    """

    layers: tuple[int, ...]
    modules: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    sizes: Mapping[int, tuple[int, int]] = field(default_factory=dict)

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
        found: dict[str, Any] = {"layers": list(self.layers)}
        if self.modules:
            found["layer_modules"] = {str(k): list(names) for k, names in self.modules.items()}
        if self.sizes:
            found["rank_pattern"] = {str(k): rank for k, (rank, _) in self.sizes.items()}
            found["expert_pattern"] = {str(k): experts for k, (_, experts) in self.sizes.items()}
        return found

    def document(self) -> dict[str, Any]:
        """As JSON values; what is empty is left out."""
        found: dict[str, Any] = {"layers": list(self.layers)}
        if self.modules:
            found["modules"] = {str(k): list(names) for k, names in self.modules.items()}
        if self.sizes:
            found["sizes"] = {str(k): list(size) for k, size in self.sizes.items()}
        return found

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Placement:
        """What :meth:`document` gave, among other keys."""
        modules, sizes = document.get("modules", {}), document.get("sizes", {})
        return cls(
            tuple(document["layers"]),
            {int(k): tuple(names) for k, names in modules.items()},
            {int(k): (int(rank), int(experts)) for k, (rank, experts) in sizes.items()},
        )


def place_modules(
    module_scores: ArrayLike, parameters: ArrayLike, budget: int, names: Sequence[str]
) -> Placement:
    """Adapters on the single projections of most score; see :func:`choose_modules`.

    Raises:
        ValueError: as there, or a budget that pays for no projection.
    """
    found = choose_modules(module_scores, parameters, budget, names)
    if not found.modules:
        raise ValueError(f"budget must pay for a projection of score above 0, got {budget}")
    return Placement(tuple(sorted(found.modules)), found.modules)


def place_sizes(
    layer_scores: ArrayLike,
    options: Options,
    costs: ArrayLike,
    budget: int,
    gain: ArrayLike | Saturating,
) -> Placement:
    """Rank and experts of each layer; see :func:`allocate`. Layers of option (0, 0) have none.

    Costs are counted in steps of 1 / 10,000 of the budget where their own divisor is finer, so that
    the table stays small; the result is within the budget either way.

    Raises:
        ValueError: as there, or a budget that pays for no adapter.
    """
    divisor = max(1, int(np.gcd.reduce(np.asarray(costs), axis=None)))
    scale = max(1, budget // (divisor * 10_000))
    found = allocate(layer_scores, options, costs, budget, gain, scale=scale)
    taken = [options[j] for j in found.index]
    sizes = {k: (r, m) for k, (r, m) in enumerate(taken) if r and m}
    if not sizes:
        raise ValueError(f"budget must pay for the adapter of a layer of score > 0, got {budget}")
    return Placement(tuple(sizes), sizes=sizes)
