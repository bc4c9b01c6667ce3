"""What an audit's numbers amount to, as plain sentences by stated thresholds.

"solid" is what would come out again on other rows of the same kind, "open" what would not or was
not shown, "note" what holds in any case. No sentence says that layers are good ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from floe.artifacts.audit import Audit, Verdicts
from floe.selection.masks.determine import PRESETS

SOLID_DRAWS = 0.9  # share of bootstrap draws
SOLID_HALVES = 7 / 8  # of the layers that two halves of the rows share
SAME_READING = 0.9  # Spearman correlation above which two readings rank alike
READINGS = tuple(f"masks/{preset}" for preset in PRESETS)
_SHOWN = 8  # names in one sentence

Verdict = tuple[str, str]


def judge(audit: Audit) -> Verdicts:
    """The sentences on an audit, by kind: "solid", "open" and "note"."""
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
    yield "open", _contested(audit, layers, drawn.probability, drawn.same) + f"; {halves}."


def _contested(
    audit: Audit, layers: Sequence[int], probability: Sequence[float], same: float
) -> str:
    """Which layers change places at this number of rows."""
    doubtful = [k for k in layers if probability[k] < SOLID_DRAWS]
    rivals = [k for k, p in enumerate(probability) if k not in layers and p > 1 - SOLID_DRAWS]
    start = f"The whole choice of {audit.policy} comes back in {same:.0%} of the resamples"
    if not doubtful or not rivals:
        return start
    return f"{start}: {audit.rows} rows do not separate {_layers(doubtful)} from {_layers(rivals)}"


def _readings(audit: Audit) -> Iterable[Verdict]:
    """Whether the readings of the paper rank alike."""
    names, spearman = audit.agreement.names, audit.agreement.spearman
    places = [n for n, name in enumerate(names) if name in READINGS]
    pairs = [(a, b) for a in places for b in places if a < b]
    known = {(a, b): rho for a, b in pairs if (rho := spearman[a][b]) is not None}
    if not known:
        return
    (a, b), least = min(known.items(), key=lambda item: item[1])
    shared = [audit.agreement.overlap[a][b] for a, b in pairs]
    kind, word = ("solid", "agree") if least >= SAME_READING else ("open", "disagree")
    yield (
        kind,
        f"The {len(places)} readings of the paper's masks {word}: Spearman between {least:.2f} "
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
            f"Over budgets {min(budgets)} to {max(budgets)} the paper's masks keep as few of their "
            f"{audit.count} layers as: {', '.join(loose)}.",
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
