"""The eval stage: every arm on the test rows, the same way."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from floe.data.batches import row_order
from floe.evaluation.evaluate import (
    Answers,
    Losses,
    evaluate_choices,
    evaluate_generation,
    evaluate_rows,
    group_by_task,
    paired_difference,
    summarise_loss,
)
from floe.evaluation.routers import router_statistics
from floe.pipeline.inputs import Workspace, plain
from floe.storage import read_json, write_json

INTERVALS = "95 %: bootstrap over rows for loss, Wilson for accuracy"


def build(
    work: Workspace, adapters: dict[str, Path], digests: dict[str, str], folder: Path, progress: Any
) -> None:
    """Write ``results.json``, ``losses.json`` (by row), ``router.json`` and ``arms/``.

    What ``arms/`` has of an adapter of the same digest, from before an interruption or from when
    there were fewer arms, is not measured again.
    """
    (folder / "arms").mkdir(exist_ok=True)
    arms = ["base", *adapters]
    measured: dict[str, tuple[Losses, Answers | None]] = {}
    for done, arm in enumerate(arms):
        progress(done, len(arms), arm)
        measured[arm] = _measure_arm(work, arm, adapters.get(arm), digests.get(arm), folder)
    tasks = group_by_task(work.test_rows)
    results = {arm: _results(*measured[arm], tasks, work.config.eval.seed) for arm in arms}
    for arm in arms:
        gap = paired_difference(measured[arm][0], measured["main"][0], seed=work.config.eval.seed)
        results[arm]["loss_minus_main"] = plain(gap)
    write_json(
        folder / "results.json",
        {"arms": results, "intervals": INTERVALS, "seed": work.config.eval.seed},
    )
    write_json(
        folder / "losses.json",
        {
            "nll": {arm: losses.nll.tolist() for arm, (losses, _) in measured.items()},
            "tokens": measured["main"][0].tokens.tolist(),
            "rows": [row.index for row in work.test_rows],
        },
    )
    progress(len(arms), len(arms), "done")


def _measure_arm(
    work: Workspace, arm: str, adapter: Path | None, digest: str | None, folder: Path
) -> tuple[Losses, Answers | None]:
    part = folder / f"arms/{arm}.json"
    if not part.is_file() or read_json(part)["adapter"] != digest:
        with nullcontext(work.base_model) if adapter is None else work.adapted(adapter) as model:
            losses, answers = _losses(work, model), _answers(work, model)
            if arm == "main":
                _write_routers(work, model, folder)
        write_json(part, _pack(losses, answers) | {"adapter": digest})
    return _unpack(read_json(part), [row.index for row in work.test_rows])


def _losses(work: Workspace, model: Any) -> Losses:
    return evaluate_rows(
        model, work.test_rows, work.config.eval.batch_size, work.tokenizer.pad_token_id or 0
    )


def _answers(work: Workspace, model: Any) -> Answers | None:
    settings, data, kind = work.config.eval, work.config.data, work.accuracy
    common: dict[str, Any] = {
        "template": data.template, "max_length": data.max_length, "batch_size": settings.batch_size,
        "source": "data.test",
    }  # fmt: skip
    if kind == "choices":
        return evaluate_choices(
            model, work.tokenizer, work.test_examples, score=settings.choice_score, **common
        )
    if kind == "generation":
        return evaluate_generation(
            model,
            work.tokenizer,
            work.test_examples,
            max_new_tokens=settings.max_new_tokens,
            **common,
        )
    return None


def _write_routers(work: Workspace, model: Any, folder: Path) -> None:
    rows = [work.validation_rows[i] for i in row_order(work.validation_rows, False)]
    batches = work.batches(rows, work.config.eval.batch_size)
    write_json(folder / "router.json", {"modules": plain(router_statistics(model, batches))})


def _results(
    losses: Losses, answers: Answers | None, tasks: dict[str, list[int]], seed: int
) -> dict[str, Any]:
    found: dict[str, Any] = {"loss": plain(summarise_loss(losses, seed=seed)), "by_task": {}}
    if answers is not None:
        found["accuracy"] = plain(answers.accuracy())
    for task, rows in tasks.items():
        here: dict[str, Any] = {"loss": plain(summarise_loss(losses.take(rows), seed=seed))}
        if answers is not None:
            here["accuracy"] = plain(answers.accuracy(rows))
        found["by_task"][task] = here
    return found


def _pack(losses: Losses, answers: Answers | None) -> dict[str, Any]:
    packed: dict[str, Any] = {"nll": losses.nll.tolist(), "tokens": losses.tokens.tolist()}
    if answers is not None:
        packed |= {"given": answers.given, "correct": answers.correct.tolist()}
    return packed


def _unpack(packed: dict[str, Any], numbers: list[int]) -> tuple[Losses, Answers | None]:
    """Losses and answers of the test rows, which both speak of by the same numbers."""
    rows = np.array(numbers, dtype=np.int64)
    losses = Losses(np.array(packed["nll"]), np.array(packed["tokens"], dtype=np.int64), rows)
    if "given" not in packed:
        return losses, None
    return losses, Answers(packed["given"], np.array(packed["correct"], dtype=bool), rows)
