"""Dropout whose mask is a pure function of (seed, row, column): the same bits from every implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from floe_triton import reference


def keyed_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """``x * keep / (1 - p)``; x [..., K], any float dtype; seed 0-dim int64 on x's device.

    On the CPU the native op of floe does it where that is loaded; everywhere else the plain-torch definition.
    Both give the same bits.
    """
    if x.device.type == "cpu" and hasattr(torch.ops.floe, "dropout"):
        dropped: Tensor = torch.ops.floe.dropout(x, p, seed)
        return dropped
    return reference.dropout(x, p, seed)


def draw_seed(device: torch.device) -> Tensor:
    """A fresh 0-dim int64 seed on ``device``, from torch's own generator.

    A tensor, not a number: nothing waits for the device, graphs capture it, and activation checkpointing,
    which restores the generator's state, draws the same one again.
    """
    return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)
