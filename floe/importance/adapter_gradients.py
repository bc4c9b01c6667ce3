"""Per-sample gradients of a routed adapter, from its input and the gradient of its output alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from floe import ops
from floe.adapters.linear import MoELoRALinear

_CHUNK_ELEMENTS = 1 << 25  # float32 values alive at once: 128 MiB


def active_adapters(module: MoELoRALinear) -> list[str]:
    """Names of the adapters that take part in the module's forward."""
    if module.disable_adapters:
        return []
    names: Any = module.active_adapters
    return [name for name in names if name in module.floe_shrink]


def adapter_output(module: MoELoRALinear, x: Tensor) -> Tensor:
    """What the active adapters add to the base output, [..., K] -> [..., N], without dropout.

    x should be float32 or float64; everything runs in its dtype.
    """
    linear: Any = module.base_layer
    total: Tensor = x.new_zeros((*x.shape[:-1], linear.out_features))
    for name in active_adapters(module):
        _, _, routed = _forward(module, name, x)
        total += routed @ _expand(module, name, x.dtype).T
    return total


@dataclass(frozen=True)
class AdapterGradients:
    """Of one module's active adapters, for each of S samples; both float64 [S], on x's device.

    ``squared_norm``: ``|| d L / d phi ||^2`` over A, router and experts. ``gate``: ``d L / d g`` of
    a factor g = 1 on what the adapters add to the output.
    """

    squared_norm: Tensor
    gate: Tensor


def adapter_gradients(
    module: MoELoRALinear, x: Tensor, grad_y: Tensor, mask: Tensor
) -> AdapterGradients:
    """Each sample's gradients of the active adapters, from what a backward pass holds already.

    Those of :class:`MoELoRALinear` without dropout, by batched products: ``dB = G^T z``,
    ``d[A; R] = [dU, dZ]^T x`` and ``dg = sum z . (G B)``. No parameter needs autograd. Samples are
    taken a few at a time to bound memory.

    Args:
        x: input of the module, [S, T, K]. grad_y: gradient of its output, [S, T, N]; any float
            dtype.
        mask: True at tokens that count, bool [S, T].

    Products of bfloat16 values are bfloat16, as in the adapter itself, of any other at least
    float32; what lies between them is float32, and sums over products are float64.
    """
    samples, tokens, _ = x.shape
    dtype = x.dtype if x.dtype == torch.bfloat16 else wide(x)
    squared, gate = torch.zeros(2, samples, dtype=torch.float64, device=x.device)
    for name in active_adapters(module):
        features, experts, rank = module.weights(name)[1].shape
        inner = rank * experts
        rows_of_x = module.weights(name)[0].shape[0]
        size = tokens * (x.shape[2] + features) + features * inner + rows_of_x * x.shape[2]
        step = max(1, _CHUNK_ELEMENTS // size)
        for start in range(0, samples, step):
            rows = slice(start, start + step)
            padding = (~mask[rows]).nonzero(as_tuple=True)
            values, grads = (v[rows].to(dtype, copy=True) for v in (x, grad_y))
            for v in (values, grads):
                v[padding] = 0  # set, not multiplied: padding may hold NaN
            part = _gradients_of_one(module, name, values, grads)
            squared[rows] += part.squared_norm
            gate[rows] += part.gate
    return AdapterGradients(squared, gate)


def _gradients_of_one(
    module: MoELoRALinear, name: str, x: Tensor, grad_y: Tensor
) -> AdapterGradients:
    hidden, gate, routed = _forward(module, name, x)
    settings, experts, rank = module.settings[name], gate.shape[-1], hidden.shape[-1]
    grad_expand = routed.to(x.dtype).mT @ grad_y  # [s, M r, N]: faster than its transpose
    grad_routed = (grad_y @ _expand(module, name, x.dtype)).to(routed.dtype)
    grad_switch = (routed * grad_routed).double().sum((1, 2))
    grad_routed = (settings.scaling * grad_routed).unflatten(-1, (experts, rank))
    grad_hidden = gate[..., None] * grad_routed
    grad_hidden = grad_hidden.sum(-2) if hidden.shape[-2] == 1 else grad_hidden.flatten(-2)
    grad_gate = (grad_routed * hidden).sum(-1)
    grad_logits = gate * (grad_gate - (gate * grad_gate).sum(-1, keepdim=True))
    grad_logits = grad_logits / settings.temperature
    grad_rows = torch.cat([grad_hidden, grad_logits], dim=-1).to(x.dtype)
    grad_shrink = grad_rows.mT @ x  # [s, r + M, K]
    squared = sum_of_squares(grad_expand) + sum_of_squares(grad_shrink)
    return AdapterGradients(squared, grad_switch)


def sum_of_squares(values: Tensor) -> Tensor:
    """Sum over all but the first dimension of the squares of [S, a, b], float64 [S].

    Along the last dimension in float32 at least, then in float64.
    """
    values = values.to(wide(values))
    along: Tensor = torch.linalg.vecdot(values, values)
    return along.double().sum(1)


def wide(values: Tensor) -> torch.dtype:
    """The dtype of sums over these values: float32 at least."""
    return torch.promote_types(values.dtype, torch.float32)


def _forward(module: MoELoRALinear, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [..., 1 or M, r], gate [..., M], scaled routed hidden [..., M r]; float32 at least."""
    settings = module.settings[name]
    products = (x @ module.weights(name)[0].detach().to(x.dtype).T).to(wide(x))
    hidden, logits = products.tensor_split([settings.hidden_size], dim=-1)
    hidden = hidden.unflatten(-1, (-1, settings.rank))
    gate = torch.softmax(ops.largest(logits / settings.temperature, settings.top_k), dim=-1)
    return hidden, gate, (settings.scaling * gate[..., None] * hidden).flatten(-2)


def _expand(module: MoELoRALinear, name: str, dtype: torch.dtype) -> Tensor:
    return module.weights(name)[1].detach().flatten(1).to(dtype)  # [N, M r]
