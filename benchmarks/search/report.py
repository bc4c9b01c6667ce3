"""Tables of `benchmarks.search` from the files of a folder alone: surfaces, replays, noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import harness, resume
from benchmarks.harness import Column, Row
from benchmarks.search.replay import CHECKPOINTS, GOOD, STRATEGIES, Surface, noise, summarise
from benchmarks.search.surface import PAPER_SPACE
from floe.rank_search.space import SearchSpace
from floe.storage import read_json

_MEANING = {
    "best": "the lowest loss of the surface",
    "1 SE": "not above it by more than one standard error of the paired difference",
    "1 %": "not above it by more than 1 % of what training gained",
}
_NAMES = {
    "grid": "grid in random order",
    "random": "random",
    "tpe": "tpe, multivariate",
    "paper": "tpe, univariate (paper)",
}


def collect(folder: Path, surfaces: list[Surface], repeats: int, startup_trials: int) -> Row:
    """Everything the tables show, JSON-ready: rows by strategy, surfaces, noise, environments.

    ``surfaces`` are those of the folder, each replayed ``repeats`` times by every strategy.
    """
    settings = read_json(folder / "settings.json")
    points_of = [read_json(file) for file in sorted(folder.glob("points/*.json"))]
    environments = resume.environments(points_of)
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
        "good": {name: sorted(map(list, good)) for name, good in surface.good().items()},
        "points": [
            {"rank": rank, "experts": experts, "loss": value, "seconds": seconds}
            for (rank, experts), value, seconds in zip(
                points, loss.tolist(), surface.seconds.tolist(), strict=True
            )
        ],
    }


def tables(records: Row) -> str:
    """What :func:`collect` returns, as text."""
    rows = records["rows"]
    case = rows[0]["case"]
    layers = "all layers" if case["layers"] is None else f"{case['layers']} layers"
    title = (
        f"{case['model']}, {case['mix']}, {case['steps']} steps of {case['batch_size']} rows, "
        f"rate {case['rate']:g}, {layers}, {case['sizes'][1]} validation rows, {case['device']}, "
        f"{case['clock']} time; scale: {case['scale']}, {case['points']} points (the paper's space "
        f"has {len(PAPER_SPACE.points())})"
    )
    parts = [title, *(_surface_table(surface) for surface in records["surfaces"])]
    parts.append(_noise_text(records["noise"]))
    parts += [_trials_table(rows, name) for name in GOOD]
    marks = [trials for trials in CHECKPOINTS if trials < case["points"]]
    if marks:
        parts.append(harness.show(rows, _regrets(marks)))
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


def _strategy(row: Row) -> str:
    return _NAMES[row["case"]["implementation"]]


def _trials_table(rows: list[Row], name: str) -> str:
    count = f"{rows[0]['case']['points']}"
    columns: list[Column] = [
        (f"trials until: {name}", _strategy),
        *((key, f"found.{name}.{key}:g") for key in ("median", "p20", "p80")),
        ("mean", f"found.{name}.mean:.2f"),
        ("95 %", lambda row: "[{low:.2f}, {high:.2f}]".format(**row["found"][name])),
        ("exact mean", _exact(name)),
        ("of all trials", _share(name, "share_of_trials")),
        ("of all seconds", _share(name, "share_of_seconds")),
    ]
    grid = ("grid, all points", *(count,) * 4, "-", "-", "100 %", "100 %")
    table = harness.show(rows, columns, grid)
    return f"{table}\n({name}: {_MEANING[name]})"


def _exact(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        in_order = row["case"]["implementation"] in ("grid", "random")
        return f"{row['found'][name]['expected_in_random_order']:.2f}" if in_order else "-"

    return cell


def _share(name: str, key: str) -> Callable[[Row], str]:
    return lambda row: f"{100 * row['found'][name][key]:.0f} %"


def _regrets(marks: list[int]) -> list[Column]:
    def after(trials: int) -> Callable[[Row], str]:
        return lambda row: f"{row['regret']['mean'][trials - 1]:.5f}"

    columns: list[Column] = [("mean regret, nats per token, after", _strategy)]
    return [*columns, *((f"{trials} trials", after(trials)) for trials in marks)]
