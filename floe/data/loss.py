"""The one loss of the package: the negative log-likelihood of response tokens, per row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

IGNORE_INDEX = -100
_CHUNK_ELEMENTS = 1 << 26  # of the float32 copy of the logits: 256 MiB at a time


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood and number of target tokens of each row.

    Position ``i`` predicts ``labels[:, i + 1]``; a label of -100 is no target, and the first label
    of a row never is one, since nothing predicts it. The arithmetic is float32 whatever the logits'
    dtype (float64 for float64 logits), and a row's sum does not depend on the rows beside it.

    Args:
        logits: ``[S, T, V]``, floating point, any device.
        labels: ``[S, T]``, int64, on the same device; vocabulary indices or -100.

    Returns:
        ``(nll, tokens)``: ``[S]`` float32 (float64 for float64 logits), in nats, differentiable in
        ``logits``, and ``[S]`` int64.

    Raises:
        TypeError: if ``logits`` is not floating point or ``labels`` not int64.
        ValueError: if the shapes do not fit, or a label is neither -100 nor in ``[0, V)``.
    """
    _check(logits, labels)
    targets = labels[:, 1:]
    wanted = targets != IGNORE_INDEX  # [S, T - 1]
    picked = logits[:, :-1][wanted]  # [P, V]; only target positions are copied to float32
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows_at_once = max(1, _CHUNK_ELEMENTS // max(1, logits.shape[-1]))
    parts = [
        functional.cross_entropy(part.to(wide), target, reduction="none")
        for part, target in zip(
            torch.split(picked, rows_at_once),
            torch.split(targets[wanted], rows_at_once),
            strict=True,
        )
    ]
    nll = torch.zeros(targets.shape, dtype=wide, device=logits.device)
    # Written to distinct places, then summed along the row: no atomics, so repeatable everywhere.
    nll = nll.masked_scatter(wanted, torch.cat(parts))
    return nll.sum(dim=1), wanted.sum(dim=1)


def _check(logits: Tensor, labels: Tensor) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            "logits must be [S, T, V] and labels [S, T], "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if labels.numel() == 0:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 and bool(((labels < 0) & (labels != IGNORE_INDEX)).any()):
        raise ValueError(f"labels must be -100 or >= 0, got {low}")
    if high >= logits.shape[-1]:
        raise ValueError(f"labels must be below the vocabulary size {logits.shape[-1]}, got {high}")
