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
_ROWS = 64  # rows of y and grad_x that are compared; the adapter's gradients are compared whole


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
        cls,
        tokens: int,
        columns: int,
        features: int,
        rank: int,
        experts: int,
        dropout: float,
        dtype: torch.dtype,
        adapter_dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
    ) -> Problem:
        """Random numbers; the adapter's part of y is about as large as the frozen part."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int, scale: float, dtype: torch.dtype) -> Tensor:
            return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

        fan = columns**-0.5
        return cls(
            normal(tokens, columns, scale=1.0, dtype=dtype),
            normal(features, columns, scale=fan, dtype=dtype),
            normal(rank + experts, columns, scale=fan, dtype=adapter_dtype),
            normal(features, experts, rank, scale=rank**-0.5, dtype=adapter_dtype),
            normal(tokens, features, scale=1.0, dtype=dtype),
            dropout,
        )

    @property
    def rank(self) -> int:
        """R, columns of each expert."""
        return self.expand.shape[2]

    @property
    def experts(self) -> int:
        """M."""
        return self.expand.shape[1]


@dataclass(frozen=True)
class Built:
    """An implementation of one problem: ``forward(x)`` and the parameters it trains."""

    formula: str
    forward: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    joined: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] = tuple  # to the formula's parameters


def frozen(problem: Problem) -> Built:
    """The linear layer alone: the time nobody can save."""
    return Built("frozen", lambda x: functional.linear(x, problem.weight), ())


def floe(problem: Problem, backend: str = "auto") -> Built:
    """floe.moe_lora, with a seed drawn in every call as its module does."""
    shrink, expand = _leaf(problem.shrink), _leaf(problem.expand)
    p = problem.dropout

    def forward(x: Tensor) -> Tensor:
        seed = ops.draw_seed(x.device) if p > 0.0 else None
        return ops.moe_lora(
            x, problem.weight, None, shrink, expand, scaling=SCALING, dropout_p=p, seed=seed,
            backend=backend,
        )  # fmt: skip

    return Built("routed", forward, (shrink, expand))


def eager(problem: Problem) -> Built:
    """What a careful user writes: three products for all experts, one dropout mask, autograd."""
    shrink, expand = _leaf(problem.shrink), _leaf(problem.expand)

    def forward(x: Tensor) -> Tensor:
        return eager_linear(x, problem.weight, problem.dropout, shrink, expand)

    return Built("routed", forward, (shrink, expand))


def compiled(problem: Problem) -> Built:
    """`eager` through torch.compile; its compilation is not timed."""
    built = eager(problem)
    return replace(built, forward=torch.compile(built.forward))


def hydra(problem: Problem) -> Built:
    """HydraLoRA's published loop: dropout and A again for every expert, one product each."""
    rank = problem.rank
    a, router = _leaf(problem.shrink[:rank]), _leaf(problem.shrink[rank:])
    experts = [_leaf(problem.expand[:, i]) for i in range(problem.experts)]

    def forward(x: Tensor) -> Tensor:
        return hydra_linear(x, problem.weight, problem.dropout, a, router, *experts)

    return Built("routed", forward, (a, router, *experts), hydra_joined)


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


def hydra_joined(found: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A, router and M experts as shrink [r + M, K] and expand [N, M, r]."""
    return torch.cat(list(found[:2])), torch.stack(list(found[2:]), dim=1)


def peft_lora(problem: Problem, rank: int) -> Built:
    """The peft package's LoRA of the given rank; `rank` = M r has the parameters of all experts."""
    from peft import LoraConfig, get_peft_model

    features, columns = problem.weight.shape
    base = nn.Sequential(nn.Linear(columns, features, bias=False, device="meta"))
    base[0].weight = nn.Parameter(problem.weight, requires_grad=False)
    config = LoraConfig(
        r=rank, lora_alpha=SCALING * rank, lora_dropout=problem.dropout, target_modules=["0"]
    )
    keep_dtype = problem.shrink.dtype == problem.x.dtype
    model = get_peft_model(base, config, autocast_adapter_dtype=not keep_dtype)
    layer: Any = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        a.copy_(torch.randn(a.shape, generator=generator) * columns**-0.5)
        b.copy_(torch.randn(b.shape, generator=generator) * rank**-0.5)
    return Built("lora", layer.train(), (a, b))


def registry(problem: Problem, compile_too: bool = False) -> dict[str, Callable[[Problem], Built]]:
    """Name -> builder, for the rank and number of experts of ``problem``."""
    rank, wide = problem.rank, problem.rank * problem.experts
    found: dict[str, Callable[[Problem], Built]] = {
        "frozen": frozen,
        "floe": floe,
        f"peft r={rank}": lambda p: peft_lora(p, rank),
        f"peft r={wide}": lambda p: peft_lora(p, wide),
        "eager": eager,
        "hydra": hydra,
    }
    if problem.x.is_cuda:
        for backend in ("gemm", "fused", "eager"):
            found[f"floe {backend}"] = partial(floe, backend=backend)
    return {**found, "compiled": compiled} if compile_too else found


def candidates(
    problem: Problem, builders: dict[str, Callable[[Problem], Built]], backward: bool
) -> list[Candidate]:
    """The implementations as the harness wants them, timing forward or forward and backward.

    With dropout on, implementations draw masks of their own, so the check is made without dropout,
    on an implementation built the same way.
    """
    truths = _Truths(replace(problem, dropout=0.0))
    found = []
    for name, build in builders.items():
        run = _step(build(problem), problem, backward)
        found.append(Candidate(name, run, lambda build=build: truths.checks(build)))  # type: ignore[misc]
    return found


def _step(built: Built, problem: Problem, backward: bool) -> Callable[[], object]:
    """One call as in training: x needs a gradient, as anywhere but in the first adapted layer."""
    x = _leaf(problem.x)
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
        self.known: dict[object, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}

    def checks(self, build: Callable[[Problem], Built]) -> list[Check]:
        """The outputs of an implementation beside those of its formula."""
        built, problem = build(self.problem), self.problem
        x = _leaf(problem.x)
        y = built.forward(x)
        grad_x, *grads = torch.autograd.grad(y, (x, *built.parameters), problem.grad)
        joined = built.joined([p.detach() for p in built.parameters])
        actual = (y[self.rows], grad_x[self.rows], *built.joined(grads))
        key = (built.formula, *(p.shape for p in joined))
        if key not in self.known:
            self.known[key] = (
                self._outputs(built.formula, joined, torch.float64),
                self._outputs(built.formula, joined, None),
            )
        exact, torchs = self.known[key]
        names = ("y", "grad_x", *(f"gradient {i}" for i in range(len(grads))))
        return [Check(*found) for found in zip(names, actual, exact, torchs, strict=False)]

    def _outputs(
        self, formula: str, parameters: tuple[Tensor, ...], dtype: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        problem, rows = self.problem, self.rows
        x = _leaf(problem.x if dtype is None else problem.x.to(dtype))
        weight, grad = problem.weight.to(x.dtype), problem.grad.to(x.dtype)
        leaves = [_leaf(p if dtype is None else p.to(dtype)) for p in parameters]
        y, grad_x = x.detach()[rows] @ weight.T, grad[rows] @ weight
        if formula == "frozen":
            return y, grad_x
        delta = DELTAS[formula](x, *leaves)
        found, *grads = torch.autograd.grad(delta, (x, *leaves), grad)
        return y + delta.detach()[rows], grad_x + found[rows], *grads


def _lora_delta(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x @ a.to(x.dtype).T @ b.to(x.dtype).T * SCALING


def _routed_delta(x: Tensor, shrink: Tensor, expand: Tensor) -> Tensor:
    return reference.moe_lora_delta(x, shrink, expand, scaling=SCALING)


DELTAS: dict[str, Callable[..., Tensor]] = {"lora": _lora_delta, "routed": _routed_delta}


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()
