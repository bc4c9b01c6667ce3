"""What tells models and calibration rows apart, as hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from floe.data.loss import IGNORE_INDEX
from floe.importance.rows import Row


def data_fingerprint(rows: Iterable[Row]) -> str:
    """SHA-256 over the rows' tokens and labels in order, whatever batching and padding."""
    digest = hashlib.sha256()
    for row in rows:
        ids = row.values["input_ids"]
        labels = torch.full_like(ids, IGNORE_INDEX) if row.labels is None else row.labels
        for part in (ids, labels):
            values = part.numpy().astype("<i8")
            digest.update(np.int64(len(values)).astype("<i8").tobytes() + values.tobytes())
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter's and buffer's name, shape, dtype and values."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        _hash(digest, name, tensor.detach())
    return digest.hexdigest()


def _hash(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    if is_traceable_wrapper_subclass(tensor):  # quantised: what it is made of
        for part in tensor.__tensor_flatten__()[0]:
            _hash(digest, part, getattr(tensor, part))
    elif not tensor.is_meta:
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
