"""The search stage: rank and experts by trials, or one warm-up at the configured size."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from floe.adapters.files import save_adapter
from floe.checkpoints import remove_checkpoints
from floe.runs import write_json
from floe.train import train
from floe.pipeline.workspace import Workspace, taken_off


def build(work: Workspace, folder: Path, on_step: Any, on_trial: Any) -> None:
    """Write ``result.json`` and ``adapter/``: the best trial's, or the single warm-up's."""
    if work.config.search.trials == 0:
        _warm_up(work, folder, on_step)
    else:
        _search(work, folder, on_trial)


def _warm_up(work: Workspace, folder: Path, on_step: Any) -> None:
    adapter, began = work.config.adapter, time.monotonic()
    model = work.fresh(adapter.r, adapter.num_experts, None)
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
        taken_off(model)
    remove_checkpoints(folder / "checkpoints")
    loss = result.validation_loss[-1][1] if result.validation_loss else None
    write_json(
        folder / "result.json",
        {
            "rank": adapter.r, "num_experts": adapter.num_experts, "best_trial": None, "objective": loss,
            "trials": [], "distinct": 0, "sampler": {"name": "none"}, "seconds": round(time.monotonic() - began, 3),
        },
    )  # fmt: skip
