"""``floe run``: every stage in order, each made from what those before it left in the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from floe.adapters.conversion import export_lora
from floe.adapters.folder import check_new
from floe.artifacts.records import DataAccount
from floe.artifacts.results import Evaluation, Interval, Placements, Training
from floe.artifacts.schema import document, read, write
from floe.config import RunConfig
from floe.config_file import dump_config, load_config
from floe.data.rows import sample
from floe.machine import environment
from floe.pipeline import eval, identity, score, search, select, train
from floe.pipeline.check import Account, check
from floe.pipeline.inputs import PARTS, RunInputs
from floe.pipeline.run_folder import RunFolder, Stage
from floe.progress import Progress
from floe.report import build_report
from floe.storage import read_json, write_text

VERBS = {"search": search, "score": score, "select": select, "train": train, "eval": eval}
"""Command -> the module whose ``stages`` it makes, after those of the commands before it.

The report is made anew from the artifacts whenever it is asked for.
"""
RESULTS = {
    "search": "search/result.json",
    "score": "score/scores.npz",
    "select": "select/selection.json",
    "train": "adapter",
    "eval": "eval/results.json",
    "report": "report.html",
}
"""What each command leaves for its user."""


def run(
    config: RunConfig | str | os.PathLike[str],
    *,
    until: str = "report",
    progress: Progress | None = None,
    dry_run: bool = False,
    redo: bool = False,
) -> RunResult:
    """Run the stages up to ``until``.

    Those whose inputs are unchanged are skipped, an unfinished one resumes. Before the first, all
    that any stage will read is checked; see :func:`floe.pipeline.check.check`.

    Args:
        config: a RunConfig, or the path of its YAML file.
        until: "search", "score", "select", "train", "eval" or "report".
        progress: told about stages and steps.
        dry_run: check alone, and write nothing; the result's ``account`` says what was found.
        redo: stages that were made from other settings or data may be made again, in place of what
            is there. Without it they are refused, with what differs.

    Raises:
        CheckError: several problems were found before the first stage.
        ValueError: for a setting the model or the data do not allow.
        FileError, DataError: for files and rows that cannot be used, and for finished or begun work
            that was made from other inputs.
    """
    if until not in RESULTS:
        raise ValueError(f"until must be one of {', '.join(RESULTS)}, got {until!r}")
    if score.worker_count() > 1 and (until != "score" or dry_run):
        asked = f"{until!r} with dry_run" if dry_run else repr(until)
        raise ValueError(
            f"several workers can run the score stage alone, got {asked}: "
            "torchrun --nproc-per-node N -m floe score CONFIG"
        )
    settings = config if isinstance(config, RunConfig) else load_config(config)
    folder = RunFolder(Path(settings.output_dir) / settings.name, read_only=dry_run)
    inputs = RunInputs(settings, folder, progress)
    with score.workers():
        if score.is_helper():
            score.help_score(inputs)
            return RunResult(folder.path, until)
        account = check(inputs)
        for line in account.remarks():
            inputs.progress.say(line)
        verbs = list(RESULTS)[: list(RESULTS).index(until) + 1]
        if dry_run:
            account.stages = _outlook(inputs, verbs, redo)
        else:
            with folder.locked():
                _make(inputs, verbs, account, redo)
    return RunResult(folder.path, until, account)


def _make(run: RunInputs, verbs: Sequence[str], account: Account, redo: bool) -> None:
    """Every stage of the commands, one after the other; then the report, if it is among them."""

    @cache
    def describe() -> None:
        """Settings, rows, machine and versions, once the settings are those of the results."""
        write_text(run.path / "config.yaml", dump_config(run.config))
        parts = {PARTS[part]: facts for part, facts in account.data.items()}
        write(run.path / "data.json", DataAccount(parts))
        model = {"device": str(run.device), "dtype": str(run.dtype)}
        write(run.path / "env.json", environment() | model)

    def announce(stage: str, what: str) -> None:
        if what == "started":  # nothing is refused any more
            describe()
        run.progress.stage(stage, what)

    for _, stage in _stages(run, verbs):
        run.folder.make(stage, announce, lambda names: redo or identity.may_discard(names))
    describe()
    if "report" in verbs:
        run.progress.stage("report", "started")
        build_report(run.path)
        run.progress.stage("report", "finished")


def _outlook(run: RunInputs, verbs: Sequence[str], redo: bool) -> dict[str, str]:
    """What each command would do: nothing ("done"), or in words what; later ones rest on it."""
    outlook = dict.fromkeys(verbs, "to do")
    for verb, stage in _stages(run, verbs) if run.path.is_dir() else ():
        state = run.folder.outlook(stage, lambda names: redo or identity.may_discard(names))
        outlook[verb] = state if stage.name == verb else f"{stage.name}: {state}"
        if state != "done":
            break
        outlook[verb] = "done"
    return outlook


def _stages(run: RunInputs, verbs: Sequence[str]) -> Iterator[tuple[str, Stage]]:
    """The commands' stages, each once those before it are done."""
    for verb in verbs:
        for stage in VERBS[verb].stages(run) if verb in VERBS else ():
            kind = stage.name.partition("/")[0]
            yield verb, replace(stage, notes=identity.notes(run.config, kind))


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, and its artifacts read back."""

    folder: Path
    until: str
    account: Account | None = None  # of what the run works on

    def summary(self) -> dict[str, Any]:
        """The run's results as plain values, for ``--json``."""
        results: dict[str, Any] = {"folder": str(self.folder), "until": self.until}
        for key, verb in (("search", "search"), ("selection", "select"), ("evaluation", "eval")):
            if (self.folder / RESULTS[verb]).is_file():
                results[key] = read_json(self.folder / RESULTS[verb])
        results["training"] = document(self.training())
        if (self.folder / RESULTS["report"]).is_file():
            results["report"] = str(self.folder / RESULTS["report"])
        return results

    def training(self) -> dict[str, Training]:
        """Metrics of every trained arm of the configuration."""
        placed = self.folder / train.PLACEMENTS
        arms = sorted(read(Placements, placed)) if placed.is_file() else []
        files = {arm: self.folder / "train" / arm / "metrics.json" for arm in arms}
        return {arm: read(Training, file) for arm, file in files.items() if file.is_file()}

    def table(self) -> str:
        """One line an arm: layers, loss and accuracy with intervals, size, speed, memory."""
        results = self.folder / RESULTS["eval"]
        if not results.is_file():
            return ""
        return _arms_table(read(Evaluation, results), self.training())

    def outcome(self) -> str:
        """The last line: where the result is."""
        return f"{self.until}: {self.folder / RESULTS[self.until]}"


def _arms_table(evaluation: Evaluation, training: Mapping[str, Training]) -> str:
    """One line an arm; intervals are 95 %."""
    costs = ("trainable", "s/step", "peak memory")
    lines = [("arm", "layers", "loss", "[95 %]", "accuracy", "[95 %]", *costs)]
    for arm in sorted(evaluation.arms, key=lambda arm: (arm != "base", arm != "main", arm)):
        outcome, trained = evaluation.arms[arm], training.get(arm)
        label, layers, cost = arm, "-", ("0", "-", "-")
        if trained:
            label = arm if trained.policy == arm else f"{arm} ({trained.policy})"
            memory = f"{(trained.peak_memory_bytes or 0) / 2**30:.2f} GiB"
            size, layers = f"{trained.trainable_parameters:,}", str(len(trained.layers))
            cost = (size, f"{trained.seconds_per_step:.2f}", memory)
        loss = _figures(outcome.loss, ".4f", ".3f")
        lines.append((label, layers, *loss, *_figures(outcome.accuracy, ".1%", ".1%"), *cost))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))  # type: ignore[arg-type]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def _figures(interval: Interval | None, form: str, form_of_ends: str) -> tuple[str, str]:
    """A value and its interval, or what stands for none."""
    if interval is None:
        return "-", "-"
    ends = [format(end, form_of_ends) for end in interval.ends or ()]
    return format(interval.value, form), "-".join(ends) or "-"


def export_run(config: RunConfig, output: Path, rows: int) -> Any:
    """The finished run's adapter as one plain LoRA, averaged over ``rows`` training rows."""
    check_new(output)  # before the model is loaded
    run = RunInputs(config)
    batches = run.batches(sample(run.train_rows, rows, config.train.seed), config.eval.batch_size)
    with run.adapted(run.path / "adapter") as model:
        return export_lora(model, output, batches)
