"""Empirical Fisher information of unit masks and adapters (FLoE Eq. 8-11)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from floe.importance.capture import Capture, RowGradients
from floe.importance.frozen import Batch

FloatArray = NDArray[np.float64]
Progress = Callable[[int, int, str], None]
REDUCTIONS = ("sample", "batch", "token")


@dataclass(frozen=True, eq=False)
class Fisher:
    """Sums over N rows; L layers, H heads (or KV groups), I neurons. All float64.

    ``head`` [L, H], ``neuron`` [L, I]: Fisher information, nats^2. ``adapter`` [L] or None: sum of
    the rows' squared adapter gradient norms. ``head_mean``, ``neuron_mean``: first-order term, mean
    of d L_n / d m, or None. ``head_gradient`` [N, L, H], ``neuron_gradient`` [N, L, I] float32: the
    rows' own gradients, or None. ``rows``, ``tokens``: how many went in.
    """

    head: FloatArray
    neuron: FloatArray
    adapter: FloatArray | None
    rows: int
    tokens: int
    head_mean: FloatArray | None = None
    neuron_mean: FloatArray | None = None
    head_gradient: NDArray[np.float32] | None = None
    neuron_gradient: NDArray[np.float32] | None = None


def measure_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    reduction: str = "sample",
    scope: str = "base",
    head_unit: str = "head",
    adapters: bool = False,
    keep_samples: bool = False,
    first_order: bool = False,
    progress: Progress | None = None,
) -> Fisher:
    """Fisher information of every head and neuron mask, ``tau = sum_n (d L_n / d m)^2`` (Eq. 9).

    L_n is row n's mean NLL over its response tokens, in eval mode. The result does not depend on
    how rows are batched or padded, except with ``reduction="batch"``, whose meaning does.

    Args:
        model: plain or adapted causal language model; neither its parameters nor its flags change.
        batches: dicts passed to the model, with labels (-100 = no loss).
        reduction: "sample" squares each row's gradient (Eq. 8-9); "batch" squares the gradient of
            each batch's mean loss, so opposite rows cancel; "token" squares each token's product (a
            diagnostic).
        scope, head_unit: see :class:`~floe.importance.capture.Capture`.
        adapters: also sum the adapters' squared gradient norms.
        keep_samples: also return each row's gradients (not with "token"). first_order: also return
            their mean.
        progress: called as progress(batches done, batches in all, "fisher").

    Raises:
        ValueError: an unknown option, no rows, a row without labels, or a value that is not finite.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if reduction == "token" and (keep_samples or first_order):
        raise ValueError(
            'keep_samples and first_order need reduction "sample" or "batch", got "token"'
        )
    batches = list(batches)
    kept: list[RowGradients] = []
    sums = _Sums(reduction)
    token_wise = reduction == "token"
    with Capture(
        model, scope=scope, head_unit=head_unit, adapters=adapters, per_token=token_wise
    ) as capture:
        for done, batch in enumerate(batches, 1):
            rows = capture.step(batch)
            sums.add(rows)
            if keep_samples:
                kept.append(rows)
            if progress is not None:
                progress(done, len(batches), "fisher")
    return sums.result(first_order, kept)


def measure_adapter_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    progress: Progress | None = None,
    what: str = "probe",
) -> FloatArray:
    """``sum_n || d L_n / d phi_k ||^2`` of each layer's adapters alone, float64 [L]."""
    batches = list(batches)
    total: FloatArray | None = None
    with Capture(model, scope="full", masks=False, adapters=True) as capture:
        for done, batch in enumerate(batches, 1):
            norms = capture.step(batch).adapter
            assert norms is not None
            total = add_in_order(np.zeros(norms.shape[1]) if total is None else total, norms)
            if progress is not None:
                progress(done, len(batches), what)
    if total is None:
        raise ValueError("batches must hold at least one row, got none")
    return total


def add_in_order(total: FloatArray, rows: FloatArray) -> FloatArray:
    """``total`` plus every row, one after the other: the same additions whatever the batch size."""
    for row in rows:
        total = total + row
    return total


def squared(gradients: FloatArray, reduction: str) -> FloatArray:
    """What is summed into the Fisher information: [S, ...] row gradients to [S or 1, ...] terms."""
    if reduction == "token":
        return gradients  # squared token by token already
    if reduction == "batch":
        gradients = gradients.mean(axis=0, keepdims=True)
    terms: FloatArray = np.square(gradients)
    return terms


class _Sums:
    """Fixed-order float64 sums over rows."""

    def __init__(self, reduction: str) -> None:
        self.reduction = reduction
        self.fisher: list[FloatArray] = []
        self.gradient: list[FloatArray] = []
        self.adapter: FloatArray | None = None
        self.rows = self.tokens = 0

    def add(self, rows: RowGradients) -> None:
        assert rows.head is not None
        assert rows.neuron is not None
        values = (rows.head, rows.neuron)
        if not self.rows:
            self.fisher = [np.zeros(v.shape[1:]) for v in values]
            self.gradient = [np.zeros(v.shape[1:]) for v in values]
        self.fisher = [
            add_in_order(total, squared(v, self.reduction))
            for total, v in zip(self.fisher, values, strict=True)
        ]
        self.gradient = [add_in_order(t, v) for t, v in zip(self.gradient, values, strict=True)]
        if rows.adapter is not None:
            start = np.zeros(rows.adapter.shape[1]) if self.adapter is None else self.adapter
            self.adapter = add_in_order(start, rows.adapter)
        self.rows += len(rows.tokens)
        self.tokens += int(rows.tokens.sum())

    def result(self, first_order: bool, kept: list[RowGradients]) -> Fisher:
        if not self.rows:
            raise ValueError("batches must hold at least one row, got none")
        mean = [total / self.rows for total in self.gradient] if first_order else [None, None]
        samples: list[NDArray[np.float32] | None] = [None, None]
        if kept:
            heads, neurons = [r.head for r in kept], [r.neuron for r in kept]
            samples = [
                np.concatenate([g.astype(np.float32) for g in part if g is not None])
                for part in (heads, neurons)
            ]
        return Fisher(
            self.fisher[0], self.fisher[1], self.adapter, self.rows, self.tokens,
            mean[0], mean[1], samples[0], samples[1],
        )  # fmt: skip
