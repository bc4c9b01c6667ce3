"""The registered operators behind floe, and their checked Python functions.

The only module that touches ``torch.ops.floe`` and ``floe_triton``. Shapes: S samples, T tokens,
D columns of one site (the input of a projection), D // group_size units: heads (group_size =
head_dim) or neurons (group_size = 1).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from floe_triton import (
    draw_seed,
    keyed_dropout,
    moe_lora,
    moe_lora_add,
    moe_lora_group,
    moe_lora_group_add,
)
from floe_triton.checks import BACKENDS
from floe_triton.devices import obstacle as kernel_obstacle
from floe_triton.dropout import check_dropout
from torch import Tensor

__all__ = [
    "BACKENDS",
    "accumulate_fisher_",
    "draw_seed",
    "kernel_obstacle",
    "keyed_dropout",
    "mask_gradients",
    "moe_lora",
    "moe_lora_add",
    "moe_lora_group",
    "moe_lora_group_add",
]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _load() -> None:
    # beside the other native module: an editable install keeps both away from the Python sources
    native = importlib.util.find_spec("floe._native")
    path = Path(native.origin if native and native.origin else __file__).with_name("_ops.so")
    if not path.is_file():
        raise ImportError(
            f"floe's operators are not built: {path} is missing; install the package, "
            "or run `make native` in a source tree"
        )
    torch.ops.load_library(path)


_load()


def mask_gradients(
    activation: Tensor, gradient: Tensor, group_size: int, token_mask: Tensor | None = None
) -> Tensor:
    """Gradient of the loss with respect to each unit's mask at mask = 1, one row per sample.

    ``out[s, u] = sum_t sum_c activation[s, t, c] * gradient[s, t, c]`` over the tokens of the
    sample and the columns of the unit: what Eq. 8 of the FLoE paper squares. Equivalent to
    ``(activation.float() * gradient.float()).unflatten(2, (-1, group_size)).sum((1, 3))``, in one
    pass, and bitwise the same for any number of threads. Not differentiable.

    Args:
        activation: Input of the projection, ``[S, T, D]``, bfloat16, float16, float32 or float64,
            CPU or CUDA.
        gradient: Gradient of the loss with respect to ``activation``; same shape, dtype, device.
        group_size: Columns per unit; divides D.
        token_mask: bool ``[S, T]``; tokens that are False (padding) are skipped, whatever they
            hold.

    Returns:
        ``[S, D // group_size]``, float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices do not match, or ``group_size`` does not divide D.
    """
    _check_site(activation, gradient, group_size, token_mask)
    out: Tensor = torch.ops.floe.mask_gradients(
        activation.detach(), gradient.detach(), group_size, token_mask
    )
    return out


def accumulate_fisher_(
    fisher: Tensor,
    activation: Tensor,
    gradient: Tensor,
    group_size: int,
    token_mask: Tensor | None = None,
    sample_scale: Tensor | None = None,
) -> Tensor:
    """Add every sample's squared mask gradients to ``fisher``, in place.

    ``fisher[u] += sum_s (sample_scale[s] * mask_gradients[s, u]) ** 2`` in float64 and in a fixed
    order: the empirical Fisher information of the masks, Eq. 9 of the FLoE paper.

    Args:
        fisher: The running sums, contiguous float64 ``[D // group_size]``, on the activation's
            device.
        activation: Input of the projection, ``[S, T, D]``, as in `mask_gradients`.
        gradient: Gradient of the loss with respect to ``activation``; same shape, dtype, device.
        group_size: Columns per unit; divides D.
        token_mask: bool ``[S, T]``; tokens that are False (padding) are skipped, whatever they
            hold.
        sample_scale: float ``[S]``, a factor for each sample's gradient before it is squared
            (T_batch / T_s turns the gradient of a batch's mean loss into that of the sample's
            mean loss). None is 1.

    Returns:
        ``fisher``.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes or devices do not match, ``group_size`` does not divide D, or
            ``fisher`` is not contiguous or requires a gradient.
    """
    _check_site(activation, gradient, group_size, token_mask)
    _check_accumulate(fisher, activation, group_size, sample_scale)
    scale = None if sample_scale is None else sample_scale.detach().to(torch.float64)
    torch.ops.floe.accumulate_fisher_(
        fisher, activation.detach(), gradient.detach(), group_size, token_mask, scale
    )
    return fisher


def _check_site(
    activation: Tensor, gradient: Tensor, group_size: int, token_mask: Tensor | None
) -> None:
    _check_float("activation", activation)
    _check_tensor("gradient", gradient)
    if gradient.dtype != activation.dtype:
        raise TypeError(
            f"gradient must have activation's dtype {activation.dtype}, got {gradient.dtype}"
        )
    if activation.dim() != 3:
        raise ValueError(f"activation must be [S, T, D], got shape {tuple(activation.shape)}")
    if gradient.shape != activation.shape:
        raise ValueError(
            f"gradient must have activation's shape {tuple(activation.shape)}, "
            f"got {tuple(gradient.shape)}"
        )
    _check_device("gradient", gradient, activation)
    if isinstance(group_size, bool) or not isinstance(group_size, (int, torch.SymInt)):
        raise TypeError(f"group_size must be an int, got {type(group_size).__name__}")
    if group_size < 1 or activation.shape[2] % group_size:
        raise ValueError(
            f"group_size must be >= 1 and divide D = {activation.shape[2]}, got {group_size}"
        )
    if token_mask is None:
        return
    _check_tensor("token_mask", token_mask)
    if token_mask.dtype != torch.bool:
        raise TypeError(f"token_mask must be bool, got {token_mask.dtype}")
    if token_mask.shape != activation.shape[:2]:
        raise ValueError(
            f"token_mask must be [S, T] = {tuple(activation.shape[:2])}, "
            f"got {tuple(token_mask.shape)}"
        )
    _check_device("token_mask", token_mask, activation)


def _check_accumulate(
    fisher: Tensor, activation: Tensor, group_size: int, sample_scale: Tensor | None
) -> None:
    _check_tensor("fisher", fisher)
    if fisher.dtype != torch.float64:
        raise TypeError(f"fisher must be float64, got {fisher.dtype}")
    units = activation.shape[2] // group_size
    if fisher.shape != (units,):
        raise ValueError(
            f"fisher must be [D // group_size] = ({units},), got {tuple(fisher.shape)}"
        )
    if not fisher.is_contiguous():
        raise ValueError(f"fisher must be contiguous, got stride {fisher.stride()}")
    if fisher.requires_grad:
        raise ValueError("fisher must not require a gradient: it is written in place")
    _check_device("fisher", fisher, activation)
    if sample_scale is None:
        return
    _check_float("sample_scale", sample_scale)
    if sample_scale.shape != activation.shape[:1]:
        raise ValueError(
            f"sample_scale must be [S] = ({activation.shape[0]},), got {tuple(sample_scale.shape)}"
        )
    _check_device("sample_scale", sample_scale, activation)


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _check_float(name: str, value: Any) -> None:
    _check_tensor(name, value)
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {value.dtype}")


def _check_device(name: str, value: Tensor, activation: Tensor) -> None:
    if value.device != activation.device:
        raise ValueError(
            f"{name} must be on activation's device {activation.device}, got {value.device}"
        )


@torch.library.register_fake("floe::mask_gradients")
def _fake_mask_gradients(
    activation: Tensor, gradient: Tensor, group_size: int, token_mask: Tensor | None
) -> Tensor:
    _check_site(activation, gradient, group_size, token_mask)
    dtype = torch.float64 if activation.dtype == torch.float64 else torch.float32
    samples, _, columns = activation.shape
    return activation.new_empty((samples, columns // group_size), dtype=dtype)


@torch.library.register_fake("floe::accumulate_fisher_")
def _fake_accumulate_fisher(
    fisher: Tensor,
    activation: Tensor,
    gradient: Tensor,
    group_size: int,
    token_mask: Tensor | None,
    sample_scale: Tensor | None,
) -> None:
    _check_site(activation, gradient, group_size, token_mask)
    _check_accumulate(fisher, activation, group_size, sample_scale)
    if sample_scale is not None and sample_scale.dtype != torch.float64:
        raise TypeError(f"sample_scale must be float64, got {sample_scale.dtype}")


@torch.library.register_fake("floe::dropout")
def _fake_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    check_dropout(x, p, seed)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dropout_context(ctx: Any, inputs: tuple[Tensor, float, Tensor], output: Tensor) -> None:
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _dropout_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (seed,) = ctx.saved_tensors
    return torch.ops.floe.dropout(grad, ctx.p, seed), None, None


torch.library.register_autograd("floe::dropout", _dropout_backward, setup_context=_dropout_context)


@torch.library.register_fake("floe::moe_lora_experts")
def _fake_experts(
    x: Tensor, shrink_weights: list[Tensor], expand_weights: list[Tensor], *arguments: Any
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    tokens, wide = x.shape[0], _wide(x.dtype)
    linears, (_, experts, rank) = len(expand_weights), expand_weights[0].shape
    return (
        [x.new_empty((tokens, expand.shape[0])) for expand in expand_weights],
        x.new_empty((linears, tokens, rank), dtype=wide),
        x.new_empty((linears, tokens, experts), dtype=wide),
        x.new_empty((linears, tokens, experts * rank)),
    )


@torch.library.register_fake("floe::moe_lora_experts_backward")
def _fake_experts_backward(
    grad_ys: list[Tensor],
    x: Tensor,
    shrink_weights: list[Tensor],
    expand_weights: list[Tensor],
    *arguments: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    *_, needs_x, needs_shrink, needs_expand = arguments
    rows = sum(shrink.shape[0] for shrink in shrink_weights)
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        [one.new_empty(one.shape) for one in shrink_weights if needs_shrink],
        [one.new_empty(one.shape) for one in expand_weights if needs_expand],
        x.new_empty((x.shape[0], rows), dtype=_wide(x.dtype)),
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
