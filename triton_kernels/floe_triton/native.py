"""The path of the CPU: floe's C++ operators around the library's frozen product."""

from __future__ import annotations

import torch
from torch import Tensor

from floe_triton.eager import grad_router_bias
from floe_triton.group import Gradients, Group, Needs, Routed


def available() -> bool:
    """Whether floe's operators are loaded (``import floe.ops`` loads them)."""
    return hasattr(torch.ops.floe, "moe_lora_grad_x")


def forward(x: Tensor, group: Group) -> tuple[list[Tensor], Routed]:
    """As :func:`floe_triton.eager.forward`."""
    ops = torch.ops.floe
    products = ops.shrink(x, _fit(group.rows(), x), group.hidden_rows, group.dropout_p, group.seed)
    hidden, gate, z = ops.route(
        products, group.router_bias(), len(group), group.rank, group.experts,
        group.scaling, group.temperature, x.dtype,
    )  # fmt: skip
    ys = []
    for g, parameter in enumerate(group.expand_weights):
        expand_weight = _fit(parameter, x)
        if group.base_outputs:
            ys.append(ops.expand(z[g], expand_weight, None, group.base_outputs[g]))
            continue
        y = ops.expand(z[g], expand_weight, group.biases[g], None)
        ys.append(y.addmm_(x, group.weights[g].T))
    return ys, Routed(hidden, gate, z)


def backward(
    grad_ys: list[Tensor], x: Tensor, group: Group, routed: Routed, needs: Needs
) -> Gradients:
    """As :func:`floe_triton.eager.backward`."""
    ops = torch.ops.floe
    found = [
        ops.moe_lora_grad_y(grad_y, routed.z[g], _fit(expand, x), needs.expand)
        for g, (grad_y, expand) in enumerate(zip(grad_ys, group.expand_weights, strict=True))
    ]
    grad_expand = [
        grad.to(expand.dtype)
        for (_, grad), expand in zip(found, group.expand_weights, strict=True)
        if needs.expand
    ]
    if not (needs.x or needs.shrink or needs.router_bias):
        return Gradients(None, [], grad_expand, [])
    grads = ops.route_backward(
        [grad_z for grad_z, _ in found], routed.hidden, routed.gate, group.scaling,
        group.temperature,
    )  # fmt: skip
    grad_x, grad_rows = ops.moe_lora_grad_x(
        grads, x, _fit(group.rows(), x), group.hidden_rows, group.dropout_p, group.seed,
        needs.x, needs.shrink,
    )  # fmt: skip
    if needs.x:
        for grad_y, weight in zip(grad_ys, group.weights, strict=False):
            grad_x.addmm_(grad_y, weight)
    return Gradients(
        grad_x if needs.x else None,
        group.split_rows(grad_rows.to(group.shrink_weights[0].dtype)) if needs.shrink else [],
        grad_expand,
        grad_router_bias(grads, group, needs),
    )


def _fit(parameter: Tensor, x: Tensor) -> Tensor:
    """The operators take parameters in x's dtype and in float32."""
    if parameter.dtype in (x.dtype, torch.float32):
        return parameter
    return parameter.to(torch.promote_types(x.dtype, torch.float32))
