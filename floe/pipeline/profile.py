"""Step time and peak memory against the number of adapted layers (paper Fig. 1b)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from floe.adapters import remove_adapters
from floe.artifacts.results import Point, Profile
from floe.artifacts.schema import write
from floe.data.batches import TokenRow, fingerprint
from floe.data.loss import on_device
from floe.decoder_blocks import find_blocks
from floe.pipeline import identity
from floe.pipeline.inputs import RunInputs
from floe.pipeline.run_folder import Stage
from floe.selection.placement import Placement
from floe.training.memory import PeakMemory
from floe.types import Batch


def stages(run: RunInputs) -> Iterator[Stage]:
    """The profile, unless it is switched off."""
    if run.config.profile.steps > 0:
        yield Stage("profile", inputs(run), partial(build, run), results=("profile.json",))


def inputs(run: RunInputs) -> dict[str, Any]:
    """What decides it; times differ from one machine to the next, and that is no reason."""
    rank, experts = run.size
    sizes = {"rank": rank, "num_experts": experts, "rows": fingerprint(_rows_of_a_step(run))}
    return identity.of_stage(run, "profile") | sizes


def build(run: RunInputs, folder: Path) -> None:
    """Time optimiser steps with k evenly spread layers adapted, for several k.

    Writes ``profile.json``. Every point runs the same rows. The layers are spread so that the
    lowest adapted one, which decides how far the backward pass goes, moves as it would for a
    typical choice.
    """
    total, points = len(find_blocks(run.base_model)), run.config.profile.points
    counts = sorted({max(1, round(total * (i + 1) / points)) for i in range(points)})
    rows = _rows_of_a_step(run)
    batches = run.batches(rows, run.config.train.batch_size)
    timed = []
    for done, count in enumerate(counts):
        run.progress.step("profile", done, len(counts), f"{count} layers")
        layers = [round((i + 0.5) * total / count - 0.5) for i in range(count)]
        timed.append(_point(run, layers, batches))
    tokens = int(sum(batch["attention_mask"].sum() for batch in batches))
    write(folder / "profile.json", Profile(timed, run.config.profile.steps, len(rows), tokens))


def _rows_of_a_step(run: RunInputs) -> list[TokenRow]:
    return run.train_rows[: run.config.train.batch_size * run.config.train.grad_accum]


def _point(run: RunInputs, layers: list[int], batches: list[Batch]) -> Point:
    model = run.fresh(*run.size, Placement(tuple(layers)))
    try:
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        with PeakMemory(run.device) as memory:
            steps = range(run.config.profile.steps + 1)
            seconds = [_step(model, optimizer, batches, run.device) for _ in steps]
    finally:
        remove_adapters(model)
    seconds = seconds[1:]  # the first step allocates
    return Point(
        layers=len(layers),
        seconds_per_step=statistics.median(seconds),
        low=min(seconds),
        high=max(seconds),
        peak_memory_bytes=memory.bytes,
        memory_kind=memory.kind,
    )


def _step(model: Any, optimizer: Any, batches: list[Batch], device: torch.device) -> float:
    began = time.perf_counter()
    for batch in batches:
        model(**on_device(batch, model)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
