"""Time of one adapted linear layer: ``python -m benchmarks.kernels --help``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import cost, harness, impls, pieces


def main(arguments: list[str] | None = None) -> None:
    """Print a table for every case; write the records where ``--json`` says."""
    options = _parse(arguments)
    device, clock = harness.prepare(options)
    environment, rows = harness.machine(device), []
    print(harness.describe(environment))
    for columns, features, tokens in options.shapes:
        for experts in options.experts:
            for dropout in options.dropout:
                case = {
                    "device": device.type,
                    "clock": options.clock,
                    "dtype": options.dtype,
                    "adapter_dtype": options.adapter_dtype or options.dtype,
                    "columns": columns,
                    "features": features,
                    "tokens": tokens,
                    "rank": options.rank,
                    "experts": experts,
                    "dropout": dropout,
                    "scale": "full" if min(columns, features, tokens) >= 1024 else "reduced",
                }
                rows += _run(case, options, device, clock, environment)
    if options.json:
        harness.save(options.json, rows)


def _run(
    case: dict[str, Any],
    options: argparse.Namespace,
    device: torch.device,
    clock: Callable[[], float],
    environment: dict[str, Any],
) -> list[dict[str, Any]]:
    problem = impls.Problem.draw(
        case["tokens"],
        case["columns"],
        case["features"],
        case["rank"],
        case["experts"],
        case["dropout"],
        getattr(torch, case["dtype"]),
        getattr(torch, case["adapter_dtype"]),
        device,
    )
    builders = impls.registry(problem, options.compile)
    if options.only:
        builders = {name: builders[name] for name in builders if name.split()[0] in options.only}
    if options.pieces:
        return _pieces(case, problem, options, environment)
    rows = []
    for what in ("forward", "forward+backward"):
        found = impls.candidates(problem, builders, backward=what != "forward")
        errors = {candidate.name: harness.gate(candidate) for candidate in found}
        seconds = harness.measure(found, rounds=options.rounds, device=device, clock=clock)
        records = harness.record(environment, {**case, "what": what}, seconds, errors, "frozen")
        for record, candidate in zip(records, found, strict=True):
            record["peak_bytes"], record["peak_kind"] = cost.peak_bytes(candidate.run, device)
            if device.type == "cuda":
                record["launches"], record["launches_kind"] = cost.launches(candidate.run, device)
        rows += records
    _print(case, rows)
    return rows


def _pieces(
    case: dict[str, Any],
    problem: impls.Problem,
    options: argparse.Namespace,
    environment: dict[str, Any],
) -> list[dict[str, Any]]:
    rows = []
    for backend in ("gemm", "fused"):
        found = pieces.measure(problem, backend, options.rounds)
        print(f"\n{case}, backend {backend}, each kernel alone\n{pieces.show(found)}", flush=True)
        rows += [{"environment": environment, "case": {**case, "backend": backend}, **row}
                 for row in found]  # fmt: skip
    return rows


def _print(case: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{case['columns']} -> {case['features']}, T={case['tokens']}, r={case['rank']}, "
        f"M={case['experts']}, dropout {case['dropout']}, {case['dtype']}, adapter "
        f"{case['adapter_dtype']}, {case['device']}, {case['clock']} time, {case['scale']} scale"
    )
    header = ("", "what", "ms median", "p20", "p80", "min", "x frozen", "p20", "p80", "error",
              "peak MiB", "launches")  # fmt: skip
    lines = []
    for row in rows:
        ms, ratio = row["milliseconds"], row["ratio"]
        lines.append(
            (
                row["case"]["implementation"],
                row["case"]["what"],
                *(f"{ms[key]:.2f}" for key in ("median", "p20", "p80", "min")),
                *(f"{ratio[key]:.2f}" for key in ("median", "p20", "p80")),
                f"{row['relative_error']:.1e}",
                f"{row['peak_bytes'] / 2**20:.0f}",
                str(row.get("launches", "-")),
            )
        )
    print(harness.table(header, lines), flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    harness.add_options(parser)
    parser.add_argument(
        "--adapter-dtype",
        type=harness.dtype_name,
        choices=harness.DTYPES,
        help="default: as --dtype, for everybody",
    )
    parser.add_argument(
        "--shapes",
        type=lambda text: [_shape(one) for one in text.split(",")],
        default=[(4096, 4096, 1024), (576, 1536, 512)],
        help="KxNxT,KxNxT,...",
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--experts", type=_numbers(int), default=[4, 10], help="M,M,...")
    parser.add_argument("--dropout", type=_numbers(float), default=[0.0, 0.05], help="p,p,...")
    parser.add_argument(
        "--pieces", action="store_true", help="instead, each Triton kernel alone (CUDA)"
    )
    parser.add_argument("--compile", action="store_true", help="also torch.compile of `eager`")
    parser.add_argument(
        "--only",
        type=lambda text: {*text.split(","), "frozen"},
        help="frozen,floe,peft,eager,hydra",
    )
    return parser.parse_args(arguments)


def _shape(text: str) -> tuple[int, int, int]:
    sizes = [int(part) for part in text.split("x")]
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"a shape must be KxNxT with sizes >= 1, got {text!r}")
    return sizes[0], sizes[1], sizes[2]


def _numbers(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
