"""The select stage: the run's policy, its baselines, the tuned masks, where adapters go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from floe.adapters.targets import input_widths, parameter_counts
from floe.config import Baseline, Schedule
from floe.importance.scores import Scores
from floe.pipeline.inputs import Workspace
from floe.pipeline.placing import capacity_gain, place, size_options
from floe.pipeline.scoring import load_statistics
from floe.selection.layer_count import layer_memory, saved_bytes_per_token
from floe.selection.masks.presets import PRESETS
from floe.selection.placement import Placement
from floe.selection.select import Selection, SelectOptions, select_by
from floe.storage import read_json


def choose(work: Workspace, run: Path, progress: Any, count: int | None = None) -> Selection:
    """Apply ``config.select`` to the run's scores; tuning uses the warm-up model.

    ``count``: choose so many layers, whatever the configuration says.
    """
    settings = work.config.select
    scores = Scores.load(run / "score/scores.npz")
    layers: Any = count or settings.layers  # a sweep brings its counts
    options = replace(
        _options(work, run, settings.policy, settings.preset),
        layers=layers,
        seed=settings.seed,
        pick=settings.pick,
        layer_memory=_layer_memory(work, run),
        tune=settings.tune,
        tune_tokens=settings.tune_tokens,
    )
    if settings.tune is False:
        return select_by(options, scores)
    with work.adapted(run / "search/adapter") as model:
        batches = work.batches(work.calibration_rows, work.config.score.batch_size)
        return select_by(options, scores, model, batches, progress)


def _options(work: Workspace, run: Path, policy: str, preset: str) -> SelectOptions:
    """The options that the run's own choice and its baselines' share."""
    settings = work.config.select
    return SelectOptions(
        policy=policy,
        preset=replace(PRESETS[preset], first_order=settings.first_order),
        budget=settings.budget,
        score=settings.score,
        budget_path=settings.budget_path,
        statistics=load_statistics(run, {policy}),
    )


def check_tuning(work: Workspace) -> None:
    """Before hours of work for it: masks that must be tuned must be of a model that allows it.

    Raises:
        ValueError: ``select.tune`` is true, and this model's masks cannot be tuned.
    """
    if not work.config.select.tune:
        return
    from floe.selection.masks.tuning import NotTunable, check_tunable

    try:
        check_tunable(work.base_model, work.batches(work.calibration_rows[:1], 1))
    except NotTunable as error:
        raise ValueError(
            f"select.tune: true asks for masks that cannot be tuned: {error}; leave it out, and "
            "binary masks are scored"
        ) from error


def placed(work: Workspace, run: Path, choice: Selection, kind: str) -> Placement:
    """Where the run's adapters go by this choice; ``kind`` is ``config.select.choose`` or an arm's.

    Raises:
        ValueError: see :func:`floe.pipeline.placing.place`.
    """
    if kind == "layers":  # needs no scores, which may be large
        return Placement(choice.layers)
    found = read_json(run / "search/result.json")
    size, search = (found["rank"], found["num_experts"]), work.config.search
    gain = capacity_gain(found, work.config.select.r0) if kind == "sizes" else None
    scores = Scores.load(run / "score/scores.npz")
    return place(work, scores, choice, kind, size, size_options(search), gain)


def place_baseline(work: Workspace, run: Path, chosen: Selection, baseline: Baseline) -> Placement:
    """Where one baseline's adapters go: as many layers as the main arm chose, by its own policy.

    The policy ``all`` takes every one. The paper's masks at the run's own preset are those already
    computed, and tuned, for the main selection.
    """
    settings = work.config.select
    if baseline.policy in ("all", *get_args(Schedule)):
        return Placement(tuple(range(len(chosen.layer_scores))))
    same = baseline.preset == settings.preset and baseline.pick == "top"
    if baseline.policy == "masks" and same:
        choice = _paper_choice(chosen)
    else:
        choice = _baseline_choice(work, run, baseline, len(chosen.layers))
    return placed(work, run, choice, baseline.choose)


def _paper_choice(chosen: Selection) -> Selection:
    paper = chosen.paper
    layers = tuple(sorted(paper.ranking[: len(chosen.layers)]))
    return replace(chosen, policy="masks", layers=layers, layer_scores=paper.layer_scores)


def _baseline_choice(work: Workspace, run: Path, baseline: Baseline, count: int) -> Selection:
    options = _options(work, run, baseline.policy, baseline.preset)
    options = replace(options, layers=count, seed=baseline.seed, pick=baseline.pick)
    return select_by(options, Scores.load(run / "score/scores.npz"))


def _layer_memory(work: Workspace, run: Path) -> list[int] | None:
    """What training each layer's adapters takes, in bytes, where the number of layers asks."""
    layers = work.config.select.layers
    if not (isinstance(layers, dict) and "memory" in layers):
        return None
    size, train = read_json(run / "search/result.json"), work.config.train
    rank, experts = size["rank"], size["num_experts"]
    config = work.adapter_config(rank, experts)
    saved = [
        saved_bytes_per_token(inputs, rank, experts, element_bytes=work.dtype.itemsize)
        for inputs in input_widths(work.base_model, config)
    ]
    tokens = train.batch_size * work.config.data.max_length
    return layer_memory(parameter_counts(work.base_model, config), saved, tokens)
