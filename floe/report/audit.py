"""The audit: who agrees with whom, how far rows decide the choice, how far the budget does."""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from floe.artifacts.audit import Audit, Bootstrap
from floe.report.run import Run
from floe.report.tables import Picture, Section, Table, label, percent, plural
from floe.report.theme import DASHED, Theme, bare, colorbar, new_figure, whole_numbers


def audit_section(run: Run) -> Section:
    """The verdicts of the audit and the numbers behind them."""
    section = partial(Section, key="audit", title="Audit")
    audit = run.audit
    if audit is None:
        return section(missing="The choice was not audited: floe audit CONFIG.")
    if audit.selection != run.selection:
        old = "The audit is of an earlier selection; make a new one: floe audit CONFIG."
        return section(missing=old)
    lead = (
        "What the choice rests on: whether other rules agree, whether other rows or budgets would "
        "have given the same layers."
    )
    lacking = [*sorted(audit.lacking.items()), *sorted(audit.not_resampled.items())]
    shown, verdicts = pictures(audit), audit.sentences
    return section(lead=lead, pictures=shown, verdicts=verdicts, lacking=lacking)


def pictures(audit: Audit) -> list[Picture]:
    """Agreement always; resampling and stability where per-sample arrays were there."""
    shown = [agreement(audit)]
    if audit.bootstrap:
        shown.append(resampling(audit))
    if audit.subsets or audit.budgets:
        shown.append(stability(audit))
    return shown


def agreement(audit: Audit) -> Picture:
    """Heat map of the Spearman correlation of every pair of policies, with shared layers."""
    pairs, names = audit.agreement, audit.agreement.names
    rows = [
        (names[a], names[b], pairs.spearman[a][b], pairs.overlap[a][b])
        for a in range(len(names))
        for b in range(a + 1, len(names))
    ]
    header = "policy | other policy | spearman | shared layers"
    return Picture(
        key="audit_agreement",
        title="Agreement of the policies",
        alt=f"Heat map of the rank correlation of {len(names)} policies, pair by pair.",
        caption="Colour: Spearman correlation of two policies' layer scores; blank where one "
        "scores all layers alike. Numbers: how many of their "
        f"{plural(audit.count, 'layer')} two choices share; two random choices share "
        f"{pairs.expected_overlap:.1f} on average. Policies that agree measure similar things; "
        "that does not make their layers better.",
        tables=[Table("audit_agreement", header, rows)],
        draw=partial(_draw_agreement, audit),
    )


def _draw_agreement(audit: Audit, theme: Theme) -> Figure:
    pairs, size = audit.agreement, len(audit.agreement.names)
    spearman = np.array(pairs.spearman, dtype=np.float64)  # NaN where one is constant
    figure = new_figure(max(3.4, 0.26 * size + 1.9))
    ax = figure.subplots()
    shades = LinearSegmentedColormap.from_list(
        f"floe-signed-{theme.name}", (theme.contrast, theme.paper, theme.chosen)
    )
    ax.imshow(spearman, cmap=shades, vmin=-1, vmax=1, aspect="auto", interpolation="none")
    for (a, b), rho in np.ndenumerate(spearman):
        color = theme.paper if abs(rho) > 0.6 else theme.ink  # NaN is not
        ax.text(b, a, str(pairs.overlap[a][b]), ha="center", va="center", fontsize=6.6, color=color)
    names = list(map(label, pairs.names))
    ax.set_xticks(range(size), names, rotation=90)
    ax.set_yticks(range(size), names)
    for tick, name in zip(ax.get_yticklabels(), pairs.names, strict=True):
        if name == audit.policy:
            tick.set(color=theme.chosen, fontweight="bold")
    bare(ax)
    scale = ScalarMappable(Normalize(-1, 1), shades)
    colorbar(figure, scale, ax, "Spearman correlation", pad=0.012, aspect=30)
    return figure


def shown_policy(audit: Audit) -> Bootstrap:
    """The run's policy where it was resampled, else the first that was."""
    return next((p for p in audit.bootstrap if p.name == audit.policy), audit.bootstrap[0])


def resampling(audit: Audit) -> Picture:
    """A policy's rank intervals by layer, and every policy's probabilities of choosing a layer."""
    shown = shown_policy(audit)
    header = "policy | layer | place, 5 % | place, 95 % | probability of being chosen"
    rows = [
        (policy.name, k, int(policy.rank_low[k]), int(policy.rank_high[k]), float(chance))
        for policy in audit.bootstrap
        for k, chance in enumerate(policy.probability)
    ]
    return Picture(
        key="audit_bootstrap",
        title="The choice on other draws of the same rows",
        alt=f"Interval of every layer's place by {shown.name}, and the probability that a layer is "
        f"chosen by each of {len(audit.bootstrap)} policies.",
        caption=f"{audit.draws} times {audit.rows} rows drawn with replacement. Above: 5 % to 95 % "
        f"of a layer's place by {shown.name}, 1 = first to choose, coloured where the run's policy "
        "chose the layer; the line is the last place that is chosen. Below: how often a layer is "
        f"chosen. The whole choice of {shown.name} came back in {percent(shown.same, 0)} of the "
        f"draws, {percent(shown.kept, 0)} of it on average. Taylor costs are held as measured, so "
        "what depends on them varies less here than on new rows.",
        tables=[Table("audit_bootstrap", header, rows)],
        draw=partial(_draw_resampling, audit, shown),
    )


def _draw_resampling(audit: Audit, shown: Bootstrap, theme: Theme) -> Figure:
    total, low, high = audit.layers, np.array(shown.rank_low), np.array(shown.rank_high)
    chosen = next(policy.layers for policy in audit.policies if policy.name == audit.policy)
    height = 0.22 * len(audit.bootstrap) + 0.3
    figure = new_figure(height + 3.6)
    top, bottom = figure.subplots(2, 1, height_ratios=(2.4, height))
    colors = [theme.chosen if k in chosen else theme.faint for k in range(total)]
    top.bar(range(total), high - low + 1, 0.5, low - 0.5, color=colors)
    top.axhline(audit.count + 0.5, color=theme.contrast, linewidth=1, linestyle=DASHED)
    top.set_ylim(total + 0.8, 0.2)
    top.set_xlim(-0.5, total - 0.5)
    top.set(ylabel="place", title=f"Place of every layer by {label(shown.name)}")
    chances = np.array([policy.probability for policy in audit.bootstrap])
    shades = {"cmap": theme.colormap, "vmin": 0, "vmax": 1}
    bottom.imshow(chances, aspect="auto", interpolation="none", **shades)
    bottom.set_yticks(range(len(chances)), [label(policy.name) for policy in audit.bootstrap])
    bottom.set(xlabel="layer", title="Probability of being chosen")
    bare(bottom)
    whole_numbers(top, nbins=16)
    whole_numbers(bottom, nbins=16)
    scale = ScalarMappable(Normalize(0, 1), theme.colormap)
    colorbar(figure, scale, bottom, pad=0.012, aspect=14)
    return figure


def stability(audit: Audit) -> Picture:
    """Shared layers with the full result, by share of the rows and by budget."""
    rows = [
        (part.name, count, likeness.overlap.mean, likeness.overlap.low, likeness.overlap.high)
        for part in audit.subsets
        for count, likeness in zip(part.rows, part.against_all, strict=True)
    ]
    halves = [
        (part.name, *attrgetter("mean", "low", "high")(part.halves.overlap))
        for part in audit.subsets
    ]
    budgets = [
        (preset.name, budget, shared)
        for preset in audit.budgets
        for budget, shared in zip(preset.budgets, preset.overlap, strict=True)
    ]
    tables = (
        Table("audit_rows", "policy | rows | shared layers, mean | 5 % | 95 %", rows),
        Table("audit_halves", "policy | shared layers of two halves, mean | 5 % | 95 %", halves),
        Table("audit_budgets", "preset | budget | shared layers", budgets),
    )
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
        tables=[table for table in tables if table.rows],
        draw=partial(_draw_stability, audit),
    )


def _draw_stability(audit: Audit, theme: Theme) -> Figure:
    figure = new_figure(4.3)
    left, right = figure.subplots(1, 2, sharey=True)
    subsets = [(p.name, p.rows, [s.overlap.mean for s in p.against_all]) for p in audit.subsets]
    budgets = [(p.name, p.budgets, p.overlap) for p in audit.budgets]
    others = (theme.contrast, *theme.others)
    for ax, what, curves in ((left, "rows", subsets), (right, "budget", budgets)):
        for n, (name, x, y) in enumerate(curves):
            dash = ("-", "--", ":")[n // len(others) % 3]
            color, width, order = others[n % len(others)], 1.2, 2
            if name == audit.policy:
                color, width, order = theme.chosen, 3, 3
            line: dict[str, Any] = {"color": color, "linewidth": width, "zorder": order}
            ax.plot(x, y, linestyle=dash, marker="o", markersize=3.4, label=label(name), **line)
        expected = audit.agreement.expected_overlap
        ax.axhline(expected, color=theme.muted, linewidth=1, linestyle=DASHED)
        ax.set_xlabel(what)
        ax.grid(axis="y")
        handles, names = ax.get_legend_handles_labels()
        if handles:
            ax.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    left.set_ylim(0, audit.count * 1.04)
    left.set(ylabel="shared layers", title="Fewer rows")
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_title("Other budgets")
    return figure
