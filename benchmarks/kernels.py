"""Time of one adapted linear layer: ``python -m benchmarks.kernels --help``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from floe_triton import launch

from benchmarks import cost, harness, implementations, issue
from benchmarks.harness import SPREAD, Bench, Candidate, Column, Row
from benchmarks.implementations import Adapter, Builder, Problem
from benchmarks.settings import Command, count, option, several, shape


@dataclass(frozen=True)
class Options:
    """Shapes and adapters to time, and who computes them."""

    adapter_dtype: str | None = option(
        None, "default: as --dtype, for everybody", harness.dtype_name, choices=harness.DTYPES
    )
    shapes: tuple[tuple[int, ...], ...] = option(
        ((4096, 4096, 1024), (576, 1536, 512)), "KxNxT,KxNxT,...", several(shape("KxNxT"))
    )
    rank: int = option(8)
    experts: tuple[int, ...] = option((4, 10), "M,M,...", several(count))
    dropout: tuple[float, ...] = option((0.0, 0.05), "p,p,...", several(float))
    per_kernel: bool = option(False, "instead, each Triton kernel alone (CUDA)")
    compile: bool = option(False, "also torch.compile of `eager`")
    only: tuple[str, ...] = option((), "of frozen,floe,peft,eager,hydra; frozen always", several())


COMMAND = Command("kernels", __doc__, harness.Timing, Options)


def main(arguments: list[str] | None = None) -> None:
    """Print a table for every case; write the records where ``--json`` says."""
    timing, options = COMMAND.parse(arguments)
    bench, rows = Bench.begin(timing), []
    cases = itertools.product(options.shapes, options.experts, options.dropout)
    for sizes, experts, dropout in cases:
        dtype = options.adapter_dtype or timing.dtype
        adapter = Adapter(options.rank, experts, dropout, getattr(torch, dtype))
        problem = Problem.draw(sizes, adapter, getattr(torch, timing.dtype), bench.device)
        scale = "full" if min(sizes) >= 1024 else "reduced"
        case = {**layer_case(sizes, adapter), "adapter_dtype": dtype, "scale": scale}
        if options.per_kernel:
            rows += _per_kernel(bench, {**timing.case(), **case}, problem)
            continue
        builders = implementations.registry(problem, options.compile)
        if options.only:
            wanted = {"frozen", *options.only}
            builders = {name: b for name, b in builders.items() if name.split()[0] in wanted}
        rows += measure(bench, {**timing.case(), **case}, problem, builders)
    harness.save(timing.json, rows)


def layer_case(sizes: Sequence[int], adapter: Adapter) -> Row:
    """What a record says of an adapted layer of the shape (K, N, T)."""
    layer = dict(zip(("columns", "features", "tokens"), sizes, strict=True))
    return layer | {k: getattr(adapter, k) for k in ("rank", "experts", "dropout")}


def measure(
    bench: Bench, case: Row, problem: Problem, builders: dict[str, Builder], **how: Any
) -> list[Row]:
    """Rows of every implementation, forward, then forward and backward, printed.

    ``how`` as in `harness.measure`.
    """
    rows = []
    for what in ("forward", "forward+backward"):
        candidates = implementations.candidates(problem, builders, what != "forward")
        timed, _ = bench.time({**case, "what": what}, candidates, **how)
        for row, candidate in zip(timed, candidates, strict=True):
            row |= cost.costs(candidate.run, bench.device, candidate.name == "compiled")
            if what != "forward":
                row["saved_bytes"] = _saved(problem, builders[candidate.name])
        rows += timed
    print(f"\n{harness.title(case)}\n{harness.show(rows, COLUMNS)}", flush=True)
    return rows


COLUMNS: list[Column] = [
    ("", "case.implementation:"),
    ("what", "case.what:"),
    *harness.spread("ms median", "milliseconds", ".2f", (*SPREAD, "min")),
    *harness.spread("x frozen", "ratio", ".2f"),
    ("error", "relative_error:.1e"),
    ("saved MiB", harness.mib("saved_bytes", ".2f")),
    ("peak MiB", harness.mib("peak_bytes")),
    ("launches", "launches:"),
]


def _saved(problem: Problem, build: Builder) -> int:
    """What the forward keeps beside its parameters; x [T, K], which all keep, counts too."""
    built, x = build(problem), implementations.leaf(problem.x)
    return cost.saved_bytes(lambda: built.forward(x), (problem.weight, *built.parameters))


def _per_kernel(bench: Bench, case: Row, problem: Problem) -> list[Row]:
    rows = []
    for backend in ("gemm", "fused"):
        case = {**case, "backend": backend}
        kernels = per_kernel(problem, backend, bench.rounds)
        print(f"\n{harness.title(case)}, each kernel alone")
        print(harness.show(kernels, PER_KERNEL), flush=True)
        rows += [{"environment": bench.environment, "case": case, **row} for row in kernels]
    return rows


def per_kernel(problem: Problem, backend: str, rounds: int) -> list[Row]:
    """Milliseconds, GB/s, TFLOP/s and share of the memory's bandwidth of each kernel launched.

    One forward and backward of the adapted layer leaves the launches; each is then repeated alone
    on the tensors it had, the L2 cache emptied before. A tensor counts as moved once. The share is
    None on GPUs whose bandwidth :mod:`benchmarks.issue` does not know.
    """
    built, x = implementations.floe(problem, backend), implementations.leaf(problem.x)
    with launch.watching() as launches:
        torch.autograd.grad(built.forward(x), (x, *built.parameters), problem.grad)
    candidates = [
        Candidate(f"{place} {each.kernel.__name__}", partial(launch.relaunch, each), list)
        for place, each in enumerate(launches)
    ]
    seconds, _ = harness.measure(candidates, rounds=rounds, device=x.device)
    rows = []
    for each, (name, times) in zip(launches, seconds.items(), strict=True):
        part, median = issue.PARTS.get(each.device.capability), harness.summary(times)["median"]
        rate = each.bytes / median
        rows.append(
            {
                "kernel": name,
                "grid": list(each.grid),
                "milliseconds": harness.milliseconds(times),
                "gigabytes_per_second": rate / 1e9,
                "teraflops": each.flops / median / 1e12,
                "share_of_bandwidth": None if part is None else rate / part.bandwidth,
            }
        )
    return rows


PER_KERNEL: list[Column] = [
    ("", "kernel:"),
    *harness.spread("ms median", "milliseconds", ".4f"),
    ("GB/s", "gigabytes_per_second:.0f"),
    ("TFLOP/s", "teraflops:.1f"),
    ("of bandwidth", "share_of_bandwidth:.0%"),
]


if __name__ == "__main__":
    main()
