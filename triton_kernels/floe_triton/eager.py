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


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_output: Tensor | None,
    shrink_weight: Tensor,
    expand_weight: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One of ``weight`` [N, K] and ``base_output`` [T, N] is given; x is [T, K].

    Returns y [T, N] in x's dtype and what the backward needs: hidden [T, r] and gate [T, M]
    (float32, or float64 for float64 input) and z [T, M r] in x's dtype.
    """
    rank = expand_weight.shape[2]
    wide = torch.promote_types(x.dtype, torch.float32)
    shrink, expand = shrink_weight.to(x.dtype), _flat(expand_weight).to(x.dtype)
    if dropout_p > 0.0 and seed is not None:
        hidden = torch.mm(keyed_dropout(x, dropout_p, seed), shrink[:rank].T).to(wide)
        logits = torch.mm(x, shrink[rank:].T).to(wide)
    else:
        products = torch.mm(x, shrink.T).to(wide)  # one read of x for A and the router
        hidden, logits = products[:, :rank].contiguous(), products[:, rank:]
    gate = torch.softmax(logits, dim=-1)
    z = _routed(gate, hidden, scaling).to(x.dtype)
    if base_output is not None:
        y = torch.addmm(base_output, z, expand.T)
    else:
        assert weight is not None
        y = torch.mm(z, expand.T) if bias is None else torch.addmm(bias, z, expand.T)
        y.addmm_(x, weight.T)
    return y, hidden, gate, z


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    shrink_weight: Tensor,
    expand_weight: Tensor,
    hidden: Tensor,
    gate: Tensor,
    z: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_shrink: bool,
    needs_expand: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shrink_weight and expand_weight; one not needed comes back empty, [0].

    With G = grad_y: dB = G^T z; dz = G Bcat; the softmax's backward is formed from dz and hidden,
    never from a [T, N] product per expert; dx starts as the adapter's part and the frozen product
    ``G W`` adds to it.
    """
    rank, dtype = expand_weight.shape[2], x.dtype
    # three tensors, not one three times: an op's outputs may not share memory
    grad_x, grad_shrink, grad_expand = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if needs_expand:
        grad_expand = torch.mm(grad_y.T, z).view(expand_weight.shape).to(expand_weight.dtype)
    if not (needs_x or needs_shrink):
        return grad_x, grad_shrink, grad_expand
    grad_hidden, grad_logits = shrink_gradients(grad_y, expand_weight, hidden, gate, scaling)
    shrink = shrink_weight.to(dtype)
    grads = torch.cat([grad_hidden, grad_logits], dim=1).to(dtype)  # [T, r + M]
    dropping = dropout_p > 0.0 and seed is not None
    if needs_shrink and not dropping:
        grad_shrink = torch.mm(grads.T, x)
    elif needs_shrink and seed is not None:
        dropped = keyed_dropout(x, dropout_p, seed)
        grad_shrink = torch.cat(
            [torch.mm(grads[:, :rank].T, dropped), torch.mm(grads[:, rank:].T, x)]
        )
    if needs_x:
        if dropping and seed is not None:
            grad_x = keyed_dropout(torch.mm(grads[:, :rank], shrink[:rank]), dropout_p, seed)
            grad_x.addmm_(grads[:, rank:], shrink[rank:])
        else:
            grad_x = torch.mm(grads, shrink)
        if weight is not None:
            grad_x.addmm_(grad_y, weight)
    return grad_x, grad_shrink.to(shrink_weight.dtype) if needs_shrink else grad_shrink, grad_expand


def shrink_gradients(
    grad_y: Tensor, expand_weight: Tensor, hidden: Tensor, gate: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden [T, r] and of the router's logits [T, M], in the dtype of ``hidden``."""
    _, experts, rank = expand_weight.shape
    expand = _flat(expand_weight).to(grad_y.dtype)
    grad_z = torch.mm(grad_y, expand).to(hidden.dtype).mul_(scaling).view(-1, experts, rank)
    grad_hidden = (gate[:, :, None] * grad_z).sum(1)
    grad_gate = (grad_z * hidden[:, None, :]).sum(2)
    grad_logits = gate * (grad_gate - (gate * grad_gate).sum(1, keepdim=True))
    return grad_hidden, grad_logits


def _routed(gate: Tensor, hidden: Tensor, scaling: float) -> Tensor:
    return ((gate * scaling)[:, :, None] * hidden[:, None, :]).flatten(1)


def _flat(expand_weight: Tensor) -> Tensor:
    return expand_weight.reshape(expand_weight.shape[0], -1)
