"""A run from its configuration to its report: the stages, what each reads, and what it writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from floe.config import Baseline, RunConfig, Schedule, dump_config, load_config
from floe.pipeline import identity as deciding
from floe.pipeline.run_folder import RunFolder, environment
from floe.progress import Progress
from floe.selection.placement import Placement
from floe.storage import copy_folder, read_json, write_json, write_text

if TYPE_CHECKING:
    from floe.pipeline.check import Account

STAGES = ("search", "score", "select", "train", "eval", "report")
PLACEMENTS = "arms/placements.json"
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
        """Metrics of every trained arm of the configuration."""
        placed = self.folder / PLACEMENTS
        arms = sorted(read_json(placed)) if placed.is_file() else []
        files = {arm: self.folder / "train" / arm / "metrics.json" for arm in arms}
        return {arm: read_json(file) for arm, file in files.items() if file.is_file()}

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
    if until not in STAGES:
        raise ValueError(f"until must be one of {', '.join(STAGES)}, got {until!r}")
    settings = config if isinstance(config, RunConfig) else load_config(config)
    folder = RunFolder(Path(settings.output_dir) / settings.name, read_only=dry_run)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _score_together(settings, folder, until, progress or Progress(), redo)
    stages, account = _checked(settings, folder, progress or Progress(), redo)
    wanted = STAGES[: STAGES.index(until) + 1]
    if dry_run:
        account.stages = stages.outlook(wanted)
        return RunResult(folder.path, until, account)
    with folder.locked():
        for name in wanted:
            getattr(stages, name)()
        stages.describe()
    return RunResult(folder.path, until, account)


def _checked(
    settings: RunConfig, folder: RunFolder, progress: Progress, redo: bool
) -> tuple[_Stages, Account]:
    """The stages, and what a look at all that they will read has found."""
    from floe.pipeline.check import check

    stages = _Stages(settings, folder, progress, redo)
    account = stages.account = check(stages.work)
    for line in account.remarks():
        progress.say(line)
    return stages, account


def _score_together(
    settings: RunConfig, folder: RunFolder, until: str, progress: Progress, redo: bool
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
            _Stages(settings, folder, Progress(), redo).score()
            return RunResult(folder.path, until)
        stages, _ = _checked(settings, folder, progress, redo)
        with folder.locked():
            stages.search(together=True)
            stages.score()
    return RunResult(folder.path, until)


class _NotDone(Exception):
    """What a dry run ends with: the stage that is to be done, and why."""


class _Stages:
    """Each method is one stage: what decides its result, and the work when that has changed."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, progress: Progress, redo: bool
    ) -> None:
        from floe.pipeline.inputs import Workspace

        self.config, self.folder, self.progress, self.redo = config, folder, progress, redo
        self.work = Workspace(config)
        self.path = folder.path
        self.account: Account | None = None
        self._described = False

    def describe(self) -> None:
        """Settings, rows, machine and versions, once the settings are those of the results."""
        if self._described:
            return
        self._described = True
        write_text(self.path / "config.yaml", dump_config(self.config))
        if self.account is not None:
            self.account.write(self.path / "data.json")
        device, dtype = str(self.work.device), str(self.work.dtype)
        write_json(self.path / "env.json", environment() | {"device": device, "dtype": dtype})

    def _stage(
        self, name: str, inputs: dict[str, Any], build: Callable[[Path], None], **options: Any
    ) -> None:
        """A stage of the run folder, which is asked before its results are discarded."""

        def announce(stage: str, what: str) -> None:
            if what == "started":  # nothing is refused any more
                self.describe()
            self.progress.stage(stage, what)

        def may_discard(changed: set[str]) -> bool:
            return self.redo or deciding.may_discard(changed)

        settings = deciding.notes(self.config, name.partition("/")[0])
        asked: dict[str, Any] = {"may_discard": may_discard, "notes": settings}
        if self.folder.read_only:
            asked |= {"growing": options.get("growing", ())}
            state = self.folder.state(name, inputs, **asked)
            if state != "done":
                raise _NotDone(name, state)
            return
        self.folder.stage(name, inputs, build, announce, **asked | options)

    def outlook(self, stages: Sequence[str]) -> dict[str, str]:
        """What each stage would do: nothing ("done"), or in words what; later ones rest on it."""
        found = dict.fromkeys(stages, "to do")
        for stage in stages if self.path.is_dir() else ():
            if stage == "report":  # cheap, so always made anew
                break
            try:
                getattr(self, stage)()
            except _NotDone as reason:
                name, state = reason.args
                found[stage] = state if name == stage else f"{name}: {state}"
                break
            found[stage] = "done"
        return found

    def _announce(self, stage: str) -> Announce:
        def announce(done: int, total: int, note: str = "") -> None:
            self.progress.step(stage, done, total, note)

        return announce

    def _learning(self, stage: str) -> Any:
        def report(step: int, steps: int, loss: float, seconds_left: float) -> None:
            self.progress.step(stage, step, steps, f"loss {loss:.3f}")

        return report

    def _deciding(self, stage: str) -> dict[str, Any]:
        """The settings that count for a stage, and the base model."""
        model = {"model.dtype": str(self.work.dtype), "model.device": self.work.device.type}
        found = {name: self._model_digests[name] for name in (deciding.WEIGHTS, "model")}
        return deciding.values(self.config, stage) | model | found

    @cached_property
    def _model_digests(self) -> dict[str, dict[str, Any]]:
        """sha256 of every file of the model's folder that counts; a hub model's commit."""
        model = self.config.model
        if not Path(model.path).is_dir():
            named = {"hub": model.path, "commit": self.work.commit, "gguf_file": model.gguf_file}
            return {deciding.WEIGHTS: {}, "model": named, "tokenizer": {}}
        files = deciding.model_files(Path(model.path), model.gguf_file)
        digest = self.folder.digest
        return {k: deciding.digests(Path(model.path), f, digest) for k, f in files.items()}

    def _training(self, stage: str, max_steps: int | None = None) -> dict[str, Any]:
        """What decides how adapters are trained."""
        length = self.work.settings(max_steps).identity()
        inputs = self._deciding(stage)
        inputs |= {n: length[n] for n in ("rows_per_step", "steps", "epochs") if n in length}
        return inputs | {"validation": _fingerprint(self.work.validation_rows)}

    def _adapter(self, folder: str) -> str:
        return deciding.adapter_digest(self.path / folder / "adapter", self.folder.digest)

    def search(self, together: bool = False) -> None:
        """Rank, experts and the warm-up model; without trials, a warm-up at the configured size.

        With ``together``, for several workers, it must be there already.
        """
        from floe.pipeline import warmup
        from floe.pipeline.choice import check_tuning

        settings = self.config.search
        inputs = self._training("search", self.config.warmup.max_steps)
        inputs |= {"rows": _fingerprint(self.work.warmup_rows)}
        idle = {"adapter.r", "adapter.num_experts"}
        if settings.trials == 0:
            idle = {name for name in inputs if name.startswith("search.")}
        elif settings.sampler not in ("tpe", "paper"):
            idle |= {"search.startup_trials"}
        inputs = {name: value for name, value in inputs.items() if name not in idle}

        def build(folder: Path) -> None:
            if together:
                raise ValueError(
                    "the search stage must be finished before several workers score, it is not: "
                    "run floe search CONFIG in one process"
                )
            check_tuning(self.work)
            warmup.build(self.work, folder, self._learning("search"), self._announce("search"))

        self._stage(
            "search", inputs, build, results=("result.json", "adapter", "study.db"),
            tidy=warmup.tidy, growing=("search.trials",),
        )  # fmt: skip

    @property
    def size(self) -> tuple[int, int]:
        """Rank and number of experts the search decided on."""
        result = read_json(self.path / "search/result.json")
        return result["rank"], result["num_experts"]

    def score(self) -> None:
        """Mask Fisher, adapter Fisher and Taylor cost; and what else the policies look at."""
        from floe.pipeline import scoring

        policies, progress = self._policies(), self._announce("score")
        done = self.folder.done("score") or {}
        probe = "probe" in policies or bool(done.get("inputs", {}).get("probe"))  # never taken away
        if scoring.is_helper():
            scoring.help_build(self.work, self.path, probe, progress)
            return
        common = {"adapter": self._adapter("search")}
        inputs = self._deciding("score") | common | {
            "rows": _fingerprint(self.work.calibration_rows),
            "taylor_rows": _fingerprint(self.work.taylor_rows),
            "probe": probe,
        }  # fmt: skip
        built = []

        def build(folder: Path) -> None:
            built.append(folder)
            scoring.build(self.work, self.path, folder, probe, progress)

        self._stage("score", inputs, build, results=("scores.npz",), tidy=scoring.tidy)
        if not built:
            scoring.announce(None)
        for name, policy in scoring.statistics_of(policies).items():
            rows = {"rows": _fingerprint(self.work.statistic_rows)}
            self._stage(
                f"statistics/{name}", self._deciding("statistics") | common | rows,
                partial(scoring.build_statistics, self.work, self.path, policy=policy,
                        progress=progress),
                results=("statistics.npz",),
            )  # fmt: skip

    def _policies(self) -> set[str]:
        return {self.config.select.policy, *(baseline.policy for baseline in self.config.baselines)}

    def _scored(self) -> dict[str, Any]:
        """What a choice of layers is made from."""
        from floe.pipeline import scoring

        settings, (rank, experts) = self.config.select, self.size
        inputs = self._deciding("select") | {
            "scores": self.folder.digest(self.path / "score/scores.npz"),
            "rank": rank,
            "num_experts": experts,
            "statistics": {
                name: self.folder.digest(self.path / f"statistics/{name}/statistics.npz")
                for name in scoring.statistics_of({settings.policy})
            },
        }
        if settings.tune is not False:
            inputs |= {"adapter": self._adapter("search"),
                       "rows": _fingerprint(self.work.calibration_rows)}  # fmt: skip
        else:
            del inputs["select.tune_tokens"]
        if settings.score != "path":
            del inputs["select.budget_path"]
        if isinstance(settings.layers, dict) and "memory" in settings.layers:
            inputs["tokens"] = self.config.train.batch_size * self.config.data.max_length
        return inputs

    def select(self) -> None:
        """The layers, and the paper's masks beside them whatever decided; then all arms' places."""
        from floe.pipeline import sweep
        from floe.pipeline.choice import choose

        counts = self._sweep()
        losses = {n: self.folder.digest(self.path / f"sweep/{n}" / sweep.LOSSES) for n in counts}
        inputs = self._scored() | {"sweep": losses}

        def build(folder: Path) -> None:
            count = None
            if counts:
                found = sweep.swept_choice(self.path, counts)
                write_json(folder / "sweep.json", sweep.describe(found))
                count = found.count
            choose(self.work, self.path, self._announce("select"), count).save(folder)

        self._stage("select", inputs, build, results=("selection.json", "masks.npz", "sweep.json"))
        self._place()

    def _place(self) -> None:
        """Where the adapters of every arm go; quickly done, so made anew without a question."""
        from floe.pipeline import scoring
        from floe.pipeline.choice import place_baseline, placed
        from floe.selection.select import Selection

        inputs = self._scored() | deciding.values(self.config, "arms") | {
            "selection": self.folder.digest(self.path / "select/selection.json"),
            "search.rank": self.config.search.rank,
            "search.num_experts": self.config.search.num_experts,
            "trials": self.folder.digest(self.path / "search/result.json"),
            "measured": {
                name: self.folder.digest(self.path / f"statistics/{name}/statistics.npz")
                for name in scoring.statistics_of(self._policies())
            },
        }  # fmt: skip

        def build(folder: Path) -> None:
            selection = Selection.load(self.path / "select")
            arms = {"main": placed(self.work, self.path, selection, self.config.select.choose)}
            for baseline in self.config.baselines:
                arms[baseline.name] = place_baseline(self.work, self.path, selection, baseline)
            documents = {name: arm.document() for name, arm in arms.items()}
            write_json(folder / Path(PLACEMENTS).name, documents)

        self._stage("arms", inputs, build, results=("placements.json",), may_discard=_always)

    def _sweep(self) -> list[int]:
        """Train and validate one arm for every number of layers that is to be tried."""
        from floe.pipeline import sweep
        from floe.pipeline.choice import choose, placed

        counts = sweep.swept_counts(self.work)
        for count in counts:
            chosen = choose(self.work, self.path, self._announce("select"), count)
            where = placed(self.work, self.path, chosen, self.config.select.choose)
            name = f"sweep/{count}"
            build = partial(self._swept, name, where)
            self._stage(
                name, self._arm_inputs("sweep", where), build,
                results=("adapter", "metrics.json", sweep.LOSSES), tidy=_remove_checkpoints,
            )  # fmt: skip
        return counts

    def _swept(self, name: str, placement: Placement, folder: Path) -> None:
        from floe.pipeline import sweep

        self._train(name, self.config.select.policy, placement, folder)
        sweep.validate(self.work, folder)

    def _arm_inputs(self, stage: str, placement: Placement) -> dict[str, Any]:
        """What decides the adapter that is trained in these places."""
        rank, experts = self.size
        rows = {"rows": _fingerprint(self.work.train_rows), "rank": rank, "num_experts": experts}
        return self._training(stage) | rows | placement.document()

    def _arms(self) -> dict[str, tuple[str, Placement]]:
        """Arm -> its policy and where its adapters are; the chosen one is ``main``."""
        places = read_json(self.path / PLACEMENTS)
        policies: dict[str, str] = {"main": self.config.select.policy}
        policies |= {baseline.name: _name_of(baseline) for baseline in self.config.baselines}
        return {arm: (name, Placement.read(places[arm])) for arm, name in policies.items()}

    def train(self) -> None:
        """The chosen layers, then every baseline on the same schedule.

        ``adapter/`` is the chosen one's. Arms that are configured no more stay where they are.
        """
        for arm, (policy, placement) in self._arms().items():
            inputs = self._arm_inputs("train", placement) | {
                "policy": policy,
                "movement": self._schedule_settings(arm),
            }
            self._stage(
                f"train/{arm}", inputs, partial(self._train, arm, policy, placement),
                results=("adapter", "metrics.json"), tidy=_remove_checkpoints,
            )  # fmt: skip
        if not self.folder.read_only:
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
        from floe.pipeline.inputs import plain
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
        digests = {arm: self._adapter(f"train/{arm}") for arm in arms}
        inputs = self._deciding("eval") | {
            "tokenizer": self._model_digests["tokenizer"],
            "test": self.work.test_identity(),
            "validation": _fingerprint(self.work.validation_rows),  # of the router statistics
            "arms": digests,
        }

        def build(folder: Path) -> None:
            adapters = {arm: self.path / "train" / arm / "adapter" for arm in arms}
            measure.build(self.work, adapters, digests, folder, self._announce("eval"))

        self._stage(
            "eval", inputs, build, growing=("arms",),
            results=("results.json", "losses.json", "router.json", "arms"),
        )  # fmt: skip

    def _profile(self) -> None:
        from floe.pipeline import profiling

        if self.config.profile.steps == 0:
            return
        rank, experts = self.size
        train = self.config.train
        rows = self.work.train_rows[: train.batch_size * train.grad_accum]
        inputs = self._deciding("profile") | {
            "rank": rank,
            "num_experts": experts,
            "rows": _fingerprint(rows),
        }

        def build(folder: Path) -> None:
            profiling.build(self.work, rank, experts, folder, self._announce("profile"))

        self._stage("profile", inputs, build, results=("profile.json",))

    def report(self) -> None:
        """``report.html`` from the artifacts; cheap, so always made anew."""
        from floe.report import build_report

        self.describe()
        self.progress.stage("report", "started")
        build_report(self.path)
        self.progress.stage("report", "finished")


def _always(changed: set[str]) -> bool:
    return True


def _fingerprint(rows: Any) -> str:
    from floe.data.batches import fingerprint

    return fingerprint(rows)


def _remove_checkpoints(folder: Path) -> None:
    from floe.training.checkpoints import remove_checkpoints

    remove_checkpoints(folder / "checkpoints")


def _name_of(baseline: Baseline) -> str:
    return f"{baseline.policy}/{baseline.preset}" if baseline.policy == "masks" else baseline.policy


def export_run(config: RunConfig, output: Path, rows: int) -> Any:
    """The finished run's adapter as one plain LoRA, averaged over ``rows`` training rows."""
    from floe.adapters.folder import check_new
    from floe.adapters.plain_lora import export_lora
    from floe.data.rows import sample
    from floe.pipeline.inputs import Workspace

    check_new(output)  # before the model is loaded
    work = Workspace(config)
    batches = work.batches(sample(work.train_rows, rows, config.train.seed), config.eval.batch_size)
    with work.adapted(Path(config.output_dir) / config.name / "adapter") as model:
        return export_lora(model, output, batches)
