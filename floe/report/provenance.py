"""Where the numbers come from: machine, versions, seeds, certificate, time of each stage."""

from __future__ import annotations

from floe.report.run import Run
from floe.report.tables import Table, plain


def environment_rows(run: Run) -> list[tuple[str, str]]:
    """Machine and versions as recorded by the run, the calibration data, then the seeds."""
    rows = [(key, _text(value)) for key, value in sorted(run.env.items())]
    meta = run.scores.meta
    skipped = ("model", "seed", "adapter_parameters")
    rows += [
        (f"scores: {key.replace('_', ' ')}", _text(meta[key]))
        for key in sorted(meta)
        if key not in skipped
    ]
    return rows + _seeds(run)


def _seeds(run: Run) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if run.search is not None and run.search.sampler:
        settings = run.search.sampler.items()
        rows.append(("search sampler", ", ".join(f"{k} {_text(v)}" for k, v in sorted(settings))))
    if isinstance(run.scores.meta.get("seed"), int):
        rows.append(("seed of the scores", str(run.scores.meta["seed"])))
    rows.append(("seed of the selection", str(run.choice.seed)))
    arms: dict[int, list[str]] = {}
    for arm, one in run.training.items():
        if one.seed is not None:
            arms.setdefault(one.seed, []).append(arm)
    if arms:
        parts = (f"{seed} ({', '.join(names)})" for seed, names in sorted(arms.items()))
        rows.append(("seed of the training", "; ".join(parts)))
    if run.evaluation is not None and run.evaluation.seed is not None:
        rows.append(("seed of the intervals", str(run.evaluation.seed)))
    return rows


def certificate_rows(run: Run) -> list[tuple[str, str]]:
    """The mask problem's solution against its proven upper bound."""
    certificate = run.choice.certificate
    names = (
        ("value", "Fisher information retained"),
        ("upper_bound", "proven upper bound"),
        ("gap", "gap"),
        ("cost", "Taylor cost retained"),
        ("budget", "budget"),
    )
    rows = [(text, plain(certificate[key])) for key, text in names if key in certificate]
    if "optimal" in certificate:
        unproven = "not proven: the gap bounds what is missing"
        rows.append(("optimal", "yes, proven" if certificate["optimal"] else unproven))
    return rows


def stage_table(run: Run) -> Table:
    """How long each stage took."""
    return Table(
        "stages",
        ("stage", "seconds", "finished"),
        tuple((name, stage.seconds, stage.finished) for name, stage in run.stages.items()),
    )


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return plain(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(one)}" for key, one in sorted(value.items()))
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)
