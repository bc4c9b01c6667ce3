"""The product form: all M experts as one rank-(M r) product, to which the frozen product adds.

``z[t, i * r + j] = scaling * gate_i(t) * hidden_j(t)`` turns the sum over experts into
``z Bcat^T`` with ``Bcat [N, M r]`` (a free view of ``expand_weight``). Writing
``y = z Bcat^T + b`` first and letting ``y += x W^T`` accumulate on top costs no pass over y of its
own and rounds once where "linear, then add" rounds twice. This is the path of every device without
a fused kernel, and the yardstick of those with one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from floe_triton.dropout import keyed_dropout
from floe_triton.group import Gradients, Group, Needs, Routed


def forward(x: Tensor, group: Group) -> tuple[list[Tensor], Routed]:
    """The outputs [T, N_g] of every linear for x [T, K], and what the backward needs."""
    routed = _route(products(x, group), group, x.dtype)
    ys = []
    for g, expand_weight in enumerate(group.expand_weights):
        expand = flat(expand_weight).to(x.dtype)
        if group.base_outputs:
            ys.append(torch.addmm(group.base_outputs[g], routed.z[g], expand.T))
            continue
        bias = group.biases[g]
        start = (routed.z[g], expand.T)
        y = torch.mm(*start) if bias is None else torch.addmm(bias, *start)
        ys.append(y.addmm_(x, group.weights[g].T))
    return ys, routed


def backward(
    grad_ys: list[Tensor], x: Tensor, group: Group, routed: Routed, needs: Needs
) -> Gradients:
    """Every gradient that ``needs`` asks for.

    With G = grad_y of one linear: dB = G^T z; dz = G Bcat; the softmax's backward is formed from dz
    and hidden, never from a [T, N] product per expert; dx starts as the adapters' part and the
    frozen products ``G W`` add to it.
    """
    grad_expand = [
        torch.mm(grad_y.T, routed.z[g]).view(expand.shape).to(expand.dtype)
        for g, (grad_y, expand) in enumerate(zip(grad_ys, group.expand_weights, strict=True))
        if needs.expand
    ]
    if not (needs.x or needs.shrink or needs.router_bias):
        return Gradients(None, [], grad_expand, [])
    grads = _row_gradients(grad_ys, group, routed)
    narrow = grads.to(x.dtype)
    grad_shrink, grad_x = [], None
    if needs.shrink:
        rows = grad_rows(narrow, x, group)
        grad_shrink = group.split_rows(rows.to(group.shrink_weights[0].dtype))
    if needs.x:
        grad_x = adapter_grad_x(narrow, x, group)
        for grad_y, weight in zip(grad_ys, group.weights, strict=False):
            grad_x.addmm_(grad_y, weight)
    return Gradients(grad_x, grad_shrink, grad_expand, grad_router_bias(grads, group, needs))


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


def shrink_gradients(
    grad_y: Tensor,
    expand_weight: Tensor,
    hidden: Tensor,
    gate: Tensor,
    scaling: float,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden [T, r] and of the router's logits [T, M], in the dtype of ``hidden``."""
    _, experts, rank = expand_weight.shape
    expand = flat(expand_weight).to(grad_y.dtype)
    grad_z = torch.mm(grad_y, expand).to(hidden.dtype).mul_(scaling).view(-1, experts, rank)
    grad_hidden = (gate[:, :, None] * grad_z).sum(1)
    grad_gate = (grad_z * hidden[:, None, :]).sum(2)
    grad_logits = gate * (grad_gate - (gate * grad_gate).sum(1, keepdim=True))
    return grad_hidden, grad_logits if temperature == 1.0 else grad_logits / temperature


def products(x: Tensor, group: Group) -> Tensor:
    """dropout(x) A^T, then x R^T, of all linears: [T, G (r + M)] in x's dtype."""
    rows, split = group.rows().to(x.dtype), group.hidden_rows
    if group.seed is None or group.dropout_p == 0.0:
        return torch.mm(x, rows.T)  # one read of x for A and the router
    hidden = torch.mm(keyed_dropout(x, group.dropout_p, group.seed), rows[:split].T)
    return torch.cat([hidden, torch.mm(x, rows[split:].T)], dim=1)


def _route(found: Tensor, group: Group, dtype: torch.dtype) -> Routed:
    wide = found.to(torch.promote_types(dtype, torch.float32))
    tokens, size = len(wide), len(group)
    hidden = wide[:, : group.hidden_rows].view(tokens, size, group.rank).transpose(0, 1)
    logits = wide[:, group.hidden_rows :].view(tokens, size, group.experts).transpose(0, 1)
    bias = group.router_bias()
    if bias is not None:
        logits = logits + bias.to(wide.dtype)[:, None, :]
    if group.temperature != 1.0:
        logits = logits / group.temperature
    gate = torch.softmax(logits, dim=-1).contiguous()
    z = ((gate * group.scaling)[..., None] * hidden[:, :, None, :]).flatten(2)
    return Routed(hidden.contiguous(), gate, z.to(dtype))


def _row_gradients(grad_ys: list[Tensor], group: Group, routed: Routed) -> Tensor:
    """Gradients of :func:`products`, in the dtype of ``hidden``."""
    parts = [
        shrink_gradients(
            grad_y, expand, routed.hidden[g], routed.gate[g], group.scaling, group.temperature
        )
        for g, (grad_y, expand) in enumerate(zip(grad_ys, group.expand_weights, strict=True))
    ]
    return torch.cat([hidden for hidden, _ in parts] + [logits for _, logits in parts], dim=1)


def grad_rows(grads: Tensor, x: Tensor, group: Group) -> Tensor:
    """Gradients of :meth:`Group.rows`, [G (r + M), K] in x's dtype, from those of the products."""
    split = group.hidden_rows
    if group.seed is None or group.dropout_p == 0.0:
        return torch.mm(grads.T, x)
    dropped = keyed_dropout(x, group.dropout_p, group.seed)
    return torch.cat([torch.mm(grads[:, :split].T, dropped), torch.mm(grads[:, split:].T, x)])


def adapter_grad_x(grads: Tensor, x: Tensor, group: Group) -> Tensor:
    """What reaches x through the adapters, [T, K], from the gradients of the products."""
    rows, split = group.rows().to(x.dtype), group.hidden_rows
    if group.seed is None or group.dropout_p == 0.0:
        return torch.mm(grads, rows)
    kept = keyed_dropout(torch.mm(grads[:, :split], rows[:split]), group.dropout_p, group.seed)
    return kept.addmm_(grads[:, split:], rows[split:])


def flat(expand_weight: Tensor) -> Tensor:
    """Bcat [N, M r]: all experts of a linear side by side."""
    return expand_weight.flatten(1)
