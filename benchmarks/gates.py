"""Are the adapted models right? Whole decoder blocks beside float64, before anything is timed.

Gated are the first and the last adapted block of every arm, in their true sizes, on normal random
hidden states: the output and every adapted linear's as inference computes them, the output as
training does, the gradient of the input and of every adapter parameter. Dropout is off, since every
arm draws masks of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import arms, impls
from benchmarks.arms import Arm, Setting, Site
from benchmarks.harness import Check
from floe.decoder_blocks import find_blocks, linear_at

WHAT_IS_GATED = (
    "Checked against float64 before timing: the first and last adapted block, output and gradients."
)
TOKENS = {"cpu": 128, "cuda": 4096}  # of a gate at most: float64 is slow
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
        delta: Tensor = impls.DELTAS[self.formula](x, *self.adapter)
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


class Gate:
    """Blocks of one frozen model beside the truth, for inputs shaped like ``tokens`` [B, T].

    The truth of a block and formula is computed once, whichever arms are held against it. Without
    ``backward``, outputs alone are compared.
    """

    def __init__(
        self, base: nn.Module, tokens: Tensor, setting: Setting, backward: bool = True
    ) -> None:
        self.base, self.setting, self.backward = base, setting, backward
        first = find_blocks(base)[0]
        self.places = {n: p.removeprefix(f"{first.path}.") for n, p in first.linears.items()}
        limit = TOKENS[tokens.device.type]
        length = min(tokens.shape[1], limit)
        self.tokens = tokens[: max(1, limit // length), :length]
        self.probe = _probe(base, self.tokens)
        self.known: dict[object, tuple[Outputs, Outputs]] = {}

    def checks(self, arm: Arm) -> list[Check]:
        """Everything compared of the arm's first and last adapted block."""
        layers = arm.layers or range(len(find_blocks(self.base)))
        return [
            check
            for index in sorted({min(layers), max(layers)})
            for check in self._block_checks(arm, index)
        ]

    def _block_checks(self, arm: Arm, index: int) -> list[Check]:
        block = find_blocks(arm.model)[index]
        sites = {n: arm.sites[p] for n, p in block.linears.items() if p in arm.sites}
        found = self._outputs(block.module, self.probe, sites)
        exact, torchs = self._truth(index, sites)
        return [
            Check(f"block {index}: {name}", value, exact[name], torchs[name])
            for name, value in found.items()
        ]

    def _truth(self, index: int, sites: dict[str, Site]) -> tuple[Outputs, Outputs]:
        """In float64 and in the model's dtype, from the numbers that the arm ought to have."""
        paths = find_blocks(self.base)[index].linears
        numbers = {
            name: arms.numbers(paths[name], linear_at(self.base, paths[name]), site, self.setting)
            for name, site in sites.items()
        }
        shapes = ((name, sites[name].formula, numbers[name][0].shape) for name in sites)
        key = (index, *shapes)
        if key not in self.known:
            exact, torchs = (
                self._reference(index, sites, numbers, dtype) for dtype in (torch.float64, None)
            )
            self.known[key] = exact, torchs
        return self.known[key]

    def _reference(
        self,
        index: int,
        sites: dict[str, Site],
        numbers: dict[str, tuple[Tensor, ...]],
        dtype: torch.dtype | None,
    ) -> Outputs:
        described = find_blocks(self.base)[index]
        block = copy.deepcopy(described.module)
        plain = {}
        for name, site in sites.items():
            linear: Any = block.get_submodule(self.places[name])
            plain[name] = Reference(linear, site.formula, numbers[name])
            block.set_submodule(self.places[name], plain[name])
        probe = self.probe
        if dtype is not None:
            block, probe = block.to(dtype), probe.to(dtype)
        found = {name: Site(layer.formula, tuple(layer.adapter)) for name, layer in plain.items()}
        return self._outputs(block, probe, found)

    def _outputs(self, block: nn.Module, probe: Probe, sites: dict[str, Site]) -> Outputs:
        """Outputs of the block and its adapted linears, gradients of its input and adapters."""
        found: Outputs = {}

        def note(name: str) -> Any:
            return lambda module, args, output: found.update({f"output of {name}": output})

        handles = [
            block.get_submodule(self.places[name]).register_forward_hook(note(name))
            for name in sites
        ]
        with torch.no_grad():
            found["output"] = block(probe.hidden, **probe.others)
        for handle in handles:
            handle.remove()
        if not self.backward:
            return found
        x = probe.hidden.clone().requires_grad_()
        y = block(x, **probe.others)
        flat = [value for site in sites.values() for value in site.parameters]
        grad_x, *rest = torch.autograd.grad(y, [x, *flat], probe.grad)
        found |= {"output in training": y.detach(), "grad_x": grad_x}
        for name, site in sites.items():
            own, rest = rest[: len(site.parameters)], rest[len(site.parameters) :]
            found |= {f"gradient {i} of {name}": g for i, g in enumerate(site.joined(own))}
        return found


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
