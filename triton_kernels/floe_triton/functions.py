"""The MoE-LoRA linear and its variants, differentiable: what users call.

Each checks its arguments, packs them into one `Group`, and runs that. Autograd is one
``autograd.Function`` around whoever computes the group (:mod:`floe_triton.dispatch`): cheaper per
call than an autograd registration, and ``torch.compile`` traces through it. Without gradients to
come there is no Function.

Derivatives of the gradients themselves, forward-mode derivatives and what else torch.func does are
those of the plain-torch definition, which then runs in place of the ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from floe_triton import dispatch, reference
from floe_triton.checks import autocasts, check_call, transformed
from floe_triton.group import Group, Needs, Routed

__all__ = ["moe_lora", "moe_lora_add", "moe_lora_group", "moe_lora_group_add"]


def moe_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shrink_weight: Tensor,
    expand_weight: Tensor,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    router_bias: Tensor | None = None,
    temperature: float = 1.0,
    dropout_mode: str = "shared",
    backend: str = "auto",
) -> Tensor:
    """Frozen linear plus routed low-rank experts.

    Differentiable in x, shrink_weight, expand_weight and router_bias. Equals
    :func:`floe_triton.reference.moe_lora`:
    ``y = x W^T + b + scaling * sum_i softmax(x R^T)_i * (dropout(x) A^T) B_i^T`` (FLoE Eq. 1).

    Args:
        x: [..., K], floating point, any strides.
        weight: [N, K], frozen, x's dtype and device.
        bias: [N] or None.
        shrink_weight: [r + M, K], rows of A then of the router, any float dtype (computed in x's).
        expand_weight: [N, M, r], likewise.
        scaling: alpha / r, applied before the only rounding.
        dropout_p: in [0, 1), in steps of 1/256; the router sees x undropped.
        seed: 0-dim int64 tensor on x's device, needed when dropout_p > 0.
        router_bias: [M], added to the router's logits, or None.
        temperature: above 0; the logits are divided by it.
        dropout_mode: "shared": one mask for all experts. "per_expert": a mask each, as in
            HydraLoRA's code; computed by the plain-torch definition.
        backend: "auto", or one of those that :mod:`floe_triton.dispatch` lists.

    Returns:
        [..., N] in x's dtype. Under autocast, x, weight and bias are cast to autocast's dtype
        first.

    Raises:
        ValueError, TypeError: naming the argument, the rule and what came.
    """
    adapter = [shrink_weight], [expand_weight], [router_bias]
    group = Group([weight], [bias], [], *adapter, scaling, temperature, dropout_p, seed, backend)
    return _run(x, group, False, dropout_mode)[0]


def moe_lora_add(
    base_output: Tensor,
    x: Tensor,
    shrink_weight: Tensor,
    expand_weight: Tensor,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    router_bias: Tensor | None = None,
    temperature: float = 1.0,
    dropout_mode: str = "shared",
    backend: str = "auto",
) -> Tensor:
    """:func:`moe_lora` on top of a given base output [..., N].

    For quantised or otherwise wrapped base layers. One pass over base_output, which is not changed.
    """
    adapter = [shrink_weight], [expand_weight], [router_bias]
    group = Group([], [], [base_output], *adapter, scaling, temperature, dropout_p, seed, backend)
    return _run(x, group, True, dropout_mode)[0]


def moe_lora_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    shrink_weights: Sequence[Tensor],
    expand_weights: Sequence[Tensor],
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    router_biases: Sequence[Tensor | None] | None = None,
    temperature: float = 1.0,
    dropout_mode: str = "shared",
    backend: str = "auto",
) -> list[Tensor]:
    """:func:`moe_lora` of several linears that read one x (gate/up, q/k/v), which is read once.

    Lists have one entry per linear; all share rank, number of experts and settings, and one
    dropout mask. Returns one [..., N_g] per linear.
    """
    adapters = shrink_weights, expand_weights, _or_none(router_biases, expand_weights)
    group = Group(weights, biases, [], *adapters, scaling, temperature, dropout_p, seed, backend)
    return _run(x, group, False, dropout_mode)


def moe_lora_group_add(
    base_outputs: Sequence[Tensor],
    x: Tensor,
    shrink_weights: Sequence[Tensor],
    expand_weights: Sequence[Tensor],
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    router_biases: Sequence[Tensor | None] | None = None,
    temperature: float = 1.0,
    dropout_mode: str = "shared",
    backend: str = "auto",
) -> list[Tensor]:
    """:func:`moe_lora_group` on top of given base outputs [..., N_g]."""
    adapters = shrink_weights, expand_weights, _or_none(router_biases, expand_weights)
    group = Group([], [], base_outputs, *adapters, scaling, temperature, dropout_p, seed, backend)
    return _run(x, group, True, dropout_mode)


def _or_none(
    router_biases: Sequence[Tensor | None] | None, expand_weights: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    if router_biases is not None:
        return router_biases
    return [None] * len(expand_weights) if isinstance(expand_weights, (list, tuple)) else []


def _run(x: Tensor, group: Group, on_base: bool, dropout_mode: str) -> list[Tensor]:
    """Check everything, and compute [..., N_g] of every linear.

    ``on_base``: the caller gave base outputs, not weights and biases.
    """
    check_call(x, group, on_base, dropout_mode)
    group.scaling, group.temperature = float(group.scaling), float(group.temperature)
    group.dropout_p = float(group.dropout_p)
    if group.dropout_p == 0.0:
        group.seed = None
    if autocasts(x) and x.dtype != torch.float64:  # torch's own leaves float64 as it is, too
        x = _cast(x, group)
    if dropout_mode == "per_expert" or transformed():
        return _define(x, group, dropout_mode)
    rows = _rows(x)
    group.base_outputs = [_rows(base) for base in group.base_outputs]
    tensors = group.tensors()
    if torch.is_grad_enabled() and _requires_grad(x, *tensors):
        ys = _MoELoRA.apply(group, rows, group.seed, *tensors)
    else:  # a Function would cost as much as a small layer's product
        ys, _ = dispatch.implementation(rows, group).forward(rows, group)
    return list(ys) if rows is x else [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


class _Settings(NamedTuple):
    """What a backward needs of its group, beside the tensors."""

    linears: int
    on_base: bool  # base outputs were given, not weights and biases
    scaling: float
    temperature: float
    dropout_p: float
    backend: str


class _MoELoRA(torch.autograd.Function):
    """``apply(group, x, group.seed, *group.tensors())``."""

    @staticmethod
    def forward(
        ctx: Any, group: Group, x: Tensor, seed: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ys, routed = dispatch.implementation(x, group).forward(x, group)
        ctx.settings = _Settings(
            len(group),
            len(group.base_outputs) > 0,
            group.scaling,
            group.temperature,
            group.dropout_p,
            group.backend,
        )
        # base outputs and biases are not needed again, and would be kept alive
        kept = (*group.weights, *tensors[-3 * len(group) :])
        ctx.save_for_backward(x, seed, routed.hidden, routed.gate, routed.z, *kept)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grad_ys: Tensor) -> tuple[Tensor | None, ...]:
        x, seed, hidden, gate, z, *kept = ctx.saved_tensors
        group, linears = _unpacked(ctx.settings, seed, kept), ctx.settings.linears
        needs_x, needed = ctx.needs_input_grad[1], ctx.needs_input_grad[3:]
        base, adapters = needed[: -3 * linears], needed[-3 * linears :]
        on_base = grad_ys if ctx.settings.on_base else [None] * len(base)
        of_base = [grad if need else None for grad, need in zip(on_base, base, strict=True)]
        if torch.is_grad_enabled() or transformed() or _batched(grad_ys):
            grad_x, *of_adapters = _backward_defined(grad_ys, x, group, (needs_x, *adapters))
            return (None, grad_x, None, *of_base, *of_adapters)
        by_kind = [adapters[i * linears : (i + 1) * linears] for i in range(3)]
        needs = Needs(needs_x, *map(any, by_kind))
        run = dispatch.implementation(x, group, *grad_ys)
        grads = run.backward(list(grad_ys), x, group, Routed(hidden, gate, z), needs)
        of_adapters = [
            of_kind[g] if need else None
            for of_kind, needs in zip(
                (grads.shrink, grads.expand, grads.router_bias), by_kind, strict=True
            )
            for g, need in enumerate(needs)
        ]
        return (None, grads.x, None, *of_base, *of_adapters)


def _unpacked(settings: _Settings, seed: Tensor | None, kept: Sequence[Any]) -> Group:
    """The group of a backward, without biases and base outputs."""
    linears, _, scaling, temperature, dropout_p, backend = settings
    ends = [len(kept) - i * linears for i in (3, 2, 1, 0)]
    weights, shrinks, expands, routers = (kept[first:end] for first, end in pairwise([0, *ends]))
    adapters = shrinks, expands, routers
    return Group(weights, [], [], *adapters, scaling, temperature, dropout_p, seed, backend)


def _batched(grads: Sequence[Tensor]) -> bool:
    """Whether autograd.grad batches its gradients, by a vmap that torch.func does not show."""
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    return not torch.compiler.is_compiling() and any(map(is_batched, grads))


def _backward_defined(
    grad_ys: Sequence[Tensor], x: Tensor, group: Group, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x and the adapters by torch's own operators, for what differentiates them.

    ``needed`` has one entry for x and each of the adapters' tensors.
    """
    with torch.enable_grad():
        # as copies: one argument may be a function of another, whose gradient is not meant
        x = x.view_as(x)
        for name in ("weights", "shrink_weights", "expand_weights", "router_biases"):
            tensors = getattr(group, name)
            setattr(group, name, [t if t is None else t.view_as(t) for t in tensors])
        ys = _define(x, group)
    inputs = [x, *group.shrink_weights, *group.expand_weights, *group.router_biases]
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
    grads = iter(
        torch.autograd.grad(
            ys, wanted, grad_ys, create_graph=torch.is_grad_enabled(), allow_unused=True
        )
    )
    return [next(grads) if need else None for need in needed]


def _define(x: Tensor, group: Group, dropout_mode: str = "shared") -> list[Tensor]:
    """The outputs by the plain-torch definition; without weights the adapters' part of them."""
    ys = [
        reference.moe_lora_delta(
            x,
            shrink,
            expand,
            scaling=group.scaling,
            dropout_p=group.dropout_p,
            seed=group.seed,
            router_bias=bias,
            temperature=group.temperature,
            dropout_mode=dropout_mode,
        )
        for shrink, expand, bias in zip(
            group.shrink_weights, group.expand_weights, group.router_biases, strict=True
        )
    ]
    biases = group.biases or [None] * len(group.weights)
    frozen = zip(group.weights, biases, strict=True)
    bases = group.base_outputs or [linear(x, weight, bias) for weight, bias in frozen]
    return [base + y for base, y in zip(bases, ys, strict=True)] if bases else ys


def _rows(tensor: Tensor) -> Tensor:
    """[..., K] as [T, K], also where K is 0."""
    if tensor.dim() == 2:
        return tensor
    return tensor.flatten(0, -2) if tensor.dim() > 2 else tensor[None]


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _cast(x: Tensor, group: Group) -> Tensor:
    """``x``, and the group's frozen part, in autocast's dtype."""
    dtype = torch.get_autocast_dtype(x.device.type)
    for name in ("weights", "biases", "base_outputs"):
        tensors = getattr(group, name)
        setattr(group, name, [t if t is None else t.to(dtype) for t in tensors])
    return x.to(dtype)
