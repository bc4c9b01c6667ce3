"""How far a policy's choice hangs on the rows it saw, on the budget, and on chance. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from floe.selection.audit.policies import Options, PolicyResult, result_of, score_layers
from floe.selection.audit.rows import Rows, bootstrap_weights, looks_at_masks
from floe.selection.budget_path import BUDGET_PATH
from floe.selection.masks.presets import PRESETS
from floe.selection.policies import POLICIES, Situation
from floe.selection.ranking import overlap, spearman
from floe.types import Floats

if TYPE_CHECKING:
    from floe.importance.scores import Scores

SHARES = (0.3, 0.5, 0.7, 1.0)
SPLITS = 20
NULL_DRAWS = 200
INTERVAL = (0.05, 0.95)

Tick = Callable[[], None]


@dataclass(frozen=True)
class Bootstrap:
    """A policy on rows drawn with replacement.

    Attributes:
        name: the policy.
        rank_low, rank_high: [L], 5 % and 95 % quantiles of a layer's place; 1 = first to choose.
        probability: [L], share of draws that choose the layer.
        same: share of draws whose choice is the whole choice on all rows.
        kept: share of that choice found again, mean over draws.
        spearman: with the scores on all rows, mean over draws; None where they are constant.
    """

    name: str
    rank_low: tuple[int, ...]
    rank_high: tuple[int, ...]
    probability: tuple[float, ...]
    same: float
    kept: float
    spearman: float | None


@dataclass(frozen=True)
class Spread:
    """Mean, 5 % and 95 % quantile over repetitions; None where no repetition defines a value."""

    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Likeness:
    """Spearman correlation, and how many layers two choices share, over repetitions."""

    spearman: Spread
    overlap: Spread


@dataclass(frozen=True)
class Subsets:
    """A policy on fewer rows, over SPLITS random orders of them.

    rows[i] of the rows (shares[i] of them, the first of each order, so that smaller parts lie in
    larger ones) against all rows; halves: the two halves of each order against each other.
    """

    name: str
    shares: tuple[float, ...]
    rows: tuple[int, ...]
    against_all: tuple[Likeness, ...]
    halves: Likeness


@dataclass(frozen=True)
class Budgets:
    """A preset at other budgets against the same preset at the run's budget."""

    name: str
    budgets: tuple[float, ...]
    spearman: tuple[float | None, ...]
    overlap: tuple[int, ...]
    layers: tuple[tuple[int, ...], ...]


def bootstrap_policy(
    full: PolicyResult, rows: Rows, options: Options, draws: int, tick: Tick
) -> Bootstrap:
    """Resample the rows ``draws`` times; the seed of ``options`` decides the draws."""
    weights = bootstrap_weights(rows.count, draws, options.seed)
    found = []
    for result in _results(full.name, rows, weights, options):
        found.append(result)
        tick()
    places = np.array([np.argsort(result.ranking) for result in found]) + 1
    low, high = np.quantile(places, INTERVAL, axis=0, method="inverted_cdf")
    chosen = np.array([np.isin(np.arange(len(full.scores)), one.layers) for one in found])
    shared = [overlap(result.layers, full.layers) for result in found]
    likeness = [spearman(result.scores, full.scores) for result in found]
    return Bootstrap(
        name=full.name,
        rank_low=tuple(int(place) for place in low),
        rank_high=tuple(int(place) for place in high),
        probability=tuple(chosen.mean(axis=0).tolist()),
        same=float(np.mean([shared_here == len(full.layers) for shared_here in shared])),
        kept=float(np.mean(shared)) / len(full.layers),
        spearman=spread(likeness).mean,
    )


def subset_policy(full: PolicyResult, rows: Rows, options: Options, tick: Tick) -> Subsets:
    """The policy on nested parts of the rows, and on halves that share none."""
    total = rows.count
    sizes = [max(1, round(share * total)) for share in SHARES]
    orders = [np.random.default_rng([options.seed, n]).permutation(total) for n in range(SPLITS)]
    parts: list[list[tuple[PolicyResult, PolicyResult]]] = [[] for _ in sizes]
    halves = []
    for order in orders:
        pieces = [order[:size] for size in sizes]
        pieces += [order[: total // 2], order[total // 2 : 2 * (total // 2)]]
        weights = np.array([np.isin(np.arange(total), piece) for piece in pieces], dtype=np.float64)
        *nested, one, other = _results(full.name, rows, weights, options)
        for pairs, result in zip(parts, nested, strict=True):
            pairs.append((result, full))
        halves.append((one, other))
        tick()
    return Subsets(
        name=full.name,
        shares=SHARES,
        rows=tuple(sizes),
        against_all=tuple(likeness(pairs) for pairs in parts),
        halves=likeness(halves),
    )


def null_policy(full: PolicyResult, scores: Scores, options: Options) -> Likeness:
    """What random orders share with the policy: NULL_DRAWS seeds of the policy "random"."""
    total = len(full.scores)
    drawn = []
    for seed in range(NULL_DRAWS):
        situation = Situation(scores, options.count, total, seed, np.zeros(total))
        drawn.append((result_of("random", POLICIES["random"](situation), options.count), full))
    return likeness(drawn)


def budget_presets(
    results: Sequence[PolicyResult], scores: Scores, options: Options, tick: Tick
) -> tuple[Budgets, ...]:
    """Every preset among ``results`` over BUDGET_PATH; none with score "path", which averages."""
    if options.score == "path":
        return ()
    found = []
    names = [f"masks/{preset}" for preset in PRESETS]
    for full in (one for one in results if one.name in names):
        others = []
        for budget in BUDGET_PATH:
            own = score_layers(full.name, scores, replace(options, budget=budget))
            others.append(result_of(full.name, own, options.count))
            tick()
        found.append(
            Budgets(
                name=full.name,
                budgets=BUDGET_PATH,
                spearman=tuple(spearman(one.scores, full.scores) for one in others),
                overlap=tuple(overlap(one.layers, full.layers) for one in others),
                layers=tuple(one.layers for one in others),
            )
        )
    return tuple(found)


def likeness(pairs: Sequence[tuple[PolicyResult, PolicyResult]]) -> Likeness:
    """Of every pair, summed up."""
    return Likeness(
        spread([spearman(a.scores, b.scores) for a, b in pairs]),
        spread([overlap(a.layers, b.layers) for a, b in pairs]),
    )


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and quantiles of the values that are defined."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not known.size:
        return Spread(None, None, None)
    low, high = np.quantile(known, INTERVAL, method="inverted_cdf")
    return Spread(float(known.mean()), float(low), float(high))


def _results(name: str, rows: Rows, weights: Floats, options: Options) -> Iterator[PolicyResult]:
    for scores in rows.reweighted(weights, masks=looks_at_masks(name)):
        yield result_of(name, score_layers(name, scores, options), options.count)
