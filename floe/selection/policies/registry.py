"""What a policy is, and the table of all policies, to which every file of this package adds.

A policy's file holds all there is to say about it: its rule, its source, what had to be assumed,
what it needs, and what was measured of it. It must load without torch, so that layers can be chosen
from saved scores on any machine: what measures statistics on a model is therefore named as
"module:function" (or imports torch inside), and loaded when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from floe.errors import require_all
from floe.types import Floats

if TYPE_CHECKING:
    from floe.importance.scores import LayerStatistics, Scores

POLICIES: dict[str, Policy] = {}

OPTIONAL = {
    "probe_fisher": "score with probe=True, or name probe among the baselines",
    "gate_gradient": "score the model again",
}
"""Arrays that scores may lack -> how to get them."""


@dataclass(frozen=True)
class Statistic:
    """What is measured of every layer: float64, finite.

    Attributes:
        shape: sizes, comma between them: L layers, P projections (may differ from one statistic to
            the next), or "L + 1".
        about: what it is, and its unit.
        low, high: the range, both included.
    """

    shape: str
    about: str
    low: float = 0.0
    high: float = inf

    @property
    def sizes(self) -> tuple[str, ...]:
        """One entry a dimension."""
        return tuple(self.shape.split(", "))

    @property
    def rule(self) -> str:
        """The range in words."""
        if self.high == 1:
            return "in [0, 1]"
        return "finite" if self.low < 0 else "finite and >= 0"


def share(shape: str, about: str) -> Statistic:
    """A statistic in [0, 1]."""
    return Statistic(shape, about, high=1.0)


@dataclass(frozen=True, eq=False)
class Measure:
    """One look at a model that gives statistics.

    ``by`` is a function or its "module:function". It gets those of model, batches, statistics (the
    wanted names), seed, rank, keep, sets, probes, steps and progress that it has parameters for,
    see measure_statistics; it returns the array, or name -> array if it ``gives`` several.
    """

    by: str | Callable[..., Any]
    gives: Mapping[str, Statistic]


@dataclass(frozen=True, eq=False)
class PolicyInputs:
    """What a policy may look at.

    Attributes:
        scores: of the model.
        count: K, how many layers will be chosen, in [1, total].
        total: L.
        seed: for policies that draw.
        masks: [L], the layer scores of the paper's masks, or what computes them when asked.
        statistics: further measurements of the layers, or None.
        policy: the one that looks; for messages.
    """

    scores: Scores
    count: int
    total: int
    seed: int
    masks: Floats | Callable[[], Floats]
    statistics: LayerStatistics | None = None
    policy: str = ""

    @property
    def mask_scores(self) -> Floats:
        """The layer scores [L] of the paper's masks."""
        return self.masks() if callable(self.masks) else self.masks

    def array(self, name: str) -> Floats:
        """The array ``name`` of the scores, float64.

        Raises:
            ValueError: it was not measured (says how to), or holds a number that is not finite.
        """
        values = getattr(self.scores, name)
        if values is None:
            raise ValueError(
                f"policy {self.policy!r} needs scores.{name}, got None; {OPTIONAL[name]}"
            )
        return finite(name, values)

    def statistic(self, name: str) -> Floats:
        """The statistic of that name.

        Raises:
            ValueError: it was not measured (says how to), or is of another number of layers.
        """
        if self.statistics is None or name not in self.statistics.values:
            given = "no statistics" if self.statistics is None else sorted(self.statistics.values)
            raise ValueError(
                f"policy {self.policy!r} needs the statistic {name!r}, got {given}; measure it "
                "with floe.importance.layer_statistics.measure_statistics"
                f"(model, batches, [{self.policy!r}]) and hand it to select(..., statistics=...)"
            )
        if self.statistics.layers != self.total:
            raise ValueError(
                f"statistics must be of the scored model's {self.total} layers, "
                f"got {self.statistics.layers}"
            )
        return self.statistics.values[name]


Rule = Callable[[PolicyInputs], Floats]


@dataclass(frozen=True, eq=False)
class Policy:
    """A rule that gives every layer a score, [L] float64; the K of the highest scores are adapted.

    Attributes:
        name, rule: as registered.
        score: what the score is, in words. source: where the idea is from. assumed: what had to be
            added to it. measured: what trainings on its layers showed; empty if there were none.
        cost: what its measure needs and takes.
        reads: the arrays of the scores that its order rests on.
        measure: what has to be looked at besides; statistics: those of it that the policy needs.
        cheap: ``floe audit`` measures it unasked: a few passes over the rows, none for each layer.
        plain_weights: its measure needs base weights that are not quantised.
        modules: the scores of single projections, [L, P]; None if the policy has none.
    """

    name: str
    rule: Rule
    score: str
    source: str = ""
    assumed: str = ""
    measured: str = ""
    cost: str = ""
    reads: tuple[str, ...] = ()
    measure: Measure | None = None
    statistics: tuple[str, ...] = ()
    cheap: bool = False
    plain_weights: bool = False
    modules: Callable[[Scores], Floats | None] | None = None

    def __call__(self, inputs: PolicyInputs) -> Floats:
        """The layers' scores, [L] float64, higher = chosen sooner.

        Raises:
            ValueError: scores or statistics lack what the policy reads, or it is not finite.
        """
        return finite(self.name, self.rule(replace(inputs, policy=self.name)))


def policy(name: str = "", measure: Measure | None = None, **about: Any) -> Callable[[Rule], Rule]:
    """Add the function below to POLICIES, under its own name unless another is given.

    ``about``: the other fields of :class:`Policy`; ``statistics`` are all that ``measure`` gives
    unless some are named.

    Raises:
        ValueError: the name is taken.
    """

    def add(rule: Rule) -> Rule:
        entry = Policy(name or rule.__name__, rule, measure=measure, **about)
        if measure is not None and not entry.statistics:
            entry = replace(entry, statistics=tuple(measure.gives))
        if entry.name in POLICIES:
            raise ValueError(f"a policy named {entry.name!r} exists already")
        POLICIES[entry.name] = entry
        return rule

    return add


def known_statistics() -> dict[str, Statistic]:
    """All that the policies' measures give, by name."""
    measures = dict.fromkeys(p.measure for p in POLICIES.values() if p.measure is not None)
    return {name: statistic for measure in measures for name, statistic in measure.gives.items()}


def finite(name: str, values: ArrayLike) -> Floats:
    """``values`` as float64; ValueError names the first that is not finite."""
    array = np.asarray(values, dtype=np.float64)
    require_all(np.isfinite(array), name, "finite", array)
    return array


def by_position(order: ArrayLike) -> Floats:
    """Scores in (0, 1] that reproduce an order: the first gets 1, the last 1 / L."""
    places = np.asarray(order)
    scores = np.empty(len(places))
    scores[places] = np.arange(len(places), 0, -1) / len(places)
    return scores


def best_window(windows: Sequence[float] | Floats, size: int) -> Floats:
    """A full ranking that starts with the ``size`` contiguous layers of the best window.

    Windows [L - size + 1], by the layer they start at, are taken from the best (of equals the
    lowest start) to the worst; each adds those of its layers that are not there yet, ascending.
    """
    order: dict[int, None] = {}
    for start in np.argsort(-np.asarray(windows, dtype=np.float64), kind="stable").tolist():
        order |= dict.fromkeys(range(start, start + size))
    return by_position(list(order))
