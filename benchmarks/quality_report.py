"""Tables of `benchmarks.quality` from the files of its runs alone.

The arm ``DEFAULT`` is compared with every other, on the same rows of the seeds that both have.
Intervals are 95 % percentiles of a two-level bootstrap: seeds, and the draws of a random arm, are
drawn with replacement, then rows within each seed. With one seed they hold no seed noise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import harness
from floe.runs import read_json
from floe.selection.placement import Placement

DEFAULT = "adapter_fisher"
RESAMPLES = 2000
SCOUT = (0, 0)  # the seed and the draw that an arm's learning rate is chosen on
Result = dict[str, Any]
Floats = NDArray[np.float64]


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
    return record["mix"], json.dumps(Placement.read(record).document(), sort_keys=True)


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


def cell(own: Result, others: list[Result]) -> Cell:
    """Losses of two arms on one seed's test rows; ValueError if the rows are not the same."""
    tokens = own["test"]["tokens"]
    for other in others:
        if other["test"]["tokens"] != tokens:
            raise ValueError("arms must be measured on the same rows, got other token counts")
    return Cell(
        np.array(own["test"]["nll"]),
        np.array([other["test"]["nll"] for other in others]),
        np.array(tokens, dtype=np.float64),
    )


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
    fastest = _fastest(records, mix, arms)
    budget = None if fastest is None else steps * fastest
    rows = [_row(records, runs, budget) for runs in arms.values()]
    for row, runs in zip(rows, arms.values(), strict=True):
        row["rates"] = {f"{r:g}": v for r, v in rates(same, mix, row["arm"], steps).items()}
        row["default_minus_this"] = _against(arms.get(DEFAULT, []), runs)
    return rows


def _step_seconds(records: Records, run: Result) -> float | None:
    return records.times.get(place_of(run))


def _fastest(records: Records, mix: str, arms: dict[str, list[Result]]) -> float | None:
    """The shortest step of a group; None while one of its runs has not been timed."""
    times = [_step_seconds(records, run) for runs in arms.values() for run in runs]
    known = [seconds for seconds in times if seconds is not None]
    return min(known) if known and len(known) == len(times) else None


def _row(records: Records, runs: list[Result], budget: float | None) -> dict[str, Any]:
    first = runs[0]
    bases = [records.bases[run["mix"], run["seed"]] for run in runs]
    rises = [run["other"]["mean"] - b["other"]["mean"] for run, b in zip(runs, bases, strict=True)]
    marks = [step for step, _ in first["validation"]]
    row: dict[str, Any] = {
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
        "step_seconds": None, "equal_seconds": None, "at_equal_seconds": None,
    }  # fmt: skip
    if budget is not None:
        seconds = [records.times[place_of(run)] for run in runs]
        found = [
            loss_at(run, b, budget / s) for run, b, s in zip(runs, bases, seconds, strict=True)
        ]
        row["step_seconds"] = _over_seeds(runs, seconds)
        row["equal_seconds"], row["at_equal_seconds"] = budget, _over_seeds(runs, found)
    return row


def _over_seeds(runs: list[Result], values: list[float]) -> float:
    """Mean over the seeds of the mean over each seed's draws."""
    groups: dict[int, list[float]] = {}
    for run, value in zip(runs, values, strict=True):
        groups.setdefault(run["seed"], []).append(value)
    return float(np.mean([np.mean(group) for group in groups.values()]))


def _against(default: list[Result], runs: list[Result]) -> dict[str, Any] | None:
    """The default minus an arm on the seeds both have; None for itself, or without any."""
    if not default or runs is default:
        return None
    pairs = [(own, [run for run in runs if run["seed"] == own["seed"]]) for own in default]
    pairs = [(own, others) for own, others in pairs if others]
    if not pairs:
        return None
    signs = [own["test"]["mean"] < one["test"]["mean"] for own, others in pairs for one in others]
    found: dict[str, Any] = dict(compare([cell(own, others) for own, others in pairs]))
    return found | {"lower": sum(signs), "pairs": len(signs), "seeds": len(pairs)}


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
    header = ["arm", "seeds", "runs", "rate", "test loss", f"{DEFAULT} minus it", "lower in",
              "forgetting", "s/step", "at equal s"]  # fmt: skip
    return harness.table(header, [_cells(row) for row in group])


def _cells(row: dict[str, Any]) -> list[str]:
    gap, timed = row["default_minus_this"], row["step_seconds"] is not None
    return [
        row["arm"], str(row["seeds"]), str(row["runs"]), f"{row['rate']:g}", f"{row['test']:.4f}",
        "" if gap is None else f"{gap['value']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]",
        "" if gap is None else f"{gap['lower']} of {gap['pairs']}", f"{row['forgetting']:+.4f}",
        f"{row['step_seconds']:.3f}" if timed else "-",
        f"{row['at_equal_seconds']:.4f}" if timed else "-",
    ]  # fmt: skip


def _curves_table(group: list[dict[str, Any]]) -> str:
    steps = [step for step, _ in group[0]["validation"]]
    grid = list(dict.fromkeys(rate for row in group for rate in row["rates"]))
    header = ["validation loss at step", *map(str, steps), *(f"end, {rate}" for rate in grid)]
    lines = []
    for row in group:
        ends = [f"{row['rates'][r]:.3f}" if r in row["rates"] else "-" for r in grid]
        lines.append([row["arm"], *(f"{loss:.3f}" for _, loss in row["validation"]), *ends])
    return harness.table(header, lines)
