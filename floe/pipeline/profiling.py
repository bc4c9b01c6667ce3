"""Step time and peak memory against the number of adapted layers (paper Fig. 1b)."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from floe.adapters import remove_adapters
from floe.decoder_blocks import find_blocks
from floe.pipeline.inputs import Workspace
from floe.selection.placement import Placement
from floe.storage import write_json
from floe.training.memory import PeakMemory
from floe.types import Batch


def build(work: Workspace, rank: int, experts: int, folder: Path, progress: Any) -> None:
    """Time optimiser steps with k evenly spread layers adapted, for several k.

    Writes ``profile.json``. Every point runs the same rows. The layers are spread so that the
    lowest adapted one, which decides how far the backward pass goes, moves as it would for a
    typical choice.
    """
    total = len(find_blocks(work.base_model))
    points = work.config.profile.points
    counts = sorted({max(1, round(total * (i + 1) / points)) for i in range(points)})
    settings = work.settings()
    rows = work.train_rows[: settings.batch_size * settings.grad_accum]
    batches = work.batches(rows, settings.batch_size)
    found = []
    for done, count in enumerate(counts):
        progress(done, len(counts), f"{count} layers")
        layers = [round((i + 0.5) * total / count - 0.5) for i in range(count)]
        found.append(_point(work, rank, experts, layers, batches))
    write_json(
        folder / "profile.json",
        {
            "points": found, "steps": work.config.profile.steps, "batch_size": len(rows),
            "tokens_per_step": int(sum(b["attention_mask"].sum() for b in batches)),
        },
    )  # fmt: skip


def _point(
    work: Workspace, rank: int, experts: int, layers: list[int], batches: list[Batch]
) -> dict[str, Any]:
    model = work.fresh(rank, experts, Placement(tuple(layers)))
    seconds = []
    try:
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        with PeakMemory(work.device) as memory:
            for _ in range(work.config.profile.steps + 1):
                seconds.append(_step(model, optimizer, batches, work.device))
    finally:
        remove_adapters(model)
    timed = seconds[1:]  # the first step allocates
    return {
        "layers": len(layers), "seconds_per_step": statistics.median(timed), "low": min(timed),
        "high": max(timed), "peak_memory_bytes": memory.bytes, "memory_kind": memory.kind,
    }  # fmt: skip


def _step(model: Any, optimizer: Any, batches: list[Batch], device: torch.device) -> float:
    began = time.perf_counter()
    for batch in batches:
        inputs = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
        model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
