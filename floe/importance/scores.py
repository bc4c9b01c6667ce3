"""What is measured of a model's layers: scores and statistics, two immutable artifacts.

Needs numpy alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from floe import storage
from floe.errors import FileError, require
from floe.selection.policies.registry import known_statistics
from floe.types import Array, Floats, Floats32

FORMAT = 1

# Dimensions of every field: L layers, H heads, I neurons, P adapted projections, S samples.
FIELDS = {
    **{"head_fisher": "LH", "neuron_fisher": "LI", "head_taylor": "LH", "neuron_taylor": "LI"},
    **{"adapter_fisher": "L", "probe_fisher": "L", "module_fisher": "LP", "adapter_samples": "SL"},
    **{"gate_gradient": "SLP", "head_mean": "LH", "neuron_mean": "LI", "head_gradient": "SLH"},
    **{"neuron_gradient": "SLI"},
}
_REQUIRED = ("head_fisher", "neuron_fisher", "head_taylor", "neuron_taylor", "adapter_fisher")
_GRADIENTS = ("gate_gradient", "head_mean", "neuron_mean", "head_gradient", "neuron_gradient")
_SINGLE = ("gate_gradient", "head_gradient", "neuron_gradient")  # float32: one value a sample


@dataclass(frozen=True, eq=False)
class Scores:
    """Fisher information and Taylor cost of every unit of every layer.

    L layers, H heads, I neurons, P adapted projections, S samples. Units: Fisher in
    nats^2 summed over samples, Taylor in nats (mean over samples).

    Attributes:
        head_fisher: sum_n (d L_n / d m)^2 per head mask, [L, H] float64 >= 0 (Eq. 9-11).
        neuron_fisher: the same per FFN neuron, [L, I].
        head_taylor: cost |w g| of a head's weights on the base model, [L, H] float64 >= 0 (Eq.
            4-5).
        neuron_taylor: the same per neuron, [L, I].
        adapter_fisher: sum_n || d L_n / d phi_k ||^2 of a layer's adapters, [L] float64 >= 0.
        meta: how the scores were measured; whatever json can hold.
        probe_fisher: adapter_fisher at freshly drawn adapters, [L] float64, or None.
        module_fisher: adapter_fisher of every projection, [L, P] float64, or None; the
            projections' names are meta["adapter_modules"].
        adapter_samples: adapter_fisher of every sample, [S, L] float64, or None.
        gate_gradient: d L_n / d g of a factor g = 1 on a projection's adapter, [S, L, P] float32,
            or None.
        head_mean: mean over samples of d L_n / d m, the first-order term of Eq. 6, [L, H] float64,
            or None. neuron_mean: the same per neuron, [L, I].
        head_gradient: d L_n / d m per sample, [S, L, H] float32, or None.
        neuron_gradient: the same per neuron, [S, L, I] float32, or None.

    Raises:
        TypeError: an array is not a numpy array of its dtype.
        ValueError: shapes disagree, or a value is negative or not finite; names field, layer and
            unit.
    """

    head_fisher: Floats
    neuron_fisher: Floats
    head_taylor: Floats
    neuron_taylor: Floats
    adapter_fisher: Floats
    meta: dict[str, Any] = field(default_factory=dict)
    probe_fisher: Floats | None = None
    module_fisher: Floats | None = None
    adapter_samples: Floats | None = None
    gate_gradient: Floats32 | None = None
    head_mean: Floats | None = None
    neuron_mean: Floats | None = None
    head_gradient: Floats32 | None = None
    neuron_gradient: Floats32 | None = None

    def __post_init__(self) -> None:
        for name, array in self._arrays().items():
            _check_type(name, array, np.float32 if name in _SINGLE else np.float64)
        self._check_shapes()
        for name, array in self._arrays().items():
            _check_values(name, array)
        json.dumps(self.meta, allow_nan=False)  # what cannot be saved is refused now

    @property
    def layer_count(self) -> int:
        """L, the number of decoder layers."""
        return len(self.head_fisher)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an npz file, whole or not at all; equal scores give equal bytes."""
        storage.save_arrays(path, "scores", {"format": FORMAT, "meta": self.meta}, self._arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what :meth:`save` wrote.

        Raises:
            FileError: the file is missing, damaged, or of another format.
        """
        header, arrays = storage.load_arrays(path, "scores", FORMAT)
        missing = [name for name in _REQUIRED if name not in arrays]
        unknown = [name for name in arrays if name not in FIELDS]
        if missing or unknown:
            raise FileError(
                path, f"must hold the arrays of scores, missing {missing}, unknown {unknown}"
            )
        try:
            return cls(meta=header["meta"], **arrays)
        except (ValueError, TypeError) as error:
            raise FileError(path, str(error)) from error

    def _arrays(self) -> dict[str, Array]:
        """Every array that is there, by name."""
        values = {name: getattr(self, name) for name in FIELDS}
        return {name: v for name, v in values.items() if v is not None or name in _REQUIRED}

    def _check_shapes(self) -> None:
        """Every letter of ``FIELDS`` stands for one number."""
        sizes: dict[str, int] = {}
        for name, array in self._arrays().items():
            letters = FIELDS[name]
            if array.ndim != len(letters):
                raise ValueError(f"{name} must be [{', '.join(letters)}], got shape {array.shape}")
            for letter, size in zip(letters, array.shape, strict=True):
                if sizes.setdefault(letter, size) != size:
                    wanted = tuple(sizes.get(x, x) for x in letters)
                    raise ValueError(
                        f"{name} must have shape {wanted} as the other scores have, "
                        f"got {array.shape}"
                    )


def _check_type(name: str, array: Any, dtype: Any) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        given = f"numpy {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{name} must be a numpy array of {np.dtype(dtype).name}, got {given}")


def _check_values(name: str, array: Array) -> None:
    signed = name in _GRADIENTS
    bad = ~np.isfinite(array) if signed else ~(np.isfinite(array) & (array >= 0))
    if not bad.any():
        return
    where = tuple(np.argwhere(bad)[0].tolist())
    words = {"L": "layer", "H": "head", "I": "neuron", "P": "projection", "S": "sample"}
    place = ", ".join(f"{words[x]} {n}" for x, n in zip(FIELDS[name], where, strict=True))
    rule = "finite" if signed else "finite and >= 0"
    raise ValueError(f"{name} must be {rule}, got {array[where]} at {place}")


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
        require(self.layers >= 1, "layers must be >= 1", self.layers)
        for name, array in self.values.items():
            _check_statistic(name, array, self.layers)
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


def _check_statistic(name: str, array: Any, layers: int) -> None:
    known = known_statistics()
    require(name in known, f"a statistic must be one of {sorted(known)}", name)
    _check_type(name, array, np.float64)
    statistic = known[name]
    wanted = {"L": (layers,), "L + 1": (layers + 1,), "P": range(1, array.size + 1)}
    fits = len(statistic.sizes) == array.ndim and array.size > 0
    if not fits or any(
        n not in wanted[s] for s, n in zip(statistic.sizes, array.shape, strict=True)
    ):
        raise ValueError(
            f"{name} must be [{statistic.shape}] with L = {layers}, got shape {array.shape}"
        )
    within = (array >= statistic.low) & (array <= statistic.high) & np.isfinite(array)
    if not within.all():
        where = tuple(np.argwhere(~within)[0].tolist())
        raise ValueError(f"{name} must be {statistic.rule}, got {array[where]} in layer {where[0]}")
