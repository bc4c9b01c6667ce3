"""Time of the mask solvers and how it grows: ``python -m benchmarks.solver --help``.

Against the same methods as a numpy program (argsort, cumsum, searchsorted) and, for two classes,
against summing anew for every number of heads, up to the size where a call still ends soon.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.harness import SPREAD, Bench, Candidate, Check, Column, Row
from benchmarks.settings import Command, option, several
from floe.selection.masks.solvers import MaskSolution, solve_mask, solve_two_class
from floe.types import Flags, Floats

_NEURONS_PER_HEAD = 344  # 11,008 neurons and 32 heads a layer, as LLaMA2-7B has
_RESUMMED = 1_000_000  # units; ten times as many take a hundred times as long


Program = Callable[["Units"], Any]


@dataclass(frozen=True)
class Units:
    """Values and costs of n units, the heads first; the budget is half of the cost."""

    value: Floats
    cost: Floats
    heads: int

    @classmethod
    def draw(cls, size: int, kind: str) -> Units:
        """``fisher``: lognormal; ``taylor``: with the heavy tails of a model's; ``uniform``."""
        rng = np.random.default_rng(0)
        draw: Callable[[], Floats] = {
            "fisher": lambda: rng.lognormal(0.0, 1.5, size),
            "taylor": lambda: rng.lognormal(-10.0, 3.0, size),
            "uniform": lambda: rng.random(size),
        }[kind]
        return cls(draw(), draw(), max(1, size // (_NEURONS_PER_HEAD + 1)))

    @property
    def budget(self) -> float:
        """Half of the total cost."""
        return 0.5 * float(self.cost.sum())

    @property
    def means(self) -> tuple[float, float]:
        """The mean costs of a head and of a neuron."""
        return float(self.cost[: self.heads].mean()), float(self.cost[self.heads :].mean())

    @property
    def half(self) -> float:
        """The budget at mean costs."""
        head, neuron = self.means
        return 0.5 * (head * self.heads + neuron * (len(self.value) - self.heads))


def two_class_by_floe(units: Units) -> MaskSolution:
    """`floe.solve_two_class`."""
    values = units.value[: units.heads], units.value[units.heads :]
    return solve_two_class(*values, *units.means, units.half)


def two_class_by_numpy(units: Units) -> Flags:
    """Both classes sorted, one running sum each, every number of heads at once."""
    orders = [np.argsort(-part) for part in np.split(units.value, [units.heads])]
    heads, neurons = (
        np.concatenate([[0.0], np.cumsum(part[order])])
        for part, order in zip(np.split(units.value, [units.heads]), orders, strict=True)
    )
    n, f = _counts(units)
    best = int(np.argmax(heads[n] + neurons[f]))
    return _retained(orders, units, int(n[best]), int(f[best]))


def two_class_by_summing_anew(units: Units) -> Flags:
    """Both classes sorted, then for every number of heads both sums from the start."""
    parts = np.split(units.value, [units.heads])
    orders = [np.argsort(-part) for part in parts]
    heads, neurons = (part[order] for part, order in zip(parts, orders, strict=True))
    best, counts = -1.0, (0, 0)
    for n, f in zip(*_counts(units), strict=True):
        total = heads[:n].sum() + neurons[:f].sum()
        if total > best:
            best, counts = total, (int(n), int(f))
    return _retained(orders, units, *counts)


def knapsack_by_floe(units: Units) -> MaskSolution:
    """`floe.solve_mask` up to the greedy choice and its bound."""
    return solve_mask(units.value, units.cost, units.budget, max_nodes=0)


def knapsack_by_numpy(units: Units) -> Flags:
    """Units by value per cost, up to the budget; then, one by one, those that still fit."""
    order = np.argsort(-units.value / units.cost)
    spent = np.cumsum(units.cost[order])
    end = int(np.searchsorted(spent, units.budget, side="right"))
    mask = np.zeros(len(order), dtype=bool)
    mask[order[:end]] = True
    left = units.budget - (spent[end - 1] if end else 0.0)
    rest = order[end:]
    rest = rest[units.cost[rest] <= left]
    while len(rest):
        mask[rest[0]] = True
        left -= units.cost[rest[0]]
        rest = rest[1:][units.cost[rest[1:]] <= left]
    return mask


def _counts(units: Units) -> tuple[Any, Any]:
    """Every affordable number of heads, and how many neurons it leaves room for."""
    head, neuron = units.means
    n = np.arange(min(units.heads, int(units.half / head)) + 1)
    room = np.floor((units.half - n * head) / neuron + 1e-9).astype(np.int64)
    return n, np.minimum(room, len(units.value) - units.heads)


def _retained(orders: Sequence[Any], units: Units, heads: int, neurons: int) -> Flags:
    mask = np.zeros(len(units.value), dtype=bool)
    mask[orders[0][:heads]] = True
    mask[orders[1][:neurons] + units.heads] = True
    return mask


def two_class(units: Units) -> list[Candidate]:
    """Programs for two classes; all must retain the same units."""
    programs: dict[str, Program] = {
        "numpy": two_class_by_numpy,
        "floe": lambda units: two_class_by_floe(units).mask,
    }
    if len(units.value) <= _RESUMMED:
        programs["summed anew"] = two_class_by_summing_anew
    exact = torch.from_numpy(two_class_by_floe(units).mask).double()

    def checks(program: Program) -> list[Check]:
        return [Check("mask", torch.from_numpy(program(units)).double(), exact, exact)]

    return _candidates(programs, units, checks)


def knapsack(units: Units) -> list[Candidate]:
    """Programs for a cost of every unit; each must come as close to the bound as the greedy choice,
    within the budget."""
    programs: dict[str, Program] = {
        "numpy": knapsack_by_numpy,
        "floe": lambda units: knapsack_by_floe(units).mask,
        "floe, exact": lambda units: solve_mask(units.value, units.cost, units.budget).mask,
    }
    greedy = knapsack_by_floe(units)
    bound = torch.tensor([greedy.upper_bound, units.budget], dtype=torch.float64)
    near = torch.tensor([greedy.value, units.budget], dtype=torch.float64) * (1 - 1e-12)

    def checks(program: Program) -> list[Check]:
        mask = program(units)
        spent = max(units.budget, float(units.cost[mask].sum()))
        actual = torch.tensor([float(units.value[mask].sum()), spent], dtype=torch.float64)
        names = ("value", "cost above the budget")
        numbers = (part.split(1) for part in (actual, bound, near))
        return [Check(*each, factor=1.0) for each in zip(names, *numbers, strict=True)]

    return _candidates(programs, units, checks)


def _candidates(
    programs: dict[str, Program], units: Units, checks: Callable[..., list[Check]]
) -> list[Candidate]:
    return [
        Candidate(name, partial(program, units), partial(checks, program))
        for name, program in programs.items()
    ]


_PROBLEMS = {"two-class": two_class, "knapsack": knapsack}


def exponent(sizes: Sequence[float], milliseconds: Sequence[float]) -> float:
    """The power of the size with which time grows: the slope of a line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(milliseconds), 1)[0])


@dataclass(frozen=True)
class Options:
    """What is timed."""

    kind: str = option("fisher", choices=("fisher", "taylor", "uniform"))
    sizes: tuple[int, ...] = option(
        (10_000, 100_000, 1_000_000, 10_000_000), "units, ...", several(lambda t: int(float(t)))
    )
    plot: Path | None = option(None, ".png, .svg or .pdf", Path, metavar="PICTURE")


COMMAND = Command("solver", __doc__, harness.Timing, Options)


def main(arguments: list[str] | None = None) -> None:
    """Print a table for every problem and size; write records and picture where asked."""
    timing, options = COMMAND.parse(arguments)
    bench, rows = Bench.begin(timing), []
    for size in options.sizes:
        units = Units.draw(size, options.kind)
        rounds = timing.rounds if size <= _RESUMMED else min(timing.rounds, 5)
        for problem, candidates in _PROBLEMS.items():
            case = {"problem": problem, "units": size, "kind": options.kind, "clock": timing.clock}
            timed, _ = bench.time(case, candidates(units), "numpy", rounds=rounds, warmup=1)
            print(f"\n{harness.title(case)}\n{harness.show(timed, COLUMNS)}", flush=True)
            rows += timed
    for (problem, name), line in _lines(rows).items():
        if len(line) > 1:
            print(f"{problem} {name}: time grows as n^{exponent(*zip(*line, strict=True)):.2f}")
    harness.save(timing.json, rows)
    if options.plot:
        draw(rows, options.plot)


def _times_as_fast(key: str) -> Callable[[Row], str]:
    return lambda row: f"{1 / row['ratio'][key]:.1f}"


COLUMNS: list[Column] = [
    ("", "case.implementation:"),
    *harness.spread("ms median", "milliseconds", ".2f", (*SPREAD, "min")),
    ("times as fast", _times_as_fast("median")),
    ("p20", _times_as_fast("p80")),
    ("p80", _times_as_fast("p20")),
]


def draw(rows: Sequence[Row], target: Path) -> None:
    """Milliseconds over units, both logarithmic, a line for every program."""
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = dict(zip(_PROBLEMS, figure.subplots(1, len(_PROBLEMS)), strict=True))
    for (problem, name), line in _lines(rows).items():
        panels[problem].loglog(*zip(*line, strict=True), marker=".", label=name)
    for problem, panel in panels.items():
        panel.set(title=problem, xlabel="units", ylabel="milliseconds, median")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.savefig(target)


def _lines(rows: Sequence[Row]) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(units, median milliseconds) of every program."""
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        case = row["case"]
        point = case["units"], row["milliseconds"]["median"]
        lines.setdefault((case["problem"], case["implementation"]), []).append(point)
    return lines


if __name__ == "__main__":
    main()
