"""The path of the CPU: floe's C++ operators around the library's frozen product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from floe_triton.eager import grad_router_bias
from floe_triton.group import Gradients, Group, Needs, Routed


def available() -> bool:
    """Whether floe's operators are loaded (``import floe.ops`` loads them)."""
    return hasattr(torch.ops.floe, "moe_lora_experts")


def forward(x: Tensor, group: Group) -> tuple[list[Tensor], Routed]:
    """As :func:`floe_triton.eager.forward`."""
    ys, *routed = torch.ops.floe.moe_lora_experts(
        x, _fit(group.shrink_weights, x), _fit(group.expand_weights, x), group.router_biases,
        group.biases, group.base_outputs, group.scaling, group.temperature, group.dropout_p,
        group.seed,
    )  # fmt: skip
    if not group.base_outputs:
        for y, weight in zip(ys, group.weights, strict=True):
            y.addmm_(x, weight.T)
    return ys, Routed(*routed)


def backward(
    grad_ys: list[Tensor], x: Tensor, group: Group, routed: Routed, needs: Needs
) -> Gradients:
    """As :func:`floe_triton.eager.backward`."""
    grad_x, grad_shrink, grad_expand, grads = torch.ops.floe.moe_lora_experts_backward(
        grad_ys, x, _fit(group.shrink_weights, x), _fit(group.expand_weights, x), routed.hidden,
        routed.gate, routed.z, group.scaling, group.temperature, group.dropout_p, group.seed,
        needs.x, needs.shrink, needs.expand,
    )  # fmt: skip
    if needs.x:
        for grad_y, weight in zip(grad_ys, group.weights, strict=False):
            grad_x.addmm_(grad_y, weight)
    return Gradients(
        grad_x if needs.x else None,
        _as_stored(grad_shrink, group.shrink_weights),
        _as_stored(grad_expand, group.expand_weights),
        grad_router_bias(grads, group, needs),
    )


def _fit(parameters: Sequence[Tensor], x: Tensor) -> Sequence[Tensor]:
    """The operators take parameters in x's dtype and in that of its sums."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if parameters[0].dtype in (x.dtype, wide):
        return parameters
    return [parameter.to(wide) for parameter in parameters]


def _as_stored(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Empty where they are not needed."""
    pairs = zip(gradients, parameters, strict=False)
    return [gradient.to(parameter.dtype) for gradient, parameter in pairs]
