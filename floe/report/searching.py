"""The search over rank and experts: its history and its map (the paper's Figs. 4 and 9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from floe.artifacts.results import Search, Trial
from floe.report.run import Run
from floe.report.tables import Picture, Table, decimals, duration, plural
from floe.report.theme import Theme, new_figure


def search_history(run: Run, search: Search) -> Picture:
    """Value per trial with the best so far, and the best value of every tried (rank, experts)."""
    table = Table(
        "search",
        ("trial", "rank", "experts", "state", "value", "seconds", "best so far"),
        tuple(
            (t.number, t.rank, t.num_experts, t.state, t.value, t.seconds, best)
            for t, best in zip(search.trials, best_so_far(search.trials), strict=True)
        ),
    )
    states = dict.fromkeys(("complete", "pruned", "failed", "repeat"), 0)
    for trial in search.trials:
        states[trial.state] += 1

    def draw(theme: Theme) -> Figure:
        return _draw_search(search, theme)

    distinct = search.distinct if search.distinct is not None else len(_cells(search))
    return Picture(
        key="search",
        title="Search for rank and number of experts",
        alt=f"Objective of {len(search.trials)} trials with the best so far, and a map of rank by "
        "experts. "
        f"Chosen: rank {search.rank}, {search.num_experts} experts.",
        caption=f"{len(search.trials)} trials at {distinct} distinct settings: "
        f"{states['complete']} complete, "
        f"{states['pruned']} pruned, {states['failed']} failed, "
        f"{plural(states['repeat'], 'repeat')} answered from "
        f"memory{_took(search)}. Value: validation loss in nats per token, lower is better. "
        "Chosen: rank "
        f"{search.rank} "
        f"with {search.num_experts} experts. {_runner_up(search)} Each setting was trained once, "
        "so small "
        "differences between neighbours can be chance.",
        tables=(table,),
        draw=draw,
    )


def best_so_far(trials: Sequence[Trial]) -> list[float | None]:
    """Smallest complete value up to each trial; None before the first."""
    best: float | None = None
    found = []
    for trial in trials:
        value = trial.value
        if trial.state == "complete" and value is not None and math.isfinite(value):
            best = value if best is None else min(best, value)
        found.append(best)
    return found


def _cells(search: Search) -> dict[tuple[int, int], float]:
    """Best complete value of every setting tried."""
    cells: dict[tuple[int, int], float] = {}
    for t in search.trials:
        if t.state == "complete" and t.value is not None and math.isfinite(t.value):
            key = (t.rank, t.num_experts)
            cells[key] = min(t.value, cells.get(key, math.inf))
    return cells


def _runner_up(search: Search) -> str:
    cells = _cells(search)
    best = cells.pop((search.rank, search.num_experts), None)
    if best is None or not cells:
        return ""
    (rank, experts), value = min(cells.items(), key=lambda item: (item[1], item[0]))
    return f"The next best setting ({rank}, {experts}) was {decimals(value - best, 4)} higher."


def _took(search: Search) -> str:
    return f", {duration(search.seconds)} in all" if search.seconds is not None else ""


def _draw_search(search: Search, theme: Theme) -> Figure:
    figure = new_figure(3.5)
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    _draw_history(left, search, theme)
    _draw_map(figure, right, search, theme)
    return figure


def _draw_history(ax: Any, search: Search, theme: Theme) -> None:
    looks = {
        "complete": ("o", theme.chosen, theme.chosen),
        "repeat": ("o", theme.chosen, theme.paper),
        "pruned": ("X", theme.muted, theme.muted),
        "failed": ("X", theme.contrast, theme.contrast),
    }
    floor = ax.get_xaxis_transform()
    for state, (marker, edge, face) in looks.items():
        trials = [t for t in search.trials if t.state == state]
        if not trials:
            continue
        style = {"color": edge, "markerfacecolor": face, "markersize": 5.5}
        known = [t for t in trials if t.value is not None and math.isfinite(t.value)]
        ax.plot([t.number for t in known], [t.value for t in known], marker, **style)
        lost = [t.number for t in trials if t not in known]
        ax.plot(lost, [0.03] * len(lost), marker, transform=floor, **style)
        ax.plot([], [], marker, label=state, **style)
    best = [
        (t.number, b)
        for t, b in zip(search.trials, best_so_far(search.trials), strict=True)
        if b is not None
    ]
    if best:
        ax.step(
            *zip(*best, strict=True),
            where="post",
            color=theme.ink,
            linewidth=1.3,
            label="best so far",
        )
    ax.set_title("Trial by trial")
    ax.set_ylabel("validation loss")
    ax.set_xlabel("trial (marks on the bottom edge have no value)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(axis="y")
    ax.margins(y=0.12)
    ax.legend(
        loc="upper left",
        bbox_to_anchor=(-0.01, -0.17),
        ncols=5,
        handletextpad=0.3,
        columnspacing=1.3,
    )


def _draw_map(figure: Figure, ax: Any, search: Search, theme: Theme) -> None:
    cells = _cells(search)
    ranks = sorted({t.rank for t in search.trials} | {search.rank})
    experts = sorted({t.num_experts for t in search.trials} | {search.num_experts})
    grid = np.full((len(ranks), len(experts)), np.nan)
    for (rank, count), value in cells.items():
        grid[ranks.index(rank), experts.index(count)] = value
    image = ax.imshow(
        grid, cmap=theme.colormap.reversed(), aspect="auto", origin="lower", interpolation="none"
    )
    for row, column in np.argwhere(np.isnan(grid)):
        ax.text(column, row, "·", ha="center", va="center", color=theme.muted)
    ax.set_yticks(range(len(ranks)), [str(r) for r in ranks])
    ax.set_xticks(range(len(experts)), [str(e) for e in experts])
    ax.tick_params(length=0)
    for edge in range(1, len(experts)):
        ax.axvline(edge - 0.5, color=theme.paper, linewidth=1.4)
    for edge in range(1, len(ranks)):
        ax.axhline(edge - 0.5, color=theme.paper, linewidth=1.4)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.plot(experts.index(search.num_experts), ranks.index(search.rank), marker="s", markersize=12,
            markerfacecolor="none", markeredgewidth=2, color=theme.contrast)  # fmt: skip
    ax.set(title="Best value of each setting (square: chosen)", xlabel="experts", ylabel="rank")
    if cells:
        bar = figure.colorbar(image, ax=ax, pad=0.03, aspect=18)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
