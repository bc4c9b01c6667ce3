"""The trainings of `benchmarks.quality`, made from floe's own parts.

Beside its runs a folder holds ``warmups/<mix>-seed<n>/``: the warm-up adapter, its scores, the base
model's losses.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import resume
from benchmarks.harness import Row
from benchmarks.quality.report import best_rate, last_loss, read
from benchmarks.questions import MIXES, SPLITS
from benchmarks.resume import adapted, losses
from benchmarks.settings import option, several
from floe.adapters.files import save_adapter
from floe.artifacts.schema import document
from floe.data.batches import TokenRow, fingerprint
from floe.importance.layer_statistics import measure_statistics
from floe.importance.score import score
from floe.importance.scores import LayerStatistics, Scores
from floe.pipeline.inputs import RunInputs
from floe.pipeline.run_folder import Stage
from floe.pipeline.select import place
from floe.selection.placement import Placement, Saturating
from floe.selection.policies import POLICIES
from floe.selection.select import select
from floe.storage import write_json
from floe.training.schedule import TrainSettings
from floe.training.train import train

SIZES = (2, 4, 6, 8, 12, 16, 24, 32)
"""Ranks an arm ``@sizes`` may give a layer, with the study's number of experts."""
R0 = 16.0
"""What capacity is worth to it, declared: rank 8 with 4 experts reaches 63 % of a layer's gain."""
STATISTIC_ROWS = 16


@dataclass(frozen=True)
class Settings(resume.Settings):
    """What all runs of a folder share."""

    mixes: tuple[str, ...] = option(("commonsense", "knowledge"), "of questions", several())
    sizes: tuple[int, ...] = option((1600, 48, 192), "rows of train,validation,test", several(int))
    layers: int = option(8, "K")
    rates: tuple[float, ...] = option((1e-3, 3e-3), "the grid; default 1e-3,3e-3", several(float))
    points: int = option(10, "validations in a run")
    warmup_steps: int = option(100)
    score_rows: int = option(256)
    warmup_rate: float = 1e-3
    r: int = 8
    num_experts: int = 4

    def __post_init__(self) -> None:
        if len(set(self.mixes)) < 2:
            raise ValueError(
                f"mixes must be at least 2, each measures the other's forgetting, got {self.mixes}"
            )
        if self.data is None and not set(self.mixes) <= MIXES.keys():
            raise ValueError(
                f"mixes must be of {sorted(MIXES)} without --data, got {list(self.mixes)}"
            )


@dataclass(frozen=True)
class Run:
    """One training. ``draw`` tells random arms apart.

    ``arm`` is a policy, or ``masks/<preset>``; ``<policy>@modules`` or ``@sizes`` spend the
    parameters of the policy's layers on single projections, or on ranks of every layer.

    ``rate`` None: the one that was best for this arm (see `report.best_rate`).
    """

    mix: str
    seed: int
    arm: str
    draw: int
    steps: int
    rate: float | None

    @property
    def name(self) -> str:
        """Of its file."""
        arm = self.arm.replace("/", "_").replace("@", "_")
        rate = "best" if self.rate is None else f"{self.rate:g}"
        return f"{self.mix}-seed{self.seed}-{arm}-draw{self.draw}-{self.steps}steps-{rate}"


def check_arm(arm: str) -> str:
    """The arm itself if its policy exists; ValueError otherwise."""
    name, _, kind = arm.partition("@")
    if name.partition("/")[0] not in POLICIES or kind not in ("", "modules", "sizes"):
        raise ValueError(
            f"arm must be one of {sorted(POLICIES)} or masks/<preset>, alone or with @modules or "
            f"@sizes, got {arm!r}"
        )
    return arm


class Study(resume.Study):
    """A folder of runs, and what they are made with."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        super().__init__(folder, settings)
        self._works: dict[tuple[str, int], RunInputs] = {}
        self.write_settings()

    def work(self, mix: str, seed: int) -> RunInputs:
        """Model and rows of a mix and seed; the rows are split and written on first use."""
        if (mix, seed) not in self._works:
            folder, s = self.folder / "data" / f"{mix}-seed{seed}", self.settings
            work = self.workspace(
                folder,
                SPLITS,
                adapter={"r": s.r, "num_experts": s.num_experts},
                warmup={"fraction": 0.5, "seed": seed},
                score={"rows": s.score_rows, "batch_size": s.batch_size, "seed": seed},
                train={"validations": s.points, "seed": seed},
            )
            for other in list(self._works.values())[:1]:  # one model and tokenizer for all
                work.base_model, work.tokenizer = other.base_model, other.tokenizer
            if not all((folder / f"{split}.jsonl").exists() for split in SPLITS):
                self.write_rows(folder, mix, seed, work.tokenizer)
            self._works[mix, seed] = work
        return self._works[mix, seed]

    def steps(self, work: RunInputs, steps: int, rate: float) -> TrainSettings:
        """How a training of so many steps runs."""
        return dataclasses.replace(work.settings(steps), learning_rate=rate, save_steps=None)

    def fresh(self, work: RunInputs, placement: Placement | None = None) -> Any:
        """The base model with new adapters."""
        return work.fresh(self.settings.r, self.settings.num_experts, placement)

    def warm_up(self, mix: str, seed: int) -> Path:
        """Folder of the warm-up's adapter, scores and base losses, made if it is not there."""
        work, s = self.work(mix, seed), self.settings
        data = {"train": work.train_rows, "validation": work.validation_rows}
        data = {part: fingerprint(rows) for part, rows in data.items()}
        inputs = {"data": data, "settings": dataclasses.asdict(s)}
        parts = self._measured(mix, seed)

        def build(folder: Path) -> None:
            base = {name: losses(work, work.base_model, parts[name]) for name in parts}
            with adapted(self.fresh(work)) as model:
                trained = train(
                    model,
                    work.warmup_rows,
                    output_dir=folder / "checkpoints",
                    settings=self.steps(work, s.warmup_steps, s.warmup_rate),
                    validation=work.validation_rows,
                )
                save_adapter(model, folder / "adapter")
                self._score(work, model).save(folder / "scores.npz")
            facts = {"mix": mix, "seed": seed, "warmup_validation": trained.validation_loss}
            write_json(folder / "base.json", {**facts, **base})

        name = f"warmups/{mix}-seed{seed}"
        self.run_folder.make(Stage(name, inputs, build))
        return self.folder / name

    def _score(self, work: RunInputs, model: Any) -> Scores:
        rows, taylor = (
            work.batches(part, self.settings.batch_size)
            for part in (work.calibration_rows, work.taylor_rows)
        )
        seed = work.config.score.seed
        return score(model, rows, taylor_batches=taylor, probe=True, seed=seed)

    def placement(self, run: Run) -> Placement:
        """Where a run's arm puts adapters; the masks go through their tuning stage, too."""
        warm, work, s = self.warm_up(run.mix, run.seed), self.work(run.mix, run.seed), self.settings
        name, _, kind = run.arm.partition("@")
        policy, _, preset = name.partition("/")
        arguments: dict[str, Any] = {
            "policy": policy,
            "preset": preset or "global",
            "layers": s.layers,
            "seed": zlib.crc32(f"{run.mix}:{run.seed}:{run.draw}".encode()),
            "statistics": self._statistics(run, policy),
        }
        scores = Scores.load(warm / "scores.npz")
        if policy == "masks":
            with work.adapted(warm / "adapter") as model:
                batches = work.batches(work.calibration_rows, s.batch_size)
                choice = select(scores, model, batches, **arguments)
        else:
            choice = select(scores, **arguments)
        options = [(rank, s.num_experts) for rank in SIZES]
        size = (s.r, s.num_experts)
        return place(work, scores, choice, kind or "layers", size, options, Saturating(R0))

    def _statistics(self, run: Run, policy: str) -> LayerStatistics | None:
        """What the policy needs besides scores, measured once on the warmed-up model."""
        if not POLICIES[policy].statistics:
            return None
        warm, work = self.warm_up(run.mix, run.seed), self.work(run.mix, run.seed)
        file = warm / f"{policy}.npz"
        if not file.exists():
            rows = work.calibration_rows[:STATISTIC_ROWS]
            with work.adapted(warm / "adapter") as model:
                batches = work.batches(rows, self.settings.batch_size)
                measure_statistics(model, batches, [policy], steps=self.settings.layers).save(file)
        return LayerStatistics.load(file)

    def resolve(self, run: Run) -> Run:
        """The run with the rate that is best for its arm, as far as the files can tell."""
        if run.rate is not None:
            return run
        rate = best_rate(read(self.folder).runs, run.mix, run.arm, run.steps)
        return dataclasses.replace(run, rate=rate)

    def train(self, run: Run) -> Row:
        """Train one run, measure it, write its file."""
        assert run.rate is not None
        self.warm_up(run.mix, run.seed)  # its time is no run's
        began, placement, rate = time.monotonic(), self.placement(run), run.rate
        work, parts = self.work(run.mix, run.seed), self._measured(run.mix, run.seed)

        def build() -> Row:
            with adapted(self.fresh(work, placement)) as model:
                trained = train(
                    model,
                    work.train_rows,
                    settings=self.steps(work, run.steps, rate),
                    output_dir=self.folder / "work",
                    validation=work.validation_rows,
                )
                tested = {name: losses(work, model, parts[name]) for name in ("test", "other")}
            facts = ("train_loss", "seconds_per_step")
            return {
                **tested,
                **document(placement),
                **{name: getattr(trained, name) for name in facts},
                "parameters": trained.trainable_parameters,
                "validation": trained.validation_loss,
                "seconds": time.monotonic() - began,
            }

        return self.keep(run, build)

    def _measured(self, mix: str, seed: int) -> dict[str, list[TokenRow]]:
        """``other``: of the mix whose loss shows what training on ``mix`` forgets."""
        mixes, work = self.settings.mixes, self.work(mix, seed)
        other = self.work(mixes[(mixes.index(mix) + 1) % len(mixes)], seed)
        rows = {"validation": work.validation_rows, "test": work.test_rows}
        return {**rows, "other": other.validation_rows}

    def told(self, result: Row) -> str:
        """Its losses."""
        return f"validation {last_loss(result):.4f}, test {result['test']['mean']:.4f}"

    def estimate(self, waiting: Sequence[Run]) -> str:
        """From the medians of all finished runs."""
        done = read(self.folder).runs
        if not done:
            return "no step has been timed yet"
        step = statistics.median(run["seconds_per_step"] for run in done)
        beside = (run["seconds"] - run["steps"] * run["seconds_per_step"] for run in done)
        rest = statistics.median(beside)
        minutes = sum(run.steps * step + rest for run in waiting) / 60
        return f"about {minutes:.0f} min to go ({step:.2f} s a step, {rest:.0f} s a run beside)"
