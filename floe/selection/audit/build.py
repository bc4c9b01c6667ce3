"""The audit of a choice of layers: who agrees, what the rows and the budget decide, what is open.

Everything follows from saved scores: no model, no torch. An audit says how far a ranking
reproduces, never that its layers train better than others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from floe.errors import FileError
from floe.selection.audit.policies import (
    NAMES,
    Agreement,
    Options,
    PolicyResult,
    agreement_of,
    compare_policies,
)
from floe.selection.audit.routers import RouterHealth, router_health
from floe.selection.audit.rows import NO_ROWS, Rows, resamplable, rows_of
from floe.selection.audit.stability import (
    SPLITS,
    Bootstrap,
    Budgets,
    Likeness,
    Subsets,
    bootstrap_policy,
    budget_presets,
    null_policy,
    subset_policy,
)
from floe.selection.audit.verdicts import judge
from floe.selection.layer_count import choose_count
from floe.selection.masks.determine import determine
from floe.selection.masks.solvers import count, number
from floe.selection.ranking import count_layers
from floe.storage import write_json
from floe.types import Progress

if TYPE_CHECKING:
    from floe.importance.scores import Scores
    from floe.importance.statistics import LayerStatistics

FORMAT = 1


@dataclass(frozen=True)
class Cliff:
    """Losses of arms with several numbers of layers against the largest number, paired by row.

    above_full and error are the mean difference and its standard error. worse: the numbers more
    than two standard errors above. begins: where a cliff begins, coming down; None if nowhere.
    """

    counts: tuple[int, ...]
    above_full: tuple[float, ...]
    error: tuple[float, ...]
    worse: tuple[int, ...]
    begins: int | None


@dataclass(frozen=True)
class MaskLoss:
    """What masking the units that preset "global" masks costs, in Fisher information (nats^2).

    With g_i [S] a unit's gradients over the rows: diagonal_loss is the sum of || g_i ||^2 (Eq. 9 of
    the FLoE paper), block_loss the sum over layers, heads and neurons apart, of
    || sum_i g_i ||^2 (Eq. 7 and 8 within these blocks).
    """

    masked: int
    diagonal_loss: float
    block_loss: float


@dataclass(frozen=True)
class Audit:
    """What an audit found. L layers, 0-based; K of them are chosen.

    Attributes:
        layers: L. count: K. seed, budget, score: the options. rows: S per-sample rows, 0 if none
            were kept. draws: of the bootstrap.
        policy: the run's own, which the verdicts are about.
        policies: every policy whose inputs are there; lacking: name -> what the others need.
        agreement: of all of them.
        bootstrap, subsets: of the policies that are sums over rows; not_resampled: name -> what is
            missing of those that could be, with per-sample arrays.
        null: what random orders share with the run's policy.
        budgets: every preset over budgets.
        masks: diagonal against block Fisher information; None without per-sample mask gradients.
        routers: of the adapter that was scored, trained_routers: of the run's final one; empty if
            not measured.
        cliff: None if fewer than two numbers of layers were trained.
        verdicts: "solid", "open" and "note": plain sentences from these numbers.
        selection: of a run, the hash of what its select stage read; tells an old audit from a new.
    """

    layers: int
    count: int
    seed: int
    budget: float
    score: str
    rows: int
    draws: int
    policy: str
    policies: tuple[PolicyResult, ...]
    lacking: dict[str, str]
    agreement: Agreement
    bootstrap: tuple[Bootstrap, ...]
    subsets: tuple[Subsets, ...]
    not_resampled: dict[str, str]
    null: Likeness
    budgets: tuple[Budgets, ...]
    masks: MaskLoss | None
    routers: tuple[RouterHealth, ...]
    trained_routers: tuple[RouterHealth, ...]
    cliff: Cliff | None
    verdicts: dict[str, list[str]]
    selection: str = ""

    def document(self) -> dict[str, Any]:
        """Plain JSON values, with the format's number."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return found | {"format": FORMAT}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` as JSON, whole or not at all; equal audits give equal bytes.

        Raises:
            FileError: it cannot be written.
        """
        try:
            write_json(Path(path), self.document())
        except OSError as error:
            raise FileError(path, f"cannot be written: {error.strerror}") from error


def audit(
    scores: Scores,
    *,
    layers: int | float = 8,
    policy: str = "adapter_fisher",
    statistics: LayerStatistics | None = None,
    router: Iterable[Mapping[str, Any]] = (),
    trained_router: Iterable[Mapping[str, Any]] = (),
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
        router, trained_router: what floe.evaluation.routers.router_statistics found on
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
    options = Options(
        count_layers(layers, scores.layer_count), count("seed", seed), number("budget", budget),
        score, statistics,
    )  # fmt: skip
    rows = rows_of(scores)
    scores = rows.scores
    policies, absent = compare_policies(scores, options)
    chosen = _chosen(policy, policies, absent)
    ticker = _Ticker(progress, _work(policies, scores, bootstrap))
    resampled, subsets, missing = _resampled(policies, rows, options, bootstrap, ticker)
    found = Audit(
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
        bootstrap=resampled,
        subsets=subsets,
        not_resampled=missing,
        null=null_policy(chosen, scores, options),
        budgets=budget_presets(policies, scores, options, lambda: ticker.tick("budgets")),
        masks=mask_loss(scores, options.budget),
        routers=router_health(router),
        trained_routers=router_health(trained_router),
        cliff=_cliff(losses),
        verdicts={},
    )
    return replace(found, verdicts=judge(found))


def _chosen(
    policy: str, policies: Sequence[PolicyResult], absent: Mapping[str, str]
) -> PolicyResult:
    if policy not in NAMES:
        raise ValueError(f"policy must be one of {sorted(NAMES)}, got {policy!r}")
    if policy in absent:
        raise ValueError(f"policy {policy!r} needs {absent[policy]}")
    return next(one for one in policies if one.name == policy)


def _work(policies: Sequence[PolicyResult], scores: Scores, draws: int) -> int:
    """Parts of the progress, except for the budgets."""
    return sum(draws + SPLITS for one in policies if not resamplable(one.name, scores))


class _Ticker:
    """Counts parts of the work; the budgets' few are not counted."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, max(1, total)

    def tick(self, note: str) -> None:
        """One part is done."""
        self._done = min(self._done + 1, self._total)
        if self._progress is not None:
            self._progress(self._done, self._total, note)


def _resampled(
    policies: Sequence[PolicyResult], rows: Rows, options: Options, draws: int, ticker: _Ticker
) -> tuple[tuple[Bootstrap, ...], tuple[Subsets, ...], dict[str, str]]:
    """Bootstrap and subsets of what can be resampled, and what the rest would need."""
    drawn: list[Bootstrap] = []
    parts: list[Subsets] = []
    missing: dict[str, str] = {}
    for one in policies:
        why = resamplable(one.name, rows.scores)
        if why:
            missing |= {one.name: why} if why != NO_ROWS else {}
            continue

        def tick(name: str = one.name) -> None:
            ticker.tick(name)

        drawn.append(bootstrap_policy(one, rows, options, draws, tick))
        parts.append(subset_policy(one, rows, options, tick))
    return tuple(drawn), tuple(parts), missing


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
    found = choose_count(losses)
    return Cliff(
        counts=found.counts,
        above_full=tuple(found.above_full.tolist()),
        error=tuple(found.above_full_error.tolist()),
        worse=found.worse,
        begins=found.cliff,
    )
