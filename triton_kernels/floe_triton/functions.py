"""The MoE-LoRA linear and its variants, differentiable: what users call.

Each checks its arguments, packs them into one `Group`, and runs that. Autograd is one
``autograd.Function`` around whoever computes the group (:mod:`floe_triton.dispatch`): cheaper per
call than an autograd registration, and ``torch.compile`` traces through it. Without gradients to
come there is no Function.

Derivatives of the gradients themselves, forward-mode derivatives and what else torch.func does are
those of the plain-torch definition, which then runs in place of the ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from floe_triton import dispatch, reference
from floe_triton.checks import autocasts, check_call, transformed
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
    gates: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    dropout_mode: str = "shared",
    backend: str = "auto",
) -> Tensor:
    """Frozen linear plus routed low-rank experts.

    Differentiable in x, shrink_weight, expand_weight, router_bias and gates. Equals
    :func:`floe_triton.reference.moe_lora`:
    ``y = x W^T + b + scaling * sum_i softmax(x R^T)_i * (dropout(x) A^T) B_i^T`` (FLoE Eq. 1).

    Args:
        x: [..., K], floating point, any strides.
        weight: [N, K], frozen, x's dtype and device.
        bias: [N] or None.
        shrink_weight: [r + M, K], rows of A then of the router, any float dtype (computed in x's);
            or [M r + M, K], an A for each expert, one below the other, then the router.
        expand_weight: [N, M, r], likewise.
        scaling: alpha / r, applied before the only rounding.
        dropout_p: in [0, 1), in steps of 1/256; the router sees x undropped.
        seed: 0-dim int64 tensor on x's device, needed when dropout_p > 0.
        router_bias: [M], added to the router's logits, or None.
        gates: [..., M], any float dtype: what the experts are weighted with instead of a softmax.
            shrink_weight is without the router's rows then, and router_bias, temperature and top_k
            are not given. [..., M r], a weight for each rank of each expert, if each has its own A.
        temperature: at least 1e-6; the logits are divided by it.
        top_k: a token uses the experts of its top_k largest logits, equal ones by the lower index,
            and the softmax is over these. 0 is all.
        dropout_mode: "shared": one mask for all experts. "per_expert": a mask each, as in
            HydraLoRA's code; computed by the plain-torch definition.
        backend: "auto", or one of those that :mod:`floe_triton.dispatch` lists.

    Returns:
        [..., N] in x's dtype. Under autocast, x, weight and bias are cast to autocast's dtype
        first.

    Raises:
        ValueError, TypeError: naming the argument, the rule and what came.
    """
    adapter = [shrink_weight], [expand_weight], [router_bias]
    group = Group([weight], [bias], [], *adapter, scaling, temperature, dropout_p, seed, backend)
    group.gates, group.top_k = [] if gates is None else [gates], top_k
    return _run(x, group, False, dropout_mode)[0]


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
    gates: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    dropout_mode: str = "shared",
    backend: str = "auto",
) -> Tensor:
    """:func:`moe_lora` on top of a given base output [..., N].

    For quantised or otherwise wrapped base layers. One pass over base_output, which is not changed.
    """
    adapter = [shrink_weight], [expand_weight], [router_bias]
    group = Group([], [], [base_output], *adapter, scaling, temperature, dropout_p, seed, backend)
    group.gates, group.top_k = [] if gates is None else [gates], top_k
    return _run(x, group, True, dropout_mode)[0]


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
    gates: Sequence[Tensor] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    dropout_mode: str = "shared",
    backend: str = "auto",
) -> list[Tensor]:
    """:func:`moe_lora` of several linears that read one x (gate/up, q/k/v), which is read once.

    Lists have one entry per linear; all share rank, number of experts and settings, and one
    dropout mask. Returns one [..., N_g] per linear.
    """
    adapters = shrink_weights, expand_weights, _or_none(router_biases, expand_weights)
    group = Group(weights, biases, [], *adapters, scaling, temperature, dropout_p, seed, backend)
    group.gates, group.top_k = [] if gates is None else gates, top_k
    return _run(x, group, False, dropout_mode)


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
    gates: Sequence[Tensor] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    dropout_mode: str = "shared",
    backend: str = "auto",
) -> list[Tensor]:
    """:func:`moe_lora_group` on top of given base outputs [..., N_g]."""
    adapters = shrink_weights, expand_weights, _or_none(router_biases, expand_weights)
    group = Group([], [], base_outputs, *adapters, scaling, temperature, dropout_p, seed, backend)
    group.gates, group.top_k = [] if gates is None else gates, top_k
    return _run(x, group, True, dropout_mode)


def _or_none(
    router_biases: Sequence[Tensor | None] | None, expand_weights: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    if router_biases is not None:
        return router_biases
    return [None] * len(expand_weights) if isinstance(expand_weights, (list, tuple)) else []


def _run(x: Tensor, group: Group, on_base: bool, dropout_mode: str) -> list[Tensor]:
    """Check everything, and compute [..., N_g] of every linear.

    ``on_base``: the caller gave base outputs, not weights and biases.
    """
    _split_ranks(group)
    check_call(x, group, on_base, dropout_mode)
    group.scaling, group.temperature = float(group.scaling), float(group.temperature)
    group.dropout_p = float(group.dropout_p)
    if group.dropout_p == 0.0:
        group.seed = None
    if autocasts(x) and x.dtype != torch.float64:  # torch's own leaves float64 as it is, too
        x = _cast(x, group)
    if dropout_mode == "per_expert" or transformed():
        return _define(x, group, dropout_mode)
    rows = _rows(x)
    group.base_outputs = [_rows(base) for base in group.base_outputs]
    if group.gates:
        group.gates = [_rows(gates) for gates in group.gates]
    tensors = group.tensors()
    if torch.is_grad_enabled() and _requires_grad(x, *tensors):
        ys = _MoELoRA.apply(group, rows, group.seed, *tensors)
    else:  # a Function would cost as much as a small layer's product
        ys, _ = dispatch.implementation(rows, group).forward(rows, group)
    return list(ys) if rows is x else [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def _split_ranks(group: Group) -> None:
    """Where gates [..., M r] weight single ranks, make each rank of each expert an expert."""
    lists = group.gates, group.expand_weights
    if group.gates == [] or not all(isinstance(tensors, (list, tuple)) for tensors in lists):
        return
    if not all(isinstance(t, Tensor) and not t.is_nested for t in chain(*lists)):
        return
    ranks = {expand.shape[1:].numel() for expand in group.expand_weights}
    if all(gates.dim() and gates.shape[-1] in ranks for gates in group.gates):
        group.expand_weights = [expand.flatten(1)[..., None] for expand in group.expand_weights]


class _Settings(NamedTuple):
    """What a backward needs of its group, beside the tensors."""

    linears: int
    on_base: bool  # base outputs were given, not weights and biases
    gated: bool  # gates were given, not routers
    top_k: int
    scaling: float
    temperature: float
    dropout_p: float
    backend: str

    @property
    def kinds(self) -> int:
        """How many tensors a linear's adapter has: its gates are one if given."""
        return 3 + self.gated


class _MoELoRA(torch.autograd.Function):
    """``apply(group, x, group.seed, *group.tensors())``."""

    @staticmethod
    def forward(
        ctx: Any, group: Group, x: Tensor, seed: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ys, routed = dispatch.implementation(x, group).forward(x, group)
        ctx.settings = _Settings(
            len(group),
            len(group.base_outputs) > 0,
            len(group.gates) > 0,
            group.top_k,
            group.scaling,
            group.temperature,
            group.dropout_p,
            group.backend,
        )
        # base outputs and biases are not needed again, and would be kept alive
        kept = (*group.weights, *tensors[-ctx.settings.kinds * len(group) :])
        ctx.save_for_backward(x, seed, routed.hidden, routed.gate, routed.z, *kept)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grad_ys: Tensor) -> tuple[Tensor | None, ...]:
        x, seed, hidden, gate, z, *kept = ctx.saved_tensors
        settings = ctx.settings
        group, linears, kinds = _unpacked(settings, seed, kept), settings.linears, settings.kinds
        needs_x, needed = ctx.needs_input_grad[1], ctx.needs_input_grad[3:]
        base, adapters = needed[: -kinds * linears], needed[-kinds * linears :]
        on_base = grad_ys if settings.on_base else [None] * len(base)
        of_base = [grad if need else None for grad, need in zip(on_base, base, strict=True)]
        if torch.is_grad_enabled() or transformed() or _batched(grad_ys):
            grad_x, *of_adapters = _backward_defined(grad_ys, x, group, (needs_x, *adapters))
            return (None, grad_x, None, *of_base, *of_adapters)
        by_kind = [adapters[i * linears : (i + 1) * linears] for i in range(kinds)]
        needs = Needs(needs_x, *map(any, by_kind), *[False] * (4 - kinds))
        run = dispatch.implementation(x, group, *grad_ys)
        grads = run.backward(list(grad_ys), x, group, Routed(hidden, gate, z), needs)
        grads_by_kind = grads.shrink, grads.expand, grads.router_bias, grads.gates
        of_adapters = [
            of_kind[g] if need else None
            for of_kind, needs in zip(grads_by_kind, by_kind, strict=False)
            for g, need in enumerate(needs)
        ]
        return (None, grads.x, None, *of_base, *of_adapters)


def _unpacked(settings: _Settings, seed: Tensor | None, kept: Sequence[Any]) -> Group:
    """The group of a backward, without biases and base outputs."""
    linears, kinds = settings.linears, settings.kinds
    ends = [len(kept) - i * linears for i in range(kinds, -1, -1)]
    weights, shrinks, expands, routers, *gates = (
        kept[first:end] for first, end in pairwise([0, *ends])
    )
    of_op = settings.scaling, settings.temperature, settings.dropout_p, seed, settings.backend
    given = gates[0] if gates else []
    return Group(weights, [], [], shrinks, expands, routers, *of_op, given, settings.top_k)


def _batched(grads: Sequence[Tensor]) -> bool:
    """Whether autograd.grad batches its gradients, by a vmap that torch.func does not show."""
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    return not torch.compiler.is_compiling() and any(map(is_batched, grads))


def _backward_defined(
    grad_ys: Sequence[Tensor], x: Tensor, group: Group, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x and the adapters by torch's own operators, for what differentiates them.

    ``needed`` has one entry for x and each of the adapters' tensors.
    """
    with torch.enable_grad():
        # as copies: one argument may be a function of another, whose gradient is not meant
        x = x.view_as(x)
        for name in ("weights", "shrink_weights", "expand_weights", "router_biases", "gates"):
            tensors = getattr(group, name)
            setattr(group, name, [t if t is None else t.view_as(t) for t in tensors])
        ys = _define(x, group)
    adapters = group.shrink_weights, group.expand_weights, group.router_biases, group.gates
    inputs = [x, *chain(*adapters)]
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
            x,
            shrink,
            expand,
            scaling=group.scaling,
            dropout_p=group.dropout_p,
            seed=group.seed,
            router_bias=bias,
            gates=gates,
            temperature=group.temperature,
            top_k=group.top_k,
            dropout_mode=dropout_mode,
        )
        for shrink, expand, bias, gates in zip(
            group.shrink_weights,
            group.expand_weights,
            group.router_biases,
            group.gates or repeat(None, len(group)),
            strict=True,
        )
    ]
    biases = group.biases or [None] * len(group.weights)
    frozen = zip(group.weights, biases, strict=True)
    bases = group.base_outputs or [linear(x, weight, bias) for weight, bias in frozen]
    return [base + y for base, y in zip(bases, ys, strict=True)] if bases else ys


def _rows(tensor: Tensor) -> Tensor:
    """[..., K] as [T, K], also where K is 0."""
    if tensor.dim() == 2:
        return tensor
    return tensor.flatten(0, -2) if tensor.dim() > 2 else tensor[None]


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _cast(x: Tensor, group: Group) -> Tensor:
    """``x``, and the group's frozen part, in autocast's dtype."""
    dtype = torch.get_autocast_dtype(x.device.type)
    for name in ("weights", "biases", "base_outputs"):
        tensors = getattr(group, name)
        setattr(group, name, [t if t is None else t.to(dtype) for t in tensors])
    return x.to(dtype)
