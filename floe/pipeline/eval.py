"""``floe eval``: every arm and the base model on the test rows, the same way; router health."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from floe.artifacts.results import (
    ArmRows,
    Evaluation,
    Interval,
    Outcome,
    Routers,
    RowLosses,
    TaskOutcome,
)
from floe.artifacts.schema import read, write
from floe.data.batches import fingerprint, row_order
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
from floe.storage import hash_of

INTERVALS = "95 %: bootstrap over rows for loss, Wilson for accuracy"


def stages(run: RunInputs) -> Iterator[Stage]:
    """The evaluation."""
    adapters = {arm: identity.of_adapter(run, f"train/{arm}") for arm in train.arms(run)}
    yield Stage(
        "eval",
        inputs(run) | {"arms": adapters},
        partial(build, run, adapters),
        results=("results.json", "losses.json", "router.json", "arms"),
        growing=("arms",),
    )


def inputs(run: RunInputs) -> dict[str, Any]:
    """What decides the figures of every arm, but for its adapter."""
    return identity.of_stage(run, "eval") | {
        "tokenizer": run.model_digests["tokenizer"],
        "test": hash_of([[row.index for row in run.test_rows], run.test_examples]),
        "validation": fingerprint(run.validation_rows),  # of the router statistics
    }


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
    tasks, seed = group_by_task(run.test_rows), run.config.eval.seed
    main = measured["main"][0]
    outcomes = {
        arm: _outcome(losses, answers, main, tasks, seed)
        for arm, (losses, answers) in measured.items()
    }
    write(folder / "results.json", Evaluation(outcomes, INTERVALS, seed))
    nll = {arm: losses.nll.tolist() for arm, (losses, _) in measured.items()}
    numbers = [row.index for row in run.test_rows]
    write(folder / "losses.json", RowLosses(nll, main.tokens.tolist(), numbers))


def _rows_told(run: RunInputs, arm: str, done: int, total: int) -> OnRows:
    """Tells of more and more rows: those of the arm's losses first, then of its answers."""
    answers = done + len(run.test_rows)

    def on_rows(rows: int) -> None:
        nonlocal done
        done += rows
        run.progress.step(
            "eval", done, total, f"{arm}: {'answers' if done > answers else 'losses'}"
        )

    return on_rows


def _measured(
    run: RunInputs, arm: str, digest: str | None, folder: Path, on_rows: OnRows
) -> tuple[Losses, Answers | None]:
    """Losses and answers of the test rows, which both speak of by the same numbers."""
    file = folder / f"arms/{arm}.json"
    if not file.is_file() or read(ArmRows, file).adapter != digest:
        adapter = run.path / f"train/{arm}/adapter"
        with nullcontext(run.base_model) if digest is None else run.adapted(adapter) as model:
            losses, answers = _losses(run, model, on_rows), _answers(run, model, on_rows)
            if arm == "main":
                _write_routers(run, model, folder)
        kept = ArmRows(
            nll=losses.nll.tolist(),
            tokens=losses.tokens.tolist(),
            given=None if answers is None else answers.given,
            correct=None if answers is None else answers.correct.tolist(),
            adapter=digest,
        )
        write(file, kept)
    kept = read(ArmRows, file)
    rows = np.array([row.index for row in run.test_rows], dtype=np.int64)
    losses = Losses(np.array(kept.nll), np.array(kept.tokens, dtype=np.int64), rows)
    if kept.given is None or kept.correct is None:
        return losses, None
    return losses, Answers(kept.given, np.array(kept.correct, dtype=bool), rows)


def _losses(run: RunInputs, model: Any, on_rows: OnRows) -> Losses:
    pad = run.tokenizer.pad_token_id or 0
    return evaluate_rows(model, run.test_rows, run.config.eval.batch_size, pad, on_rows)


def _answers(run: RunInputs, model: Any, on_rows: OnRows) -> Answers | None:
    settings, data, kind = run.config.eval, run.config.data, run.accuracy
    common: dict[str, Any] = {
        "template": data.template, "max_length": data.max_length, "batch_size": settings.batch_size,
        "source": "data.test", "on_rows": on_rows,
    }  # fmt: skip
    if kind == "choices":
        common["score"] = settings.choice_score
        return evaluate_choices(model, run.tokenizer, run.test_examples, **common)
    if kind == "generation":
        common["max_new_tokens"] = settings.max_new_tokens
        return evaluate_generation(model, run.tokenizer, run.test_examples, **common)
    return None


def _write_routers(run: RunInputs, model: Any, folder: Path) -> None:
    rows = [run.validation_rows[i] for i in row_order(run.validation_rows, False)]
    batches = run.batches(rows, run.config.eval.batch_size)
    write(folder / "router.json", Routers(router_statistics(model, batches)))


def _outcome(
    losses: Losses, answers: Answers | None, main: Losses, tasks: dict[str, list[int]], seed: int
) -> Outcome:
    """Over all rows against the main arm's losses, and by task."""

    def accuracy(rows: list[int] | None = None) -> Interval | None:
        return None if answers is None else answers.accuracy(rows)

    by_task = {
        task: TaskOutcome(
            loss=summarise_loss(losses.take(rows), seed=seed), accuracy=accuracy(rows)
        )
        for task, rows in tasks.items()
    }
    return Outcome(
        loss=summarise_loss(losses, seed=seed),
        accuracy=accuracy(),
        loss_minus_main=paired_difference(losses, main, seed=seed),
        by_task=by_task,
    )
