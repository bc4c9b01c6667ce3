"""The surface of `benchmarks.search`: the validation loss of an adapter trained at every point.

A folder holds ``settings.json`` (what all points share), ``data/`` (the rows), ``base.json`` (the
base model's losses) and ``points/*.json``, one file for each rank, number of experts and seed. All
points see the same rows; a seed decides the adapter's first values, dropout and the rows' order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import harness, study
from benchmarks.quality_data import MIXES, mix_rows, shorter_than, write_split
from floe.adapters import get_model, remove_adapters
from floe.config import parse_config
from floe.decoder_blocks import find_blocks
from floe.evaluation.evaluate import evaluate_rows, mean_loss
from floe.pipeline.inputs import RunInputs
from floe.pipeline.run_folder import RunFolder
from floe.rank_search.space import SearchSpace
from floe.selection.placement import Placement
from floe.selection.policies.baselines import even_layers
from floe.storage import write_json
from floe.training.train import TrainSettings, train

FORMAT = 1
PAPER_SPACE = SearchSpace(rank=(4, 64, 4), num_experts=(2, 10, 1))
SPLITS = ("train", "validation")
Clock = Callable[[], float]


@dataclass(frozen=True)
class Settings:
    """What all points of a folder share; one ``rate`` for all of them, as a search has it.

    ``rank`` and ``experts`` are (low, high, step); ``sizes``: rows of train and validation;
    ``longest``: tokens of a row; ``layers``: how many, evenly spread, carry adapters (None: all);
    ``data``: folder of ``<mix>.jsonl``, or None for the wheel's mixes.

    Raises:
        TypeError, ValueError: for values out of range.
    """

    model: str
    mix: str = "commonsense"
    data: str | None = None
    rank: tuple[int, int, int] = PAPER_SPACE.rank
    experts: tuple[int, int, int] = PAPER_SPACE.num_experts
    sizes: tuple[int, int] = (1600, 192)
    longest: int = 160
    layers: int | None = None
    steps: int = 60
    rate: float = 1e-3
    batch_size: int = 8
    alpha: float = 32.0
    dropout: float = 0.05
    device: str = "cpu"
    clock: str = "wall"

    def __post_init__(self) -> None:
        if self.data is None and self.mix not in MIXES:
            raise ValueError(f"mix must be one of {sorted(MIXES)} without --data, got {self.mix!r}")
        if len(self.sizes) != 2 or self.sizes[0] < 1 or self.sizes[1] < 2:
            raise ValueError(f"sizes must be >= 1 and >= 2 rows, got {self.sizes}")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")
        TrainSettings(learning_rate=self.rate, max_steps=self.steps, batch_size=self.batch_size)
        _ = self.space

    @property
    def space(self) -> SearchSpace:
        """The points to train."""
        return SearchSpace(self.rank, self.experts)


@dataclass(frozen=True)
class Run:
    """One training: a point and a seed."""

    rank: int
    experts: int
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"r{self.rank}-m{self.experts}-seed{self.seed}"


def plan(settings: Settings, seeds: Sequence[int]) -> list[Run]:
    """All runs; a seed's surface is whole before the next begins.

    Raises:
        ValueError: for a seed below 0.
    """
    if min(seeds) < 0:
        raise ValueError(f"seeds must be >= 0, got {tuple(seeds)}")
    return [Run(rank, experts, seed) for seed in seeds for rank, experts in settings.space.points()]


class Study:
    """A folder of points, and what they are made with.

    Raises:
        FileError: the folder holds points with other settings.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.run_folder = RunFolder(folder)
        self._record = study.record_of(settings, FORMAT)
        study.check_same(folder, self._record, "points")

    def file(self, run: Run) -> Path:
        """Where a run's result is or will be."""
        return self.folder / "points" / f"{run.name}.json"

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Machine and versions, as they were when the process started."""
        return harness.machine(self._work.device)

    @cached_property
    def _work(self) -> RunInputs:
        s, folder = self.settings, self.folder / "data"
        rows = {split: {"path": str(folder / f"{split}.jsonl")} for split in SPLITS}
        return RunInputs(parse_config({
            "model": {"path": s.model, "attention": "eager", "device": s.device},
            "data": {**rows, "columns": {"task": "task"}, "max_length": s.longest},
            "adapter": {"alpha": s.alpha, "dropout": s.dropout},
            "train": {
                "batch_size": s.batch_size, "grad_accum": 1, "learning_rate": s.rate,
                "max_steps": s.steps, "group_by_length": True,
            },
        }))  # fmt: skip

    @cached_property
    def _placement(self) -> Placement:
        count = len(find_blocks(self._work.base_model))
        wanted = count if self.settings.layers is None else self.settings.layers
        if wanted > count:
            raise ValueError(f"layers must be at most the model's {count}, got {wanted}")
        return Placement(tuple(even_layers(wanted, count)))

    def prepare(self) -> None:
        """Load the model; write the settings, the rows and the base model's losses, where missing.

        Raises:
            ValueError: for a model, rows or a number of layers that cannot be.
        """
        _ = self._placement
        if not (self.folder / study.FILE).exists():  # written last: rows without it are redone
            self._write_rows()
            write_json(self.folder / study.FILE, self._record)
        file = self.folder / "base.json"
        if not file.exists():
            write_json(file, {"format": FORMAT, **self._losses(self._work.base_model)})

    def _write_rows(self) -> None:
        s = self.settings
        found = mix_rows(s.mix, Path(s.data) if s.data else None)
        sizes = {**dict(zip(SPLITS, s.sizes, strict=True)), "test": 0}
        fits = shorter_than(self._work.tokenizer, s.longest)
        write_split(found, self.folder / "data", sizes, f"{s.mix}:0", fits)

    def train(self, run: Run, clock: Clock) -> dict[str, Any]:
        """Train one run, measure it, write its file; ``seconds`` are of training and validation."""
        work, s = self._work, self.settings
        config = work.adapter_config(run.rank, run.experts, self._placement)
        settings = dataclasses.replace(
            work.settings(s.steps), seed=run.seed, save_steps=None, validation_points=()
        )
        self.run_folder.event(run=run.name, what="started")
        model = get_model(work.base_model, config, seed=run.seed)
        try:
            began = clock()
            trained = train(
                model, work.train_rows, settings=settings, output_dir=self.folder / "work"
            )
            losses = self._losses(model)
            seconds = clock() - began
        finally:
            remove_adapters(model)
        result = {
            "format": FORMAT, **dataclasses.asdict(run), **losses, "seconds": seconds,
            "parameters": trained.trainable_parameters, "environment": self.environment,
        }  # fmt: skip
        self.file(run).parent.mkdir(exist_ok=True)
        write_json(self.file(run), result)
        self.run_folder.event(run=run.name, what="finished")
        return result

    def _losses(self, model: Any) -> dict[str, Any]:
        """Validation loss: mean in nats per target token, and each row's sum and count."""
        work = self._work
        losses = evaluate_rows(model, work.validation_rows, work.config.eval.batch_size)
        return {
            "loss": mean_loss(losses),
            "nll": losses.nll.tolist(),
            "tokens": losses.tokens.tolist(),
        }
