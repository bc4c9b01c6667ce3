"""``floe audit``: what a finished selection rests on, from the run folder's artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from floe.config import RunConfig
from floe.errors import FileError
from floe.importance.scores import Scores
from floe.importance.statistics import LayerStatistics
from floe.pipeline import identity as deciding
from floe.pipeline.run_folder import FORMAT, RunFolder
from floe.progress import Progress
from floe.selection.artifact import Selection
from floe.selection.audit import Audit, audit
from floe.selection.policies import POLICIES
from floe.storage import read_json

if TYPE_CHECKING:
    from floe.pipeline.inputs import Workspace

STAGES = ("search", "score", "select")
ROWS = 32


@dataclass(frozen=True)
class AuditResult:
    """A finished audit and its file."""

    path: Path
    audit: Audit

    def text(self) -> str:
        """The verdicts, one a line, and the path."""
        marks = {"solid": "solid", "open": "open ", "note": "note "}
        lines = [
            f"{marks[kind]}  {sentence}"
            for kind, sentences in self.audit.verdicts.items()
            for sentence in sentences
        ]
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
    names = statistics_of(statistics)
    for name, value in (("rows", rows), ("bootstrap", bootstrap)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    folder = RunFolder(Path(config.output_dir) / config.name)
    check_stages(config, folder)
    progress = progress or Progress()
    selection = Selection.load(folder.path / "select")
    if selection.pick != "top":
        raise ValueError(
            f"an audit is about the layers of highest score, got select.pick {selection.pick!r}"
        )
    if selection.policy == "all":
        raise ValueError("an audit needs a policy that leaves layers out, got select.policy 'all'")
    if names and POLICIES[selection.policy].statistics:
        names = tuple(dict.fromkeys((*names, selection.policy)))
    with folder.locked():
        measured = _Measurements(config, folder, rows, len(selection.layers), progress)
        found, failed = measured.statistics(names, strict=statistics not in ("cheap", "all"))
        router = measured.routers() if names else []
        progress.stage("audit", "started")
        result = _audit(folder.path, selection, found, router, bootstrap, progress)
        done = read_json(folder.path / "select/DONE.json")
        lacking = result.lacking | failed
        result = replace(result, selection=done["inputs_hash"], lacking=lacking)
        (folder.path / "audit").mkdir(exist_ok=True)
        result.save(folder.path / "audit/audit.json")
        progress.stage("audit", "finished")
    return AuditResult(folder.path / "audit/audit.json", result)


def statistics_of(text: str) -> tuple[str, ...]:
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


def check_stages(config: RunConfig, folder: RunFolder) -> None:
    """Raises FileError unless the stages up to select are done with ``config``'s settings."""
    for stage in STAGES:
        done = folder.done(stage)
        command = f"run: floe {stage} CONFIG"
        if done is None:
            raise FileError(folder.path / stage, f"the {stage} stage is not finished; {command}")
        if stage == "search":
            continue
        made_with = done.get("inputs", {}) | done.get("notes", {})
        wanted = deciding.values(config, stage) | deciding.notes(config, stage)
        own = {name for name in wanted.keys() & made_with.keys() if name.startswith(f"{stage}.")}
        if done.get("format") != FORMAT or any(made_with[n] != wanted[n] for n in own):
            raise FileError(
                folder.path / stage, f"was made with other settings than the config's; {command}"
            )


def _audit(
    run: Path,
    selection: Selection,
    statistics: LayerStatistics | None,
    router: list[dict[str, Any]],
    bootstrap: int,
    progress: Progress,
) -> Audit:
    policy = selection.policy
    return audit(
        Scores.load(run / "score/scores.npz"),
        layers=len(selection.layers),
        policy=f"masks/{selection.preset}" if policy == "masks" else policy,
        statistics=statistics,
        router=router,
        trained_router=trained_routers(run),
        losses=arm_losses(run),
        budget=selection.budget,
        score=selection.score,
        seed=selection.seed,
        bootstrap=bootstrap,
        progress=partial(progress.step, "audit"),
    )


def trained_routers(run: Path) -> list[dict[str, Any]]:
    """Router statistics of the run's final adapter, from the eval stage; empty without it."""
    file = run / "eval/router.json"
    return list(read_json(file)["modules"]) if file.is_file() else []


def arm_losses(run: Path) -> dict[int, Any] | None:
    """Number of whole layers -> per-row test losses of the run's policy, and of all layers.

    Each row's summed loss over the mean number of target tokens, so that the mean over rows is the
    loss per token that the evaluation reports. None without losses of several numbers of layers.
    """
    file = run / "eval/losses.json"
    if not file.is_file():
        return None
    losses = read_json(file)
    arms = {path.parent.name: read_json(path) for path in run.glob("train/*/metrics.json")}
    own = arms.get("main", {}).get("policy")
    tokens = np.asarray(losses["tokens"], dtype=np.float64)
    found = {
        len(metrics["layers"]): np.asarray(losses["nll"][arm]) / tokens.mean()
        for arm, metrics in sorted(arms.items(), key=lambda item: item[0] == "main")
        if metrics["policy"] in (own, "all") and arm in losses["nll"]
        if not {"modules", "sizes"} & metrics.keys()
    }
    return found if len(found) > 1 else None


class _Measurements:
    """What the audit measures on the warm-up model; kept under ``audit/``, each part once.

    ``count``: the number of chosen layers; forward selection goes no further.
    """

    def __init__(
        self, config: RunConfig, folder: RunFolder, rows: int, count: int, progress: Progress
    ) -> None:
        from floe.pipeline.inputs import Workspace

        self.folder, self.progress, self.rows, self.count = folder, progress, rows, count
        self.work: Workspace = Workspace(config)
        self.seed = config.select.seed
        self.rank = int(read_json(folder.path / "search/result.json")["rank"])

    def statistics(
        self, names: Sequence[str], strict: bool
    ) -> tuple[LayerStatistics | None, dict[str, str]]:
        """The statistics that the policies ``names`` need, those of one measurement at a time.

        Some models lack what a statistic looks at (unquantised weights, say): without ``strict``
        its policies are named with the reason, else that is the ValueError it was.
        """
        parts: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            parts.setdefault(POLICIES[name].statistics, []).append(name)
        values: dict[str, Any] = {}
        failed: dict[str, str] = {}
        layers = 0
        for policies in parts.values():
            part = f"audit/{policies[0]}"
            try:
                self._part(part, partial(self._measure, policies[0], part))
            except ValueError as error:
                if strict:
                    raise
                failed |= dict.fromkeys(policies, f"a statistic this model does not give: {error}")
                continue
            found = LayerStatistics.load(self.folder.path / part / "statistics.npz")
            values |= dict(found.values)
            layers = found.layers
        return LayerStatistics(layers, values) if values else None, failed

    def routers(self) -> list[dict[str, Any]]:
        """Router statistics of the warm-up adapter."""
        self._part("audit/routers", self._measure_routers)
        found: list[dict[str, Any]] = read_json(self.folder.path / "audit/routers/routers.json")[
            "modules"
        ]
        return found

    def _part(self, name: str, build: Any) -> None:
        adapter = self.folder.path / "search/adapter"
        inputs: dict[str, Any] = {"adapter": deciding.adapter_digest(adapter, self.folder.digest)}
        inputs |= {"rows": self.rows, "seed": self.seed}
        score = read_json(self.folder.path / "score/DONE.json")["inputs"]
        inputs |= {"calibration": score["rows"], "name": name}
        if name == "audit/forward_selection":
            inputs["steps"] = self.count
        tell = self.progress.stage
        self.folder.stage(name, inputs, build, tell, may_discard=lambda changed: True)

    def _measure(self, policy: str, part: str, folder: Path) -> None:
        from floe.importance.layer_statistics import measure_statistics

        progress = partial(self.progress.step, part)
        measured = self._on_model(
            lambda model, batches: measure_statistics(
                model,
                batches,
                [policy],
                seed=self.seed,
                rank=self.rank,
                steps=self.count,
                progress=progress,
            )
        )
        measured.save(folder / "statistics.npz")

    def _measure_routers(self, folder: Path) -> None:
        from floe.evaluation.routers import router_statistics
        from floe.pipeline.inputs import plain
        from floe.storage import write_json

        found = self._on_model(router_statistics)
        write_json(folder / "routers.json", {"modules": plain(found)})

    def _on_model(self, measure: Any) -> Any:
        from floe.data.rows import sample

        settings = self.work.config.score
        rows = sample(self.work.calibration_rows, self.rows, settings.seed)
        with self.work.adapted(self.folder.path / "search/adapter") as model:
            return measure(model, self.work.batches(rows, settings.batch_size))
