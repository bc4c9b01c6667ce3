"""The MoE-LoRA linear and its variants, differentiable: what users call.

Autograd is one ``autograd.Function`` around the two registered ops, or around what they run where
nobody watches ops: cheaper per call than an autograd registration, and ``torch.compile`` traces
through it. Without gradients to come there is no Function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from floe_triton import reference, registration
from floe_triton.checks import autocasts, check_group, check_settings

__all__ = ["moe_lora", "moe_lora_add", "moe_lora_group", "moe_lora_group_add"]


class _Settings(NamedTuple):
    linears: int
    on_base: bool  # base outputs are given, not weights
    scaling: float
    temperature: float
    dropout_p: float
    backend: str


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
    biases = list(biases)
    router_biases = _given(router_biases, len(expand_weights))
    check_group(x, weights, biases, [], shrink_weights, expand_weights, router_biases)
    check_settings(x, scaling, temperature, dropout_p, seed, dropout_mode, backend)
    if dropout_mode == "per_expert":
        return [
            reference.moe_lora(
                x, weight, bias, shrink, expand, scaling=scaling, dropout_p=dropout_p, seed=seed,
                router_bias=router_bias, temperature=temperature, dropout_mode=dropout_mode,
            )
            for weight, bias, shrink, expand, router_bias in zip(
                weights, biases, shrink_weights, expand_weights, router_biases, strict=True
            )
        ]  # fmt: skip
    settings = _Settings(len(expand_weights), False, scaling, temperature, dropout_p, backend)
    x, cast = _autocast(x, [*weights, *biases])
    return _apply(settings, x, seed, cast, [*shrink_weights, *expand_weights, *router_biases])


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
    count = len(expand_weights)
    router_biases = _given(router_biases, count)
    none: list[Tensor | None] = [None] * count
    check_group(x, [], none, base_outputs, shrink_weights, expand_weights, router_biases)
    check_settings(x, scaling, temperature, dropout_p, seed, dropout_mode, backend)
    if dropout_mode == "per_expert":
        return [
            base + reference.moe_lora_delta(
                x, shrink, expand, scaling=scaling, dropout_p=dropout_p, seed=seed,
                router_bias=router_bias, temperature=temperature, dropout_mode=dropout_mode,
            )
            for base, shrink, expand, router_bias in zip(
                base_outputs, shrink_weights, expand_weights, router_biases, strict=True
            )
        ]  # fmt: skip
    settings = _Settings(count, True, scaling, temperature, dropout_p, backend)
    x, cast = _autocast(x, base_outputs)
    flat = [None if base is None else base.reshape(-1, base.shape[-1]) for base in cast]
    return _apply(settings, x, seed, flat, [*shrink_weights, *expand_weights, *router_biases])


class _MoELoRA(torch.autograd.Function):
    """``apply(settings, x, seed, *base, *adapters)``.

    ``base`` are the weights then the biases, or the base outputs; ``adapters`` the shrink weights,
    the expand weights and the router biases.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: _Settings, x: Tensor, seed: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        arguments = _arguments(settings, seed, tensors)
        ys, *routed = registration.forward_of(x, *tensors)(x, *arguments)
        # base outputs are not needed again, and would be kept alive
        kept = [None] * settings.linears if settings.on_base else tensors[: settings.linears]
        adapters = tensors[-3 * settings.linears :]
        ctx.save_for_backward(x, seed, *routed, *kept, *adapters)
        ctx.settings = settings
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_ys: Tensor) -> tuple[Tensor | None, ...]:
        settings: _Settings = ctx.settings
        count = settings.linears
        x, seed, hidden, gate, z, *tensors = ctx.saved_tensors
        weights, adapters = tensors[:count], tensors[count:]
        needs_x, needed = ctx.needs_input_grad[1], ctx.needs_input_grad[3:]
        base, adapted = needed[: -3 * count], needed[-3 * count :]
        needs = [any(adapted[i * count : (i + 1) * count]) for i in range(3)]
        saved = (*([] if settings.on_base else (*weights, *[None] * count)), *adapters)
        arguments = _arguments(settings._replace(on_base=False), seed, saved)
        grad_x, *grads = registration.backward_of(x, *grad_ys, *tensors)(
            list(grad_ys), x, *arguments, hidden, gate, z, needs_x, *needs
        )
        on_base = grad_ys if settings.on_base else [None] * (2 * count)
        of_base = [grad if need else None for grad, need in zip(on_base, base, strict=True)]
        of_adapters = [
            found[g] if adapted[i * count + g] else None
            for i, found in enumerate(grads)
            for g in range(count)
        ]
        return (None, grad_x if needs_x else None, None, *of_base, *of_adapters)


def _arguments(
    settings: _Settings, seed: Tensor | None, tensors: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """What both ops take between x and what is their own."""
    count = settings.linears
    shrink, expand, router_biases = (
        list(tensors[len(tensors) - (3 - i) * count : len(tensors) - (2 - i) * count])
        for i in range(3)
    )
    base = list(tensors[: -3 * count])
    weights, biases = ([], []) if settings.on_base else (base[:count], base[count:])
    return (
        weights, biases, base if settings.on_base else [], shrink, expand, router_biases,
        settings.scaling, settings.temperature, settings.dropout_p, seed, settings.backend,
    )  # fmt: skip


def _apply(
    settings: _Settings,
    x: Tensor,
    seed: Tensor | None,
    base: Sequence[Tensor | None],
    adapters: Sequence[Tensor | None],
) -> list[Tensor]:
    settings = settings._replace(
        scaling=float(settings.scaling),
        temperature=float(settings.temperature),
        dropout_p=float(settings.dropout_p),
    )
    seed = seed if settings.dropout_p > 0.0 else None
    rows, tensors = x.reshape(-1, x.shape[-1]), (*base, *adapters)
    if _differentiable(x, *tensors):
        ys = _MoELoRA.apply(settings, rows, seed, *tensors)
    else:  # a Function would cost as much as a small layer's product
        forward = registration.forward_of(rows, *tensors)
        ys = forward(rows, *_arguments(settings, seed, tensors))[0]
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _given(router_biases: Sequence[Tensor | None] | None, count: int) -> Sequence[Tensor | None]:
    return [None] * count if router_biases is None else router_biases


def _autocast(x: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
    # float64 stays as it is, as in torch's own autocast
    if not autocasts(x) or x.dtype == torch.float64:
        return x, list(tensors)
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), [None if tensor is None else tensor.to(dtype) for tensor in tensors]
