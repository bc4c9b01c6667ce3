"""Reads a run folder's artifacts: text, JSON and npz, never torch."""

from __future__ import annotations

import math
from pathlib import Path

from floe.errors import FileError, hide_secrets
from floe.importance.scores import Scores
from floe.report.artifacts import (
    Choice,
    Evaluation,
    Interval,
    MaskChoice,
    Outcome,
    Part,
    Point,
    Profile,
    Router,
    Run,
    Search,
    Stage,
    Training,
    Trial,
    Tuned,
)
from floe.report.audit_read import Audited, audited
from floe.report.records import Record, read_json, read_text
from floe.selection.placement import Placement

_STAGES = ("search", "score", "select", "train", "profile", "eval")


def read_run(run_dir: Path) -> Run:
    """Reads a run folder.

    Required: config.yaml, env.json, score/scores.npz and select/selection.json.

    Raises:
        FileError: naming the path of a missing, unreadable or damaged artifact.
    """
    if not run_dir.is_dir():
        raise FileError(run_dir, "is not a folder; give the folder of a run")
    scores_path = run_dir / "score" / "scores.npz"
    if not scores_path.is_file():
        raise FileError(scores_path, "is missing; the report needs it")
    config = read_text(run_dir / "config.yaml")
    env = read_json(run_dir / "env.json").data
    scores = Scores.load(scores_path)
    layers = scores.layer_count
    return Run(
        name=run_dir.resolve().name,
        config=hide_secrets(config),  # of a run that wrote it before passwords were masked
        env=env,
        scores=scores,
        choice=_choice(read_json(run_dir / "select" / "selection.json"), layers),
        search=_search(_optional(run_dir / "search" / "result.json")),
        training=_training(run_dir, layers),
        evaluation=_evaluation(_optional(run_dir / "eval" / "results.json")),
        routers=_routers(_optional(run_dir / "eval" / "router.json"), layers),
        profile=_profile(_optional(run_dir / "profile" / "profile.json")),
        stages=_stages(run_dir),
        selection=_selection_hash(_optional(run_dir / "select" / "DONE.json")),
        audit=_audit(_optional(run_dir / "audit" / "audit.json"), layers),
        data=_data(_optional(run_dir / "data.json")),
    )


def _optional(path: Path) -> Record | None:
    return read_json(path) if path.is_file() else None


def _data(data: Record | None) -> tuple[Part, ...]:
    if data is None:
        return ()
    return tuple(
        Part(name, part.text("summary"), bool(part.text("lost", default="")))
        for name, part in data.record("parts").items()
    )


def _choice(data: Record, layers: int) -> Choice:
    agreement = data.record("agreement")
    return Choice(
        policy=data.text("policy"),
        preset=data.text("preset", default=""),
        budget=data.maybe_number("budget"),
        layers=data.layers("layers", layers),
        layer_scores=data.numbers("layer_scores", layers),
        ranking=data.layers("ranking", layers, whole=True),
        tuned=data.flag("tuned"),
        untuned=data.text("untuned", default=""),
        tuning=tuple(_tuned(one, layers) for one in data.records("tuning")),
        paper=_masks(data.record("paper"), layers),
        spearman=agreement.maybe_number("spearman"),
        overlap=agreement.maybe_number("overlap"),
        expected_overlap=agreement.maybe_number("expected_overlap"),
        certificate=data.record("certificate") if data.has("certificate") else None,
        seed=data.maybe_integer("seed"),
    )


def _masks(data: Record, layers: int) -> MaskChoice:
    heads, neurons = "masked_head_fraction", "masked_neuron_fraction"
    return MaskChoice(
        preset=data.text("preset", default=""),
        layers=data.layers("layers", layers),
        layer_scores=data.numbers("layer_scores", layers),
        ranking=data.layers("ranking", layers, whole=True),
        masked_heads=data.numbers(heads, layers) if data.has(heads) else None,
        masked_neurons=data.numbers(neurons, layers) if data.has(neurons) else None,
    )


def _tuned(data: Record, layers: int) -> Tuned:
    layer = data.integer("layer")
    if not 0 <= layer < layers:
        raise data.fail("layer", f"in [0, {layers})")
    return Tuned(
        layer=layer,
        component=data.text("component"),
        accepted=data.flag("accepted"),
        before=data.maybe_number("residual_before"),
        after=data.maybe_number("residual_after"),
    )


def _search(data: Record | None) -> Search | None:
    if data is None:
        return None
    trials = []
    for one in data.records("trials"):
        state = one.text("state")
        if state not in ("complete", "pruned", "failed", "repeat"):
            raise one.fail("state", "complete, pruned, failed or repeat")
        trials.append(
            Trial(
                number=one.integer("number"),
                rank=one.integer("rank"),
                num_experts=one.integer("num_experts"),
                state=state,
                value=one.maybe_number("value"),
                seconds=one.maybe_number("seconds"),
            )
        )
    return Search(
        rank=data.integer("rank"),
        num_experts=data.integer("num_experts"),
        best_trial=data.maybe_integer("best_trial"),
        seconds=data.maybe_number("seconds"),
        trials=tuple(sorted(trials, key=lambda trial: trial.number)),
        distinct=data.maybe_integer("distinct"),
        sampler=data.record("sampler") if data.has("sampler") else None,
    )


def _arms(run_dir: Path) -> set[str] | None:
    """The arms of the run's last configuration; None if it does not say."""
    placed = _optional(run_dir / "arms" / "placements.json")
    return None if placed is None else set(placed.data)


def _training(run_dir: Path, layers: int) -> dict[str, Training]:
    runs, arms = {}, _arms(run_dir)
    for path in sorted(run_dir.glob("train/*/metrics.json")):
        if arms is not None and path.parent.name not in arms:
            continue
        one = _trained(read_json(path), layers)
        runs[one.arm] = one
    return runs


def _trained(data: Record, layers: int) -> Training:
    return Training(
        arm=data.text("arm"),
        policy=data.text("policy", default=""),
        layers=data.layers("layers", layers),
        modules=_placed(data).modules,
        sizes=_placed(data).sizes,
        rank=data.integer("rank"),
        num_experts=data.integer("num_experts"),
        trainable_parameters=data.integer("trainable_parameters"),
        steps=data.integer("steps"),
        seconds=data.number("seconds"),
        seconds_per_step=data.number("seconds_per_step"),
        peak_memory_bytes=data.maybe_number("peak_memory_bytes"),
        memory_kind=data.text("memory_kind", default=""),
        train_loss=data.curve("train_loss"),
        validation_loss=data.curve("validation_loss"),
        seed=data.maybe_integer("seed"),
    )


def _placed(data: Record) -> Placement:
    try:
        return Placement.read(data.data)
    except (AttributeError, TypeError, ValueError) as error:
        raise FileError(data.path, f"does not say where its adapters are: {error}") from error


def _evaluation(data: Record | None) -> Evaluation | None:
    if data is None:
        return None
    return Evaluation(
        arms={arm: _outcome(one) for arm, one in data.record("arms").items()},
        intervals=data.text("intervals", default=""),
        seed=data.maybe_integer("seed"),
    )


def _outcome(data: Record) -> Outcome:
    tasks = data.record("by_task").items() if data.has("by_task") else ()
    return Outcome(
        loss=_interval(data, "loss"),
        loss_minus_main=_interval(data, "loss_minus_main"),
        accuracy=_interval(data, "accuracy"),
        by_task={task: _outcome(one) for task, one in tasks},
    )


def _interval(data: Record, key: str) -> Interval | None:
    if not data.has(key):
        return None
    one = data.record(key)
    if not one.has("value"):
        return None
    low, high = one.maybe_number("low"), one.maybe_number("high")
    both = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    return Interval(
        value=one.number("value"),
        low=low if both else None,
        high=high if both else None,
        n=one.maybe_integer("rows"),
    )


def _routers(data: Record | None, layers: int) -> tuple[Router, ...]:
    if data is None:
        return ()
    found = []
    for one in data.records("modules"):
        layer = one.integer("layer")
        if not 0 <= layer < layers:
            raise one.fail("layer", f"in [0, {layers})")
        found.append(
            Router(
                layer=layer,
                module=one.text("module"),
                usage=one.numbers("usage"),
                load_entropy=one.number("load_entropy"),
                token_entropy=one.number("token_entropy"),
                mutual_information=one.number("mutual_information"),
            )
        )
    return tuple(found)


def _selection_hash(data: Record | None) -> str:
    return "" if data is None else data.text("inputs_hash", default="")


def _audit(data: Record | None, layers: int) -> Audited | None:
    return None if data is None else audited(data, layers)


def _profile(data: Record | None) -> Profile | None:
    if data is None:
        return None
    points = [
        Point(
            layers=one.integer("layers"),
            seconds=one.number("seconds_per_step"),
            low=one.maybe_number("low"),
            high=one.maybe_number("high"),
            memory=one.maybe_number("peak_memory_bytes"),
            memory_kind=one.text("memory_kind", default=""),
        )
        for one in data.records("points")
    ]
    return Profile(
        points=tuple(sorted(points, key=lambda point: point.layers)),
        steps=data.maybe_integer("steps"),
        batch_size=data.maybe_integer("batch_size"),
        tokens_per_step=data.maybe_number("tokens_per_step"),
    )


def _stages(run_dir: Path) -> tuple[Stage, ...]:
    """Finished stages in pipeline order; the report's own record would change what it reports."""
    found, arms = [], _arms(run_dir)
    for path in (*run_dir.glob("*/DONE.json"), *run_dir.glob("*/*/DONE.json")):
        name = path.parent.relative_to(run_dir).as_posix()
        stage, _, part = name.partition("/")
        gone = stage == "train" and arms is not None and part not in arms
        if stage in _STAGES and not gone and not name.endswith(".work"):
            data = read_json(path)
            seconds = data.maybe_number("seconds")
            found.append(Stage(name, seconds, data.text("finished", default="")))
    return tuple(sorted(found, key=_stage_order))


def _stage_order(stage: Stage) -> tuple[int, bool, str]:
    return _STAGES.index(stage.name.split("/")[0]), stage.name != "train/main", stage.name
