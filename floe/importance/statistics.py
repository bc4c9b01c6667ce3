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
from floe.types import Floats

FORMAT = 1

STATISTICS: dict[str, tuple[str, ...]] = {
    "gradient_norm": ("L",),
    "residual_norm": ("L",),
    "activation_energy": ("L",),
    "coupling": ("L", "L"),
    "signal_share": ("L", "P"),
    "explained_variance": ("L", "P"),
    "lamp_kept": ("L",),
    "angular_last": ("L + 1", "L + 1"),
    "angular_all": ("L + 1", "L + 1"),
    "error_growth": ("L",),
    "zeroth_order": ("L",),
    "kl_to_full": ("L",),
    "shapley": ("L",),
    "forward_place": ("L",),
    "forward_loss": ("L",),
}
"""Shapes of what can be measured; P counts projections and may differ from one to the next."""

_SHARES = ("coupling", "signal_share", "explained_variance", "lamp_kept", "angular_last",
           "angular_all")  # fmt: skip
_SIGNED = ("shapley",)


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What was measured of every layer; L layers, layers 0-based, all float64.

    Attributes:
        layers: L.
        values: the measured ones of STATISTICS by name, read-only:
            gradient_norm [L], nats per adapter unit: || sum_n dL_n/dB || of fresh adapters;
            residual_norm [L], nats: covariance-normalised gradient of a block's linear adapter;
            activation_energy [L]: mean squared norm of a block's input per token;
            coupling [L, L] in [0, 1]: absolute cosine of two layers' normalised gradients;
            signal_share [L, P] in [0, 1]: singular values above the Marchenko-Pastur edge, by sum;
            explained_variance [L, P] in [0, 1]: of the inputs' variance, by the leading directions;
            lamp_kept [L] in [0, 1]: share of the weights that global LAMP pruning keeps;
            angular_last, angular_all [L + 1, L + 1] in [0, 1]: angle between the hidden states
            before layers i and j (L = after the last) over pi, at the last or all tokens;
            error_growth [L]: relative error at the last block per relative error at block k;
            zeroth_order [L], nats: norm of a block's weights times its forward-only gradient norm;
            kl_to_full [L], nats: KL of all adapters' model to that of layer k's adapters alone;
            shapley [L], nats, signed: share of the loss that layer k's adapters take away;
            forward_place [L]: when layer k's adapters join in forward selection, 1 = first;
            forward_loss [L], nats: the loss when they have joined.
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
    if name not in STATISTICS:
        raise ValueError(f"a statistic must be one of {sorted(STATISTICS)}, got {name!r}")
    if not isinstance(array, np.ndarray) or array.dtype != np.float64:
        came = f"numpy {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{name} must be a numpy array of float64, got {came}")
    sizes: dict[str, int | None] = {"L": layers, "L + 1": layers + 1, "P": None}
    wanted = [sizes[letter] for letter in STATISTICS[name]]
    fits = len(wanted) == array.ndim and array.size > 0
    if not fits or any(w not in (None, n) for w, n in zip(wanted, array.shape, strict=True)):
        shape = ", ".join(STATISTICS[name])
        raise ValueError(f"{name} must be [{shape}] with L = {layers}, got shape {array.shape}")
    low = -np.inf if name in _SIGNED else 0.0
    high = 1.0 if name in _SHARES else np.inf
    bad = np.argwhere(~(np.isfinite(array) & (array >= low) & (array <= high)))
    if len(bad):
        where = tuple(int(i) for i in bad[0])
        rule = "finite" if low < 0 else "finite and >= 0" if high > 1 else "in [0, 1]"
        raise ValueError(f"{name} must be {rule}, got {array[where]} in layer {where[0]}")
