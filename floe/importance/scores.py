"""The importance scores of a model, as one immutable artifact in float64. Needs numpy alone."""

from __future__ import annotations

import io
import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from floe.atomic import write_bytes
from floe.errors import FileError

FORMAT = 1
FloatArray = NDArray[np.float64]

_HEADS = ("head_fisher", "head_taylor")
_NEURONS = ("neuron_fisher", "neuron_taylor")
_LAYERS = ("adapter_fisher", "probe_fisher")
_GRADIENTS = ("head_gradient", "neuron_gradient")
_OPTIONAL = ("probe_fisher", *_GRADIENTS)
_FIELDS = (*_HEADS, *_NEURONS, *_LAYERS, *_GRADIENTS)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold: equal content gives equal bytes


@dataclass(frozen=True, eq=False)
class Scores:
    """Fisher information and Taylor cost of every unit of every layer.

    L layers, H heads (or KV groups), I neurons, S samples. Units: Fisher in nats^2 summed over
    samples, Taylor in nats (mean over samples).

    Attributes:
        head_fisher: sum_n (d L_n / d m)^2 per head mask, [L, H] float64 >= 0 (Eq. 9-11).
        neuron_fisher: the same per FFN neuron, [L, I].
        head_taylor: cost |w g| of a head's weights on the base model, [L, H] float64 >= 0 (Eq.
            4-5).
        neuron_taylor: the same per neuron, [L, I].
        adapter_fisher: sum_n || d L_n / d phi_k ||^2 of a layer's adapters, [L] float64 >= 0.
        meta: how the scores were measured; whatever json can hold.
        probe_fisher: adapter_fisher at freshly drawn adapters, [L] float64, or None.
        head_gradient: d L_n / d m per sample, [S, L, H] float32, or None.
        neuron_gradient: the same per neuron, [S, L, I] float32, or None.

    Raises:
        TypeError: an array is not a numpy array of its dtype.
        ValueError: shapes disagree, or a value is negative or not finite; names field, layer and
            unit.
    """

    head_fisher: FloatArray
    neuron_fisher: FloatArray
    head_taylor: FloatArray
    neuron_taylor: FloatArray
    adapter_fisher: FloatArray
    meta: dict[str, Any] = field(default_factory=dict)
    probe_fisher: FloatArray | None = None
    head_gradient: NDArray[np.float32] | None = None
    neuron_gradient: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        for name, array in self._arrays().items():
            _check_type(name, array)
        self._check_shapes()
        for name, array in self._arrays().items():
            _check_values(name, array)
        json.dumps(self.meta, allow_nan=False)  # what cannot be saved is refused now

    @property
    def layer_count(self) -> int:
        """L, the number of decoder layers."""
        return len(self.head_fisher)

    @property
    def head_count(self) -> int:
        """H, mask units of one layer's attention."""
        return int(self.head_fisher.shape[1])

    @property
    def neuron_count(self) -> int:
        """I, mask units of one layer's FFN."""
        return int(self.neuron_fisher.shape[1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an npz file, whole or not at all; equal scores give equal bytes."""
        buffer = io.BytesIO()
        self._write(buffer)
        try:
            write_bytes(Path(path), buffer.getvalue())
        except OSError as error:
            raise FileError(path, f"cannot write the scores: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what :meth:`save` wrote.

        Raises:
            FileError: the file is missing, damaged, or of another format.
        """
        try:
            arrays = _read_arrays(path)
        except FileNotFoundError:
            raise FileError(path, "no such file; write it with Scores.save") from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            raise FileError(path, f"not a readable scores file ({error})") from error
        meta = _read_meta(path, arrays)
        missing = [name for name in _FIELDS if name not in arrays and name not in _OPTIONAL]
        unknown = [name for name in arrays if name not in _FIELDS]
        if missing or unknown:
            raise FileError(
                path, f"must hold the arrays of scores, missing {missing}, unknown {unknown}"
            )
        try:
            return cls(meta=meta, **arrays)
        except (ValueError, TypeError) as error:
            raise FileError(path, str(error)) from error

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """Every array that is there, by name."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return {name: v for name, v in values.items() if v is not None or name not in _OPTIONAL}

    def _write(self, file: Any) -> None:
        meta = json.dumps({"format": FORMAT, "meta": self.meta}, sort_keys=True, allow_nan=False)
        arrays: dict[str, NDArray[Any]] = {"meta": np.frombuffer(meta.encode(), dtype=np.uint8)}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, array in (arrays | self._arrays()).items():
                entry = zipfile.ZipInfo(f"{name}.npy", date_time=_EPOCH)
                with archive.open(entry, "w", force_zip64=True) as member:
                    npy.write_array(member, np.ascontiguousarray(array), allow_pickle=False)

    def _check_shapes(self) -> None:
        for name, kind in (("head_fisher", "H"), ("neuron_fisher", "I")):
            if getattr(self, name).ndim != 2:
                raise ValueError(
                    f"{name} must be [L, {kind}], got shape {getattr(self, name).shape}"
                )
        layers, heads = self.head_fisher.shape
        neurons = self.neuron_fisher.shape[1]
        expected: dict[str, tuple[int, ...]] = dict.fromkeys(_LAYERS, (layers,))
        expected |= dict.fromkeys(_HEADS, (layers, heads)) | dict.fromkeys(
            _NEURONS, (layers, neurons)
        )
        for name, array in self._arrays().items():
            if name not in _GRADIENTS and array.shape != expected[name]:
                raise ValueError(f"{name} must have shape {expected[name]}, got {array.shape}")
        rows = {len(g) for name, g in self._arrays().items() if name in _GRADIENTS and g.ndim}
        for name, units in (("head_gradient", heads), ("neuron_gradient", neurons)):
            gradient = getattr(self, name)
            if gradient is not None and (len(rows) != 1 or gradient.shape[1:] != (layers, units)):
                raise ValueError(
                    f"{name} must be [S, {layers}, {units}] with one S for heads and neurons, "
                    f"got {gradient.shape} and S in {sorted(rows)}"
                )


def _check_type(name: str, array: Any) -> None:
    dtype = np.float32 if name in _GRADIENTS else np.float64
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        came = f"numpy {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{name} must be a numpy array of {np.dtype(dtype).name}, got {came}")


def _check_values(name: str, array: NDArray[Any]) -> None:
    signed = name in _GRADIENTS
    bad = ~np.isfinite(array) if signed else ~(np.isfinite(array) & (array >= 0))
    if not bad.any():
        return
    where = tuple(int(i) for i in np.argwhere(bad)[0])
    rule = "finite" if signed else "finite and >= 0"
    raise ValueError(f"{name} must be {rule}, got {array[where]} at {_place(name, where)}")


def _place(name: str, where: tuple[int, ...]) -> str:
    kind = name.partition("_")[0]  # "head", "neuron", or a score of whole layers
    labels = {1: ("layer",), 2: ("layer", kind), 3: ("sample", "layer", kind)}[len(where)]
    return ", ".join(f"{label} {index}" for label, index in zip(labels, where, strict=True))


def _read_arrays(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                arrays[name.removesuffix(".npy")] = npy.read_array(member, allow_pickle=False)
    return arrays


def _read_meta(path: str | os.PathLike[str], arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Take "meta" out of ``arrays``, decoded and of this format."""
    if "meta" not in arrays:
        raise FileError(path, "must hold the entry 'meta' of a scores file, got none")
    try:
        header = json.loads(arrays.pop("meta").tobytes().decode())
        version, meta = header["format"], dict(header["meta"])
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(path, f"its entry 'meta' is not that of a scores file ({error})") from error
    if version != FORMAT:
        raise FileError(path, f"format must be {FORMAT}, got {version!r}; score the model again")
    return meta
