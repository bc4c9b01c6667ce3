"""Time of the mask gradients and their squares: ``python -m benchmarks.fisher --help``.

One site at a time; scoring a whole model is ``python -m benchmarks.scoring``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Candidate, Check
from floe import ops


@dataclass(frozen=True)
class Site:
    """Input of a projection and its gradient, [S, T, D]; ``group`` columns make a unit."""

    activation: Tensor
    gradient: Tensor
    group: int

    @property
    def size(self) -> int:
        """Bytes that must be read."""
        return 2 * self.activation.numel() * self.activation.element_size()

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
    exact = site.in_dtype(torch.float64)
    single = torch.float32
    dtypes = dict.fromkeys((site.activation.dtype, single))  # once each
    fisher = torch.zeros(exact.shape[1], dtype=torch.float64, device=exact.device)
    target = torch.empty_like(site.activation)
    arguments = (site.activation, site.gradient, site.group)

    def copy() -> Tensor:
        target.copy_(site.activation)
        return target.copy_(site.gradient)

    def squared(gradients: Tensor) -> Tensor:
        return gradients.double().square().sum(0)

    def check(run: Callable[[], Tensor], truth: Tensor, torchs: Tensor) -> list[Check]:
        return [Check("result", run(), truth, torchs)]

    def candidate(name: str, run: Callable[[], Tensor], torchs: torch.dtype) -> Candidate:
        return Candidate(name, run, lambda: check(run, exact, site.in_dtype(torchs)))

    def accumulated() -> Tensor:
        return ops.accumulate_fisher_(torch.zeros_like(fisher), *arguments)

    return [
        Candidate("copy", copy, lambda: check(copy, site.gradient.double(), site.gradient)),
        candidate("floe mask_gradients", lambda: ops.mask_gradients(*arguments), single),
        Candidate(
            "floe accumulate_fisher_",
            lambda: ops.accumulate_fisher_(fisher, *arguments),
            lambda: check(accumulated, squared(exact), squared(site.in_dtype(single)).float()),
        ),
        *(candidate(_name(dtype), lambda d=dtype: site.in_dtype(d), dtype) for dtype in dtypes),
        Candidate(
            "torch einsum float32",
            site.by_einsum,
            # adds one product after another, where sum() adds pairs
            lambda: [Check("result", site.by_einsum(), exact, site.in_dtype(single), factor=32.0)],
        ),
    ]


def _name(dtype: torch.dtype) -> str:
    return f"torch {str(dtype).removeprefix('torch.')}"


def main(arguments: list[str] | None = None) -> None:
    """Print a table for every case; write the records where ``--json`` says."""
    options = _parse(arguments)
    device, clock = harness.prepare(options)
    environment, rows = harness.machine(device), []
    print(harness.describe(environment))
    for samples, tokens, columns, group in options.shapes:
        generator = torch.Generator().manual_seed(0)
        a, g = (
            torch.randn(samples, tokens, columns, generator=generator).to(
                device, getattr(torch, options.dtype)
            )
            for _ in range(2)
        )
        site = Site(a, g, group)
        case = {
            "device": device.type,
            "clock": options.clock,
            "dtype": options.dtype,
            "samples": samples,
            "tokens": tokens,
            "columns": columns,
            "group": group,
            "scale": "full" if tokens * columns >= 1024 * 4096 else "reduced",
        }
        found = candidates(site)
        errors = {candidate.name: harness.gate(candidate) for candidate in found}
        seconds = harness.measure(found, rounds=options.rounds, device=device, clock=clock)
        made = harness.record(environment, case, seconds, errors, "copy")
        _print(case, made, site.size)
        rows += made
    if options.json:
        harness.save(options.json, rows)


def _print(case: dict[str, Any], rows: list[dict[str, Any]], size: int) -> None:
    print(
        f"\nS={case['samples']}, T={case['tokens']}, D={case['columns']}, group {case['group']}, "
        f"{case['dtype']}, {case['device']}, {case['clock']} time, {case['scale']} scale; "
        "the copy reads and writes both inputs"
    )
    lines = []
    for row in rows:
        ms, ratio = row["milliseconds"], row["ratio"]
        lines.append(
            (
                row["case"]["implementation"],
                *(f"{ms[key]:.2f}" for key in ("median", "p20", "p80", "min")),
                *(f"{ratio[key]:.2f}" for key in ("median", "p20", "p80")),
                f"{size / ms['median'] / 1e6:.1f}",
                f"{row['relative_error']:.1e}",
            )
        )
    header = ("", "ms median", "p20", "p80", "min", "x copy", "p20", "p80", "GB/s read", "error")
    print(harness.table(header, lines), flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fisher", description=__doc__)
    harness.add_options(parser)
    parser.add_argument(
        "--shapes",
        type=lambda text: [_shape(one) for one in text.split(",")],
        default=[(2, 1024, 11008, 1), (2, 1024, 4096, 128)],
        help="SxTxDxGROUP,...",
    )
    return parser.parse_args(arguments)


def _shape(text: str) -> tuple[int, int, int, int]:
    sizes = [int(part) for part in text.split("x")]
    if len(sizes) != 4 or min(sizes) < 1 or sizes[2] % sizes[3]:
        raise argparse.ArgumentTypeError(
            f"a shape must be SxTxDxGROUP, sizes >= 1 and GROUP a divisor of D, got {text!r}"
        )
    return sizes[0], sizes[1], sizes[2], sizes[3]


if __name__ == "__main__":
    main()
