"""Health of the routers: how the experts share the tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from floe.artifacts.results import Router
from floe.report.run import Run
from floe.report.tables import Picture, Table, label
from floe.report.theme import Theme, new_figure


def router(run: Run) -> Picture | None:
    """Usage of every expert by layer and module, load entropy and mutual information."""
    found = run.routers
    if not found:
        return None
    experts = max(len(r.usage) for r in found)
    table = Table(
        "router",
        ("layer", "module", "load entropy", "token entropy", "mutual information", "collapsed",
         "unspecialised", *(f"usage {i}" for i in range(experts))),
        tuple(
            (r.layer, r.module, r.load_entropy, r.token_entropy, r.mutual_information,
             int(r.collapsed), int(r.unspecialised), *_padded(r, experts))
            for r in found
        ),
    )  # fmt: skip
    collapsed = sum(r.collapsed for r in found)
    flat = sum(r.unspecialised for r in found)

    def draw(theme: Theme) -> Figure:
        return _draw_router(found, experts, theme)

    return Picture(
        key="router",
        title="How the experts share the tokens",
        alt=f"Usage of {experts} experts by {len(found)} routers, with load entropy and mutual "
        "information.",
        caption=f"Usage is the mean gate of an expert over the tokens measured (even use is 1/M). "
        f"Entropies are divided by ln M. {collapsed} of {len(found)} routers are flagged as "
        "collapsed (load "
        f"entropy below 0.5 or an expert above 0.9), {flat} as unspecialised (mutual information "
        "between "
        "token and expert below 0.01). An unspecialised router mixes its experts the same way for "
        "every "
        "token: it works, but acts as one fixed adapter. Nothing here says what an expert is "
        "about.",
        tables=(table,),
        draw=draw,
    )


def _padded(one: Router, experts: int) -> tuple[float | None, ...]:
    return (*(float(u) for u in one.usage), *([None] * (experts - len(one.usage))))


def _draw_router(found: list[Router], experts: int, theme: Theme) -> Figure:
    modules = list(dict.fromkeys(r.module for r in found))
    layers = sorted({r.layer for r in found})
    figure = new_figure(len(modules) * (0.17 * experts + 0.34) + 4.1)
    heights = [0.17 * experts + 0.2] * len(modules) + [1.25, 1.25]
    axes = figure.subplots(len(heights), 1, height_ratios=heights)
    top = max(2 / experts, *(max(r.usage) for r in found))
    for ax, module in zip(axes, modules, strict=False):
        grid = np.full((experts, len(layers)), np.nan)
        for r in found:
            if r.module == module:
                grid[: len(r.usage), layers.index(r.layer)] = r.usage
        scale = {"cmap": theme.colormap, "vmin": 0, "vmax": top}
        ax.imshow(grid, aspect="auto", interpolation="none", **scale)
        _map_axis(ax, module, grid.shape, theme)
    shades = ScalarMappable(Normalize(0, top), theme.colormap)
    bar = figure.colorbar(
        shades, ax=list(axes[: len(modules)]), pad=0.012, fraction=0.025, aspect=24
    )
    bar.outline.set_visible(False)
    bar.set_label("mean gate")
    _draw_bars(axes[-2], found, modules, layers, "load_entropy", theme)
    _draw_bars(axes[-1], found, modules, layers, "mutual_information", theme)
    axes[-1].set_xticks(range(len(layers)), [str(k) for k in layers])
    axes[-1].set_xlabel("layer")
    handles, names = axes[-2].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(7, len(names)))
    return figure


def _map_axis(ax: Any, module: str, shape: tuple[int, int], theme: Theme) -> None:
    rows, columns = shape
    for edge in range(1, rows):
        ax.axhline(edge - 0.5, color=theme.paper, linewidth=1.2)
    for edge in range(1, columns):
        ax.axvline(edge - 0.5, color=theme.paper, linewidth=3)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(label(module), pad=4)
    ax.set_yticks(range(rows))
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.set_ylabel("expert")


def _draw_bars(
    ax: Any,
    found: list[Router],
    modules: list[str],
    layers: list[int],
    what: str,
    theme: Theme,
) -> None:
    """Bars of one measure by layer, a colour and hatch per module; flagged bars carry a mark."""
    colors = (theme.chosen, theme.contrast, *theme.others)
    width = 0.8 / len(modules)
    bad = "collapsed" if what == "load_entropy" else "unspecialised"
    for index, module in enumerate(modules):
        mine = [r for r in found if r.module == module]
        x = [layers.index(r.layer) + (index - (len(modules) - 1) / 2) * width for r in mine]
        heights = [getattr(r, what) for r in mine]
        ax.bar(x, heights, width * 0.86, color=colors[index % len(colors)], label=label(module))
        marks = [(a, b) for a, b, r in zip(x, heights, mine, strict=True) if getattr(r, bad)]
        for a, b in marks:
            ax.annotate("!", (a, b), xytext=(0, 2), textcoords="offset points", ha="center",
                        color=theme.ink, fontweight="bold", fontsize=9)  # fmt: skip
    limit = 0.5 if what == "load_entropy" else 0.01
    ax.axhline(limit, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
    title = "Load entropy" if what == "load_entropy" else "Mutual information of token and expert"
    ax.set_title(f"{title} (dashed: {limit:g}; ! marks {bad} routers)", pad=5)
    ax.set_xlim(-0.5, len(layers) - 0.5)
    ax.set_ylim(bottom=0)
    ax.set_xticks(range(len(layers)), [str(k) for k in layers])
    ax.tick_params(axis="x", length=0)
    ax.margins(y=0.2)
