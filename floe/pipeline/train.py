"""``floe train``: the chosen layers, then every baseline on the same schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from floe.adapters import remove_adapters
from floe.adapters.files import save_adapter
from floe.artifacts.results import Placements, Training, TrainResult
from floe.artifacts.schema import document, read, write
from floe.artifacts.selection import Selection
from floe.config import Schedule
from floe.data.batches import TokenRow, fingerprint
from floe.pipeline import identity
from floe.pipeline.inputs import RunInputs
from floe.pipeline.run_folder import Stage
from floe.selection.placement import Placement
from floe.storage import copy_folder
from floe.training.checkpoints import remove_checkpoints
from floe.training.layer_schedule import SCHEDULES, LayerSchedule
from floe.training.schedule import TrainSettings
from floe.training.train import train

PLACEMENTS = "arms/placements.json"


def stages(run: RunInputs) -> Iterator[Stage]:
    """One an arm. Arms that are configured no more stay where they are.

    ``adapter/`` is the main one's.
    """
    for arm, (policy, placement) in arms(run).items():
        yield Stage(
            f"train/{arm}",
            inputs(run, "train", placement) | {"policy": policy, "movement": _movement(run, arm)},
            partial(build, run, arm, policy, placement),
            results=("adapter", "metrics.json"),
            tidy=tidy,
        )
    if not run.folder.read_only:
        copy_folder(run.path / "train/main/adapter", run.path / "adapter")


def inputs(run: RunInputs, stage: str, placement: Placement) -> dict[str, Any]:
    """What decides the adapter that is trained in these places."""
    rank, experts = run.size
    rows = {"rows": fingerprint(run.train_rows), "rank": rank, "num_experts": experts}
    places: dict[str, Any] = document(placement)
    return identity.of_training(run, stage) | rows | places


def build(run: RunInputs, arm: str, policy: str, placement: Placement, folder: Path) -> None:
    """Write ``adapter/`` and ``metrics.json``."""
    rank, experts = run.size
    model = run.fresh(rank, experts, placement)
    movement = _movement(run, arm)
    schedule = SCHEDULES[movement.pop("kind")](model, **movement) if movement else None
    result = train_adapter(
        run, f"train/{arm}", model, run.train_rows, run.settings(), folder, schedule
    )
    metrics = Training(
        **vars(result),
        **vars(placement),
        arm=arm,
        policy=policy,
        rank=rank,
        num_experts=experts,
        seed=run.config.train.seed,
    )
    write(folder / "metrics.json", metrics)


def train_adapter(
    run: RunInputs,
    stage: str,
    model: Any,
    rows: Sequence[TokenRow],
    settings: TrainSettings,
    folder: Path,
    schedule: LayerSchedule | None = None,
) -> TrainResult:
    """Train the fresh adapters of ``model``, write ``adapter/``, and take them away again."""

    def tell(step: int, steps: int, loss: float, seconds_left: float) -> None:
        run.progress.step(stage, step, steps, f"loss {loss:.3f}")

    try:
        result = train(
            model,
            rows,
            settings=settings,
            output_dir=folder / "checkpoints",
            validation=run.validation_rows,
            on_progress=tell,
            layer_schedule=schedule,
        )
        save_adapter(model, folder / "adapter")
    finally:
        remove_adapters(model)
    return result


def tidy(folder: Path) -> None:
    """Remove the checkpoints."""
    remove_checkpoints(folder / "checkpoints")


def arms(run: RunInputs) -> dict[str, tuple[str, Placement]]:
    """Arm -> its policy and where its adapters are; the chosen one is ``main``."""
    policies: dict[str, str] = {"main": run.config.select.policy}
    for arm in run.config.baselines:
        preset = f"/{arm.preset}" if arm.policy == "masks" else ""
        policies[arm.name] = f"{arm.policy}{preset}"
    places = read(Placements, run.path / PLACEMENTS)
    return {arm: (policy, places[arm]) for arm, policy in policies.items()}


def _movement(run: RunInputs, arm: str) -> dict[str, Any] | None:
    """How the trained layers move in this arm; None where they stay."""
    for settings in run.config.baselines:
        if settings.name == arm and settings.policy in get_args(Schedule):
            count = len(Selection.load(run.path / "select").layers)
            moving = {"count": count, "interval": settings.interval, "seed": settings.seed}
            return {"kind": settings.policy, **moving}
    return None
