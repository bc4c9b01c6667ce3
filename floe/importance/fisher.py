"""Empirical Fisher information of unit masks and adapters (FLoE Eq. 8-11)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from torch import nn

from floe.adapters.fingerprint import model_fingerprint
from floe.data.batches import Collator, TokenRow, fingerprint, rows_of
from floe.importance.chunk_store import Arrays, Workbook, chunks, passes
from floe.importance.gradients import Capture, RowGradients
from floe.types import Array, Batch, Floats, Floats32, Progress

REDUCTIONS = ("sample", "batch", "token")
_PER_ROW = ("adapter_samples", "gate_gradient", "head_gradient", "neuron_gradient")


@dataclass(frozen=True, eq=False)
class Fisher:
    """Sums over N rows; L layers, H heads (or KV groups), I neurons, P adapted projections.

    Attributes:
        head, neuron: Fisher information of the masks, [L, H] and [L, I] float64, nats^2; None
            without masks.
        module: sum of the rows' squared adapter gradient norms, [L, P] float64, 0 where there is no
            adapter; None without adapters.
        adapter_samples: the rows' own, summed over projections, [N, L] float64, or None.
        gate_gradient: d L_n / d g of a factor g = 1 on each adapter, [N, L, P] float32, or None.
        projections: names of the P projections.
        head_mean, neuron_mean: first-order term, mean of d L_n / d m, float64, or None.
        head_gradient, neuron_gradient: d L_n / d m of every row, [N, L, H] and [N, L, I]
            float32, or None.
        rows, tokens: how many went in.
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


def measure_fisher(
    model: nn.Module,
    batches: Iterable[Batch | TokenRow],
    *,
    reduction: str = "sample",
    scope: str = "base",
    head_unit: str = "head",
    masks: bool = True,
    adapters: bool = False,
    keep_samples: bool = False,
    first_order: bool = False,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Fisher:
    """Fisher information of every head and neuron mask, ``tau = sum_n (d L_n / d m)^2`` (Eq. 9).

    L_n is row n's mean NLL over its response tokens, in eval mode. Rows are measured in chunks and
    passes of their own (floe.importance.chunk_store), summed in float64 in row order within and in
    chunk order: the same bits whatever batches they came in and however many workers share them
    (on machines and thread counts that are alike).

    Args:
        model: plain or adapted causal language model; neither its parameters nor its flags change.
        batches: dicts passed to the model, with labels (-100 = no loss).
        reduction: "sample" squares each row's gradient (Eq. 8-9); "batch" squares the gradient of
            each given batch's mean loss, so opposite rows cancel; "token" squares each token's
            product (a diagnostic).
        scope, head_unit: see :class:`~floe.importance.gradients.Capture`.
        masks, adapters: what to measure; adapters also gives every row's norms and gate gradients.
        keep_samples: also return each row's mask gradients (not with "token"). first_order: also
            return their mean.
        folder: where finished chunks are kept, for a later run and for other workers.
        progress: called as progress(rows done, rows this worker measures, "fisher").

    Raises:
        ValueError: an unknown option, no rows, a row without labels, or a value that is not finite.
    """
    plan = FisherPlan(
        model, rows_of(batches), reduction, scope, head_unit, masks, adapters, keep_samples,
        first_order,
    )  # fmt: skip
    book = Workbook(folder, plan.identity | {"model": model_fingerprint(model)})
    plan.work(book, progress)
    book.wait()
    return plan.result(book)


@dataclass(frozen=True)
class FisherPlan:
    """What ``measure_fisher`` was asked for; ``name`` starts the names of its pieces."""

    model: nn.Module
    rows: Sequence[TokenRow]
    reduction: str = "sample"
    scope: str = "base"
    head_unit: str = "head"
    masks: bool = True
    adapters: bool = False
    keep_samples: bool = False
    first_order: bool = False
    name: str = "fisher"

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}, got {self.reduction!r}")
        if self.reduction == "token" and (self.keep_samples or self.first_order):
            raise ValueError(
                'keep_samples and first_order need reduction "sample" or "batch", got "token"'
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the numbers, the model aside."""
        hidden = ("model", "rows")
        options = {k: v for k, v in vars(self).items() if k not in hidden}
        return options | {"data": fingerprint(self.rows)} | self._batches()

    def work(self, book: Workbook, progress: Progress | None) -> None:
        """Measure this worker's missing chunks."""
        parts = self._chunks()
        mine = sum(len(parts[place]) for place, _ in book.missing(self._names()))
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

            book.work(self._names(), build)

    def result(self, book: Workbook) -> Fisher:
        """The chunks' sums added up in their order."""
        sums: dict[str, Any] = {}
        each: dict[str, list[Any]] = {name: [] for name in _PER_ROW}
        for name in self._names():
            for key, value in book.take(name).items():
                if key in each:
                    each[key].append(value)
                else:
                    sums[key] = sums[key] + value if key in sums else value
        rows = len(self.rows)
        means = {
            f"{kind}_mean": sums.pop(f"{kind}_sum") / rows
            for kind in ("head", "neuron")
            if f"{kind}_sum" in sums
        }
        samples: dict[str, Any] = {
            key: np.concatenate(parts) for key, parts in each.items() if parts
        }
        tokens = int(sums.pop("tokens"))
        names = self._capture().projections
        return Fisher(rows, tokens, names, **sums, **means, **samples)

    def _capture(self) -> Capture:
        return Capture(
            self.model, scope=self.scope, head_unit=self.head_unit, masks=self.masks,
            adapters=self.adapters, per_token=self.reduction == "token",
        )  # fmt: skip

    def _chunks(self) -> list[range]:
        return chunks(self.rows, whole_batches=self.reduction == "batch")

    def _names(self) -> list[str]:
        return [f"{self.name}-{place:05d}" for place in range(len(self._chunks()))]

    def _batches(self) -> dict[str, Any]:
        """The given batches, where the estimator means them."""
        if self.reduction != "batch":
            return {}
        return {"batches": [len(list(rows)) for _, rows in groupby(r.batch for r in self.rows)]}

    def _measured(self, capture: Capture, chunk: range) -> Arrays:
        found = _in_row_order(capture, self.rows, chunk)
        arrays: Arrays = {"tokens": np.array(found.tokens.sum())}
        batches = [self.rows[n].batch for n in chunk]
        for kind, gradients in (("head", found.head), ("neuron", found.neuron)):
            if gradients is None:
                continue
            arrays[kind] = added(terms(gradients, self.reduction, batches))
            if self.first_order:
                arrays[f"{kind}_sum"] = added(gradients)
            if self.keep_samples:
                arrays[f"{kind}_gradient"] = gradients.astype(np.float32)
        if found.adapter is not None and found.gate is not None:
            arrays["module"] = added(found.adapter)
            arrays["adapter_samples"] = found.adapter.sum(axis=2)
            arrays["gate_gradient"] = found.gate.astype(np.float32)
        return arrays


def _in_row_order(capture: Capture, rows: Sequence[TokenRow], chunk: range) -> RowGradients:
    """The gradients of a chunk's rows, measured pass by pass and put back in order."""
    groups, collate = passes(rows, chunk), Collator.for_model(capture.model)
    found = [capture.step(collate([rows[n] for n in group]), group) for group in groups]
    order = np.argsort([n for group in groups for n in group])

    def joined(parts: list[Any]) -> Any:
        return None if parts[0] is None else np.concatenate(parts)[order]

    return RowGradients(
        joined([part.head for part in found]),
        joined([part.neuron for part in found]),
        joined([part.adapter for part in found]),
        joined([part.gate for part in found]),
        joined([part.tokens for part in found]),
    )


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
    if reduction == "token":
        return gradients  # squared token by token already
    if reduction == "batch":
        numbers = np.asarray(batches)
        means = [gradients[numbers == n].mean(axis=0) for n in dict.fromkeys(batches)]
        gradients = np.stack(means)
    squares: Floats = np.square(gradients)
    return squares
