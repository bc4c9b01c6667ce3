"""Every policy and every reading of the paper on the same scores, and how far they agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from floe.selection.budget_path import path_score
from floe.selection.masks.determine import determine
from floe.selection.masks.presets import PRESETS
from floe.selection.policies import NEEDS, POLICIES, Situation
from floe.selection.ranking import (
    choose_layers,
    expected_overlap,
    layer_score,
    overlap,
    rank_layers,
    spearman,
)
from floe.types import Floats

if TYPE_CHECKING:
    from floe.importance.scores import Scores
    from floe.importance.statistics import LayerStatistics

NAMES = (
    *(f"masks/{preset}" for preset in PRESETS),
    *(policy for policy in POLICIES if policy not in ("masks", "all")),
)
"""What an audit compares: the masks under every preset, and every other policy that orders."""

KEEP_SAMPLES = "scores.head_gradient and scores.neuron_gradient; score with keep_samples: true"


@dataclass(frozen=True, eq=False)
class Options:
    """What the run was asked for: count K of layers, seed, budget and score of the masks."""

    count: int
    seed: int = 41
    budget: float = 0.5
    score: str = "soft"
    statistics: LayerStatistics | None = None


@dataclass(frozen=True)
class PolicyResult:
    """One policy's answer.

    Attributes:
        name: a policy, or "masks/<preset>".
        scores: [L]; higher = chosen sooner.
        ranking: all layers, first to choose in front. layers: the K chosen, ascending.
        tied: how many layers share the score at which the choice ends, if it splits them: which of
            them are in is decided by index alone. L if all scores are equal, 0 if nothing is tied.
    """

    name: str
    scores: tuple[float, ...]
    ranking: tuple[int, ...]
    layers: tuple[int, ...]
    tied: int

    @property
    def constant(self) -> bool:
        """Whether the scores order nothing."""
        return len(set(self.scores)) == 1


@dataclass(frozen=True)
class Agreement:
    """How far ``names`` agree, pair by pair.

    spearman [n, n]: of the scores; None where one is constant. overlap [n, n]: layers in both
    choices; two random choices share expected_overlap of them on average.
    """

    names: tuple[str, ...]
    spearman: tuple[tuple[float | None, ...], ...]
    overlap: tuple[tuple[int, ...], ...]
    expected_overlap: float


def lacking(name: str, scores: Scores, statistics: LayerStatistics | None) -> str:
    """What the policy ``name`` needs and is not there, and how to get it; "" if nothing."""
    if name == "probe" and scores.probe_fisher is None:
        return "scores.probe_fisher; score with probe=True, or name probe among the baselines"
    if name == "gate_fisher_diagonal" and scores.gate_gradient is None:
        return "scores.gate_gradient; score the model again"
    measured = () if statistics is None else statistics.values
    missing = [statistic for statistic in NEEDS.get(name, ()) if statistic not in measured]
    if missing:
        return f"the statistics {', '.join(missing)}; audit with --statistics {name}"
    return ""


def score_layers(name: str, scores: Scores, options: Options) -> Floats:
    """The layer scores [L] of a policy or of "masks/<preset>"."""
    policy, _, preset = name.partition("/")
    if policy != "masks":
        total = scores.layer_count
        # no policy but "masks" looks at the masks
        situation = Situation(
            scores, options.count, total, options.seed, np.zeros(total), options.statistics
        )
        return POLICIES[policy](situation)
    if options.score == "path":
        return path_score(scores, preset).scores
    found = determine(scores, preset, options.budget)
    return layer_score(found.head_mask, found.neuron_mask, how=options.score)


def result_of(name: str, layer_scores: Floats, count: int) -> PolicyResult:
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
    absent = {name: lacking(name, scores, options.statistics) for name in NAMES}
    found = tuple(
        result_of(name, score_layers(name, scores, options), options.count)
        for name in NAMES
        if not absent[name]
    )
    return found, {name: why for name, why in absent.items() if why}


def agreement_of(results: tuple[PolicyResult, ...]) -> Agreement:
    """Spearman correlation and overlap of every pair of results."""
    total = len(results[0].scores)
    size = len(results[0].layers)
    return Agreement(
        names=tuple(one.name for one in results),
        spearman=tuple(tuple(spearman(a.scores, b.scores) for b in results) for a in results),
        overlap=tuple(tuple(overlap(a.layers, b.layers) for b in results) for a in results),
        expected_overlap=expected_overlap(size, size, total),
    )
