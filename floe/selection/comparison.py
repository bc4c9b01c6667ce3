"""Every policy and every reading of the paper on the same scores: as they are, on other rows, at
other budgets, and against random orders.

Fisher information is a sum over calibration rows, so every resample of the rows has its exact
scores without a model. Taylor costs are not kept by row and stay as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from floe.artifacts.audit import (
    Agreement,
    Bootstrap,
    Budgets,
    Likeness,
    PolicyResult,
    Spread,
    Subsets,
)
from floe.selection.masks.determine import BUDGET_PATH, PRESETS, determine, path_score
from floe.selection.policies.registry import OPTIONAL, POLICIES, PolicyInputs
from floe.selection.ranking import (
    choose_layers,
    expected_overlap,
    layer_score,
    overlap,
    rank_layers,
    spearman,
)
from floe.types import Array, Floats

if TYPE_CHECKING:
    from floe.importance.scores import LayerStatistics, Scores

SHARES = (0.3, 0.5, 0.7, 1.0)
SPLITS = 20
NULL_DRAWS = 200
INTERVAL = (0.05, 0.95)
NO_ROWS = "is no sum over rows"
_SAMPLES = {  # array of the scores -> what it is the sum over rows of, the gates' squared
    "adapter_fisher": "adapter_samples",
    "gate_gradient": "gate_gradient",
    "head_fisher": "head_gradient",
    "neuron_fisher": "neuron_gradient",
}
_DRAWS = 16  # reweighted together: squares are computed once for so many

Tick = Callable[[str], None]  # told what one more part was done of


@dataclass(frozen=True, eq=False)
class Options:
    """What the run was asked for: count K of layers, seed, budget and score of the masks."""

    count: int
    seed: int = 41
    budget: float = 0.5
    score: str = "soft"
    statistics: LayerStatistics | None = None


def names() -> list[str]:
    """What an audit compares: the masks by preset, then the policies but "all", baselines last."""
    others = [p for p in POLICIES.values() if p.name not in ("masks", "all")]
    others.sort(key=lambda p: not p.reads and p.measure is None)
    return [*(f"masks/{preset}" for preset in PRESETS), *(p.name for p in others)]


def score_layers(name: str, scores: Scores, options: Options) -> Floats:
    """The layer scores [L] of a policy or of "masks/<preset>"."""
    policy, _, preset = name.partition("/")
    if policy != "masks":
        paper = partial(score_layers, "masks/global", scores, options)
        size = options.count, scores.layer_count, options.seed
        return POLICIES[policy](PolicyInputs(scores, *size, paper, options.statistics))
    if options.score == "path":
        return path_score(scores, preset)
    masks = determine(scores, preset, options.budget)
    return layer_score(masks.head_mask, masks.neuron_mask, how=options.score)


def result_of(name: str, scores: Scores, options: Options) -> PolicyResult:
    """What a policy, or "masks/<preset>", says of the scores."""
    return ranked(name, score_layers(name, scores, options), options.count)


def ranked(name: str, layer_scores: Floats, count: int) -> PolicyResult:
    """Ranking, choice and ties of layer scores [L]."""
    ranking = rank_layers(layer_scores)
    edge = layer_scores[ranking[count - 1]]
    alike = int((layer_scores == edge).sum())
    split = count < len(ranking) and layer_scores[ranking[count]] == edge
    return PolicyResult(
        name=name,
        scores=tuple(layer_scores.tolist()),
        ranking=tuple(ranking.tolist()),
        layers=choose_layers(ranking, count),
        tied=alike if split else 0,
    )


def compare_policies(
    scores: Scores, options: Options
) -> tuple[tuple[PolicyResult, ...], dict[str, str]]:
    """The result of every policy whose inputs are there, and what the others lack."""
    results, lacking = [], {}
    measured = () if options.statistics is None else options.statistics.values
    for name in names():
        policy = POLICIES[name.partition("/")[0]]
        arrays = [array for array in policy.reads if getattr(scores, array) is None]
        missing = [statistic for statistic in policy.statistics if statistic not in measured]
        if arrays:
            lacking[name] = f"scores.{arrays[0]}; {OPTIONAL[arrays[0]]}"
        elif missing:
            lacking[name] = f"the statistics {', '.join(missing)}; audit with --statistics {name}"
        else:
            results.append(result_of(name, scores, options))
    return tuple(results), lacking


def agreement_of(results: Sequence[PolicyResult]) -> Agreement:
    """Spearman correlation and overlap of every pair of results."""
    size, total = len(results[0].layers), len(results[0].scores)
    return Agreement(
        names=tuple(result.name for result in results),
        spearman=tuple(tuple(spearman(a.scores, b.scores) for b in results) for a in results),
        overlap=tuple(tuple(overlap(a.layers, b.layers) for b in results) for a in results),
        expected_overlap=expected_overlap(size, size, total),
    )


def resamplable(name: str, scores: Scores) -> str:
    """What is missing to compute the policy on other rows; "" if nothing.

    NO_ROWS for policies that look at Taylor costs alone, at statistics or at nothing: they are not
    functions of per-sample arrays.
    """
    needed = _samples(name)
    if not needed:
        return NO_ROWS
    if any(getattr(scores, array) is None for array in needed):
        how = "score with keep_samples: true" if _of_masks(name) else "score again"
        return f"{' and '.join(f'scores.{array}' for array in needed)}; {how}"
    reduction = scores.meta.get("reduction", "sample")
    if _of_masks(name) and reduction != "sample":
        return f"a Fisher information summed over rows; reduction is {reduction!r}"
    return ""


def _samples(name: str) -> list[str]:
    """The per-sample arrays whose sums the policy reads."""
    policy = POLICIES[name.partition("/")[0]]
    return [_SAMPLES[array] for array in policy.reads if array in _SAMPLES]


def _of_masks(name: str) -> bool:
    return "head_gradient" in _samples(name)


@dataclass(frozen=True, eq=False)
class Rows:
    """``scores`` and their per-sample arrays, in an order that the rows' content alone decides.

    So resamples do not depend on the order in which rows were scored, nor do sums over them.
    """

    scores: Scores
    arrays: dict[str, Array]

    @classmethod
    def of(cls, scores: Scores) -> Rows:
        """The per-sample arrays that are there, rows ordered by a hash of their content."""
        arrays = {
            name: array
            for name in _SAMPLES.values()
            if (array := getattr(scores, name, None)) is not None
        }
        if not arrays:
            return cls(scores, {})
        size = len(next(iter(arrays.values())))
        rows = (b"".join(array[n].tobytes() for array in arrays.values()) for n in range(size))
        keys = [hashlib.sha256(row).digest() for row in rows]
        order = sorted(range(size), key=keys.__getitem__)
        ordered = {name: array[order] for name, array in arrays.items()}
        return cls(replace(scores, **ordered), ordered)

    @property
    def count(self) -> int:
        """S, 0 without per-sample arrays."""
        return len(next(iter(self.arrays.values()))) if self.arrays else 0

    def reweighted(self, weights: Floats, masks: bool = True) -> Iterator[Scores]:
        """The scores of every row of ``weights`` [B, S]: row n counts as often as its weight says.

        Gate gradients are carried along, times the root of the weights; mask gradients are not.
        Without ``masks`` the Fisher information of masks is left as it was, which saves most time.
        """
        none: dict[str, Any] = dict.fromkeys(_SAMPLES.values())
        for start in range(0, len(weights), _DRAWS):
            part = weights[start : start + _DRAWS]
            sums = self._sums(part, masks)
            for n, weight in enumerate(part):
                values = none | {name: each[n] for name, each in sums.items()}
                if "gate_gradient" in self.arrays:
                    root = np.sqrt(weight).astype(np.float32)[:, None, None]
                    values["gate_gradient"] = self.arrays["gate_gradient"] * root
                yield replace(self.scores, **values)

    def _sums(self, weights: Floats, masks: bool) -> dict[str, Floats]:
        sums = {}
        if "adapter_samples" in self.arrays:
            sums["adapter_fisher"] = weights @ self.arrays["adapter_samples"]
        for kind in ("head", "neuron"):
            if masks and f"{kind}_gradient" in self.arrays:
                gradient = self.arrays[f"{kind}_gradient"]
                layers = [
                    weights @ np.square(gradient[:, k].astype(np.float64))
                    for k in range(gradient.shape[1])
                ]
                sums[f"{kind}_fisher"] = np.stack(layers, axis=1)
        return sums

    def results(self, name: str, weights: Floats, options: Options) -> Iterator[PolicyResult]:
        """The policy's result for every row of ``weights``."""
        for scores in self.reweighted(weights, masks=_of_masks(name)):
            yield result_of(name, scores, options)


def bootstrap_weights(rows: int, draws: int, seed: int) -> Floats:
    """[draws, rows]: how often each row is drawn when ``rows`` are drawn with replacement."""
    random = np.random.default_rng(seed)
    even = np.full(rows, 1 / rows)
    return np.asarray(random.multinomial(rows, even, size=draws), dtype=np.float64)


def bootstrap_policy(
    full: PolicyResult, rows: Rows, options: Options, draws: int, tick: Tick
) -> Bootstrap:
    """Resample the rows ``draws`` times; the seed of ``options`` decides the draws."""
    weights = bootstrap_weights(rows.count, draws, options.seed)
    results = []
    for result in rows.results(full.name, weights, options):
        results.append(result)
        tick(full.name)
    places = np.array([np.argsort(result.ranking) for result in results]) + 1
    low, high = np.quantile(places, INTERVAL, axis=0, method="inverted_cdf")
    chosen = np.array([np.isin(np.arange(len(full.scores)), result.layers) for result in results])
    shared = np.array([overlap(result.layers, full.layers) for result in results])
    return Bootstrap(
        name=full.name,
        rank_low=tuple(int(place) for place in low),
        rank_high=tuple(int(place) for place in high),
        probability=tuple(chosen.mean(axis=0).tolist()),
        same=float((shared == len(full.layers)).mean()),
        kept=float(shared.mean()) / len(full.layers),
        spearman=spread([spearman(result.scores, full.scores) for result in results]).mean,
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
        *nested, half, other = rows.results(full.name, weights, options)
        for pairs, result in zip(parts, nested, strict=True):
            pairs.append((result, full))
        halves.append((half, other))
        tick(full.name)
    return Subsets(
        name=full.name,
        shares=SHARES,
        rows=tuple(sizes),
        against_all=tuple(likeness(pairs) for pairs in parts),
        halves=likeness(halves),
    )


def null_policy(full: PolicyResult, scores: Scores, options: Options) -> Likeness:
    """What random orders share with the policy: NULL_DRAWS seeds of the policy "random"."""
    seeds = (replace(options, seed=seed) for seed in range(NULL_DRAWS))
    return likeness([(result_of("random", scores, seeded), full) for seeded in seeds])


def budget_presets(
    results: Sequence[PolicyResult], scores: Scores, options: Options, tick: Tick
) -> tuple[Budgets, ...]:
    """Every preset among ``results`` over BUDGET_PATH; none with score "path", which averages."""
    if options.score == "path":
        return ()
    compared = []
    for full in (result for result in results if result.name.startswith("masks/")):
        others = []
        for budget in BUDGET_PATH:
            others.append(result_of(full.name, scores, replace(options, budget=budget)))
            tick("budgets")
        compared.append(
            Budgets(
                name=full.name,
                budgets=BUDGET_PATH,
                spearman=tuple(spearman(other.scores, full.scores) for other in others),
                overlap=tuple(overlap(other.layers, full.layers) for other in others),
                layers=tuple(other.layers for other in others),
            )
        )
    return tuple(compared)


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
