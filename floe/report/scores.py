"""Scores by layer and unit (the paper's Figs. 3 and 10), and two rankings made of them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from floe.artifacts.selection import PaperSelection, Selection, Tuned
from floe.report.run import Run
from floe.report.tables import (
    Cell,
    Picture,
    Section,
    Table,
    decimals,
    label,
    percent,
    significant,
)
from floe.report.theme import Theme, bare, colorbar, new_figure, note, tiles, whole_numbers
from floe.types import Floats

_LOG_FACTOR = 20.0
_BINS = 64


def scores_section(run: Run) -> Section:
    """What the selection saw."""
    lead = (
        "Scores measured on the calibration rows, before the final training: what the selection "
        "saw. Filled dots mark the layers that were adapted, open diamonds the ones the FLoE "
        "paper's masks would adapt."
    )
    return Section(key="scores", title="Scores", lead=lead, pictures=(saliency(run), units(run)))


def ranking_section(run: Run) -> Section:
    """The chosen policy's ranking beside the paper's, and how the paper's masks were tuned."""
    lead = (
        "Two rules for the same question. In floe's own experiments with a small model, layers "
        "chosen by adapter Fisher ended ahead of random ones on one data set and level with them "
        "on two; the paper's masks were no better than random layers."
    )
    pictures, absent = [], []
    if run.is_paper:
        absent = ["The chosen policy is the paper's masks: there is no second ranking to compare."]
    else:
        pictures = [rankings(run)]
    if run.choice.tuning:
        pictures.append(tuning(run))
    else:
        why = f" ({run.choice.untuned})" if run.choice.untuned else ""
        absent.append(f"Mask tuning was not run{why}: the paper's masks are scored as binary ones.")
    missing = " ".join(absent)
    return Section(key="ranking", title="Ranking", lead=lead, pictures=pictures, missing=missing)


def layer_axis(
    ax: Any, run: Run, theme: Theme, name: str = "layer (0 is next to the input)"
) -> None:
    """Layer numbers under a map; the chosen ones stand out."""
    layers = run.layer_count
    ticks = range(0, layers, 1 if layers <= 40 else 2 if layers <= 64 else 4)
    ax.set_xlim(-0.5, layers - 0.5)
    ax.set_xticks(ticks, list(map(str, ticks)))
    for tick, text in zip(ticks, ax.get_xticklabels(), strict=True):
        if tick in run.choice.layers:
            text.set(color=theme.chosen, fontweight="bold")
    ax.set_xlabel(name)
    ax.tick_params(length=0)


def mark_layers(ax: Any, run: Run, theme: Theme, labels: bool = True) -> None:
    """Two rows of marks above a map whose x axis is the layer: chosen layers and the paper's."""
    height = ax.get_position().height * ax.figure.get_figheight()
    ours, theirs = run.choice.layers, run.choice.paper.layers
    rows = [(ours, theme.chosen, theme.chosen, "o", 6.0, f"chosen ({label(run.choice.policy)})")]
    if not run.is_paper:
        rows.append((theirs, theme.contrast, "none", "D", 5.0, "the paper's masks"))
    for row, (layers, color, face, marker, size, text) in enumerate(rows):
        y = 1 + (0.13 + 0.19 * (1 - row)) / height
        style = {"markerfacecolor": face, "markersize": size, "markeredgewidth": 1.2}
        place = {"transform": ax.get_xaxis_transform(), "clip_on": False}
        ax.plot(layers, [y] * len(layers), marker, color=color, **style, **place)
        if labels:
            style = {"color": color, "ha": "right", "va": "center", "fontsize": 7.8}
            note(ax, text, (0, y), (-8, 0), xycoords="axes fraction", **style)


def normalised(values: Floats) -> tuple[Floats, bool]:
    """A row stretched to [0, 1], and whether on a log scale.

    The scale is logarithmic where the positive values span more than a factor of 20; zeros then
    count as the smallest positive value. A constant row is all 0; what is not finite becomes NaN.
    """
    row = np.where(np.isfinite(values), values, np.nan)
    positive = row[row > 0]
    log = bool(
        positive.size and np.nanmin(row) >= 0 and positive.max() > _LOG_FACTOR * positive.min()
    )
    if log:
        row = np.log10(np.maximum(row, positive.min()))
    low, high = (np.nanmin(row), np.nanmax(row)) if np.isfinite(row).any() else (0.0, 0.0)
    return (row - low) / (high - low) if high > low else row * 0.0, log


def saliency(run: Run) -> Picture:
    """Layer by component heat map with both policies' layers marked."""
    scores, paper, chosen = run.scores, run.choice.paper, run.choice.layers
    components = {
        "adapter Fisher": scores.adapter_fisher,
        "probe Fisher": scores.probe_fisher,
        "heads, mean Fisher": scores.head_fisher.mean(axis=1),
        "neurons, mean Fisher": scores.neuron_fisher.mean(axis=1),
        "heads, mean Taylor": scores.head_taylor.mean(axis=1),
        "neurons, mean Taylor": scores.neuron_taylor.mean(axis=1),
        "masked heads, share": paper.masked_head_fraction,
        "masked neurons, share": paper.masked_neuron_fraction,
        "layer score": run.choice.layer_scores,
    }
    rows = {name: row for name, row in components.items() if row is not None}
    header = " | ".join(["layer", *rows, "chosen", "chosen by the paper's masks"])
    cells = [
        (k, *(float(row[k]) for row in rows.values()), int(k in chosen), int(k in paper.layers))
        for k in range(run.layer_count)
    ]
    return Picture(
        key="saliency",
        title="What each layer's scores look like",
        alt=f"Heat map of {len(rows)} scores over {run.layer_count} layers. Chosen layers: "
        f"{', '.join(map(str, chosen))}. Layers of the paper's masks: "
        f"{', '.join(map(str, paper.layers))}.",
        caption="Each row is stretched from its own smallest value (faint) to its own largest "
        f"(strong), on a log scale where its values span more than a factor of {_LOG_FACTOR:.0f}; "
        "the range stands at the right. Colours can be compared along a row, never between rows. "
        f"{_sample(run)} A map of one calibration sample does not say how stable a score is.",
        tables=[Table("saliency", header, cells)],
        draw=partial(_draw_saliency, run, rows),
    )


def _sample(run: Run) -> str:
    meta = run.scores.meta
    known = [f"{meta[k]:,} {k}" for k in ("rows", "tokens") if isinstance(meta.get(k), int)]
    if not known:
        return "The number of calibration rows was not recorded."
    seed = f", seed {meta['seed']}" if isinstance(meta.get("seed"), int) else ""
    return f"Scores from {', '.join(known)}{seed}."


def _draw_saliency(run: Run, rows: dict[str, Floats], theme: Theme) -> Figure:
    figure = new_figure(0.3 * len(rows) + 1.25)
    ax = figure.subplots()
    scaled = [normalised(row) for row in rows.values()]
    grid = np.stack([row for row, _ in scaled])
    ax.imshow(grid, cmap=theme.colormap, vmin=0, vmax=1, aspect="auto", interpolation="none")
    tiles(ax, grid.shape, theme)
    style = {"va": "center", "fontsize": 7.4, "color": theme.muted}
    for row, (values, (_, log)) in enumerate(zip(rows.values(), scaled, strict=True)):
        low, high = (significant(float(end), 2) for end in (np.nanmin(values), np.nanmax(values)))
        text = f"{low} to {high}{', log' if log else ''}"
        note(ax, text, (1, row), (8, 0), xycoords=("axes fraction", "data"), **style)
    kinds = [name.split(",")[-1].split()[0] for name in rows]
    for edge in range(1, len(rows)):
        if kinds[edge] != kinds[edge - 1]:
            ax.axhline(edge - 0.5, color=theme.paper, linewidth=5)
    ax.set_yticks(range(len(rows)), list(rows))
    layer_axis(ax, run, theme)
    ax.tick_params(axis="y", labelcolor=theme.ink, labelsize=8.2)
    mark_layers(ax, run, theme)
    return figure


def units(run: Run) -> Picture:
    """Fisher information of every head, and of the neurons sorted within their layer."""
    heads, all_neurons = run.scores.head_fisher, run.scores.neuron_fisher
    neurons, sizes = sorted_bins(all_neurons)
    low, high = _top_share(all_neurons)
    head_rows = [(k, h, float(v)) for k, row in enumerate(heads) for h, v in enumerate(row)]
    neuron_rows = [
        (k, b, sizes[b], float(v)) for k, row in enumerate(neurons) for b, v in enumerate(row)
    ]
    header = "layer | bin (largest first) | neurons in bin | mean fisher"
    return Picture(
        key="units",
        title="Where inside a layer the Fisher information sits",
        alt=f"Two heat maps over {run.layer_count} layers: log Fisher of {heads.shape[1]} heads "
        f"and of {all_neurons.shape[1]} neurons in {neurons.shape[1]} bins.",
        caption="Fisher information of the head and neuron masks, log scale. Heads keep their "
        "order; neurons are sorted within each layer, largest at the top, because their index "
        f"means nothing. The top 1 % of a layer's neurons holds {percent(low, 0)} to "
        f"{percent(high, 0)} of its neuron Fisher, so a layer's mean describes few units. Marks on "
        "top: as in the map of scores. Units that no row moved (zero) are left blank.",
        tables=[
            Table("units_heads", "layer | head | fisher", head_rows),
            Table("units_neurons", header, neuron_rows),
        ],
        draw=partial(_draw_units, run, neurons),
    )


def sorted_bins(values: Floats) -> tuple[Floats, list[int]]:
    """Each layer's neurons, largest first, averaged in at most 64 bins: ``[L, bins]``, sizes."""
    parts = np.array_split(-np.sort(-values, axis=1), min(_BINS, values.shape[1]), axis=1)
    return np.stack([part.mean(axis=1) for part in parts], axis=1), [p.shape[1] for p in parts]


def _top_share(values: Floats) -> tuple[float, float]:
    top = max(1, round(values.shape[1] / 100))
    total = values.sum(axis=1)
    part = -np.sort(-values, axis=1)[:, :top].sum(axis=1)
    share = part[total > 0] / total[total > 0]
    return (float(share.min()), float(share.max())) if share.size else (0.0, 0.0)


def _draw_units(run: Run, neurons: Floats, theme: Theme) -> Figure:
    heads = run.scores.head_fisher
    top = min(3.6, max(1.3, 0.1 * heads.shape[1]))
    figure = new_figure(top + 3.7)
    above, below = axes = figure.subplots(2, 1, height_ratios=[top, 2.1], sharex=False)
    for ax, values, name in zip(axes, (heads, neurons), ("head", "neurons, sorted"), strict=True):
        grid = np.log10(values, out=np.full(values.shape, np.nan), where=values > 0).T
        image = ax.imshow(grid, cmap=theme.colormap, aspect="auto", interpolation="none")
        tiles(ax, (1, run.layer_count), theme)
        colorbar(figure, image, ax, "log10 Fisher", pad=0.012, aspect=18, fraction=0.03)
        ax.set_ylabel(name)
        layer_axis(ax, run, theme, name="layer" if ax is below else "")
    above.set_yticks(range(0, heads.shape[1], max(1, heads.shape[1] // 8)))
    below.set_yticks([-0.5, neurons.shape[1] - 0.5], ["largest", "smallest"])
    mark_layers(above, run, theme, labels=False)
    return figure


def chance_overlap(layers: int, first: int, second: int) -> list[float]:
    """P(overlap = k), k = 0..min(first, second), of random sets of these sizes: hypergeometric."""
    total = math.comb(layers, second)
    return [
        math.comb(first, k) * math.comb(layers - first, second - k) / total
        for k in range(min(first, second) + 1)
    ]


def rankings(run: Run) -> Picture:
    """Slope chart of two rankings, the overlap against chance, and the two layer scores."""
    choice, paper, layers = run.choice, run.choice.paper, range(run.layer_count)
    header = (
        "layer | rank | score | chosen | rank by the paper's masks | score by the paper's masks | "
        "chosen by the paper's masks"
    )

    def place(k: int, by: Selection | PaperSelection) -> list[Cell]:
        return [by.ranking.index(k) + 1, float(by.layer_scores[k]), int(k in by.layers)]

    rows = [[k, *place(k, choice), *place(k, paper)] for k in layers]
    shared = len(set(choice.layers) & set(paper.layers))
    odds = chance_overlap(run.layer_count, len(choice.layers), len(paper.layers))
    caption = (
        f"Each line is a layer, most important on top. The two sets share {shared} of "
        f"{len(choice.layers)} layers; two random sets of these sizes share "
        f"{sum(k * p for k, p in enumerate(odds)):.1f} on average, and at least as many with "
        f"probability {sum(odds[shared:]):.2f}. "
    )
    if (rho := choice.agreement["spearman"]) is not None:
        caption += f"Spearman correlation of the two scores: {rho:+.2f} over n = {len(layers)} "
        caption += "layers. "
    caption += "Agreement says that two rules measure similar things, not that either finds better "
    overlap = [(k, p, int(k == shared)) for k, p in enumerate(odds)]
    return Picture(
        key="rankings",
        title=f"Ranking by {choice.policy} and by the paper's masks",
        alt=f"Slope chart of {len(layers)} layers between two rankings; the sets share {shared} "
        "layers.",
        caption=caption + "layers.",
        tables=[
            Table("rankings", header, rows),
            Table("overlap", "shared layers | probability by chance | observed", overlap),
        ],
        draw=partial(_draw_rankings, run, odds, shared),
    )


def _draw_rankings(run: Run, odds: list[float], shared: int, theme: Theme) -> Figure:
    figure = new_figure(min(9.5, max(3.6, 0.172 * run.layer_count + 0.9)))
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
    dot: dict[str, Any] = {"marker": "o", "markersize": 3.2}
    for place, layer in enumerate(run.choice.ranking, start=1):
        color, width, order = _role(layer, run, theme)
        other = run.choice.paper.ranking.index(layer) + 1
        ax.plot([0, 1], [place, other], color=color, linewidth=width, zorder=order, **dot)
        text, weight = (theme.muted, "normal") if order == 1 else (color, "bold")
        style = {"va": "center", "fontsize": 7.2, "color": text, "fontweight": weight}
        ax.text(-0.035, place, str(layer), ha="right", **style)
        ax.text(1.035, other, str(layer), ha="left", **style)
    ax.set_ylim(run.layer_count + 0.8, 0.2)
    ax.set_xlim(-0.09, 1.09)
    ax.set_xticks([0, 1], [label(run.choice.policy), "the paper's masks"])
    ax.xaxis.tick_top()
    bare(ax, "x")
    ax.tick_params(axis="x", labelsize=8.4, labelcolor=theme.ink)
    ax.set_yticks([])
    names = ("both sets", "chosen only", "the paper's only")
    for name, color in zip(names, (theme.ink, theme.chosen, theme.contrast), strict=True):
        ax.plot([], [], color=color, linewidth=2, label=name)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, handlelength=1.4)


def _draw_chance(ax: Any, odds: list[float], shared: int, theme: Theme) -> None:
    colors = [theme.chosen if k == shared else theme.faint for k in range(len(odds))]
    ax.bar(range(len(odds)), odds, color=colors, width=0.8)
    ax.axhline(0, color=theme.muted, linewidth=0.7)
    style = {"ha": "center", "color": theme.chosen, "fontsize": 7.8, "fontweight": "bold"}
    note(ax, "observed", (shared, odds[shared]), (0, 4), **style)
    ax.set(title="Layers in both sets, against chance", xlabel="shared layers")
    ax.set_ylabel("probability")
    whole_numbers(ax)
    ax.margins(y=0.16)


def _draw_scatter(ax: Any, run: Run, theme: Theme) -> None:
    choice, scores = run.choice, run.choice.layer_scores
    for layer in range(run.layer_count):
        color, _, order = _role(layer, run, theme)
        color, size = (theme.muted, 3.4) if order == 1 else (color, 5)
        place = scores[layer], choice.paper.layer_scores[layer]
        ax.plot(*place, "o", color=color, markersize=size, zorder=order)
    if scores.min() > 0 and scores.max() > _LOG_FACTOR * scores.min():
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(title="Score of every layer", xlabel=f"score by {label(choice.policy)}")
    ax.set_ylabel("score by the paper's masks")


def tuning(run: Run) -> Picture:
    """Residual of each component before and after mask tuning."""
    fits = run.choice.tuning
    accepted = sum(fit["accepted"] for fit in fits)
    header = "layer | component | accepted | residual before | residual after"
    rows = [
        (f["layer"], f["component"], int(f["accepted"]), f["residual_before"], f["residual_after"])
        for f in fits
    ]
    return Picture(
        key="tuning",
        title="Tuning the paper's masks",
        alt=f"Residual before and after tuning for {len(fits)} components; {accepted} accepted.",
        caption="The least-squares fit rescales the units a mask retains so that each component's "
        "output comes back to what it was without a mask; the residual is what remains, relative "
        f"to that output. {accepted} of {len(fits)} fits were accepted, {len(fits) - accepted} "
        f"rejected (their masks stay binary). {_gain(fits)} A small residual says that the masks "
        "are well fitted, not that the layers they point at are the right ones.",
        tables=[Table("tuning", header, rows)],
        draw=partial(_draw_tuning, fits),
    )


def _gain(fits: list[Tuned]) -> str:
    ends = [(fit["residual_before"], fit["residual_after"]) for fit in fits if fit["accepted"]]
    ratios = [after / before for before, after in ends if before and after is not None]
    if not ratios:
        return ""
    low, middle, high = (decimals(float(q), 2) for q in np.percentile(ratios, [0, 50, 100]))
    size = f"median of n = {len(ratios)}"
    return f"Accepted fits left {middle} of their residual ({size}; {low} to {high})."


def _draw_tuning(fits: list[Tuned], theme: Theme) -> Figure:
    kinds = sorted({fit["component"] for fit in fits})
    figure = new_figure(1.75 * len(kinds) + 0.5)
    axes = figure.subplots(len(kinds), 1, squeeze=False, sharex=True)[:, 0]
    hollow = {"color": theme.muted, "markerfacecolor": theme.paper}
    for ax, kind in zip(axes, kinds, strict=True):
        for fit in fits:
            layer, before, after = fit["layer"], fit["residual_before"], fit["residual_after"]
            if fit["component"] == kind and before is not None and after is not None:
                color, mark = (theme.chosen, "o") if fit["accepted"] else (theme.contrast, "X")
                ax.plot([layer, layer], [before, after], color=color, linewidth=1.3)
                ax.plot(layer, before, "o", markersize=4.4, **hollow)
                ax.plot(layer, after, mark, color=color, markersize=5.4)
        ax.set(title=label(kind), ylabel="residual")
        ax.set_ylim(bottom=0)
        ax.grid(axis="y")
    axes[-1].set_xlabel("layer")
    whole_numbers(axes[-1])
    axes[0].plot([], [], "o", label="before", markersize=5, **hollow)
    axes[0].plot([], [], "o", label="after, accepted", markersize=5, color=theme.chosen)
    axes[0].plot([], [], "X", label="after, rejected", markersize=5, color=theme.contrast)
    axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=3, handletextpad=0.2)
    return figure
