"""Time of the mask gradients and their squares: ``python -m benchmarks.fisher --help``.

One site at a time; scoring a whole model is ``python -m benchmarks.scoring``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import SPREAD, Bench, Candidate, Check, Column
from benchmarks.settings import Command, option, several, shape
from floe import ops


@dataclass(frozen=True)
class Site:
    """Input of a projection and its gradient, [S, T, D]; ``group`` columns make a unit."""

    activation: Tensor
    gradient: Tensor
    group: int

    def in_dtype(self, dtype: torch.dtype) -> Tensor:
        """The formula as plain torch has it: ``(a * g)`` summed over tokens and group."""
        product = self.activation.to(dtype) * self.gradient.to(dtype)
        return product.unflatten(2, (-1, self.group)).sum((1, 3))

    def by_einsum(self) -> Tensor:
        """The same sum as one contraction in float32."""
        a, g = (v.float().unflatten(2, (-1, self.group)) for v in (self.activation, self.gradient))
        return torch.einsum("stuc,stuc->su", a, g)


def candidates(site: Site) -> list[Candidate]:
    """floe's two operators, three formulas of torch, and a copy of both inputs as yardstick."""
    exact, single = site.in_dtype(torch.float64), site.in_dtype(torch.float32)
    fisher = torch.zeros(exact.shape[1], dtype=torch.float64, device=exact.device)
    target = torch.empty_like(site.activation)
    arguments = (site.activation, site.gradient, site.group)

    def copy() -> Tensor:
        target.copy_(site.activation)
        return target.copy_(site.gradient)

    def check(
        run: Callable[[], Tensor], truth: Tensor, torchs: Tensor, factor: float
    ) -> list[Check]:
        return [Check("result", run(), truth, torchs, factor)]

    def candidate(
        name: str, run: Callable[[], Tensor], torchs: Tensor, factor: float = harness.FACTOR
    ) -> Candidate:
        return Candidate(name, run, partial(check, run, exact, torchs, factor))

    def accumulated() -> list[Check]:
        result = ops.accumulate_fisher_(torch.zeros_like(fisher), *arguments)
        truth, torchs = (gradients.double().square().sum(0) for gradients in (exact, single))
        return [Check("result", result, truth, torchs.float())]

    accumulate = partial(ops.accumulate_fisher_, fisher, *arguments)
    dtypes = dict.fromkeys((site.activation.dtype, torch.float32))  # once each
    plain = {str(d).removeprefix("torch."): partial(site.in_dtype, d) for d in dtypes}
    yardstick = partial(check, copy, site.gradient.double(), site.gradient, harness.FACTOR)
    return [
        Candidate("copy", copy, yardstick),
        candidate("floe mask_gradients", partial(ops.mask_gradients, *arguments), single),
        Candidate("floe accumulate_fisher_", accumulate, accumulated),
        *(candidate(f"torch {name}", run, run()) for name, run in plain.items()),
        # adds one product after another, where sum() adds pairs
        candidate("torch einsum float32", site.by_einsum, single, factor=32.0),
    ]


def sites(text: str) -> tuple[int, ...]:
    """Kind of the option ``--shapes``."""
    sizes = shape("SxTxDxGROUP")(text)
    if sizes[2] % sizes[3]:
        raise argparse.ArgumentTypeError(f"GROUP must be a divisor of D, got {text!r}")
    return sizes


@dataclass(frozen=True)
class Options:
    """What is timed."""

    shapes: tuple[tuple[int, ...], ...] = option(
        ((2, 1024, 11008, 1), (2, 1024, 4096, 128)), "SxTxDxGROUP,...", several(sites)
    )


COMMAND = Command("fisher", __doc__, harness.Timing, Options)


def main(arguments: list[str] | None = None) -> None:
    """Print a table for every case; write the records where ``--json`` says."""
    timing, options = COMMAND.parse(arguments)
    bench, rows = Bench.begin(timing), []
    for sizes in options.shapes:
        generator = torch.Generator().manual_seed(0)
        drawn = (torch.randn(sizes[:3], generator=generator) for _ in range(2))
        site = Site(*(v.to(bench.device, getattr(torch, timing.dtype)) for v in drawn), sizes[3])
        case = dict(zip(("samples", "tokens", "columns", "group"), sizes, strict=True))
        scale = "full" if sizes[1] * sizes[2] >= 1024 * 4096 else "reduced"
        case = {**timing.case(), **case, "scale": scale}
        timed, _ = bench.time(case, candidates(site), "copy")
        rows += timed
        print(f"\n{harness.title(case)}; the copy reads and writes both inputs")
        print(harness.show(timed, _columns(2 * site.activation.nbytes)), flush=True)
    harness.save(timing.json, rows)


def _columns(size: int) -> list[Column]:
    """``size``: bytes that must be read."""
    return [
        ("", "case.implementation:"),
        *harness.spread("ms median", "milliseconds", ".2f", (*SPREAD, "min")),
        *harness.spread("x copy", "ratio", ".2f"),
        ("GB/s read", lambda row: f"{size / row['milliseconds']['median'] / 1e6:.1f}"),
        ("error", "relative_error:.1e"),
    ]


if __name__ == "__main__":
    main()
