"""The headline: what was adapted, what it bought, and what the intervals allow one to say."""

from __future__ import annotations

from dataclasses import dataclass

from floe.artifacts.results import Interval, Outcome
from floe.report.arms import adapts_all, arm_names
from floe.report.run import Run
from floe.report.tables import (
    Cell,
    Table,
    compact,
    count,
    decimal,
    decimals,
    duration,
    label,
    overlaps,
    percent,
    seconds,
    size,
    spread,
)


@dataclass(frozen=True)
class Fact:
    """One large number with its name and the line under it."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class ArmRow:
    """One line of the headline table, ready to print; ``role`` is base, main, all or other."""

    arm: str
    role: str
    layers: str
    parameters: str
    loss: str
    loss_interval: str
    gap: str
    gap_interval: str
    accuracy: str
    accuracy_interval: str
    step_time: str
    memory: str


def facts(run: Run) -> list[Fact]:
    """Layers, parameters, loss and step time; those whose stage was not run drop."""
    main, full = run.training.get("main"), _full_arm(run)
    layers = main.layers if main is not None else run.choice.layers
    share = len(layers) / run.layer_count
    note = f"{percent(share, 0)}, by {run.choice.policy}"
    if main is not None and main.modules:
        note += f"; {sum(map(len, main.modules.values()))} projections"
    if main is not None and main.sizes:
        note += "; rank and experts by layer"
    found = [Fact("adapted layers", f"{len(layers)} of {run.layer_count}", note)]
    if main is not None:
        note = "" if main.sizes else f"rank {main.rank}, {main.num_experts} experts"
        if full is not None and run.training[full].trainable_parameters:
            part = main.trainable_parameters / run.training[full].trainable_parameters
            note += "; " if note else ""
            note += f"{percent(part, 0)} of adapting all layers"
        found.append(Fact("trainable parameters", compact(main.trainable_parameters), note))
    outcome = _outcome(run, "main")
    if outcome is not None and outcome.loss is not None:
        found.append(
            Fact(
                "loss, nats per token", decimals(outcome.loss.value), _loss_note(run, outcome.loss)
            )
        )
    if main is not None:
        note = f"{main.steps:,} steps, {duration(main.seconds)} in all"
        if full is not None:
            note += f"; adapting all layers {seconds(run.training[full].seconds_per_step)}"
        found.append(Fact("time per training step", seconds(main.seconds_per_step), note))
    return found


def _loss_note(run: Run, loss: Interval) -> str:
    note = spread(loss, decimals)
    note += f" over {count(loss.rows)} rows" if loss.rows is not None else ""
    base = _outcome(run, "base")
    return note + (
        f"; base {decimals(base.loss.value)}" if base is not None and base.loss is not None else ""
    )


def arm_rows(run: Run) -> list[ArmRow]:
    """The headline table, one row per arm."""
    rows = []
    for arm in arm_names(run):
        one, outcome = run.training.get(arm), _outcome(run, arm)
        loss = outcome.loss if outcome else None
        gap = outcome.loss_minus_main if outcome else None
        accuracy = outcome.accuracy if outcome else None
        role = arm if arm in ("base", "main") else "all" if adapts_all(run, arm) else "other"
        rows.append(
            ArmRow(
                arm=arm,
                role=role,
                layers=str(len(one.layers)) if one else "0" if arm == "base" else "–",
                parameters=count(one.trainable_parameters)
                if one
                else "0"
                if arm == "base"
                else "–",
                loss=decimals(loss.value if loss else None),
                loss_interval=spread(loss, decimals),
                gap=_signed(gap.value) if gap and arm != "main" else "",
                gap_interval=spread(gap, _signed) if arm != "main" else "",
                accuracy=percent(accuracy.value if accuracy else None),
                accuracy_interval=spread(accuracy, lambda v: f"{100 * v:.1f}"),
                step_time=seconds(one.seconds_per_step if one else None),
                memory=size(one.peak_memory_bytes if one else None),
            )
        )
    return rows


def arm_table(run: Run) -> Table:
    """The headline table's numbers in full."""
    rows: list[tuple[Cell, ...]] = []
    for arm in arm_names(run):
        one, outcome = run.training.get(arm), _outcome(run, arm)
        rows.append(
            (
                arm,
                " ".join(map(str, one.layers)) if one else "",
                one.trainable_parameters if one else None,
                *_flat(outcome.loss if outcome else None),
                *_flat(outcome.loss_minus_main if outcome else None)[:3],
                *_flat(outcome.accuracy if outcome else None),
                one.seconds_per_step if one else None,
                decimal(one.peak_memory_bytes if one else None),
                one.seed if one else None,
            )
        )
    columns = ("arm", "layers", "trainable parameters",
               "loss", "loss low", "loss high", "loss rows",
               "loss minus main", "loss minus main low", "loss minus main high",
               "accuracy", "accuracy low", "accuracy high", "accuracy rows", "seconds per step",
               "peak memory bytes", "seed")  # fmt: skip
    return Table("arms", columns, tuple(rows))


def verdicts(run: Run) -> list[str]:
    """What the main arm's intervals say against each other arm, in one sentence per measure.

    Loss is compared by the paired difference where every arm has one, else, as accuracy always is,
    by whether the two arms' own intervals overlap.
    """
    sentences = []
    for what in ("loss", "accuracy"):
        groups: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
        paired = what == "loss" and _is_paired(run)
        for arm in arm_names(run):
            sign = None if arm == "main" else _sign(run, arm, what, paired)
            if sign is not None:
                groups["open" if sign == 0 else "better" if sign > 0 else "worse"].append(
                    label(arm)
                )
        if any(groups.values()):
            sentences.append(_sentence(what, groups, paired))
    return sentences


def _is_paired(run: Run) -> bool:
    others = (
        [one for arm, one in run.evaluation.arms.items() if arm != "main"] if run.evaluation else []
    )
    return bool(others) and all(one.loss_minus_main is not None for one in others)


def _sign(run: Run, arm: str, what: str, paired: bool) -> int | None:
    """1 where main is better than ``arm``, -1 worse, 0 not separated, None unknown."""
    one, main = _outcome(run, arm), _outcome(run, "main")
    if one is None or main is None:
        return None
    if paired:
        gap = one.loss_minus_main
        if gap is None or gap.ends is None:
            return None
        return 1 if gap.ends[0] > 0 else -1 if gap.ends[1] < 0 else 0
    mine, other = getattr(main, what), getattr(one, what)
    together = overlaps(mine, other)
    if together is None:
        return None
    lower = mine.value < other.value
    return 0 if together else 1 if lower == (what == "loss") else -1


def _sentence(what: str, groups: dict[str, list[str]], paired: bool) -> str:
    how = "the paired interval excludes zero" if paired else "separate intervals"
    still_open = "the paired interval holds zero" if paired else "the intervals overlap"
    parts = []
    if groups["better"]:
        parts.append(f"better than {_join(groups['better'])} ({how})")
    if groups["worse"]:
        parts.append(f"worse than {_join(groups['worse'])} ({how})")
    if groups["open"]:
        parts.append(f"not separated from {_join(groups['open'])} ({still_open})")
    return f"On {what}, main is {'; '.join(parts)}."


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _full_arm(run: Run) -> str | None:
    return next((arm for arm in arm_names(run) if arm != "main" and adapts_all(run, arm)), None)


def _outcome(run: Run, arm: str) -> Outcome | None:
    return run.evaluation.arms.get(arm) if run.evaluation else None


def _flat(interval: Interval | None) -> tuple[Cell, ...]:
    if interval is None:
        return (None, None, None, None)
    low, high = interval.ends or (None, None)
    return (interval.value, low, high, interval.rows)


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def training_seeds(run: Run) -> str:
    """The seeds the arms were trained with, joined; a word where none was recorded."""
    seeds = sorted({one.seed for one in run.training.values() if one.seed is not None})
    return ", ".join(map(str, seeds)) or "not recorded"
