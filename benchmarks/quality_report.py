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
from numpy.typing import NDArray

from benchmarks import harness
from floe.artifacts.schema import document, parse
from floe.selection.placement import Placement
from floe.storage import read_json

DEFAULT = "adapter_fisher"
RESAMPLES = 2000
SCOUT = (0, 0)  # the seed and the draw that an arm's learning rate is chosen on
Result = dict[str, Any]
Floats = NDArray[np.float64]
Corrections = dict[tuple[str, int, int], float]  # of a run's test loss, by `key_of`


@dataclass(frozen=True)
class Records:
    """What the files of a folder hold: runs, settings, base losses by (mix, seed), and step times.

    The keys of the times are those of :func:`place_of`.
    """

    runs: list[Result]
    bases: dict[tuple[str, int], Result]
    times: dict[tuple[str, str], float]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """Two arms on the same rows of one seed: summed losses [S] and [D, S], target tokens [S]."""

    own: Floats
    others: Floats
    tokens: Floats

    def difference(self, rows: Any, draws: Any) -> float:
        """Mean loss per token of the own arm minus the mean of the other's draws."""
        gap = self.own[rows] - self.others[draws][:, rows].mean(0)
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


def place_of(record: Result) -> tuple[str, str]:
    """The mix and where the adapters were: what decides how long a step takes."""
    return record["mix"], json.dumps(document(parse(Placement, record, "runs")), sort_keys=True)


def last_loss(run: Result) -> float:
    """Validation loss at the end."""
    return float(run["validation"][-1][1])


def rates(runs: list[Result], mix: str, arm: str, steps: int) -> dict[float, float]:
    """Rate -> validation loss at the end, of the runs that choose the arm's rate."""
    return {
        run["rate"]: last_loss(run)
        for run in runs
        if (run["mix"], run["arm"], run["steps"]) == (mix, arm, steps)
        and (run["seed"], run["draw"]) == SCOUT
    }


def best_rate(runs: list[Result], mix: str, arm: str, steps: int) -> float:
    """The rate of lowest validation loss on ``SCOUT``, ties to the lower rate.

    Raises:
        ValueError: no such run is there yet.
    """
    found = rates(runs, mix, arm, steps)
    if not found:
        raise ValueError(
            f"the rate of {arm} on {mix}, {steps} steps, is chosen on seed {SCOUT[0]}: run it first"
        )
    return min(sorted(found), key=lambda rate: found[rate])


def compare(cells: list[Cell], resamples: int = RESAMPLES, seed: int = 41) -> dict[str, float]:
    """Mean over seeds of the difference, and its interval.

    Raises:
        ValueError: without any seed.
    """
    if not cells:
        raise ValueError("cells must hold at least one seed, got none")
    rng = np.random.default_rng(seed)

    def drawn() -> float:
        taken = [cells[i] for i in rng.integers(0, len(cells), len(cells))]
        gaps = [
            cell.difference(
                rng.integers(0, len(cell.own), len(cell.own)),
                rng.integers(0, len(cell.others), len(cell.others)),
            )
            for cell in taken
        ]
        return float(np.mean(gaps))

    value = float(np.mean([cell.difference(slice(None), slice(None)) for cell in cells]))
    low, high = np.percentile([drawn() for _ in range(resamples)], [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}


def cell(own: Result, others: list[Result], corrections: Corrections | None = None) -> Cell:
    """Losses of two arms on one seed's test rows, each run's with its correction per token.

    Raises:
        ValueError: the rows are not the same.
    """
    for other in others:
        if other["test"]["tokens"] != own["test"]["tokens"]:
            raise ValueError("arms must be measured on the same rows, got other token counts")
    tokens = np.array(own["test"]["tokens"], dtype=np.float64)

    def losses(run: Result) -> Floats:
        correction = 0.0 if corrections is None else corrections[key_of(run)]
        return np.array(run["test"]["nll"]) + correction * tokens

    return Cell(losses(own), np.array([losses(other) for other in others]), tokens)


def key_of(run: Result) -> tuple[str, int, int]:
    """What tells the runs of one mix, number of steps and rate apart."""
    return run["arm"], run["seed"], run["draw"]


def loss_at(run: Result, base: Result, step: float) -> float:
    """Validation loss at a step of a run, linear between its points; step 0 is the base model."""
    points = [(0, base["validation"]["mean"]), *run["validation"]]
    return float(np.interp(step, [p[0] for p in points], [p[1] for p in points]))


def summarise(records: Records) -> list[dict[str, Any]]:
    """One row for each mix, number of steps and arm, the default first."""
    keys = sorted({(run["mix"], run["steps"]) for run in records.runs})
    return [row for mix, steps in keys for row in _group(records, mix, steps)]


def _group(records: Records, mix: str, steps: int) -> list[dict[str, Any]]:
    same = [run for run in records.runs if (run["mix"], run["steps"]) == (mix, steps)]
    arms: dict[str, list[Result]] = {}
    for arm in sorted({run["arm"] for run in same}, key=lambda name: (name != DEFAULT, name)):
        if rates(same, mix, arm, steps):
            rate = best_rate(same, mix, arm, steps)
            arms[arm] = [run for run in same if (run["arm"], run["rate"]) == (arm, rate)]
    budget = _budget(records, mix, steps, arms)
    corrections = None if budget is None else _corrections(records, arms, budget)
    rows = [_row(records, runs) for runs in arms.values()]
    for row, runs in zip(rows, arms.values(), strict=True):
        default = [] if runs is arms.get(DEFAULT) else arms.get(DEFAULT, [])
        row["rates"] = {f"{r:g}": v for r, v in rates(same, mix, row["arm"], steps).items()}
        row["default_minus_this"] = _against(default, runs, None)
        row["equal_seconds"] = budget
        if corrections is not None:
            row |= _at_equal_seconds(records, default, runs, corrections)
    return rows


def _budget(records: Records, mix: str, steps: int, arms: dict[str, list[Result]]) -> float | None:
    """Seconds of the group's fastest run; None while one of its runs has not been timed."""
    times = [records.times.get(place_of(run)) for runs in arms.values() for run in runs]
    known = [seconds for seconds in times if seconds is not None]
    return steps * min(known) if known and len(known) == len(times) else None


def _corrections(records: Records, arms: dict[str, list[Result]], budget: float) -> Corrections:
    """Validation loss at the step that the budget allows minus that at the end, by run."""
    found = {}
    for run in (run for runs in arms.values() for run in runs):
        base = records.bases[run["mix"], run["seed"]]
        step = budget / records.times[place_of(run)]
        found[key_of(run)] = loss_at(run, base, step) - last_loss(run)
    return found


def _row(records: Records, runs: list[Result]) -> dict[str, Any]:
    first = runs[0]
    bases = [records.bases[run["mix"], run["seed"]] for run in runs]
    rises = [run["other"]["mean"] - b["other"]["mean"] for run, b in zip(runs, bases, strict=True)]
    marks = [step for step, _ in first["validation"]]
    return {
        "mix": first["mix"], "steps": first["steps"], "arm": first["arm"], "rate": first["rate"],
        "seeds": len({run["seed"] for run in runs}), "runs": len(runs),
        "base": _over_seeds(runs, [base["test"]["mean"] for base in bases]),
        "test": _over_seeds(runs, [run["test"]["mean"] for run in runs]),
        "spread": float(np.std([run["test"]["mean"] for run in runs])),
        "validation": [
            [step, _over_seeds(runs, [run["validation"][i][1] for run in runs])]
            for i, step in enumerate(marks)
        ],
        "forgetting": _over_seeds(runs, rises),
        "layers": [[run["seed"], run["draw"], run["layers"]] for run in runs],
        "step_seconds": None, "at_equal_seconds": None, "default_minus_this_at_equal_seconds": None,
    }  # fmt: skip


def _at_equal_seconds(
    records: Records, default: list[Result], runs: list[Result], corrections: Corrections
) -> dict[str, Any]:
    """The part of a row that needs step times."""
    losses = [run["test"]["mean"] + corrections[key_of(run)] for run in runs]
    return {
        "step_seconds": _over_seeds(runs, [records.times[place_of(run)] for run in runs]),
        "at_equal_seconds": _over_seeds(runs, losses),
        "default_minus_this_at_equal_seconds": _against(default, runs, corrections),
    }


def _over_seeds(runs: list[Result], values: list[float]) -> float:
    """Mean over the seeds of the mean over each seed's draws."""
    groups: dict[int, list[float]] = {}
    for run, value in zip(runs, values, strict=True):
        groups.setdefault(run["seed"], []).append(value)
    return float(np.mean([np.mean(group) for group in groups.values()]))


def _against(
    default: list[Result], runs: list[Result], corrections: Corrections | None
) -> dict[str, Any] | None:
    """The default minus an arm on the seeds both have; None without any."""
    pairs = [(own, [run for run in runs if run["seed"] == own["seed"]]) for own in default]
    found = [cell(own, others, corrections) for own, others in pairs if others]
    if not found:
        return None
    gaps = [(one.own.sum() - one.others.sum(1)).tolist() for one in found]
    lower = sum(gap < 0 for seed in gaps for gap in seed)
    counts = {"lower": lower, "pairs": sum(map(len, gaps)), "seeds": len(found)}
    return {**compare(found), **counts}


def tables(rows: list[dict[str, Any]]) -> str:
    """The rows as text, one table for each mix and number of steps."""
    parts = []
    for mix, steps in dict.fromkeys((row["mix"], row["steps"]) for row in rows):
        group = [row for row in rows if (row["mix"], row["steps"]) == (mix, steps)]
        seconds = group[0]["equal_seconds"]
        budget = "not timed" if seconds is None else f"{seconds:.0f} s"
        parts.append(
            f"{mix}, {steps} steps; test loss of the base model {group[0]['base']:.3f}; "
            f"equal seconds: {budget}\n" + _losses_table(group) + "\n\n" + _curves_table(group)
        )
    return "\n\n".join(parts)


def _losses_table(group: list[dict[str, Any]]) -> str:
    header = ["arm", "seeds", "runs", "rate", "test loss", "default minus it", "lower in",
              "forgetting", "s/step", "at equal s", "default minus it", "lower in"]  # fmt: skip
    return harness.table(header, [_cells(row) for row in group])


def _cells(row: dict[str, Any]) -> list[str]:
    timed = row["step_seconds"] is not None
    return [
        row["arm"], str(row["seeds"]), str(row["runs"]), f"{row['rate']:g}", f"{row['test']:.4f}",
        *_gap(row["default_minus_this"]), f"{row['forgetting']:+.4f}",
        f"{row['step_seconds']:.3f}" if timed else "-",
        f"{row['at_equal_seconds']:.4f}" if timed else "-",
        *_gap(row["default_minus_this_at_equal_seconds"]),
    ]  # fmt: skip


def _gap(gap: dict[str, Any] | None) -> tuple[str, str]:
    if gap is None:
        return "", ""
    interval = f"{gap['value']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]"
    return interval, f"{gap['lower']} of {gap['pairs']}"


def _curves_table(group: list[dict[str, Any]]) -> str:
    steps = [step for step, _ in group[0]["validation"]]
    grid = list(dict.fromkeys(rate for row in group for rate in row["rates"]))
    header = ["validation loss at step", *map(str, steps), *(f"end, {rate}" for rate in grid)]
    lines = []
    for row in group:
        ends = [f"{row['rates'][r]:.3f}" if r in row["rates"] else "-" for r in grid]
        lines.append([row["arm"], *(f"{loss:.3f}" for _, loss in row["validation"]), *ends])
    return harness.table(header, lines)
