"""Draw the JSON file of `benchmarks.latency` or `benchmarks.search`.

``python -m benchmarks.plot RECORDS.json PICTURE``
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from floe.storage import read_json

Row = dict[str, Any]
_OWN = ("implementation", "way", "layers", "adapted")
_COLOURS = ("#3d7ab8", "#c8553d", "#5b8c5a", "#8a6bb0", "#b08a2e", "#4aa3a2", "#7d7d7d", "#b0567f")


def draw(source: str, target: str) -> None:
    """One panel for each case of the records in ``source``, written to ``target``.

    Raises:
        ValueError: the file holds no records.
        FileError: it is no JSON object.
    """
    data = read_json(Path(source))
    groups: dict[str, list[Row]] = {}
    for row in data.get("rows", []):
        case = {k: v for k, v in sorted(row["case"].items()) if k not in _OWN}
        groups.setdefault(str(case), []).append(row)
    if not groups:
        raise ValueError(f"source must hold at least one record, got none in {source}")
    figure = Figure(figsize=(7.5, 3.2 * len(groups) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for panel, rows in zip(panels, groups.values(), strict=True):
        _PANELS[rows[0]["case"]["table"]](panel, rows)
        panel.set_title(_title(rows[0]), fontsize=8)
        panel.grid(axis="y", alpha=0.3)
    environment = data["rows"][0]["environment"]
    machine = environment["gpu"] or environment["cpu"]
    figure.supxlabel(f"{machine}; bands and error bars: p20 to p80", fontsize=8)
    figure.savefig(target)


def _title(row: Row) -> str:
    case = row["case"]
    if case["table"] == "8":
        return (
            f"{case['model']}, {case['mix']}, {case['steps']} steps, {case['points']} points, "
            f"{case['replays']} replays, {case['device']}, scale: {case['scale']}"
        )
    size = case["model"] or f"{case['columns']} to {case['features']}"
    cache = f" after {case['cache']} cached" if "cache" in case else ""
    batch = f", batch {case['batch']}" if "batch" in case else ""
    saved = ", gradient checkpointing" if case.get("gradient_checkpointing") else ""
    return (
        f"{case['what']}, {size}, T={case['tokens']}{cache}{batch}, M={case['experts']}, "
        f"r={case['rank']}, dropout {case['dropout']}{saved}, {case['dtype']}, "
        f"{case['device']}, scale: {case['scale']}"
    )


def _against_layers(panel: Any, rows: Sequence[Row]) -> None:
    """Ratio to the frozen model against the number of adapted layers, a line for every way."""
    ways = dict.fromkeys(row["case"]["way"] for row in rows)
    for place, way in enumerate(way for way in ways if way != "frozen"):
        line = sorted(
            (row for row in rows if row["case"]["way"] in (way, "frozen")),
            key=lambda row: row["case"]["adapted"],
        )
        layers = [row["case"]["adapted"] for row in line]
        low, middle, high = (
            [row["ratio"][key] for row in line] for key in ("p20", "median", "p80")
        )
        colour = _COLOURS[place % len(_COLOURS)]
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
        panel.barh(names, widths, left=left, color=_COLOURS[place], label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    _name_rows(panel, "ms a step, medians of the phases")
    panel.legend(fontsize=7)


def _ratios(panel: Any, rows: Sequence[Row]) -> None:
    """Ratio to the frozen linear."""
    found = [row["ratio"] for row in rows]
    middle = [one["median"] for one in found]
    error = [
        [one["median"] - one["p20"] for one in found],
        [one["p80"] - one["median"] for one in found],
    ]
    names = [row["case"]["implementation"] for row in rows]
    panel.barh(names, middle, xerr=error, color=_COLOURS[0], ecolor="#444444")
    _name_rows(panel, "time over the frozen linear")


def _regret(panel: Any, rows: Sequence[Row]) -> None:
    """Lowest loss so far minus the surface's best against trials, a line for every strategy."""
    for row, colour in zip(rows, _COLOURS, strict=False):
        regret, trials = row["regret"], range(1, len(row["regret"]["mean"]) + 1)
        name = row["case"]["implementation"]
        panel.plot(trials, regret["mean"], color=colour, label=f"{name}, mean")
        panel.fill_between(
            trials, regret["p20"], regret["p80"], color=colour, alpha=0.15, linewidth=0
        )
    panel.set(xlabel="trials", ylabel="regret, nats per token")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(fontsize=7)


def _name_rows(panel: Any, label: str) -> None:
    panel.invert_yaxis()
    panel.set_xlabel(label)
    panel.tick_params(axis="y", labelsize=7)


_PANELS: dict[str, Callable[[Any, Sequence[Row]], None]] = {
    "4": _against_layers, "5": _phases, "op": _ratios, "8": _regret,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("source", metavar="RECORDS.json")
    parser.add_argument("target", metavar="PICTURE", help=".svg, .png or .pdf")
    given = parser.parse_args(arguments)
    draw(given.source, given.target)


if __name__ == "__main__":
    main()
