"""The arms: where their adapters are, how they trained, what they reached overall and by task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from floe.artifacts.results import Interval, TaskOutcome, Training
from floe.report.run import Run
from floe.report.scores import layer_axis
from floe.report.tables import (
    Picture,
    Section,
    Table,
    decimals,
    flat,
    label,
    percent,
    plural,
)
from floe.report.theme import DASHED, Theme, legend_below, new_figure, note
from floe.types import Floats

_MARKERS = ("^", "v", "P", "X", ">", "<", "p", "h")
_TASKS_WITH_EVERY_ARM = 14
_HEADER = "measure | value | low | high | rows"


def training_section(run: Run) -> Section:
    """Where the adapters of each arm are, and its loss during training."""
    section = partial(Section, key="training", title="Training")
    if not run.training:
        return section(missing="No training was run.")
    lead = (
        "Every arm starts from the same base model with fresh adapters; arms differ in which "
        "layers carry them."
    )
    alone = (
        "No baseline was trained: nothing here says whether other layers would have done as well."
    )
    placed = [training for training in run.trained.values() if training.modules or training.sizes]
    pictures = (adapted(run), *([placements(run, placed)] if placed else []), curves(run))
    missing = alone if set(run.training) == {"main"} else ""
    return section(lead=lead, pictures=pictures, missing=missing)


def results_section(run: Run) -> Section:
    """What the arms reach on held-out rows."""
    section = partial(Section, key="results", title="Results")
    if run.evaluation is None:
        return section(missing="The evaluation was not run.")
    pictures = [outcomes(run), *tasks(run)]
    return section(lead="Held-out rows, each arm with its 95 % interval.", pictures=pictures)


@dataclass(frozen=True)
class Look:
    """How one arm is drawn everywhere."""

    text: str
    color: str
    marker: str
    line: str


def looks(run: Run, theme: Theme) -> dict[str, Look]:
    """Colour, marker and line of every arm; the marker differs too, so colour never decides."""
    # In the paper's colour: the first arm that adapts the layers the paper's masks chose.
    theirs = run.choice.paper.layers
    arms = (arm for arm in sorted(run.training) if arm != "main")
    paper = next((arm for arm in arms if run.training[arm].layers == theirs), None)
    styles: dict[str, Look] = {}
    spare = 0
    for arm in run.arms:
        text = label(arm)
        if arm in run.training and arm != "base":
            text += f" ({len(run.training[arm].layers)})"
        if arm == "base":
            styles[arm] = Look(text, theme.muted, "D", "-")
        elif arm == "main":
            styles[arm] = Look(text, theme.chosen, "o", "-")
        elif run.adapts_all(arm):
            styles[arm] = Look(text, theme.ink, "s", "--")
        elif arm == paper:
            styles[arm] = Look(text, theme.contrast, "d", "-")
        else:
            color = theme.others[spare % len(theme.others)]
            line = ("-", "-.", ":")[spare // len(theme.others) % 3]
            styles[arm] = Look(text, color, _MARKERS[spare % len(_MARKERS)], line)
            spare += 1
    return styles


def adapted(run: Run) -> Picture:
    """Which layers each trained arm adapts."""
    layers, arms = range(run.layer_count), run.trained

    def draw(theme: Theme) -> Figure:
        figure = new_figure(0.27 * len(arms) + 0.75)
        ax = figure.subplots()
        style = looks(run, theme)
        for row, (arm, training) in enumerate(arms.items()):
            ax.plot(layers, [row] * len(layers), "s", color=theme.grid, markersize=8)
            mine = [row] * len(training.layers)
            ax.plot(training.layers, mine, "s", color=style[arm].color, markersize=11)
        layer_axis(ax, run, theme, name="layer")
        ax.set_yticks(range(len(arms)), [style[arm].text for arm in arms])
        ax.tick_params(axis="y", labelcolor=theme.ink)
        ax.set_ylim(len(arms) - 0.4, -0.6)
        ax.spines[:].set_visible(False)
        return figure

    rows = [(arm, k, int(k in training.layers)) for arm, training in arms.items() for k in layers]
    return Picture(
        key="layers",
        title="Which layers each arm adapts",
        alt=f"{len(arms)} arms by {len(layers)} layers; a filled square is an adapted layer.",
        caption="A filled square is a layer with an adapter; the number in brackets counts them. "
        f"{plural(len(arms), 'arm')}: a sample of the possible sets, too small to say which layers "
        "matter on their own.",
        tables=[Table("layers", "arm | layer | adapted", rows)],
        draw=draw,
    )


def placements(run: Run, arms: Sequence[Training]) -> Picture:
    """Of arms that chose by projection or size: projections, or rank and experts, by layer."""
    rows = [
        (
            training.arm,
            layer,
            " ".join(training.modules.get(layer, ())),
            *training.sizes.get(layer, (training.rank, training.num_experts)),
        )
        for training in arms
        for layer in training.layers
    ]
    return Picture(
        key="placements",
        title="Where in the layers the adapters are",
        alt=f"{plural(len(arms), 'arm')} whose adapters differ by projection or in size, by layer.",
        caption="Squares: adapted projections. Bars: rank, with the number of experts above. Each "
        "of these arms may spend the parameters that whole layers at the searched rank would take, "
        "as many layers as the run chose.",
        tables=[Table("placements", "arm | layer | projections | rank | experts", rows)],
        draw=partial(_draw_placements, run, arms),
    )


def _draw_placements(run: Run, arms: Sequence[Training], theme: Theme) -> Figure:
    names = [sorted({n for mine in training.modules.values() for n in mine}) for training in arms]
    heights = [0.24 * len(mine) + 0.1 if mine else 0.9 for mine in names]
    figure = new_figure(sum(heights) + 0.45 * len(arms) + 0.4)
    axes = figure.subplots(len(arms), 1, squeeze=False, height_ratios=heights)[:, 0]
    style = looks(run, theme)
    for ax, training, projections in zip(axes, arms, names, strict=True):
        color = style[training.arm].color
        if projections:
            for row, name in enumerate(projections):
                mine = [layer for layer, adapted in training.modules.items() if name in adapted]
                every = range(run.layer_count)
                ax.plot(every, [row] * len(every), "s", color=theme.grid, markersize=6)
                ax.plot(mine, [row] * len(mine), "s", color=color, markersize=8)
            ax.set_yticks(range(len(projections)), projections)
            ax.set_ylim(len(projections) - 0.4, -0.6)
        else:
            ranks = [rank for rank, _ in training.sizes.values()]
            ax.bar(list(training.sizes), ranks, color=color, width=0.7)
            text = {"ha": "center", "fontsize": 6.5, "color": theme.muted}
            for layer, (rank, experts) in training.sizes.items():
                note(ax, str(experts), (layer, rank), (0, 2), **text)
            ax.set_ylabel("rank")
            ax.set_ylim(0, 1.2 * max(ranks))
        layer_axis(ax, run, theme, name="layer" if ax is axes[-1] else "")
        ax.set_title(style[training.arm].text, loc="left", fontsize=8, color=theme.ink)
        ax.spines[:].set_visible(False)
    return figure


def curves(run: Run) -> Picture:
    """Training and validation loss of every arm against the step."""
    rows = [
        (arm, kind, float(step), float(value))
        for arm, training in run.trained.items()
        for kind in ("train_loss", "validation_loss")
        for step, value in getattr(training, kind)
    ]
    seeds = sorted({str(training.seed) for training in run.training.values()})
    return Picture(
        key="curves",
        title="Loss during training",
        alt=f"Training and validation loss against the step for {len(run.training)} arms.",
        caption="Nats per response token; the number in brackets counts adapted layers. Left: "
        "running mean over a tenth of the steps, with the raw loss of the main arm behind it. "
        "Middle and right: held-out rows, the right with an axis of its own. One run per arm, "
        f"training seed {', '.join(seeds)}: n = 1, so a gap between two curves contains seed noise "
        "that nothing here measures.",
        tables=[Table("curves", "arm | curve | step | loss", rows)],
        draw=partial(_draw_curves, run),
    )


def smooth(values: Floats) -> Floats:
    """Centred running mean over about a tenth of the points, narrower at the ends; NaN spreads."""
    half = max(1, len(values) // 20)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return np.array([window.mean() for window in windows])


def _draw_curves(run: Run, theme: Theme) -> Figure:
    figure = new_figure(3.7)
    axes = figure.subplots(1, 3)
    style = looks(run, theme)
    for arm, training in reversed(run.trained.items()):
        look = style[arm]
        order, width = (3, 2.1) if arm == "main" else (2, 1.3)
        line: dict[str, Any] = {"color": look.color, "zorder": order, "linewidth": width}
        mark: dict[str, Any] = {"marker": look.marker, "markersize": 4.2, "label": look.text}
        trained, held_out = (
            np.asarray(curve, dtype=np.float64).reshape(-1, 2)
            for curve in (training.train_loss, training.validation_loss)
        )
        if arm == "main":
            axes[0].plot(*trained.T, color=look.color, linewidth=0.7, alpha=0.35)
        axes[0].plot(trained[:, 0], smooth(trained[:, 1]), look.line, **line)
        axes[1].plot(*held_out.T, look.line, **line, **mark)
        late = held_out[held_out[:, 0] >= training.steps / 2]
        axes[2].plot(*late.T, look.line, **line, **mark)
    titles = ("Training rows", "Validation rows", "Validation rows, second half")
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, xlabel="step")
        ax.grid(axis="y")
    axes[0].set_ylabel("loss, nats per token")
    handles, names = axes[1].get_legend_handles_labels()
    legend_below(figure, len(names), handles[::-1], names[::-1])
    return figure


def outcomes(run: Run) -> Picture:
    """Loss and accuracy of every arm with intervals, over all tasks."""
    rows = [
        (arm, what, *flat(interval))
        for arm, outcome in run.evaluated.items()
        for what in ("loss", "loss_minus_main", "accuracy")
        if (interval := getattr(outcome, what)) is not None
    ]
    intervals = (run.evaluation and run.evaluation.intervals) or "95 %"
    return Picture(
        key="outcomes",
        title="Loss and accuracy of every arm",
        alt=f"Loss and accuracy with 95 % intervals for {len(run.evaluated)} arms.",
        caption=f"Intervals: {intervals}. The band repeats the main arm's interval; an "
        "arrow gives the value of a model beyond the axis. Differences whose intervals overlap are "
        "not established; where a paired difference is shown, it is the sharper test, and is not "
        "established if its interval holds zero. All intervals cover the rows that were evaluated, "
        "not the training seed: each arm was trained once.",
        tables=[Table("outcomes", f"arm | {_HEADER}", rows)],
        draw=partial(_draw_outcomes, run),
    )


def _draw_outcomes(run: Run, theme: Theme) -> Figure:
    arms, style = run.evaluated, looks(run, theme)
    panels = {
        "loss": ("Loss (left is better)", "nats per response token"),
        "loss_minus_main": ("Loss minus main's, paired", "nats per response token"),
        "accuracy": ("Accuracy (right is better)", "share of rows answered correctly"),
    }
    if all(outcome.loss_minus_main is None for outcome in arms.values()):
        del panels["loss_minus_main"]
    figure = new_figure(0.3 * len(arms) + 1.05)
    axes = figure.subplots(1, len(panels), sharey=True)
    for ax, (what, (title, unit)) in zip(axes, panels.items(), strict=True):
        main = getattr(arms.get("main"), what, None)
        if what == "loss_minus_main":
            ax.axvline(0, color=theme.chosen, linewidth=1, linestyle=DASHED)
        elif main is not None and main.ends is not None:
            ax.axvspan(*main.ends, color=theme.chosen, alpha=0.1, linewidth=0)
        for row, (arm, outcome) in enumerate(arms.items()):
            if (what, arm) != ("loss_minus_main", "main"):
                _forest_mark(ax, row, getattr(outcome, what), style[arm], theme)
        _finish(ax, arms, what, theme)
        ax.set(title=title, xlabel=unit)
    axes[0].set_yticks(range(len(arms)), [style[arm].text for arm in arms])
    axes[0].set_ylim(len(arms) - 0.4, -0.6)
    axes[-1].xaxis.set_major_formatter(lambda value, _: percent(value, 0))
    return figure


def _forest_mark(ax: Any, row: float, interval: Interval | None, look: Look, theme: Theme) -> None:
    """A dot with its interval as a line; hollow where there is no interval; nothing for None."""
    if interval is None or not math.isfinite(interval.value):
        return
    if interval.ends is not None:
        ax.plot(interval.ends, [row, row], color=look.color, linewidth=1.6)
    face = look.color if interval.ends else theme.paper
    dot: dict[str, Any] = {"markersize": 6, "markerfacecolor": face, "gid": "value"}
    ax.plot([interval.value], [row], look.marker, color=look.color, **dot)


def _finish(ax: Any, results: Mapping[str, TaskOutcome], what: str, theme: Theme) -> None:
    """Axis over the trained arms; an arrow points at a base model far beyond it."""
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0, labelcolor=theme.ink)
    trained: list[float] = []
    base: list[float] = []
    for name, outcome in results.items():
        if (interval := getattr(outcome, what)) is not None:
            ends = (interval.value, *(interval.ends or ()))
            group = base if name.split("/")[0] == "base" else trained
            group += filter(math.isfinite, ends)
    if not (trained or base):
        return
    low, high = min(trained or base), max(trained or base)
    reach = high - low
    near = [end for end in base if low - reach <= end <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.06 * (high - low) or 0.05
    ax.set_xlim(low - margin, high + margin)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    low, high = ax.get_xlim()
    for line in [line for line in ax.lines if line.get_gid() == "value"]:
        (x,), (row,) = line.get_xdata(), line.get_ydata()
        if not low <= x <= high:
            number = percent(x) if what == "accuracy" else decimals(x)
            text, edge, side = (
                (f"{number} →", 1, "right") if x > high else (f"← {number}", 0, "left")
            )
            style = {"va": "center", "ha": side, "fontsize": 7.4, "color": line.get_color()}
            ax.annotate(text, (edge, row), xycoords=("axes fraction", "data"), **style)


def tasks(run: Run) -> list[Picture]:
    """Loss and accuracy by task; nothing without tasks."""
    names = sorted({task for outcome in run.outcomes.values() for task in outcome.by_task})
    if not names:
        return []
    rows = [
        (task, arm, what, *flat(interval))
        for task in names
        for arm, outcome in run.evaluated.items()
        for what in ("loss", "accuracy")
        if (interval := getattr(outcome.by_task.get(task), what, None)) is not None
    ]
    arms = list(run.evaluated)
    if len(names) > _TASKS_WITH_EVERY_ARM:
        arms = [arm for arm in arms if arm in ("base", "main") or run.adapts_all(arm)]
    sizes = sorted({row[-1] for row in rows if isinstance(row[-1], int)})
    per_task = (
        f"{' to '.join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))} rows each"
        if sizes
        else "rows a task not recorded"
    )
    picture = Picture(
        key="tasks",
        title="The same by task",
        alt=f"Results with 95 % intervals for {len(names)} tasks and {len(arms)} arms.",
        caption=f"{plural(len(names), 'task')}, {per_task}, intervals of 95 %. Few rows give wide "
        "intervals, and among many tasks some differ by chance: a single task is no evidence for "
        f"an arm. Shown: {', '.join(map(label, arms))}; the CSV holds every arm.",
        tables=[Table("tasks", f"task | arm | {_HEADER}", rows)],
        draw=partial(_draw_tasks, run, names, arms),
    )
    return [picture]


def _draw_tasks(run: Run, names: list[str], arms: list[str], theme: Theme) -> Figure:
    figure = new_figure(len(names) * (0.1 * len(arms) + 0.14) + 1.0)
    axes = figure.subplots(1, 2, sharey=True)
    style = looks(run, theme)
    offsets = np.linspace(-0.33, 0.33, len(arms)) if len(arms) > 1 else np.zeros(1)
    by_task = {
        f"{arm}/{task}": outcome
        for arm in arms
        for task, outcome in run.outcomes[arm].by_task.items()
    }
    for ax, what in zip(axes, ("loss", "accuracy"), strict=True):
        for row, task in enumerate(names):
            if row % 2:
                ax.axhspan(row - 0.5, row + 0.5, color=theme.grid, alpha=0.35, linewidth=0)
            for arm, offset in zip(arms, offsets, strict=True):
                interval = getattr(run.outcomes[arm].by_task.get(task), what, None)
                _forest_mark(ax, row + offset, interval, style[arm], theme)
        _finish(ax, by_task, what, theme)
    for arm in arms:
        look = style[arm]
        axes[0].plot([], [], look.marker, color=look.color, label=look.text)
    axes[0].set_yticks(range(len(names)), [label(name, 26) for name in names])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    axes[0].set(title="Loss by task", xlabel="nats per response token")
    axes[1].set(title="Accuracy by task", xlabel="share of rows answered correctly")
    axes[1].xaxis.set_major_formatter(lambda value, _: percent(value, 0))
    legend_below(figure, len(arms))
    return figure
