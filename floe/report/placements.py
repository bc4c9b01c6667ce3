"""Where in the layers adapters are, for arms that chose by projection or by size."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from floe.artifacts.results import Training
from floe.report.arms import arm_names, looks
from floe.report.maps import layer_axis
from floe.report.run import Run
from floe.report.tables import Picture, Table, plural
from floe.report.theme import Theme, new_figure

COLUMNS = ("arm", "layer", "projections", "rank", "experts")


def placements(run: Run) -> Picture | None:
    """Projections by layer, or rank and experts by layer; None where arms adapt whole layers."""
    arms = [arm for arm in arm_names(run) if arm in run.training and _is_placed(run.training[arm])]
    if not arms:
        return None

    def draw(theme: Theme) -> Figure:
        return _draw(run, [run.training[arm] for arm in arms], theme)

    return Picture(
        key="placements",
        title="Where in the layers the adapters are",
        alt=f"{plural(len(arms), 'arm')} whose adapters differ by projection or in size, by layer.",
        caption="Squares: adapted projections. Bars: rank, with the number of experts above. Each "
        "of these arms may spend the parameters that whole layers at the searched rank would take, "
        "as many layers as the run chose.",
        tables=(Table("placements", COLUMNS, _rows(run, arms)),),
        draw=draw,
    )


def _is_placed(one: Training) -> bool:
    return bool(one.modules or one.sizes)


def _rows(run: Run, arms: list[str]) -> tuple[tuple[Any, ...], ...]:
    rows = []
    for arm in arms:
        one = run.training[arm]
        for layer in one.layers:
            rank, experts = one.sizes.get(layer, (one.rank, one.num_experts))
            rows.append((arm, layer, " ".join(one.modules.get(layer, ())), rank, experts))
    return tuple(rows)


def _draw(run: Run, arms: list[Training], theme: Theme) -> Figure:
    names = [sorted({n for found in one.modules.values() for n in found}) for one in arms]
    heights = [0.24 * len(mine) + 0.1 if mine else 0.9 for mine in names]
    figure = new_figure(sum(heights) + 0.45 * len(arms) + 0.4)
    axes = figure.subplots(len(arms), 1, squeeze=False, height_ratios=heights)[:, 0]
    style = looks(run, theme)
    for ax, one, mine in zip(axes, arms, names, strict=True):
        color = style[one.arm].color
        if mine:
            _squares(ax, one, mine, color, run.layer_count, theme)
        else:
            _bars(ax, one, color, theme)
        layer_axis(ax, run, theme, name="layer" if ax is axes[-1] else "")
        ax.set_title(style[one.arm].text, loc="left", fontsize=8, color=theme.ink)
        for spine in ax.spines.values():
            spine.set_visible(False)
    return figure


def _squares(
    ax: Any, one: Training, names: list[str], color: str, layers: int, theme: Theme
) -> None:
    for row, name in enumerate(names):
        mine = [layer for layer, found in one.modules.items() if name in found]
        ax.plot(range(layers), [row] * layers, "s", color=theme.grid, markersize=6)
        ax.plot(mine, [row] * len(mine), "s", color=color, markersize=8)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)


def _bars(ax: Any, one: Training, color: str, theme: Theme) -> None:
    ranks = {layer: rank for layer, (rank, _) in one.sizes.items()}
    ax.bar(list(ranks), list(ranks.values()), color=color, width=0.7)
    for layer, (rank, experts) in one.sizes.items():
        ax.annotate(str(experts), (layer, rank), xytext=(0, 2), textcoords="offset points",
                    ha="center", fontsize=6.5, color=theme.muted)  # fmt: skip
    ax.set_ylabel("rank")
    ax.set_ylim(0, 1.2 * max(ranks.values()))
