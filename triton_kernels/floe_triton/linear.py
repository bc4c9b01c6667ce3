"""The MoE-LoRA linear and its variants, differentiable: what users call.

Autograd is one ``autograd.Function`` around the two registered ops, or around what they run where
nobody watches ops: cheaper per call than an autograd registration, and ``torch.compile`` traces
through it. Without gradients to come there is no Function.

Derivatives of the gradients themselves, forward-mode derivatives and what else torch.func does are
those of the plain-torch definition, which then runs in place of the ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from floe_triton import reference, registration
from floe_triton.checks import autocasts, check_group, check_settings, transformed
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
        backend: "auto", or one of those that :mod:`floe_triton.paths` lists.

    Returns:
        [..., N] in x's dtype. Under autocast, x, weight and bias are cast to autocast's dtype
        first.

    Raises:
        ValueError, TypeError: naming the argument, the rule and what came.
    """
    (y,) = moe_lora_group(
        x, [weight], [bias], [shrink_weight], [expand_weight], scaling=scaling,
        dropout_p=dropout_p, seed=seed, router_biases=[router_bias], temperature=temperature,
        dropout_mode=dropout_mode, backend=backend,
    )  # fmt: skip
    return y


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
    (y,) = moe_lora_group_add(
        [base_output], x, [shrink_weight], [expand_weight], scaling=scaling, dropout_p=dropout_p,
        seed=seed, router_biases=[router_bias], temperature=temperature,
        dropout_mode=dropout_mode, backend=backend,
    )  # fmt: skip
    return y


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
    router_biases = _given(router_biases, expand_weights)
    given = [] if weights is None else weights
    check_group(x, given, biases, None, shrink_weights, expand_weights, router_biases)
    check_settings(x, scaling, temperature, dropout_p, seed, dropout_mode, backend)
    x, weights, biases = _autocast(x, weights, biases)
    return _apply(x, Group(
        weights, biases, [], shrink_weights, expand_weights, router_biases, float(scaling),
        float(temperature), float(dropout_p), seed if dropout_p > 0.0 else None,
    ), backend, dropout_mode)  # fmt: skip


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
    router_biases = _given(router_biases, expand_weights)
    none = _given(None, expand_weights)
    bases = [] if base_outputs is None else base_outputs
    check_group(x, None, none, bases, shrink_weights, expand_weights, router_biases)
    check_settings(x, scaling, temperature, dropout_p, seed, dropout_mode, backend)
    x, base_outputs = _autocast(x, base_outputs)
    return _apply(x, Group(
        [], [], base_outputs, shrink_weights, expand_weights, router_biases, float(scaling),
        float(temperature), float(dropout_p), seed if dropout_p > 0.0 else None,
    ), backend, dropout_mode)  # fmt: skip


class _Call(NamedTuple):
    """What a call has beside its tensors."""

    backend: str
    scaling: float
    temperature: float
    dropout_p: float
    linears: int
    on_base: bool  # base outputs are given, not weights and biases


class _MoELoRA(torch.autograd.Function):
    """``apply(call, x, seed, *group.tensors())``."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, x: Tensor, seed: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        group = _group(call, seed, tensors)
        ys, routed = registration.forward(x, group, call.backend)
        # base outputs are not needed again, and would be kept alive
        kept = (*group.weights, *tensors[-3 * call.linears :])
        ctx.save_for_backward(x, seed, routed.hidden, routed.gate, routed.z, *kept)
        ctx.call = call
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grad_ys: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        x, seed, hidden, gate, z, *kept = ctx.saved_tensors
        needs_x, needed = ctx.needs_input_grad[1], ctx.needs_input_grad[3:]
        base, adapters = needed[: -3 * call.linears], needed[-3 * call.linears :]
        on_base = grad_ys if call.on_base else [None] * len(base)
        of_base = [grad if need else None for grad, need in zip(on_base, base, strict=True)]
        if torch.is_grad_enabled() or transformed() or _batched(grad_ys):
            grad_x, *of_adapters = _backward_defined(
                call, grad_ys, x, seed, kept, (needs_x, *adapters)
            )
            return (None, grad_x, None, *of_base, *of_adapters)
        by_kind = [adapters[i * call.linears : (i + 1) * call.linears] for i in range(3)]
        found = registration.backward(
            list(grad_ys), x, _group(call, seed, kept), Routed(hidden, gate, z),
            Needs(needs_x, *map(any, by_kind)), call.backend,
        )  # fmt: skip
        of_adapters = [
            grads[g] if need else None
            for grads, needs in zip(
                (found.shrink, found.expand, found.router_bias), by_kind, strict=True
            )
            for g, need in enumerate(needs)
        ]
        return (None, found.x, None, *of_base, *of_adapters)


def _batched(grads: Sequence[Tensor]) -> bool:
    """Whether autograd.grad batches its gradients, by a vmap that torch.func does not show."""
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    return not torch.compiler.is_compiling() and any(map(is_batched, grads))


def _backward_defined(
    call: _Call,
    grad_ys: Sequence[Tensor],
    x: Tensor,
    seed: Tensor | None,
    kept: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x and the adapters by torch's own operators, for what differentiates them.

    ``needed`` has one entry for x and each of the adapters' tensors.
    """
    with torch.enable_grad():
        # as copies: one argument may be a function of another, whose gradient is not meant
        x = x.view_as(x)
        kept = [t if t is None else t.view_as(t) for t in kept]
        ys = _define(x, _group(call, seed, kept))
    inputs = [x, *kept[-3 * call.linears :]]
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
            x, shrink, expand, scaling=group.scaling, dropout_p=group.dropout_p, seed=group.seed,
            router_bias=bias, temperature=group.temperature, dropout_mode=dropout_mode,
        )
        for shrink, expand, bias in zip(
            group.shrink_weights, group.expand_weights, group.router_biases, strict=True
        )
    ]  # fmt: skip
    biases = group.biases or [None] * len(group.weights)
    frozen = zip(group.weights, biases, strict=True)
    bases = group.base_outputs or [linear(x, weight, bias) for weight, bias in frozen]
    return [base + y for base, y in zip(bases, ys, strict=True)] if bases else ys


def _group(call: _Call, seed: Tensor | None, tensors: Sequence[Tensor | None]) -> Group:
    """The group of ``Group.tensors()``, or of those that backward needs: no biases, no outputs."""
    count, given = call.linears, len(tensors)
    base: Any = list(tensors[: -3 * count])
    adapters: Any = (list(tensors[given - i * count : given - (i - 1) * count]) for i in (3, 2, 1))
    shrink, expand, router_biases = adapters
    weights, biases, base_outputs = (
        ([], [], base) if call.on_base else (base[:count], base[count:], [])
    )
    return Group(
        weights, biases, base_outputs, shrink, expand, router_biases, call.scaling,
        call.temperature, call.dropout_p, seed,
    )  # fmt: skip


def _apply(x: Tensor, group: Group, backend: str, dropout_mode: str) -> list[Tensor]:
    if dropout_mode == "per_expert" or transformed():
        return _define(x, group, dropout_mode)
    rows = _rows(x)
    group.base_outputs = [_rows(base) for base in group.base_outputs]
    tensors = group.tensors()
    if _differentiable(x, *tensors):
        call = _Call(backend, group.scaling, group.temperature, group.dropout_p, len(group),
                     len(group.base_outputs) > 0)  # fmt: skip
        ys = _MoELoRA.apply(call, rows, group.seed, *tensors)
    else:  # a Function would cost as much as a small layer's product
        ys = registration.forward(rows, group, backend)[0]
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def _rows(tensor: Tensor) -> Tensor:
    """[..., K] as [T, K], also where K is 0."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _given(
    router_biases: Sequence[Tensor | None] | None, expand_weights: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    if router_biases is not None:
        return router_biases
    return [None] * len(expand_weights) if isinstance(expand_weights, (list, tuple)) else []


def _autocast(x: Tensor, *lists: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """``x`` and the lists, in autocast's dtype where it is on."""
    # float64 stays as it is, as in torch's own autocast
    if not autocasts(x) or x.dtype == torch.float64:
        return x, *lists
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), *([t if t is None else t.to(dtype) for t in each] for each in lists)
