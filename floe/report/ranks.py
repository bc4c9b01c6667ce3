"""The chosen policy's ranking beside the paper's masks, and the record of mask tuning."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from floe.artifacts.selection import Tuned
from floe.report.run import Run
from floe.report.tables import Picture, Table, decimals, label
from floe.report.theme import Theme, new_figure


def chance_overlap(layers: int, first: int, second: int) -> list[float]:
    """P(overlap = k), k = 0..min(first, second), of random sets of these sizes: hypergeometric."""
    total = math.comb(layers, second)
    return [
        math.comb(first, k) * math.comb(layers - first, second - k) / total
        for k in range(min(first, second) + 1)
    ]


def rankings(run: Run) -> Picture:
    """Slope chart of two rankings, the overlap against chance, and the two layer scores."""
    choice, paper = run.choice, run.choice.paper
    ours = {layer: place for place, layer in enumerate(choice.ranking, start=1)}
    theirs = {layer: place for place, layer in enumerate(paper.ranking, start=1)}
    table = Table(
        "rankings",
        ("layer", "rank", "score", "chosen", "rank by the paper's masks",
         "score by the paper's masks", "chosen by the paper's masks"),
        tuple(
            (k, ours[k], float(choice.layer_scores[k]), int(k in choice.layers),
             theirs[k], float(paper.layer_scores[k]), int(k in paper.layers))
            for k in range(run.layer_count)
        ),
    )  # fmt: skip
    shared = len(set(choice.layers) & set(paper.layers))
    odds = chance_overlap(run.layer_count, len(choice.layers), len(paper.layers))
    overlap_table = Table(
        "overlap",
        ("shared layers", "probability by chance", "observed"),
        tuple((k, p, int(k == shared)) for k, p in enumerate(odds)),
    )

    def draw(theme: Theme) -> Figure:
        return _draw_rankings(run, odds, shared, theme)

    return Picture(
        key="rankings",
        title=f"Ranking by {choice.policy} and by the paper's masks",
        alt=f"Slope chart of {run.layer_count} layers between two rankings; the sets share "
        f"{shared} layers.",
        caption=_ranking_caption(run, odds, shared),
        tables=(table, overlap_table),
        draw=draw,
    )


def _ranking_caption(run: Run, odds: list[float], shared: int) -> str:
    choice = run.choice
    expected = sum(k * p for k, p in enumerate(odds))
    text = f"Each line is a layer, most important on top. The two sets share {shared} of "
    text += f"{len(choice.layers)} layers; two random sets of these sizes share {expected:.1f} on "
    text += "average, "
    text += f"and at least as many with probability {sum(odds[shared:]):.2f}. "
    if choice.agreement["spearman"] is not None:
        rho = choice.agreement["spearman"]
        text += f"Spearman correlation of the two scores: {rho:+.2f} over n = "
        text += f"{run.layer_count} "
        text += "layers. "
    return (
        text + "Agreement says that two rules measure similar things, not that either finds better "
        "layers."
    )


def _draw_rankings(run: Run, odds: list[float], shared: int, theme: Theme) -> Figure:
    layers = run.layer_count
    figure = new_figure(min(9.5, max(3.6, 0.172 * layers + 0.9)))
    grid = figure.add_gridspec(2, 2, width_ratios=[1.35, 1], wspace=0.08, hspace=0.08)
    _draw_slopes(figure.add_subplot(grid[:, 0]), run, theme)
    _draw_chance(figure.add_subplot(grid[0, 1]), odds, shared, theme)
    _draw_scatter(figure.add_subplot(grid[1, 1]), run, theme)
    return figure


def _role(layer: int, run: Run, theme: Theme) -> tuple[str, float, int]:
    """Colour, width and drawing order of a layer's line."""
    ours, theirs = layer in run.choice.layers, layer in run.choice.paper.layers
    if ours and theirs:
        return theme.ink, 2.2, 4
    if ours:
        return theme.chosen, 1.9, 3
    return (theme.contrast, 1.5, 2) if theirs else (theme.faint, 1.1, 1)


def _draw_slopes(ax: Any, run: Run, theme: Theme) -> None:
    theirs = {layer: place for place, layer in enumerate(run.choice.paper.ranking, start=1)}
    for place, layer in enumerate(run.choice.ranking, start=1):
        color, width, order = _role(layer, run, theme)
        ax.plot([0, 1], [place, theirs[layer]], color=color, linewidth=width, zorder=order,
                marker="o", markersize=3.2)  # fmt: skip
        plain = order == 1
        style = {
            "va": "center",
            "fontsize": 7.2,
            "color": theme.muted if plain else color,
            "fontweight": "normal" if plain else "bold",
        }
        ax.text(-0.035, place, str(layer), ha="right", **style)
        ax.text(1.035, theirs[layer], str(layer), ha="left", **style)
    ax.set_ylim(run.layer_count + 0.8, 0.2)
    ax.set_xlim(-0.09, 1.09)
    ax.set_xticks([0, 1], [label(run.choice.policy), "the paper's masks"])
    ax.xaxis.tick_top()
    ax.tick_params(axis="x", length=0, labelsize=8.4, labelcolor=theme.ink)
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    names = (
        ("both sets", theme.ink),
        ("chosen only", theme.chosen),
        ("the paper's only", theme.contrast),
    )
    for name, color in names:
        ax.plot([], [], color=color, linewidth=2, label=name)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, handlelength=1.4)


def _draw_chance(ax: Any, odds: list[float], shared: int, theme: Theme) -> None:
    colors = [theme.chosen if k == shared else theme.faint for k in range(len(odds))]
    ax.bar(range(len(odds)), odds, color=colors, width=0.8)
    ax.axhline(0, color=theme.muted, linewidth=0.7)
    ax.annotate("observed", (shared, odds[shared]), xytext=(0, 4), textcoords="offset points",
                ha="center", color=theme.chosen, fontsize=7.8, fontweight="bold")  # fmt: skip
    ax.set_title("Layers in both sets, against chance")
    ax.set_xlabel("shared layers")
    ax.set_ylabel("probability")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.margins(y=0.16)


def _draw_scatter(ax: Any, run: Run, theme: Theme) -> None:
    choice = run.choice
    for layer in range(run.layer_count):
        color, _, order = _role(layer, run, theme)
        color = theme.muted if order == 1 else color
        ax.plot(choice.layer_scores[layer], choice.paper.layer_scores[layer], "o", color=color,
                markersize=5 if order > 1 else 3.4, zorder=order)  # fmt: skip
    scores = choice.layer_scores
    if scores.min() > 0 and scores.max() > 20 * scores.min():
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_title("Score of every layer")
    ax.set_xlabel(f"score by {label(choice.policy)}")
    ax.set_ylabel("score by the paper's masks")


def tuning(run: Run) -> Picture:
    """Residual of each component before and after mask tuning."""
    entries = run.choice.tuning
    table = Table(
        "tuning",
        ("layer", "component", "accepted", "residual before", "residual after"),
        tuple(
            (
                t["layer"],
                t["component"],
                int(t["accepted"]),
                t["residual_before"],
                t["residual_after"],
            )
            for t in entries
        ),
    )
    accepted = sum(t["accepted"] for t in entries)

    def draw(theme: Theme) -> Figure:
        return _draw_tuning(run, theme)

    return Picture(
        key="tuning",
        title="Tuning the paper's masks",
        alt=f"Residual before and after tuning for {len(entries)} components; {accepted} accepted.",
        caption="The least-squares fit rescales the units a mask retains so that each component's "
        "output "
        "comes back to what it was without a mask; the residual is what remains, relative to that "
        "output. "
        f"{accepted} of {len(entries)} fits were accepted, {len(entries) - accepted} rejected "
        "(their masks "
        f"stay binary). {_gain(entries)} A small residual says that the masks are well fitted, "
        "not that "
        "the layers they point at are the right ones.",
        tables=(table,),
        draw=draw,
    )


def _gain(entries: list[Tuned]) -> str:
    ends = [(t["residual_before"], t["residual_after"]) for t in entries if t["accepted"]]
    ratios = [after / before for before, after in ends if before and after is not None]
    if not ratios:
        return ""
    low, middle, high = np.percentile(ratios, [0, 50, 100])
    return (
        f"Accepted fits left {decimals(middle, 2)} of their residual (median of n = {len(ratios)}; "
        f"{decimals(low, 2)} to {decimals(high, 2)})."
    )


def _draw_tuning(run: Run, theme: Theme) -> Figure:
    kinds = sorted({t["component"] for t in run.choice.tuning})
    figure = new_figure(1.75 * len(kinds) + 0.5)
    axes = figure.subplots(len(kinds), 1, squeeze=False, sharex=True)[:, 0]
    for ax, kind in zip(axes, kinds, strict=True):
        for t in (t for t in run.choice.tuning if t["component"] == kind):
            layer, before, after = t["layer"], t["residual_before"], t["residual_after"]
            if before is None or after is None:
                continue
            color, mark = (theme.chosen, "o") if t["accepted"] else (theme.contrast, "X")
            ax.plot([layer, layer], [before, after], color=color, linewidth=1.3)
            hollow = {"color": theme.muted, "markerfacecolor": theme.paper}
            ax.plot(layer, before, "o", markersize=4.4, **hollow)
            ax.plot(layer, after, mark, color=color, markersize=5.4)
        ax.set_title(label(kind))
        ax.set_ylabel("residual")
        ax.set_ylim(bottom=0)
        ax.grid(axis="y")
    axes[-1].set_xlabel("layer")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = (
        ("before", theme.muted, "o", theme.paper),
        ("after, accepted", theme.chosen, "o", theme.chosen),
        ("after, rejected", theme.contrast, "X", theme.contrast),
    )
    for name, color, marker, face in handles:
        axes[0].plot([], [], marker, color=color, markerfacecolor=face, label=name, markersize=5)
    axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=3, handletextpad=0.2)
    return figure
