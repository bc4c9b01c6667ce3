"""The cases of ``floe.doctor.selftest``: every operator on one device against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from floe_triton import reference
from floe_triton.launch import runs_triton
from torch import Tensor

from floe import ops
from floe.numerics import Result, error_budget, relative_error
from floe.selection.masks.solvers import solve_mask, solve_two_class
from floe.types import Flags, Floats

Found = tuple[str, float, float]  # output, error, budget
Compared = tuple[str, Tensor, Tensor, Tensor]  # output, ours, in float64, plain torch's
Arguments = tuple[
    Tensor, Tensor, int, Tensor | None
]  # activation, gradient, group size, token mask

_TOKENS = (0, 1, 17, 513)  # none, decoding, a ragged block, several blocks
# (K, N, r, M): odd sizes, one expert, ranks below and above a vector's width
_SHAPES = ((33, 47, 1, 1), (100, 7, 5, 3), (130, 96, 8, 4), (257, 64, 32, 10))
_DROPOUT = 0.25
_SCALING = 2.0
_ONE_TOKEN = 2.5  # times torch's error: of one token it is that of a few sums, and luck weighs more
_SEED = 0x5EED_0F_F10E  # both words of the dropout's key are in use


@dataclass(frozen=True)
class Case:
    """One check; ``run`` never raises for a fault of the operator.

    ``check(draw)`` gives (output, error, budget) on inputs drawn from the seed ``draw``. Of every
    output the largest error meets the largest budget: one draw says little about an error's size.
    """

    op: str
    device: torch.device
    dtype: str
    shape: str
    check: Callable[[int], list[Found]]
    draws: int = 3

    def run(self) -> list[Result]:
        """Carry it out."""
        where = (str(self.device), self.dtype, self.shape)
        try:
            drawn = [self.check(draw) for draw in range(self.draws)]
        except Exception as error:  # whatever an operator raises is this test's finding
            note = f"{type(error).__name__}: {error}"
            return [Result(self.op, "raised", *where, float("inf"), 0.0, note)]
        return [
            Result(
                self.op, found[0][0], *where, max(e for _, e, _ in found), max(b for *_, b in found)
            )
            for found in zip(*drawn, strict=True)
        ]


def cases(device: torch.device) -> Iterator[Case]:
    """Every case for ``device``, in a fixed order."""
    yield from _moe_lora_cases(device)
    yield from _dropout_cases(device)
    yield from _fisher_cases(device)
    if device.type == "cpu":
        yield from _solver_cases(device)


def _dtypes(device: torch.device) -> list[torch.dtype]:
    found = [torch.float32, torch.float16]
    if device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
        found.append(torch.bfloat16)
    return found


def _backends(device: torch.device) -> tuple[str, ...]:
    """Every implementation that runs on ``device``, so that each is checked, not the default."""
    if device.type == "cuda":
        return ("eager", "gemm", "fused") if runs_triton(device) else ("eager",)
    return ("eager", "native") if device.type == "cpu" else ("eager",)


def _moe_lora_cases(device: torch.device) -> Iterator[Case]:
    for backend, dtype, shape in itertools.product(_backends(device), _dtypes(device), _SHAPES):
        columns, features, rank, experts = shape
        sizes = f"K={columns} N={features} r={rank} M={experts}"
        for tokens, dropout, add in itertools.product(_TOKENS, (0.0, _DROPOUT), (False, True)):
            # where only the adapter is added, its parameters stay float32 as in training
            adapter = torch.float32 if add else dtype
            site = _Linear(shape, tokens, dtype, adapter, dropout, device, backend)
            yield Case(
                "moe_lora_add" if add else "moe_lora",
                device,
                str(dtype) if adapter == dtype else f"{dtype} with {adapter} adapter",
                f"{backend} T={tokens} {sizes} dropout={dropout}",
                partial(site.pooled, site.compare_add if add else site.compare_linear),
                draws=1,
            )
        for tokens, dropout in itertools.product(_TOKENS[1:], (0.0, _DROPOUT)):
            site = _Linear(shape, tokens, dtype, torch.float32, dropout, device, backend)
            text = f"{backend} T={tokens} {sizes} dropout={dropout} of 3 linears"
            name = f"{dtype} with float32 adapter"
            check = partial(site.pooled, site.compare_group)
            yield Case("moe_lora_group", device, name, text, check, draws=1)


@dataclass(frozen=True)
class _Linear:
    """Shape and dtypes of an adapted linear layer; each check draws its numbers."""

    shape: tuple[int, int, int, int]
    tokens: int
    dtype: torch.dtype
    adapter: torch.dtype
    dropout: float
    device: torch.device
    backend: str

    def compare_linear(self, draw: int) -> list[Compared]:
        """`moe_lora`, forward and backward."""
        x, shrink, expand, weight, bias, _, grad = self._inputs(draw)

        def run(op: Callable[..., Tensor], x: Tensor, shrink: Tensor, expand: Tensor) -> Tensor:
            frozen = weight.to(x.dtype), bias.to(x.dtype)
            return op(x, *frozen, shrink, expand, **self._settings())

        own = partial(ops.moe_lora, backend=self.backend)
        return self._compare(run, own, reference.moe_lora, (x, shrink, expand), grad)

    def compare_add(self, draw: int) -> list[Compared]:
        """`moe_lora_add`, forward and backward."""
        x, shrink, expand, _, _, base, grad = self._inputs(draw)

        def run(op: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> Tensor:
            shrink, expand, base = rest
            return op(base, x, shrink, expand, **self._settings())

        own = partial(ops.moe_lora_add, backend=self.backend)
        return self._compare(run, own, _added, (x, shrink, expand, base), grad)

    def compare_group(self, draw: int) -> list[Compared]:
        """`moe_lora_group` of three linears with router biases and a temperature."""
        x, shrink, expand, weight, bias, base, grad = self._inputs(draw)
        experts = self.shape[3]
        router = torch.linspace(-1.0, 1.0, experts, device=self.device, dtype=self.adapter)
        # the same numbers in another order are other weights
        shrinks, expands = ([t, t.flip(0), t.roll(1, 0)] for t in (shrink, expand))
        frozen = [weight, weight.flip(0), weight.roll(1, 0)]

        def run(op: Callable[..., list[Tensor]], x: Tensor, *rest: Tensor) -> Tensor:
            found = op(
                x, [w.to(x.dtype) for w in frozen], [None, bias.to(x.dtype), None], rest[:3],
                rest[3:6], router_biases=rest[6:], temperature=0.5, **self._settings(),
            )  # fmt: skip
            return torch.cat(found, dim=-1)

        own = partial(ops.moe_lora_group, backend=self.backend)
        leaves = (x, *shrinks, *expands, router, router.flip(0), 2 * router)
        grads = torch.cat([grad, grad.flip(0), base], dim=-1)
        return self._compare(run, own, _group, leaves, grads)

    def _inputs(self, draw: int) -> list[Tensor]:
        """x, shrink, expand, weight, bias, base output and the gradient of y."""
        columns, features, rank, experts = self.shape
        fan = columns**-0.5
        sizes = (
            ((self.tokens, columns), 1.0, self.dtype),
            ((rank + experts, columns), fan, self.adapter),
            ((features, experts, rank), features**-0.5, self.adapter),
            ((features, columns), fan, self.dtype),
            ((features,), 1.0, self.dtype),
            ((self.tokens, features), 1.0, self.dtype),
            ((self.tokens, features), 1.0, self.dtype),
        )
        generator = torch.Generator().manual_seed(draw)
        return [
            (torch.randn(size, generator=generator) * scale).to(self.device, dtype)
            for size, scale, dtype in sizes
        ]

    def _settings(self) -> dict[str, object]:
        seed = torch.tensor(_SEED, device=self.device)
        return {"scaling": _SCALING, "dropout_p": self.dropout, "seed": seed}

    def _compare(
        self,
        run: Callable[..., Tensor],
        op: Callable[..., Any],
        definition: Callable[..., Any],
        leaves: tuple[Tensor, ...],
        grad: Tensor,
    ) -> list[Compared]:
        def outcome(function: Callable[..., Any], dtype: torch.dtype | None) -> list[Tensor]:
            own = [leaf.to(dtype or leaf.dtype).detach().requires_grad_() for leaf in leaves]
            y = run(function, *own)
            return [y.detach(), *torch.autograd.grad(y, own, grad.to(y.dtype))]

        exact, plain = outcome(definition, torch.float64), outcome(definition, None)
        actual, names = outcome(op, None), ("y", "grad_x", "grad_shrink", "grad_expand")
        if len(leaves) > 4:  # of a group: the linears' gradients together
            exact, plain, actual = (_joined(found) for found in (exact, plain, actual))
        last = "grad_router_bias" if len(leaves) > 4 else "grad_base"
        return list(zip((*names, last), actual, exact, plain, strict=False))

    def pooled(self, compare: Callable[[int], list[Compared]], draw: int) -> list[Found]:
        """The error over several draws at once: of a few numbers alone it would be luck."""
        several = range(4 * draw, 4 * draw + (4 if self.tokens < 64 else 2))
        found = []
        for each in zip(*(compare(one) for one in several), strict=True):
            actual, exact, plain = (torch.cat([c[i].flatten() for c in each]) for i in (1, 2, 3))
            budget = error_budget(plain, exact, self.dtype, _ONE_TOKEN if self.tokens == 1 else 2.0)
            found.append((each[0][0], relative_error(actual, exact), budget))
        return found


def _joined(found: list[Tensor]) -> list[Tensor]:
    kinds = [found[2 + 3 * kind : 5 + 3 * kind] for kind in range(3)]
    return [*found[:2], *(torch.cat([t.flatten() for t in kind]) for kind in kinds)]


def _group(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    shrinks: tuple[Tensor, ...],
    expands: tuple[Tensor, ...],
    *,
    router_biases: tuple[Tensor, ...],
    **settings: object,
) -> list[Tensor]:
    each = zip(weights, biases, shrinks, expands, router_biases, strict=True)
    return [
        reference.moe_lora(x, *linear, router_bias=router_bias, **settings)  # type: ignore[arg-type]
        for *linear, router_bias in each
    ]


def _added(base: Tensor, x: Tensor, shrink: Tensor, expand: Tensor, **settings: object) -> Tensor:
    return base + reference.moe_lora_delta(x, shrink, expand, **settings)  # type: ignore[arg-type]


def _dropout_cases(device: torch.device) -> Iterator[Case]:
    for dtype, shape in itertools.product(
        (*_dtypes(device), torch.float64), ((0, 5), (1, 1), (17, 33), (2, 65, 130))
    ):
        check = partial(_check_dropout, device, dtype, shape)
        yield Case("keyed_dropout", device, str(dtype), f"{shape} p={_DROPOUT}", check)


def _check_dropout(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], draw: int
) -> list[Found]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw)).to(dtype)
    seed = torch.tensor(_SEED + draw)
    expected = reference.dropout(x, _DROPOUT, seed)
    actual = ops.keyed_dropout(x.to(device), _DROPOUT, seed.to(device)).cpu()
    if actual.shape != x.shape or actual.dtype != dtype:
        return [("bytes", float("inf"), 0.0)]
    return [("bytes", float((actual.view(torch.uint8) != expected.view(torch.uint8)).sum()), 0.0)]


def _fisher_cases(device: torch.device) -> Iterator[Case]:
    sizes = ((1, 1, 7, 1), (3, 17, 96, 32), (2, 513, 130, 1), (2, 130, 256, 64), (2, 0, 8, 2))
    for dtype, size, masked in itertools.product(_dtypes(device), sizes, (False, True)):
        samples, tokens, columns, group = size
        text = f"S={samples} T={tokens} D={columns} group={group} token_mask={masked}"
        site = _Site(size, dtype, masked, device)
        yield Case("mask_gradients", device, str(dtype), text, site.check_gradients)
        yield Case("accumulate_fisher_", device, str(dtype), text, site.check_accumulate)


@dataclass(frozen=True)
class _Site:
    """Samples, tokens, columns and group size of a projection's input."""

    size: tuple[int, int, int, int]
    dtype: torch.dtype
    masked: bool
    device: torch.device

    def check_gradients(self, draw: int) -> list[Found]:
        """`mask_gradients`."""
        site, exact, plain = self._inputs(draw)
        actual = ops.mask_gradients(*site)
        return [("gradients", relative_error(actual, exact), error_budget(plain, exact))]

    def check_accumulate(self, draw: int) -> list[Found]:
        """`accumulate_fisher_`, and that a second call gives the same bits."""
        site, exact, plain = self._inputs(draw)
        scale = torch.linspace(0.5, 2.0, self.size[0], dtype=torch.float64, device=self.device)
        start = torch.ones(exact.shape[1], dtype=torch.float64, device=self.device)
        fisher, again = (ops.accumulate_fisher_(start.clone(), *site, scale) for _ in range(2))
        truth, own = (start + ((scale[:, None] * g.double()) ** 2).sum(0) for g in (exact, plain))
        return [
            ("fisher", relative_error(fisher, truth), error_budget(own, truth, torch.float32)),
            ("repeat", relative_error(again, fisher), 0.0),
        ]

    def _inputs(self, draw: int) -> tuple[Arguments, Tensor, Tensor]:
        """The operator's arguments, and the mask gradients in float64 and in float32."""
        samples, tokens, columns, group = self.size
        generator = torch.Generator().manual_seed(draw)
        a, g = (
            torch.randn(samples, tokens, columns, generator=generator).to(self.device, self.dtype)
            for _ in range(2)
        )
        mask, kept = None, a
        if self.masked:
            mask = (torch.rand(samples, tokens, generator=generator) < 0.7).to(self.device)
            kept = a.where(mask[:, :, None], torch.zeros_like(a))
            padding = torch.full_like(a, float("nan"))  # may hold anything
            a = a.where(mask[:, :, None], padding)
        exact, plain = (
            (kept.to(wide) * g.to(wide)).view(samples, tokens, columns // group, group).sum((1, 3))
            for wide in (torch.float64, torch.float32)
        )
        return (a, g, group, mask), exact, plain


def _solver_cases(device: torch.device) -> Iterator[Case]:
    yield Case("solve_mask", device, "float64", "n=12", _check_knapsack)
    yield Case("solve_two_class", device, "float64", "heads=4 neurons=8", _check_two_class)


def _check_knapsack(draw: int) -> list[Found]:
    random = np.random.default_rng(draw)
    value, cost = random.random(12), random.integers(1, 9, 12).astype(np.float64)
    budget = float(cost.sum() // 2)
    return _against_all_masks(solve_mask(value, cost, budget).mask, value, cost, budget)


def _check_two_class(draw: int) -> list[Found]:
    random = np.random.default_rng(draw)
    heads, neurons = random.random(4), random.random(8)
    solution = solve_two_class(heads, neurons, 3.0, 1.0, 9.0)
    assert solution.head_mask is not None
    assert solution.neuron_mask is not None
    mask = np.concatenate([solution.head_mask, solution.neuron_mask])
    value, cost = np.concatenate([heads, neurons]), np.repeat([3.0, 1.0], [4, 8])
    return _against_all_masks(mask, value, cost, 9.0)


def _against_all_masks(mask: Flags, value: Floats, cost: Floats, budget: float) -> list[Found]:
    """What the mask loses against the best of all 2^n masks, and what it costs too much."""
    every = (np.arange(2 ** len(value))[:, None] >> np.arange(len(value))) & 1
    best = float((every @ value)[every @ cost <= budget].max())
    return [
        ("lost value", best - float(mask @ value), 1e-12 * best),
        ("excess cost", max(0.0, float(mask @ cost) - budget), 1e-12 * budget),
    ]
