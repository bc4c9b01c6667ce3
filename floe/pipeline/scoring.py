"""The score stage: what is measured on the warm-up model, by one process or by several workers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from floe.data.batches import in_batches
from floe.importance.layer_statistics import measure_statistics
from floe.importance.score import score
from floe.importance.scores import Scores
from floe.importance.statistics import LayerStatistics
from floe.pipeline.inputs import Workspace
from floe.selection.policies import POLICIES


def worker_count() -> int:
    """Processes that torchrun (or a launcher like it) started together; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_helper() -> bool:
    """Whether this process only helps another one, which owns the run folder."""
    return worker_count() > 1 and os.environ.get("RANK", "0") != "0"


@contextmanager
def workers() -> Iterator[None]:
    """Within it the workers can exchange small objects; alone, it does nothing."""
    from torch import distributed

    if worker_count() == 1:
        yield
        return
    distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def build(work: Workspace, run: Path, folder: Path, probe: bool, progress: Any) -> None:
    """Write ``folder/scores.npz``, with the help of the other workers if there are any."""
    announce(folder)
    _measure(work, run, folder, probe, progress).save(folder / "scores.npz")


def tidy(folder: Path) -> None:
    """Remove the pieces that the scores were put together from."""
    pieces = folder / "pieces"
    for file in (*pieces.glob("*.npz"), *pieces.glob(".*.tmp")):
        file.unlink()
    if pieces.is_dir() and not any(pieces.iterdir()):
        pieces.rmdir()


def help_build(work: Workspace, run: Path, probe: bool, progress: Any) -> None:
    """Do this worker's part of the stage, if worker 0 says that it has to be done."""
    folder = announce(None)
    if folder is not None:
        _measure(work, run, folder, probe, progress)


def announce(folder: Path | None) -> Path | None:
    """Worker 0 tells the others where the stage works, None if nothing is to be done."""
    if worker_count() == 1:
        return folder
    from torch import distributed

    said: list[Any] = [None if folder is None else str(folder.resolve())]
    distributed.broadcast_object_list(said, src=0)
    return None if said[0] is None else Path(said[0])


def statistics_of(policies: Set[str]) -> dict[str, str]:
    """Name of each measurement that the policies need -> one of the policies that it is for."""
    needed = {policy: POLICIES[policy].statistics for policy in sorted(policies & POLICIES.keys())}
    return {"+".join(names): policy for policy, names in needed.items() if names}


def build_statistics(work: Workspace, run: Path, folder: Path, policy: str, progress: Any) -> None:
    """Write ``folder/statistics.npz``: the layer statistics that the policy needs."""
    settings = work.config.score
    with work.adapted(run / "search/adapter") as model:
        batches = work.batches(work.statistic_rows, settings.batch_size)
        found = measure_statistics(model, batches, [policy], seed=settings.seed, progress=progress)
    found.save(folder / "statistics.npz")


def load_statistics(run: Path, policies: Set[str]) -> LayerStatistics | None:
    """The layer statistics that these policies need, put together; None if they need none."""
    names = statistics_of(policies)
    parts = [LayerStatistics.load(run / f"statistics/{n}/statistics.npz") for n in names]
    values = {name: array for part in parts for name, array in part.values.items()}
    return LayerStatistics(parts[0].layers, values) if parts else None


def _measure(work: Workspace, run: Path, folder: Path, probe: bool, progress: Any) -> Scores:
    settings = work.config.score
    with work.adapted(run / "search/adapter") as model:
        return score(
            model,
            in_batches(work.calibration_rows, settings.batch_size),
            taylor_batches=in_batches(work.taylor_rows, settings.batch_size),
            reduction=settings.reduction,
            mask_scope=settings.mask_scope,
            first_order=settings.first_order,
            taylor_kind=settings.taylor_kind,
            taylor_aggregate=settings.taylor_aggregate,
            taylor_tokens=settings.taylor_tokens,
            keep_samples=settings.keep_samples,
            probe=probe,
            seed=settings.seed,
            folder=folder / "pieces",
            progress=progress,
        )
