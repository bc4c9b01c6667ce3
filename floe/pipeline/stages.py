"""A run from its configuration to its report: the stages, what each reads, and what it writes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from floe.atomic import copy_folder, write_json, write_text
from floe.config import Baseline, RunConfig, Schedule, dump_config, load_config
from floe.progress import Progress
from floe.runs import RunFolder, environment, read_json
from floe.selection.placement import Placement

if TYPE_CHECKING:
    from floe.pipeline.check import Account

STAGES = ("search", "score", "select", "train", "eval", "report")
Announce = Callable[[int, int, str], None]


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, and its artifacts read back."""

    folder: Path
    until: str
    account: Account | None = None  # of what the run works on

    def summary(self) -> dict[str, Any]:
        """The run's results as plain values, for ``--json``."""
        found: dict[str, Any] = {"folder": str(self.folder), "until": self.until}
        for key, file in (
            ("search", "search/result.json"),
            ("selection", "select/selection.json"),
            ("evaluation", "eval/results.json"),
        ):
            if (self.folder / file).is_file():
                found[key] = read_json(self.folder / file)
        found["training"] = self.training()
        if (self.folder / "report.html").is_file():
            found["report"] = str(self.folder / "report.html")
        return found

    def training(self) -> dict[str, Any]:
        """Metrics of every trained arm."""
        files = sorted(self.folder.glob("train/*/metrics.json"))
        return {file.parent.name: read_json(file) for file in files}

    def table(self) -> str:
        """One line an arm: layers, loss and accuracy with intervals, size, speed, memory."""
        from floe.pipeline.summary import arms_table

        results = self.folder / "eval/results.json"
        return arms_table(read_json(results), self.training()) if results.is_file() else ""

    def outcome(self) -> str:
        """The last line: where the result is."""
        places = {"report": "report.html", "eval": "eval/results.json", "train": "adapter",
                  "select": "select/selection.json", "score": "score/scores.npz",
                  "search": "search/result.json"}  # fmt: skip
        return f"{self.until}: {self.folder / places[self.until]}"


def run(
    config: RunConfig | str | os.PathLike[str],
    *,
    until: str = "report",
    progress: Progress | None = None,
    dry_run: bool = False,
) -> RunResult:
    """Run the stages up to ``until``.

    Those whose inputs are unchanged are skipped, an unfinished one resumes. Before the first, all
    that any stage will read is checked; see :func:`floe.pipeline.check.check`.

    Args:
        config: a RunConfig, or the path of its YAML file.
        until: "search", "score", "select", "train", "eval" or "report".
        progress: told about stages and steps.
        dry_run: check alone, and write nothing; the result's ``account`` says what was found.

    Raises:
        CheckError: several problems were found before the first stage.
        ValueError: for a setting the model or the data do not allow.
        FileError, DataError: for files and rows that cannot be used.
    """
    if until not in STAGES:
        raise ValueError(f"until must be one of {', '.join(STAGES)}, got {until!r}")
    settings = config if isinstance(config, RunConfig) else load_config(config)
    folder = RunFolder(Path(settings.output_dir) / settings.name)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _score_together(settings, folder, until, progress or Progress())
    stages, account = _checked(settings, folder, progress or Progress())
    if dry_run:
        return RunResult(folder.path, until, account)
    with folder.locked():
        stages.open(account)
        for name in STAGES[: STAGES.index(until) + 1]:
            getattr(stages, name)()
    return RunResult(folder.path, until, account)


def _checked(settings: RunConfig, folder: RunFolder, progress: Progress) -> tuple[_Stages, Account]:
    """The stages, and what a look at all that they will read has found."""
    from floe.pipeline.check import check

    stages = _Stages(settings, folder, progress)
    return stages, check(stages.work)


def _score_together(
    settings: RunConfig, folder: RunFolder, until: str, progress: Progress
) -> RunResult:
    """The score stage by all workers that torchrun started; worker 0 owns the run folder."""
    from floe.pipeline import scoring

    if until != "score":
        raise ValueError(
            f"several workers can run the score stage alone, got {until!r}: "
            "torchrun --nproc-per-node N -m floe score CONFIG"
        )
    with scoring.workers():
        if scoring.is_helper():
            _Stages(settings, folder, Progress()).score()
            return RunResult(folder.path, until)
        stages, account = _checked(settings, folder, progress)
        with folder.locked():
            stages.open(account)
            stages.search(together=True)
            stages.score()
    return RunResult(folder.path, until)


class _Stages:
    """Each method is one stage: its inputs' hash, and the work when that has changed."""

    def __init__(self, config: RunConfig, folder: RunFolder, progress: Progress) -> None:
        from floe.pipeline.workspace import Workspace

        self.config, self.folder, self.progress = config, folder, progress
        self.work = Workspace(config)
        self.path = folder.path
        self.hashes: dict[str, str] = {}

    def open(self, account: Account) -> None:
        """Write what describes the run: settings, rows, machine and versions."""
        write_text(self.path / "config.yaml", dump_config(self.config))
        account.write(self.path / "data.json")
        for line in account.remarks():
            self.progress.say(line)
        device, dtype = str(self.work.device), str(self.work.dtype)
        write_json(self.path / "env.json", environment() | {"device": device, "dtype": dtype})

    def _stage(self, name: str, inputs: dict[str, Any], build: Callable[[Path], None]) -> None:
        self.hashes[name] = self.folder.stage(name, inputs, build, self.progress.stage)

    def _announce(self, stage: str) -> Announce:
        def announce(done: int, total: int, note: str = "") -> None:
            self.progress.step(stage, done, total, note)

        return announce

    def _learning(self, stage: str) -> Any:
        def report(step: int, steps: int, loss: float, seconds_left: float) -> None:
            self.progress.step(stage, step, steps, f"loss {loss:.3f}")

        return report

    def _common(self) -> dict[str, Any]:
        adapter = self.config.adapter.model_dump(mode="json")
        train = self.config.train.model_dump(mode="json")
        return {
            "model": self.work.model_identity(),
            "data": self.work.data_identity(),
            "adapter": adapter,
            "train": train,
            "eval_batch": self.config.eval.batch_size,
        }

    def search(self, together: bool = False) -> None:
        """Rank, experts and the warm-up model; without trials, a warm-up at the configured size.

        With ``together``, for several workers, it must be there already.
        """
        from floe.pipeline import warmup
        from floe.pipeline.choice import check_tuning

        inputs = self._common() | {
            "search": self.config.search.model_dump(mode="json", exclude={"storage"}),
            "warmup": self.config.warmup.model_dump(mode="json"),
        }

        def build(folder: Path) -> None:
            if together:
                raise ValueError(
                    "the search stage must be finished before several workers score, it is not: "
                    "run floe search CONFIG in one process"
                )
            check_tuning(self.work)
            warmup.build(self.work, folder, self._learning("search"), self._announce("search"))

        self._stage("search", inputs, build)

    @property
    def size(self) -> tuple[int, int]:
        """Rank and number of experts the search decided on."""
        result = read_json(self.path / "search/result.json")
        return result["rank"], result["num_experts"]

    def score(self) -> None:
        """Mask Fisher, adapter Fisher and Taylor cost."""
        from floe.data import fingerprint
        from floe.pipeline import scoring
        from floe.selection.policies import NEEDS

        policies = self._policies()
        progress = self._announce("score")
        if scoring.is_helper():
            scoring.help_build(self.work, self.path, policies, progress)
            return
        inputs = {
            "search": self.hashes["search"],
            "score": self.config.score.model_dump(mode="json"),
            "rows": fingerprint(self.work.calibration_rows),
            "taylor_rows": fingerprint(self.work.taylor_rows),
            "measured_for": sorted(policies & {"probe", *NEEDS}),
        }
        built = []

        def build(folder: Path) -> None:
            built.append(folder)
            scoring.build(self.work, self.path, folder, policies, progress)

        self._stage("score", inputs, build)
        if not built:
            scoring.announce(None)

    def _policies(self) -> set[str]:
        return {self.config.select.policy, *(baseline.policy for baseline in self.config.baselines)}

    def select(self) -> None:
        """The layers, and the paper's masks beside them whatever decided."""
        from floe.pipeline import sweep
        from floe.pipeline.choice import choose, place_baseline, placed

        counts = self._sweep()
        inputs = {
            "score": self.hashes["score"],
            "select": self.config.select.model_dump(mode="json"),
            "baselines": [b.model_dump(mode="json") for b in self.config.baselines],
            "sweep": {count: self.hashes[f"sweep/{count}"] for count in counts},
        }

        def build(folder: Path) -> None:
            count = None
            if counts:
                found = sweep.swept_choice(self.path, counts)
                write_json(folder / "sweep.json", sweep.describe(found))
                count = found.count
            selection = choose(self.work, self.path, self._announce("select"), count)
            selection.save(folder)
            arms = {"main": placed(self.work, self.path, selection, self.config.select.choose)}
            for baseline in self.config.baselines:
                arms[baseline.name] = place_baseline(self.work, self.path, selection, baseline)
            write_json(folder / "arms.json", {name: arm.document() for name, arm in arms.items()})

        self._stage("select", inputs, build)

    def _sweep(self) -> list[int]:
        """Train and validate one arm for every number of layers that is to be tried."""
        from floe.pipeline import sweep
        from floe.pipeline.choice import choose, placed

        rank, experts = self.size
        counts = sweep.swept_counts(self.work)
        for count in counts:
            chosen = choose(self.work, self.path, self._announce("select"), count)
            where = placed(self.work, self.path, chosen, self.config.select.choose)
            inputs = self._common() | {"rank": rank, "num_experts": experts, **where.document()}
            self._stage(f"sweep/{count}", inputs, partial(self._swept, f"sweep/{count}", where))
        return counts

    def _swept(self, name: str, placement: Placement, folder: Path) -> None:
        from floe.pipeline import sweep

        self._train(name, self.config.select.policy, placement, folder)
        sweep.validate(self.work, folder)

    def _arms(self) -> dict[str, tuple[str, Placement]]:
        """Arm -> its policy and where its adapters are; the chosen one is ``main``."""
        places = read_json(self.path / "select/arms.json")
        policies: dict[str, str] = {"main": self.config.select.policy}
        policies |= {baseline.name: _name_of(baseline) for baseline in self.config.baselines}
        return {arm: (name, Placement.read(places[arm])) for arm, name in policies.items()}

    def train(self) -> None:
        """The chosen layers, then every baseline on the same schedule.

        ``adapter/`` is the chosen one's.
        """
        rank, experts = self.size
        arms = self._arms()
        for folder in self.path.glob("train/*"):
            if folder.name.removesuffix(".work") not in arms:  # configured no more
                shutil.rmtree(folder)
        for arm, (policy, placement) in arms.items():
            inputs = self._common() | {
                "rank": rank,
                "num_experts": experts,
                **placement.document(),
                "policy": policy,
                "schedule": self._schedule_settings(arm),
            }
            self._stage(f"train/{arm}", inputs, partial(self._train, arm, policy, placement))
        copy_folder(self.path / "train/main/adapter", self.path / "adapter")

    def _schedule_settings(self, arm: str) -> dict[str, Any] | None:
        """How the trained layers move in this arm; None where they stay."""
        found = [b for b in self.config.baselines if b.name == arm]
        if not found or found[0].policy not in get_args(Schedule):
            return None
        own, count = found[0], len(read_json(self.path / "select/selection.json")["layers"])
        return {"kind": own.policy, "count": count, "interval": own.interval, "seed": own.seed}

    def _schedule(self, arm: str, model: Any) -> Any:
        from floe.training.layer_schedule import SCHEDULES

        settings = self._schedule_settings(arm)
        return settings and SCHEDULES[settings.pop("kind")](model, **settings)

    def _train(self, arm: str, policy: str, placement: Placement, folder: Path) -> None:
        from floe.adapters import remove_adapters
        from floe.adapters.files import save_adapter
        from floe.pipeline.workspace import plain
        from floe.training.checkpoints import remove_checkpoints
        from floe.training.train import train

        rank, experts = self.size
        model = self.work.fresh(rank, experts, placement)
        try:
            result = train(
                model,
                self.work.train_rows,
                settings=self.work.settings(),
                output_dir=folder / "checkpoints",
                validation=self.work.validation_rows,
                on_progress=self._learning(f"train/{arm}"),
                layer_schedule=self._schedule(arm, model),
            )
            save_adapter(model, folder / "adapter")
        finally:
            remove_adapters(model)
        remove_checkpoints(folder / "checkpoints")
        metrics = plain(result) | {
            "arm": arm, "policy": policy, **placement.document(), "rank": rank,
            "num_experts": experts, "seed": self.config.train.seed,
        }  # fmt: skip
        write_json(folder / "metrics.json", metrics)

    def eval(self) -> None:
        """Loss and accuracy of every arm and of the base model; router health; step cost.

        The step cost is measured by number of adapted layers.
        """
        from floe.pipeline import measure

        self._profile()
        arms = self._arms()
        inputs = {
            "arms": {arm: self.hashes[f"train/{arm}"] for arm in arms},
            "eval": self.config.eval.model_dump(mode="json"),
            "test": self.work.test_identity(),
            "template": self.config.data.template,
            "max_length": self.config.data.max_length,
        }

        def build(folder: Path) -> None:
            adapters = {arm: self.path / "train" / arm / "adapter" for arm in arms}
            measure.build(self.work, adapters, folder, self._announce("eval"))

        self._stage("eval", inputs, build)

    def _profile(self) -> None:
        from floe.pipeline import profiling

        if self.config.profile.steps == 0:
            return
        rank, experts = self.size
        inputs = self._common() | {
            "rank": rank,
            "num_experts": experts,
            "profile": self.config.profile.model_dump(mode="json"),
        }

        def build(folder: Path) -> None:
            profiling.build(self.work, rank, experts, folder, self._announce("profile"))

        self._stage("profile", inputs, build)

    def report(self) -> None:
        """``report.html`` from the artifacts; cheap, so always made anew."""
        from floe.report import build_report

        self.progress.stage("report", "started")
        build_report(self.path)
        self.progress.stage("report", "finished")


def _name_of(baseline: Baseline) -> str:
    return f"{baseline.policy}/{baseline.preset}" if baseline.policy == "masks" else baseline.policy


def export_run(config: RunConfig, output: Path, rows: int) -> Any:
    """The finished run's adapter as one plain LoRA, averaged over ``rows`` training rows."""
    from floe.adapters.export import export_lora
    from floe.adapters.folder import check_new
    from floe.data import sample
    from floe.pipeline.workspace import Workspace

    check_new(output)  # before the model is loaded
    work = Workspace(config)
    batches = work.batches(sample(work.train_rows, rows, config.train.seed), config.eval.batch_size)
    with work.adapted(Path(config.output_dir) / config.name / "adapter") as model:
        return export_lora(model, output, batches)
