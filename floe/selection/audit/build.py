"""The audit of a choice of layers: who agrees, what the rows and the budget decide, what is open.

Everything follows from saved scores: no model, no torch. An audit says how far a ranking
reproduces, never that its layers train better than others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from floe.artifacts.audit import Audit, Cliff, MaskLoss
from floe.artifacts.results import Router
from floe.selection.audit.compare import (
    NO_ROWS,
    SPLITS,
    Options,
    Rows,
    agreement_of,
    bootstrap_policy,
    budget_presets,
    compare_policies,
    names,
    null_policy,
    resamplable,
    subset_policy,
)
from floe.selection.audit.verdicts import judge
from floe.selection.masks.determine import determine
from floe.selection.masks.solvers import count, number
from floe.selection.ranking import choose_count, count_layers
from floe.types import Progress

if TYPE_CHECKING:
    from floe.importance.scores import Scores
    from floe.importance.statistics import LayerStatistics


def audit(
    scores: Scores,
    *,
    layers: int | float = 8,
    policy: str = "adapter_fisher",
    statistics: LayerStatistics | None = None,
    router: Iterable[Router] = (),
    trained_router: Iterable[Router] = (),
    losses: Mapping[int, ArrayLike] | None = None,
    budget: float = 0.5,
    score: str = "soft",
    seed: int = 41,
    bootstrap: int = 200,
    progress: Progress | None = None,
) -> Audit:
    """Audit the choice of layers that scores support.

    The same scores, options and seed give the same audit bit by bit, in whatever order the rows
    were scored.

    Args:
        scores: of the model. Per-sample arrays in them (floe.score(..., keep_samples=True) for
            those of masks) are what can be resampled; Taylor costs stay as measured.
        layers: K, a count or a fraction, as in select.
        policy: the one that decided, or "masks/<preset>".
        statistics: of the layers, for the policies that need them.
        router, trained_router: what floe.evaluation.router_statistics says of
            the adapter that was scored, and on the one that was trained afterwards.
        losses: number of layers -> per-row losses of an arm with so many, on the same rows.
        budget, score: of the masks; see select. seed: of every draw.
        bootstrap: draws, >= 1.
        progress: called as progress(done, in all, what is being done).

    Raises:
        ValueError: an unknown policy or one whose inputs are missing, a number out of range.
        TypeError: a number that is none.
    """
    if count("bootstrap", bootstrap) < 1:
        raise ValueError(f"bootstrap must be >= 1, got {bootstrap}")
    fixed = count("seed", seed), number("budget", budget)
    options = Options(count_layers(layers, scores.layer_count), *fixed, score, statistics)
    rows = Rows.of(scores)
    scores = rows.scores
    policies, absent = compare_policies(scores, options)
    if policy not in names():
        raise ValueError(f"policy must be one of {sorted(names())}, got {policy!r}")
    if policy in absent:
        raise ValueError(f"policy {policy!r} needs {absent[policy]}")
    missing = {result.name: resamplable(result.name, scores) for result in policies}
    drawn = [result for result in policies if not missing[result.name]]
    total, done = max(1, len(drawn) * (bootstrap + SPLITS)), itertools.count(1)

    def tick(part: str) -> None:
        if progress is not None:  # the budgets' few parts are not in the total
            progress(min(next(done), total), total, part)

    result = Audit(
        layers=scores.layer_count,
        count=options.count,
        seed=options.seed,
        budget=options.budget,
        score=options.score,
        rows=rows.count,
        draws=bootstrap,
        policy=policy,
        policies=policies,
        lacking=absent,
        agreement=agreement_of(policies),
        bootstrap=tuple(bootstrap_policy(p, rows, options, bootstrap, tick) for p in drawn),
        subsets=tuple(subset_policy(p, rows, options, tick) for p in drawn),
        not_resampled={name: why for name, why in missing.items() if why not in ("", NO_ROWS)},
        null=null_policy(next(p for p in policies if p.name == policy), scores, options),
        budgets=budget_presets(policies, scores, options, tick),
        masks=mask_loss(scores, options.budget),
        routers=tuple(router),
        trained_routers=tuple(trained_router),
        cliff=_cliff(losses),
        verdicts={"solid": [], "open": [], "note": []},
        selection="",
    )
    return replace(result, verdicts=judge(result))


def mask_loss(scores: Scores, budget: float) -> MaskLoss | None:
    """Diagonal against block Fisher information; None without per-sample mask gradients."""
    if scores.head_gradient is None or scores.neuron_gradient is None:
        return None
    masks = determine(scores, "global", budget)
    masked, diagonal, block = 0, 0.0, 0.0
    for gradient, mask in (
        (scores.head_gradient, masks.head_mask),
        (scores.neuron_gradient, masks.neuron_mask),
    ):
        for layer, closed in enumerate(~mask):
            pulls = gradient[:, layer, closed].astype(np.float64)
            masked += int(closed.sum())
            diagonal += float(np.square(pulls).sum())
            block += float(np.square(pulls.sum(axis=1)).sum())
    return MaskLoss(masked, diagonal, block)


def _cliff(losses: Mapping[int, ArrayLike] | None) -> Cliff | None:
    if losses is None or len(losses) < 2:
        return None
    sweep = choose_count(losses)
    return Cliff(
        counts=sweep.counts,
        above_full=tuple(sweep.above_full.tolist()),
        error=tuple(sweep.above_full_error.tolist()),
        worse=sweep.worse,
        begins=sweep.cliff,
    )
