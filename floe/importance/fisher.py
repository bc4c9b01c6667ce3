"""Empirical Fisher information of unit masks and adapters (FLoE Eq. 8-11)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from torch import nn

from floe.data.batches import TokenRow, fingerprint
from floe.errors import require
from floe.importance.chunk_store import Arrays, Workbook, chunks, passes
from floe.importance.gradients import Capture
from floe.types import Array, Floats, Floats32, Progress

REDUCTIONS = ("sample", "batch")
_PER_ROW = ("adapter_samples", "gate_gradient", "head_gradient", "neuron_gradient")


@dataclass(frozen=True, eq=False)
class Fisher:
    """Sums over N rows, as :class:`~floe.importance.scores.Scores` holds them; None if not asked.

    ``head`` [L, H] and ``neuron`` [L, I]: of the masks, nats^2. ``module`` [L, P]: the rows'
    squared adapter gradient norms, 0 where there is no adapter; ``adapter_samples`` [N, L]: the
    rows' own, summed over the P ``projections``; ``gate_gradient`` [N, L, P].
    """

    rows: int
    tokens: int
    projections: tuple[str, ...] = ()
    head: Floats | None = None
    neuron: Floats | None = None
    module: Floats | None = None
    adapter_samples: Floats | None = None
    gate_gradient: Floats32 | None = None
    head_mean: Floats | None = None
    neuron_mean: Floats | None = None
    head_gradient: Floats32 | None = None
    neuron_gradient: Floats32 | None = None

    @property
    def adapter(self) -> Floats | None:
        """``module`` summed over projections, [L] float64."""
        return None if self.module is None else self.module.sum(axis=1)

    @property
    def fields_of_scores(self) -> dict[str, Any]:
        """The fields of Scores that these sums and rows are."""
        sums = ("head", "neuron", "adapter", "module")
        rest = {name: getattr(self, name) for name in ("head_mean", "neuron_mean", *_PER_ROW)}
        return rest | {f"{name}_fisher": getattr(self, name) for name in sums}


@dataclass(frozen=True)
class FisherPlan:
    """Fisher information of every head and neuron mask, ``tau = sum_n (d L_n / d m)^2`` (Eq. 9).

    L_n is row n's mean NLL over its response tokens, in eval mode. Rows are measured in chunks and
    passes of their own, summed in float64 in row order within a chunk and in chunk order: the same
    bits whatever batches they came in and however many workers share them (on machines and thread
    counts that are alike).

    Attributes:
        reduction: "sample" squares each row's gradient (Eq. 8-9); "batch" squares the gradient of
            each given batch's mean loss, so opposite rows cancel.
        scope: see :class:`~floe.importance.gradients.Capture`.
        masks, adapters: what to measure; adapters also gives every row's norms and gate gradients.
        keep_samples: also return each row's mask gradients. first_order: also return their mean.
        name: how the names of the pieces begin.
    """

    model: nn.Module
    rows: Sequence[TokenRow]
    reduction: str = "sample"
    scope: str = "base"
    masks: bool = True
    adapters: bool = False
    keep_samples: bool = False
    first_order: bool = False
    name: str = "fisher"

    def __post_init__(self) -> None:
        rule = f"reduction must be one of {REDUCTIONS}"
        require(self.reduction in REDUCTIONS, rule, self.reduction)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the numbers, the model aside."""
        options = {k: v for k, v in vars(self).items() if k not in ("model", "rows")}
        options["data"] = fingerprint(self.rows)
        if self.reduction == "batch":  # the estimator means the given batches
            sizes = [len(list(rows)) for _, rows in groupby(row.batch for row in self.rows)]
            options["batches"] = sizes
        return options

    def work(self, book: Workbook, progress: Progress | None) -> None:
        """Measure this worker's missing chunks; progress(rows done, rows it measures, name).

        Raises:
            ValueError: a row without labels, or a value that is not finite.
        """
        parts, names = self._chunks(), self._names()
        mine = sum(len(parts[place]) for place, _ in book.missing(names))
        if not mine:
            return
        done = 0
        with self._capture() as capture:

            def build(place: int) -> Arrays:
                nonlocal done
                done += len(parts[place])
                arrays = self._measured(capture, parts[place])
                if progress is not None:
                    progress(done, mine, self.name)
                return arrays

            book.work(names, build)

    def result(self, book: Workbook) -> Fisher:
        """The chunks' sums added up in their order."""
        sums: dict[str, Any] = {}
        each: dict[str, list[Any]] = {}
        for name in self._names():
            for key, value in book.take(name).items():
                if key in _PER_ROW:
                    each.setdefault(key, []).append(value)
                else:
                    sums[key] = sums[key] + value if key in sums else value
        for kind in ("head", "neuron"):
            if f"{kind}_sum" in sums:
                sums[f"{kind}_mean"] = sums.pop(f"{kind}_sum") / len(self.rows)
        samples: dict[str, Any] = {key: np.concatenate(parts) for key, parts in each.items()}
        tokens, names = int(sums.pop("tokens")), self._capture().projections
        return Fisher(len(self.rows), tokens, names, **sums, **samples)

    def _capture(self) -> Capture:
        return Capture(self.model, scope=self.scope, masks=self.masks, adapters=self.adapters)

    def _chunks(self) -> list[range]:
        return chunks(self.rows, whole_batches=self.reduction == "batch")

    def _names(self) -> list[str]:
        return [f"{self.name}-{place:05d}" for place in range(len(self._chunks()))]

    def _measured(self, capture: Capture, chunk: range) -> Arrays:
        gradients = capture.run(self.rows, passes(self.rows, chunk))
        arrays: Arrays = {"tokens": np.array(gradients.tokens.sum())}
        batches = [self.rows[n].batch for n in chunk]
        for kind, values in (("head", gradients.head), ("neuron", gradients.neuron)):
            if values is None:
                continue
            arrays[kind] = added(terms(values, self.reduction, batches))
            if self.first_order:
                arrays[f"{kind}_sum"] = added(values)
            if self.keep_samples:
                arrays[f"{kind}_gradient"] = values.astype(np.float32)
        if gradients.adapter is not None and gradients.gate is not None:
            arrays["module"] = added(gradients.adapter)
            arrays["adapter_samples"] = gradients.adapter.sum(axis=2)
            arrays["gate_gradient"] = gradients.gate.astype(np.float32)
        return arrays


def added(rows: Array) -> Floats:
    """The sum of the rows, one after the other, in float64."""
    total = np.zeros(rows.shape[1:])
    for row in rows:
        total += row
    return total


def terms(gradients: Floats, reduction: str, batches: Sequence[int]) -> Floats:
    """What is summed into the Fisher information, from the gradients [S, ...] of a chunk's rows.

    ``batches`` holds the number of the batch each row came in.
    """
    if reduction == "batch":
        numbers = np.asarray(batches)
        means = [gradients[numbers == n].mean(axis=0) for n in dict.fromkeys(batches)]
        gradients = np.stack(means)
    squares: Floats = np.square(gradients)
    return squares
