"""The select stage: the run's policy, its baselines, and the tuned masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from floe.adapters import remove_adapters
from floe.config import Baseline
from floe.importance.scores import Scores
from floe.pipeline.workspace import Workspace
from floe.selection.selection import Selection, select


def choose(work: Workspace, run: Path, progress: Any) -> Selection:
    """Apply ``config.select`` to the run's scores; tuning uses the warm-up model."""
    settings = work.config.select
    scores = Scores.load(run / "score/scores.npz")
    arguments: dict[str, Any] = {
        "policy": settings.policy, "preset": settings.preset, "budget": settings.budget,
        "layers": settings.layers, "score": settings.score, "seed": settings.seed,
    }  # fmt: skip
    if not settings.tune:
        return select(scores, **arguments)
    model = work.adapted(run / "search/adapter")
    try:
        batches = work.batches(work.calibration_rows, work.config.score.batch_size)
        return select(
            scores, model, batches, tune_tokens=settings.tune_tokens, progress=progress, **arguments
        )
    finally:
        remove_adapters(model)


def choose_baseline(work: Workspace, run: Path, chosen: Selection, baseline: Baseline) -> list[int]:
    """Layers of one baseline: as many as the main arm has, by the baseline's policy.

    The policy ``all`` takes every one. The paper's masks at the run's own preset are those already
    computed, and tuned, for the main selection.
    """
    scores = Scores.load(run / "score/scores.npz")
    settings = work.config.select
    if baseline.policy == "all":
        return list(range(scores.layer_count))
    if baseline.policy == "masks" and baseline.preset == settings.preset:
        return sorted(int(layer) for layer in chosen.paper.ranking[: len(chosen.layers)])
    other = select(
        scores, policy=baseline.policy, preset=baseline.preset, budget=settings.budget,
        layers=len(chosen.layers), score=settings.score, seed=baseline.seed,
    )  # fmt: skip
    return list(other.layers)
