"""The select stage: the run's policy, its baselines, and the tuned masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from floe.adapters.targets import input_widths, parameter_counts
from floe.config import Baseline, Schedule
from floe.importance.scores import Scores
from floe.importance.statistics import LayerStatistics
from floe.pipeline.workspace import Workspace
from floe.runs import read_json
from floe.selection.counts import layer_memory, saved_bytes_per_token
from floe.selection.presets import PRESETS, Preset
from floe.selection.selection import Selection, select


def choose(work: Workspace, run: Path, progress: Any, count: int | None = None) -> Selection:
    """Apply ``config.select`` to the run's scores; tuning uses the warm-up model.

    ``count``: choose so many layers, whatever the configuration says.
    """
    settings = work.config.select
    scores = Scores.load(run / "score/scores.npz")
    arguments: dict[str, Any] = {
        "policy": settings.policy, "preset": _preset(settings.preset, settings.first_order),
        "budget": settings.budget, "layers": count or settings.layers, "score": settings.score,
        "seed": settings.seed,
        "pick": settings.pick, "budget_path": settings.budget_path,
        "statistics": _statistics(run), "layer_memory": _layer_memory(work, run),
    }  # fmt: skip
    if not settings.tune:
        return select(scores, **arguments)
    with work.adapted(run / "search/adapter") as model:
        batches = work.batches(work.calibration_rows, work.config.score.batch_size)
        return select(
            scores, model, batches, tune_tokens=settings.tune_tokens, progress=progress, **arguments
        )


def choose_baseline(work: Workspace, run: Path, chosen: Selection, baseline: Baseline) -> list[int]:
    """Layers of one baseline: as many as the main arm has, by the baseline's policy.

    The policy ``all`` takes every one. The paper's masks at the run's own preset are those already
    computed, and tuned, for the main selection.
    """
    scores = Scores.load(run / "score/scores.npz")
    settings = work.config.select
    if baseline.policy in ("all", *get_args(Schedule)):
        return list(range(scores.layer_count))
    same = baseline.preset == settings.preset and baseline.pick == "top"
    if baseline.policy == "masks" and same:
        return sorted(int(layer) for layer in chosen.paper.ranking[: len(chosen.layers)])
    other = select(
        scores, policy=baseline.policy, preset=_preset(baseline.preset, settings.first_order),
        budget=settings.budget,
        layers=len(chosen.layers), score=settings.score, seed=baseline.seed, pick=baseline.pick,
        budget_path=settings.budget_path, statistics=_statistics(run),
    )  # fmt: skip
    return list(other.layers)


def _preset(name: str, first_order: bool) -> Preset:
    return replace(PRESETS[name], first_order=first_order)


def _statistics(run: Path) -> LayerStatistics | None:
    """The layer statistics of the score stage, if a policy of this run needs any."""
    file = run / "score/statistics.npz"
    return LayerStatistics.load(file) if file.is_file() else None


def _layer_memory(work: Workspace, run: Path) -> list[int] | None:
    """What training each layer's adapters takes, in bytes, where the number of layers asks."""
    layers = work.config.select.layers
    if not (isinstance(layers, dict) and "memory" in layers):
        return None
    size, train = read_json(run / "search/result.json"), work.config.train
    rank, experts = size["rank"], size["num_experts"]
    config = work.adapter_config(rank, experts, None)
    saved = [
        saved_bytes_per_token(inputs, rank, experts, element_bytes=work.dtype.itemsize)
        for inputs in input_widths(work.base_model, config)
    ]
    tokens = train.batch_size * work.config.data.max_length
    return layer_memory(parameter_counts(work.base_model, config), saved, tokens)
