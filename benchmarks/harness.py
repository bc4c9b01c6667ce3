"""Fair timing: every candidate is checked, then all run in turn, in a new order every round.

Timing one candidate after another on a machine that others share gives ratios of anything; the
ratio to the baseline within a round does not, so that is what is reported, with its spread. Where
others use the same cores all the time, one thread's processor time is the steadier clock.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.settings import option
from floe.machine import environment, wait_policy
from floe.selfcheck import error_budget, relative_error
from floe.storage import write_json

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("bfloat16", "float16", "float32")
FACTOR = 4.0  # the gate asks "is it this function?"; how accurate it is, the tests hold
SPREAD = ("median", "p20", "p80")
MIB = 1 << 20
Row = dict[str, Any]
Seconds = dict[str, list[float]]  # of each candidate, one a round


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
    """The candidate's largest relative RMS error; WrongResult if it is beyond the budget."""
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


def dtype_name(text: str) -> str:
    """torch's name of a dtype, from that or from bf16, fp16, fp32."""
    return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(text, text)


@dataclass(frozen=True)
class Timing:
    """The options of every command that times."""

    device: str = option("cpu", choices=("cpu", "cuda"))
    dtype: str = option("bfloat16", kind=dtype_name, choices=DTYPES)
    rounds: int = option(20)
    threads: int | None = option(None, "of torch on the CPU; default: torch's choice", int)
    clock: str = option(
        "wall",
        "processor: the process's own time, for one thread on cores that others use too",
        choices=("wall", "processor"),
    )
    json: Path | None = option(None, "write the records there", Path, metavar="FILE")

    def case(self) -> Row:
        """What a record says of it."""
        return {"device": self.device, "clock": self.clock, "dtype": self.dtype}


@dataclass(frozen=True)
class Bench:
    """Where and how to time, and the record of that."""

    device: torch.device
    clock: Callable[[], float]
    environment: Row
    rounds: int

    @classmethod
    def begin(cls, timing: Timing) -> Bench:
        """As the options ask; prints where the numbers are from."""
        device, clock = prepare(timing, timing.threads)
        bench = cls(device, clock, machine(device), timing.rounds)
        print(describe(bench.environment))
        return bench

    def time(
        self, case: Row, candidates: Sequence[Candidate], baseline: str = "frozen", **how: Any
    ) -> tuple[list[Row], Seconds]:
        """A JSON-ready row for each candidate, and its seconds; ``how`` as in :func:`measure`."""
        how = {"rounds": self.rounds, "device": self.device, "clock": self.clock, **how}
        seconds, errors = measure(candidates, **how)
        gc.collect()  # or the peaks measured next would hold what is left of this
        return [
            {
                "environment": self.environment,
                "case": {**case, "implementation": name},
                "milliseconds": milliseconds(times),
                "ratio": {"to": baseline, **ratios(times, seconds[baseline])},
                "relative_error": errors[name],
            }
            for name, times in seconds.items()
        ], seconds


def measure(
    candidates: Sequence[Candidate],
    *,
    rounds: int,
    device: torch.device,
    warmup: int = 2,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    cold: bool = True,
    calls: int = 1,
) -> tuple[Seconds, dict[str, float]]:
    """Seconds of a call of each candidate, one a round, and its error.

    ``cold``: empty a GPU's L2 cache before each run (whole models empty it themselves).
    ``calls``: how many a run makes. WrongResult, and nothing timed, if a candidate is wrong.
    """
    names = [candidate.name for candidate in candidates]
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    if len(set(names)) != len(names):
        raise ValueError(f"candidates must have different names, got {names}")
    errors = {candidate.name: gate(candidate) for candidate in candidates}
    for candidate in candidates:
        for _ in range(warmup):
            candidate.run()
    order, shuffled = random.Random(seed), list(candidates)
    seconds: Seconds = {name: [] for name in names}
    flush = _flush(device) if cold else lambda: None
    for _ in range(rounds):
        order.shuffle(shuffled)
        for candidate in shuffled:
            flush()
            began = clock()
            candidate.run()
            wait(device)
            seconds[candidate.name].append((clock() - began) / calls)
    return seconds, errors


def summary(values: Iterable[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, minimum and number of values."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p20": ordered[round(0.2 * last)],
        "p80": ordered[round(0.8 * last)],
        "min": ordered[0],
        "n": len(ordered),
    }


def milliseconds(seconds: Iterable[float]) -> dict[str, float]:
    """Summary in milliseconds."""
    return summary(1e3 * value for value in seconds)


def ratios(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Summary of the per-round ratios to the baseline; ``of_minima`` is the ratio of the minima."""
    within = summary(a / b for a, b in zip(seconds, baseline, strict=True))
    return {**within, "of_minima": min(seconds) / min(baseline)}


def slope(counts: Sequence[int], seconds: Sequence[Sequence[float]]) -> dict[str, float]:
    """Milliseconds for each adapted layer: a straight line through every round's own times.

    ``counts``: adapted layers, at least two different numbers; ``seconds``: of each, one a round.
    """
    mean = sum(counts) / len(counts)
    square = sum((count - mean) ** 2 for count in counts)
    if square == 0:
        raise ValueError(f"counts must hold two different numbers of layers, got {list(counts)}")
    line = milliseconds(
        sum((count - mean) * time for count, time in zip(counts, times, strict=True)) / square
        for times in zip(*seconds, strict=True)
    )
    return {key: line[key] for key in (*SPREAD, "n")}


def prepare(options: Any, threads: int | None) -> tuple[torch.device, Callable[[], float]]:
    """``options.device`` and ``options.clock``; sets the number of threads."""
    device = torch.device(options.device)
    if threads is not None:
        torch.set_num_threads(threads)
    if options.clock == "wall":
        return device, time.perf_counter
    if device.type != "cpu" or torch.get_num_threads() != 1:
        raise ValueError("--clock processor needs --device cpu and --threads 1")
    return device, time.process_time


def machine(device: torch.device) -> Row:
    """Where and with what the numbers are made: hardware, versions, commit, uncommitted changes."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        **environment(),
        "device": device.type,
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "torch_threads": torch.get_num_threads(),
        "openmp": wait_policy(),
        "load_average": os.getloadavg()[0],
        "dirty": _dirty(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def title(case: Row, *without: str) -> str:
    """One line with all that a case says."""
    shown = {k: v for k, v in case.items() if v is not None and k not in without}
    lists = {k: " ".join(map(str, v)) for k, v in shown.items() if isinstance(v, list)}
    return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in (shown | lists).items())


def describe(environment: Row) -> str:
    """One line saying where the numbers of a table are from."""
    dirty = {True: ", with uncommitted changes", False: "", None: ""}[environment["dirty"]]
    return (
        f"{environment['gpu'] or environment['cpu']}, {environment['torch_threads']} threads, "
        f"torch {environment['torch']}, commit {str(environment['commit'])[:12]}{dirty}, "
        f"load {environment['load_average']:.1f}, {environment['time']}"
    )


def save(path: Path | None, rows: Sequence[Row], **more: Any) -> None:
    """Write the rows, and what else is named, as one JSON object, where there is a path."""
    if path is not None:
        write_json(path, {"format": 1, "rows": list(rows), **more})


Column = tuple[str, str | Callable[[Row], str]]


def show(rows: Sequence[Row], columns: Sequence[Column], *above: Sequence[str]) -> str:
    """The rows as a table, below lines of cells where there are some.

    A column is its header and what makes its cells: a function, or the keys of the value in a row
    and its format, as in ``"ratio.median:.2f"``. What a row lacks is shown as "-".
    """
    cells = [[_cell(row, source) for _, source in columns] for row in rows]
    return table([header for header, _ in columns], [*above, *cells])


def spread(header: str, keys: str, form: str, names: Sequence[str] = SPREAD) -> list[Column]:
    """Columns of a summary, the first of them called ``header``."""
    return [(header if name == names[0] else name, f"{keys}.{name}:{form}") for name in names]


def mib(key: str, form: str = ".0f") -> Callable[[Row], str]:
    """A column's cells from bytes."""
    return lambda row: format(row[key] / MIB, form) if row.get(key) is not None else "-"


def _cell(row: Row, source: str | Callable[[Row], str]) -> str:
    if callable(source):
        return source(row)
    keys, _, form = source.partition(":")
    value: Any = row
    for key in keys.split("."):
        value = None if value is None else value.get(key)
    return "-" if value is None else format(value, form)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns lined up, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells)

    return "\n".join(line(row) for row in (header, *rows))


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
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
    command = ["git", "--no-optional-locks", "-C", str(ROOT), "status", "--porcelain"]
    status = subprocess.run(command, capture_output=True, text=True, check=False)
    return bool(status.stdout.strip()) if status.returncode == 0 else None
