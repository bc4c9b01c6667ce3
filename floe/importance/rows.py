"""Calibration rows in an order and grouping of their own, whatever batches they came in.

A model's arithmetic depends in its last bits on what shares a batch. So the rows of the given
batches are taken apart, cut into chunks of a fixed number of rows, and run in passes that a chunk
alone decides: the same scores, bit for bit, whatever the batch size and the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from floe.data.loss import IGNORE_INDEX
from floe.importance.frozen import token_mask
from floe.types import Batch

CHUNK_ROWS = 32
PASS_TOKENS = 2048  # padded tokens of one forward pass; part of what a score is, like the chunks
_NOT_PER_TOKEN = ("attention_mask", "labels", "logits_to_keep")


@dataclass(frozen=True)
class Row:
    """One row without its padding: n real tokens.

    Attributes:
        values: per-token inputs of the model by name, each [n], on the CPU; "input_ids" among them.
        labels: [n] int64, -100 = no loss; None where the batch had none.
        keeps_logits: the batch asked for the logits of its labelled end alone.
        batch: number of the batch the row came in.
    """

    values: dict[str, Tensor]
    labels: Tensor | None
    keeps_logits: bool
    batch: int

    def __len__(self) -> int:
        return len(self.values["input_ids"])


def rows_of(batches: Iterable[Batch]) -> list[Row]:
    """The rows of all batches, in order.

    Raises:
        ValueError: no rows, an input that is not one value a token, or a row without tokens.
    """
    rows: list[Row] = []
    for number, batch in enumerate(batches):
        rows += _rows_of_one(batch, number, len(rows))
    if not rows:
        raise ValueError("batches must hold at least one row, got none")
    return rows


def _rows_of_one(batch: Batch, number: int, first: int) -> list[Row]:
    ids, real = batch["input_ids"].cpu(), token_mask(batch).cpu()
    values = {k: v for k, v in batch.items() if k not in _NOT_PER_TOKEN and v is not None}
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{name} of a calibration batch must be one value a token, a tensor of shape "
                f"{tuple(ids.shape)}, got {came}"
            )
    keeps = batch.get("logits_to_keep") is not None
    labels = batch.get("labels")
    labels = None if labels is None else _whole_labels(labels, ids, keeps)
    for s in range(len(ids)):
        marked = real[s].nonzero()
        if not len(marked):
            raise ValueError(f"row {first + s} must have at least one token, got none")
        if int(marked[-1] - marked[0]) + 1 != len(marked):
            raise ValueError(
                f"attention_mask of row {first + s} must mark one run of tokens, got several"
            )
    return [
        Row(
            {name: value.cpu()[s, real[s]] for name, value in values.items()},
            None if labels is None else _labels_of_one(labels[s, real[s]]),
            keeps,
            number,
        )
        for s in range(len(ids))
    ]


def _labels_of_one(labels: Tensor) -> Tensor:
    """A row's labels; nothing predicts its first token, whatever padding stood before it."""
    labels[0] = IGNORE_INDEX
    return labels


def _whole_labels(labels: Any, ids: Tensor, last_alone: bool) -> Tensor:
    """Labels of all positions, or with ``last_alone`` of the last ones, as labels of all [S, T]."""
    integers = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dim() == 2
    shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
    fits = integers and len(labels) == len(ids) and labels.shape[1] <= ids.shape[1]
    if not fits or (labels.shape != ids.shape and not last_alone):
        raise ValueError(
            "labels of a calibration batch must be one whole number a token, a tensor of shape "
            f"{tuple(ids.shape)}, got {shape}; fewer only with logits_to_keep"
        )
    whole = torch.full_like(ids, IGNORE_INDEX)
    whole[:, ids.shape[1] - labels.shape[1] :] = labels.cpu()
    return whole


def chunks(rows: Sequence[Row], whole_batches: bool = False) -> list[range]:
    """Indices of consecutive rows, CHUNK_ROWS at a time.

    With ``whole_batches`` a chunk ends with the batch that fills it, for estimators that mean the
    batches they were given.
    """
    found, start = [], 0
    while start < len(rows):
        end = min(start + CHUNK_ROWS, len(rows))
        while whole_batches and end < len(rows) and rows[end].batch == rows[end - 1].batch:
            end += 1
        found.append(range(start, end))
        start = end
    return found


def passes(
    rows: Sequence[Row], indices: Sequence[int], tokens: int = PASS_TOKENS
) -> list[list[int]]:
    """``indices`` in groups of at most ``tokens`` padded tokens, at least one row each.

    The longest rows first, ties by index, so that rows of a group are of like length.
    """
    groups: list[list[int]] = []
    for index in sorted(indices, key=lambda i: (-len(rows[i]), i)):
        if groups and (len(groups[-1]) + 1) * len(rows[groups[-1][0]]) <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def collate(rows: Sequence[Row]) -> dict[str, Any]:
    """One batch of the rows, padded on the left.

    ``input_ids``, ``attention_mask``, ``position_ids`` (counted over real tokens unless given) and
    whatever else the rows have, each [S, T]; ``labels`` as the rows have them, with
    ``logits_to_keep`` if all rows ask for it.
    """
    width = max(len(row) for row in rows)
    batch: dict[str, Any] = {
        name: torch.stack([_padded(row.values[name], width, 0) for row in rows])
        for name in rows[0].values
    }
    batch["attention_mask"] = torch.stack(
        [_padded(torch.ones(len(row), dtype=torch.int64), width, 0) for row in rows]
    )
    if "position_ids" not in batch:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    labels = [row.labels for row in rows if row.labels is not None]
    if len(labels) == len(rows):
        whole = torch.stack([_padded(label, width, IGNORE_INDEX) for label in labels])
        kept = _kept(whole) if all(row.keeps_logits for row in rows) else width
        batch["labels"] = whole[:, width - kept :].contiguous()
        if all(row.keeps_logits for row in rows):
            batch["logits_to_keep"] = torch.arange(width - kept, width)
    return batch


def _padded(values: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (width - len(values), 0), value=fill)


def _kept(labels: Tensor) -> int:
    """Last positions that hold every label and the position that predicts the first of them."""
    labelled = (labels != IGNORE_INDEX).any(0).nonzero()
    width = labels.shape[1]
    return min(width, width - int(labelled[0]) + 1) if len(labelled) else 1
