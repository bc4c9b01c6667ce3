"""Search for rank and number of experts on validation loss."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
from torch import nn

from floe.adapters import FloeConfig, adapted_modules, get_model, remove_adapters
from floe.adapters.files import load_adapter, save_adapter
from floe.adapters.fingerprint import model_fingerprint
from floe.artifacts.results import Search, Trial
from floe.artifacts.schema import NEVER
from floe.data.batches import TokenRow, fingerprint
from floe.errors import SearchError, require_whole
from floe.evaluation import evaluate_rows, mean_loss
from floe.rank_search.space import SearchSpace, propose, sampler_settings
from floe.rank_search.storage import mask
from floe.rank_search.studies import (
    MEMORY,
    OUT_OF_MEMORY,
    Outcome,
    Owner,
    Point,
    adapter_digest,
    begin_trial,
    best_trial,
    end_trial,
    fail_orphans,
    finished,
    one_process,
    open_study,
    quiet_optuna,
    should_stop,
)
from floe.storage import STAGING, copy_folder, remove_if_empty
from floe.training.checkpoints import remove_checkpoints
from floe.training.schedule import TrainSettings
from floe.training.train import train
from floe.types import Progress

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "README.md")
Sampler = Literal["tpe", "paper", "random", "grid"]


@dataclass(frozen=True, kw_only=True)
class SearchResult(Search):
    """The best point, its model (the warm-up model of the later stages) and every trial."""

    model: Any = field(metadata=NEVER)
    adapter_path: Path = field(metadata=NEVER)


def search(
    base_model: nn.Module,
    train_rows: Sequence[TokenRow],
    validation_rows: Sequence[TokenRow],
    *,
    directory: str | os.PathLike[str],
    space: SearchSpace | None = None,
    trials: int = 30,
    storage: str | None = None,
    sampler: Sampler = "tpe",
    startup_trials: int = 10,
    seed: int = 41,
    settings: TrainSettings | None = None,
    adapter: Mapping[str, Any] | None = None,
    prune: bool = False,
    on_progress: Progress | None = None,
) -> SearchResult:
    """Train an adapter at up to ``trials`` points of the space; keep the best (FLoE section 4.1).

    The objective is the token-weighted mean loss on ``validation_rows`` after training. No point is
    trained twice. Killed and called again with the same arguments, it goes on and ends with the
    trials and the best of an unbroken search. More ``trials`` extend it; fewer than are finished
    train nothing. The best trial is trained again where its adapter is gone. Trials of other
    programs are passed over. The base model's weights stay. One process at a time.

    Args:
        directory: gets ``study.db`` (unless ``storage`` is given), ``trials/`` and ``best/``, the
            best trial's adapter.
        storage: an optuna database URL.
        sampler: ``"tpe"`` (multivariate), ``"paper"`` (univariate, optuna's default then),
            ``"random"`` or ``"grid"`` (all points in an order drawn from the seed).
        startup_trials: random points before TPE starts.
        adapter: further :class:`FloeConfig` fields, for example alpha, dropout, target_modules.
        prune: stop a trial whose validation loss at 25, 50 or 75 % of its steps is above the median
            of the earlier ones (from the sixth trial on).
        on_progress: called with (trials done, trials, what happened).

    Raises:
        ValueError: for values out of range, or a storage that does not open or is another search's.
        SearchError: if another process runs this search, every trial failed, or the storage fails.
        RuntimeError: if training changed the base model.
    """
    require_whole("trials", trials, 1)
    folder = Path(directory)
    work = _Search(
        base_model,
        train_rows,
        validation_rows,
        folder,
        space or SearchSpace(),
        sampler_settings(sampler, startup_trials),
        seed,
        settings or TrainSettings(),
        dict(adapter or {}),
        prune,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with one_process(folder / "search.lock"), quiet_optuna():
        work.open(storage, trials, on_progress)
        return work.complete()


@dataclass
class _Search:
    """One search: what it works on, and its study."""

    base: nn.Module
    train_rows: Sequence[TokenRow]
    validation_rows: Sequence[TokenRow]
    directory: Path
    space: SearchSpace
    sampler: dict[str, Any]
    seed: int
    settings: TrainSettings
    adapter: dict[str, Any]
    prune: bool

    def __post_init__(self) -> None:
        if not self.validation_rows:
            raise ValueError("validation_rows must not be empty")
        if adapted_modules(self.base):
            raise ValueError("base_model must not be adapted already")
        fixed = sorted({"r", "num_experts", "seed"} & self.adapter.keys())
        if fixed:
            raise ValueError(f"adapter must not set {fixed[0]}, the search does")
        FloeConfig(**self.adapter)
        self.owner = Owner.current()
        self.fingerprint = model_fingerprint(self.base)

    def open(self, storage: str | None, trials: int, on_progress: Progress | None = None) -> None:
        """The study, with the trials of dead processes given up."""
        self.trials, self.on_progress, self.done = trials, on_progress, 0
        self.wanted = min(trials, len(self.space.points()))
        self.place = self.directory / "study.db" if storage is None else storage
        self.study = open_study(self.place, self._identity(), self.prune, self._say)
        memory = {n: getattr(self.settings, n) for n in ("batch_size", "gradient_checkpointing")}
        self.study.set_user_attr(MEMORY, memory)
        fail_orphans(self.study, self.owner, alone=storage is None)
        self._keep_best_only()

    def _say(self, note: str) -> None:
        if self.on_progress:
            self.on_progress(self.done, self.wanted, note)

    def _identity(self) -> dict[str, Any]:
        return {
            "space": dataclasses.asdict(self.space),
            "sampler": self.sampler,
            "seed": self.seed,
            "settings": self.settings.identity(),
            "adapter": {k: v for k, v in self.adapter.items() if k != "backend"},  # all are equal
            "prune": self.prune,
            "train_rows": fingerprint(self.train_rows),
            "validation_rows": fingerprint(self.validation_rows),
            "base_model": self.fingerprint,
        }

    def complete(self) -> SearchResult:
        """Go on until that many points are trained, or all that the space has."""
        while (done := len(finished(self.study))) < self.wanted:
            note = self.trial()
            self.done = done + 1
            self._say(note)
        self.done = done
        if self.wanted < self.trials:
            counts = f"{self.wanted} points, fewer than {self.trials} trials"
            self._say(f"the space has {counts}: all are trained")
        return self.result(exhausted=self.wanted < self.trials)

    def trial(self) -> str:
        """Choose, train and record the next point; what happened, in words."""
        numbers = {trial.number for trial in finished(self.study)}
        index = min(set(range(len(numbers) + 1)) - numbers)
        point, redraws = propose(self.study, self.space, self.sampler, self.seed, index)
        space = self.space.distributions()
        handle = begin_trial(self.study, space, point, self.owner, index, redraws)
        stop = partial(should_stop, self.study, handle)
        outcome = self._objective(self._folder(index, point), point, stop)
        end_trial(self.study, handle, outcome)
        self._keep_best_only()
        reason = outcome.reason or f"validation loss {outcome.value:.4f}"
        return f"trial {index}: rank {point[0]}, {point[1]} experts: {reason}"

    def _objective(
        self, folder: Path, point: Point, stop: Callable[[dict[int, float]], bool] | None
    ) -> Outcome:
        config = FloeConfig(r=point[0], num_experts=point[1], **self.adapter)
        started, outcome = time.perf_counter(), Outcome()
        model = get_model(self.base, config, seed=self.seed)
        try:
            self._train(model, folder, outcome, stop if self.prune else None)
            return outcome
        except optuna.TrialPruned:
            outcome.reason = "stopped early: above the median"
        except FloatingPointError as error:
            outcome.reason = f"failed: {error}"
        except torch.OutOfMemoryError as error:
            outcome.reason = f"{OUT_OF_MEMORY} ({str(error).splitlines()[0]})"
        finally:
            remove_adapters(model)
            if model_fingerprint(self.base) != self.fingerprint:
                raise RuntimeError("a trial must leave the base model as it is, its weights differ")
        outcome.seconds = time.perf_counter() - started
        return outcome

    def _train(
        self,
        model: Any,
        folder: Path,
        outcome: Outcome,
        stop: Callable[[dict[int, float]], bool] | None,
    ) -> None:
        """Saves the adapter; the loss, and the seconds with those before a kill, in ``outcome``."""

        def report(step: int, loss: float) -> None:
            outcome.losses[step] = loss
            if stop and stop(outcome.losses):
                raise optuna.TrialPruned

        points = (0.25, 0.5, 0.75) if stop else ()
        done = train(
            model,
            self.train_rows,
            settings=dataclasses.replace(self.settings, validation_points=points),
            validation=self.validation_rows if stop else None,
            output_dir=folder / "train",
            on_validation=report,
        )
        started = time.perf_counter()
        loss = mean_loss(evaluate_rows(model, self.validation_rows, self.settings.eval_batch_size))
        outcome.seconds = done.seconds + time.perf_counter() - started
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the validation loss must be finite, got {loss} (a lower learning_rate may help)"
            )
        save_adapter(model, folder / "adapter")
        outcome.value, outcome.adapter = loss, _digest(folder / "adapter")

    def _folder(self, index: int, point: Point) -> Path:
        return self.directory / "trials" / f"{index:04d}-r{point[0]}-m{point[1]}"

    def _keep_best_only(self) -> None:
        """Delete what finished trials wrote but the best one's adapter."""
        best = best_trial(self.study)
        for trial in finished(self.study):
            keep = best is not None and trial.number == best.number
            _remove_trial(self._folder(trial.number, (trial.rank, trial.num_experts)), keep)

    def result(self, exhausted: bool) -> SearchResult:
        """Publish the best adapter as ``best/`` and attach it to the base model."""
        best, trials = best_trial(self.study), finished(self.study)
        if best is None or best.value is None:
            raise SearchError(
                f"at least one trial must succeed, none of {len(trials)}: "
                f"{min(t.reason for t in trials)}; they are kept in {mask(self.place)}"
            )
        path = self.directory / "best"
        self._publish(best, path)
        return SearchResult(
            rank=best.rank,
            num_experts=best.num_experts,
            best_trial=best.number,
            objective=best.value,
            trials=trials,
            model=load_adapter(self.base, path),
            adapter_path=path,
            sampler={**self.sampler, "seed": self.seed, "storage": mask(self.place)},
            seconds=sum(t.seconds for t in trials),
            distinct=len({(t.rank, t.num_experts) for t in trials}),
            exhausted=exhausted,
        )

    def _publish(self, best: Trial, path: Path) -> None:
        """The best trial's adapter at ``path``; trained again where it is gone or another's."""
        point, digest = (best.rank, best.num_experts), adapter_digest(self.study, best.number)
        folder = self._folder(best.number, point)
        if digest and _digest(path) == digest:
            return
        there = _digest(folder / "adapter")
        if not there or digest not in ("", there):
            self._say(f"trial {best.number} is trained again, its adapter is gone from {folder}")
            outcome = self._objective(folder, point, None)
            if outcome.value is None:
                raise SearchError(
                    f"trial {best.number} must succeed again, as its adapter is gone from "
                    f"{folder}: {outcome.reason}"
                )
            self._say(f"trial {best.number}, trained again: validation loss {outcome.value:.4f}")
            _remove_trial(folder, keep_adapter=True)
        copy_folder(folder / "adapter", path)


def remove_trials(directory: Path) -> None:
    """Delete what a finished search wrote but its study: ``best/``, then the trials' folders."""
    _remove_adapter(directory / "best")
    for folder in (directory / "trials").glob("[0-9]*-r*-m*"):
        _remove_trial(folder)
    remove_if_empty(directory / "trials")


def _remove_trial(folder: Path, keep_adapter: bool = False) -> None:
    """Delete what a trial wrote into its folder, and the folder if nothing else is in it."""
    remove_checkpoints(folder / "train")
    remove_if_empty(folder / "train")
    if not keep_adapter:
        _remove_adapter(folder / "adapter")
        remove_if_empty(folder)


def _remove_adapter(folder: Path) -> None:
    """Its tensors before its settings: where they are, it is whole."""
    for name in reversed(_ADAPTER):
        (folder / name).unlink(missing_ok=True)
    for drawn in folder.glob(f"{STAGING}*"):  # of a process that died as it wrote here
        shutil.rmtree(drawn)
    remove_if_empty(folder)


def _digest(adapter: Path) -> str:
    """sha256 of an adapter's settings and tensors; empty if one of them is not there."""
    digest = hashlib.sha256()
    for name in _ADAPTER[:2]:
        if not (adapter / name).is_file():
            return ""
        digest.update((adapter / name).read_bytes())
    return digest.hexdigest()
