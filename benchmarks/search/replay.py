"""The strategies of `floe search` on a surface that is known: losses are looked up, not trained.

A trial is one point tried; no strategy tries a point twice. A search has found what it looked for
at its first trial on a good point, and three things are called good (``GOOD``):

- ``best``: the lowest loss of the surface itself.
- ``1 SE``: a loss above the best's by at most one standard error of that difference, which is
  paired: both points have the same validation rows. What these rows cannot tell from the best.
- ``1 %``: a loss above the best's by at most 1 % of what training gained, base loss minus best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna

from benchmarks import harness
from benchmarks.harness import Row
from floe.rank_search.space import SAMPLERS, Point, SearchSpace, propose, sampler_settings
from floe.rank_search.studies import Outcome, Owner, begin_trial, end_trial
from floe.storage import read_json
from floe.types import Floats

GOOD = ("best", "1 SE", "1 %")
STRATEGIES = ("grid", "random", "tpe", "paper")
assert set(STRATEGIES) == set(SAMPLERS)
CHECKPOINTS = (10, 20, 30)
"""Trials after which the regret is printed."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Surface:
    """What training gave at every point of a space, in the order of ``space.points()``.

    ``nll`` [P, S]: summed losses of the validation rows, nats; ``tokens`` [S]: their targets;
    ``seconds`` [P]: of training and validation; ``base``: the base model's loss.
    """

    space: SearchSpace
    nll: Floats
    tokens: Floats
    seconds: Floats
    base: float
    seed: int = 0

    @property
    def loss(self) -> Floats:
        """Validation loss [P], nats per target token."""
        loss: Floats = self.nll.sum(1) / self.tokens.sum()
        return loss

    @property
    def error(self) -> Floats:
        """Standard error [P] of each point's loss minus the best's, on the same rows."""
        best = self.nll[int(self.loss.argmin())]
        return np.array([standard_error(row - best, self.tokens) for row in self.nll])

    def good(self) -> dict[str, set[Point]]:
        """The good points by the three definitions of ``GOOD``."""
        loss, points = self.loss, self.space.points()
        gap = loss - loss.min()
        gained = max(self.base - float(loss.min()), 0.0)
        flags = {"best": gap <= 0.0, "1 SE": gap <= self.error, "1 %": gap <= 0.01 * gained}
        return {
            name: {p for p, good in zip(points, flags[name], strict=True) if good} for name in GOOD
        }


def standard_error(gap: Floats, tokens: Floats) -> float:
    """Of the mean difference per token, from the rows' differences [S] and target tokens [S]."""
    count, total = len(gap), tokens.sum()
    rest = gap - gap.sum() / total * tokens
    return float(np.sqrt(count / (count - 1) * (rest @ rest)) / total)


def read(folder: Path) -> list[Surface]:
    """The surfaces of the seeds whose points are all there."""
    settings, base = read_json(folder / "settings.json"), read_json(folder / "base.json")
    space = SearchSpace(tuple(settings["rank"]), tuple(settings["experts"]))
    runs: dict[int, dict[Point, Row]] = {}
    for file in sorted(folder.glob("points/*.json")):
        run = read_json(file)
        if run["tokens"] != base["tokens"]:
            raise ValueError(f"points must be measured on the same rows, got others in {file}")
        runs.setdefault(run["seed"], {})[run["rank"], run["experts"]] = run
    points = space.points()
    whole = {seed: made for seed, made in sorted(runs.items()) if len(made) == len(points)}
    if not whole:
        most = max((len(made) for made in runs.values()), default=0)
        raise ValueError(f"a seed must have all {len(points)} points to replay, got {most}")
    return [
        Surface(
            space,
            np.array([made[point]["nll"] for point in points]),
            np.array(base["tokens"], dtype=np.float64),
            np.array([made[point]["seconds"] for point in points]),
            base["loss"],
            seed,
        )
        for seed, made in whole.items()
    ]


def replay(surface: Surface, strategy: str, seed: int, startup_trials: int = 10) -> list[int]:
    """Places in ``space.points()`` that the strategy tries, in order, up to the best one."""
    settings, space = sampler_settings(strategy, startup_trials), surface.space
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    places = {point: place for place, point in enumerate(space.points())}
    loss, owner, tried = surface.loss, Owner.current(), list[int]()
    while not tried or loss[tried[-1]] > loss.min():
        point, redraws = propose(study, space, settings, seed, len(tried))
        trial = begin_trial(study, space.distributions(), point, owner, len(tried), redraws)
        tried.append(places[point])
        end_trial(study, trial, Outcome(float(loss[tried[-1]])))
    return tried


def expected_trials(points: int, good: int) -> float:
    """Mean trials until one of ``good`` of ``points`` is met in uniformly random order, exactly."""
    return (points + 1) / (good + 1)


def summarise(
    surfaces: Sequence[Surface], strategy: str, repeats: int, startup_trials: int = 10
) -> Row:
    """How one strategy did, over ``repeats`` replays of every surface.

    ``found``: for each definition of good the trials until then (median, p20, p80, mean and its
    95 % bootstrap interval over replays), the shares of the trials and of the seconds that all
    points take, and the mean trials of uniformly random order. ``regret``: after each trial the
    lowest loss so far minus the surface's best, nats per token: mean, p20, p80.
    """
    count = len(surfaces[0].space.points())
    trials: dict[str, list[int]] = {name: [] for name in GOOD}
    shares: dict[str, list[float]] = {name: [] for name in GOOD}
    expected: dict[str, list[float]] = {name: [] for name in GOOD}
    regrets: list[Floats] = []
    for surface in surfaces:
        points, good = surface.space.points(), surface.good()
        for name in GOOD:
            expected[name].append(expected_trials(count, len(good[name])))
        for repeat in range(repeats):
            tried = replay(surface, strategy, repeat, startup_trials)
            regrets.append(_regret(surface, tried))
            for name in GOOD:
                until = _trials_until(tried, points, good[name])
                trials[name].append(until)
                spent = surface.seconds[tried[:until]].sum()
                shares[name].append(float(spent / surface.seconds.sum()))
    counted = {
        name: {
            **harness.summary(trials[name]),
            **_mean_interval(trials[name]),
            "share_of_trials": float(np.mean(trials[name])) / count,
            "share_of_seconds": float(np.mean(shares[name])),
            "expected_in_random_order": float(np.mean(expected[name])),
        }
        for name in GOOD
    }
    low, high = np.percentile(regrets, [20, 80], axis=0)
    curve = {"mean": np.mean(regrets, axis=0), "p20": low, "p80": high}
    return {"found": counted, "regret": {name: part.tolist() for name, part in curve.items()}}


def noise(surfaces: Sequence[Surface]) -> dict[str, float] | None:
    """How far the seeds agree; None with fewer than two.

    ``seed_sd``: of a point's loss between seeds (root of the mean variance), ``point_sd``: of the
    points' mean losses, ``rank_correlation``: Spearman's, mean over pairs of seeds,
    ``regret_elsewhere``: what one seed's best loses to another seed's best on that other seed, mean
    over ordered pairs; ``regret_of_any``: the same for a random point. Losses in nats per token.
    """
    if len(surfaces) < 2:
        return None
    losses = np.array([surface.loss for surface in surfaces])
    alike = np.atleast_2d(np.corrcoef(losses.argsort(1).argsort(1)))
    pairs = [(a, b) for a in range(len(losses)) for b in range(len(losses)) if a != b]
    elsewhere = [float(losses[b, losses[a].argmin()] - losses[b].min()) for a, b in pairs]
    return {
        "seed_sd": float(np.sqrt(losses.var(0, ddof=1).mean())),
        "point_sd": float(losses.mean(0).std(ddof=1)),
        "rank_correlation": float(np.mean([alike[a, b] for a, b in pairs])),
        "regret_elsewhere": float(np.mean(elsewhere)),
        "regret_of_any": float((losses - losses.min(1, keepdims=True)).mean()),
    }


def _trials_until(tried: Sequence[int], points: Sequence[Point], good: set[Point]) -> int:
    """Trials up to the first on a good point, that one included."""
    return next(number for number, place in enumerate(tried, start=1) if points[place] in good)


def _regret(surface: Surface, tried: Sequence[int]) -> Floats:
    """After each of as many trials as there are points; 0 from the best on."""
    loss = surface.loss
    regret = np.zeros(len(loss))
    regret[: len(tried)] = np.minimum.accumulate(loss[list(tried)]) - loss.min()
    return regret


def _mean_interval(values: Sequence[int]) -> dict[str, float]:
    rng, data = np.random.default_rng(41), np.array(values, dtype=np.float64)
    means = data[rng.integers(0, len(data), (RESAMPLES, len(data)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(data.mean()), "low": float(low), "high": float(high)}
