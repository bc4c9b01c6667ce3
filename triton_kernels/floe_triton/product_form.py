"""The product form: all M experts as one rank-(M r) product, to which the frozen product adds.

``z[t, i * r + j] = scaling * gate_i(t) * hidden_j(t)`` turns the sum over experts into
``z Bcat^T`` with ``Bcat [N, M r]`` (a free view of ``expand_weight``). Writing
``y = z Bcat^T + b`` first and letting ``y += x W^T`` accumulate on top costs no pass over y of its
own and rounds once where "linear, then add" rounds twice.

By torch's operators it runs on every device and is the yardstick of all others (``forward``,
``backward``); floe's C++ does the experts' part of it on the CPU (``native_forward``,
``native_backward``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from floe_triton import reference
from floe_triton.dropout import keyed_dropout
from floe_triton.group import Gradients, Group, Needs, Routed


def forward(x: Tensor, group: Group) -> tuple[list[Tensor], Routed]:
    """The outputs [T, N_g] of every linear for x [T, K], and what the backward needs."""
    routed = _route(products(x, group), group, x.dtype)
    ys = [expand(routed.z[g], group, g) for g in range(len(group))]
    return add_frozen(ys, x, group), routed


def backward(
    grad_ys: list[Tensor], x: Tensor, group: Group, routed: Routed, needs: Needs
) -> Gradients:
    """Every gradient that ``needs`` asks for.

    With G = grad_y of one linear: dB = G^T z; dz = G Bcat; the softmax's backward is formed from dz
    and hidden, never from a [T, N] product per expert; dx starts as the adapters' part and the
    frozen products ``G W`` add to it.
    """
    grad_expand = [
        grad_of_expand(grad_y, group, g, routed) for g, grad_y in enumerate(grad_ys) if needs.expand
    ]
    if not (needs.products or needs.gates):
        return Gradients(None, [], grad_expand, [], [])
    grads, grad_gates = grads_of_products(grad_ys, group, routed)
    narrow = grads.to(x.dtype)
    grad_shrink, grad_x = [], None
    if needs.shrink:
        rows = grads_of_rows(narrow, x, group)
        grad_shrink = group.split_rows(rows.to(group.shrink_weights[0].dtype))
    if needs.x:
        grad_x = add_frozen_gradients(adapter_grad_x(narrow, x, group), grad_ys, group)
    return Gradients(
        grad_x,
        grad_shrink,
        grad_expand,
        grad_router_bias(grads, group, needs),
        _as_stored(grad_gates, group.gates) if needs.gates else [],
    )


def native_available() -> bool:
    """Whether floe's C++ operators are loaded (``import floe.ops`` loads them)."""
    return hasattr(torch.ops.floe, "moe_lora_experts")


def native_forward(x: Tensor, group: Group) -> tuple[list[Tensor], Routed]:
    """As :func:`forward`, the experts' part by floe's C++."""
    ys, *routed = torch.ops.floe.moe_lora_experts(
        x,
        _as_native_takes(group.shrink_weights, x),
        _as_native_takes(group.expand_weights, x),
        group.router_biases,
        group.biases,
        group.base_outputs,
        group.scaling,
        group.temperature,
        group.dropout_p,
        group.seed,
        group.gates,
        group.top_k,
    )
    return add_frozen(ys, x, group), Routed(*routed)


def native_backward(
    grad_ys: list[Tensor], x: Tensor, group: Group, routed: Routed, needs: Needs
) -> Gradients:
    """As :func:`backward`, the experts' part by floe's C++."""
    grad_x, grad_shrink, grad_expand, grads, grad_gates = torch.ops.floe.moe_lora_experts_backward(
        grad_ys,
        x,
        _as_native_takes(group.shrink_weights, x),
        _as_native_takes(group.expand_weights, x),
        routed.hidden,
        routed.gate,
        routed.z,
        group.scaling,
        group.temperature,
        group.dropout_p,
        group.seed,
        needs.x,
        needs.shrink,
        needs.expand,
        len(group.gates) > 0,
    )
    return Gradients(
        add_frozen_gradients(grad_x, grad_ys, group) if needs.x else None,
        _as_stored(grad_shrink, group.shrink_weights),
        _as_stored(grad_expand, group.expand_weights),
        grad_router_bias(grads, group, needs),
        _as_stored(grad_gates, group.gates) if needs.gates else [],
    )


def products(x: Tensor, group: Group) -> Tensor:
    """dropout(x) A^T, then x R^T, of all linears: [T, G (H + M)] in x's dtype."""
    rows, split = group.shrink_rows().to(x.dtype), group.hidden_rows
    if group.seed is None or group.dropout_p == 0.0:
        return torch.mm(x, rows.T)  # one read of x for A and the router
    hidden = torch.mm(keyed_dropout(x, group.dropout_p, group.seed), rows[:split].T)
    return torch.cat([hidden, torch.mm(x, rows[split:].T)], dim=1)


def _route(products: Tensor, group: Group, dtype: torch.dtype) -> Routed:
    wide = products.to(torch.promote_types(dtype, torch.float32))
    tokens, size = len(wide), len(group)
    hidden = wide[:, : group.hidden_rows].view(tokens, size, group.hidden_size).transpose(0, 1)
    gate = group.given_gates(wide.dtype)
    if gate is None:
        logits = wide[:, group.hidden_rows :].view(tokens, size, group.experts).transpose(0, 1)
        bias = group.router_bias()
        if bias is not None:
            logits = logits + bias.to(wide.dtype)[:, None, :]
        if group.temperature != 1.0:
            logits = logits / group.temperature
        gate = torch.softmax(reference.largest(logits, group.top_k), dim=-1).contiguous()
    z = ((gate * group.scaling)[..., None] * hidden.unflatten(2, (-1, group.rank))).flatten(2)
    return Routed(hidden.contiguous(), gate, z.to(dtype))


def expand(z: Tensor, group: Group, g: int) -> Tensor:
    """The experts' part of the output of linear g, on its bias or base output: [T, N], new."""
    flat = _flat(group.expand_weights[g]).to(z.dtype).T
    added = group.base_output(g) if group.base_outputs else group.bias(g)
    return torch.mm(z, flat) if added is None else torch.addmm(added, z, flat)


def add_frozen(ys: list[Tensor], x: Tensor, group: Group) -> list[Tensor]:
    """``ys``, ``x W^T`` added to each in place; nothing where base outputs hold it already."""
    for y, weight in zip(ys, group.weights, strict=False):
        y.addmm_(x, weight.T)
    return ys


def add_frozen_gradients(grad_x: Tensor, grad_ys: list[Tensor], group: Group) -> Tensor:
    """``grad_x``, ``grad_y W`` of every linear added to it in place."""
    for grad_y, weight in zip(grad_ys, group.weights, strict=False):
        grad_x.addmm_(grad_y, weight)
    return grad_x


def grads_of_products(
    grad_ys: list[Tensor], group: Group, routed: Routed
) -> tuple[Tensor, Sequence[Tensor]]:
    """Gradients of :func:`products`, in the dtype of ``hidden``; and those of given gates."""
    hidden, gates = zip(
        *(grads_of_routing(grad_y, group, g, routed) for g, grad_y in enumerate(grad_ys)),
        strict=True,
    )
    if group.gates:
        return torch.cat(hidden, dim=1), gates
    logits = [
        _grad_of_softmax(gate, grad, group) for gate, grad in zip(routed.gate, gates, strict=True)
    ]
    return torch.cat([*hidden, *logits], dim=1), []


def grads_of_routing(grad_y: Tensor, group: Group, g: int, routed: Routed) -> tuple[Tensor, Tensor]:
    """Of linear g: the gradients of hidden [T, H] and of the gates [T, M]."""
    gate, hidden = routed.gate[g], routed.hidden[g].unflatten(1, (-1, group.rank))
    grad_z = product_with_experts(grad_y, group, g).to(hidden.dtype).mul_(group.scaling)
    grad_z = grad_z.view(-1, group.experts, group.rank)
    grad_gate = (grad_z * hidden).sum(2)
    grad_hidden = gate[:, :, None] * grad_z  # [T, M, r]
    shared = group.hidden_size == group.rank
    return grad_hidden.sum(1) if shared else grad_hidden.flatten(1), grad_gate


def _grad_of_softmax(gate: Tensor, grad_gate: Tensor, group: Group) -> Tensor:
    """The logits' gradients [T, M], the temperature included."""
    grad_logits = gate * (grad_gate - (gate * grad_gate).sum(1, keepdim=True))
    return grad_logits if group.temperature == 1.0 else grad_logits / group.temperature


def product_with_experts(grad_y: Tensor, group: Group, g: int) -> Tensor:
    """``grad_y Bcat`` of linear g, [T, M r]."""
    return torch.mm(grad_y, _flat(group.expand_weights[g]).to(grad_y.dtype))


def grad_of_expand(grad_y: Tensor, group: Group, g: int, routed: Routed) -> Tensor:
    """``grad_y^T z`` of linear g as its ``expand_weight`` is stored."""
    stored = group.expand_weights[g]
    return torch.mm(grad_y.T, routed.z[g]).view(stored.shape).to(stored.dtype)


def grads_of_rows(grads: Tensor, x: Tensor, group: Group) -> Tensor:
    """Gradients of :meth:`Group.shrink_rows`, [G (H + M), K] in x's dtype, from the products'."""
    split = group.hidden_rows
    if group.seed is None or group.dropout_p == 0.0:
        return torch.mm(grads.T, x)
    dropped = keyed_dropout(x, group.dropout_p, group.seed)
    return torch.cat([torch.mm(grads[:, :split].T, dropped), torch.mm(grads[:, split:].T, x)])


def adapter_grad_x(grads: Tensor, x: Tensor, group: Group) -> Tensor:
    """What reaches x through the adapters, [T, K], from the gradients of the products."""
    rows, split = group.shrink_rows().to(x.dtype), group.hidden_rows
    if group.seed is None or group.dropout_p == 0.0:
        return torch.mm(grads, rows)
    kept = keyed_dropout(torch.mm(grads[:, :split], rows[:split]), group.dropout_p, group.seed)
    return kept.addmm_(grads[:, split:], rows[split:])


def grad_router_bias(grads: Tensor, group: Group, needs: Needs) -> list[Tensor]:
    """The logits' gradients summed over the tokens, one [M] per linear."""
    if not needs.router_bias:
        return []
    parts = grads[:, group.hidden_rows :].split(group.experts, dim=1)
    return [
        part.sum(0, dtype=torch.float64).to(bias.dtype)  # what cancels over the tokens is large
        for part, bias in zip(parts, group.router_biases, strict=True)
        if bias is not None
    ]


def _flat(expand_weight: Tensor) -> Tensor:
    """Bcat [N, M r]: all experts of a linear side by side."""
    return expand_weight.flatten(1)


def _as_native_takes(parameters: Sequence[Tensor], x: Tensor) -> Sequence[Tensor]:
    """The C++ operators take parameters in x's dtype and in that of its sums."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if parameters[0].dtype in (x.dtype, wide):
        return parameters
    return [parameter.to(wide) for parameter in parameters]


def _as_stored(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """In the parameters' dtypes; empty where they are not needed."""
    pairs = zip(gradients, parameters, strict=False)
    return [gradient.to(parameter.dtype) for gradient, parameter in pairs]
