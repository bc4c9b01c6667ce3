"""Scores as they would have been on other rows: sums of the kept per-sample arrays, reweighted.

Fisher information is a sum over calibration rows, so every resample of the rows has its exact
scores without a model. Taylor costs are not kept by row and stay as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from floe.selection.audit.policies import KEEP_SAMPLES
from floe.types import Array, Floats

if TYPE_CHECKING:
    from floe.importance.scores import Scores

_SAMPLED = ("adapter_samples", "gate_gradient", "head_gradient", "neuron_gradient")
_DRAWS = 16  # reweighted together: squares are computed once for so many

NO_ROWS = "is no sum over rows"
ADAPTER = ("adapter_fisher", "segment")
MASKS = ("fisher_high", "fisher_low")


def resamplable(name: str, scores: Scores) -> str:
    """What is missing to compute the policy on other rows; "" if nothing.

    NO_ROWS for policies that look at Taylor costs alone, at statistics or at nothing: they are not
    functions of per-sample arrays.
    """
    if name in ADAPTER:
        return "" if scores.adapter_samples is not None else "scores.adapter_samples; score again"
    if name == "gate_fisher_diagonal":
        return "" if scores.gate_gradient is not None else "scores.gate_gradient; score again"
    if looks_at_masks(name):
        if scores.head_gradient is None or scores.neuron_gradient is None:
            return KEEP_SAMPLES
        reduction = scores.meta.get("reduction", "sample")
        if reduction != "sample":
            return f"a Fisher information summed over rows; reduction is {reduction!r}"
        return ""
    return NO_ROWS


def looks_at_masks(name: str) -> bool:
    """Whether the policy is a function of the masks' Fisher information."""
    return name in MASKS or name.startswith("masks/")


@dataclass(frozen=True, eq=False)
class Rows:
    """``scores`` and their per-sample arrays, in an order that the rows' content alone decides.

    So resamples do not depend on the order in which rows were scored, nor do sums over them.
    """

    scores: Scores
    arrays: dict[str, Array]

    @property
    def count(self) -> int:
        """S, 0 without per-sample arrays."""
        return len(next(iter(self.arrays.values()))) if self.arrays else 0

    def reweighted(self, weights: Floats, masks: bool = True) -> Iterator[Scores]:
        """The scores of every row of ``weights`` [B, S]: row n counts as often as its weight says.

        Gate gradients are carried along, times the root of the weights; mask gradients are not.
        Without ``masks`` the Fisher information of masks is left as it was, which saves most time.
        """
        for start in range(0, len(weights), _DRAWS):
            part = weights[start : start + _DRAWS]
            sums = self._sums(part, masks)
            for n, one in enumerate(part):
                values: dict[str, Any] = {name: each[n] for name, each in sums.items()}
                yield replace(self.scores, **values, **self._gates(one))

    def _sums(self, weights: Floats, masks: bool) -> dict[str, Floats]:
        found = {}
        if "adapter_samples" in self.arrays:
            found["adapter_fisher"] = weights @ self.arrays["adapter_samples"]
        for kind in ("head", "neuron"):
            if masks and f"{kind}_gradient" in self.arrays:
                gradient = self.arrays[f"{kind}_gradient"]
                layers = [
                    weights @ np.square(gradient[:, k].astype(np.float64))
                    for k in range(gradient.shape[1])
                ]
                found[f"{kind}_fisher"] = np.stack(layers, axis=1)
        return found

    def _gates(self, weights: Floats) -> dict[str, Any]:
        found: dict[str, Any] = dict.fromkeys(_SAMPLED)
        if "gate_gradient" in self.arrays:
            root = np.sqrt(weights).astype(np.float32)[:, None, None]
            found["gate_gradient"] = self.arrays["gate_gradient"] * root
        return found


def rows_of(scores: Scores) -> Rows:
    """The per-sample arrays that are there, rows ordered by a hash of their content."""
    arrays = {
        name: array for name in _SAMPLED if (array := getattr(scores, name, None)) is not None
    }
    if not arrays:
        return Rows(scores, {})
    samples = len(next(iter(arrays.values())))
    keys = []
    for n in range(samples):
        digest = hashlib.sha256()
        for array in arrays.values():
            digest.update(np.ascontiguousarray(array[n]).tobytes())
        keys.append(digest.digest())
    order = sorted(range(samples), key=keys.__getitem__)
    ordered = {name: array[order] for name, array in arrays.items()}
    return Rows(replace(scores, **ordered), ordered)


def bootstrap_weights(rows: int, draws: int, seed: int) -> Floats:
    """[draws, rows]: how often each row is drawn when ``rows`` are drawn with replacement."""
    random = np.random.default_rng(seed)
    even = np.full(rows, 1 / rows)
    return np.asarray(random.multinomial(rows, even, size=draws), dtype=np.float64)
