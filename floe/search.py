"""Search for rank and number of experts on validation loss; the only module that imports optuna."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState
from torch import nn

from floe.adapters import FloeConfig, adapted_modules, get_model
from floe.adapters.files import load_adapter, save_adapter
from floe.data import TokenRow, fingerprint
from floe.evaluate import evaluate_rows, summarise_loss
from floe.proposals import SearchSpace, propose, sampler_settings
from floe.studies import Owner, fail_orphans, masked_url, open_study, proposed
from floe.train import TrainSettings, train

__all__ = ["SearchResult", "SearchSpace", "Trial", "search"]

SearchProgress = Callable[[int, int, str], None]
Sampler = Literal["tpe", "paper", "random", "grid"]


@dataclass(frozen=True)
class Trial:
    """One trained point: ``state`` is complete, pruned (stopped early) or failed (NaN, out of memory).

    ``value`` is the validation loss in nats per token (None unless complete), ``seconds`` the time of
    training and validation, ``redraws`` how many suggestions were already trained before this one.
    """

    number: int
    rank: int
    num_experts: int
    state: str
    value: float | None
    seconds: float
    redraws: int
    reason: str = ""


@dataclass(frozen=True)
class SearchResult:
    """The best point, its model (the warm-up model of the later stages) and every trial.

    ``exhausted``: the space has fewer points than were asked for, and all are trained. ``distinct``
    is the number of different points trained, ``seconds`` the sum over the trials.
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
    """Train an adapter at up to ``trials`` points of the space, keep the best (FLoE Eq. 6, section 4.1).

    The objective is the token-weighted mean loss on ``validation_rows`` after training. No point is
    trained twice. Killed at any instant and called again with the same arguments, the search continues
    and ends with the trials and the best of an unbroken one; with more ``trials`` it is extended. The
    base model's weights are the same before and after.

    Args:
        directory: gets ``study.db`` (unless ``storage`` is given), ``trials/`` and ``best/``, the best
            trial's adapter.
        storage: an optuna database URL.
        sampler: ``"tpe"`` (multivariate), ``"paper"`` (univariate, as the paper's optuna had it),
            ``"random"`` or ``"grid"`` (all points in an order drawn from the seed).
        startup_trials: random points before TPE starts.
        adapter: further :class:`FloeConfig` fields, for example alpha, dropout, target_modules.
        prune: stop a trial whose validation loss at 25, 50 or 75 % of its steps is above the median
            of the earlier ones (from the sixth trial on).
        on_progress: called with (trials done, trials, what happened).

    Raises:
        ValueError: for values out of range, a study with other arguments in the storage, or when
            every trial failed.
        RuntimeError: if training changed the base model.
    """
    run = _Search(base_model, train_rows, validation_rows, Path(directory), space or SearchSpace(),
                  sampler, startup_trials, seed, settings or TrainSettings(), dict(adapter or {}),
                  prune)  # fmt: skip
    if isinstance(trials, bool) or not isinstance(trials, int):
        raise TypeError(f"trials must be an int, got {type(trials).__name__}")
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    run.open(storage)
    wanted = min(trials, len(run.space.points()))
    while (done := len(run.finished())) < wanted:
        note = run.trial(done)
        if on_progress:
            on_progress(done + 1, wanted, note)
    if on_progress and wanted < trials:
        on_progress(
            wanted, wanted, f"the space has {wanted} points, fewer than {trials}; all are trained"
        )
    return run.result(exhausted=wanted < trials)


class _Search:
    """One search: what it works on, and its study."""

    def __init__(
        self,
        base: nn.Module,
        train_rows: Sequence[TokenRow],
        validation_rows: Sequence[TokenRow],
        directory: Path,
        space: SearchSpace,
        sampler: str,
        startup: int,
        seed: int,
        settings: TrainSettings,
        adapter: dict[str, Any],
        prune: bool,
    ) -> None:
        if not validation_rows:
            raise ValueError("validation_rows must not be empty")
        if adapted_modules(base):
            raise ValueError("base_model must not be adapted already")
        unknown = sorted({"r", "num_experts", "seed"} & adapter.keys())
        if unknown:
            raise ValueError(f"adapter must not set {unknown[0]}, the search does")
        FloeConfig(**adapter)
        self.base, self.train_rows, self.validation_rows = base, train_rows, validation_rows
        self.directory, self.space, self.seed = directory, space, seed
        self.settings, self.adapter, self.prune = settings, adapter, prune
        self.sampler = sampler_settings(sampler, startup)
        self.owner = Owner.current()
        self.fingerprint = base_fingerprint(base)

    def open(self, storage: str | None) -> None:
        """The study, with the trials of dead processes given up."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.study = open_study(
            storage or f"sqlite:///{self.directory / 'study.db'}", self._identity(), self._pruner()
        )
        fail_orphans(self.study, self.owner)
        self._keep_best_only()

    def _pruner(self) -> optuna.pruners.BasePruner:
        if self.prune:
            return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=0)
        return optuna.pruners.NopPruner()

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

    def finished(self) -> list[FrozenTrial]:
        """Trials that ended, in order; not those a dead process left."""
        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        return self.study.get_trials(deepcopy=False, states=ended)

    def trial(self, index: int) -> str:
        """Choose, train and record point number ``index``; what happened, in words."""
        point, redraws = propose(self.study, self.space, self.sampler, self.seed, index)
        attributes = {"owner": dataclasses.asdict(self.owner), "redraws": redraws, "index": index}
        number = proposed(self.study, self.space, point, attributes)
        handle = optuna.trial.Trial(
            self.study, self.study.get_trials(deepcopy=False)[number]._trial_id
        )
        started = time.perf_counter()
        value, reason = self._objective(handle, index, point)
        handle.set_user_attr("seconds", time.perf_counter() - started)
        rank, experts = point
        name = f"trial {index}: rank {rank}, {experts} experts"
        if value is None:
            handle.set_user_attr("reason", reason)
            self.study.tell(handle, state=TrialState.PRUNED)
            note = f"{name}: {reason}"
        else:
            self.study.tell(handle, value)
            note = f"{name}: validation loss {value:.4f}"
        self._keep_best_only()
        return note

    def _objective(
        self, handle: optuna.trial.Trial, index: int, point: tuple[int, int]
    ) -> tuple[float | None, str]:
        rank, experts = point
        config = FloeConfig(r=rank, num_experts=experts, **self.adapter)
        model = get_model(self.base, config, seed=self.seed)
        try:
            train(
                model, self.train_rows, settings=self._trial_settings(), validation=self._watched(),
                output_dir=self._folder(index) / "train",
                on_validation=self._reporter(handle) if self.prune else None,
            )  # fmt: skip
            losses = evaluate_rows(model, self.validation_rows, self.settings.eval_batch_size)
            save_adapter(model, self._folder(index) / "adapter")
            return summarise_loss(losses, resamples=1).value, ""
        except optuna.TrialPruned:
            return None, "stopped early: above the median"
        except FloatingPointError as error:
            return None, f"failed: {error}"
        except torch.OutOfMemoryError as error:
            return None, f"failed: out of memory ({str(error).splitlines()[0]})"
        finally:
            model.zero_grad(set_to_none=True)
            remove_adapter(model)
            if base_fingerprint(self.base) != self.fingerprint:
                raise RuntimeError(
                    "a trial must not change the base model, but its weights differ now"
                )

    def _trial_settings(self) -> TrainSettings:
        points = (0.25, 0.5, 0.75) if self.prune else ()
        return dataclasses.replace(self.settings, validation_points=points)

    def _watched(self) -> Sequence[TokenRow] | None:
        return self.validation_rows if self.prune else None

    def _reporter(self, handle: optuna.trial.Trial) -> Callable[[int, float], None]:
        def report(step: int, loss: float) -> None:
            handle.report(loss, step)
            if handle.should_prune():
                raise optuna.TrialPruned

        return report

    def _folder(self, index: int) -> Path:
        return self.directory / "trials" / f"{index:04d}"

    def _best(self) -> FrozenTrial | None:
        complete = [t for t in self.finished() if t.state == TrialState.COMPLETE]
        return min(complete, key=lambda t: (t.value, t.user_attrs["index"]), default=None)

    def _keep_best_only(self) -> None:
        """Delete the folders of finished trials but the best one's adapter."""
        best = self._best()
        for trial in self.finished():
            folder = self._folder(trial.user_attrs["index"])
            shutil.rmtree(folder if trial is not best else folder / "train", ignore_errors=True)

    def result(self, exhausted: bool) -> SearchResult:
        """Publish the best adapter as ``best/`` and attach it to the base model."""
        best, found = self._best(), [_trial(t) for t in self.finished()]
        if best is None:
            reasons = sorted({t.reason for t in found})
            raise ValueError(
                f"at least one trial must succeed, all {len(found)} did not: {reasons[0]}"
            )
        path = self.directory / "best"
        index = best.user_attrs["index"]
        _publish(self._folder(index) / "adapter", path)
        return SearchResult(
            rank=best.params["rank"],
            num_experts=best.params["num_experts"],
            best_trial=index,
            objective=float(best.value or 0.0),
            trials=found,
            model=load_adapter(self.base, path),
            adapter_path=path,
            sampler={**self.sampler, "storage": masked_url(self.study), "seed": self.seed},
            seconds=sum(t.seconds for t in found),
            distinct=len({(t.rank, t.num_experts) for t in found}),
            exhausted=exhausted,
        )


def _trial(trial: FrozenTrial) -> Trial:
    reason = trial.user_attrs.get("reason", "")
    if trial.state == TrialState.COMPLETE:
        state = "complete"
    else:
        state = "failed" if reason.startswith("failed") else "pruned"
    return Trial(
        number=trial.user_attrs["index"],
        rank=trial.params["rank"],
        num_experts=trial.params["num_experts"],
        state=state,
        value=trial.value if state == "complete" else None,
        seconds=trial.user_attrs["seconds"],
        redraws=trial.user_attrs["redraws"],
        reason=reason,
    )


def _publish(source: Path, target: Path) -> None:
    """Copy ``source`` to ``target``; a kill leaves the old, none or the new, and the next run repairs it."""
    beside, old = target.with_name("best.tmp"), target.with_name("best.old")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(source, beside)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    beside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def remove_adapter(model: Any) -> nn.Module:
    """Take every adapter off a PEFT model; the base model is as it was before, and is returned."""
    base: nn.Module = model.unload()
    for name in ("peft_config", "_hf_peft_config_loaded"):
        base.__dict__.pop(name, None)
    return base


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and up to 256 evenly spread values of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 256)].contiguous().cpu()
        digest.update(json.dumps([name, list(parameter.shape), str(parameter.dtype)]).encode())
        digest.update(picked.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
