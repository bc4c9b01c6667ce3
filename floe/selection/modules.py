"""Which projections of which layers get adapters, under a parameter budget. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from floe.selection.masks.solvers import DEFAULT_NODES, count, numbers, solve_mask
from floe.types import Flags, Floats, Integers

if TYPE_CHECKING:
    from floe.importance.scores import Scores


MODULE_POLICIES = ("adapter_fisher", "gate_fisher_diagonal")
"""Policies that also score single projections."""


def module_scores(scores: Scores, policy: str) -> Floats:
    """What ``policy`` says of every adapted projection, [L, P]; P as in meta["adapter_modules"].

    Raises:
        ValueError: a policy that scores whole layers only, or scores without what it needs.
    """
    if policy not in MODULE_POLICIES:
        raise ValueError(f"policy must be one of {MODULE_POLICIES} for projections, got {policy!r}")
    if policy == "adapter_fisher":
        found = scores.module_fisher
    else:
        gates = scores.gate_gradient
        found = None if gates is None else np.square(np.asarray(gates, np.float64)).sum(axis=0)
    if found is None:
        raise ValueError(
            f"policy {policy!r} needs scores of single projections, got none: score the model again"
        )
    return np.asarray(found, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class ModuleChoice:
    """The chosen projections.

    Attributes:
        modules: layer -> names of its adapted projections, in the given order; layers without any
            are left out.
        chosen: [L, P], True = adapted.
        score: their total. parameters: their total, at most the budget.
        upper_bound: no choice within the budget scores more. optimal: whether that is proven.
    """

    modules: dict[int, tuple[str, ...]]
    chosen: Flags
    score: float
    parameters: int
    upper_bound: float
    optimal: bool


def choose_modules(
    module_scores: ArrayLike,
    parameters: ArrayLike,
    budget: int,
    names: Sequence[str],
    *,
    max_nodes: int = DEFAULT_NODES,
) -> ModuleChoice:
    """Adapt the (layer, projection) pairs of most score that fit a parameter budget together.

    Exact, as a 0/1 knapsack problem (see solvers.solve_mask): unlike the front of a ranking it
    weighs what a projection takes. A pair of score 0 is never chosen. Ties: free pairs first, then
    the larger score, the lower layer, the earlier name.

    Args:
        module_scores: [L, P] finite, >= 0; for example the adapter Fisher information of each
            projection (Scores.module_fisher).
        parameters: [L, P] adapter parameters, integers >= 0.
        budget: adapter parameters in all, >= 0 and below 2**39 unless there are fewer.
        names: of the P projections.

    Raises:
        ValueError: shapes that do not fit, a negative number, names that repeat.
        TypeError: no numbers, or parameters that are no integers.
    """
    scores = numbers("module_scores", module_scores, dimensions=2)
    sizes = _integers("parameters", parameters)
    if sizes.shape != scores.shape or len(names) != scores.shape[1] or len(set(names)) < len(names):
        raise ValueError(
            "module_scores and parameters must be [L, P] and names P different ones, got "
            f"{scores.shape}, {sizes.shape} and {list(names)}"
        )
    limit, whole = count("budget", budget), int(sizes.sum(dtype=object))
    if 2**39 <= limit < whole:  # the solver's tolerance is a parameter there
        raise ValueError(
            f"budget must be below 2**39 parameters where it limits them, got {limit} of {whole}"
        )
    costs = sizes.astype(np.float64)
    found = solve_mask(scores.ravel(), costs.ravel(), min(limit, whole), max_nodes=max_nodes)
    chosen = found.mask.reshape(scores.shape) & (scores > 0)
    pairs = {
        layer: tuple(name for name, taken in zip(names, row, strict=True) if taken)
        for layer, row in enumerate(chosen)
        if row.any()
    }
    return ModuleChoice(
        modules=pairs,
        chosen=chosen,
        score=found.value,
        parameters=int(sizes[chosen].sum()),
        upper_bound=found.upper_bound,
        optimal=found.optimal,
    )


def _integers(name: str, array: ArrayLike) -> Integers:
    found = np.asarray(array)
    if found.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got dtype {found.dtype}")
    if found.size and not 0 <= int(found.min()) <= int(found.max()) < 2**39:
        raise ValueError(
            f"{name} must be in [0, 2**39), got {int(found.min())} to {int(found.max())}"
        )
    return found.astype(np.int64)
