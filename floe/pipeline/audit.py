"""``floe audit``: what a finished selection rests on, from the run folder's artifacts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from floe.artifacts.records import FORMAT, StageRecord
from floe.artifacts.results import Router, Routers, RowLosses, Training
from floe.artifacts.schema import read, write
from floe.artifacts.selection import Selection
from floe.config import RunConfig
from floe.data.rows import sample
from floe.errors import FileError
from floe.evaluation import router_statistics
from floe.importance.layer_statistics import measure_statistics
from floe.importance.scores import LayerStatistics, Scores
from floe.pipeline import identity
from floe.pipeline.inputs import RunInputs
from floe.pipeline.run_folder import Stage
from floe.progress import Progress
from floe.selection.audit import Audit, audit
from floe.selection.policies import POLICIES
from floe.types import Batch

ROWS = 32


@dataclass(frozen=True)
class AuditResult:
    """A finished audit and its file."""

    path: Path
    audit: Audit

    def text(self) -> str:
        """The verdicts, one a line, and the path."""
        lines = [f"{kind:<5}  {sentence}" for kind, sentence in self.audit.sentences]
        return "\n".join([*lines, f"audit: {self.path}"])


def audit_run(
    config: RunConfig,
    *,
    statistics: str = "cheap",
    rows: int = ROWS,
    bootstrap: int = 200,
    progress: Progress | None = None,
) -> AuditResult:
    """Audit a run whose select stage is finished; writes ``audit/audit.json`` in its folder.

    Statistics and router health are measured on the warm-up model and kept in the folder: an
    interrupted audit continues, a second one measures only what is new. The rest is computed anew.

    Args:
        config: of the run, as it was selected.
        statistics: "cheap" (see Policy.cheap), "all", "none", or names of policies joined by
            commas. What a model does not give is an error for a policy that was named, and told as
            lacking otherwise. With "none" no model is loaded and routers are not measured.
        rows: calibration rows for the statistics and the routers.
        bootstrap: draws.
        progress: told about parts and steps.

    Raises:
        FileError: a stage is missing or was made with other settings; says which command makes it.
        ValueError: an unknown policy, a number out of range.
    """
    names = policies_named(statistics)
    for name, value in (("rows", rows), ("bootstrap", bootstrap)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    run = RunInputs(config, progress=progress)
    selection = _finished_selection(run)
    policy = selection.policy
    if names and POLICIES[policy].statistics:
        names = tuple(dict.fromkeys((*names, policy)))
    strict, count = statistics not in ("cheap", "all"), len(selection.layers)
    with run.folder.locked():
        measured, failed = _statistics(run, names, rows, count, strict)
        router = _routers(run, rows) if names else []
        run.progress.stage("audit", "started")
        result = audit(
            Scores.load(run.path / "score/scores.npz"),
            layers=count,
            policy=f"masks/{selection.preset}" if policy == "masks" else policy,
            statistics=measured,
            router=router,
            trained_router=trained_routers(run.path),
            losses=arm_losses(run.path),
            budget=selection.budget,
            score=selection.score,
            seed=selection.seed,
            bootstrap=bootstrap,
            progress=partial(run.progress.step, "audit"),
        )
        done = read(StageRecord, run.path / "select/DONE.json")
        result = replace(result, selection=done.inputs_hash, lacking=result.lacking | failed)
        (run.path / "audit").mkdir(exist_ok=True)
        result.save(run.path / "audit/audit.json")
        run.progress.stage("audit", "finished")
    return AuditResult(run.path / "audit/audit.json", result)


def policies_named(text: str) -> tuple[str, ...]:
    """Names of policies for "cheap", "all", "none" or names joined by commas.

    Raises:
        ValueError: a name that is no policy, or one that needs no statistics.
    """
    known = [name for name, policy in POLICIES.items() if policy.statistics]
    cheap = tuple(name for name in known if POLICIES[name].cheap)
    fixed = {"cheap": cheap, "all": tuple(known), "none": ()}
    if text in fixed:
        return fixed[text]
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"statistics must be cheap, all, none or policies of {sorted(known)}, got {unknown}"
        )
    return names


def _finished_selection(run: RunInputs) -> Selection:
    """The selection, if an audit can be made of it, and the stages are done with these settings."""
    for stage in ("search", "score", "select"):
        done = run.folder.done(stage)
        command = f"run: floe {stage} CONFIG"
        if done is None:
            raise FileError(run.path / stage, f"the {stage} stage is not finished; {command}")
        if stage == "search":
            continue
        made_with = {**done.inputs, **done.notes}
        wanted = identity.values(run.config, stage) | identity.notes(run.config, stage)
        names = {n for n in wanted.keys() & made_with.keys() if n.startswith(f"{stage}.")}
        if done.format != FORMAT or any(made_with[n] != wanted[n] for n in names):
            raise FileError(
                run.path / stage, f"was made with other settings than the config's; {command}"
            )
    selection = Selection.load(run.path / "select")
    if selection.pick != "top":
        raise ValueError(
            f"an audit is about the layers of highest score, got select.pick {selection.pick!r}"
        )
    if selection.policy == "all":
        raise ValueError("an audit needs a policy that leaves layers out, got select.policy 'all'")
    return selection


def trained_routers(run: Path) -> list[Router]:
    """Router statistics of the run's final adapter, from the eval stage; empty without it."""
    file = run / "eval/router.json"
    return read(Routers, file).modules if file.is_file() else []


def arm_losses(run: Path) -> dict[int, Any] | None:
    """Number of whole layers -> per-row test losses of the run's policy, and of all layers.

    Each row's summed loss over the mean number of target tokens, so that the mean over rows is the
    loss per token that the evaluation reports. None without losses of several numbers of layers.
    """
    file = run / "eval/losses.json"
    if not file.is_file():
        return None
    losses = read(RowLosses, file)
    arms = {path.parent.name: read(Training, path) for path in run.glob("train/*/metrics.json")}
    policies = ("all", arms["main"].policy) if "main" in arms else ("all",)
    tokens = np.asarray(losses.tokens, dtype=np.float64)
    by_count = {
        len(trained.layers): np.asarray(losses.nll[arm]) / tokens.mean()
        for arm, trained in sorted(arms.items(), key=lambda item: item[0] == "main")
        if trained.policy in policies and arm in losses.nll
        if not trained.modules and not trained.sizes
    }
    return by_count if len(by_count) > 1 else None


def _statistics(
    run: RunInputs, names: Sequence[str], rows: int, count: int, strict: bool
) -> tuple[LayerStatistics | None, dict[str, str]]:
    """The statistics that the policies ``names`` need, those of one measurement at a time.

    Some models lack what a statistic looks at (unquantised weights, say): without ``strict`` its
    policies are named with the reason, else that is the ValueError it was. Forward selection goes
    as far as ``count``, the number of chosen layers.
    """
    parts: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        parts.setdefault(POLICIES[name].statistics, []).append(name)
    measured: list[LayerStatistics] = []
    failed: dict[str, str] = {}
    for policy, *others in parts.values():
        part = f"audit/{policy}"
        options = {
            "seed": run.config.select.seed,
            "rank": run.size[0],
            "steps": count,
            "progress": partial(run.progress.step, part),
        }

        def build(folder: Path, policy: str = policy, options: Any = options) -> None:
            with _warm_up(run, rows) as (model, batches):
                values = measure_statistics(model, batches, [policy], **options)
            values.save(folder / "statistics.npz")

        more = {"steps": count} if policy == "forward_selection" else {}
        try:
            _make(run, part, rows, build, more)
        except ValueError as error:
            if strict:
                raise
            reason = f"a statistic this model does not give: {error}"
            failed |= dict.fromkeys((policy, *others), reason)
        else:
            measured.append(LayerStatistics.load(run.path / part / "statistics.npz"))
    values = {name: array for part in measured for name, array in part.values.items()}
    return LayerStatistics(measured[0].layers, values) if measured else None, failed


def _routers(run: RunInputs, rows: int) -> list[Router]:
    """Router statistics of the warm-up adapter."""

    def build(folder: Path) -> None:
        with _warm_up(run, rows) as (model, batches):
            write(folder / "routers.json", Routers(router_statistics(model, batches)))

    _make(run, "audit/routers", rows, build)
    return read(Routers, run.path / "audit/routers/routers.json").modules


def _make(
    run: RunInputs,
    part: str,
    rows: int,
    build: Callable[[Path], None],
    more: Mapping[str, Any] | None = None,
) -> None:
    """A measurement of the audit, unless it is there."""
    inputs = {
        "adapter": identity.of_adapter(run, "search"),
        "rows": rows,
        "seed": run.config.select.seed,
        "calibration": read(StageRecord, run.path / "score/DONE.json").inputs["rows"],
        "name": part,
        **(more or {}),
    }
    run.folder.make(Stage(part, inputs, build, disposable=True), run.progress.stage)


@contextmanager
def _warm_up(run: RunInputs, rows: int) -> Iterator[tuple[Any, list[Batch]]]:
    """The warm-up model, and the rows that the audit measures on."""
    settings = run.config.score
    chosen = sample(run.calibration_rows, rows, settings.seed)
    with run.adapted(run.path / "search/adapter") as model:
        yield model, run.batches(chosen, settings.batch_size)
