"""Tables of `benchmarks.quality` from the files of its runs alone.

The arm ``DEFAULT`` is compared with every other, on the same rows of the seeds that both have.
Intervals are 95 % percentiles of a two-level bootstrap: seeds, and the draws of a random arm, are
drawn with replacement, then rows within each seed. With one seed they hold no seed noise.

At equal seconds: a run's test loss plus what its own validation loss still had to change from the
step that the budget allows to its end. The schedule of the learning rate is not cut to the budget,
and the intervals leave out the rows' noise in that correction: it is a difference along one run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.harness import Column, Row
from floe.artifacts.schema import document, parse
from floe.selection.placement import Placement
from floe.storage import read_json
from floe.types import Floats

DEFAULT = "adapter_fisher"
RESAMPLES = 2000
SCOUT = (0, 0)  # the seed and the draw that an arm's learning rate is chosen on
Corrections = dict[tuple[str, int, int], float]  # of a run's test loss, by `key_of`


@dataclass(frozen=True)
class Records:
    """What the files of a folder hold: runs, settings, base losses by (mix, seed), and step times.

    The keys of the times are those of :func:`place_of`.
    """

    runs: list[Row]
    bases: dict[tuple[str, int], Row]
    times: dict[tuple[str, str], float]
    settings: Row


@dataclass(frozen=True)
class Cell:
    """Two arms on the same rows of one seed: summed losses [S] and [D, S], target tokens [S]."""

    losses: Floats
    others: Floats
    tokens: Floats

    def difference(self, rows: Any, draws: Any) -> float:
        """Mean loss per token of the arm minus the mean of the other's draws."""
        gap = self.losses[rows] - self.others[draws][:, rows].mean(0)
        return float(gap.sum() / self.tokens[rows].sum())


def read(folder: Path) -> Records:
    """Everything that is there, in the order of the files' names."""
    runs = [read_json(file) for file in sorted(folder.glob("runs/*.json"))]
    bases = [read_json(file) for file in sorted(folder.glob("warmups/*/base.json"))]
    timed = folder / "times.json"
    rows = read_json(timed)["rows"] if timed.exists() else []
    return Records(
        runs,
        {(base["mix"], base["seed"]): base for base in bases},
        {place_of(row): row["seconds"]["median"] for row in rows},
        read_json(folder / "settings.json"),
    )


def place_of(record: Row) -> tuple[str, str]:
    """The mix and where the adapters were: what decides how long a step takes."""
    return record["mix"], json.dumps(document(parse(Placement, record, "runs")), sort_keys=True)


def last_loss(run: Row) -> float:
    """Validation loss at the end."""
    return float(run["validation"][-1][1])


def rates(runs: list[Row], mix: str, arm: str, steps: int) -> dict[float, float]:
    """Rate -> validation loss at the end, of the runs that choose the arm's rate."""
    return {
        run["rate"]: last_loss(run)
        for run in runs
        if (run["mix"], run["arm"], run["steps"]) == (mix, arm, steps)
        and (run["seed"], run["draw"]) == SCOUT
    }


def best_rate(runs: list[Row], mix: str, arm: str, steps: int) -> float:
    """The rate of lowest validation loss on ``SCOUT``, ties to the lower rate."""
    losses = rates(runs, mix, arm, steps)
    if not losses:
        raise ValueError(
            f"the rate of {arm} on {mix}, {steps} steps, is chosen on seed {SCOUT[0]}: run it first"
        )
    return min(sorted(losses), key=lambda rate: losses[rate])


def compare(cells: list[Cell], resamples: int = RESAMPLES, seed: int = 41) -> dict[str, float]:
    """Mean over seeds of the difference, and its interval."""
    if not cells:
        raise ValueError("cells must hold at least one seed, got none")
    rng = np.random.default_rng(seed)

    def indices(count: int) -> Any:
        return rng.integers(0, count, count)

    def drawn() -> float:
        taken = [cells[i] for i in indices(len(cells))]
        gaps = [c.difference(indices(len(c.losses)), indices(len(c.others))) for c in taken]
        return float(np.mean(gaps))

    value = float(np.mean([cell.difference(slice(None), slice(None)) for cell in cells]))
    low, high = np.percentile([drawn() for _ in range(resamples)], [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}


def cell(run: Row, others: list[Row], corrections: Corrections | None = None) -> Cell:
    """Losses of two arms on one seed's test rows, each run's with its correction per token."""
    for other in others:
        if other["test"]["tokens"] != run["test"]["tokens"]:
            raise ValueError("arms must be measured on the same rows, got other token counts")
    tokens = np.array(run["test"]["tokens"], dtype=np.float64)

    def losses(run: Row) -> Floats:
        correction = 0.0 if corrections is None else corrections[key_of(run)]
        return np.array(run["test"]["nll"]) + correction * tokens

    return Cell(losses(run), np.array([losses(other) for other in others]), tokens)


def key_of(run: Row) -> tuple[str, int, int]:
    """What tells the runs of one mix, number of steps and rate apart."""
    return run["arm"], run["seed"], run["draw"]


def loss_at(run: Row, base: Row, step: float) -> float:
    """Validation loss at a step of a run, linear between its points; step 0 is the base model."""
    points = [(0, base["validation"]["mean"]), *run["validation"]]
    return float(np.interp(step, [p[0] for p in points], [p[1] for p in points]))


def summarise(records: Records) -> list[Row]:
    """One row for each mix, number of steps and arm, the default first."""
    keys = sorted({(run["mix"], run["steps"]) for run in records.runs})
    return [row for mix, steps in keys for row in _group(records, mix, steps)]


def _group(records: Records, mix: str, steps: int) -> list[Row]:
    same = [run for run in records.runs if (run["mix"], run["steps"]) == (mix, steps)]
    arms: dict[str, list[Row]] = {}
    for arm in sorted({run["arm"] for run in same}, key=lambda name: (name != DEFAULT, name)):
        if rates(same, mix, arm, steps):
            rate = best_rate(same, mix, arm, steps)
            arms[arm] = [run for run in same if (run["arm"], run["rate"]) == (arm, rate)]
    budget = _budget(records, steps, arms)
    corrections = None if budget is None else _corrections(records, arms, budget)
    rows = []
    for arm, runs in arms.items():
        default = [] if arm == DEFAULT else arms.get(DEFAULT, [])
        row = _row(records, runs)
        row["rates"] = {f"{r:g}": v for r, v in rates(same, mix, arm, steps).items()}
        row["default_minus_this"] = _against(default, runs, None)
        row["equal_seconds"] = budget
        if corrections is not None:
            row |= _at_equal_seconds(records, default, runs, corrections)
        rows.append(row)
    return rows


def _budget(records: Records, steps: int, arms: dict[str, list[Row]]) -> float | None:
    """Seconds of the group's fastest run; None while one of its runs has not been timed."""
    times = [records.times.get(place_of(run)) for runs in arms.values() for run in runs]
    known = [seconds for seconds in times if seconds is not None]
    return steps * min(known) if known and len(known) == len(times) else None


def _corrections(records: Records, arms: dict[str, list[Row]], budget: float) -> Corrections:
    """Validation loss at the step that the budget allows minus that at the end, by run."""
    corrections = {}
    for run in (run for runs in arms.values() for run in runs):
        base = records.bases[run["mix"], run["seed"]]
        step = budget / records.times[place_of(run)]
        corrections[key_of(run)] = loss_at(run, base, step) - last_loss(run)
    return corrections


def _row(records: Records, runs: list[Row]) -> Row:
    first = runs[0]
    bases = [records.bases[run["mix"], run["seed"]] for run in runs]
    rises = [run["other"]["mean"] - b["other"]["mean"] for run, b in zip(runs, bases, strict=True)]
    tests = [run["test"]["mean"] for run in runs]
    later = ("step_seconds", "at_equal_seconds", "default_minus_this_at_equal_seconds")
    return {
        **{key: first[key] for key in ("mix", "steps", "arm", "rate")},
        "seeds": len({run["seed"] for run in runs}),
        "runs": len(runs),
        "base": _over_seeds(runs, [base["test"]["mean"] for base in bases]),
        "test": _over_seeds(runs, tests),
        "spread": float(np.std(tests)),
        "validation": [
            [step, _over_seeds(runs, [run["validation"][i][1] for run in runs])]
            for i, (step, _) in enumerate(first["validation"])
        ],
        "forgetting": _over_seeds(runs, rises),
        "layers": [[run["seed"], run["draw"], run["layers"]] for run in runs],
        **dict.fromkeys(later),
    }


def _at_equal_seconds(
    records: Records, default: list[Row], runs: list[Row], corrections: Corrections
) -> Row:
    """The part of a row that needs step times."""
    losses = [run["test"]["mean"] + corrections[key_of(run)] for run in runs]
    return {
        "step_seconds": _over_seeds(runs, [records.times[place_of(run)] for run in runs]),
        "at_equal_seconds": _over_seeds(runs, losses),
        "default_minus_this_at_equal_seconds": _against(default, runs, corrections),
    }


def _over_seeds(runs: list[Row], values: list[float]) -> float:
    """Mean over the seeds of the mean over each seed's draws."""
    groups: dict[int, list[float]] = {}
    for run, value in zip(runs, values, strict=True):
        groups.setdefault(run["seed"], []).append(value)
    return float(np.mean([np.mean(group) for group in groups.values()]))


def _against(default: list[Row], runs: list[Row], corrections: Corrections | None) -> Row | None:
    """The default minus an arm on the seeds both have; None without any."""
    pairs = [(run, [other for other in runs if other["seed"] == run["seed"]]) for run in default]
    cells = [cell(run, others, corrections) for run, others in pairs if others]
    if not cells:
        return None
    gaps = [gap for c in cells for gap in (c.losses.sum() - c.others.sum(1)).tolist()]
    counts = {"lower": sum(gap < 0 for gap in gaps), "pairs": len(gaps), "seeds": len(cells)}
    return {**compare(cells), **counts}


def tables(rows: list[Row]) -> str:
    """The rows as text, one table for each mix and number of steps."""
    parts = []
    for mix, steps in dict.fromkeys((row["mix"], row["steps"]) for row in rows):
        group = [row for row in rows if (row["mix"], row["steps"]) == (mix, steps)]
        seconds = group[0]["equal_seconds"]
        budget = "not timed" if seconds is None else f"{seconds:.0f} s"
        parts += [
            f"{mix}, {steps} steps; test loss of the base model {group[0]['base']:.3f}; "
            f"equal seconds: {budget}\n{harness.show(group, LOSSES)}",
            _curves(group),
        ]
    return "\n\n".join(parts)


def _gap(key: str) -> list[Column]:
    """The columns of a comparison: the interval, and in how many pairs the default is lower."""

    def cells(form: str) -> Any:
        return lambda row: "" if row[key] is None else form.format(**row[key])

    interval = "{value:+.4f} [{low:+.4f}, {high:+.4f}]"
    return [("default minus it", cells(interval)), ("lower in", cells("{lower} of {pairs}"))]


LOSSES: list[Column] = [
    ("arm", "arm:"),
    ("seeds", "seeds:"),
    ("runs", "runs:"),
    ("rate", "rate:g"),
    ("test loss", "test:.4f"),
    *_gap("default_minus_this"),
    ("forgetting", "forgetting:+.4f"),
    ("s/step", "step_seconds:.3f"),
    ("at equal s", "at_equal_seconds:.4f"),
    *_gap("default_minus_this_at_equal_seconds"),
]


def _curves(group: list[Row]) -> str:
    steps = [step for step, _ in group[0]["validation"]]
    grid = list(dict.fromkeys(rate for row in group for rate in row["rates"]))
    header = ["validation loss at step", *map(str, steps), *(f"end, {rate}" for rate in grid)]
    lines = []
    for row in group:
        ends = [f"{row['rates'][r]:.3f}" if r in row["rates"] else "-" for r in grid]
        lines.append([row["arm"], *(f"{loss:.3f}" for _, loss in row["validation"]), *ends])
    return harness.table(header, lines)
