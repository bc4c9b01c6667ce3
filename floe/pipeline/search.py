"""``floe search``: rank and number of experts by trials, or one warm-up at the configured size.

The warm-up model, or the best trial's, is what the next stage scores. ``result.json`` is written
last, before what is needed no more is removed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from floe.adapters import remove_adapters
from floe.artifacts.results import Search
from floe.artifacts.schema import write
from floe.config import storage_url
from floe.data.batches import fingerprint
from floe.pipeline import identity, train
from floe.pipeline.inputs import RunInputs
from floe.pipeline.run_folder import Stage
from floe.pipeline.score import worker_count
from floe.rank_search.search import remove_trials, search
from floe.rank_search.space import SearchSpace
from floe.selection.masks.tuning import NotTunable, check_tunable
from floe.storage import copy_folder
from floe.training.checkpoints import remove_checkpoints


def stages(run: RunInputs) -> Iterator[Stage]:
    """The search, or the warm-up in its place."""
    yield Stage(
        "search",
        inputs(run),
        partial(build, run),
        results=("result.json", "adapter", "study.db"),
        tidy=tidy,
        growing=("search.trials",),
        followers=("score",),
        handed="adapter",
    )


def inputs(run: RunInputs) -> dict[str, Any]:
    """What decides rank, experts and the warm-up model."""
    settings = run.config.search
    every = identity.of_training(run, "search", run.config.warmup.max_steps)
    every |= {"rows": fingerprint(run.warmup_rows)}
    idle = {"adapter.r", "adapter.num_experts"}
    if settings.trials == 0:
        idle = {name for name in every if name.startswith("search.")}
    elif settings.sampler not in ("tpe", "paper"):
        idle |= {"search.startup_trials"}
    return {name: value for name, value in every.items() if name not in idle}


def build(run: RunInputs, folder: Path) -> None:
    """Write ``result.json`` and ``adapter/``: the best trial's, or the single warm-up's.

    A search goes on from the trials of an earlier one in ``folder``, finished or not.
    """
    if worker_count() > 1:
        raise ValueError(
            "the search stage must be finished before several workers score, it is not: "
            "run floe search CONFIG in one process"
        )
    _check_tuning(run)
    if run.config.search.trials > 0:
        _search(run, folder)
    elif not (folder / "result.json").is_file():  # else killed below, and done
        _warm_up(run, folder)
    tidy(folder)


def tidy(folder: Path) -> None:
    """Remove what only :func:`build` needs, once there is a result."""
    remove_checkpoints(folder / "checkpoints")
    remove_trials(folder)
    for name in ("search.lock", "study.db.lock"):
        (folder / name).unlink(missing_ok=True)


def _check_tuning(run: RunInputs) -> None:
    """Before hours of work for it: masks that must be tuned must be of a model that allows it."""
    if not run.config.select.tune:
        return
    try:
        check_tunable(run.base_model, run.batches(run.calibration_rows[:1], 1))
    except NotTunable as error:
        raise ValueError(
            f"select.tune: true asks for masks that cannot be tuned: {error}; leave it out, and "
            "binary masks are scored"
        ) from error


def _warm_up(run: RunInputs, folder: Path) -> None:
    adapter, began = run.config.adapter, time.monotonic()
    model = run.fresh(adapter.r, adapter.num_experts)
    result = train.train_adapter(
        run, "search", model, run.warmup_rows, run.settings(run.config.warmup.max_steps), folder
    )
    summary = Search(
        rank=adapter.r,
        num_experts=adapter.num_experts,
        objective=result.validation_loss[-1][1] if result.validation_loss else None,
        sampler={"name": "none"},
        seconds=round(time.monotonic() - began, 3),
        distinct=0,
    )
    write(folder / "result.json", summary)


def _search(run: RunInputs, folder: Path) -> None:
    config, best = run.config, folder / "best"
    if (folder / "adapter").is_dir() and not (best / "adapter_model.safetensors").is_file():
        copy_folder(folder / "adapter", best)  # where search looks for it
    result = search(
        run.base_model,
        run.warmup_rows,
        run.validation_rows,
        directory=folder,
        space=SearchSpace(config.search.rank, config.search.num_experts),
        trials=config.search.trials,
        storage=storage_url(config.search),
        sampler=config.search.sampler,
        startup_trials=config.search.startup_trials,
        seed=config.search.seed,
        settings=run.settings(config.warmup.max_steps),
        adapter=config.adapter.model_dump(exclude={"r", "num_experts"}),
        prune=config.search.prune,
        on_progress=partial(run.progress.step, "search"),
    )
    remove_adapters(result.model)
    copy_folder(result.adapter_path, folder / "adapter")
    write(folder / "result.json", result)
