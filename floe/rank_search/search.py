"""Search for rank and number of experts on validation loss; the only module that imports optuna."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
from optuna.trial import TrialState
from torch import nn

from floe.adapters import FloeConfig, adapted_modules, get_model, remove_adapters
from floe.adapters.files import load_adapter, save_adapter
from floe.atomic import copy_folder
from floe.data import TokenRow, fingerprint
from floe.evaluate import evaluate_rows, mean_loss
from floe.importance.identity import model_fingerprint
from floe.rank_search.proposals import Point, SearchSpace, propose, sampler_settings
from floe.rank_search.studies import (
    Owner,
    Trial,
    begin_trial,
    best_trial,
    fail_orphans,
    finished,
    mask,
    one_process,
    open_study,
    quiet_optuna,
)
from floe.training.train import TrainSettings, train

__all__ = ["SearchResult", "SearchSpace", "Trial", "search"]

SearchProgress = Callable[[int, int, str], None]
Sampler = Literal["tpe", "paper", "random", "grid"]


@dataclass(frozen=True)
class SearchResult:
    """The best point, its model (the warm-up model of the later stages) and every trial.

    ``exhausted``: the space has fewer points than were asked for, and all are trained. ``distinct``
    is the number of different points trained, ``seconds`` the sum over the trials. ``sampler`` says
    in full how points were drawn.
    """

    rank: int
    num_experts: int
    best_trial: int
    objective: float
    trials: list[Trial]
    model: Any
    adapter_path: Path
    sampler: dict[str, Any]
    seconds: float
    distinct: int
    exhausted: bool


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
    on_progress: SearchProgress | None = None,
) -> SearchResult:
    """Train an adapter at up to ``trials`` points of the space; keep the best (FLoE section 4.1).

    The objective is the token-weighted mean loss on ``validation_rows`` after training. No point is
    trained twice. Killed at any instant and called again with the same arguments, the search goes
    on and ends with the trials and the best of an unbroken one; more ``trials`` extend it.
    The base model is frozen, its weights are the same before and after. One process at a time.

    Args:
        directory: gets ``study.db`` (unless ``storage`` is given), ``trials/`` and ``best/``, the
            best trial's adapter.
        storage: an optuna database URL.
        sampler: ``"tpe"`` (multivariate), ``"paper"`` (univariate, as optuna was then by default),
            ``"random"`` or ``"grid"`` (all points in an order drawn from the seed).
        startup_trials: random points before TPE starts.
        adapter: further :class:`FloeConfig` fields, for example alpha, dropout, target_modules.
        prune: stop a trial whose validation loss at 25, 50 or 75 % of its steps is above the median
            of the earlier ones (from the sixth trial on).
        on_progress: called with (trials done, trials, what happened).

    Raises:
        ValueError: for values out of range, or a storage whose study has other arguments.
        RuntimeError: if another process runs this search, every trial failed, or training changed
            the base model.
    """
    if isinstance(trials, bool) or not isinstance(trials, int):
        raise TypeError(f"trials must be an int, got {type(trials).__name__}")
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    folder = Path(directory)
    work = _Search(
        base_model, train_rows, validation_rows, folder, space or SearchSpace(),
        sampler_settings(sampler, startup_trials), seed, settings or TrainSettings(),
        dict(adapter or {}), prune,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with one_process(folder / "search.lock"), quiet_optuna():
        work.open(storage)
        return work.complete(trials, on_progress)


class _Search:
    """One search: what it works on, and its study."""

    def __init__(
        self,
        base: nn.Module,
        train_rows: Sequence[TokenRow],
        validation_rows: Sequence[TokenRow],
        directory: Path,
        space: SearchSpace,
        sampler: dict[str, Any],
        seed: int,
        settings: TrainSettings,
        adapter: dict[str, Any],
        prune: bool,
    ) -> None:
        if not validation_rows:
            raise ValueError("validation_rows must not be empty")
        if adapted_modules(base):
            raise ValueError("base_model must not be adapted already")
        own = sorted({"r", "num_experts", "seed"} & adapter.keys())
        if own:
            raise ValueError(f"adapter must not set {own[0]}, the search does")
        FloeConfig(**adapter)
        self.base, self.train_rows, self.validation_rows = base, train_rows, validation_rows
        self.directory, self.space, self.sampler, self.seed = directory, space, sampler, seed
        self.settings, self.adapter, self.prune = settings, adapter, prune
        self.owner = Owner.current()
        self.fingerprint = model_fingerprint(base)

    def open(self, storage: str | None) -> None:
        """The study, with the trials of dead processes given up."""
        self.url = storage or f"sqlite:///{self.directory / 'study.db'}"
        self.study = open_study(self.url, self._identity(), self.prune)
        fail_orphans(self.study, self.owner, alone=storage is None)
        self._keep_best_only()

    def _identity(self) -> dict[str, Any]:
        return {
            "space": dataclasses.asdict(self.space),
            "sampler": self.sampler,
            "seed": self.seed,
            "settings": dataclasses.asdict(self.settings),
            "adapter": self.adapter,
            "prune": self.prune,
            "train_rows": fingerprint(self.train_rows),
            "validation_rows": fingerprint(self.validation_rows),
            "base_model": self.fingerprint,
        }

    def complete(self, trials: int, on_progress: SearchProgress | None) -> SearchResult:
        """Go on until ``trials`` points are trained, or all that the space has."""
        wanted = min(trials, len(self.space.points()))
        while (done := len(finished(self.study))) < wanted:
            note = self.trial()
            if on_progress:
                on_progress(done + 1, wanted, note)
        if on_progress and wanted < trials:
            note = f"the space has {wanted} points, fewer than {trials} trials: all are trained"
            on_progress(wanted, wanted, note)
        return self.result(exhausted=wanted < trials)

    def trial(self) -> str:
        """Choose, train and record the next point; what happened, in words."""
        index = len(finished(self.study))
        point, redraws = propose(self.study, self.space, self.sampler, self.seed, index)
        handle = begin_trial(self.study, self.space, point, self.owner, index, redraws)
        value, reason, seconds = self._objective(handle, self._folder(index, point), point)
        handle.set_user_attr("seconds", seconds)
        if value is None:
            handle.set_user_attr("reason", reason)
            self.study.tell(handle, state=TrialState.PRUNED)
        else:
            reason = f"validation loss {value:.4f}"
            self.study.tell(handle, value)
        self._keep_best_only()
        return f"trial {index}: rank {point[0]}, {point[1]} experts: {reason}"

    def _objective(
        self, handle: optuna.trial.Trial, folder: Path, point: Point
    ) -> tuple[float | None, str, float]:
        config = FloeConfig(r=point[0], num_experts=point[1], **self.adapter)
        started = time.perf_counter()
        model = get_model(self.base, config, seed=self.seed)
        try:
            value, seconds = self._train(model, handle, folder)
            return value, "", seconds
        except optuna.TrialPruned:
            reason = "stopped early: above the median"
        except FloatingPointError as error:
            reason = f"failed: {error}"
        except torch.OutOfMemoryError as error:
            reason = f"failed: out of memory ({str(error).splitlines()[0]})"
        finally:
            remove_adapters(model)
            if model_fingerprint(self.base) != self.fingerprint:
                raise RuntimeError("a trial must leave the base model as it is, its weights differ")
        return None, reason, time.perf_counter() - started

    def _train(self, model: Any, handle: optuna.trial.Trial, folder: Path) -> tuple[float, float]:
        """Validation loss and seconds, those before a kill included; saves the adapter."""

        def report(step: int, loss: float) -> None:
            handle.report(loss, step)
            if handle.should_prune():
                raise optuna.TrialPruned

        points = (0.25, 0.5, 0.75) if self.prune else ()
        done = train(
            model,
            self.train_rows,
            settings=dataclasses.replace(self.settings, validation_points=points),
            validation=self.validation_rows if self.prune else None,
            output_dir=folder / "train",
            on_validation=report,
        )
        started = time.perf_counter()
        losses = evaluate_rows(model, self.validation_rows, self.settings.eval_batch_size)
        seconds = done.seconds + time.perf_counter() - started
        save_adapter(model, folder / "adapter")
        return mean_loss(losses), seconds

    def _folder(self, index: int, point: Point) -> Path:
        return self.directory / "trials" / f"{index:04d}-r{point[0]}-m{point[1]}"

    def _keep_best_only(self) -> None:
        """Delete the folders of finished trials but the best one's adapter."""
        best = best_trial(self.study)
        for trial in finished(self.study):
            folder = self._folder(trial.number, (trial.rank, trial.num_experts))
            keep = best is not None and trial.number == best.number
            shutil.rmtree(folder / "train" if keep else folder, ignore_errors=True)

    def result(self, exhausted: bool) -> SearchResult:
        """Publish the best adapter as ``best/`` and attach it to the base model."""
        best, found = best_trial(self.study), finished(self.study)
        if best is None or best.value is None:
            reasons = sorted({t.reason for t in found})
            raise RuntimeError(
                f"at least one trial must succeed, none of {len(found)}: {reasons[0]}"
            )
        path = self.directory / "best"
        folder = self._folder(best.number, (best.rank, best.num_experts))
        copy_folder(folder / "adapter", path)
        return SearchResult(
            rank=best.rank,
            num_experts=best.num_experts,
            best_trial=best.number,
            objective=best.value,
            trials=found,
            model=load_adapter(self.base, path),
            adapter_path=path,
            sampler={**self.sampler, "seed": self.seed, "storage": mask(self.url)},
            seconds=sum(t.seconds for t in found),
            distinct=len({(t.rank, t.num_experts) for t in found}),
            exhausted=exhausted,
        )
