"""The points a search may try, and which one it tries next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial, TrialState

from floe.errors import require, require_whole
from floe.rank_search.studies import Point, own_study, tried_points

REDRAWS = 8
SAMPLERS = ("tpe", "paper", "random", "grid")


@dataclass(frozen=True)
class SearchSpace:
    """Ranks and numbers of experts as (low, high, step), both ends included (FLoE section 4.1)."""

    rank: tuple[int, int, int] = (2, 32, 2)
    num_experts: tuple[int, int, int] = (2, 4, 1)

    def __post_init__(self) -> None:
        for name in ("rank", "num_experts"):
            values = getattr(self, name)
            whole = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
            rule = f"{name} must be three ints (low, high, step)"
            require(len(values) == 3 and whole, rule, values, TypeError)
            low, high, step = values
            reached = 1 <= low <= high and step >= 1 and (high - low) % step == 0
            require(
                reached, f"{name} must be (low, high, step) with 1 <= low and high reached", values
            )
            object.__setattr__(self, name, tuple(values))

    def points(self) -> list[Point]:
        """All (rank, num_experts), sorted."""
        ranks, experts = (
            range(low, high + 1, step) for low, high, step in (self.rank, self.num_experts)
        )
        return [(r, m) for r in ranks for m in experts]

    def distributions(self) -> dict[str, IntDistribution]:
        """The space as optuna names it."""
        bounds = {"rank": self.rank, "num_experts": self.num_experts}
        return {name: IntDistribution(a, b, step=step) for name, (a, b, step) in bounds.items()}


def sampler_settings(sampler: str, startup_trials: int) -> dict[str, Any]:
    """What a sampler's name means, in full: optuna's defaults differ between its versions."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    require_whole("startup_trials", startup_trials, 1)
    settings: dict[str, Any] = {"name": sampler, "redraws": REDRAWS}
    if sampler in ("tpe", "paper"):
        settings |= {
            "multivariate": sampler == "tpe",
            "n_startup_trials": startup_trials,
            "n_ei_candidates": 24,
            # No point is tried twice, so no lie about running ones is needed to keep off them.
            "constant_liar": False,
        }
    return settings


def propose(
    study: optuna.Study, space: SearchSpace, settings: dict[str, Any], seed: int, index: int
) -> tuple[Point, int]:
    """Point number ``index`` of the search, and how many suggestions were drawn again for it.

    The generator depends on (seed, index, draw) alone and the results so far come from the study,
    so a search that was interrupted goes on as if it had not been. A suggestion already tried is
    drawn again up to ``REDRAWS`` times; then the nearest untried point is taken (in steps of the
    space; ties to the lower rank, then fewer experts).

    Raises:
        ValueError: if no point is left.
    """
    points, tried, past = space.points(), tried_points(study), own_study(study)
    left = [point for point in points if point not in tried]
    if not left:
        raise ValueError(f"the space must have an untried point, all {len(points)} are tried")
    if settings["name"] == "grid":
        order = np.random.default_rng(seed).permutation(len(points))
        return next(points[i] for i in order if points[i] not in tried), 0
    suggestion: Point = left[0]
    for draw in range(REDRAWS + 1):
        suggestion = _suggest(past, space, settings, (seed, index, draw))
        if suggestion not in tried:
            return suggestion, draw
    return min(left, key=lambda point: (_distance(space, point, suggestion), point)), REDRAWS + 1


def _suggest(
    study: optuna.Study, space: SearchSpace, settings: dict[str, Any], seeds: tuple[int, int, int]
) -> Point:
    number = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    sampler: optuna.samplers.BaseSampler
    if settings["name"] == "random":
        sampler = optuna.samplers.RandomSampler(seed=number)
    else:
        names = ("multivariate", "n_startup_trials", "n_ei_candidates", "constant_liar")
        sampler = optuna.samplers.TPESampler(
            seed=number, **{name: settings[name] for name in names}
        )
    trial: FrozenTrial = optuna.trial.create_trial(state=TrialState.WAITING)
    free = {name: d for name, d in space.distributions().items() if not d.single()}
    values: dict[str, Any] = {name: d.low for name, d in space.distributions().items()}
    if settings.get("multivariate"):
        values |= sampler.sample_relative(study, trial, free)
        free = {} if len(study.trials) >= settings["n_startup_trials"] else free
    for name, distribution in free.items():
        values[name] = sampler.sample_independent(study, trial, name, distribution)
    return int(values["rank"]), int(values["num_experts"])


def _distance(space: SearchSpace, a: Point, b: Point) -> float:
    return abs(a[0] - b[0]) / space.rank[2] + abs(a[1] - b[1]) / space.num_experts[2]
