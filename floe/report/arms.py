"""What training bought: curves, intervals by arm and task, cost against adapted layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from floe.artifacts.results import Evaluation, Interval, TaskOutcome
from floe.report.run import Run
from floe.report.tables import Cell, Picture, Table, decimals, label, percent, plural
from floe.report.theme import Theme, new_figure
from floe.types import Floats

_MARKERS = ("^", "v", "P", "X", ">", "<", "p", "h")
_TASKS_WITH_EVERY_ARM = 14
_MEASURES = ("loss", "loss_minus_main", "accuracy")
_COLUMNS = ("measure", "value", "low", "high", "rows")


@dataclass(frozen=True)
class Look:
    """How one arm is drawn everywhere."""

    text: str
    color: str
    marker: str
    line: str


def arm_names(run: Run) -> list[str]:
    """Every arm: base, main, those adapting all layers, then the rest by name."""
    names = set(run.training) | (set(run.evaluation.arms) if run.evaluation else set())

    def order(name: str) -> tuple[int, str]:
        if name in ("base", "main"):
            return (name == "main", name)
        return (2 if adapts_all(run, name) else 3, name)

    return sorted(names, key=order)


def adapts_all(run: Run, arm: str) -> bool:
    """Whether an arm adapts every layer of the model."""
    return arm in run.training and len(run.training[arm].layers) == run.layer_count


def looks(run: Run, theme: Theme) -> dict[str, Look]:
    """Colour, marker and line of every arm; the marker differs too, so colour never decides."""
    found: dict[str, Look] = {}
    spare = 0
    for arm in arm_names(run):
        text = label(arm)
        if arm in run.training and arm != "base":
            text += f" ({len(run.training[arm].layers)})"
        if arm == "base":
            found[arm] = Look(text, theme.muted, "D", "-")
        elif arm == "main":
            found[arm] = Look(text, theme.chosen, "o", "-")
        elif adapts_all(run, arm):
            found[arm] = Look(text, theme.ink, "s", "--")
        elif arm == _masks_arm(run):
            found[arm] = Look(text, theme.contrast, "d", "-")
        else:
            color = theme.others[spare % len(theme.others)]
            line = ("-", "-.", ":")[spare // len(theme.others) % 3]
            found[arm] = Look(text, color, _MARKERS[spare % len(_MARKERS)], line)
            spare += 1
    return found


def _masks_arm(run: Run) -> str | None:
    """The arm in the paper's colour: the first that adapts the layers the paper's masks chose."""
    theirs = run.choice.paper.layers
    arms = (arm for arm in sorted(run.training) if arm != "main")
    return next((arm for arm in arms if run.training[arm].layers == theirs), None)


def points(curve: Sequence[tuple[float, float]]) -> Floats:
    """A curve as ``[n, 2]`` float64 of step and loss."""
    return np.asarray(curve, dtype=np.float64).reshape(-1, 2)


def flat(interval: Interval) -> tuple[Cell, ...]:
    """A value, its ends and its rows, as cells."""
    low, high = interval.ends or (None, None)
    return interval.value, low, high, interval.rows


def smooth(values: Floats) -> Floats:
    """Centred running mean over about a tenth of the points, narrower at the ends; NaN spreads."""
    half = max(1, len(values) // 20)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return np.array([window.mean() for window in windows])


def curves(run: Run) -> Picture:
    """Training and validation loss of every arm against the step."""
    arms = [arm for arm in arm_names(run) if arm in run.training]
    rows: list[tuple[Cell, ...]] = []
    for arm in arms:
        for kind in ("train_loss", "validation_loss"):
            rows += [(arm, kind, float(s), float(v)) for s, v in getattr(run.training[arm], kind)]
    seeds = sorted({str(run.training[arm].seed) for arm in arms})

    def draw(theme: Theme) -> Figure:
        return _draw_curves(run, arms, theme)

    return Picture(
        key="curves",
        title="Loss during training",
        alt=f"Training and validation loss against the step for {len(arms)} arms.",
        caption="Nats per response token; the number in brackets counts adapted layers. Left: "
        "running mean "
        "over a tenth of the steps, with the raw loss of the main arm behind it. Middle and "
        "right: held-out rows, the right with an axis of its own. One "
        f"run per arm, training seed {', '.join(seeds)}: n = 1, so a gap between two curves "
        "contains "
        "seed noise that nothing here measures.",
        tables=(Table("curves", ("arm", "curve", "step", "loss"), tuple(rows)),),
        draw=draw,
    )


def _draw_curves(run: Run, arms: list[str], theme: Theme) -> Figure:
    figure = new_figure(3.7)
    axes = figure.subplots(1, 3)
    style = looks(run, theme)
    for arm in reversed(arms):
        look, one = style[arm], run.training[arm]
        front = {"zorder": 3 if arm == "main" else 2, "linewidth": 2.1 if arm == "main" else 1.3}
        (steps, losses), held_out = points(one.train_loss).T, points(one.validation_loss)
        if arm == "main":
            axes[0].plot(steps, losses, color=look.color, linewidth=0.7, alpha=0.35)
        axes[0].plot(steps, smooth(losses), look.line, color=look.color, **front)
        late = held_out[held_out[:, 0] >= one.steps / 2]
        for ax, curve in ((axes[1], held_out), (axes[2], late)):
            ax.plot(*curve.T, look.line, color=look.color, marker=look.marker, markersize=4.2,
                    label=look.text, **front)  # fmt: skip
    titles = ("Training rows", "Validation rows", "Validation rows, second half")
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, xlabel="step")
        ax.grid(axis="y")
    axes[0].set_ylabel("loss, nats per token")
    handles, names = axes[1].get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside lower center", ncols=min(7, len(arms)))
    return figure


def outcomes(run: Run, evaluation: Evaluation) -> Picture:
    """Loss and accuracy of every arm with intervals, over all tasks."""
    rows: list[tuple[Cell, ...]] = []
    for arm in arm_names(run):
        if arm in evaluation.arms:
            one = evaluation.arms[arm]
            rows += [
                (arm, what, *flat(interval))
                for what in _MEASURES
                if (interval := getattr(one, what)) is not None
            ]

    def draw(theme: Theme) -> Figure:
        return _draw_outcomes(run, evaluation, theme)

    return Picture(
        key="outcomes",
        title="Loss and accuracy of every arm",
        alt=f"Loss and accuracy with 95 % intervals for {len(evaluation.arms)} arms.",
        caption=f"Intervals: {evaluation.intervals or '95 %'}. The band repeats the main arm's "
        "interval; an arrow gives the value of a model beyond the axis. Differences whose "
        "intervals overlap are not established; where a paired difference is shown, it is the "
        "sharper test, and is not established if its interval holds zero. All intervals cover the "
        "rows that were evaluated, not the training seed: each arm was trained once.",
        tables=(Table("outcomes", ("arm", *_COLUMNS), tuple(rows)),),
        draw=draw,
    )


def _draw_outcomes(run: Run, evaluation: Evaluation, theme: Theme) -> Figure:
    arms = [arm for arm in arm_names(run) if arm in evaluation.arms]
    panels = {
        "loss": ("Loss (left is better)", "nats per response token"),
        "loss_minus_main": ("Loss minus main's, paired", "nats per response token"),
        "accuracy": ("Accuracy (right is better)", "share of rows answered correctly"),
    }
    if all(one.loss_minus_main is None for one in evaluation.arms.values()):
        del panels["loss_minus_main"]
    figure = new_figure(0.3 * len(arms) + 1.05)
    axes = figure.subplots(1, len(panels), sharey=True)
    style = looks(run, theme)
    for ax, (what, (title, unit)) in zip(axes, panels.items(), strict=True):
        _mark_main(ax, evaluation, what, theme)
        for row, arm in enumerate(arms):
            if (what, arm) != ("loss_minus_main", "main"):
                forest_mark(ax, row, getattr(evaluation.arms[arm], what), style[arm], theme)
        _finish(ax, evaluation.arms, what, theme)
        ax.set(title=title, xlabel=unit)
    axes[0].set_yticks(range(len(arms)), [style[arm].text for arm in arms])
    axes[0].set_ylim(len(arms) - 0.4, -0.6)
    axes[-1].xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    return figure


def _mark_main(ax: Any, evaluation: Evaluation, what: str, theme: Theme) -> None:
    """The main arm's interval as a band, or the line at zero of a difference to it."""
    if what == "loss_minus_main":
        ax.axvline(0, color=theme.chosen, linewidth=1, linestyle=(0, (4, 3)))
        return
    main = getattr(evaluation.arms.get("main"), what, None)
    if main is not None and main.ends is not None:
        ax.axvspan(*main.ends, color=theme.chosen, alpha=0.1, linewidth=0)


def forest_mark(ax: Any, row: float, interval: Interval | None, look: Look, theme: Theme) -> None:
    """A dot with its interval as a line; hollow where there is no interval; nothing for None."""
    if interval is None or not math.isfinite(interval.value):
        return
    if interval.ends is not None:
        ax.plot(interval.ends, [row, row], color=look.color, linewidth=1.6)
    ax.plot([interval.value], [row], look.marker, color=look.color, markersize=6, gid="value",
            markerfacecolor=look.color if interval.ends else theme.paper)  # fmt: skip


def _finish(ax: Any, results: Mapping[str, TaskOutcome], what: str, theme: Theme) -> None:
    """Axis over the trained arms; an arrow points at a base model far beyond it."""
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0, labelcolor=theme.ink)
    trained = [_ends(getattr(one, what)) for name, one in results.items() if not _is_base(name)]
    base = [_ends(getattr(one, what)) for name, one in results.items() if _is_base(name)]
    ends = [end for pair in trained or base for end in pair]
    if not ends:
        return
    low, high = min(ends), max(ends)
    reach = high - low
    near = [end for pair in base for end in pair if low - reach <= end <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.06 * (high - low) or 0.05
    ax.set_xlim(low - margin, high + margin)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    for line in [line for line in ax.lines if line.get_gid() == "value"]:
        _point_beyond(ax, line, percent if what == "accuracy" else decimals)


def _is_base(name: str) -> bool:
    return name == "base" or name.startswith("base/")


def _ends(interval: Interval | None) -> list[float]:
    """The finite ones of a value and its bounds."""
    if interval is None:
        return []
    return [end for end in (interval.value, *(interval.ends or ())) if math.isfinite(end)]


def _point_beyond(ax: Any, line: Any, number: Callable[[float], str]) -> None:
    """The value of a dot outside the axis, with an arrow at the edge it lies behind."""
    (x,), (row,) = line.get_xdata(), line.get_ydata()
    low, high = ax.get_xlim()
    if low <= x <= high:
        return
    text = f"{number(x)} →" if x > high else f"← {number(x)}"
    edge, side = (1, "right") if x > high else (0, "left")
    style = {"va": "center", "ha": side, "fontsize": 7.4, "color": line.get_color()}
    ax.annotate(text, (edge, row), xycoords=("axes fraction", "data"), **style)


def tasks(run: Run, evaluation: Evaluation) -> Picture | None:
    """Accuracy (or loss, where no arm has accuracy) by task; None without tasks."""
    names = sorted({task for arm in evaluation.arms.values() for task in arm.by_task})
    if not names:
        return None
    rows: list[tuple[Cell, ...]] = []
    for task in names:
        for arm in arm_names(run):
            one = evaluation.arms[arm].by_task.get(task) if arm in evaluation.arms else None
            for what in ("loss", "accuracy") if one else ():
                interval = getattr(one, what)
                if interval is not None:
                    rows.append((task, arm, what, *flat(interval)))
    arms = [arm for arm in arm_names(run) if arm in evaluation.arms]
    if len(names) > _TASKS_WITH_EVERY_ARM:
        arms = [arm for arm in arms if arm in ("base", "main") or adapts_all(run, arm)]
    sizes = sorted({row[-1] for row in rows if isinstance(row[-1], int)})
    per_task = "rows a task not recorded"
    if sizes:
        per_task = (
            f"{sizes[0]} rows each"
            if sizes[0] == sizes[-1]
            else f"{sizes[0]} to {sizes[-1]} rows each"
        )

    def draw(theme: Theme) -> Figure:
        return _draw_tasks(run, evaluation, names, arms, theme)

    return Picture(
        key="tasks",
        title="The same by task",
        alt=f"Results with 95 % intervals for {len(names)} tasks and {len(arms)} arms.",
        caption=f"{plural(len(names), 'task')}, {per_task}, intervals of 95 %. Few rows give wide "
        "intervals, and among many tasks some "
        "differ by chance: a single task is no evidence for an arm. "
        f"Shown: {', '.join(label(arm) for arm in arms)}; the CSV holds every arm.",
        tables=(Table("tasks", ("task", "arm", *_COLUMNS), tuple(rows)),),
        draw=draw,
    )


def _draw_tasks(
    run: Run, evaluation: Evaluation, names: list[str], arms: list[str], theme: Theme
) -> Figure:
    figure = new_figure(len(names) * (0.1 * len(arms) + 0.14) + 1.0)
    axes = figure.subplots(1, 2, sharey=True)
    style = looks(run, theme)
    offsets = np.linspace(-0.33, 0.33, len(arms)) if len(arms) > 1 else np.zeros(1)
    for ax, what in zip(axes, ("loss", "accuracy"), strict=True):
        for row, task in enumerate(names):
            if row % 2:
                ax.axhspan(row - 0.5, row + 0.5, color=theme.grid, alpha=0.35, linewidth=0)
            for arm, offset in zip(arms, offsets, strict=True):
                one = evaluation.arms[arm].by_task.get(task)
                forest_mark(
                    ax, row + offset, getattr(one, what) if one else None, style[arm], theme
                )
        by_task = {
            f"{arm}/{task}": one
            for arm in arms
            for task, one in evaluation.arms[arm].by_task.items()
        }
        _finish(ax, by_task, what, theme)
    for arm in arms:
        look = style[arm]
        axes[0].plot([], [], look.marker, color=look.color, label=look.text)
    axes[0].set_yticks(range(len(names)), [label(name, 26) for name in names])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    axes[0].set(title="Loss by task", xlabel="nats per response token")
    axes[1].set(title="Accuracy by task", xlabel="share of rows answered correctly")
    axes[1].xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    figure.legend(loc="outside lower center", ncols=min(7, len(arms)))
    return figure
