"""Token rows and batches of them: each row once, padded only for the pass that it is run in."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from floe.data.loss import IGNORE_INDEX, token_mask
from floe.decoder_blocks import base_of
from floe.errors import require
from floe.types import Batch

_NOT_PER_TOKEN = ("input_ids", "attention_mask", "labels", "logits_to_keep")


@dataclass(frozen=True)
class TokenRow:
    """One tokenised row: ``prompt`` then ``response`` (in training rows with its end, eos).

    ``index`` is the row's place in the data it came from; ``task`` groups rows in the evaluation.
    The rest is of rows that came in batches, see :func:`rows_of`: the batch's number, labels [n]
    where they are not the response itself, further inputs of the model by name, [n] each.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    index: int = 0
    task: str | None = None
    batch: int = 0
    given_labels: tuple[int, ...] | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    @property
    def labels(self) -> tuple[int, ...]:
        """The response's tokens in place, -100 elsewhere; a row's first token is never a target."""
        labels = self.given_labels or (IGNORE_INDEX,) * len(self.prompt) + self.response
        return (IGNORE_INDEX, *labels[1:])

    @property
    def targets(self) -> int:
        """Number of tokens that carry loss."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def fingerprint(rows: Iterable[TokenRow]) -> str:
    """SHA-256 of the rows' tokens and their split into prompt and response, in order."""
    digest = hashlib.sha256()
    for row in rows:
        head = (len(row.prompt), len(row.response))
        for values in (head, row.prompt + row.response, row.given_labels or ()):
            digest.update(np.array(values, dtype="<i8").tobytes())
    return digest.hexdigest()


def accepts_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model's own forward (under any PEFT wrapper) can compute the last logits only."""
    return "logits_to_keep" in inspect.signature(base_of(model).forward).parameters


@dataclass(frozen=True)
class Collator:
    """Turns rows into a batch that goes straight to a Hugging Face causal model.

    ``input_ids``, ``attention_mask`` and ``position_ids`` are int64 ``[S, T]``, padded on the left;
    positions count real tokens, so padding changes no answer, and ``pad_id`` is never read as a
    target. With ``keep_logits`` the batch has ``logits_to_keep``, the last T' = longest response
    + 1 positions, int64 ``[T']``, and its ``labels`` are int64 ``[S, T']``; otherwise ``[S, T]``.
    (Positions, not a number: a model slices by a number, and on the CPU the product of a sliced
    tensor with the vocabulary copies the whole weight once a row.)
    """

    pad_id: int = 0
    keep_logits: bool = True

    @classmethod
    def for_model(cls, model: nn.Module, pad_id: int = 0) -> Collator:
        """The collator whose batches the model accepts."""
        return cls(pad_id, accepts_logits_to_keep(model))

    def __call__(self, rows: Sequence[TokenRow]) -> Batch:
        """Build one batch; the rows must not be empty."""
        if not rows or not all(len(row) for row in rows):
            raise ValueError("a batch needs at least one row, each with at least one token")
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORE_INDEX)
        for s, row in enumerate(rows):
            ids[s, width - len(row) :] = torch.tensor(row.prompt + row.response)
            mask[s, width - len(row) :] = 1
            labels[s, width - len(row) :] = torch.tensor(row.labels)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        for name in rows[0].inputs:
            padded = [pad(row.inputs[name], (width - len(row), 0)) for row in rows]
            batch[name] = torch.stack(padded)
        kept = min(width, 1 + max(len(row.response) for row in rows)) if self.keep_logits else width
        batch["labels"] = labels[:, width - kept :].contiguous()
        if self.keep_logits:
            batch["logits_to_keep"] = torch.arange(width - kept, width)
        return batch


def row_order(rows: Sequence[TokenRow]) -> list[int]:
    """The order of rows in :func:`make_batches`: longest first, ties by place."""
    return sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))


def make_batches(
    rows: Sequence[TokenRow], batch_size: int, collator: Collator | None = None
) -> list[Batch]:
    """Cut the rows into batches of at most ``batch_size``, in the order of :func:`row_order`.

    Raises:
        ValueError: if ``batch_size`` is not positive or there is no row.
    """
    require(batch_size >= 1, "batch_size must be at least 1", batch_size)
    if not rows:
        raise ValueError("rows must not be empty")
    ordered, collator = [rows[i] for i in row_order(rows)], collator or Collator()
    return [collator(ordered[n : n + batch_size]) for n in range(0, len(ordered), batch_size)]


def in_batches(rows: Sequence[TokenRow], batch_size: int) -> list[TokenRow]:
    """The rows in the order of :func:`make_batches`, each with the number of its batch there."""
    order = row_order(rows)
    return [replace(rows[i], batch=place // batch_size) for place, i in enumerate(order)]


def rows_of(batches: Iterable[Batch | TokenRow]) -> list[TokenRow]:
    """The rows of a user's batches, without their padding, in order; rows as they are.

    Raises:
        ValueError: no rows, an input that is not one value a token, or a row without tokens.
    """
    rows: list[TokenRow] = []
    for number, given in enumerate(batches):
        rows += [given] if isinstance(given, TokenRow) else _unpadded(given, number, len(rows))
    if not rows:
        raise ValueError("batches must hold at least one row, got none")
    return rows


def _unpadded(batch: Batch, number: int, first: int) -> list[TokenRow]:
    ids, real = batch["input_ids"].cpu(), token_mask(batch).cpu()
    inputs = {k: v for k, v in batch.items() if k not in _NOT_PER_TOKEN and v is not None}
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            raise ValueError(
                f"{name} of a calibration batch must be one value a token, a tensor of shape "
                f"{tuple(ids.shape)}, got {_shape(value)}"
            )
    labels = _whole_labels(batch, ids)
    rows = []
    for s, kept in enumerate(real):
        marked = kept.nonzero()
        if not len(marked):
            raise ValueError(f"row {first + s} must have at least one token, got none")
        if int(marked[-1] - marked[0]) + 1 != len(marked):
            raise ValueError(
                f"attention_mask of row {first + s} must mark one run of tokens, got several"
            )
        tokens, wanted = ids[s, kept].tolist(), labels[s, kept].tolist()
        wanted[0] = IGNORE_INDEX  # nothing predicts it, whatever padding stood before it
        start = next((i for i, label in enumerate(wanted) if label != IGNORE_INDEX), len(tokens))
        other = tuple(wanted) if wanted[start:] != tokens[start:] else None
        beside = {name: value.cpu()[s, kept] for name, value in inputs.items()}
        prompt, response = tuple(tokens[:start]), tuple(tokens[start:])
        rows.append(TokenRow(prompt, response, first + s, None, number, other, beside))
    return rows


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _whole_labels(batch: Batch, ids: Tensor) -> Tensor:
    """A batch's labels, or those of its last positions alone, as labels of all, [S, T]."""
    labels, whole = batch.get("labels"), torch.full_like(ids, IGNORE_INDEX)
    if labels is None:
        return whole
    integers = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dim() == 2
    fits = integers and len(labels) == len(ids) and labels.shape[1] <= ids.shape[1]
    if not fits or (labels.shape != ids.shape and batch.get("logits_to_keep") is None):
        raise ValueError(
            "labels of a calibration batch must be one whole number a token, a tensor of shape "
            f"{tuple(ids.shape)}, got {_shape(labels)}; fewer only with logits_to_keep"
        )
    whole[:, ids.shape[1] - labels.shape[1] :] = labels.cpu()
    return whole
