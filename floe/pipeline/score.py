"""``floe score``: what is measured on the warm-up model, by one process or by several workers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed

from floe.data.batches import fingerprint, in_batches
from floe.importance.layer_statistics import measure_statistics
from floe.importance.score import score
from floe.importance.scores import LayerStatistics, Scores
from floe.pipeline import identity
from floe.pipeline.inputs import RunInputs
from floe.pipeline.run_folder import Stage
from floe.selection.policies import POLICIES


def stages(run: RunInputs) -> Iterator[Stage]:
    """Mask Fisher, adapter Fisher and Taylor cost; and what else the policies look at."""
    yield Stage("score", inputs(run), partial(build, run), results=("scores.npz",), tidy=tidy)
    _announce(None)
    for name, policy in statistics_of(run.policies).items():
        yield Stage(
            f"statistics/{name}",
            identity.of_stage(run, "statistics")
            | {"adapter": identity.of_adapter(run, "search")}
            | {"rows": fingerprint(run.statistic_rows)},
            partial(build_statistics, run, policy),
            results=("statistics.npz",),
        )


def inputs(run: RunInputs) -> dict[str, Any]:
    """What decides the scores."""
    return identity.of_stage(run, "score") | {
        "adapter": identity.of_adapter(run, "search"),
        "rows": fingerprint(run.calibration_rows),
        "taylor_rows": fingerprint(run.taylor_rows),
        "probe": _wants_probe(run),
    }


def build(run: RunInputs, folder: Path) -> None:
    """Write ``scores.npz``, with the help of the other workers if there are any."""
    _announce(folder)
    _measure(run, folder).save(folder / "scores.npz")


def tidy(folder: Path) -> None:
    """Remove the pieces that the scores were put together from."""
    pieces = folder / "pieces"
    for file in (*pieces.glob("*.npz"), *pieces.glob(".*.tmp")):
        file.unlink()
    if pieces.is_dir() and not any(pieces.iterdir()):
        pieces.rmdir()


def _measure(run: RunInputs, folder: Path) -> Scores:
    settings = run.config.score
    options = ["reduction", "mask_scope", "first_order", "keep_samples", "seed"]
    options += [f"taylor_{name}" for name in ("kind", "aggregate", "tokens")]
    with run.adapted(run.path / "search/adapter") as model:
        return score(
            model,
            in_batches(run.calibration_rows, settings.batch_size),
            taylor_batches=in_batches(run.taylor_rows, settings.batch_size),
            probe=_wants_probe(run),
            folder=folder / "pieces",
            progress=partial(run.progress.step, "score"),
            **{name: getattr(settings, name) for name in options},
        )


def _wants_probe(run: RunInputs) -> bool:
    """Whether a policy looks at fresh adapters; what was measured of them stays."""
    done = run.folder.done("score")
    return "probe" in run.policies or (done is not None and bool(done.inputs.get("probe")))


def statistics_of(policies: Set[str]) -> dict[str, str]:
    """Name of each measurement that the policies need -> one of the policies that it is for."""
    needed = {policy: POLICIES[policy].statistics for policy in sorted(policies & POLICIES.keys())}
    return {"+".join(names): policy for policy, names in needed.items() if names}


def build_statistics(run: RunInputs, policy: str, folder: Path) -> None:
    """Write ``statistics.npz``: the layer statistics that the policy needs."""
    settings, tell = run.config.score, partial(run.progress.step, "score")
    with run.adapted(run.path / "search/adapter") as model:
        batches = run.batches(run.statistic_rows, settings.batch_size)
        measured = measure_statistics(model, batches, [policy], seed=settings.seed, progress=tell)
    measured.save(folder / "statistics.npz")


def statistics_files(run: RunInputs, policies: Set[str]) -> dict[str, Path]:
    """Name of each measurement that the policies need -> its file."""
    names = statistics_of(policies)
    return {name: run.path / f"statistics/{name}/statistics.npz" for name in names}


def load_statistics(run: RunInputs, policies: Set[str]) -> LayerStatistics | None:
    """The layer statistics that these policies need, put together; None if they need none."""
    parts = [LayerStatistics.load(file) for file in statistics_files(run, policies).values()]
    values = {name: array for part in parts for name, array in part.values.items()}
    return LayerStatistics(parts[0].layers, values) if parts else None


def worker_count() -> int:
    """Processes that torchrun (or a launcher like it) started together; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_helper() -> bool:
    """Whether this process only helps another one, which owns the run folder."""
    return worker_count() > 1 and os.environ.get("RANK", "0") != "0"


@contextmanager
def workers() -> Iterator[None]:
    """Within it the workers can exchange small objects; alone, it does nothing."""
    if worker_count() == 1:
        yield
        return
    distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def help_score(run: RunInputs) -> None:
    """Do this worker's part of the stage, if worker 0 says that it has to be done."""
    while (folder := _announce(None)) is not None:
        _measure(run, folder)


def _announce(folder: Path | None) -> Path | None:
    """Worker 0 tells the others where the scores are measured, None if they are done."""
    if worker_count() == 1:
        return folder
    said: list[Any] = [None if folder is None else str(folder.resolve())]
    distributed.broadcast_object_list(said, src=0)
    return None if said[0] is None else Path(said[0])
