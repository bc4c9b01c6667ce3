"""The path of CUDA devices: Triton kernels around, or instead of, the library's frozen product.

Launches of a group of G linears, library products included, with T tokens:

=================  ==============================================================================
forward, gemm      shrink (+ route where K is split) and per linear: expand, frozen product
forward, fused     shrink (+ route) and per linear: one product with the experts in its accumulator
forward, T <= 16   split shrink, route + expand of all linears, and per linear: frozen product
backward           per linear: grad_y, its sums; grad_x, its sum; per linear: frozen product
=================  ==============================================================================

Groups of more than one linear stack their rows first: one copy of G (r + M) K numbers. Ranks that
the kernels do not serve (:func:`floe_triton.tuning.kernels_serve`) take the library's products
where those kernels would stand, and so does grad_y where M r is so wide that reading it twice costs
less than the kernel's parts (:func:`floe_triton.tuning.reads_grad_y_once`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from floe_triton import backward as kernels
from floe_triton import decode, eager, expand, launch, shrink, tuning
from floe_triton.group import Gradients, Group, Needs, Routed


def forward(x: Tensor, group: Group, path: str) -> tuple[list[Tensor], Routed]:
    """As :func:`floe_triton.eager.forward`; ``path`` is "gemm", "fused" or "triton" (either)."""
    if _is_for_torch(x, group):
        return eager.forward(x, group)
    x = _inner_contiguous(x)
    served = _served(group)
    if served and _decodes(x, group):
        ys, routed = decode.decode(x, group)
        for y, weight in zip(ys, group.weights, strict=False):  # none on base outputs
            y.addmm_(x, weight.T)
        return ys, routed
    settings: dict[str, Any] = {
        "groups": len(group),
        "rank": group.rank,
        "experts": group.experts,
        "scaling": group.scaling,
        "temperature": group.temperature,
    }
    if served:
        routed = shrink.shrink_route(
            x, group.rows(), group.router_bias(), dropout_p=group.dropout_p, seed=group.seed,
            **settings,
        )  # fmt: skip
    else:
        products = eager.products(x, group).to(torch.float32)
        routed = shrink.route(products[None], group.router_bias(), dtype=x.dtype, **settings)
    return [_linear(x, group, g, routed.z[g], path, served) for g in range(len(group))], routed


def backward(
    grad_ys: list[Tensor], x: Tensor, group: Group, routed: Routed, needs: Needs, path: str
) -> Gradients:
    """As :func:`floe_triton.eager.backward`."""
    if _is_for_torch(x, group, *grad_ys):
        return eager.backward(grad_ys, x, group, routed, needs)
    x, grad_ys = _inner_contiguous(x), [_inner_contiguous(grad_y) for grad_y in grad_ys]
    rows = needs.x or needs.shrink or needs.router_bias
    grads = x.new_empty(x.shape[0], len(group) * (group.rank + group.experts))
    expands = [
        _grad_y(grad_y, group, g, routed, grads, needs.expand, rows)
        for g, grad_y in enumerate(grad_ys)
    ]
    grad_expand = [grad for grad in expands if grad is not None]
    if not rows:
        return Gradients(None, [], grad_expand, [])
    grad_x, grad_rows = _grad_x(grad_ys, grads, x, group, needs, path)
    return Gradients(
        grad_x,
        [] if grad_rows is None else group.split_rows(grad_rows),
        grad_expand,
        eager.grad_router_bias(grads, group, needs),
    )


def _linear(x: Tensor, group: Group, g: int, z: Tensor, path: str, served: bool) -> Tensor:
    """The output of linear g."""
    expand_weight = group.expand_weights[g]
    if group.base_outputs:
        base = _inner_contiguous(group.base_outputs[g])
        if served:
            return expand.expand(z, expand_weight, None, base)
        return torch.addmm(base, z, eager.flat(expand_weight).to(z.dtype).T)
    weight, bias = group.weights[g], group.biases[g]
    if served and _fuses(x, weight, path):
        return expand.fused_linear(x, weight, bias, z, expand_weight)
    if served:
        y = expand.expand(z, expand_weight, bias, None)
    else:
        flat = eager.flat(expand_weight).to(z.dtype).T
        y = torch.mm(z, flat) if bias is None else torch.addmm(bias, z, flat)
    return y.addmm_(x, weight.T)


def _grad_y(
    grad_y: Tensor,
    group: Group,
    g: int,
    routed: Routed,
    grads: Tensor,
    needs_expand: bool,
    needs_rows: bool,
) -> Tensor | None:
    """Everything that grad_y of linear g is read for: its columns of ``grads``, and dB."""
    expand_weight, settings = group.expand_weights[g], (group.scaling, group.temperature)
    if _served(group) and _reads_once(grad_y, group):
        return kernels.backward_y(
            grad_y, routed.z[g], expand_weight, routed.hidden[g], routed.gate[g], *settings,
            grads, g, len(group), needs_expand, needs_rows,
        )  # fmt: skip
    if needs_rows:
        grad_z = torch.mm(grad_y, eager.flat(expand_weight).to(grad_y.dtype)).to(torch.float32)
        kernels.route_backward(
            grad_z[None], routed.hidden[g], routed.gate[g], *settings, grads, g, len(group)
        )
    if not needs_expand:
        return None
    return torch.mm(grad_y.T, routed.z[g]).view(expand_weight.shape).to(expand_weight.dtype)


def _grad_x(
    grad_ys: list[Tensor], grads: Tensor, x: Tensor, group: Group, needs: Needs, path: str
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x (the frozen products included) and of the rows."""
    rows = group.rows()
    fused = [_served(group) and _fuses(x, weight, path) for weight in group.weights]
    starts = needs.x and not (fused and fused[0])  # else the first product starts grad_x
    if _served(group):
        grad_x, grad_rows = kernels.backward_x(
            grads, x, rows, group.hidden_rows, group.dropout_p, group.seed, starts, needs.shrink
        )
    else:
        grad_x = eager.adapter_grad_x(grads, x, group) if starts else None
        grad_rows = eager.grad_rows(grads, x, group).to(rows.dtype) if needs.shrink else None
    if not needs.x:
        return None, grad_rows
    for grad_y, weight in zip(grad_ys, group.weights, strict=False):
        if grad_x is None:
            grad_x = expand.fused_grad_x(
                grad_y, weight, grads, rows, group.hidden_rows, group.dropout_p, group.seed
            )
        else:
            grad_x.addmm_(grad_y, weight)
    return grad_x, grad_rows


def _is_for_torch(x: Tensor, group: Group, *others: Tensor) -> bool:
    """Whether kernels have nothing to read, or memory that does not hold what a tensor says.

    The latter are torch's lazily negated views and its zeros without memory.
    """
    if 0 in x.shape or any(weight.shape[0] == 0 for weight in group.expand_weights):
        return True
    for tensor in (x, *group.tensors(), group.seed, *others):
        if tensor is not None and (tensor.is_neg() or tensor._is_zerotensor()):
            return True
    return False


def _served(group: Group) -> bool:
    rows = len(group) * (group.rank + group.experts)
    return tuning.kernels_serve(rows, group.experts * group.rank)


def _reads_once(grad_y: Tensor, group: Group) -> bool:
    width, device = group.experts * group.rank, launch.device_of(grad_y)
    return tuning.reads_grad_y_once(device, width, grad_y.element_size())


def _decodes(x: Tensor, group: Group) -> bool:
    few = x.shape[0] <= decode.MAX_TOKENS and len(group) <= decode.MAX_LINEARS
    return few and group.dropout_p == 0.0


def _fuses(x: Tensor, weight: Tensor, path: str) -> bool:
    if path != "triton":
        return path == "fused"
    return tuning.prefers_fused(launch.device_of(x), x.shape[0], *weight.shape)


def _inner_contiguous(tensor: Tensor) -> Tensor:
    """The kernels take any row stride, but neighbouring columns."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
