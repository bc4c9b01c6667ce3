"""Flags on the routers' statistics that floe.evaluation.routers measures. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

COLLAPSED_LOAD = 0.5
COLLAPSED_USAGE = 0.9
UNSPECIALISED = 0.01


@dataclass(frozen=True)
class RouterHealth:
    """One module's router over real tokens; see floe.evaluation.routers for the entropies.

    Attributes:
        usage: [M], mean gate of every expert.
        cv2: squared coefficient of variation of the usage: variance over squared mean, 0 if even.
        collapsed: load_entropy < COLLAPSED_LOAD, or one expert's usage > COLLAPSED_USAGE.
        unspecialised: mutual_information < UNSPECIALISED: the token hardly matters.
        A single expert has no flags.
    """

    layer: int
    module: str
    usage: tuple[float, ...]
    load_entropy: float
    token_entropy: float
    mutual_information: float
    cv2: float
    collapsed: bool
    unspecialised: bool


def router_health(measured: Iterable[Mapping[str, Any]]) -> tuple[RouterHealth, ...]:
    """Flags for what floe.evaluation.routers.router_statistics returned.

    Raises:
        KeyError: an entry lacks one of its values.
    """
    return tuple(_health(one) for one in measured)


def _health(one: Mapping[str, Any]) -> RouterHealth:
    usage = np.asarray(one["usage"], dtype=np.float64)
    load, information = float(one["load_entropy"]), float(one["mutual_information"])
    several = len(usage) > 1
    return RouterHealth(
        layer=int(one["layer"]),
        module=str(one["module"]),
        usage=tuple(usage.tolist()),
        load_entropy=load,
        token_entropy=float(one["token_entropy"]),
        mutual_information=information,
        cv2=float(usage.var() / usage.mean() ** 2),
        collapsed=several and bool(load < COLLAPSED_LOAD or usage.max() > COLLAPSED_USAGE),
        unspecialised=several and information < UNSPECIALISED,
    )
