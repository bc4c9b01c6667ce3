"""Are the adapted models right? Whole decoder blocks beside float64, before anything is timed.

Checked are the first and the last adapted block of every model, in their true sizes, on normal
random hidden states: the output and every adapted linear's as inference computes them, the output
as training does, the gradient of the input and of every adapter parameter. Dropout is off, since
every way draws masks of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import implementations
from benchmarks.harness import Check
from benchmarks.implementations import Adapter
from benchmarks.latency.adapted_models import AdaptedLinear, AdaptedModel
from floe.decoder_blocks import find_blocks, linear_at

WHAT_IS_CHECKED = (
    "Checked against float64 before timing: the first and last adapted block, output and gradients."
)
TOKENS = {"cpu": 128, "cuda": 4096}  # of a check at most: float64 is slow
Outputs = dict[str, Tensor]


class Reference(nn.Module):
    """A frozen linear and its adapter by the formula, in the dtype of its input."""

    def __init__(self, linear: nn.Linear, formula: str, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.linear, self.formula = linear, formula
        self.adapter = nn.ParameterList(nn.Parameter(value) for value in parameters)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        y = functional.linear(x, self.linear.weight, self.linear.bias)
        delta: Tensor = implementations.DELTAS[self.formula](x, *self.adapter)
        return y + delta


@dataclass(frozen=True)
class Probe:
    """What a block is given: hidden states and their output's gradient [B, T, d], the rest."""

    hidden: Tensor
    grad: Tensor
    others: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Probe:
        """The same in another dtype."""
        others = torch.utils._pytree.tree_map(
            lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v,
            self.others,
        )
        return Probe(self.hidden.to(dtype), self.grad.to(dtype), others)


class BlockCheck:
    """Blocks of one frozen model beside the truth, for inputs shaped like ``tokens`` [B, T].

    The truth of a block and formula is computed once, whichever models are held against it.
    Without ``backward``, outputs alone are compared.
    """

    def __init__(
        self, base: nn.Module, tokens: Tensor, adapter: Adapter, backward: bool = True
    ) -> None:
        self.base, self.adapter, self.backward = base, adapter, backward
        first = find_blocks(base)[0]
        self.places = {n: p.removeprefix(f"{first.path}.") for n, p in first.linears.items()}
        limit = TOKENS[tokens.device.type]
        length = min(tokens.shape[1], limit)
        self.probe = _probe(base, tokens[: max(1, limit // length), :length])
        self.known: dict[object, tuple[Outputs, ...]] = {}

    def checks(self, adapted: AdaptedModel) -> list[Check]:
        """Everything compared of the model's first and last adapted block."""
        layers = adapted.layers or range(len(find_blocks(self.base)))
        checks = []
        for index in sorted({min(layers), max(layers)}):
            block = find_blocks(adapted.model)[index]
            paths = {name: path for name, path in block.linears.items() if path in adapted.linears}
            linears = {name: adapted.linears[path] for name, path in paths.items()}
            outputs = self._outputs(block.module, self.probe, linears)
            exact, torchs = self._truth(index, linears)
            checks += [
                Check(f"block {index}: {name}", value, exact[name], torchs[name])
                for name, value in outputs.items()
            ]
        return checks

    def _truth(self, index: int, linears: dict[str, AdaptedLinear]) -> tuple[Outputs, ...]:
        """In float64 and in the model's dtype, from the numbers that the model ought to have."""
        paths = find_blocks(self.base)[index].linears
        plain = {
            name: AdaptedLinear(
                linear.formula,
                linear.numbers(paths[name], linear_at(self.base, paths[name]), self.adapter),
            )
            for name, linear in linears.items()
        }
        shapes = ((name, p.formula, p.parameters[0].shape) for name, p in plain.items())
        key = (index, *shapes)
        if key not in self.known:
            dtypes = (torch.float64, None)
            self.known[key] = tuple(self._reference(index, plain, dtype) for dtype in dtypes)
        return self.known[key]

    def _reference(
        self, index: int, linears: dict[str, AdaptedLinear], dtype: torch.dtype | None
    ) -> Outputs:
        block, probe = copy.deepcopy(find_blocks(self.base)[index].module), self.probe
        plain = {}
        for name, adapted in linears.items():
            linear: Any = block.get_submodule(self.places[name])
            plain[name] = Reference(linear, adapted.formula, adapted.parameters)
            block.set_submodule(self.places[name], plain[name])
        if dtype is not None:
            block, probe = block.to(dtype), probe.to(dtype)
        trained = {n: AdaptedLinear(p.formula, tuple(p.adapter)) for n, p in plain.items()}
        return self._outputs(block, probe, trained)

    def _outputs(
        self, block: nn.Module, probe: Probe, linears: dict[str, AdaptedLinear]
    ) -> Outputs:
        """Outputs of the block and its adapted linears, gradients of its input and adapters."""
        outputs: Outputs = {}

        def note(name: str) -> Any:
            return lambda module, args, output: outputs.update({f"output of {name}": output})

        handles = [
            block.get_submodule(self.places[name]).register_forward_hook(note(name))
            for name in linears
        ]
        with torch.no_grad():
            outputs["output"] = block(probe.hidden, **probe.others)
        for handle in handles:
            handle.remove()
        if not self.backward:
            return outputs
        x = probe.hidden.clone().requires_grad_()
        y = block(x, **probe.others)
        flat = [value for linear in linears.values() for value in linear.parameters]
        grad_x, *rest = torch.autograd.grad(y, [x, *flat], probe.grad)
        outputs |= {"output in training": y.detach(), "grad_x": grad_x}
        for name, linear in linears.items():
            count = len(linear.parameters)
            grads, rest = rest[:count], rest[count:]
            outputs |= {f"gradient {i} of {name}": g for i, g in enumerate(linear.joined(grads))}
        return outputs


class _Reached(Exception):
    """The block's arguments are known; the rest of the model need not run."""


def _probe(base: nn.Module, tokens: Tensor) -> Probe:
    """Arguments of the model's blocks for these tokens, the hidden states replaced."""
    seen: dict[str, Any] = {}

    def stop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs, hidden=args[0])
        raise _Reached

    handle = find_blocks(base)[0].module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        base(input_ids=tokens, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    like = seen.pop("hidden")
    generator = torch.Generator().manual_seed(0)
    hidden, grad = (
        torch.randn(like.shape, generator=generator).to(like.device, like.dtype) for _ in range(2)
    )
    return Probe(hidden, grad, seen)
