"""The runs of `benchmarks.quality`: each is one file, written whole, made from floe's own parts.

A folder of runs holds ``settings.json`` (what all its runs share), ``data/`` (the rows),
``warmups/<mix>-seed<n>/`` (the warm-up adapter, its scores, the base model's losses) and
``runs/*.json``.
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, study
from benchmarks.quality_data import MIXES, SPLITS, mix_rows, shorter_than, write_split
from floe.adapters import remove_adapters
from floe.adapters.files import save_adapter
from floe.artifacts.schema import document
from floe.config import parse_config
from floe.data.batches import TokenRow, fingerprint
from floe.evaluation.evaluate import evaluate_rows, mean_loss
from floe.importance.layer_statistics import measure_statistics
from floe.importance.score import score
from floe.importance.scores import Scores
from floe.importance.statistics import LayerStatistics
from floe.pipeline.inputs import RunInputs
from floe.pipeline.run_folder import RunFolder, Stage
from floe.pipeline.select import place
from floe.selection.allocate import Saturating
from floe.selection.placement import Placement
from floe.selection.policies import POLICIES
from floe.selection.select import select
from floe.storage import write_json
from floe.training.train import TrainSettings, train

FORMAT = 1
SIZES = (2, 4, 6, 8, 12, 16, 24, 32)
"""Ranks an arm ``@sizes`` may give a layer, with the study's number of experts."""
R0 = 16.0
"""What capacity is worth to it, declared: rank 8 with 4 experts reaches 63 % of a layer's gain."""
STATISTIC_ROWS = 16


@dataclass(frozen=True)
class Settings:
    """What all runs of a folder share.

    ``sizes``: rows of train, validation and test. ``layers``: K. ``longest``: tokens of a row.
    ``data``: folder of ``<mix>.jsonl``, or None for the wheel's mixes.
    """

    model: str
    mixes: tuple[str, ...] = ("commonsense", "knowledge")
    data: str | None = None
    sizes: tuple[int, int, int] = (1600, 48, 192)
    longest: int = 160
    layers: int = 8
    rates: tuple[float, ...] = (1e-3, 3e-3)
    batch_size: int = 8
    points: int = 10
    warmup_steps: int = 100
    warmup_rate: float = 1e-3
    score_rows: int = 256
    r: int = 8
    num_experts: int = 4
    alpha: float = 32.0
    dropout: float = 0.05

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

    ``rate`` None: the one that was best for this arm (see `quality_report.best_rate`).
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


class Study:
    """A folder of runs, and what they are made with.

    Raises:
        FileError: the folder holds runs with other settings.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.run_folder = RunFolder(folder)
        self._works: dict[tuple[str, int], RunInputs] = {}
        record = study.record_of(settings, FORMAT)
        study.check_same(folder, record, "runs")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / study.FILE, record)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Machine and versions, as they were when the process started."""
        return harness.machine(torch.device("cpu"))

    def work(self, mix: str, seed: int) -> RunInputs:
        """Model and rows of a mix and seed; the rows are split and written on first use."""
        if (mix, seed) not in self._works:
            work = RunInputs(parse_config(self._config(mix, seed)))
            for other in list(self._works.values())[:1]:  # one model and tokenizer for all
                work.base_model, work.tokenizer = other.base_model, other.tokenizer
            self._split(mix, seed, work.tokenizer)
            self._works[mix, seed] = work
        return self._works[mix, seed]

    def _rows(self, mix: str, seed: int) -> Path:
        return self.folder / "data" / f"{mix}-seed{seed}"

    def _split(self, mix: str, seed: int, tokenizer: Any) -> None:
        folder, s = self._rows(mix, seed), self.settings
        if not all((folder / f"{split}.jsonl").exists() for split in SPLITS):
            rows = mix_rows(mix, Path(s.data) if s.data else None)
            sizes = dict(zip(SPLITS, s.sizes, strict=True))
            write_split(rows, folder, sizes, f"{mix}:{seed}", shorter_than(tokenizer, s.longest))
            print(f"{mix}, seed {seed}: {sizes} of {len(rows)} rows", flush=True)

    def _config(self, mix: str, seed: int) -> dict[str, Any]:
        s, rows = self.settings, self._rows(mix, seed)
        return {
            "model": {"path": s.model, "attention": "eager"},
            "data": {
                **{split: {"path": str(rows / f"{split}.jsonl")} for split in SPLITS},
                "columns": {"task": "task"},
                "max_length": s.longest,
            },
            "adapter": {
                "r": s.r, "num_experts": s.num_experts, "alpha": s.alpha, "dropout": s.dropout,
            },
            "warmup": {"fraction": 0.5, "seed": seed},
            "score": {"rows": s.score_rows, "batch_size": s.batch_size, "seed": seed},
            "train": {
                "batch_size": s.batch_size, "grad_accum": 1, "group_by_length": True,
                "validations": s.points, "seed": seed,
            },
        }  # fmt: skip

    def steps(self, work: RunInputs, steps: int, rate: float) -> TrainSettings:
        """How a training of so many steps runs."""
        return dataclasses.replace(work.settings(steps), learning_rate=rate, save_steps=None)

    def fresh(self, work: RunInputs, placement: Placement | None = None) -> Any:
        """The base model with new adapters."""
        return work.fresh(self.settings.r, self.settings.num_experts, placement)

    def warm_up(self, mix: str, seed: int) -> Path:
        """Folder of the warm-up's adapter, scores and base losses, made if it is not there."""
        work, other = self.work(mix, seed), self.work(self.other(mix), seed)
        data = {
            part: fingerprint(rows)
            for part, rows in (("train", work.train_rows), ("validation", work.validation_rows))
        }
        inputs = {"data": data, "settings": dataclasses.asdict(self.settings)}

        def build(folder: Path) -> None:
            base = {part: self._losses(work, work.base_model, rows)
                    for part, rows in self._measured(work, other).items()}  # fmt: skip
            model = self.fresh(work)
            try:
                s = self.settings
                trained = train(
                    model, work.warmup_rows, output_dir=folder / "checkpoints",
                    settings=self.steps(work, s.warmup_steps, s.warmup_rate),
                    validation=work.validation_rows,
                )  # fmt: skip
                save_adapter(model, folder / "adapter")
                self._score(work, model).save(folder / "scores.npz")
            finally:
                remove_adapters(model)
            facts = {"mix": mix, "seed": seed, "warmup_validation": trained.validation_loss}
            write_json(folder / "base.json", {**facts, **base})

        name = f"warmups/{mix}-seed{seed}"
        self.run_folder.make(Stage(name, inputs, build))
        return self.folder / name

    def other(self, mix: str) -> str:
        """The mix whose loss shows what training on ``mix`` forgets."""
        mixes = self.settings.mixes
        return mixes[(mixes.index(mix) + 1) % len(mixes)]

    def _score(self, work: RunInputs, model: Any) -> Scores:
        size = self.settings.batch_size
        return score(
            model, work.batches(work.calibration_rows, size),
            taylor_batches=work.batches(work.taylor_rows, size), probe=True,
            seed=work.config.score.seed,
        )  # fmt: skip

    def placement(self, run: Run) -> Placement:
        """Where a run's arm puts adapters; the masks go through their tuning stage, too."""
        warm, work, s = self.warm_up(run.mix, run.seed), self.work(run.mix, run.seed), self.settings
        name, _, kind = run.arm.partition("@")
        policy, _, preset = name.partition("/")
        arguments: dict[str, Any] = {
            "policy": policy, "preset": preset or "global", "layers": s.layers,
            "seed": zlib.crc32(f"{run.mix}:{run.seed}:{run.draw}".encode()),
            "statistics": self._statistics(run, policy),
        }  # fmt: skip
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

    def file(self, run: Run) -> Path:
        """Where a run's result is or will be."""
        return self.folder / "runs" / f"{run.name}.json"

    def train(self, run: Run) -> dict[str, Any]:
        """Train one run, measure it, write its file."""
        assert run.rate is not None
        self.warm_up(run.mix, run.seed)  # its time is no run's
        began, placement = time.monotonic(), self.placement(run)
        work, other = self.work(run.mix, run.seed), self.work(self.other(run.mix), run.seed)
        self.run_folder.event(run=run.name, what="started")
        model = self.fresh(work, placement)
        try:
            trained = train(
                model, work.train_rows, settings=self.steps(work, run.steps, run.rate),
                output_dir=self.folder / "work", validation=work.validation_rows,
            )  # fmt: skip
            parts = self._measured(work, other)
            losses = {name: self._losses(work, model, parts[name]) for name in ("test", "other")}
        finally:
            remove_adapters(model)
        result = {
            "format": FORMAT, **dataclasses.asdict(run), **losses, **document(placement),
            "parameters": trained.trainable_parameters, "validation": trained.validation_loss,
            "train_loss": trained.train_loss, "seconds_per_step": trained.seconds_per_step,
            "seconds": time.monotonic() - began, "environment": self.environment,
        }  # fmt: skip
        self.file(run).parent.mkdir(exist_ok=True)
        write_json(self.file(run), result)
        self.run_folder.event(run=run.name, what="finished")
        return result

    def _measured(self, work: RunInputs, other: RunInputs) -> dict[str, list[TokenRow]]:
        return {
            "validation": work.validation_rows,
            "test": work.test_rows,
            "other": other.validation_rows,
        }

    def _losses(self, work: RunInputs, model: Any, rows: Sequence[TokenRow]) -> dict[str, Any]:
        """Mean loss, nats per target token, and each row's sum and count."""
        losses = evaluate_rows(model, rows, work.config.eval.batch_size)
        return {
            "mean": mean_loss(losses),
            "nll": losses.nll.tolist(),
            "tokens": losses.tokens.tolist(),
        }


def check_arm(arm: str) -> str:
    """The arm itself if its policy exists; ValueError otherwise."""
    name, _, kind = arm.partition("@")
    if name.partition("/")[0] not in POLICIES or kind not in ("", "modules", "sizes"):
        raise ValueError(
            f"arm must be one of {sorted(POLICIES)} or masks/<preset>, alone or with @modules or "
            f"@sizes, got {arm!r}"
        )
    return arm
