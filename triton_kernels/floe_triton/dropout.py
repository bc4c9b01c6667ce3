"""Dropout whose mask is a pure function of (seed, row, column).

Every implementation gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from floe_triton import devices, reference
from floe_triton.checks import FLOATS, check_dense, refuse_tangents, transformed

_library = torch.library.Library("floe", "FRAGMENT")
_library.define(
    "keyed_dropout(Tensor x, float p, Tensor seed) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_ELEMENTS_AT_ONCE = 1 << 23


def keyed_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Dropout whose mask is a pure function of the seed and of each element's row and column.

    ``x`` counts as ``[T, K]`` rows of its last dimension. Eight random bits decide an element, so
    the rate that is drawn is ``min(255, round(256 * p)) / 256`` (0.05 becomes 0.0508), and kept
    values are divided by exactly one minus it. Dropped values are 0, also where ``x`` is not
    finite. Differentiable: the gradient meets the same mask.

    On the CPU the native op of floe does it where that is loaded, on CUDA a Triton kernel, and
    everywhere else the plain-torch definition. All give the same bits.

    Args:
        x: ``[..., K]``, bfloat16, float16, float32 or float64.
        p: Rate of dropped elements, in [0, 1).
        seed: 0-dimensional int64 tensor on ``x``'s device.

    Returns:
        A new tensor of ``x``'s shape and dtype.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: ``p`` is outside [0, 1), ``x`` has no dimension, or ``seed`` has one or is on
            another device.
    """
    check_dropout(x, p, seed)
    if transformed():
        return reference.dropout(x, p, seed)
    dropped: Tensor = torch.ops.floe.keyed_dropout(x, float(p), seed)
    return dropped


@torch.library.impl(_library, "keyed_dropout", "CompositeExplicitAutograd")
def _keyed_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    check_dropout(x, p, seed)
    refuse_tangents("keyed_dropout", x)
    if x.device.type == "cpu" and hasattr(torch.ops.floe, "dropout"):
        dropped: Tensor = torch.ops.floe.dropout(x, p, seed)
        return dropped
    if devices.runs_triton(x.device):
        from floe_triton.masked import masked

        return masked(_rows(x), p, seed).view(x.shape)
    return _in_parts(x, p, seed)


@torch.library.register_fake("floe::keyed_dropout", lib=_library)
def _fake(x: Tensor, p: float, seed: Tensor) -> Tensor:
    check_dropout(x, p, seed)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup(ctx: Any, inputs: tuple[Tensor, float, Tensor], output: Tensor) -> None:
    ctx.p = inputs[1]
    ctx.save_for_backward(inputs[2])


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return keyed_dropout(grad, ctx.p, *ctx.saved_tensors), None, None


torch.library.register_autograd(
    "floe::keyed_dropout", _gradient, setup_context=_setup, lib=_library
)


def _in_parts(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """The definition, some rows at a time: its int64 words take eight times x's elements."""
    rows = _rows(x)
    step = max(1, _ELEMENTS_AT_ONCE // max(1, x.shape[-1]))
    parts = [
        reference.dropout(rows[first : first + step], p, seed, first)
        for first in range(0, len(rows), step)
    ]
    return torch.cat(parts).view(x.shape) if parts else torch.empty_like(x)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def draw_seed(device: torch.device) -> Tensor:
    """A fresh 0-dim int64 seed on ``device``, from torch's own generator.

    A tensor, not a number: nothing waits for the device, graphs capture it, and activation
    checkpointing, which restores the generator's state, draws the same one again.
    """
    return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)


def check_dropout(x: Any, p: Any, seed: Any) -> None:
    """Raise TypeError or ValueError unless the arguments are what :func:`keyed_dropout` takes."""
    check_dense("x", x)
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be bfloat16, float16, float32 or float64, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError("x must be [..., K], got a 0-dimensional tensor")
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"p must be a number, got {type(p).__name__}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must be in [0, 1), got {p}")
    check_dense("seed", seed)
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be int64, got {seed.dtype}")
    if seed.dim():
        raise ValueError(f"seed must be 0-dimensional, got shape {tuple(seed.shape)}")
    if seed.device != x.device:
        raise ValueError(f"seed must be on x's device {x.device}, got {seed.device}")
