"""The search stage: rank and experts by trials, or one warm-up at the configured size.

``result.json`` is written last, before what is needed no more is removed.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from floe.adapters import remove_adapters
from floe.adapters.files import save_adapter
from floe.config import storage_url
from floe.pipeline.inputs import Workspace, plain
from floe.rank_search.search import remove_trials, search
from floe.rank_search.space import SearchSpace
from floe.storage import copy_folder, write_json
from floe.training.checkpoints import remove_checkpoints
from floe.training.train import train


def build(work: Workspace, folder: Path, on_step: Any, on_trial: Any) -> None:
    """Write ``result.json`` and ``adapter/``: the best trial's, or the single warm-up's.

    A search goes on from the trials of an earlier one in ``folder``, finished or not.
    """
    if work.config.search.trials > 0:
        _search(work, folder, on_trial)
    elif not (folder / "result.json").is_file():  # else killed below, and done
        _warm_up(work, folder, on_step)
    tidy(folder)


def tidy(folder: Path) -> None:
    """Remove what only :func:`build` needs, once there is a result."""
    remove_checkpoints(folder / "checkpoints")
    remove_trials(folder)
    for name in ("search.lock", "study.db.lock"):
        (folder / name).unlink(missing_ok=True)


def _warm_up(work: Workspace, folder: Path, on_step: Any) -> None:
    adapter, began = work.config.adapter, time.monotonic()
    model = work.fresh(adapter.r, adapter.num_experts)
    try:
        result = train(
            model,
            work.warmup_rows,
            settings=work.settings(work.config.warmup.max_steps),
            output_dir=folder / "checkpoints",
            validation=work.validation_rows,
            on_progress=on_step,
        )
        save_adapter(model, folder / "adapter")
    finally:
        remove_adapters(model)
    loss = result.validation_loss[-1][1] if result.validation_loss else None
    write_json(
        folder / "result.json",
        {
            "rank": adapter.r, "num_experts": adapter.num_experts, "best_trial": None,
            "objective": loss, "trials": [], "distinct": 0, "sampler": {"name": "none"},
            "seconds": round(time.monotonic() - began, 3),
        },
    )  # fmt: skip


def _search(work: Workspace, folder: Path, on_trial: Any) -> None:
    config, best = work.config, folder / "best"
    adapter = config.adapter.model_dump(exclude={"r", "num_experts"})
    if (folder / "adapter").is_dir() and not (best / "adapter_model.safetensors").is_file():
        copy_folder(folder / "adapter", best)  # where search looks for it
    found = search(
        work.base_model,
        work.warmup_rows,
        work.validation_rows,
        directory=folder,
        space=SearchSpace(config.search.rank, config.search.num_experts),
        trials=config.search.trials,
        storage=storage_url(config.search),
        sampler=config.search.sampler,
        startup_trials=config.search.startup_trials,
        seed=config.search.seed,
        settings=work.settings(config.warmup.max_steps),
        adapter=adapter,
        prune=config.search.prune,
        on_progress=on_trial,
    )
    remove_adapters(found.model)
    copy_folder(found.adapter_path, folder / "adapter")
    names = ("rank", "num_experts", "best_trial", "objective", "sampler", "seconds", "distinct")
    write_json(
        folder / "result.json",
        {name: plain(getattr(found, name)) for name in names}
        | {"trials": [plain(trial) for trial in found.trials], "exhausted": found.exhausted},
    )
