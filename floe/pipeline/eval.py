"""``floe eval``: every arm and the base model on the test rows, the same way; what a step costs.

The profile is step time and peak memory against the number of adapted layers (paper Fig. 1b).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from floe.adapters import remove_adapters
from floe.artifacts.results import (
    ArmRows,
    Evaluation,
    Outcome,
    Point,
    Profile,
    Routers,
    RowLosses,
    TaskOutcome,
)
from floe.artifacts.schema import read, write
from floe.data.batches import TokenRow, fingerprint
from floe.data.loss import on_device
from floe.decoder_blocks import find_blocks
from floe.evaluation import (
    Answers,
    Losses,
    OnRows,
    evaluate_choices,
    evaluate_generation,
    evaluate_rows,
    group_by_task,
    paired_difference,
    router_statistics,
    summarise_loss,
)
from floe.pipeline import identity, train
from floe.pipeline.inputs import RunInputs
from floe.pipeline.run_folder import Stage
from floe.selection.placement import Placement
from floe.storage import hash_of
from floe.training.memory import PeakMemory
from floe.types import Batch

INTERVALS = "95 %: bootstrap over rows for loss, Wilson for accuracy"


def stages(run: RunInputs) -> Iterator[Stage]:
    """The profile, unless it is switched off; the evaluation."""
    if run.config.profile.steps > 0:
        rank, experts = run.size
        sizes = {"rank": rank, "num_experts": experts, "rows": fingerprint(_rows_of_a_step(run))}
        inputs = identity.of_stage(run, "profile") | sizes  # another machine is no reason
        yield Stage("profile", inputs, partial(build_profile, run), results=("profile.json",))
    adapters = {arm: identity.of_adapter(run, f"train/{arm}") for arm in train.arms(run)}
    inputs = identity.of_stage(run, "eval") | {
        "tokenizer": run.model_digests["tokenizer"],
        "test": hash_of([[row.index for row in run.test_rows], run.test_examples]),
        "validation": fingerprint(run.validation_rows),  # of the router statistics
        "arms": adapters,
    }
    yield Stage(
        "eval",
        inputs,
        partial(build, run, adapters),
        results=("results.json", "losses.json", "router.json", "arms"),
        growing=("arms",),
    )


def build(run: RunInputs, adapters: dict[str, str], folder: Path) -> None:
    """Write ``results.json``, ``losses.json`` (by row), ``router.json`` and ``arms/``.

    What ``arms/`` has of an adapter of the same digest, from before an interruption or from when
    there were fewer arms, is not measured again.
    """
    (folder / "arms").mkdir(exist_ok=True)
    digests: dict[str, str | None] = {"base": None, **adapters}
    each = len(run.test_rows) + (0 if run.accuracy == "none" else len(run.answer_rows))
    measured = {}
    for place, (arm, digest) in enumerate(digests.items()):
        on_rows = _rows_told(run, arm, place * each, len(digests) * each)
        measured[arm] = _measured(run, arm, digest, folder, on_rows)
    main, seed = measured["main"][0], run.config.eval.seed
    tasks = group_by_task(run.test_rows)
    arms = {
        arm: Outcome(
            loss=summarise_loss(losses, seed=seed),
            accuracy=None if answers is None else answers.accuracy(),
            loss_minus_main=paired_difference(losses, main, seed=seed),
            by_task={
                task: TaskOutcome(
                    loss=summarise_loss(losses.take(rows), seed=seed),
                    accuracy=None if answers is None else answers.accuracy(rows),
                )
                for task, rows in tasks.items()
            },
        )
        for arm, (losses, answers) in measured.items()
    }
    write(folder / "results.json", Evaluation(arms, INTERVALS, seed))
    nll = {arm: losses.nll.tolist() for arm, (losses, _) in measured.items()}
    numbers = [row.index for row in run.test_rows]
    write(folder / "losses.json", RowLosses(nll, main.tokens.tolist(), numbers))


def _rows_told(run: RunInputs, arm: str, done: int, total: int) -> OnRows:
    """Tells of more and more rows: those of the arm's losses first, then of its answers."""
    answers = done + len(run.test_rows)

    def on_rows(rows: int) -> None:
        nonlocal done
        done += rows
        what = "answers" if done > answers else "losses"
        run.progress.step("eval", done, total, f"{arm}: {what}")

    return on_rows


def _measured(
    run: RunInputs, arm: str, digest: str | None, folder: Path, on_rows: OnRows
) -> tuple[Losses, Answers | None]:
    """Losses and answers of the test rows, which both speak of by the same numbers."""
    file = folder / f"arms/{arm}.json"
    if not file.is_file() or read(ArmRows, file).adapter != digest:
        adapter = run.path / f"train/{arm}/adapter"
        size, pad = run.config.eval.batch_size, run.tokenizer.pad_token_id or 0
        with nullcontext(run.base_model) if digest is None else run.adapted(adapter) as model:
            losses = evaluate_rows(model, run.test_rows, size, pad, on_rows)
            answers = _answers(run, model, on_rows)
            if arm == "main":
                modules = router_statistics(model, run.batches(run.validation_rows, size))
                write(folder / "router.json", Routers(modules))
        kept = ArmRows(
            nll=losses.nll.tolist(),
            tokens=losses.tokens.tolist(),
            given=None if answers is None else answers.given,
            correct=None if answers is None else answers.correct.tolist(),
            adapter=digest,
        )
        write(file, kept)
    kept = read(ArmRows, file)
    numbers = np.array([row.index for row in run.test_rows], dtype=np.int64)
    losses = Losses(np.array(kept.nll), np.array(kept.tokens, dtype=np.int64), numbers)
    if kept.given is None or kept.correct is None:
        return losses, None
    return losses, Answers(kept.given, np.array(kept.correct, dtype=bool), numbers)


def _answers(run: RunInputs, model: Any, on_rows: OnRows) -> Answers | None:
    settings, data, kind = run.config.eval, run.config.data, run.accuracy
    common: dict[str, Any] = {
        "template": data.template,
        "max_length": data.max_length,
        "batch_size": settings.batch_size,
        "source": "data.test",
        "on_rows": on_rows,
    }
    if kind == "choices":
        common["score"] = settings.choice_score
        return evaluate_choices(model, run.tokenizer, run.test_examples, **common)
    if kind == "generation":
        common["max_new_tokens"] = settings.max_new_tokens
        return evaluate_generation(model, run.tokenizer, run.test_examples, **common)
    return None


def build_profile(run: RunInputs, folder: Path) -> None:
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
    """Steps with these layers adapted, timed; the first, which allocates, is not counted."""
    model, seconds = run.fresh(*run.size, Placement(tuple(layers))), []
    try:
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        with PeakMemory(run.device) as memory:
            for _ in range(run.config.profile.steps + 1):
                began = time.perf_counter()
                for batch in batches:
                    model(**on_device(batch, model)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if run.device.type == "cuda":
                    torch.cuda.synchronize(run.device)
                seconds.append(time.perf_counter() - began)
    finally:
        remove_adapters(model)
    return Point(
        layers=len(layers),
        seconds_per_step=statistics.median(seconds[1:]),
        low=min(seconds[1:]),
        high=max(seconds[1:]),
        peak_memory_bytes=memory.bytes,
        memory_kind=memory.kind,
    )
