"""The surface of `benchmarks.search`: the validation loss of an adapter trained at every point.

Beside its points, one for each rank, number of experts and seed, a folder holds ``base.json``, the
base model's losses. All points see the same rows; a seed decides the adapter's first values,
dropout and the rows' order.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import resume
from benchmarks.harness import Row
from benchmarks.questions import MIXES, SPLITS
from benchmarks.resume import adapted
from benchmarks.settings import count, option, several
from floe.adapters import get_model
from floe.decoder_blocks import find_blocks
from floe.pipeline.inputs import RunInputs
from floe.rank_search.space import SearchSpace
from floe.selection.placement import Placement
from floe.selection.policies.baselines import even_layers
from floe.storage import read_json, write_json
from floe.training.schedule import TrainSettings
from floe.training.train import train

PAPER_SPACE = SearchSpace(rank=(4, 64, 4), num_experts=(2, 10, 1))
Clock = Callable[[], float]


def some(text: str) -> int | None:
    """Kind of the option ``--layers``."""
    return None if text == "all" else count(text)


@dataclass(frozen=True)
class Settings(resume.Settings):
    """What all points of a folder share; one ``rate`` for all of them, as a search has it."""

    mix: str = option("commonsense", "of questions; default commonsense")
    rank: tuple[int, ...] = option(
        PAPER_SPACE.rank, "low,high,step; default 4,64,4, the paper's", several(int)
    )
    experts: tuple[int, ...] = option(
        PAPER_SPACE.num_experts, "low,high,step; default 2,10,1, the paper's", several(int)
    )
    sizes: tuple[int, ...] = option((1600, 192), "rows of train,validation", several(int))
    layers: int | None = option(None, "how many, evenly spread; default all", some)
    steps: int = option(60, "of training; default 60", count)
    rate: float = option(1e-3, "of learning, of all points; default 1e-3")
    device: str = option("cpu", choices=("cpu", "cuda"))
    clock: str = option("wall", "of a point's seconds", choices=("wall", "processor"))

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
    """All runs; a seed's surface is whole before the next begins."""
    if min(seeds) < 0:
        raise ValueError(f"seeds must be >= 0, got {tuple(seeds)}")
    return [Run(rank, experts, seed) for seed in seeds for rank, experts in settings.space.points()]


class Study(resume.Study):
    """A folder of points, and what they are made with."""

    results = "points"

    def __init__(self, folder: Path, settings: Settings) -> None:
        super().__init__(folder, settings)
        self.device = settings.device

    @cached_property
    def _work(self) -> RunInputs:
        s = self.settings
        steps = {"learning_rate": s.rate, "max_steps": s.steps}
        rows = (self.folder / "data", SPLITS[:2])
        return self.workspace(*rows, model={"device": s.device}, train=steps)

    @cached_property
    def _placement(self) -> Placement:
        count = len(find_blocks(self._work.base_model))
        wanted = count if self.settings.layers is None else self.settings.layers
        if wanted > count:
            raise ValueError(f"layers must be at most the model's {count}, got {wanted}")
        return Placement(tuple(even_layers(wanted, count)))

    def prepare(self) -> None:
        """Load the model; write settings, rows and the base model's losses, where missing."""
        _ = self._placement
        if not (self.folder / resume.SETTINGS).exists():  # written last: rows without it are redone
            self.write_rows(self.folder / "data", self.settings.mix, 0, self._work.tokenizer)
            self.write_settings()
        file = self.folder / "base.json"
        if not file.exists():
            write_json(file, {"format": resume.FORMAT, **self._losses(self._work.base_model)})

    def train(self, run: Run, clock: Clock) -> Row:
        """Train one run, measure it, write its file; ``seconds`` are of training and validation."""
        work = self._work
        config = work.adapter_config(run.rank, run.experts, self._placement)
        settings = dataclasses.replace(
            work.settings(self.settings.steps), seed=run.seed, save_steps=None, validation_points=()
        )

        def build() -> Row:
            with adapted(get_model(work.base_model, config, seed=run.seed)) as model:
                began, folder = clock(), self.folder / "work"
                trained = train(model, work.train_rows, settings=settings, output_dir=folder)
                losses = self._losses(model)
                seconds = clock() - began
            return {**losses, "seconds": seconds, "parameters": trained.trainable_parameters}

        return self.keep(run, build)

    def _losses(self, model: Any) -> Row:
        return resume.losses(self._work, model, self._work.validation_rows, "loss")

    def told(self, result: Row) -> str:
        """Its loss."""
        return f"validation {result['loss']:.4f}"

    def estimate(self, waiting: Sequence[Run]) -> str:
        """From the mean of all finished points."""
        done = [read_json(file)["seconds"] for file in self.folder.glob("points/*.json")]
        if not done:
            return "no point has been timed yet"
        each = statistics.mean(done)
        return f"about {len(waiting) * each / 60:.0f} min to go ({each:.0f} s a point)"
