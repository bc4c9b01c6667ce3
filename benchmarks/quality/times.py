"""Step times of `benchmarks.quality`: every set of layers its runs chose, in turn, in one run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness, models
from benchmarks.harness import Candidate, Row
from benchmarks.quality.report import read
from benchmarks.quality.runs import Study
from floe.adapters import get_model
from floe.artifacts.schema import document, parse
from floe.data.batches import Collator
from floe.pipeline.inputs import RunInputs
from floe.selection.placement import Placement
from floe.storage import write_json
from floe.training.schedule import training_order
from floe.training.train import adapter_parameters, step_loss

BATCHES = 5


def measure(study: Study, rounds: int, clock_name: str, clock: Callable[[], float]) -> None:
    """Write ``times.json``: the median seconds of a training step, by mix and placement.

    A step is forward, backward, clipping and AdamW, on the same batches for all sets of a mix.
    """
    runs = read(study.folder).runs
    if not runs:
        raise ValueError("the folder must hold at least one run to time, got none")
    rows: list[Row] = []
    for mix in sorted({run["mix"] for run in runs}):
        same = [run for run in runs if run["mix"] == mix]
        work = study.work(mix, min(run["seed"] for run in same))
        placed = (parse(Placement, run, study.folder) for run in same)
        places = {str(place): place for place in placed}
        steps = [Candidate(name, _step(study, work, place), list) for name, place in places.items()]
        seconds, _ = harness.measure(steps, rounds=rounds, device=torch.device("cpu"), clock=clock)
        rows += [
            {"mix": mix, **document(place), "seconds": harness.summary(seconds[name])}
            for name, place in places.items()
        ]
    facts = {"clock": clock_name, "environment": study.environment}
    write_json(study.folder / "times.json", {"format": 1, "rows": rows, **facts})


def _step(study: Study, work: RunInputs, place: Placement) -> Callable[[], None]:
    """One training step of adapters placed so, called again and again."""
    s = study.settings
    config = work.adapter_config(s.r, s.num_experts, place)
    model: Any = get_model(models.share(work.base_model), config).train()
    parameters = list(adapter_parameters(model).values())
    settings = study.steps(work, BATCHES, s.rates[0])
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    order = training_order([len(row) for row in work.train_rows], settings)
    collate, chosen = Collator.for_model(model), [work.train_rows[i] for i in order]
    batches = itertools.cycle(
        [collate(chosen[i : i + s.batch_size]) for i in range(0, len(chosen), s.batch_size)]
    )

    def step() -> None:
        batch = dict(next(batches))
        labels = batch.pop("labels")
        loss = step_loss(model(**batch), labels, int((labels[:, 1:] != -100).sum()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()

    return step
