"""Heat maps of the scores: layer by component, and layer by unit (the paper's Figs. 3 and 10)."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from floe.report.arms import arm_names, looks
from floe.report.run import Run
from floe.report.tables import Picture, Table, label, percent, plural, significant
from floe.report.theme import Theme, new_figure
from floe.types import Floats

_LOG_FACTOR = 20.0
_BINS = 64


def mark_layers(ax: Any, run: Run, theme: Theme, labels: bool = True) -> None:
    """Two rows of marks above a map whose x axis is the layer: chosen layers and the paper's."""
    transform = ax.get_xaxis_transform()
    height = ax.get_position().height * ax.figure.get_figheight()
    rows = (
        (run.choice.layers, theme.chosen, "o", True, f"chosen ({label(run.choice.policy)})"),
        (run.choice.paper.layers, theme.contrast, "D", False, "the paper's masks"),
    )
    shown = rows[:1] if run.is_paper else rows
    for row, (layers, color, marker, filled, text) in enumerate(shown):
        y = 1 + (0.13 + 0.19 * (1 - row)) / height
        face = color if filled else "none"
        sizes = {"markersize": 6.0 if filled else 5.0, "markeredgewidth": 1.2}
        ax.plot(layers, [y] * len(layers), marker, transform=transform, clip_on=False,
                color=color, markerfacecolor=face, **sizes)  # fmt: skip
        if labels:
            style = {"color": color, "ha": "right", "va": "center", "fontsize": 7.8}
            ax.annotate(text, (0, y), xycoords="axes fraction", xytext=(-8, 0),
                        textcoords="offset points", **style)  # fmt: skip


def layer_axis(
    ax: Any, run: Run, theme: Theme, name: str = "layer (0 is next to the input)"
) -> None:
    """Layer numbers under a map; the chosen ones stand out."""
    layers = run.layer_count
    step = 1 if layers <= 40 else 2 if layers <= 64 else 4
    ticks = range(0, layers, step)
    ax.set_xlim(-0.5, layers - 0.5)
    ax.set_xticks(list(ticks), [str(t) for t in ticks])
    for tick, text in zip(ticks, ax.get_xticklabels(), strict=True):
        if tick in run.choice.layers:
            text.set_color(theme.chosen)
            text.set_fontweight("bold")
    ax.set_xlabel(name)
    ax.tick_params(length=0)


def tiles(ax: Any, shape: tuple[int, int], theme: Theme) -> None:
    """Thin gaps of paper between the cells of a map, and no frame."""
    rows, columns = shape
    for edge in range(1, rows):
        ax.axhline(edge - 0.5, color=theme.paper, linewidth=1.4)
    for edge in range(1, columns):
        ax.axvline(edge - 0.5, color=theme.paper, linewidth=1.4)
    for spine in ax.spines.values():
        spine.set_visible(False)


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


def components(run: Run) -> dict[str, Floats]:
    """The rows of the saliency map by name, ``[L]`` each."""
    scores, paper = run.scores, run.choice.paper
    rows = {
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
    return {name: row for name, row in rows.items() if row is not None}


def saliency(run: Run) -> Picture:
    """Layer by component heat map with both policies' layers marked."""
    rows = components(run)
    names = tuple(rows)
    chosen, paper = run.choice.layers, run.choice.paper.layers
    table = Table(
        "saliency",
        ("layer", *names, "chosen", "chosen by the paper's masks"),
        tuple(
            (k, *(float(rows[n][k]) for n in names), int(k in chosen), int(k in paper))
            for k in range(run.layer_count)
        ),
    )

    def draw(theme: Theme) -> Figure:
        return _draw_saliency(run, rows, theme)

    return Picture(
        key="saliency",
        title="What each layer's scores look like",
        alt=f"Heat map of {len(rows)} scores over {run.layer_count} layers. Chosen layers: "
        f"{', '.join(map(str, chosen))}. Layers of the paper's masks: "
        f"{', '.join(map(str, paper))}.",
        caption="Each row is stretched from its own smallest value (faint) to its own largest "
        "(strong), "
        f"on a log scale where its values span more than a factor of {_LOG_FACTOR:.0f}; the range "
        "stands "
        f"at the right. Colours can be compared along a row, never between rows. {_sample(run)} "
        "A map of one calibration sample does not say how stable a score is.",
        tables=(table,),
        draw=draw,
    )


def _draw_saliency(run: Run, rows: dict[str, Floats], theme: Theme) -> Figure:
    figure = new_figure(0.3 * len(rows) + 1.25)
    ax = figure.subplots()
    scaled = [normalised(row) for row in rows.values()]
    grid = np.stack([row for row, _ in scaled])
    ax.imshow(grid, cmap=theme.colormap, vmin=0, vmax=1, aspect="auto", interpolation="none")
    tiles(ax, grid.shape, theme)
    for row, (values, (_, log)) in enumerate(zip(rows.values(), scaled, strict=True)):
        low, high = (significant(float(end), 2) for end in (np.nanmin(values), np.nanmax(values)))
        text = f"{low} to {high}"
        ax.annotate(text + (", log" if log else ""), (1, row), xycoords=("axes fraction", "data"),
                    xytext=(8, 0), textcoords="offset points", va="center", fontsize=7.4,
                    color=theme.muted)  # fmt: skip
    kinds = [name.split(",")[-1].split()[0] for name in rows]
    for edge in (e for e in range(1, len(rows)) if kinds[e] != kinds[e - 1]):
        ax.axhline(edge - 0.5, color=theme.paper, linewidth=5)
    ax.set_yticks(range(len(rows)), list(rows))
    layer_axis(ax, run, theme)
    ax.tick_params(axis="y", labelcolor=theme.ink, labelsize=8.2)
    mark_layers(ax, run, theme)
    return figure


def units(run: Run) -> Picture:
    """Fisher information of every head, and of the neurons sorted within their layer."""
    heads = run.scores.head_fisher
    neurons, sizes = sorted_bins(run.scores.neuron_fisher)
    head_table = Table(
        "units_heads",
        ("layer", "head", "fisher"),
        tuple((k, h, float(v)) for k, row in enumerate(heads) for h, v in enumerate(row)),
    )
    neuron_table = Table(
        "units_neurons",
        ("layer", "bin (largest first)", "neurons in bin", "mean fisher"),
        tuple(
            (k, b, sizes[b], float(v)) for k, row in enumerate(neurons) for b, v in enumerate(row)
        ),
    )
    share = _top_share(run.scores.neuron_fisher)

    def draw(theme: Theme) -> Figure:
        return _draw_units(run, neurons, theme)

    return Picture(
        key="units",
        title="Where inside a layer the Fisher information sits",
        alt=f"Two heat maps over {run.layer_count} layers: log Fisher of {heads.shape[1]} heads "
        "and of "
        f"{run.scores.neuron_fisher.shape[1]} neurons in {neurons.shape[1]} bins.",
        caption="Fisher information of the head and neuron masks, log scale. Heads keep their "
        "order; "
        "neurons are sorted within each layer, largest at the top, because their index means "
        "nothing. "
        f"The top 1 % of a layer's neurons holds {percent(share[0], 0)} to {percent(share[1], 0)} "
        "of its neuron Fisher, "
        "so a layer's mean describes few units. Marks on top: as in the map of scores. Units that "
        "no row moved (zero) are left blank.",
        tables=(head_table, neuron_table),
        draw=draw,
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
    axes = figure.subplots(2, 1, height_ratios=[top, 2.1], sharex=False)
    panels = ((heads, "head"), (neurons, "neurons, sorted"))
    for ax, (values, name) in zip(axes, panels, strict=True):
        grid = np.log10(values, out=np.full(values.shape, np.nan), where=values > 0).T
        image = ax.imshow(grid, cmap=theme.colormap, aspect="auto", interpolation="none")
        tiles(ax, (1, run.layer_count), theme)
        bar = figure.colorbar(image, ax=ax, pad=0.012, aspect=18, fraction=0.03)
        bar.outline.set_visible(False)
        bar.set_label("log10 Fisher")
        ax.set_ylabel(name)
        layer_axis(ax, run, theme, name="layer" if ax is axes[1] else "")
    heads_step = max(1, heads.shape[1] // 8)
    axes[0].set_yticks(range(0, heads.shape[1], heads_step))
    axes[1].set_yticks([-0.5, neurons.shape[1] - 0.5], ["largest", "smallest"])
    mark_layers(axes[0], run, theme, labels=False)
    return figure


def adapted(run: Run) -> Picture:
    """Which layers each trained arm adapts."""
    arms = [arm for arm in arm_names(run) if arm in run.training]
    rows = tuple(
        (arm, k, int(k in run.training[arm].layers)) for arm in arms for k in range(run.layer_count)
    )

    def draw(theme: Theme) -> Figure:
        figure = new_figure(0.27 * len(arms) + 0.75)
        ax = figure.subplots()
        style = looks(run, theme)
        for row, arm in enumerate(arms):
            every, mine = range(run.layer_count), run.training[arm].layers
            ax.plot(every, [row] * len(every), "s", color=theme.grid, markersize=8)
            ax.plot(mine, [row] * len(mine), "s", color=style[arm].color, markersize=11)
        layer_axis(ax, run, theme, name="layer")
        ax.set_yticks(range(len(arms)), [style[arm].text for arm in arms])
        ax.tick_params(axis="y", labelcolor=theme.ink)
        ax.set_ylim(len(arms) - 0.4, -0.6)
        for spine in ax.spines.values():
            spine.set_visible(False)
        return figure

    return Picture(
        key="layers",
        title="Which layers each arm adapts",
        alt=f"{len(arms)} arms by {run.layer_count} layers; a filled square is an adapted layer.",
        caption="A filled square is a layer with an adapter; the number in brackets counts them. "
        f"{plural(len(arms), 'arm')}: a sample of the possible sets, too small to say which layers "
        "matter on their own.",
        tables=(Table("layers", ("arm", "layer", "adapted"), rows),),
        draw=draw,
    )


def _sample(run: Run) -> str:
    meta = run.scores.meta
    rows, tokens, seed = meta.get("rows"), meta.get("tokens"), meta.get("seed")
    parts = [
        f"{rows:,} rows" if isinstance(rows, int) else "",
        f"{tokens:,} tokens" if isinstance(tokens, int) else "",
    ]
    known = ", ".join(part for part in parts if part)
    seed_text = f", seed {seed}" if isinstance(seed, int) else ""
    return (
        f"Scores from {known}{seed_text}."
        if known
        else "The number of calibration rows was not recorded."
    )
