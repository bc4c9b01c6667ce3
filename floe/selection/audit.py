"""The audit of a choice of layers: who agrees, what the rows and the budget decide, what is open.

Everything follows from saved scores: no model, no torch. An audit says how far a ranking
reproduces, never that its layers train better than others. Its verdicts are plain sentences by
stated thresholds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from floe.artifacts.audit import Audit, Cliff, MaskLoss, PolicyResult, Verdicts
from floe.artifacts.results import Router
from floe.errors import require
from floe.selection.comparison import (
    NO_ROWS,
    SPLITS,
    Options,
    Rows,
    agreement_of,
    bootstrap_policy,
    budget_presets,
    compare_policies,
    names,
    null_policy,
    resamplable,
    subset_policy,
)
from floe.selection.masks.determine import PRESETS, determine
from floe.selection.masks.solvers import count, number
from floe.selection.ranking import choose_count, count_layers
from floe.types import Progress

if TYPE_CHECKING:
    from floe.importance.scores import LayerStatistics, Scores

__all__ = ["Audit", "audit"]

SOLID_DRAWS = 0.9  # share of bootstrap draws
SOLID_HALVES = 7 / 8  # of the layers that two halves of the rows share
SAME_READING = 0.9  # Spearman correlation above which two readings rank alike
READINGS = tuple(f"masks/{preset}" for preset in PRESETS)
_SHOWN = 8  # names in one sentence

Verdict = tuple[str, str]


def audit(
    scores: Scores,
    *,
    layers: int | float = 8,
    policy: str = "adapter_fisher",
    statistics: LayerStatistics | None = None,
    router: Iterable[Router] = (),
    trained_router: Iterable[Router] = (),
    losses: Mapping[int, ArrayLike] | None = None,
    budget: float = 0.5,
    score: str = "soft",
    seed: int = 41,
    bootstrap: int = 200,
    progress: Progress | None = None,
) -> Audit:
    """Audit the choice of layers that scores support: the same bits in whatever order of the rows.

    Args:
        scores: of the model. Their per-sample arrays (floe.score(..., keep_samples=True) for those
            of masks) are resampled; Taylor costs stay as measured.
        layers: K, a count or a fraction, as in select.
        policy: the one that decided, or "masks/<preset>".
        statistics: of the layers, for the policies that need them.
        router, trained_router: what floe.evaluation.router_statistics says of
            the adapter that was scored, and on the one that was trained afterwards.
        losses: number of layers -> per-row losses of an arm with so many, on the same rows.
        budget, score: of the masks; see select. seed: of every draw. bootstrap: draws, >= 1.
        progress: called as progress(done, in all, what is being done).

    Raises:
        ValueError: an unknown policy or one whose inputs are missing, a number out of range.
        TypeError: a number that is none.
    """
    require(count("bootstrap", bootstrap) >= 1, "bootstrap must be >= 1", bootstrap)
    fixed = count("seed", seed), number("budget", budget)
    options = Options(count_layers(layers, scores.layer_count), *fixed, score, statistics)
    rows = Rows.of(scores)
    policies, absent = compare_policies(rows.scores, options)
    require(policy in names(), f"policy must be one of {sorted(names())}", policy)
    if policy in absent:
        raise ValueError(f"policy {policy!r} needs {absent[policy]}")
    result = Audit(
        layers=scores.layer_count,
        count=options.count,
        seed=options.seed,
        budget=options.budget,
        score=options.score,
        rows=rows.count,
        draws=bootstrap,
        policy=policy,
        lacking=absent,
        **_compared(policy, policies, rows, options, bootstrap, progress),
        masks=mask_loss(rows.scores, options.budget),
        routers=tuple(router),
        trained_routers=tuple(trained_router),
        cliff=_cliff_of(losses),
        verdicts={"solid": [], "open": [], "note": []},
        selection="",
    )
    return replace(result, verdicts=judge(result))


def _compared(
    policy: str,
    policies: Sequence[PolicyResult],
    rows: Rows,
    options: Options,
    draws: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """The parts of an audit that compare: policies, other rows, random orders, other budgets."""
    missing = {result.name: resamplable(result.name, rows.scores) for result in policies}
    drawn = [result for result in policies if not missing[result.name]]
    total, done = max(1, len(drawn) * (draws + SPLITS)), itertools.count(1)

    def tick(part: str) -> None:
        if progress is not None:  # the budgets' few parts are not in the total
            progress(min(next(done), total), total, part)

    full = next(result for result in policies if result.name == policy)
    return {
        "policies": policies,
        "agreement": agreement_of(policies),
        "null": null_policy(full, rows.scores, options),
        "bootstrap": tuple(bootstrap_policy(p, rows, options, draws, tick) for p in drawn),
        "subsets": tuple(subset_policy(p, rows, options, tick) for p in drawn),
        "not_resampled": {name: why for name, why in missing.items() if why not in ("", NO_ROWS)},
        "budgets": budget_presets(policies, rows.scores, options, tick),
    }


def mask_loss(scores: Scores, budget: float) -> MaskLoss | None:
    """Diagonal against block Fisher information; None without per-sample mask gradients."""
    if scores.head_gradient is None or scores.neuron_gradient is None:
        return None
    masks = determine(scores, "global", budget)
    masked, diagonal, block = 0, 0.0, 0.0
    for gradient, mask in (
        (scores.head_gradient, masks.head_mask),
        (scores.neuron_gradient, masks.neuron_mask),
    ):
        for layer, closed in enumerate(~mask):
            pulls = gradient[:, layer, closed].astype(np.float64)
            masked += int(closed.sum())
            diagonal += float(np.square(pulls).sum())
            block += float(np.square(pulls.sum(axis=1)).sum())
    return MaskLoss(masked, diagonal, block)


def _cliff_of(losses: Mapping[int, ArrayLike] | None) -> Cliff | None:
    if losses is None or len(losses) < 2:
        return None
    sweep = choose_count(losses)
    above, error = sweep.above_full.tolist(), sweep.above_full_error.tolist()
    return Cliff(sweep.counts, tuple(above), tuple(error), sweep.worse, sweep.cliff)


def judge(audit: Audit) -> Verdicts:
    """The sentences on an audit, by kind.

    "solid" is what would come out again on other rows of the same kind, "open" what would not or
    was not shown, "note" what holds in any case. No sentence says that layers are good ones.
    """
    rules = (_rows, _readings, _budgets, _ties, _chance, _together, _routers, _cliff)
    verdicts = [verdict for rule in rules for verdict in rule(audit)]
    last = "An audit shows which choices reproduce; which layers train best, only training shows."
    return {
        "solid": [text for kind, text in verdicts if kind == "solid"],
        "open": [text for kind, text in verdicts if kind == "open"],
        "note": [*(text for kind, text in verdicts if kind == "note"), last],
    }


def _rows(audit: Audit) -> Iterable[Verdict]:
    """Whether the run's own choice would come out again on other rows."""
    drawn = next((b for b in audit.bootstrap if b.name == audit.policy), None)
    parts = next((s for s in audit.subsets if s.name == audit.policy), None)
    if drawn is None or parts is None:
        why = audit.not_resampled.get(audit.policy, "per-sample arrays, which it has not")
        yield "open", f"Whether {audit.policy} would choose alike on other rows: it lacks {why}."
        return
    layers = next(p.layers for p in audit.policies if p.name == audit.policy)
    shared = parts.halves.overlap.mean or 0.0
    sure = [k for k in layers if drawn.probability[k] >= SOLID_DRAWS]
    halves = (
        f"two halves of the {audit.rows} rows share {shared:.1f} of {audit.count} layers on average"
    )
    solid = drawn.same >= SOLID_DRAWS and shared >= SOLID_HALVES * audit.count
    if solid:
        yield (
            "solid",
            f"{audit.policy} chooses the same {audit.count} layers in {drawn.same:.0%} of "
            f"{audit.draws} resamples of the rows; {halves}.",
        )
        return
    if sure:
        yield (
            "solid",
            f"{audit.policy} chooses {len(sure)} of its {audit.count} layers ({_list(sure)}) in at "
            f"least {SOLID_DRAWS:.0%} of {audit.draws} resamples of the rows each.",
        )
    text = f"The whole choice of {audit.policy} comes back in {drawn.same:.0%} of the resamples"
    doubtful = [k for k in layers if k not in sure]
    likely = [k for k, p in enumerate(drawn.probability) if p > 1 - SOLID_DRAWS]
    rivals = [k for k in likely if k not in layers]
    if doubtful and rivals:  # which change places at this number of rows
        text += f": {audit.rows} rows do not separate {_layers(doubtful)} from {_layers(rivals)}"
    yield "open", f"{text}; {halves}."


def _readings(audit: Audit) -> Iterable[Verdict]:
    """Whether the readings of the paper rank alike."""
    names, spearman = audit.agreement.names, audit.agreement.spearman
    places = [n for n, name in enumerate(names) if name in READINGS]
    pairs = [(a, b) for a in places for b in places if a < b]
    known = {(a, b): rho for a, b in pairs if (rho := spearman[a][b]) is not None}
    if not known:
        return
    (a, b), least = min(known.items(), key=lambda item: item[1])
    shared = [audit.agreement.overlap[a][b] for a, b in known]
    ranked = {place for pair in known for place in pair}  # the others rank no layer
    kind, word = ("solid", "agree") if least >= SAME_READING else ("open", "disagree")
    yield (
        kind,
        f"The {len(ranked)} readings of the paper's masks {word}: Spearman between {least:.2f} "
        f"({names[a]}, {names[b]}) and {max(known.values()):.2f}, {min(shared)} to {max(shared)} "
        f"of {audit.count} layers shared (chance: {audit.agreement.expected_overlap:.1f}).",
    )


def _budgets(audit: Audit) -> Iterable[Verdict]:
    """Presets whose choice the budget decides."""
    loose = [
        f"{preset.name} {min(preset.overlap)}"
        for preset in audit.budgets
        if min(preset.overlap) < SOLID_HALVES * audit.count
    ]
    if loose:
        budgets = audit.budgets[0].budgets
        yield (
            "open",
            f"Over budgets {min(budgets)} to {max(budgets)} the paper's masks change their choice. "
            f"Of {audit.count} layers as few as these stay, by preset: {', '.join(loose)}.",
        )


def _ties(audit: Audit) -> Iterable[Verdict]:
    constant = [p.name for p in audit.policies if p.constant]
    if constant:
        yield "open", f"All layers tie, so that index alone orders them: {_list(constant)}."
    split = [f"{p.name} ({p.tied})" for p in audit.policies if p.tied and not p.constant]
    if split:
        yield "open", f"Layers tie where the choice ends, and index decides: {_list(split)}."


def _chance(audit: Audit) -> Iterable[Verdict]:
    """How many other policies agree with the choice beyond chance."""
    here = audit.agreement.names.index(audit.policy)
    limit = audit.null.overlap.high
    others = [
        shared
        for name, shared in zip(audit.agreement.names, audit.agreement.overlap[here], strict=True)
        if name not in (audit.policy, "random")
    ]
    if limit is None or not others:
        return
    above = sum(shared > limit for shared in others)
    yield (
        "note",
        f"{above} of {len(others)} other policies share more than {limit:.0f} of {audit.count} "
        f"layers with {audit.policy}; 95 % of random orders share no more than that.",
    )


def _together(audit: Audit) -> Iterable[Verdict]:
    """What the paper's diagonal leaves out of what masking costs."""
    masks = audit.masks
    if masks is not None and masks.diagonal_loss > 0:
        yield (
            "note",
            f"Masking the {masks.masked} units that preset global masks costs "
            f"{masks.block_loss / masks.diagonal_loss:.2f} times as much together (block Fisher "
            "information of each layer's heads and of its neurons) as one by one (its diagonal).",
        )


def _routers(audit: Audit) -> Iterable[Verdict]:
    for routers, adapter in ((audit.routers, "scored"), (audit.trained_routers, "trained")):
        if not routers:
            continue
        collapsed = sum(router.collapsed for router in routers)
        flat = sum(router.unspecialised for router in routers)
        yield (
            "open" if collapsed or flat else "solid",
            f"Of the {len(routers)} routers of the {adapter} adapter, {collapsed} are collapsed "
            f"and {flat} unspecialised.",
        )


def _cliff(audit: Audit) -> Iterable[Verdict]:
    cliff = audit.cliff
    if cliff is None:
        yield (
            "open",
            "Where fewer layers begin to cost: one number of layers cannot show it, several of one "
            "policy must be trained and evaluated.",
        )
    elif cliff.begins is None:
        fewer = _list(cliff.counts[:-1])
        yield (
            "note",
            f"No cliff seen down to {cliff.counts[0]} layers: {fewer} are within two standard "
            f"errors over rows of {cliff.counts[-1]}; the noise of training is not in that.",
        )
    else:
        yield (
            "open",
            f"With {cliff.begins} layers or fewer the loss is more than two standard errors over "
            f"rows above that with {cliff.counts[-1]}.",
        )


def _layers(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {_list(layers)}"


def _list(values: Sequence[object]) -> str:
    shown = ", ".join(str(value) for value in values[:_SHOWN])
    return shown + (f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else "")
