"""The page's head and its end: what was adapted, what it bought, where the numbers come from."""

from __future__ import annotations

from typing import NamedTuple

from floe.report.run import Run
from floe.report.tables import (
    Cell,
    Table,
    as_float,
    compact,
    decimals,
    duration,
    flat,
    label,
    or_dash,
    overlaps,
    percent,
    plain,
    seconds,
    size,
    spread,
)


class Fact(NamedTuple):
    """One large number with its name and the line under it."""

    name: str
    value: str
    note: str


def facts(run: Run) -> list[Fact]:
    """Layers, parameters, loss and step time; those whose stage was not run drop."""
    main = run.training.get("main")
    full = next(
        (run.training[arm] for arm in run.arms if arm != "main" and run.adapts_all(arm)), None
    )
    layers = main.layers if main else run.choice.layers
    notes = [f"{percent(len(layers) / run.layer_count, 0)}, by {run.choice.policy}"]
    if main and main.modules:
        notes.append(f"{sum(map(len, main.modules.values()))} projections")
    if main and main.sizes:
        notes.append("rank and experts by layer")
    shown = [Fact("adapted layers", f"{len(layers)} of {run.layer_count}", "; ".join(notes))]
    if main:
        notes = [] if main.sizes else [f"rank {main.rank}, {main.num_experts} experts"]
        if full and full.trainable_parameters:
            part = main.trainable_parameters / full.trainable_parameters
            notes.append(f"{percent(part, 0)} of adapting all layers")
        parameters = compact(main.trainable_parameters)
        shown.append(Fact("trainable parameters", parameters, "; ".join(notes)))
    losses = {arm: outcome.loss for arm, outcome in run.outcomes.items()}
    if loss := losses.get("main"):
        note = spread(loss, decimals)
        note += f" over {loss.rows:,} rows" if loss.rows is not None else ""
        if base := losses.get("base"):
            note += f"; base {decimals(base.value)}"
        shown.append(Fact("loss, nats per token", decimals(loss.value), note))
    if main:
        note = f"{main.steps:,} steps, {duration(main.seconds)} in all"
        note += f"; adapting all layers {seconds(full.seconds_per_step)}" if full else ""
        shown.append(Fact("time per training step", seconds(main.seconds_per_step), note))
    return shown


def arm_rows(run: Run) -> list[dict[str, str]]:
    """The headline table, a row of texts per arm; its role is base, main, all or other."""
    rows = []
    for arm in run.arms:
        training, outcome = run.training.get(arm), run.outcomes.get(arm)
        loss, accuracy = (outcome.loss, outcome.accuracy) if outcome else (None, None)
        gap = outcome.loss_minus_main if outcome and arm != "main" else None
        nothing = "0" if arm == "base" else "–"
        rows.append(
            {
                "arm": arm,
                "role": arm
                if arm in ("base", "main")
                else "all"
                if run.adapts_all(arm)
                else "other",
                "layers": str(len(training.layers)) if training else nothing,
                "parameters": f"{training.trainable_parameters:,}" if training else nothing,
                "loss": decimals(loss.value) if loss else "–",
                "loss_interval": spread(loss, decimals),
                "gap": _signed(gap.value) if gap else "",
                "gap_interval": spread(gap, _signed),
                "accuracy": percent(accuracy.value) if accuracy else "–",
                "accuracy_interval": spread(accuracy, lambda value: f"{100 * value:.1f}"),
                "step_time": seconds(training.seconds_per_step) if training else "–",
                "memory": or_dash(size, training.peak_memory_bytes if training else None),
            }
        )
    return rows


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def arm_table(run: Run) -> Table:
    """The headline table's numbers in full."""
    rows = []
    for arm in run.arms:
        training, outcome = run.training.get(arm), run.outcomes.get(arm)
        loss, gap, accuracy = (
            getattr(outcome, name, None) for name in ("loss", "loss_minus_main", "accuracy")
        )
        layers = " ".join(map(str, training.layers)) if training else ""
        parameters = training.trainable_parameters if training else None
        cost: list[Cell] = [None] * 3
        if training:
            memory = as_float(training.peak_memory_bytes)
            cost = [training.seconds_per_step, memory, training.seed]
        measured = (*flat(loss), *flat(gap)[:3], *flat(accuracy))
        rows.append([arm, layers, parameters, *measured, *cost])
    header = (
        "arm | layers | trainable parameters | loss | loss low | loss high | loss rows | "
        "loss minus main | loss minus main low | loss minus main high | accuracy | accuracy low | "
        "accuracy high | accuracy rows | seconds per step | peak memory bytes | seed"
    )
    return Table("arms", header, rows)


def verdicts(run: Run) -> list[str]:
    """What the main arm's intervals say against each other arm, in training sentence per measure.

    Loss is compared by the paired difference where every arm has one, else, as accuracy always is,
    by whether the two arms' own intervals overlap.
    """
    others = [outcome for arm, outcome in run.outcomes.items() if arm != "main"]
    all_paired = bool(others) and all(outcome.loss_minus_main is not None for outcome in others)
    sentences = []
    for what in ("loss", "accuracy"):
        paired = what == "loss" and all_paired
        groups: dict[int, list[str]] = {1: [], -1: [], 0: []}
        for arm in run.arms:
            sign = None if arm == "main" else _sign(run, arm, what, paired)
            if sign is not None:
                groups[sign].append(label(arm))
        how = "the paired interval excludes zero" if paired else "separate intervals"
        still_open = "the paired interval holds zero" if paired else "the intervals overlap"
        relations = {
            1: ("better than", how),
            -1: ("worse than", how),
            0: ("not separated from", still_open),
        }
        parts = [
            f"{relations[sign][0]} {_join(arms)} ({relations[sign][1]})"
            for sign, arms in groups.items()
            if arms
        ]
        if parts:
            sentences.append(f"On {what}, main is {'; '.join(parts)}.")
    return sentences


def _sign(run: Run, arm: str, what: str, paired: bool) -> int | None:
    """1 where main is better than ``arm``, -1 worse, 0 not separated, None unknown."""
    outcome, main = run.outcomes.get(arm), run.outcomes.get("main")
    if outcome is None or main is None:
        return None
    if paired:
        gap = outcome.loss_minus_main
        if gap is None or gap.ends is None:
            return None
        return 1 if gap.ends[0] > 0 else -1 if gap.ends[1] < 0 else 0
    mine, other = getattr(main, what), getattr(outcome, what)
    together = overlaps(mine, other)
    if together is None:
        return None
    lower = mine.value < other.value
    return 0 if together else 1 if lower == (what == "loss") else -1


def _join(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def training_seeds(run: Run) -> str:
    """The seeds the arms were trained with, joined; a word where none was recorded."""
    seeds = sorted(
        {training.seed for training in run.training.values() if training.seed is not None}
    )
    return ", ".join(map(str, seeds)) or "not recorded"


def environment_rows(run: Run) -> list[tuple[str, str]]:
    """Machine and versions as recorded by the run, the calibration data, then the seeds."""
    meta, skipped = run.scores.meta, ("model", "seed", "adapter_parameters")
    rows = [(key, _text(value)) for key, value in sorted(run.env.items())]
    rows += [
        (f"scores: {key.replace('_', ' ')}", _text(value))
        for key, value in sorted(meta.items())
        if key not in skipped
    ]
    if run.search is not None and run.search.sampler:
        settings = sorted(run.search.sampler.items())
        rows.append(("search sampler", ", ".join(f"{k} {_text(v)}" for k, v in settings)))
    if isinstance(meta.get("seed"), int):
        rows.append(("seed of the scores", str(meta["seed"])))
    rows.append(("seed of the selection", str(run.choice.seed)))
    arms: dict[int, list[str]] = {}
    for arm, training in run.training.items():
        if training.seed is not None:
            arms.setdefault(training.seed, []).append(arm)
    if arms:
        parts = (f"{seed} ({', '.join(names)})" for seed, names in sorted(arms.items()))
        rows.append(("seed of the training", "; ".join(parts)))
    if run.evaluation is not None and run.evaluation.seed is not None:
        rows.append(("seed of the intervals", str(run.evaluation.seed)))
    return rows


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return plain(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(part)}" for key, part in sorted(value.items()))
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def certificate_rows(run: Run) -> list[tuple[str, str]]:
    """The mask problem's solution against its proven upper bound."""
    certificate = run.choice.certificate
    names = {
        "value": "Fisher information retained",
        "upper_bound": "proven upper bound",
        "gap": "gap",
        "cost": "Taylor cost retained",
        "budget": "budget",
    }
    rows = [(text, plain(certificate[key])) for key, text in names.items() if key in certificate]
    if "optimal" in certificate:
        unproven = "not proven: the gap bounds what is missing"
        rows.append(("optimal", "yes, proven" if certificate["optimal"] else unproven))
    return rows


def stage_table(run: Run) -> Table:
    """How long each stage took."""
    rows = [(name, stage.seconds, stage.finished) for name, stage in run.stages.items()]
    return Table("stages", "stage | seconds | finished", rows)
