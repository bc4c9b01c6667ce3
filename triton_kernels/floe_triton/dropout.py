"""Dropout whose mask is a pure function of (seed, row, column): the op ``floe::keyed_dropout``.

One name, three kernels, chosen by torch's dispatcher; all give the same bits. Where floe is loaded
its C++ is the CPU's (csrc/moe_lora/dropout_cpu.cpp), a Triton kernel is CUDA's
(:mod:`floe_triton.kernels.dropout`), and the plain-torch definition serves everything else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from floe_triton import launch, reference
from floe_triton.checks import check_dropout, refuse_tangents, transformed

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
def _by_definition(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Some rows at a time: the definition's int64 words take eight times x's elements."""
    check_dropout(x, p, seed)
    rows = _rows(x)
    step = max(1, _ELEMENTS_AT_ONCE // max(1, x.shape[-1]))
    parts = [
        reference.dropout(rows[first : first + step], p, seed, first)
        for first in range(0, len(rows), step)
    ]
    return torch.cat(parts).view(x.shape) if parts else torch.empty_like(x)


@torch.library.impl(_library, "keyed_dropout", "CUDA")
def _on_cuda(x: Tensor, p: float, seed: Tensor) -> Tensor:
    if not launch.runs_triton(x.device):
        return _by_definition(x, p, seed)
    from floe_triton.kernels.dropout import dropout

    check_dropout(x, p, seed)
    return dropout(_rows(x), p, seed).view(x.shape)


@torch.library.register_fake("floe::keyed_dropout", lib=_library)
def _fake(x: Tensor, p: float, seed: Tensor) -> Tensor:
    check_dropout(x, p, seed)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


class _KeyedDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(seed)
        dropped: Tensor = torch.ops.floe.keyed_dropout(x, p, seed)
        return dropped

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return keyed_dropout(grad, ctx.p, *ctx.saved_tensors), None, None


def _differentiable(keys: torch._C.DispatchKeySet, x: Tensor, p: float, seed: Tensor) -> Any:
    # by hand: torch.library.register_autograd would drop a forward-mode derivative in silence
    refuse_tangents("keyed_dropout", x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _KeyedDropout.apply(x, p, seed)
    op = torch.ops.floe.keyed_dropout.default
    return op.redispatch(keys & torch._C._after_autograd_keyset, x, p, seed)


_library.impl("keyed_dropout", _differentiable, "Autograd", with_keyset=True)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def draw_seed(device: torch.device) -> Tensor:
    """A fresh 0-dim int64 seed on ``device``, from torch's own generator.

    A tensor, not a number: nothing waits for the device, graphs capture it, and activation
    checkpointing, which restores the generator's state, draws the same one again.
    """
    return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)
