"""Draw the JSON file of `benchmarks.latency` or `benchmarks.search`.

``python -m benchmarks.plot RECORDS.json PICTURE``
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.harness import Row, title
from floe.storage import read_json

OWN = ("implementation", "way", "layers", "adapted")  # of a row; the rest is its case's


def case_of(row: Row) -> str:
    """What rows of one case have in common."""
    return str({k: v for k, v in sorted(row["case"].items()) if k not in OWN})


def by_case(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of one case together, in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(case_of(row), []).append(row)
    return list(groups.values())


def draw(source: Path, target: Path) -> None:
    """One panel for each case of the records in ``source``, written to ``target``."""
    data = read_json(source)
    groups = by_case(data.get("rows", []))
    if not groups:
        raise ValueError(f"source must hold at least one record, got none in {source}")
    figure = Figure(figsize=(7.5, 3.4 * len(groups) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for panel, rows in zip(panels, groups, strict=True):
        _PANELS[rows[0]["case"]["table"]](panel, rows)
        panel.set_title(textwrap.fill(title(rows[0]["case"], *OWN), 120), fontsize=7)
        panel.grid(axis="y", alpha=0.3)
    environment = data["rows"][0]["environment"]
    machine = environment["gpu"] or environment["cpu"]
    figure.supxlabel(f"{machine}; bands and error bars: p20 to p80", fontsize=8)
    figure.savefig(target)


def _against_layers(panel: Any, rows: Sequence[Row]) -> None:
    """Ratio to the frozen model against the number of adapted layers, a line for every way."""
    ways = dict.fromkeys(row["case"]["way"] for row in rows)
    for place, way in enumerate(way for way in ways if way != "frozen"):
        line = sorted(
            (row for row in rows if row["case"]["way"] in (way, "frozen")),
            key=lambda row: row["case"]["adapted"],
        )
        layers = [row["case"]["adapted"] for row in line]
        low, middle, high = ([row["ratio"][k] for row in line] for k in ("p20", "median", "p80"))
        colour = f"C{place}"
        panel.plot(layers, middle, color=colour, marker=".", label=way)
        panel.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
    panel.set(xlabel="adapted layers", ylabel="time over frozen")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(fontsize=7)


def _phases(panel: Any, rows: Sequence[Row]) -> None:
    """Milliseconds of the step's phases, one on another."""
    names = [row["case"]["implementation"] for row in rows]
    left = [0.0] * len(rows)
    for place, phase in enumerate(("forward", "backward", "optimiser")):
        widths = [row["phases_ms"][phase]["median"] for row in rows]
        panel.barh(names, widths, left=left, color=f"C{place}", label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    panel.invert_yaxis()
    panel.set_xlabel("ms a step, medians of the phases")
    panel.tick_params(axis="y", labelsize=7)
    panel.legend(fontsize=7)


def _ratios(panel: Any, rows: Sequence[Row]) -> None:
    """Ratio to the frozen linear."""
    names = [row["case"]["implementation"] for row in rows]
    low, middle, high = ([row["ratio"][k] for row in rows] for k in ("p20", "median", "p80"))
    below = [m - value for m, value in zip(middle, low, strict=True)]
    above = [value - m for m, value in zip(middle, high, strict=True)]
    panel.barh(names, middle, xerr=[below, above], color="C0", ecolor="#444444")
    panel.invert_yaxis()
    panel.set_xlabel("time over the frozen linear")
    panel.tick_params(axis="y", labelsize=7)


def _regret(panel: Any, rows: Sequence[Row]) -> None:
    """Lowest loss so far minus the surface's best against trials, a line for every strategy."""
    for place, row in enumerate(rows):
        regret, trials = row["regret"], range(1, len(row["regret"]["mean"]) + 1)
        name, colour = row["case"]["implementation"], f"C{place}"
        panel.plot(trials, regret["mean"], color=colour, label=f"{name}, mean")
        low, high = regret["p20"], regret["p80"]
        panel.fill_between(trials, low, high, color=colour, alpha=0.15, linewidth=0)
    panel.set(xlabel="trials", ylabel="regret, nats per token")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(fontsize=7)


_PANELS = {"4": _against_layers, "5": _phases, "op": _ratios, "8": _regret}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("source", type=Path, metavar="RECORDS.json")
    parser.add_argument("target", type=Path, metavar="PICTURE", help=".svg, .png or .pdf")
    given = parser.parse_args(arguments)
    draw(given.source, given.target)


if __name__ == "__main__":
    main()
