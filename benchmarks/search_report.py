"""Tables of `benchmarks.search` from the files of a folder alone: surfaces, replays, noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.search_replay import (
    CHECKPOINTS,
    GOOD,
    STRATEGIES,
    Surface,
    noise,
    summarise,
)
from benchmarks.search_surface import PAPER_SPACE
from floe.rank_search.space import SearchSpace
from floe.storage import read_json

Row = dict[str, Any]
_MEANING = {
    "best": "the lowest loss of the surface",
    "1 SE": "not above it by more than one standard error of the paired difference",
    "1 %": "not above it by more than 1 % of what training gained",
}
_NAMES = {
    "grid": "grid in random order", "random": "random", "tpe": "tpe, multivariate",
    "paper": "tpe, univariate (paper)",
}  # fmt: skip


def collect(folder: Path, surfaces: list[Surface], repeats: int, startup_trials: int) -> Row:
    """Everything the tables show, JSON-ready: rows by strategy, surfaces, noise, environments.

    ``surfaces`` are those of the folder, each replayed ``repeats`` times by every strategy.
    """
    settings = read_json(folder / "settings.json")
    environments: list[Row] = []
    for file in sorted(folder.glob("points/*.json")):
        if (environment := read_json(file)["environment"]) not in environments:
            environments.append(environment)
    points = surfaces[0].space.points()
    case = {
        **{name: value for name, value in settings.items() if name != "format"},
        "model": Path(settings["model"]).name,
        "table": "8",
        "points": len(points),
        "seeds": [surface.seed for surface in surfaces],
        "replays": repeats * len(surfaces),
        "startup_trials": startup_trials,
        "scale": _scale(surfaces[0].space),
    }
    rows = [
        {
            "environment": environments[0],
            "case": {**case, "implementation": strategy},
            **summarise(surfaces, strategy, repeats, startup_trials),
        }
        for strategy in STRATEGIES
    ]
    return {
        "rows": rows,
        "surfaces": [_surface(surface) for surface in surfaces],
        "noise": noise(surfaces),
        "environments": environments,
    }


def _scale(space: SearchSpace) -> str:
    """Full is the paper's space alone, reduced a part of it."""
    if space == PAPER_SPACE:
        return "full"
    return "reduced" if set(space.points()) <= set(PAPER_SPACE.points()) else "other"


def _surface(surface: Surface) -> Row:
    loss, points = surface.loss, surface.space.points()
    return {
        "seed": surface.seed,
        "base": surface.base,
        "best": float(loss.min()),
        "worst": float(loss.max()),
        "median_error": float(np.median(surface.error)),
        "seconds": float(surface.seconds.sum()),
        "good": {name: sorted(map(list, found)) for name, found in surface.good().items()},
        "points": [
            {"rank": rank, "experts": experts, "loss": one, "seconds": seconds}
            for (rank, experts), one, seconds in zip(
                points, loss.tolist(), surface.seconds.tolist(), strict=True
            )
        ],
    }


def tables(found: Row) -> str:
    """What :func:`collect` found, as text."""
    case = found["rows"][0]["case"]
    layers = "all layers" if case["layers"] is None else f"{case['layers']} layers"
    title = (
        f"{case['model']}, {case['mix']}, {case['steps']} steps of {case['batch_size']} rows, "
        f"rate {case['rate']:g}, {layers}, {case['sizes'][1]} validation rows, {case['device']}, "
        f"{case['clock']} time; scale: {case['scale']}, {case['points']} points (the paper's space "
        f"has {len(PAPER_SPACE.points())})"
    )
    parts = [title, *(_surface_table(surface) for surface in found["surfaces"])]
    parts.append(_noise_text(found["noise"]))
    parts += [_found_table(found["rows"], name) for name in GOOD]
    marks = [trials for trials in CHECKPOINTS if trials < case["points"]]
    if marks:
        parts.append(_regret_table(found["rows"], marks))
    return "\n\n".join(parts)


def _surface_table(surface: Row) -> str:
    loss = {(point["rank"], point["experts"]): point["loss"] for point in surface["points"]}
    ranks, experts = (sorted({point[i] for point in loss}) for i in (0, 1))
    rows = [(f"r={r}", *(f"{loss[r, m]:.4f}" for m in experts)) for r in ranks]
    header = (f"validation loss, seed {surface['seed']}", *(f"M={m}" for m in experts))
    best, count = surface["good"]["best"][0], len(loss)
    shares = ", ".join(f"{len(surface['good'][name])} {name}" for name in GOOD[1:])
    return (
        f"{harness.table(header, rows)}\nbest {surface['best']:.4f} at r={best[0]}, M={best[1]}; "
        f"worst {surface['worst']:.4f}, {surface['worst'] - surface['best']:.4f} above it; base "
        f"model {surface['base']:.4f}\nof {count} points, good: {shares} (median SE "
        f"{surface['median_error']:.4f}); all points took {surface['seconds']:.0f} s"
    )


def _noise_text(noise: Row | None) -> str:
    if noise is None:
        return "one seed: what training's own noise adds is not measured"
    return (
        f"between seeds a point's loss varies by {noise['seed_sd']:.4f} (sd), between points by "
        f"{noise['point_sd']:.4f}; rank correlation of the surfaces {noise['rank_correlation']:.2f}"
        f"\none seed's best point is {noise['regret_elsewhere']:.4f} above the best of another "
        f"seed, a point at random {noise['regret_of_any']:.4f}"
    )


def _found_table(rows: list[Row], name: str) -> str:
    count = rows[0]["case"]["points"]
    lines = [("grid, all points", *(f"{count}",) * 4, "-", "-", "100 %", "100 %")]
    for row in rows:
        one, strategy = row["found"][name], row["case"]["implementation"]
        in_order = strategy in ("grid", "random")
        lines.append((
            _NAMES[strategy], f"{one['median']:g}", f"{one['p20']}", f"{one['p80']}",
            f"{one['mean']:.2f}", f"[{one['low']:.2f}, {one['high']:.2f}]",
            f"{one['expected_in_random_order']:.2f}" if in_order else "-",
            f"{one['share_of_trials']:.0%}".replace("%", " %"),
            f"{one['share_of_seconds']:.0%}".replace("%", " %"),
        ))  # fmt: skip
    header = (f"trials until: {name}", "median", "p20", "p80", "mean", "95 %", "exact mean",
              "of all trials", "of all seconds")  # fmt: skip
    return f"{harness.table(header, lines)}\n({name}: {_MEANING[name]})"


def _regret_table(rows: list[Row], marks: list[int]) -> str:
    lines = [
        (_NAMES[row["case"]["implementation"]],
         *(f"{row['regret']['mean'][trials - 1]:.5f}" for trials in marks))
        for row in rows
    ]  # fmt: skip
    header = ("mean regret, nats per token, after", *(f"{trials} trials" for trials in marks))
    return harness.table(header, lines)
