"""What a policy sees, and how it hands back its scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from floe.types import Floats

if TYPE_CHECKING:
    from floe.importance.scores import Scores
    from floe.importance.statistics import LayerStatistics


@dataclass(frozen=True, eq=False)
class Situation:
    """What a policy may look at.

    Attributes:
        scores: of the model.
        count: K, how many layers will be chosen, in [1, total].
        total: L.
        seed: for policies that draw.
        mask_scores: [L], the layer scores of the paper's masks.
        statistics: further measurements of the layers, or None.
    """

    scores: Scores
    count: int
    total: int
    seed: int
    mask_scores: Floats
    statistics: LayerStatistics | None = None

    def statistic(self, policy: str, name: str) -> Floats:
        """The statistic ``name`` that ``policy`` needs.

        Raises:
            ValueError: it was not measured (says how to), or is of another number of layers.
        """
        if self.statistics is None or name not in self.statistics.values:
            came = "no statistics" if self.statistics is None else sorted(self.statistics.values)
            raise ValueError(
                f"policy {policy!r} needs the statistic {name!r}, got {came}; measure it with "
                "floe.importance.layer_statistics.measure_statistics"
                f"(model, batches, [{policy!r}]) and hand it to select(..., statistics=...)"
            )
        if self.statistics.layers != self.total:
            raise ValueError(
                f"statistics must be of the scored model's {self.total} layers, "
                f"got {self.statistics.layers}"
            )
        return self.statistics.values[name]


Policy = Callable[[Situation], Floats]


def finite(name: str, values: ArrayLike) -> Floats:
    """``values`` [L] as float64 scores.

    Raises:
        ValueError: one is not finite; names it.
    """
    found = np.asarray(values, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(found))
    if bad.size:
        raise ValueError(f"{name}[{bad[0]}] must be finite, got {found[bad[0]]}")
    return found


def by_position(order: ArrayLike) -> Floats:
    """Scores in (0, 1] that reproduce an order: the first gets 1, the last 1 / L."""
    places = np.asarray(order)
    scores = np.empty(len(places))
    scores[places] = np.arange(len(places), 0, -1) / len(places)
    return scores


def best_window(windows: ArrayLike, size: int) -> Floats:
    """A full ranking that starts with the ``size`` contiguous layers of the best window.

    Windows are taken from the best (of equals the lowest start) to the worst; each adds those of
    its layers that are not there yet, in ascending order.

    Args:
        windows: [L - size + 1], the value of the window that starts at each layer.
    """
    values = np.asarray(windows, dtype=np.float64)
    order: dict[int, None] = {}
    for start in np.argsort(-values, kind="stable").tolist():
        order |= dict.fromkeys(range(start, start + size))
    return by_position(list(order))
