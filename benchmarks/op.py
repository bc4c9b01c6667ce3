"""One adapted linear in the records of the latency tables (`benchmarks.kernels` prints more)."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import cost, impls
from benchmarks.arms import Setting
from benchmarks.cases import Bench, Row
from benchmarks.impls import Problem
from benchmarks.options import Options


def measure(bench: Bench, setting: Setting, options: Options) -> list[Row]:
    """Forward, then forward and backward, of every shape K x N x T."""
    rows: list[Row] = []
    for columns, features, tokens in options.shapes:
        problem = Problem.draw(
            tokens, columns, features, setting.rank, setting.experts, setting.dropout,
            options.torch_dtype, setting.dtype, bench.device,
        )  # fmt: skip
        case = options.case(None, setting) | {
            "columns": columns, "features": features, "tokens": tokens,
        }  # fmt: skip
        builders = impls.registry(problem, options.compile)
        frozen = {"frozen": builders.pop("frozen")}
        builders = frozen | options.chosen(builders)
        for what in ("forward", "forward+backward"):
            rows += _case(bench, case | {"what": what}, problem, builders)
    return rows


def _case(bench: Bench, case: Row, problem: Problem, builders: dict[str, Any]) -> list[Row]:
    backward = case["what"] != "forward"
    candidates = impls.candidates(problem, builders, backward=backward)
    rows, _ = bench.time(case, candidates, cold=True)
    for row, candidate in zip(rows, candidates, strict=True):
        row["case"]["way"] = candidate.name
        row["launches"], row["launches_kind"] = None, "not counted"
        if candidate.name != "compiled" or bench.device.type == "cuda":
            row["launches"], row["launches_kind"] = cost.launches(candidate.run, bench.device)
        row["peak_bytes"], row["peak_kind"] = cost.peak_bytes(candidate.run, bench.device)
        if backward:
            row["saved_bytes"] = _saved(problem, builders[candidate.name], bench.device)
    return rows


def _saved(problem: Problem, build: Any, device: torch.device) -> int:
    """What the forward keeps beside its parameters; x [T, K], which all keep, counts too."""
    built = build(problem)
    x = problem.x.detach().clone().requires_grad_()
    return cost.saved_bytes(lambda: built.forward(x), (problem.weight, *built.parameters))
