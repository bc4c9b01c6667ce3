"""Measurements of a model's layers that policies rank by, as one artifact. Needs numpy alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from floe import storage
from floe.errors import FileError
from floe.selection.policies.registry import known_statistics
from floe.types import Floats

FORMAT = 1


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What was measured of every layer; L layers, layers 0-based, all float64.

    Attributes:
        layers: L.
        values: by name, read-only, what was measured of policies.registry.known_statistics(), where
            each says its shape, range and meaning; docs/POLICIES.md lists them.
        meta: how they were measured; whatever json can hold.

    Raises:
        TypeError: a value is no numpy array of float64.
        ValueError: an unknown name, a wrong shape, or a value out of range (names the layer).
    """

    layers: int
    values: Mapping[str, Floats]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.layers, bool) or not isinstance(self.layers, int):
            raise TypeError(f"layers must be an int, got {type(self.layers).__name__}")
        if self.layers < 1:
            raise ValueError(f"layers must be >= 1, got {self.layers}")
        for name, array in self.values.items():
            _check(name, array, self.layers)
        json.dumps(self.meta, allow_nan=False)  # what cannot be saved is refused now
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an npz file, whole or not at all; equal statistics give equal bytes.

        Raises:
            FileError: it cannot be written.
        """
        header = {"format": FORMAT, "layers": self.layers, "meta": self.meta}
        arrays = {name: self.values[name] for name in sorted(self.values)}
        storage.save_arrays(path, "statistics", header, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerStatistics:
        """Read what :meth:`save` wrote.

        Raises:
            FileError: the file is missing, damaged, or of another format.
        """
        header, arrays = storage.load_arrays(path, "statistics", FORMAT)
        try:
            return cls(header["layers"], arrays, header["meta"])
        except KeyError as error:
            raise FileError(path, f"its header must hold {error}") from error
        except (ValueError, TypeError) as error:
            raise FileError(path, str(error)) from error


def _check(name: str, array: Any, layers: int) -> None:
    known = known_statistics()
    if name not in known:
        raise ValueError(f"a statistic must be one of {sorted(known)}, got {name!r}")
    if not isinstance(array, np.ndarray) or array.dtype != np.float64:
        given = f"numpy {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{name} must be a numpy array of float64, got {given}")
    statistic = known[name]
    wanted = {"L": (layers,), "L + 1": (layers + 1,), "P": range(1, array.size + 1)}
    fits = len(statistic.sizes) == array.ndim and array.size > 0
    if not fits or any(
        n not in wanted[s] for s, n in zip(statistic.sizes, array.shape, strict=True)
    ):
        raise ValueError(
            f"{name} must be [{statistic.shape}] with L = {layers}, got shape {array.shape}"
        )
    within = (array >= statistic.low) & (array <= statistic.high)
    bad = np.argwhere(~(np.isfinite(array) & within))
    if len(bad):
        where = tuple(int(i) for i in bad[0])
        raise ValueError(f"{name} must be {statistic.rule}, got {array[where]} in layer {where[0]}")
