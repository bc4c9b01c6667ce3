"""The audit: who agrees with whom, how far rows decide the choice, how far the budget does."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from floe.artifacts.audit import Audit, Bootstrap, Spread
from floe.report.tables import Picture, Table, label, percent, plural
from floe.report.theme import Theme, new_figure


def pictures(audit: Audit) -> tuple[Picture, ...]:
    """Agreement always; resampling and stability where per-sample arrays were there."""
    found = [agreement(audit)]
    if audit.bootstrap:
        found.append(resampling(audit))
    if audit.subsets or audit.budgets:
        found.append(stability(audit))
    return tuple(found)


def agreement(audit: Audit) -> Picture:
    """Heat map of the Spearman correlation of every pair of policies, with shared layers."""
    found, names = audit.agreement, audit.agreement.names
    pairs = [(a, b) for a in range(len(names)) for b in range(a + 1, len(names))]
    table = Table(
        "audit_agreement",
        ("policy", "other policy", "spearman", "shared layers"),
        tuple((names[a], names[b], found.spearman[a][b], found.overlap[a][b]) for a, b in pairs),
    )

    def draw(theme: Theme) -> Figure:
        return _draw_agreement(audit, theme)

    return Picture(
        key="audit_agreement",
        title="Agreement of the policies",
        alt=f"Heat map of the rank correlation of {len(names)} policies, pair by pair.",
        caption="Colour: Spearman correlation of two policies' layer scores; blank where one "
        "scores all layers alike. Numbers: how many of their "
        f"{plural(audit.count, 'layer')} two choices share; two random choices share "
        f"{found.expected_overlap:.1f} on average. Policies that agree measure similar things; "
        "that does not make their layers better.",
        tables=(table,),
        draw=draw,
    )


def _draw_agreement(audit: Audit, theme: Theme) -> Figure:
    found, size = audit.agreement, len(audit.agreement.names)
    spearman = np.array(found.spearman, dtype=np.float64)  # NaN where one is constant
    figure = new_figure(max(3.4, 0.26 * size + 1.9))
    ax = figure.subplots()
    shades = LinearSegmentedColormap.from_list(
        f"floe-signed-{theme.name}", (theme.contrast, theme.paper, theme.chosen)
    )
    ax.imshow(spearman, cmap=shades, vmin=-1, vmax=1, aspect="auto", interpolation="none")
    for a in range(size):
        for b in range(size):
            strong = abs(spearman[a, b]) > 0.6  # NaN is not
            ax.text(b, a, str(found.overlap[a][b]), ha="center", va="center", fontsize=6.6,
                    color=theme.paper if strong else theme.ink)  # fmt: skip
    names = [label(name) for name in found.names]
    ax.set_xticks(range(size), names, rotation=90)
    ax.set_yticks(range(size), names)
    ax.tick_params(length=0)
    for tick, name in zip(ax.get_yticklabels(), found.names, strict=True):
        if name == audit.policy:
            tick.set_color(theme.chosen)
            tick.set_fontweight("bold")
    for spine in ax.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(ScalarMappable(Normalize(-1, 1), shades), ax=ax, pad=0.012, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label("Spearman correlation")
    return figure


def shown_policy(audit: Audit) -> Bootstrap:
    """The run's policy where it was resampled, else the first that was."""
    return next((one for one in audit.bootstrap if one.name == audit.policy), audit.bootstrap[0])


def resampling(audit: Audit) -> Picture:
    """A policy's rank intervals by layer, and every policy's probabilities of choosing a layer."""
    one = shown_policy(audit)
    table = Table(
        "audit_bootstrap",
        ("policy", "layer", "place, 5 %", "place, 95 %", "probability of being chosen"),
        tuple(
            (each.name, k, int(low), int(high), float(chance))
            for each in audit.bootstrap
            for k, (low, high, chance) in enumerate(
                zip(each.rank_low, each.rank_high, each.probability, strict=True)
            )
        ),
    )

    def draw(theme: Theme) -> Figure:
        return _draw_resampling(audit, one, theme)

    return Picture(
        key="audit_bootstrap",
        title="The choice on other draws of the same rows",
        alt=f"Interval of every layer's place by {one.name}, and the probability that a layer is "
        f"chosen by each of {len(audit.bootstrap)} policies.",
        caption=f"{audit.draws} times {audit.rows} rows drawn with replacement. Above: 5 % to 95 % "
        f"of a layer's place by {one.name}, 1 = first to choose, coloured where the run's policy "
        "chose the layer; the line is the last place that is chosen. Below: how often a layer is "
        f"chosen. The whole choice of {one.name} came back in {percent(one.same, 0)} of the draws, "
        f"{percent(one.kept, 0)} of it on average. Taylor costs are held as measured, so what "
        "depends on them varies less here than on new rows.",
        tables=(table,),
        draw=draw,
    )


def _draw_resampling(audit: Audit, one: Bootstrap, theme: Theme) -> Figure:
    total, low, high = audit.layers, np.array(one.rank_low), np.array(one.rank_high)
    chosen = next(policy.layers for policy in audit.policies if policy.name == audit.policy)
    height = 0.22 * len(audit.bootstrap) + 0.3
    figure = new_figure(height + 3.6)
    top, bottom = figure.subplots(2, 1, height_ratios=(2.4, height))
    colors = [theme.chosen if k in chosen else theme.faint for k in range(total)]
    top.bar(range(total), high - low + 1, 0.5, low - 0.5, color=colors)
    top.axhline(audit.count + 0.5, color=theme.contrast, linewidth=1, linestyle=(0, (4, 3)))
    top.set_ylim(total + 0.8, 0.2)
    top.set_xlim(-0.5, total - 0.5)
    top.set_ylabel("place")
    top.set_title(f"Place of every layer by {label(one.name)}")
    top.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    chances = np.array([each.probability for each in audit.bootstrap])
    bottom.imshow(chances, cmap=theme.colormap, vmin=0, vmax=1, aspect="auto",
                  interpolation="none")  # fmt: skip
    bottom.set_yticks(range(len(chances)), [label(each.name) for each in audit.bootstrap])
    bottom.set_xlabel("layer")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    bottom.tick_params(length=0)
    bottom.set_title("Probability of being chosen")
    for spine in bottom.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), theme.colormap), ax=bottom, pad=0.012, aspect=14
    )
    bar.outline.set_visible(False)
    return figure


def stability(audit: Audit) -> Picture:
    """Shared layers with the full result, by share of the rows and by budget."""
    rows = Table(
        "audit_rows",
        ("policy", "rows", "shared layers, mean", "5 %", "95 %"),
        tuple(
            (part.name, count, *_ends(found.overlap))
            for part in audit.subsets
            for count, found in zip(part.rows, part.against_all, strict=True)
        ),
    )
    halves = Table(
        "audit_halves",
        ("policy", "shared layers of two halves, mean", "5 %", "95 %"),
        tuple((part.name, *_ends(part.halves.overlap)) for part in audit.subsets),
    )
    budgets = Table(
        "audit_budgets",
        ("preset", "budget", "shared layers"),
        tuple(
            (one.name, budget, shared)
            for one in audit.budgets
            for budget, shared in zip(one.budgets, one.overlap, strict=True)
        ),
    )

    def draw(theme: Theme) -> Figure:
        return _draw_stability(audit, theme)

    return Picture(
        key="audit_stability",
        title="The choice on fewer rows, and at other budgets",
        alt="Shared layers with the choice on all rows, by number of rows, and with the choice at "
        "the run's budget, by budget.",
        caption=f"How many of {plural(audit.count, 'layer')} stay. Left: parts of the rows against "
        "all of them, mean over random orders; bold is the run's policy. A part shares rows with "
        "the whole, so the curves end at full agreement by construction; the tables have two "
        "halves that share none. Right: the paper's masks at other budgets. Dashed: what two "
        "random choices share on average.",
        tables=tuple(table for table in (rows, halves, budgets) if table.rows),
        draw=draw,
    )


def _ends(spread: Spread) -> tuple[float | None, ...]:
    return spread.mean, spread.low, spread.high


def _draw_stability(audit: Audit, theme: Theme) -> Figure:
    figure = new_figure(4.3)
    left, right = figure.subplots(1, 2, sharey=True)
    for n, part in enumerate(audit.subsets):
        means = [found.overlap.mean for found in part.against_all]
        _line(left, n, part.rows, means, part.name, part.name == audit.policy, theme)
    for n, one in enumerate(audit.budgets):
        _line(right, n, one.budgets, one.overlap, one.name, one.name == audit.policy, theme)
    for ax, what in ((left, "rows"), (right, "budget")):
        ax.axhline(
            audit.agreement.expected_overlap, color=theme.muted, linewidth=1, linestyle=(0, (4, 3))
        )
        ax.set_xlabel(what)
        ax.grid(axis="y")
        handles, names = ax.get_legend_handles_labels()
        if handles:
            ax.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    left.set_ylim(0, audit.count * 1.04)
    left.set_ylabel("shared layers")
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_title("Fewer rows")
    right.set_title("Other budgets")
    return figure


def _line(ax: Any, n: int, x: Any, y: Any, name: str, own: bool, theme: Theme) -> None:
    others = (theme.contrast, *theme.others)
    ax.plot(x, y, color=theme.chosen if own else others[n % len(others)],
            linewidth=3 if own else 1.2, linestyle=("-", "--", ":")[n // len(others) % 3],
            marker="o", markersize=3.4, label=label(name), zorder=3 if own else 2)  # fmt: skip
