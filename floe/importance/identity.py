"""What tells models and calibration rows apart, as hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from floe.importance.rows import Row
from floe.losses import IGNORE_INDEX

_SAMPLED = 4096  # values of one tensor that are hashed


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
    """SHA-256 over every parameter's and buffer's name, shape, dtype and a sample of its values.

    Up to 4096 evenly spaced values a tensor: enough to tell trained models apart in seconds, at any
    size, without reading them whole.
    """
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_sample(tensor.detach()).tobytes())
    return digest.hexdigest()


def _sample(tensor: Tensor) -> np.ndarray:
    values = tensor.reshape(-1)[:: max(1, tensor.numel() // _SAMPLED)]
    if values.is_floating_point():
        values = values.double()
    return values.cpu().contiguous().numpy()
