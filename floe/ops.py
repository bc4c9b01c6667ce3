"""The registered operators behind floe, and their checked Python functions.

The only module that touches ``torch.ops.floe`` and ``floe_triton``. Shapes: S samples, T tokens,
D columns of one site (the input of a projection), D // group_size units: heads (group_size =
head_dim) or neurons (group_size = 1).

These functions explain every mistake; the C++ behind them checks in a word what its memory accesses
rely on, because ``torch.ops.floe`` can be called past them. Fake kernels check as the functions do.
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
from floe_triton.checks import (
    BACKENDS,
    FLOATS,
    LEAST_TEMPERATURE,
    check_backward,
    check_dense,
    check_op,
    refuse_tangents,
    transformed,
)
from floe_triton.dispatch import count_gradients, count_products
from floe_triton.group import Group, Needs, Routed
from floe_triton.launch import obstacle as kernel_obstacle
from floe_triton.reference import gate, largest
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = [
    "BACKENDS",
    "LEAST_TEMPERATURE",
    "accumulate_fisher_",
    "draw_seed",
    "gate",
    "kernel_obstacle",
    "keyed_dropout",
    "largest",
    "mask_gradients",
    "moe_lora",
    "moe_lora_add",
    "moe_lora_group",
    "moe_lora_group_add",
]


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
    _refuse_transforms("mask_gradients")
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
    _refuse_transforms("accumulate_fisher_")
    scale = None if sample_scale is None else sample_scale.detach().to(torch.float64)
    torch.ops.floe.accumulate_fisher_(
        fisher, activation.detach(), gradient.detach(), group_size, token_mask, scale
    )
    return fisher


def _refuse_transforms(op: str) -> None:
    if transformed():
        raise RuntimeError(
            f"{op} has no derivatives and no batching rule: call it outside torch.func's "
            "transforms and forward-mode differentiation"
        )


def _check_site(
    activation: Tensor, gradient: Tensor, group_size: int, token_mask: Tensor | None
) -> None:
    _check_float("activation", activation)
    check_dense("gradient", gradient)
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
    check_dense("token_mask", token_mask)
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
    check_dense("fisher", fisher)
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


def _check_float(name: str, value: Any) -> None:
    check_dense(name, value)
    if value.dtype not in FLOATS:
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


_library = torch.library.Library("floe", "FRAGMENT")


def _refuse_derivatives(name: str) -> None:
    """Make a direct call of an operator without a derivative an error where one is due.

    Not of those that every adapted linear calls: torch itself warns when it misses theirs.
    """
    op = getattr(torch.ops.floe, name).default

    def call(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError(f"floe::{name} has no derivative: detach its arguments")
        refuse_tangents(name, *tensors)
        written = [t for t in tensors[:1] if name == "accumulate_fisher_"]
        if any(t.is_neg() or t._is_zerotensor() for t in written):
            raise ValueError("fisher must be plain memory, got a lazily negated view or zeros")
        result = op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)
        torch.autograd.graph.increment_version(written)  # autograd may have saved it
        return result

    _library.impl(name, call, "Autograd", with_keyset=True)


for _name in (
    "mask_gradients",
    "accumulate_fisher_",
    "solve_two_class",
    "solve_mask",
    "refine_masks",
):
    _refuse_derivatives(_name)


def _check_vectors(flags: Tensor | None = None, **vectors: Tensor) -> None:
    """The vectors of a mask problem: float64, the flags bool, all on one device."""
    given = {**vectors, "mask": flags} if flags is not None else vectors
    device = next(iter(given.values())).device
    for name, tensor in given.items():
        dtype = torch.bool if tensor is flags else torch.float64
        if tensor.dtype != dtype or tensor.dim() != 1 or tensor.device != device:
            raise ValueError(
                f"{name} must be a {dtype} vector on the CPU, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )


def _new_flags(like: Tensor) -> Tensor:
    return like.new_empty(like.shape, dtype=torch.bool)


@torch.library.register_fake("floe::solve_two_class")
def _fake_solve_two_class(
    head_value: Tensor, neuron_value: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _check_vectors(head_value=head_value, neuron_value=neuron_value)
    return _new_flags(head_value), _new_flags(neuron_value), head_value.new_empty(6)


@torch.library.register_fake("floe::solve_mask")
def _fake_solve_mask(value: Tensor, cost: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    _check_vectors(value=value, cost=cost)
    return _new_flags(value), value.new_empty(8)


@torch.library.register_fake("floe::refine_masks")
def _fake_refine_masks(
    value: Tensor, cost: Tensor, budget: float, mask: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    _check_vectors(mask, value=value, cost=cost)
    return _new_flags(mask), value.new_empty(8)


@torch.library.register_fake("floe::moe_lora_experts")
def _fake_experts(
    x: Tensor,
    shrink_weights: list[Tensor],
    expand_weights: list[Tensor],
    router_biases: list[Tensor | None],
    biases: list[Tensor | None],
    base_outputs: list[Tensor],
    *arguments: Any,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    *settings, gates, top_k = arguments
    of_op = biases, base_outputs, shrink_weights, expand_weights, router_biases, *settings
    group = Group([], *of_op)
    group.gates, group.top_k = gates, top_k
    _check_experts(x, group)
    tokens, wide, linears = x.shape[0], _wide(x.dtype), len(group)
    return (
        [x.new_empty((tokens, expand.shape[0])) for expand in expand_weights],
        x.new_empty((linears, tokens, group.hidden_size), dtype=wide),
        x.new_empty((linears, tokens, group.experts), dtype=wide),
        x.new_empty((linears, tokens, group.experts * group.rank)),
    )


@torch.library.register_fake("floe::moe_lora_experts_backward")
def _fake_experts_backward(
    grad_ys: list[Tensor],
    x: Tensor,
    shrink_weights: list[Tensor],
    expand_weights: list[Tensor],
    hidden: Tensor,
    gate: Tensor,
    z: Tensor,
    *arguments: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor]:
    *settings, needs_x, needs_shrink, needs_expand, gated = arguments
    group = Group([], [], [], shrink_weights, expand_weights, [], *settings)
    group.gates = list(gate) if gated else []
    _check_experts(x, group)
    check_backward(grad_ys, x, group, Routed(hidden, gate, z))
    rows = sum(shrink.shape[0] for shrink in shrink_weights)
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        [weight.new_empty(weight.shape) for weight in shrink_weights if needs_shrink],
        [weight.new_empty(weight.shape) for weight in expand_weights if needs_expand],
        x.new_empty((x.shape[0], rows), dtype=_wide(x.dtype)),
        x.new_empty(gate.shape if gated else (0,), dtype=_wide(x.dtype)),
    )


@register_flop_formula(torch.ops.floe.moe_lora_experts)  # type: ignore[untyped-decorator]
def _experts_flops(x: Any, shrink_weights: Any, expand_weights: Any, *rest: Any, **out: Any) -> int:
    return count_products(x, [*shrink_weights, *expand_weights])


@register_flop_formula(torch.ops.floe.moe_lora_experts_backward)  # type: ignore[untyped-decorator]
def _experts_backward_flops(
    grad_ys: Any, x: Any, shrink_weights: Any, expand_weights: Any, *rest: Any, **out: Any
) -> int:
    needs = Needs(rest[-4], rest[-3], rest[-2], True)
    return count_gradients(x, [], shrink_weights, expand_weights, needs)


def _check_experts(x: Tensor, group: Group) -> None:
    check_op(x, group)
    for tensor in (*group.shrink_weights, *group.expand_weights):
        if tensor.dtype not in (x.dtype, _wide(x.dtype)):
            raise TypeError(
                f"shrink_weights and expand_weights must be {x.dtype} or {_wide(x.dtype)}, "
                f"got {tensor.dtype}"
            )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
