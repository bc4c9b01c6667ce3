"""Rank and experts: their search (the paper's Figs. 4 and 9), their cost (Fig. 1b), their use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from floe.artifacts.results import Point, Router, Search, Training, Trial
from floe.report.arms import looks
from floe.report.run import Run
from floe.report.tables import (
    Cell,
    Picture,
    Section,
    Table,
    as_float,
    decimals,
    duration,
    label,
    plural,
)
from floe.report.theme import (
    DASHED,
    Theme,
    bare,
    colorbar,
    legend_below,
    new_figure,
    note,
    tiles,
    whole_numbers,
)


def search_section(run: Run) -> Section:
    """The trials of the search."""
    section = partial(Section, key="search", title="Search")
    if run.search is None or not run.search.trials:
        return section(missing="The search was not run: rank and experts come from the settings.")
    lead = (
        "Rank and number of experts, tried with adapters on every layer; the best trial is the "
        "model that is scored."
    )
    return section(lead=lead, pictures=(search_history(run.search),))


def cost_section(run: Run) -> Section:
    """Step time and memory by number of layers."""
    section = partial(Section, key="cost", title="Cost")
    if not (run.training or (run.profile and run.profile.points)):
        return section(missing="Neither the cost profile nor any training was run.")
    absent = "The cost profile was not run: the marks are the arms' own training runs."
    lead = "Time and memory of a training step."
    return section(lead=lead, pictures=(cost(run),), missing="" if run.profile else absent)


def router_section(run: Run) -> Section:
    """Use of the experts."""
    section = partial(Section, key="router", title="Routers")
    if not run.routers:
        return section(missing="Router statistics were not collected.")
    lead = "Do the experts share the work, and does the token matter?"
    return section(lead=lead, pictures=(router(run.routers),))


def search_history(search: Search) -> Picture:
    """Value per trial with the best so far, and the best value of every tried (rank, experts)."""
    trials, cells = search.trials, _best_cells(search)
    header = "trial | rank | experts | state | value | seconds | best so far"
    rows = [
        (t.number, t.rank, t.num_experts, t.state, t.value, t.seconds, best)
        for t, best in zip(trials, best_so_far(trials), strict=True)
    ]
    states = [trial.state for trial in trials]
    distinct = search.distinct if search.distinct is not None else len(cells)
    took = f", {duration(search.seconds)} in all" if search.seconds is not None else ""
    others = dict(cells)
    best, runner_up = others.pop((search.rank, search.num_experts), None), ""
    if best is not None and others:
        (rank, experts), value = min(others.items(), key=lambda item: (item[1], item[0]))
        higher = decimals(value - best, 4)
        runner_up = f"The next best setting ({rank}, {experts}) was {higher} higher."
    return Picture(
        key="search",
        title="Search for rank and number of experts",
        alt=f"Objective of {len(trials)} trials with the best so far, and a map of rank by "
        f"experts. Chosen: rank {search.rank}, {search.num_experts} experts.",
        caption=f"{len(trials)} trials at {distinct} distinct settings: {states.count('complete')} "
        f"complete, {states.count('pruned')} pruned, {states.count('failed')} failed, "
        f"{plural(states.count('repeat'), 'repeat')} answered from memory{took}. Value: validation "
        f"loss in nats per token, lower is better. Chosen: rank {search.rank} with "
        f"{search.num_experts} experts. {runner_up} Each setting was trained once, so small "
        "differences between neighbours can be chance.",
        tables=[Table("search", header, rows)],
        draw=partial(_draw_search, search),
    )


def _value(trial: Trial) -> float | None:
    """The value of a complete trial."""
    known = trial.state == "complete" and trial.value is not None and math.isfinite(trial.value)
    return trial.value if known else None


def best_so_far(trials: Sequence[Trial]) -> list[float | None]:
    """Smallest complete value up to each trial; None before the first."""
    best = [math.inf]
    for trial in trials:
        value = _value(trial)
        best.append(best[-1] if value is None else min(best[-1], value))
    return [None if value == math.inf else value for value in best[1:]]


def _best_cells(search: Search) -> dict[tuple[int, int], float]:
    """Best complete value of every (rank, experts) tried."""
    cells: dict[tuple[int, int], float] = {}
    for trial in search.trials:
        if (value := _value(trial)) is not None:
            key = (trial.rank, trial.num_experts)
            cells[key] = min(value, cells.get(key, math.inf))
    return cells


def _draw_search(search: Search, theme: Theme) -> Figure:
    figure = new_figure(3.5)
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    _draw_history(left, search, theme)
    _draw_map(figure, right, search, theme)
    return figure


def _draw_history(ax: Any, search: Search, theme: Theme) -> None:
    marks = {
        "complete": ("o", theme.chosen, theme.chosen),
        "repeat": ("o", theme.chosen, theme.paper),
        "pruned": ("X", theme.muted, theme.muted),
        "failed": ("X", theme.contrast, theme.contrast),
    }
    for state, (marker, edge, face) in marks.items():
        trials = [t for t in search.trials if t.state == state]
        if trials:
            style = {"color": edge, "markerfacecolor": face, "markersize": 5.5}
            known = [t for t in trials if t.value is not None and math.isfinite(t.value)]
            ax.plot([t.number for t in known], [t.value for t in known], marker, **style)
            lost = [t.number for t in trials if t not in known]
            floor = ax.get_xaxis_transform()
            ax.plot(lost, [0.03] * len(lost), marker, transform=floor, **style)
            ax.plot([], [], marker, label=state, **style)
    best = zip((t.number for t in search.trials), best_so_far(search.trials), strict=True)
    steps = [(number, value) for number, value in best if value is not None]
    if steps:
        line: dict[str, Any] = {"color": theme.ink, "linewidth": 1.3, "label": "best so far"}
        ax.step(*zip(*steps, strict=True), where="post", **line)
    ax.set(title="Trial by trial", ylabel="validation loss")
    ax.set_xlabel("trial (marks on the bottom edge have no value)")
    whole_numbers(ax)
    ax.grid(axis="y")
    ax.margins(y=0.12)
    place = {"loc": "upper left", "bbox_to_anchor": (-0.01, -0.17), "ncols": 5}
    ax.legend(handletextpad=0.3, columnspacing=1.3, **place)


def _draw_map(figure: Figure, ax: Any, search: Search, theme: Theme) -> None:
    cells, chosen = _best_cells(search), (search.rank, search.num_experts)
    ranks = sorted({t.rank for t in search.trials} | {search.rank})
    experts = sorted({t.num_experts for t in search.trials} | {search.num_experts})
    grid = np.array([[cells.get((r, e), np.nan) for e in experts] for r in ranks])
    shades = theme.colormap.reversed()
    image = ax.imshow(grid, cmap=shades, aspect="auto", origin="lower", interpolation="none")
    for row, column in np.argwhere(np.isnan(grid)):
        ax.text(column, row, "·", ha="center", va="center", color=theme.muted)
    ax.set_yticks(range(len(ranks)), list(map(str, ranks)))
    ax.set_xticks(range(len(experts)), list(map(str, experts)))
    bare(ax)
    tiles(ax, grid.shape, theme)
    square: dict[str, Any] = {"marker": "s", "markersize": 12, "markerfacecolor": "none"}
    place = experts.index(chosen[1]), ranks.index(chosen[0])
    ax.plot(*place, markeredgewidth=2, color=theme.contrast, **square)
    ax.set(title="Best value of each setting (square: chosen)", xlabel="experts", ylabel="rank")
    if cells:
        colorbar(figure, image, ax, pad=0.03, aspect=18).ax.tick_params(length=0)


def cost(run: Run) -> Picture:
    """Step time and peak memory of the profile and of every trained arm."""
    header = (
        "source | adapted layers | seconds per step | low | high | peak memory bytes | memory kind"
    )
    points = run.profile.points if run.profile else []

    def row(source: str, layers: int, step: Point | Training, *ends: float | None) -> list[Cell]:
        memory = as_float(step.peak_memory_bytes)
        return [source, layers, step.seconds_per_step, *ends, memory, step.memory_kind]

    rows = [row("profile", point.layers, point, point.low, point.high) for point in points]
    rows += [row(arm, len(step.layers), step, None, None) for arm, step in run.trained.items()]
    return Picture(
        key="cost",
        title="What adapted layers cost",
        alt="Step time and peak memory against the number of adapted layers.",
        caption=f"{_profile_text(run)} The arms' marks come from their own training runs, once "
        "each (arms with equally many layers are set side by side), and differ in which layers "
        "they adapt: a set without early layers ends its backward pass sooner. "
        f"{_memory_text(row[-1] for row in rows)} Another model, batch or machine will give other "
        "numbers.",
        tables=[Table("cost", header, rows)],
        draw=partial(_draw_cost, run),
    )


def _profile_text(run: Run) -> str:
    profile = run.profile
    if profile is None:
        return "The separate cost profile was not run."
    tokens = profile.tokens_per_step
    parts = [
        profile.steps is not None and f"{profile.steps} steps a point",
        profile.batch_size is not None and f"batch {profile.batch_size}",
        tokens is not None and f"{tokens:,.0f} tokens a step",
    ]
    known = ", ".join(part for part in parts if part)
    return f"Line: profile on this machine ({known}), with its spread."


def _memory_text(kinds: Iterable[Cell]) -> str:
    known = sorted({str(kind) for kind in kinds if kind})
    if not known:
        return "Memory was not measured."
    text = f"Memory: {', '.join(known)}."
    if any("since process start" in kind for kind in known):
        text += " A peak since process start never falls: later points repeat earlier ones."
    return text


def _draw_cost(run: Run, theme: Theme) -> Figure:
    figure = new_figure(3.5)
    left, right = figure.subplots(1, 2)
    points = run.profile.points if run.profile else []
    bounded = [p for p in points if p.low is not None and p.high is not None]
    layers, low, high = ([getattr(p, name) for p in bounded] for name in ("layers", "low", "high"))
    left.fill_between(layers, low, high, color=theme.muted, alpha=0.2, linewidth=0)
    line: dict[str, Any] = {"color": theme.muted, "marker": "."}
    left.plot([p.layers for p in points], [p.seconds_per_step for p in points], **line)
    known = [
        (p.layers, p.peak_memory_bytes / 2**30) for p in points if p.peak_memory_bytes is not None
    ]
    right.plot(*np.reshape(known, (-1, 2)).T, label="profile" if points else None, **line)
    style = looks(run, theme)
    for arm, x in _side_by_side(run).items():
        look, training = style[arm], run.training[arm]
        mark: dict[str, Any] = {"color": look.color, "markersize": 6, "linestyle": "none"}
        left.plot(x, training.seconds_per_step, look.marker, **mark)
        memory = training.peak_memory_bytes
        place = ([x], [memory / 2**30]) if memory is not None else ([], [])
        right.plot(*place, look.marker, label=look.text, **mark)
    for ax, title, unit in ((left, "Step time", "seconds"), (right, "Peak memory", "GiB")):
        ax.set(title=title, ylabel=unit, xlabel="adapted layers")
        ax.margins(x=0.04, y=0.1)
        ax.set_ylim(bottom=0)
        ax.set_xlim(left=0)
        whole_numbers(ax)
        ax.grid(axis="y")
    legend_below(figure, 7)
    return figure


def _side_by_side(run: Run) -> dict[str, float]:
    """Where each arm's mark stands on the layer axis; equally many layers stand around it."""
    groups: dict[int, list[str]] = {}
    for arm, training in run.trained.items():
        groups.setdefault(len(training.layers), []).append(arm)
    gap = run.layer_count / 50
    return {
        arm: layers + gap * (place - (len(names) - 1) / 2)
        for layers, names in groups.items()
        for place, arm in enumerate(names)
    }


def router(routers: list[Router]) -> Picture:
    """Usage of every expert by layer and module, load entropy and mutual information."""
    experts = max(len(r.usage) for r in routers)
    columns = ["layer", "module", "load entropy", "token entropy", "mutual information"]
    measures = attrgetter(*(name.replace(" ", "_") for name in columns))
    columns += ["collapsed", "unspecialised", *(f"usage {i}" for i in range(experts))]
    rows = []
    for r in routers:
        usage = [*map(float, r.usage), *[None] * (experts - len(r.usage))]
        rows.append([*measures(r), int(r.collapsed), int(r.unspecialised), *usage])
    return Picture(
        key="router",
        title="How the experts share the tokens",
        alt=f"Usage of {experts} experts by {len(routers)} routers, with load entropy and mutual "
        "information.",
        caption="Usage is the mean gate of an expert over the tokens measured (even use is 1/M). "
        f"Entropies are divided by ln M. {sum(r.collapsed for r in routers)} of {len(routers)} "
        "routers are flagged as collapsed (load entropy below 0.5 or an expert above 0.9), "
        f"{sum(r.unspecialised for r in routers)} as unspecialised (mutual information between "
        "token and expert below 0.01). An unspecialised router mixes its experts the same way for "
        "every token: it works, but acts as one fixed adapter. Nothing here says what an expert is "
        "about.",
        tables=[Table("router", " | ".join(columns), rows)],
        draw=partial(_draw_router, routers, experts),
    )


def _draw_router(routers: list[Router], experts: int, theme: Theme) -> Figure:
    modules = list(dict.fromkeys(r.module for r in routers))
    layers = sorted({r.layer for r in routers})
    figure = new_figure(len(modules) * (0.17 * experts + 0.34) + 4.1)
    heights = [0.17 * experts + 0.2] * len(modules) + [1.25, 1.25]
    axes = figure.subplots(len(heights), 1, height_ratios=heights)
    scale = Normalize(0, max(2 / experts, *(max(r.usage) for r in routers)))
    for ax, module in zip(axes, modules, strict=False):
        grid = np.full((experts, len(layers)), np.nan)
        for r in routers:
            if r.module == module:
                grid[: len(r.usage), layers.index(r.layer)] = r.usage
        ax.imshow(grid, aspect="auto", interpolation="none", cmap=theme.colormap, norm=scale)
        tiles(ax, grid.shape, theme, rows=1.2, columns=3)
        ax.set_title(label(module), pad=4)
        ax.set_yticks(range(experts))
        ax.set_xticks([])
        ax.tick_params(length=0)
        ax.set_ylabel("expert")
    shades, maps = ScalarMappable(scale, theme.colormap), list(axes[: len(modules)])
    colorbar(figure, shades, maps, "mean gate", pad=0.012, fraction=0.025, aspect=24)
    for ax, what in zip(axes[-2:], ("load_entropy", "mutual_information"), strict=True):
        _draw_bars(ax, routers, what, theme)
    axes[-1].set_xlabel("layer")
    handles, names = axes[-2].get_legend_handles_labels()
    legend_below(figure, len(names), handles, names)
    return figure


def _draw_bars(ax: Any, routers: list[Router], what: str, theme: Theme) -> None:
    """Bars of training measure by layer, a colour per module; flagged bars carry a mark."""
    title, limit, flag = {
        "load_entropy": ("Load entropy", 0.5, "collapsed"),
        "mutual_information": ("Mutual information of token and expert", 0.01, "unspecialised"),
    }[what]
    modules = list(dict.fromkeys(r.module for r in routers))
    layers = sorted({r.layer for r in routers})
    colors = (theme.chosen, theme.contrast, *theme.others)
    width = 0.8 / len(modules)
    sign: dict[str, Any] = {"ha": "center", "color": theme.ink, "fontweight": "bold", "fontsize": 9}
    for index, module in enumerate(modules):
        mine = [r for r in routers if r.module == module]
        x = [layers.index(r.layer) + (index - (len(modules) - 1) / 2) * width for r in mine]
        heights = [getattr(r, what) for r in mine]
        ax.bar(x, heights, width * 0.86, color=colors[index % len(colors)], label=label(module))
        for place, r in zip(zip(x, heights, strict=True), mine, strict=True):
            if getattr(r, flag):
                note(ax, "!", place, (0, 2), **sign)
    ax.axhline(limit, color=theme.muted, linewidth=1, linestyle=DASHED)
    ax.set_title(f"{title} (dashed: {limit:g}; ! marks {flag} routers)", pad=5)
    ax.set_xlim(-0.5, len(layers) - 0.5)
    ax.set_ylim(bottom=0)
    ax.set_xticks(range(len(layers)), list(map(str, layers)))
    ax.tick_params(axis="x", length=0)
    ax.margins(y=0.2)
