"""The path of CUDA devices: Triton kernels around, or instead of, the library's frozen product.

Launches of a group of G linears, library products included, with T tokens:

=================  ==============================================================================
forward, gemm      shrink (+ route where K is split) and per linear: expand, frozen product
forward, fused     shrink (+ route) and per linear: one product with the experts in its accumulator
forward, T <= 16   split shrink, route + expand of all linears, and per linear: frozen product
backward           per linear: grad_y, its sums; grad_x, its sum; per linear: frozen product
=================  ==============================================================================

Groups of more than one linear stack their rows first: one copy of G (H + M) K numbers. Ranks that
the kernels do not serve (:func:`floe_triton.tuning.kernels_serve`) take the library's products
where those kernels would stand, and so does grad_y where M r is so wide that reading it twice costs
less than the kernel's parts (:func:`floe_triton.tuning.reads_grad_y_once`). Wide float32 experts,
which no tensor core multiplies, are routed and expanded apart with few tokens, too: an exact
float32 product of that depth does not fit into registers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from floe_triton import product_form, tuning
from floe_triton.group import Gradients, Group, Needs, Routed
from floe_triton.kernels import backward as kernels
from floe_triton.kernels import expand, shrink
from floe_triton.kernels.expand import dense_rows
from floe_triton.launch import device_of


def forward(x: Tensor, group: Group) -> tuple[list[Tensor], Routed]:
    """As :func:`floe_triton.product_form.forward`."""
    if _is_for_torch(x, group):
        return product_form.forward(x, group)
    x, served = dense_rows(x), _served(group)
    decodes = served and _decodes(x, group)
    if decodes:
        products = shrink.decode_shrink(x, group)
        pads = tuning.decode_pads(group.rank, group.experts)
        if not tuning.decode_expands_apart(pads, x.element_size()):
            ys, routed = expand.decode_expand(products, group, x.dtype)
            return product_form.add_frozen(ys, x, group), routed
        routed = shrink.route(products, group, x.dtype)
    elif served:
        shrunk = shrink.shrink(x, group.shrink_rows(), group)
        routed = shrunk if isinstance(shrunk, Routed) else shrink.route(shrunk, group, x.dtype)
    else:
        products = product_form.products(x, group).to(torch.float32)
        routed = shrink.route(products[None], group, x.dtype)
    ys = []
    for g, expand_weight in enumerate(group.expand_weights):
        z, bias, base = routed.z[g], group.bias(g), group.base_output(g)
        if served and not decodes and base is None and _fuses(x, group.weights[g], group):
            ys.append(expand.fused_linear(x, group.weights[g], bias, z, expand_weight))
            continue
        if served:
            y = expand.expand(z, expand_weight, bias, base)
        else:
            y = product_form.expand(z, group, g)
        ys.append(y if base is not None else y.addmm_(x, group.weights[g].T))
    return ys, routed


def backward(
    grad_ys: list[Tensor], x: Tensor, group: Group, routed: Routed, needs: Needs
) -> Gradients:
    """As :func:`floe_triton.product_form.backward`."""
    if _is_for_torch(x, group, *grad_ys):
        return product_form.backward(grad_ys, x, group, routed, needs)
    x, grad_ys = dense_rows(x), [dense_rows(grad_y) for grad_y in grad_ys]
    grads = x.new_empty(x.shape[0], group.row_count)
    grad_gates = torch.empty_like(routed.gate) if group.gates else None
    expands = [
        _grad_y(grad_y, group, g, routed, grads, grad_gates, needs)
        for g, grad_y in enumerate(grad_ys)
    ]
    grad_expand = [grad for grad in expands if grad is not None]
    of_gates = []
    if grad_gates is not None and needs.gates:
        of_gates = [grad_gates[g].to(given.dtype) for g, given in enumerate(group.gates)]
    if not needs.products:
        return Gradients(None, [], grad_expand, [], of_gates)
    grad_x, grad_rows = _grad_x(grad_ys, grads, x, group, needs)
    grad_shrink = [] if grad_rows is None else group.split_rows(grad_rows)
    router_bias = product_form.grad_router_bias(grads, group, needs)
    return Gradients(grad_x, grad_shrink, grad_expand, router_bias, of_gates)


def _grad_y(
    grad_y: Tensor,
    group: Group,
    g: int,
    routed: Routed,
    grads: Tensor,
    grad_gates: Tensor | None,
    needs: Needs,
) -> Tensor | None:
    """Everything that grad_y of linear g is read for: its columns of ``grads``, gates', and dB."""
    needs_z = needs.products or needs.gates
    if _served(group) and _reads_once(grad_y, group):
        needed = needs.expand, needs_z
        return kernels.backward_y(grad_y, group, g, routed, grads, *needed, grad_gates)
    if needs_z:
        grad_z = product_form.product_with_experts(grad_y, group, g).to(torch.float32)
        kernels.route_backward(grad_z[None], group, g, routed, grads, grad_gates)
    return product_form.grad_of_expand(grad_y, group, g, routed) if needs.expand else None


def _grad_x(
    grad_ys: list[Tensor], grads: Tensor, x: Tensor, group: Group, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x (the frozen products included) and of the rows."""
    rows, served = group.shrink_rows(), _served(group)
    fuses = served and len(group.weights) > 0 and _fuses(x, group.weights[0], group)
    starts = needs.x and not fuses  # else the first frozen product starts grad_x
    if served:
        grad_x, grad_rows = kernels.backward_x(grads, x, rows, group, starts, needs.shrink)
    else:
        grad_x = product_form.adapter_grad_x(grads, x, group) if starts else None
        grad_rows = None
        if needs.shrink:
            grad_rows = product_form.grads_of_rows(grads, x, group).to(rows.dtype)
    if not needs.x:
        return None, grad_rows
    for grad_y, weight in zip(grad_ys, group.weights, strict=False):
        if grad_x is None:
            grad_x = kernels.fused_grad_x(grad_y, weight, grads, rows, group)
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
    return tuning.kernels_serve(group.row_count, group.experts * group.rank)


def _reads_once(grad_y: Tensor, group: Group) -> bool:
    width, device = group.experts * group.rank, device_of(grad_y)
    return tuning.reads_grad_y_once(device, width, grad_y.element_size())


def _decodes(x: Tensor, group: Group) -> bool:
    few = x.shape[0] <= shrink.MAX_TOKENS and len(group) <= shrink.MAX_LINEARS
    return few and group.dropout_p == 0.0


def _fuses(x: Tensor, weight: Tensor, group: Group) -> bool:
    if group.backend != "auto":
        return group.backend == "fused"
    return tuning.prefers_fused(device_of(x), x.shape[0], *weight.shape)
