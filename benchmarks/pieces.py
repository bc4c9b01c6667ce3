"""Every kernel of one call on its own: ``python -m benchmarks.kernels --device cuda --pieces``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from floe_triton import launch

from benchmarks import harness, issue
from benchmarks.impls import Problem, floe


def measure(problem: Problem, backend: str, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds, GB/s, TFLOP/s and share of the memory's bandwidth of each kernel launched.

    One forward and backward of the adapted layer leaves the launches; each is then repeated alone
    on the tensors it had, the L2 cache emptied before. A tensor counts as moved once. The share is
    None on GPUs whose bandwidth :mod:`benchmarks.issue` does not know.
    """
    built = floe(problem, backend)
    x = problem.x.detach().clone().requires_grad_()
    with launch.watching() as launches:
        torch.autograd.grad(built.forward(x), (x, *built.parameters), problem.grad)
    candidates = [
        harness.Candidate(f"{place} {one.kernel.__name__}", partial(launch.relaunch, one), list)
        for place, one in enumerate(launches)
    ]
    seconds = harness.measure(candidates, rounds=rounds, device=x.device)
    return [
        _row(one, name, harness.summary(times))
        for one, (name, times) in zip(launches, seconds.items(), strict=True)
    ]


def _row(one: launch.Launch, name: str, times: dict[str, float]) -> dict[str, Any]:
    median = times["median"]
    part = issue.PARTS.get(one.device.capability)
    rate = one.bytes / median
    return {
        "kernel": name,
        "grid": list(one.grid),
        "milliseconds": {k: v if k == "n" else 1e3 * v for k, v in times.items()},
        "gigabytes_per_second": rate / 1e9,
        "teraflops": one.flops / median / 1e12,
        "share_of_bandwidth": None if part is None else rate / part.bandwidth,
    }


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    header = ("", "ms median", "p20", "p80", "GB/s", "TFLOP/s", "of bandwidth")
    lines = []
    for row in rows:
        ms, share = row["milliseconds"], row["share_of_bandwidth"]
        lines.append(
            (
                row["kernel"],
                *(f"{ms[key]:.4f}" for key in ("median", "p20", "p80")),
                f"{row['gigabytes_per_second']:.0f}",
                f"{row['teraflops']:.1f}",
                "unknown" if share is None else f"{share:.0%}",
            )
        )
    return harness.table(header, lines)
