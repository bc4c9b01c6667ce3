"""How far an op may be from float64, and the check of every op on one device against it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from floe_triton import reference
from floe_triton.launch import runs_triton
from torch import Tensor

from floe import ops
from floe.selection.masks.solvers import solve_mask, solve_two_class
from floe.types import Flags, Floats

Compared = tuple[str, Tensor, Tensor, Tensor | float]
"""Output, ours, exact; and what plain torch makes of it, or the relative error allowed."""

_TOKENS = (0, 1, 17, 513)  # none, decoding, a ragged block, several blocks
# (K, N, r, M): odd sizes, one expert, ranks below and above a vector's width
_SHAPES = ((33, 47, 1, 1), (100, 7, 5, 3), (130, 96, 8, 4), (257, 64, 32, 10))
_DROPOUT = 0.25
_SCALING = 2.0
_ONE_TOKEN = 2.5  # times torch's error: of one token it is that of a few sums, and luck weighs more
_SEED = 0x5EED_0F_F10E  # both words of the dropout's key are in use


@dataclass(frozen=True)
class Result:
    """One output of one operator in one case, its error and the error allowed."""

    op: str
    output: str
    device: str
    dtype: str
    shape: str
    error: float
    budget: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is a number and within the budget."""
        return self.error <= self.budget

    @property
    def excess(self) -> float:
        """The error in parts of the budget."""
        if self.error <= 0.0:
            return 0.0
        return self.error / self.budget if self.budget > 0.0 else float("inf")

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: an infinite error, of an operator that raised or gave NaN, is None."""
        error = self.error if math.isfinite(self.error) else None
        return {**asdict(self), "error": error, "passed": self.passed}

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "WRONG"
        text = (
            f"{verdict}: {self.op} {self.output} on {self.device}, {self.dtype}, {self.shape}: "
            f"error {self.error:.3g}, budget {self.budget:.3g}"
        )
        return f"{text} ({self.note})" if self.note else text


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """RMS of the error over RMS of ``exact``, in float64; infinite for a NaN or another shape."""
    if actual.shape != exact.shape:
        return float("inf")
    exact = exact.detach().double()
    error = float((actual.detach().double() - exact).norm() / exact.norm().clamp_min(1e-300))
    return float("inf") if math.isnan(error) else error


def error_budget(
    torchs: Tensor, exact: Tensor, rounded_to: torch.dtype | None = None, factor: float = 2.0
) -> float:
    """The relative error allowed: ``factor`` times that of plain torch, or one rounding if larger.

    Args:
        torchs: What plain torch makes of the same inputs in the dtype under test.
        exact: The result in float64.
        rounded_to: The coarsest dtype of the computation, where that is not ``torchs``'s.
        factor: 2 holds a kernel to its accuracy; more only asks whether it is this function.
    Returns:
        ``max(factor * relative_error(torchs, exact), eps / 2)``; 0 for empty results.
    """
    if not exact.numel():
        return 0.0
    rounding = torch.finfo(rounded_to or torchs.dtype).eps / 2
    return max(factor * relative_error(torchs, exact), rounding)


def selftest(
    device: torch.device | str | None = None,
    progress: Callable[[int, int, Result], None] | None = None,
) -> list[Result]:
    """Run every operator on this machine against float64; seconds on two cores.

    Allowed error: `error_budget`. Dropout must equal its definition bit for bit, and the mask
    solvers a search through all masks. An operator that raises is a failed result, its message in
    the note.

    Args:
        device: The device to test; None tests the CPU and, where there is one, the CUDA device.
        progress: Called as ``progress(done, total, worst_result)`` after each case.
    Returns:
        Every result, in a fixed order; ``result.passed`` tells.
    """
    devices = [torch.device("cpu" if device is None else device)]
    if device is None and torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    every = [case for each in devices for case in cases(each)]
    results: list[Result] = []
    for done, case in enumerate(every, 1):
        outcome = case.run()
        results += outcome
        if progress is not None:
            progress(done, len(every), max(outcome, key=lambda result: result.excess))
    return results


@dataclass(frozen=True)
class Case:
    """One check; ``run`` never raises for a fault of the operator.

    ``check(draw)`` compares outputs on inputs drawn from the seed ``draw``. The numbers of several
    draws are compared together: of a few alone, an error would be luck.
    """

    op: str
    device: torch.device
    dtype: str
    shape: str
    check: Callable[[int], list[Compared]]
    draws: int = 3
    rounded_to: torch.dtype | None = None
    factor: float = 2.0

    def run(self) -> list[Result]:
        """Carry it out."""
        where = (str(self.device), self.dtype, self.shape)
        try:
            drawn = [self.check(draw) for draw in range(self.draws)]
        except Exception as error:  # whatever an operator raises is this test's finding
            note = f"{type(error).__name__}: {error}"
            return [Result(self.op, "raised", *where, float("inf"), 0.0, note)]
        results = []
        for each in zip(*drawn, strict=True):
            output, _, _, allowed = each[0]
            actual, exact = (_together(draw[i] for draw in each) for i in (1, 2))
            if isinstance(allowed, Tensor):
                plain = _together(draw[3] for draw in each)
                allowed = error_budget(plain, exact, self.rounded_to, self.factor)
            results.append(Result(self.op, output, *where, relative_error(actual, exact), allowed))
        return results


def _together(draws: Iterable[Any]) -> Tensor:
    return torch.cat([draw.flatten() for draw in draws])


def cases(device: torch.device) -> Iterator[Case]:
    """Every case for ``device``, in a fixed order."""
    yield from _moe_lora_cases(device)
    yield from _dropout_cases(device)
    yield from _fisher_cases(device)
    if device.type == "cpu":
        yield Case("solve_mask", device, "float64", "n=12", _check_knapsack)
        yield Case("solve_two_class", device, "float64", "heads=4 neurons=8", _check_two_class)


def _dtypes(device: torch.device) -> list[torch.dtype]:
    dtypes = [torch.float32, torch.float16]
    if device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
        dtypes.append(torch.bfloat16)
    return dtypes


def _backends(device: torch.device) -> tuple[str, ...]:
    """Every implementation that runs on ``device``, so that each is checked, not the default."""
    if device.type == "cuda":
        return ("eager", "gemm", "fused") if runs_triton(device) else ("eager",)
    return ("eager", "native") if device.type == "cpu" else ("eager",)


def _moe_lora_cases(device: torch.device) -> Iterator[Case]:
    for backend, dtype, shape in itertools.product(_backends(device), _dtypes(device), _SHAPES):
        columns, features, rank, experts = shape
        sizes = f"K={columns} N={features} r={rank} M={experts}"
        calls = ("moe_lora", "moe_lora_add", "moe_lora_group")
        for op, tokens, dropout in itertools.product(calls, _TOKENS, (0.0, _DROPOUT)):
            if op == "moe_lora_group" and not tokens:
                continue
            # where only the adapter is added, its parameters stay float32 as in training
            adapter = dtype if op == "moe_lora" else torch.float32
            site = _Linear(shape, tokens, dtype, adapter, dropout, device, backend)
            yield Case(
                op,
                device,
                str(dtype) if adapter == dtype else f"{dtype} with {adapter} adapter",
                f"{backend} T={tokens} {sizes} dropout={dropout}"
                + " of 3 linears" * (op == "moe_lora_group"),
                getattr(site, op),
                draws=4 if tokens < 64 else 2,
                rounded_to=dtype,
                factor=_ONE_TOKEN if tokens == 1 else 2.0,
            )


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

    def moe_lora(self, draw: int) -> list[Compared]:
        """The adapted linear, forward and backward."""
        x, shrink, expand, weight, bias, _, grad = self._inputs(draw)

        def call(op: Any, x: Tensor, *adapter: Tensor) -> Tensor:
            y: Tensor = op(x, weight.to(x.dtype), bias.to(x.dtype), *adapter, **self._settings())
            return y

        leaves = {"x": [x], "shrink": [shrink], "expand": [expand]}
        return self._compare(ops.moe_lora, reference.moe_lora, call, leaves, grad)

    def moe_lora_add(self, draw: int) -> list[Compared]:
        """The adapter added to a base output, forward and backward."""
        x, shrink, expand, _, _, base, grad = self._inputs(draw)

        def call(op: Any, x: Tensor, shrink: Tensor, expand: Tensor, base: Tensor) -> Tensor:
            y: Tensor = op(base, x, shrink, expand, **self._settings())
            return y

        def definition(base: Tensor, *rest: Tensor, **settings: Any) -> Tensor:
            return base + reference.moe_lora_delta(*rest, **settings)

        leaves = {"x": [x], "shrink": [shrink], "expand": [expand], "base": [base]}
        return self._compare(ops.moe_lora_add, definition, call, leaves, grad)

    def moe_lora_group(self, draw: int) -> list[Compared]:
        """Three linears with router biases and a temperature, forward and backward."""
        x, shrink, expand, weight, bias, base, grad = self._inputs(draw)
        router = torch.linspace(-1.0, 1.0, self.shape[3], device=self.device, dtype=self.adapter)
        # the same numbers in another order are other weights
        shrinks, expands = ([t, t.flip(0), t.roll(1, 0)] for t in (shrink, expand))
        frozen = [weight, weight.flip(0), weight.roll(1, 0)]

        def call(op: Any, x: Tensor, *rest: Tensor) -> Tensor:
            weights = [w.to(x.dtype) for w in frozen]
            biases = [None, bias.to(x.dtype), None]
            settings = {**self._settings(), "temperature": 0.5, "router_biases": rest[6:]}
            return torch.cat(op(x, weights, biases, rest[:3], rest[3:6], **settings), dim=-1)

        def definition(x: Tensor, *each: Any, router_biases: Any, **settings: Any) -> list[Tensor]:
            return [
                reference.moe_lora(x, *linear, router_bias=router_bias, **settings)
                for *linear, router_bias in zip(*each, router_biases, strict=True)
            ]

        leaves = {"x": [x], "shrink": shrinks, "expand": expands}
        leaves["router_bias"] = [router, router.flip(0), 2 * router]
        grads = torch.cat([grad, grad.flip(0), base], dim=-1)
        return self._compare(ops.moe_lora_group, definition, call, leaves, grads)

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

    def _settings(self) -> dict[str, Any]:
        seed = torch.tensor(_SEED, device=self.device)
        return {"scaling": _SCALING, "dropout_p": self.dropout, "seed": seed}

    def _compare(
        self,
        op: Callable[..., Any],
        definition: Callable[..., Any],
        call: Callable[..., Tensor],
        leaves: dict[str, list[Tensor]],
        grad: Tensor,
    ) -> list[Compared]:
        """y and the gradients of the leaves, those of one name together."""

        def outcome(function: Callable[..., Any], dtype: torch.dtype | None) -> dict[str, Tensor]:
            inputs = [t.to(dtype or t.dtype).detach().requires_grad_() for t in each]
            y = call(function, *inputs)
            gradients = iter(torch.autograd.grad(y, inputs, grad.to(y.dtype)))
            outputs = {"y": y.detach()}
            for name, tensors in leaves.items():
                parts = [next(gradients).flatten() for _ in tensors]
                outputs[f"grad_{name}"] = torch.cat(parts)
            return outputs

        each = [tensor for tensors in leaves.values() for tensor in tensors]
        actual = outcome(partial(op, backend=self.backend), None)
        exact, plain = outcome(definition, torch.float64), outcome(definition, None)
        return [(name, actual[name], exact[name], plain[name]) for name in exact]


def _dropout_cases(device: torch.device) -> Iterator[Case]:
    for dtype, shape in itertools.product(
        (*_dtypes(device), torch.float64), ((0, 5), (1, 1), (17, 33), (2, 65, 130))
    ):
        check = partial(_check_dropout, device, dtype, shape)
        yield Case("keyed_dropout", device, str(dtype), f"{shape} p={_DROPOUT}", check)


def _check_dropout(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], draw: int
) -> list[Compared]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw)).to(dtype)
    seed = torch.tensor(_SEED + draw)
    actual = ops.keyed_dropout(x.to(device), _DROPOUT, seed.to(device)).cpu()
    assert actual.shape == x.shape
    expected = reference.dropout(x, _DROPOUT, seed)
    return [("bytes", actual.view(torch.uint8), expected.view(torch.uint8), 0.0)]


def _fisher_cases(device: torch.device) -> Iterator[Case]:
    sizes = ((1, 1, 7, 1), (3, 17, 96, 32), (2, 513, 130, 1), (2, 130, 256, 64), (2, 0, 8, 2))
    for dtype, size, masked in itertools.product(_dtypes(device), sizes, (False, True)):
        samples, tokens, columns, group = size
        text = f"S={samples} T={tokens} D={columns} group={group} token_mask={masked}"
        site = _Site(size, dtype, masked, device)
        yield Case("mask_gradients", device, str(dtype), text, site.check_gradients)
        yield Case(
            "accumulate_fisher_",
            device,
            str(dtype),
            text,
            site.check_accumulate,
            rounded_to=torch.float32,
        )


@dataclass(frozen=True)
class _Site:
    """Samples, tokens, columns and group size of a projection's input."""

    size: tuple[int, int, int, int]
    dtype: torch.dtype
    masked: bool
    device: torch.device

    def check_gradients(self, draw: int) -> list[Compared]:
        """`mask_gradients`."""
        site, exact, plain = self._inputs(draw)
        return [("gradients", ops.mask_gradients(*site), exact, plain)]

    def check_accumulate(self, draw: int) -> list[Compared]:
        """`accumulate_fisher_`, and that a second call gives the same bits."""
        site, exact, plain = self._inputs(draw)
        scale = torch.linspace(0.5, 2.0, self.size[0], dtype=torch.float64, device=self.device)
        start = torch.ones(exact.shape[1], dtype=torch.float64, device=self.device)
        fisher, again = (ops.accumulate_fisher_(start.clone(), *site, scale) for _ in range(2))
        truth, torchs = (
            start + ((scale[:, None] * gradients.double()) ** 2).sum(0)
            for gradients in (exact, plain)
        )
        return [("fisher", fisher, truth, torchs), ("repeat", again, fisher, 0.0)]

    def _inputs(
        self, draw: int
    ) -> tuple[tuple[Tensor, Tensor, int, Tensor | None], Tensor, Tensor]:
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


def _check_knapsack(draw: int) -> list[Compared]:
    random = np.random.default_rng(draw)
    value, cost = random.random(12), random.integers(1, 9, 12).astype(np.float64)
    budget = float(cost.sum() // 2)
    return _against_all_masks(solve_mask(value, cost, budget).mask, value, cost, budget)


def _check_two_class(draw: int) -> list[Compared]:
    random = np.random.default_rng(draw)
    heads, neurons = random.random(4), random.random(8)
    solution = solve_two_class(heads, neurons, 3.0, 1.0, 9.0)
    assert solution.head_mask is not None
    assert solution.neuron_mask is not None
    mask = np.concatenate([solution.head_mask, solution.neuron_mask])
    value, cost = np.concatenate([heads, neurons]), np.repeat([3.0, 1.0], [4, 8])
    return _against_all_masks(mask, value, cost, 9.0)


def _against_all_masks(mask: Flags, value: Floats, cost: Floats, budget: float) -> list[Compared]:
    """The mask's value against that of the best of all 2^n masks, and what it costs too much."""
    every = (np.arange(2 ** len(value))[:, None] >> np.arange(len(value))) & 1
    best = float((every @ value)[every @ cost <= budget].max())
    reached, paid = float(mask @ value), max(budget, float(mask @ cost))
    pairs = {"lost value": (reached, best), "excess cost": (paid, budget)}
    exactly = partial(torch.tensor, dtype=torch.float64)
    return [(name, exactly([a]), exactly([b]), 1e-12) for name, (a, b) in pairs.items()]
