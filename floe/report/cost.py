"""Memory and step time against the number of adapted layers (the paper's Fig. 1b)."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from floe.report.arms import arm_names, looks
from floe.report.run import Run
from floe.report.tables import Cell, Picture, Table, decimal
from floe.report.theme import Theme, new_figure


def cost(run: Run) -> Picture | None:
    """Step time and peak memory of the profile and of every trained arm; None without either."""
    rows: list[tuple[Cell, ...]] = []
    if run.profile is not None:
        rows += [
            (
                "profile",
                p.layers,
                p.seconds_per_step,
                p.low,
                p.high,
                decimal(p.peak_memory_bytes),
                p.memory_kind,
            )
            for p in run.profile.points
        ]
    for arm in arm_names(run):
        if arm in run.training:
            one = run.training[arm]
            rows.append(
                (
                    arm,
                    len(one.layers),
                    one.seconds_per_step,
                    None,
                    None,
                    decimal(one.peak_memory_bytes),
                    one.memory_kind,
                )
            )
    if not rows:
        return None
    columns = (
        "source",
        "adapted layers",
        "seconds per step",
        "low",
        "high",
        "peak memory bytes",
        "memory kind",
    )

    def draw(theme: Theme) -> Figure:
        return _draw_cost(run, theme)

    return Picture(
        key="cost",
        title="What adapted layers cost",
        alt="Step time and peak memory against the number of adapted layers.",
        caption=f"{_profile_text(run)} The arms' marks come from their own training runs, once "
        "each (arms "
        "with equally many layers are set side by side), and differ in which layers they adapt: a "
        "set without early layers ends its backward pass sooner. "
        f"{_memory_text(run)} Another model, batch or machine will give other numbers.",
        tables=(Table("cost", columns, tuple(rows)),),
        draw=draw,
    )


def _profile_text(run: Run) -> str:
    profile = run.profile
    if profile is None:
        return "The separate cost profile was not run."
    parts = [
        f"{profile.steps} steps a point" if profile.steps is not None else "",
        f"batch {profile.batch_size}" if profile.batch_size is not None else "",
        f"{profile.tokens_per_step:,.0f} tokens a step"
        if profile.tokens_per_step is not None
        else "",
    ]
    known = ", ".join(part for part in parts if part)
    return f"Line: profile on this machine ({known}), with its spread."


def _memory_text(run: Run) -> str:
    kinds = {one.memory_kind for one in run.training.values()}
    kinds |= {point.memory_kind for point in run.profile.points} if run.profile else set()
    known = sorted(kind for kind in kinds if kind)
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
    left.plot(
        [p.layers for p in points],
        [p.seconds_per_step for p in points],
        color=theme.muted,
        marker=".",
    )
    known = [p for p in points if p.peak_memory_bytes is not None]
    right.plot([p.layers for p in known], [(p.peak_memory_bytes or 0) / 2**30 for p in known],
               color=theme.muted, marker=".", label="profile" if points else None)  # fmt: skip
    style = looks(run, theme)
    for arm, x in _side_by_side(run).items():
        look, one = style[arm], run.training[arm]
        mark: dict[str, Any] = {"color": look.color, "markersize": 6, "linestyle": "none"}
        left.plot(x, one.seconds_per_step, look.marker, **mark)
        memory = one.peak_memory_bytes
        place = ([x], [memory / 2**30]) if memory is not None else ([], [])
        right.plot(*place, look.marker, label=look.text, **mark)
    for ax, title, unit in ((left, "Step time", "seconds"), (right, "Peak memory", "GiB")):
        ax.set(title=title, ylabel=unit, xlabel="adapted layers")
        ax.margins(x=0.04, y=0.1)
        ax.set_ylim(bottom=0)
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=7)
    return figure


def _side_by_side(run: Run) -> dict[str, float]:
    """Where each arm's mark stands on the layer axis; equally many layers stand around it."""
    groups: dict[int, list[str]] = {}
    for arm in arm_names(run):
        if arm in run.training:
            groups.setdefault(len(run.training[arm].layers), []).append(arm)
    gap = run.layer_count / 50
    return {
        arm: layers + gap * (place - (len(names) - 1) / 2)
        for layers, names in groups.items()
        for place, arm in enumerate(names)
    }
