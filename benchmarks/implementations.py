"""Ways to compute a frozen linear layer with an adapter, all on the same numbers.

Three formulas: ``frozen`` (no adapter), ``lora`` (one adapter) and ``routed`` (M experts, FLoE
Eq. 1). Every implementation is compared with its formula in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from floe_triton import reference
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import Candidate, Check
from floe import ops

SCALING = 2.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ROWS = 64  # rows of y and grad_x that are compared; the adapter's gradients are compared whole
Joined = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Adapter:
    """Size of an adapter, its dropout and dtype, and which projections of a block get one."""

    rank: int
    experts: int
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    targets: tuple[str, ...] = TARGETS


@dataclass(frozen=True)
class Problem:
    """x [T, K], weight [N, K], shrink [r + M, K], expand [N, M, r], grad [T, N] = gradient of y."""

    x: Tensor
    weight: Tensor
    shrink: Tensor
    expand: Tensor
    grad: Tensor
    dropout: float

    @classmethod
    def draw(
        cls, shape: Sequence[int], adapter: Adapter, dtype: torch.dtype, device: torch.device
    ) -> Problem:
        """Random numbers of the shape (K, N, T); the adapter's part of y is about as large as the
        frozen part."""
        columns, features, tokens = shape
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

        fan, rank, experts = columns**-0.5, adapter.rank, adapter.experts
        return cls(
            normal(tokens, columns),
            normal(features, columns, scale=fan),
            normal(rank + experts, columns, scale=fan, dtype=adapter.dtype),
            normal(features, experts, rank, scale=rank**-0.5, dtype=adapter.dtype),
            normal(tokens, features),
            adapter.dropout,
        )


@dataclass(frozen=True)
class Built:
    """An implementation of one problem: ``forward(x)`` and the parameters it trains.

    ``joined`` makes the formula's parameters of them, which for ``routed`` are shrink [r + M, K]
    and expand [N, M, r], for ``lora`` A [r, K] and B [N, r].
    """

    formula: str
    forward: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    joined: Joined = tuple


Builder = Callable[[Problem], Built]


def frozen(problem: Problem) -> Built:
    """The linear layer alone: the time nobody can save."""
    return Built("frozen", lambda x: functional.linear(x, problem.weight), ())


def floe(problem: Problem, backend: str = "auto") -> Built:
    """floe.moe_lora, with a seed drawn in every call as its module does."""
    weight, p = problem.weight, problem.dropout
    shrink, expand = leaf(problem.shrink), leaf(problem.expand)

    def forward(x: Tensor) -> Tensor:
        how = {"seed": ops.draw_seed(x.device) if p > 0.0 else None, "backend": backend}
        return ops.moe_lora(x, weight, None, shrink, expand, scaling=SCALING, dropout_p=p, **how)

    return Built("routed", forward, (shrink, expand))


def eager(problem: Problem) -> Built:
    """What a careful user writes: three products for all experts, one dropout mask, autograd."""
    parameters = leaf(problem.shrink), leaf(problem.expand)
    return Built("routed", _applied(eager_linear, problem, parameters), parameters)


def compiled(problem: Problem) -> Built:
    """`eager` through torch.compile; its compilation is not timed."""
    built = eager(problem)
    return replace(built, forward=torch.compile(built.forward))


def hydra(problem: Problem) -> Built:
    """HydraLoRA's published loop: dropout and A again for every expert, one product each."""
    parameters = tuple(leaf(part) for part in hydra_parts(problem.shrink, problem.expand))
    return Built("routed", _applied(hydra_linear, problem, parameters), parameters, hydra_joined)


def _applied(function: Any, problem: Problem, parameters: Sequence[Tensor]) -> Any:
    return lambda x: function(x, problem.weight, problem.dropout, *parameters)


def eager_linear(x: Tensor, weight: Tensor, p: float, shrink: Tensor, expand: Tensor) -> Tensor:
    """`eager`'s formula for x [T, K], weight [N, K], dropout p, shrink [r + M, K], expand."""
    rank = expand.shape[2]
    a, router = shrink[:rank].to(x.dtype), shrink[rank:].to(x.dtype)
    hidden = functional.linear(functional.dropout(x, p), a)
    gate = functional.linear(x, router).float().softmax(-1)
    z = ((gate * SCALING)[:, :, None] * hidden.float()[:, None, :]).flatten(1).to(x.dtype)
    return torch.addmm(functional.linear(x, weight), z, expand.flatten(1).to(x.dtype).T)


def hydra_linear(
    x: Tensor, weight: Tensor, p: float, a: Tensor, router: Tensor, *experts: Tensor
) -> Tensor:
    """`hydra`'s loop for x [T, K], weight [N, K], dropout p, a [r, K], router [M, K], M x [N, r].

    The router is rounded to x's dtype before and after its softmax, as published.
    """
    y = functional.linear(x, weight)
    logits = functional.linear(x, router.to(x.dtype))
    route = functional.softmax(logits, dim=-1, dtype=torch.float32).to(x.dtype)
    for i, b in enumerate(experts):
        hidden = functional.linear(functional.dropout(x, p), a.to(x.dtype))
        y = y + route[:, i, None] * functional.linear(hidden, b.to(x.dtype)) * SCALING
    return y


def hydra_parts(shrink: Tensor, expand: Tensor) -> tuple[Tensor, ...]:
    """A, router and M experts [N, r] of shrink [r + M, K] and expand [N, M, r]."""
    rank = expand.shape[2]
    return shrink[:rank], shrink[rank:], *expand.permute(1, 0, 2).contiguous()


def hydra_joined(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What `hydra_parts` took apart."""
    return torch.cat(list(parts[:2])), torch.stack(list(parts[2:]), dim=1)


def peft_lora(problem: Problem, rank: int) -> Built:
    """The peft package's LoRA of the given rank; `rank` = M r has the parameters of all experts."""
    from peft import LoraConfig, get_peft_model

    features, columns = problem.weight.shape
    base = nn.Sequential(nn.Linear(columns, features, bias=False, device="meta"))
    base[0].weight = nn.Parameter(problem.weight, requires_grad=False)
    alpha, p = SCALING * rank, problem.dropout
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=p, target_modules=["0"])
    keep_dtype = problem.shrink.dtype == problem.x.dtype
    model = get_peft_model(base, config, autocast_adapter_dtype=not keep_dtype)
    layer: Any = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        a.copy_(torch.randn(a.shape, generator=generator) * columns**-0.5)
        b.copy_(torch.randn(b.shape, generator=generator) * rank**-0.5)
    return Built("lora", layer.train(), (a, b))


def registry(problem: Problem, compile_too: bool = False) -> dict[str, Builder]:
    """Name -> builder, for the rank and number of experts of ``problem``."""
    builders: dict[str, Builder] = {"frozen": frozen, "floe": floe}
    _, experts, low = problem.expand.shape
    for rank in (low, low * experts):
        builders[f"peft r={rank}"] = partial(peft_lora, rank=rank)
    builders |= {"eager": eager, "hydra": hydra}
    if problem.x.is_cuda:
        builders |= {f"floe {b}": partial(floe, backend=b) for b in ("gemm", "fused", "eager")}
    return {**builders, "compiled": compiled} if compile_too else builders


def candidates(problem: Problem, builders: dict[str, Builder], backward: bool) -> list[Candidate]:
    """The implementations to time, forward or forward and backward.

    Each draws dropout masks of its own, so what is checked is one built the same way without.
    """
    truths = _Truths(replace(problem, dropout=0.0))
    return [
        Candidate(name, _step(build(problem), problem, backward), partial(truths.checks, build))
        for name, build in builders.items()
    ]


def _step(built: Built, problem: Problem, backward: bool) -> Callable[[], object]:
    """One call as in training: x needs a gradient, as anywhere but in the first adapted layer."""
    x = leaf(problem.x)
    if not backward:
        return lambda: built.forward(x)
    leaves = (x, *built.parameters)
    return lambda: torch.autograd.grad(built.forward(x), leaves, problem.grad)


class _Truths:
    """Each formula's outputs for one problem, in float64 and in its dtype; computed once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        tokens = problem.x.shape[0]
        self.rows = torch.linspace(0, max(tokens - 1, 0), min(_ROWS, tokens)).long()
        self.known: dict[object, tuple[tuple[Tensor, ...], ...]] = {}

    def checks(self, build: Builder) -> list[Check]:
        """The outputs of an implementation beside those of its formula."""
        built, problem = build(self.problem), self.problem
        x = leaf(problem.x)
        y = built.forward(x)
        grad_x, *grads = torch.autograd.grad(y, (x, *built.parameters), problem.grad)
        joined = built.joined([p.detach() for p in built.parameters])
        actual = (y[self.rows], grad_x[self.rows], *built.joined(grads))
        key = (built.formula, *(p.shape for p in joined))
        if key not in self.known:
            dtypes = (torch.float64, None)
            self.known[key] = tuple(self._outputs(built.formula, joined, d) for d in dtypes)
        names = ("y", "grad_x", *(f"gradient {i}" for i in range(len(grads))))
        outputs = zip(names, actual, *self.known[key], strict=False)
        return [Check(*output) for output in outputs]

    def _outputs(
        self, formula: str, parameters: tuple[Tensor, ...], dtype: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        problem, rows = self.problem, self.rows
        x = leaf(problem.x if dtype is None else problem.x.to(dtype))
        weight, grad = problem.weight.to(x.dtype), problem.grad.to(x.dtype)
        leaves = [leaf(p if dtype is None else p.to(dtype)) for p in parameters]
        y, grad_x = x.detach()[rows] @ weight.T, grad[rows] @ weight
        if formula == "frozen":
            return y, grad_x
        delta = DELTAS[formula](x, *leaves)
        delta_x, *grads = torch.autograd.grad(delta, (x, *leaves), grad)
        return y + delta.detach()[rows], grad_x + delta_x[rows], *grads


def _lora_delta(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x @ a.to(x.dtype).T @ b.to(x.dtype).T * SCALING


DELTAS: dict[str, Callable[..., Tensor]] = {
    "lora": _lora_delta,
    "routed": partial(reference.moe_lora_delta, scaling=SCALING),
}


def leaf(value: Tensor) -> Tensor:
    """A copy whose gradient is wanted."""
    return value.detach().clone().requires_grad_()
