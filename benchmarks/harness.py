"""Fair timing: every candidate is checked, then all run in turn, in a new order every round.

Timing one candidate after another on a machine that others share gives ratios of anything; the
ratio to the baseline within a round does not, so that is what is reported, with its spread. Where
others use the same cores all the time, one thread's processor time is the steadier clock.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from floe.numerics import error_budget, relative_error
from floe.pipeline.run_folder import environment
from floe.storage import write_json

_ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("bfloat16", "float16", "float32")
FACTOR = 4.0  # the gate asks "is it this function?"; how accurate it is, the tests hold


class WrongResult(Exception):
    """A candidate does not compute what it is to be timed for."""


@dataclass(frozen=True)
class Check:
    """One output of a candidate beside the truth (float64) and what plain torch makes of it."""

    output: str
    actual: Tensor
    exact: Tensor
    torchs: Tensor
    factor: float = FACTOR


@dataclass(frozen=True)
class Candidate:
    """Something to time: ``run`` is one call, ``checks`` proves that the call is right."""

    name: str
    run: Callable[[], object]
    checks: Callable[[], Sequence[Check]]


def gate(candidate: Candidate) -> float:
    """The candidate's largest relative RMS error; WrongResult if it computes something else.

    Allowed: `error_budget` with the check's factor.
    """
    worst = 0.0
    for check in candidate.checks():
        if check.actual.shape != check.exact.shape:
            shapes = f"{tuple(check.actual.shape)}, not {tuple(check.exact.shape)}"
            raise WrongResult(f"{candidate.name}: {check.output} has shape {shapes}; not timed")
        error = relative_error(check.actual, check.exact)
        allowed = error_budget(check.torchs, check.exact, factor=check.factor)
        if not error <= allowed:
            raise WrongResult(
                f"{candidate.name}: {check.output} has relative error {error:.3g} against float64, "
                f"allowed {allowed:.3g}; not timed"
            )
        worst = max(worst, error)
    return worst


def measure(
    candidates: Sequence[Candidate],
    *,
    rounds: int,
    device: torch.device,
    warmup: int = 2,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    cold: bool = True,
    errors: dict[str, float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call, one list per candidate with one entry per round.

    ``cold``: empty a GPU's L2 cache before each call (whole models empty it themselves).
    ``errors`` takes the candidates' errors, by name, as `gate` found them.

    Raises:
        WrongResult: a candidate is wrong; then nothing was timed.
        ValueError: fewer than one round, or two candidates of one name.
    """
    names = [candidate.name for candidate in candidates]
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    if len(set(names)) != len(names):
        raise ValueError(f"candidates must have different names, got {names}")
    found = {candidate.name: gate(candidate) for candidate in candidates}
    if errors is not None:
        errors.update(found)
    for candidate in candidates:
        for _ in range(warmup):
            candidate.run()
    order, shuffled = random.Random(seed), list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    flush = _flush(device) if cold else lambda: None
    for _ in range(rounds):
        order.shuffle(shuffled)
        for candidate in shuffled:
            flush()
            began = clock()
            candidate.run()
            _wait(device)
            seconds[candidate.name].append(clock() - began)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, minimum and number of values."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p20": ordered[round(0.2 * last)],
        "p80": ordered[round(0.8 * last)],
        "min": ordered[0],
        "n": len(ordered),
    }


def ratios(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Summary of the per-round ratios to the baseline; ``of_minima`` is the ratio of the minima."""
    found = summary([a / b for a, b in zip(seconds, baseline, strict=True)])
    return {**found, "of_minima": min(seconds) / min(baseline)}


def record(
    environment: dict[str, Any],
    case: dict[str, Any],
    seconds: dict[str, list[float]],
    errors: dict[str, float],
    baseline: str,
) -> list[dict[str, Any]]:
    """One JSON-ready row per candidate."""
    return [
        {
            "environment": environment,
            "case": {**case, "implementation": name},
            "milliseconds": {
                key: value if key == "n" else 1e3 * value for key, value in summary(times).items()
            },
            "ratio": {"to": baseline, **ratios(times, seconds[baseline])},
            "relative_error": errors[name],
        }
        for name, times in seconds.items()
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", type=dtype_name, choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default: torch's choice")
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: the process's own time, for one thread on cores that others use too",
    )
    parser.add_argument("--json", metavar="FILE")


def prepare(options: argparse.Namespace) -> tuple[torch.device, Callable[[], float]]:
    """Device and clock that the options ask for; sets the number of threads."""
    device = torch.device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.clock == "wall":
        return device, time.perf_counter
    if device.type != "cpu" or torch.get_num_threads() != 1:
        raise ValueError("--clock processor needs --device cpu and --threads 1")
    return device, time.process_time


def dtype_name(text: str) -> str:
    """torch's name of a dtype, from that or from bf16, fp16, fp32."""
    return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(text, text)


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what the numbers are made: hardware, versions, commit, uncommitted changes."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        **environment(),
        "device": device.type,
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "dirty": _dirty(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def save(path: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write the rows, and what else is named, as one JSON object."""
    write_json(Path(path), {"format": 1, "rows": rows, **more})


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns lined up, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells)

    return "\n".join(line(row) for row in (header, *rows))


def describe(environment: dict[str, Any]) -> str:
    """One line saying where the numbers of a table are from."""
    dirty = {True: ", with uncommitted changes", False: "", None: ""}[environment["dirty"]]
    return (
        f"{environment['gpu'] or environment['cpu']}, {environment['torch_threads']} threads, "
        f"torch {environment['torch']}, commit {str(environment['commit'])[:12]}{dirty}, "
        f"load {environment['load_average']:.1f}, {environment['time']}"
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flush(device: torch.device) -> Callable[[], None]:
    """On CUDA, empty the L2 cache, where the last call would have left the inputs of the next."""
    if device.type != "cuda":
        return lambda: None
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    scratch = torch.empty(size, dtype=torch.int8, device=device)

    def flush() -> None:
        scratch.zero_()
        torch.cuda.synchronize(device)

    return flush


def _dirty() -> bool | None:
    """Whether the source tree differs from its commit; None outside a repository."""
    command = ["git", "--no-optional-locks", "-C", str(_ROOT), "status", "--porcelain"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return bool(found.stdout.strip()) if found.returncode == 0 else None
